import os

import pytest

from sparsekern.nn import durable


def test_synced_then_renamed_then_the_folder_synced(tmp_path, monkeypatch):
    done, path = [], tmp_path / "file"
    fsync, rename = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(type(path), "replace", lambda a, b: (done.append((str(a), str(b))), rename(a, b))[1])
    durable.replace(path, lambda aside: aside.write_text("new"))
    unfinished = str(durable.aside(path))
    assert done == [unfinished, (unfinished, str(path)), str(tmp_path)]
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failure_leaves_the_older_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def write(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        durable.replace(path, write)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["file"]
