import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from tests.nn.test_block_sparse import layer


def invoke(*arguments):
    return CliRunner().invoke(application(), ["inspect", *map(str, arguments)], env={"COLUMNS": "150"})


def test_layers_tensors_and_sums(tmp_path):
    net = nn.Sequential(layer(0, capacity=9), nn.Linear(14, 2))
    path = tmp_path / "m.safetensors"
    sk.save(net, path)
    found = json.loads(invoke(path, "--json").stdout)
    assert found["layers"] == [
        {
            "name": "0",
            "shape": [14, 10],
            "block_size": [4, 3],
            "blocks": 8,
            "slots": 9,
            "sparsity": net[0].sparsity,
            "dtype": "float32",
            "bytes": 9 * 12 * 4 + 2 * 9 * 4,
        }
    ]
    assert sorted((t["name"], t["shape"], t["bytes"]) for t in found["tensors"]) == [
        ("0.bias", [14], 56),
        ("1.bias", [2], 8),
        ("1.weight", [2, 14], 112),
    ]
    assert found["stored_weights"] == net[0].topology.elements() and found["format_version"] == 2
    assert found["bytes"] == sum(t.nbytes for t in net.state_dict().values())
    assert found["file_bytes"] == path.stat().st_size
    text = invoke(path).stdout
    for words in ("14 x 10", "8 + 1 free", "4 x 3", f"{100 * net[0].sparsity:.2f} %", "format version 2", "1.weight"):
        assert words in text


def test_a_file_that_does_not_say_how_large_its_layers_are(tmp_path):
    torch.save(dict(layer(0).state_dict()), tmp_path / "m.pt")
    found = json.loads(invoke(tmp_path / "m.pt", "--json").stdout)
    assert found["format_version"] == 1 and found["layers"][0]["shape"] is None
    assert "(the layer)" in invoke(tmp_path / "m.pt").stdout


def test_a_dense_file(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "m.pt")
    assert "no sparse layer" in invoke(tmp_path / "m.pt").stdout


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist; give a file of weights"),
        (lambda p: p.touch(), "is empty"),
        (lambda p: p.mkdir(), "has no config.json; give a file of weights"),
        (
            lambda p: torch.save({"values": torch.ones(1), "row": torch.ones(1), "col": torch.ones(1)}, p),
            "they must be",
        ),
        (lambda p: (p.mkdir(), (p / "config.json").touch()), "config.json is missing or damaged"),
    ],
)
def test_an_error_is_one_line_and_no_traceback(tmp_path, make, message):
    make(tmp_path / "the file")
    result = invoke(tmp_path / "the file", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr and result.stderr.count("\n") == 1
