"""What a sparse layer accepts as a checkpoint, and that what it does not accept changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.nn.test_block_sparse import X, assert_index_is_fresh, layer

DAMAGES = [
    (lambda s: s.pop("row"), "has values, col but not row; blocks without their places"),
    (lambda s: s.pop("values"), "has row, col but not values"),
    (lambda s: s.update(values=torch.ones(8, 4, 4)), r"has blocks of \(4, 4\), the layer of \(4, 3\); build the"),
    (lambda s: s.update(values=torch.ones(3, 4, 3)), "has 3 slots, the layer 8; build the layer with blocks=3"),
    (lambda s: s["row"].fill_(7), r"topology does not fit: slot 0 is at block \(7, "),
    (lambda s: (s["row"].fill_(1), s["col"].fill_(1)), "slots 0 and 1 are both at block"),
    (lambda s: s.update(row=s["row"].long()), "row is torch.int64"),
    (lambda s: s.update(row=s["row"][:3], col=s["col"][:3]), "the checkpoint has 3 places for 8 slots"),
    (lambda s: s.update(weight=torch.ones(3, 3)) or [s.pop(k) for k in ("values", "row", "col")],
     r"weight has shape \(3, 3\); the layer is \(14, 10\)"),
]  # fmt: skip


def test_it_holds_values_places_and_bias():
    assert list(layer().state_dict()) == ["values", "bias", "row", "col"]
    assert list(layer(block_size=1).state_dict()) == ["values", "bias", "row", "col"]


def test_another_topology_replaces_the_present_one():
    source, target = layer(0), layer(1)
    assert not torch.equal(source.row, target.row) or not torch.equal(source.col, target.col)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(X), source(X))
    assert_index_is_fresh(target)


@pytest.mark.parametrize("assign", [False, True])
def test_nested_and_assigned(assign):
    source, target = nn.Sequential(layer(0)), nn.Sequential(layer(1))
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(X), source(X))


def test_a_dense_checkpoint_keeps_the_topology():
    dense, module = nn.Linear(10, 14), layer()
    row = module.row.clone()
    keys = list(dense.state_dict())
    state = dense.state_dict()
    module.load_state_dict(state)
    assert list(state) == keys, "the caller's dict is not touched"
    assert torch.equal(module.row, row)
    kept = module.dense_weight() != 0
    assert torch.equal(module.dense_weight()[kept], dense.weight[kept])
    assert torch.equal(module.bias, dense.bias)


def test_phantom_elements_of_a_checkpoint_are_cleared():
    module = layer()
    state = module.state_dict()
    state["values"] = torch.ones_like(state["values"])
    module.load_state_dict(state)
    real = module.topology.real()
    assert real is not None and torch.equal(module.values, real.float())


@pytest.mark.parametrize(("damage", "text"), DAMAGES, ids=[text[:30] for _, text in DAMAGES])
@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_that_does_not_fit_changes_nothing(damage, text, strict):
    module = nn.Sequential(layer())
    before = copy.deepcopy(module.state_dict())
    state = {k: v.clone() for k, v in layer(1).state_dict().items()}
    damage(state)
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=strict)
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert_index_is_fresh(module[0])


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="extra 'demo' is not installed")
    source, target = layer(0), layer(1)
    safetensors.save_file(source.state_dict(), tmp_path / "m.safetensors")
    target.load_state_dict(safetensors.load_file(tmp_path / "m.safetensors"))
    assert torch.equal(target(X), source(X))
