import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from sparsekern.files.torch_files import first_line, read_torch


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_tensors_and_plain_values_come_back_as_copies(tmp_path):
    state = OrderedDict(a=torch.arange(3))
    state._metadata = {"": {"version": 2}}
    content = {"state": state, 1: [torch.ones(2), None], "t": (1.5, "x"), "b": torch.eye(4).to_sparse_bsr((2, 2))}
    torch.save(content, tmp_path / "a.pt")
    found = read_torch(tmp_path / "a.pt")
    os.truncate(tmp_path / "a.pt", 0)  # a mapped tensor would now crash
    assert found["state"]["a"].tolist() == [0, 1, 2] and found["state"]._metadata == {"": {"version": 2}}
    assert found[1][0].tolist() == [1, 1] and found["t"] == (1.5, "x")
    assert torch.equal(found["b"].to_dense(), torch.eye(4))


def test_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"harm": Harm()}, "a.pt")
    with pytest.raises(ValueError, match=r"a.pt is damaged, or no .*: it asks for more than tensors"):
        read_torch(tmp_path / "a.pt")
    assert not (tmp_path / "harmed").exists()


def test_damage_inside_a_tensor_is_seen(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(bytes(3000)) + 1500] = 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"the checksum of .*data/0 is wrong"):
        read_torch(tmp_path / "a.pt")


def test_a_tensor_that_claims_more_than_the_file_has(tmp_path):
    torch.save({"a": torch.zeros(7)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert content.count(b"K\x07") >= 2  # the number of elements of the storage, and of the tensor
                content = content.replace(b"K\x07", b"J" + (2**30).to_bytes(4, "little"))
            new.writestr(entry.filename, content)
    with pytest.raises(ValueError, match="is damaged"):
        read_torch(tmp_path / "b.pt")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps({"a": 1})])
def test_no_such_file(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged, or no torch.save file"):
        read_torch(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match="it is compressed"):
        read_torch(tmp_path / "a.pt")


def test_the_first_line_of_an_error():
    assert (first_line(ValueError("a\nb")), first_line(KeyError()), first_line(ValueError("\n"))) == (
        "a",
        "KeyError",
        "ValueError",
    )
