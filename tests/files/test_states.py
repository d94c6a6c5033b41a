"""State dicts: the sparse layers in them, and names as other libraries write them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from sparsekern.files.states import (
    merge_pruned,
    metadata_of,
    shared_prefix,
    stored_layers,
    with_metadata,
    without_compile,
)
from sparsekern.files.weight_files import read_state
from tests.nn.test_block_sparse import X, layer


def test_layers_with_their_grids():
    model = nn.Sequential(layer(0), nn.Linear(14, 8), sk.SparseConv2d(8, 6, 3, groups=2, sparsity=0.5, block_size=2))
    found = stored_layers(model.state_dict())
    assert list(found) == ["0", "2"] and all(one.described for one in found.values())
    assert [one.topology.grid for one in found.values()] == [model[0].grid, model[2].grid]
    assert found["0"].bytes() == {"values": 8 * 12 * 4, "places": 2 * 8 * 4}


def test_without_metadata_the_smallest_grid():
    found = stored_layers(dict(layer(0).state_dict()))[""]
    assert not found.described and found.topology.grid.weight_shape == (16, 12)


def test_bsr_tensors():
    dense = torch.kron(torch.tensor([[0, 1, 0], [2, 0, 3]]), torch.ones(2, 4))
    found = stored_layers({"a.weight": dense.to_sparse_bsr((2, 4)), "b.weight": dense})
    assert list(found) == ["a"] and found["a"].topology.grid.weight_shape == (4, 12)
    assert (found["a"].topology.row.tolist(), found["a"].topology.col.tolist()) == ([0, 1, 1], [1, 0, 2])


@pytest.mark.parametrize(
    ("part", "tensor", "message"),
    [
        ("values", torch.ones(8), r"of shapes \(8,\), \(8,\), \(8,\); they must be"),
        ("values", torch.ones(8, 0, 3), "they must be"),
        ("row", torch.zeros(3, dtype=torch.int32), "they must be"),
        ("row", torch.zeros(8), "row is torch.float32 and col is torch.int32; they must be int32"),
        ("row", torch.zeros(8, dtype=torch.int32), "slots . and . are both at block"),
        ("row", torch.full((8,), -7, dtype=torch.int32), "slot 0 is at block"),
        ("col", torch.full((8,), 2**31 - 1, dtype=torch.int32), "cells; there must be fewer than"),
    ],
)
def test_damage_is_named_with_the_layer(part, tensor, message):
    state = with_metadata({f"a.{key}": value for key, value in layer(0).state_dict().items()}, {})
    state[f"a.{part}"] = tensor
    with pytest.raises(ValueError, match=f"layer 'a' .*{message}"):
        stored_layers(state)


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(layer(seed), nn.BatchNorm1d(14), nn.Linear(14, 2)).eval()


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(net):
    return torch.compile(net, backend="eager")


def test_what_ddp_and_compile_add_is_not_saved(tmp_path, group):
    plain = model()
    inner = model()
    inner[0] = compiled(inner[0])
    wrapped = {
        "ddp": nn.parallel.DistributedDataParallel(model()),
        "compiled": compiled(model()),
        "both": compiled(nn.parallel.DistributedDataParallel(compiled(model()))),
        "inner": inner,
        "parallel": nn.DataParallel(model()),
    }
    for name, net in wrapped.items():
        sk.save(net, tmp_path / f"{name}.safetensors")
        state = read_state(tmp_path / f"{name}.safetensors")
        assert state.keys() == plain.state_dict().keys(), name
        assert metadata_of(state)["0"] == plain.state_dict()._metadata["0"]
        assert torch.equal(sk.load_(model(1), state)(X), plain(X)), name


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.", "a.b."])
def test_a_prefix_that_all_names_share_is_left_out_and_said(prefix, caplog):
    state = {prefix + key: value for key, value in model().state_dict().items()}
    metadata = {(prefix + name).removesuffix("."): entry for name, entry in model().state_dict()._metadata.items()}
    target = sk.load_(model(1), with_metadata(state, metadata))
    assert torch.equal(target(X), model()(X))
    told = prefix.replace("_orig_mod.", "")
    assert f"the state: all names begin with {told!r}, which is removed" in caplog.text or not told
    dense = sk.load_(sk.densify(model(1)), with_metadata(state, metadata))
    assert torch.allclose(dense(X), model()(X))


def test_into_wrapped_models(group):
    states = model().state_dict(), nn.parallel.DistributedDataParallel(model()).state_dict()
    inner = model(1)
    inner[0] = compiled(inner[0])
    for state in (*states, compiled(model()).state_dict()):
        for target in (nn.parallel.DistributedDataParallel(model(1)), compiled(model(1)), inner):
            assert torch.equal(sk.load_(target, state).eval()(X), model()(X))


def test_names_that_do_not_fit_stay_as_they_are():
    state = {f"x.{key}": value for key, value in model().state_dict().items()} | {"y": torch.ones(1)}
    with pytest.raises(ValueError, match=r"lacks 0.bias.*has unknown x.0.bias"):
        sk.load_(model(), state)
    assert shared_prefix(["a.b", "a"], {"c"}) == "" == shared_prefix(["a.b", "c.b"], {"d"}) == shared_prefix([], {"a"})
    assert shared_prefix(["a.b.w", "a.c"], {"b"}) == "a." and without_compile("a._orig_mod.b") == "a.b"


def test_two_names_that_become_one():
    state = {"0.weight": torch.ones(2, 2), "0._orig_mod.weight": torch.zeros(2, 2)}
    target = nn.Sequential(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match="two entries of the state have the same name without torch.compile's"):
        sk.load_(target, state)


def pruned():
    net = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 2))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    return net


def test_what_pruning_split_is_multiplied(tmp_path):
    net = pruned()
    torch.save(net.state_dict(), tmp_path / "a.pt")
    target = sk.load_(nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 2)), tmp_path / "a.pt")
    assert torch.equal(target[0].weight, net[0].weight) and torch.equal(target(X), net(X))
    sparse = nn.Sequential(layer(0), nn.Linear(14, 2))
    kept = sparse[0].dense_weight() != 0
    sk.load_(sparse, net.state_dict())
    assert torch.equal(sparse[0].dense_weight()[kept], net[0].weight[kept])
    again = sk.load_(pruned(), net.state_dict())
    assert torch.equal(again[0].weight_orig, net[0].weight_orig), "a model that is being pruned takes both"
    command = [
        "convert",
        tmp_path / "a.pt",
        tmp_path / "b.safetensors",
        "--to=sparse",
        "--keep-zeros",
        "--block-size=1",
    ]
    result = CliRunner().invoke(application(), list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert read_state(tmp_path / "b.safetensors")["0.values"].shape == (70, 1, 1)


def test_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"w_orig has shape \(2,\) and w_mask \(3,\); a pruning mask must have"):
        merge_pruned({"w_orig": torch.ones(2), "w_mask": torch.ones(3)})
    alone = {"w_mask": torch.ones(3), "v_orig": torch.ones(2)}
    assert merge_pruned(alone) == alone


def index(folder, name="model.safetensors.index.json", **changes):
    state = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 2)).state_dict()
    parts = {"0": "model-1.safetensors", "1": "model-2.bin"}
    save_file({key: value for key, value in state.items() if key[0] == "0"}, folder / parts["0"])
    torch.save({key: value for key, value in state.items() if key[0] == "1"}, folder / parts["1"])
    content = {"metadata": {"total_size": 1}, "weight_map": {key: parts[key[0]] for key in state} | changes}
    (folder / name).write_text(json.dumps(content))
    return folder / name, state


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_the_index_of_several_files(tmp_path, name):
    path, state = index(tmp_path, name)
    target = sk.load_(nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 2)), path)
    assert all(torch.equal(target.state_dict()[key], state[key]) for key in state)
    result = CliRunner().invoke(application(), ["inspect", str(path)])
    assert result.exit_code == 0 and "1.weight" in result.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"0.weight": "../model-1.safetensors"},
            r"names the file '../model-1.safetensors'; it must name files",
        ),
        (
            {"0.weight": "model.safetensors.index.json"},
            "the file 'model.safetensors.index.json'; it must name",
        ),
        ({"0.weight": "none.bin"}, "none.bin cannot be read: No such file"),
        ({"x": "model-2.bin"}, "model-2.bin lacks the tensor 'x' that model.safetensors.index.json names"),
    ],
)
def test_a_damaged_index(tmp_path, changes, message):
    path, _ = index(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        read_state(path)


@pytest.mark.parametrize("text", ["{}", "[]", "[" * 10**5, '{"weight_map": 3}', '{"weight_map": {"a": ', "x"])
def test_no_index(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json is not an index of weights in several files"):
        read_state(tmp_path / "a.json")
