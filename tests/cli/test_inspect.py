import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.inspect import in_parts, saved_seeds, weights_file
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


def test_names_are_shown_as_they_are_and_never_obeyed(tmp_path):
    names = ["[/nope]", "[red]weight", "a\x1b[2Jb", "b\x1b]52;c;aGk=\x07"]
    torch.save({name: torch.zeros(2) for name in names}, tmp_path / "m.pt")
    result = invoke(tmp_path / "m.pt")
    assert result.exit_code == 0 and "\x1b" not in result.stdout and "\x07" not in result.stdout
    for shown in ("[/nope]", "[red]weight", r"a\x1b[2Jb", r"b\x1b]52;c;aGk=\x07"):
        assert shown in result.stdout
    assert {row["name"] for row in json.loads(invoke(tmp_path / "m.pt", "--json").stdout)["tensors"]} == set(names)


@pytest.mark.parametrize("width", [80, 72, 30])
def test_names_are_broken_at_their_dots_alone(tmp_path, width):
    torch.save({"encoder.layers.11.self_attention.output.bias": torch.zeros(1024, 1024)}, tmp_path / "m.pt")
    text = CliRunner().invoke(application(), ["inspect", str(tmp_path / "m.pt")], env={"COLUMNS": str(width)}).stdout
    lines = [line.split("  ")[0].strip() for line in text.split("\n")]
    parts = [line for line in lines if line and not line.startswith(("tensor", "\u2500", "0 weights", str(tmp_path)))]
    assert "".join(parts) == "encoder.layers.11.self_attention.output.bias"
    assert all(part.endswith(".") for part in parts[:-1]) and "self_attention." in "\n".join(parts)


@pytest.mark.parametrize(
    ("name", "width", "lines"),
    [
        ("hidden1.bias", 20, ["hidden1.bias"]),
        ("hidden1.bias", 11, ["hidden1.", "bias"]),
        ("a.b.c.d", 4, ["a.b.", "c.d"]),
        ("averylongname.b", 4, ["averylongname.", "b"]),
        ("", 4, [""]),
    ],
)
def test_lines_of_a_name(name, width, lines):
    assert in_parts(name, width).split("\n") == lines


def run(folder):
    for seed, steps in ((0, (5, 12)), (3, (7,)), (4, ())):
        for step in steps:
            (folder / "checkpoints" / f"seed-{seed}" / f"step-{step:08d}").mkdir(parents=True)
            (folder / "checkpoints" / f"seed-{seed}" / f"step-{step:08d}" / "sparse.safetensors").touch()
        (folder / "checkpoints" / f"seed-{seed}").mkdir(exist_ok=True)
    (folder / "config.json").touch()
    return folder


def test_a_file_a_checkpoint_and_the_newest_of_a_run(tmp_path):
    folder = run(tmp_path)
    newest = folder / "checkpoints" / "seed-0" / "step-00000012"
    for path in (folder, newest, newest / "sparse.safetensors"):
        assert weights_file(path, "sparse", 0) == newest / "sparse.safetensors"
    assert saved_seeds(folder) == [0, 3]


def test_what_there_is_not(tmp_path):
    folder = run(tmp_path)
    (tmp_path / "grid" / "set-s0.9").mkdir(parents=True)
    for name in ("plan.json", "set-s0.9/config.json"):
        (tmp_path / "grid" / name).touch()
    for path, network, seed, message in (
        (tmp_path / "none", "sparse", 0, "does not exist; give a file of weights"),
        (folder, "sparse", 4, "seed is 4, which has no checkpoint in .*; those that have one: 0, 3"),
        (folder, "dense", 0, "network is 'dense', of which .* has no weights; it has those of: sparse"),
        (
            folder / "checkpoints",
            "sparse",
            0,
            "has no config.json; give a file of weights, a checkpoint folder or a run",
        ),
        (tmp_path / "grid", "sparse", 0, "grid, which is a comparison; give one of the runs in it, such as .*set-s0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            weights_file(path, network, seed)
