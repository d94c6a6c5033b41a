"""Files of weights: what is written comes back, and damaged ones are refused before anything in them runs."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import nn

from sparsekern.files.states import metadata_of, sparse_names, with_metadata
from sparsekern.files.weight_files import ENTRY, first_line, read_state, read_torch, write_state
from tests.nn.test_block_sparse import layer


def model():
    return nn.Sequential(layer(0), nn.BatchNorm1d(14), nn.Linear(14, 2))


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "a b ü.pth"])
def test_back_as_it_went_in(tmp_path, name):
    state = model().state_dict()
    write_state(tmp_path / name, state)
    found = read_state(tmp_path / name)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    assert metadata_of(found)["0"] == state._metadata["0"] and sparse_names(found) == ["0"]
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_names_that_are_no_utf8(tmp_path, name):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    state = model().state_dict()
    write_state(folder / name, state)
    found = read_state(folder / name)
    assert all(torch.equal(found[key], state[key]) for key in state)
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{name} is .*damaged"):
        read_state(folder / name)


def test_equal_states_are_equal_files(tmp_path):
    for name in range(8):
        write_state(tmp_path / f"{name}.safetensors", nn.ModuleDict({"ü": layer(0)}).state_dict())
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    assert metadata_of(read_state(tmp_path / "0.safetensors")).keys() == {"ü"}


def test_a_layer_that_is_the_whole_model_and_tied_weights(tmp_path):
    state = layer(0).state_dict()
    state["again"] = state["bias"]
    write_state(tmp_path / "a.safetensors", state)
    found = read_state(tmp_path / "a.safetensors")
    assert sparse_names(found) == [""] and metadata_of(found)[""] == state._metadata[""]
    assert torch.equal(found["again"], found["bias"])


def test_files_without_our_entry(tmp_path):
    """Files of other libraries."""
    save_file(model().state_dict(), tmp_path / "a.safetensors")
    assert metadata_of(read_state(tmp_path / "a.safetensors")) == {}
    torch.save({"epoch": 3, "state_dict": model().state_dict()}, tmp_path / "a.pt")
    assert "0.values" in read_state(tmp_path / "a.pt")


def test_a_file_that_cannot_be_written(tmp_path):
    for target in (tmp_path / "none" / "a.safetensors", tmp_path / "none" / "a.pt"):
        with pytest.raises(ValueError, match=r"a\.\w+ cannot be written: No such file or directory; choose"):
            write_state(target, model().state_dict())


def whole(tmp_path, name="good.safetensors"):
    write_state(tmp_path / name, model().state_dict())
    return (tmp_path / name).read_bytes()


def with_entry(entry):
    def make(tmp_path):
        path = tmp_path / "entry"
        save_file(model().state_dict(), path, metadata={ENTRY: entry})
        return path.read_bytes()

    return make


def torch_file(content):
    def make(tmp_path):
        torch.save(content, tmp_path / "content")
        return (tmp_path / "content").read_bytes()

    return make


def newer(version):
    return with_metadata(layer(0).state_dict(), {"": {"version": version}})


def described(grid):
    return with_metadata(layer(0).state_dict(), {"": {"version": 2, "grid": grid}})


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


BAD = {
    "empty": (lambda _: b"", "is empty"),
    "text": (lambda _: b"these are no weights", "is neither a safetensors file nor one of torch.save"),
    "one byte": (lambda _: b"\x01", "is neither a safetensors file nor one of torch.save"),
    "picture": (lambda _: b"\x89PNG\r\n\x1a\n" + bytes(50), "is neither"),
    "pickle": (lambda _: pickle.dumps({"a": 1}), "is a bare pickle, which could run code and is not read"),
    "safetensors in its header": (lambda t: whole(t)[:100], "is truncated: its 100 bytes are fewer than its header"),
    "safetensors in a tensor": (lambda t: whole(t)[:-20], "is truncated or damaged: "),
    "safetensors with a tail": (lambda t: whole(t) + b"x", "is truncated or damaged: "),
    "safetensors header": (lambda t: whole(t).replace(b'"dtype"', b'"dtipe"', 1), "is truncated or damaged: "),
    "entry is no JSON": (with_entry("{"), "the entry 'sparsekern' of its metadata is invalid"),
    "entry is another": (with_entry("[]"), "the entry 'sparsekern' of its metadata is invalid"),
    "entry is deep": (with_entry("[" * 10**5), "the entry 'sparsekern' of its metadata is invalid"),
    "entry lacks layers": (with_entry('{"format_version": 2}'), "the entry 'sparsekern' of its metadata"),
    "newer safetensors": (
        with_entry(json.dumps({"format_version": 3, "layers": {}})),
        "has format version 3, and this sparsekern reads version 2; use the version of",
    ),
    "entry with a bad grid": (
        with_entry(json.dumps({"format_version": 2, "layers": {"0": {"out_features": -1}}})),
        "its metadata describe the grid as",
    ),
    "zip in the middle": (lambda t: whole(t, "good.pt")[:300], "is damaged, or not a torch.save file"),
    "zip at its end": (lambda t: whole(t, "good.pt")[:-5], "is damaged, or not a torch.save file"),
    "zip of something else": (lambda _: b"PK\x03\x04" + bytes(100), "is damaged, or not a torch.save file"),
    "code": (torch_file({"a": Harm()}), "it asks for more than tensors, which is not loaded"),
    "a model": (torch_file(nn.Linear(2, 2)), "it asks for more than tensors"),
    "a list": (torch_file([1, 2]), "does not hold a state_dict, a dict of tensors by name"),
    "a state of training": (torch_file({"epoch": 3}), "does not hold a state_dict"),
    "numbered": (torch_file({1: torch.ones(1)}), "does not hold a state_dict"),
    "newer torch": (torch_file(newer(3)), "it has version 3, and this sparsekern reads version 2"),
    "odd version": (torch_file(newer("x")), "it has version 'x', and this sparsekern reads version 2"),
    "odd grid": (torch_file(described([4])), "its metadata describe the grid as [4]"),
    "small grid": (torch_file(described(dict.fromkeys(("out_features", "in_features", "groups"), 0))), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), BAD.values(), ids=BAD)
def test_one_sentence_for_a_file_that_is_none(tmp_path, monkeypatch, make, sentence):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad file.bin"
    path.write_bytes(make(tmp_path))
    with pytest.raises(ValueError, match="^" + re.escape(str(path))) as caught:
        read_state(path)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="none cannot be read: No such file"):
        read_state(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_state(tmp_path)


def test_safetensors_missing_is_named(tmp_path, monkeypatch):
    content = whole(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ModuleNotFoundError, match="files of weights need safetensors; run: pip install safetensors"):
        read_state(tmp_path / "good.safetensors")
    assert content and safetensors


def test_a_matrix_too_large_for_blocks_of_one_element(tmp_path):
    """A million by a million, in blocks of 1024: the grid is checked in the blocks that the file has."""
    grid = {"out_features": 2**20, "in_features": 2**20, "kernel": None, "groups": 1}
    zero = torch.zeros(1, dtype=torch.int32)
    state = {"a.values": torch.zeros(1, 1024, 1024, dtype=torch.uint8), "a.row": zero, "a.col": zero.clone()}
    write_state(tmp_path / "a.safetensors", with_metadata(state, {"a": {"version": 2, "grid": grid}}))
    assert metadata_of(read_state(tmp_path / "a.safetensors"))["a"]["grid"] == grid


def test_only_tensors_with_numbers_are_written(tmp_path):
    for entry, message in (
        (3, "a is not a tensor, and"),
        (torch.empty(2, device="meta"), "a is on the meta device and has no data"),
    ):
        with pytest.raises(ValueError, match=rf"x.pt cannot be written: {message}"):
            write_state(tmp_path / "x.pt", {"a": entry})
    assert list(tmp_path.iterdir()) == []


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
    with pytest.raises(ValueError, match="is damaged, or not a torch.save file"):
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
