"""Files that are whole or not there: several writers, killed writers, links, permissions, syncing."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

import sparsekern as sk
from sparsekern.files import atomic_files as af
from sparsekern.files.weight_files import read_state

FORK = multiprocessing.get_context("fork")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_synced_then_renamed_then_the_folder_synced(tmp_path, monkeypatch):
    done, path = [], tmp_path / "file.txt"
    fsync, rename = os.fsync, type(path).replace
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(type(path), "replace", lambda a, b: (done.append((str(a), str(b))), rename(a, b))[1])
    written = []
    af.replace(path, lambda unfinished: (written.append(str(unfinished)), unfinished.write_text("new")))
    assert done == [written[0], (written[0], str(path)), str(tmp_path)]
    assert written[0].endswith(".txt") and Path(written[0]).parent.parent == tmp_path
    assert path.read_text() == "new" and names(tmp_path) == ["file.txt"]


def test_a_failure_leaves_the_older_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(unfinished):
        unfinished.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        af.replace(path, write)
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_errors_of_the_system_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        af.replace(tmp_path / "none" / "file", lambda _: None)
    assert caught.value.filename == str(tmp_path / "none" / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        af.replace(tmp_path / "folder", lambda _: None)
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "folder"), None)


def test_names_as_long_as_the_system_allows(tmp_path):
    af.replace(tmp_path / ("x" * 255), lambda unfinished: unfinished.write_text("a"))
    assert names(tmp_path) == ["x" * 255]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, mode):
    """Also of safetensors files, which their library makes for the owner alone."""
    before = os.umask(umask)
    try:
        for name in ("a.safetensors", "a.pt"):
            sk.save(torch.nn.Linear(2, 2), tmp_path / name)
        af.make_folder(tmp_path / "folder", lambda folder: (folder / "x").touch())
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("a.safetensors", "a.pt", "folder/x")] == [mode] * 3
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_link_is_replaced_and_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("mine")
    path.symlink_to(victim)
    af.replace(path, lambda unfinished: unfinished.write_text("new"))
    assert victim.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_appending(tmp_path):
    af.append(tmp_path / "a", "1\n")
    af.append(tmp_path / "a", "2\n")
    assert (tmp_path / "a").read_text() == "1\n2\n"
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        af.append(tmp_path / "link", "3\n")
    assert (tmp_path / "a").read_text() == "1\n2\n"


def test_a_folder_is_there_whole_and_the_first_one_stays(tmp_path):
    path = tmp_path / "folder"

    def fail(folder):
        (folder / "x").write_text("half")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        af.make_folder(path, fail)
    assert names(tmp_path) == []
    for text in ("first", "second"):
        af.make_folder(path, lambda folder, text=text: (folder / "x").write_text(text))
    assert names(tmp_path) == ["folder"] and (path / "x").read_text() == "first"
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        af.make_folder(tmp_path / "file", lambda folder: None)


def test_a_folder_or_a_link_is_removed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    af.remove_folder(tmp_path / "link")
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == ["x"]
    af.remove_folder(tmp_path / "mine")
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        af.remove_folder(tmp_path / "mine")


def test_new_folders_and_what_they_lie_in_are_synced(tmp_path, monkeypatch):
    done, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda h: (done.append(os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    af.make_parents(tmp_path / "a" / "b")
    af.make_parents(tmp_path / "a" / "b")
    assert done == [str(tmp_path), str(tmp_path / "a")] and (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        af.make_parents(tmp_path / "file" / "x")


def test_a_link_in_place_of_a_folder_is_refused(tmp_path):
    af.refuse_link(tmp_path)
    af.refuse_link(tmp_path / "none")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="link is a symbolic link, and files are not written through links: replace"):
        af.refuse_link(tmp_path / "link")


def stuck(path, ready):
    def write(unfinished):
        unfinished.write_text("half")
        ready.set()
        signal.pause()

    af.replace(path, write)


def test_leftovers_of_killed_writers_go_at_the_next_write_and_those_of_living_ones_stay(tmp_path):
    writers = []
    for name in ("dead", "alive"):
        ready = FORK.Event()
        writers.append(FORK.Process(target=stuck, args=(tmp_path / name, ready)))
        writers[-1].start()
        assert ready.wait(30)
    try:
        assert len(names(tmp_path)) == 2 and all(map(af.is_private, names(tmp_path)))
        writers[0].kill()
        writers[0].join()
        af.replace(tmp_path / "file", lambda unfinished: unfinished.write_text("new"))
        assert [name for name in names(tmp_path) if not af.is_private(name)] == ["file"]
        assert len(names(tmp_path)) == 2, "that of the living writer is left alone"
    finally:
        writers[1].kill()
        writers[1].join()
    af.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["file"]
    af.remove_leftovers(tmp_path / "none")


def test_leftovers_of_other_machines_and_names_that_only_look_like_leftovers_stay(tmp_path):
    elsewhere, link, file = (f".{machine}-{16 * '0'}.unfinished" for machine in ("0" * 8, af._machine(), "1" * 8))
    (tmp_path / "mine").mkdir()
    (tmp_path / elsewhere).mkdir()
    (tmp_path / file).touch()
    (tmp_path / link).symlink_to(tmp_path / "mine")
    (tmp_path / "data.unfinished").mkdir()
    af.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([elsewhere, link, file, "data.unfinished", "mine"])
    assert names(tmp_path / "mine") == [], "nor is a lock made in what a link leads to"


def test_a_private_folder_that_another_writer_takes_for_a_leftover_is_replaced_by_a_new_one(tmp_path, monkeypatch):
    import filelock

    acquire, taken = filelock.FileLock.acquire, []

    def first_taken(lock, *args, **kwargs):
        if not taken:
            taken.append(Path(lock.lock_file).parent)
            af.remove_leftovers(tmp_path)
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", first_taken)
    af.replace(tmp_path / "file", lambda unfinished: unfinished.write_text("new"))
    assert taken and names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "new"


def test_a_folder_that_is_deleted_while_its_lock_is_made_is_tried_again(tmp_path, monkeypatch):
    """``FileLock`` makes the folder if it is not there, which fails so when it goes between two calls."""
    filelock = pytest.importorskip("filelock")
    acquire, taken = filelock.FileLock.acquire, []

    def first_gone(lock, *args, **kwargs):
        if not taken:
            taken.append(Path(lock.lock_file).parent)
            taken[0].rmdir()
            raise FileExistsError(errno.EEXIST, "File exists")
        return acquire(lock, *args, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", first_gone)
    af.replace(tmp_path / "file", lambda unfinished: unfinished.write_text("new"))
    assert taken and names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "new"


def write_over_and_over(path, number, until, counts):
    torch.set_num_threads(1)
    state = {"a": torch.full((200_000,), float(number)), "b": torch.full((50,), float(number))}
    written = 0
    while time.monotonic() < until:
        sk.files.weight_files.write_state(path, state)
        written += 1
    counts.put(written)


def three_writers_and_a_reader(path, seconds):
    """Return how often the three wrote and how often a reader found one writer's state; anything else raises."""
    sk.files.weight_files.write_state(path, {"a": torch.zeros(200_000), "b": torch.zeros(50)})
    counts, until = FORK.Queue(), time.monotonic() + seconds
    writers = [FORK.Process(target=write_over_and_over, args=(path, i, until, counts)) for i in (1, 2, 3)]
    for writer in writers:
        writer.start()
    reads, seen = 0, set()
    while time.monotonic() < until:
        state = read_state(path)
        values = torch.cat([state["a"], state["b"]]).unique().tolist()
        assert state["a"].shape == (200_000,) and len(values) == 1, values
        reads += 1
        seen.update(values)
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    return {"writes": [counts.get() for _ in writers], "reads": reads, "of_writers": sorted(seen)}


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_three_writers_and_a_reader(tmp_path, name):
    """``python -m tests.files.test_atomic_files`` does it for ten seconds, and prints the counts."""
    found = three_writers_and_a_reader(tmp_path / name, 1.0)
    assert min(found["writes"]) > 0 and found["reads"] > 0
    assert names(tmp_path) == [name]


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "EIO"])
def test_disks_without_locks(tmp_path, monkeypatch, code):
    """Network disks may have none; then files are written all the same. Other errors leave nothing behind."""
    fcntl = pytest.importorskip("fcntl")

    def fail(*arguments: object) -> None:
        raise OSError(getattr(errno, code), "no lock")

    monkeypatch.setattr(fcntl, "flock", fail)
    path = tmp_path / "a.txt"
    for text in ("first", "second"):
        if code == "EIO":
            with pytest.raises(OSError, match="no lock"):
                af.replace(path, lambda unfinished, text=text: unfinished.write_text(text))
        else:
            af.replace(path, lambda unfinished, text=text: unfinished.write_text(text))
            assert path.read_text() == text
    assert [file.name for file in tmp_path.iterdir()] == ([] if code == "EIO" else ["a.txt"])


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.safetensors", "a.pt"):
            print(name, json.dumps(three_writers_and_a_reader(Path(folder, name), 10.0)))
