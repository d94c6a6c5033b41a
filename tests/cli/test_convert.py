import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from sparsekern.files.weight_files import read_state
from tests.nn.test_block_sparse import layer


def invoke(*arguments):
    return CliRunner().invoke(application(), ["convert", *map(str, arguments)], env={"COLUMNS": "150"})


@pytest.fixture
def source(tmp_path):
    sk.save(
        nn.Sequential(sk.SparseLinear(12, 8, sparsity=0.5, block_size=4, seed=0), nn.Linear(8, 2)),
        tmp_path / "s.safetensors",
    )
    return tmp_path / "s.safetensors"


def test_from_form_to_form_every_value_stays(source, tmp_path):
    net = sk.load_(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2)), source)
    for target, options in (
        ("bsr.pt", ["--to=bsr"]),
        ("dense.safetensors", ["--to=dense"]),
        ("small.pth", ["--to=sparse", "--keep-zeros", "--block-size=2x1", "--ignore=1"]),
        ("last.safetensors", ["--to=dense"]),
    ):
        result = invoke(source, tmp_path / target, *options)
        assert result.exit_code == 0, result.output
        source = tmp_path / target
    assert all(torch.equal(net.state_dict()[key], value) for key, value in read_state(source).items())
    small = read_state(tmp_path / "small.pth")
    assert small["0.values"].shape[1:] == (2, 1) and "1.weight" in small


def test_json_says_what_was_written(source, tmp_path):
    target = tmp_path / "a b.safetensors"
    result = invoke(source, target, "--to=sparse", "--sparsity=0.75", "--layers", "re:0", "--json")
    found = json.loads(result.stdout)
    assert found["file"] == str(target) and found["file_bytes"] == target.stat().st_size
    assert [(one["name"], one["blocks"]) for one in found["layers"]] == [("0", 2)]
    assert (
        f"{target}: 1 sparse layers"
        in invoke(source, target, "--to=sparse", "--sparsity=0.75", "--layers=0", "--force").stdout
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["t.safetensors", "--to=dense", "--sparsity=0.5"], "to is dense, which takes no --sparsity"),
        (["t.safetensors", "--to=sparse"], "needs --sparsity or --keep-zeros, and not both"),
        (["t.safetensors", "--to=sparse", "--sparsity=0.5", "--keep-zeros"], "and not both"),
        (["t.safetensors", "--to=sparse", "--sparsity=1.5"], "sparsity is 1.5"),
        (["t.safetensors", "--to=sparse", "--keep-zeros", "--block-size=0"], "block_size is '0'; it must be"),
        (["t.safetensors", "--to=sparse", "--keep-zeros", "--block-size=2x2x2"], "block_size is '2x2x2'"),
        (["t.safetensors", "--to=sparse", "--keep-zeros", "--layers=re:("], "is not a regular expression"),
        (["t.safetensors", "--to=sparse", "--keep-zeros", "--layers=x"], "nothing to convert"),
        (["t.safetensors", "--to=bsr"], "BSR tensors need a file of torch.save"),
        (["t.onnx", "--to=dense"], "the name must end in .safetensors, .pt or .pth"),
        (["s.safetensors", "--to=dense"], "which exists; choose another name, or --force"),
        (["none/t.safetensors", "--to=dense"], "whose folder does not exist; make the folder, or choose another name"),
        ([".", "--to=dense"], "the name must end in .safetensors"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(source, tmp_path, options, message):
    before = source.read_bytes()
    result = invoke(source, tmp_path / options[0], *options[1:])
    assert (result.exit_code, result.stdout) == (2, "") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source] and source.read_bytes() == before


def test_a_file_without_sizes_names_the_way_out(tmp_path):
    torch.save(dict(layer(0).state_dict()), tmp_path / "m.pt")
    result = invoke(tmp_path / "m.pt", tmp_path / "t.pt", "--to", "dense")
    assert result.exit_code == 2 and "load it into the model with sparsekern.load_" in result.stderr
