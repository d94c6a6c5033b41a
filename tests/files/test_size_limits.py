"""Small files that ask for much are refused by their headers, before memory is allocated; an option lifts the limit."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from sparsekern.files.conversion import bsr_state, dense_state, sparse_state
from sparsekern.files.size_limits import FACTOR, Limits, TooLarge
from sparsekern.files.weight_files import ENTRY, read_state, read_torch, write_state
from tests.memory import allocations

SMALL = Limits(gib=2**-10, tensors=100)


def invoke(*arguments):
    return CliRunner().invoke(application(), list(map(str, arguments)), env={"COLUMNS": "200"})


def test_a_file_may_ask_for_gib_or_for_many_times_its_size():
    limits = Limits(gib=1.0)
    limits.check_bytes("x", 2**30, 1)
    limits.check_bytes("x", FACTOR * 2**31, 2**31)
    message = r"^x has 10 bytes and asks for 1 GiB of memory, and max_gib is 1; if you trust the file, choose a la"
    with pytest.raises(TooLarge, match=message):
        limits.check_bytes("x", 2**30 + 1, 10)
    Limits(gib=math.inf, tensors=10**400).check_bytes("x", 10**30, 1)
    with pytest.raises(TooLarge, match="x holds 101 tensors, and max_tensors is 100; if you trust the file, choose"):
        SMALL.check_tensors("x", 101)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gib": 0}, ValueError, "max_gib is 0; it must be a number above 0"),
        ({"gib": math.nan}, ValueError, "max_gib is nan"),
        ({"gib": "x", "option": "data_max_gib"}, TypeError, "data_max_gib is 'x'; it must be a number above 0"),
        ({"tensors": -1}, ValueError, "max_tensors is -1"),
    ],
)
def test_limits_that_are_none(options, error, message):
    with pytest.raises(error, match=message):
        Limits(**options)


def test_expanded_tensors(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**20), "b": [torch.zeros(2)]}, tmp_path / "a.pt")
    with pytest.raises(TooLarge, match=r"a.pt has \d+ bytes and asks for 0.00391 GiB"):
        read_state(tmp_path / "a.pt", SMALL)
    assert read_torch(tmp_path / "a.pt")["a"].shape == (2**20,)
    torch.save({"a": torch.zeros(1).expand(2**40)}, tmp_path / "b.pt")
    for call in (lambda: sk.load_(torch.nn.Linear(1, 1), tmp_path / "b.pt"), lambda: read_state(tmp_path / "b.pt")):
        with pytest.raises(ValueError, match="asks for 4.1e"):
            call()
    result = invoke("inspect", tmp_path / "b.pt")
    assert result.exit_code == 2 and "choose a larger max_gib" in result.output


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_many_tensors(tmp_path, name):
    write_state(tmp_path / name, {f"a{i}": torch.zeros(1) for i in range(101)})
    with pytest.raises(TooLarge, match=r"holds (about )?\d+ tensors, and max_tensors is 100"):
        read_state(tmp_path / name, SMALL)
    assert len(read_state(tmp_path / name)) == 101
    assert invoke("inspect", tmp_path / name, "--max-tensors", 50).exit_code == 2
    assert invoke("inspect", tmp_path / name, "--max-tensors", 200).exit_code == 0
    with pytest.raises(ValueError, match="max_tensors is 50"):
        sk.load_(torch.nn.Linear(1, 1), tmp_path / name, max_tensors=50)


def test_many_values_that_share_a_tensor_and_a_list_that_holds_itself(tmp_path):
    inner = [torch.zeros(1)] * 20
    for _ in range(6):
        inner = [inner] * 20
    torch.save({"a": inner}, tmp_path / "a.pt")
    loop = []
    loop.append(loop)
    torch.save({"a": loop}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match=f"{name} (holds over 10000 values|is damaged)"):
            read_torch(tmp_path / name, SMALL)


def test_a_header_of_many_keys_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
    text = b"{" + b" " * 10**6 + b"}"
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text)
    monkeypatch.setattr("sparsekern.files.weight_files._read_safetensors", lambda *_: pytest.fail("it was parsed"))
    with pytest.raises(TooLarge, match="a holds about 5000 tensors, and max_tensors is 100"):
        read_state(tmp_path / "a", SMALL)


@pytest.fixture
def huge(tmp_path):
    """A file of a few hundred bytes whose metadata claim a large matrix."""
    grid = {"out_features": 2**15, "in_features": 2**15, "kernel": None, "groups": 1}
    one = torch.zeros(1, dtype=torch.int32)
    entry = {ENTRY: json.dumps({"format_version": 2, "layers": {"a": grid}})}
    save_file({"a.values": torch.ones(1, 1, 1), "a.row": one, "a.col": one.clone()}, tmp_path / "huge", metadata=entry)
    return tmp_path / "huge"


def test_a_grid_that_is_claimed(huge, tmp_path):
    state = read_state(huge)
    for convert in (
        dense_state,
        lambda s: sparse_state(s, sparsity=0.5, block=None),
        lambda s: bsr_state(s, Limits(gib=2**-14)),
    ):
        with pytest.raises(TooLarge, match="what is converted has 12 bytes and asks for"):
            convert(state)
    for to in (["dense"], ["sparse", "--sparsity", "0.5"]):
        command = ["convert", huge, tmp_path / "o.safetensors", "--to", *to]
        results = []
        assert allocations(lambda command=command, results=results: results.append(invoke(*command))).peak < 2**20
        assert results[0].exit_code == 2 and "asks for 4 GiB" in results[0].output
        assert not (tmp_path / "o.safetensors").exists()


def test_the_option_lifts_the_limit(tmp_path):
    sk.save(torch.nn.Sequential(sk.SparseLinear(64, 64, sparsity=0.99, block_size=1)), tmp_path / "a.safetensors")
    command = ["convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "dense", "--max-gib"]
    assert "choose a larger max_gib" in invoke(*command, 1e-9).output
    assert invoke(*command, 1).exit_code == 0
    with pytest.raises(ValueError, match="max_gib is 0"):
        sk.load_(torch.nn.Linear(1, 1), tmp_path / "a.safetensors", max_gib=0)


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.eye(3).to_sparse(), "torch.sparse_coo"),
        (torch.eye(3).to_sparse_csr(), "torch.sparse_csr"),
        (torch.eye(4).to_sparse_bsr((2, 2)), "torch.sparse_bsr"),
        (torch.empty(3, device="meta"), "on the meta device"),
    ],
)
@pytest.mark.parametrize("name", ["a", "a.row", "bias"])
def test_tensors_of_another_kind_are_refused_by_every_command(tmp_path, tensor, kind, name):
    state = {"a.values": torch.zeros(3, 1, 1), "a.row": torch.zeros(3).int(), "a.col": torch.zeros(3).int()}
    torch.save(state | {name: tensor}, tmp_path / "a.pt")
    for command in (["inspect", tmp_path / "a.pt"], ["convert", tmp_path / "a.pt", tmp_path / "b.pt", "--to", "dense"]):
        result = invoke(*command)
        assert result.exit_code == 2 and f"has a tensor '{name}' that is {kind}; only dense" in result.output
