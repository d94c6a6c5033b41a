"""What a sparse layer accepts as a checkpoint, and that what it does not accept changes nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.layer_state import describe
from tests.nn.test_block_sparse import X, assert_index_is_fresh, layer

DAMAGES = [
    (lambda s: s.pop("row"), "has values, col but not row; save values, row and col together"),
    (lambda s: s.pop("values"), "has row, col but not values"),
    (lambda s: s.update(values=torch.ones(8, 1, 48)), r"topology does not fit: slot \d is at block"),
    (lambda s: s.update(values=torch.ones(3, 4, 3)), "rows of shape \\(8,\\) and columns of shape .* for 3 slots"),
    (lambda s: s.update(values=torch.ones(8)), r"values have shape \(8,\); they must be \(slots, bo, bi\)"),
    (lambda s: s.update(values=torch.ones(8, 0, 3)), r"values have shape \(8, 0, 3\); they must be"),
    (lambda s: s["row"].fill_(7), r"topology does not fit: slot 0 is at block \(7, "),
    (lambda s: (s["row"].fill_(1), s["col"].fill_(1)), "slots 0 and 1 are both at block"),
    (lambda s: s.update(row=s["row"].long()), "row is torch.int64"),
    (lambda s: s.update(row=s["row"][:3], col=s["col"][:3]), "columns of shape \\(3,\\) for 8 slots"),
    (lambda s: s.update(weight=torch.ones(3, 3)) or [s.pop(k) for k in ("values", "row", "col")],
     r"weight has shape \(3, 3\); it must be that of the layer, \(14, 10\)"),
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


@pytest.mark.parametrize("size", [(4, 3), (2, 3), (1, 1), (8, 5), (14, 10)])
def test_blocks_of_another_size_are_cut_anew_exactly(size):
    source, target = layer(0, block_size=size), layer(1, blocks=4, capacity=16)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dense_weight(), source.dense_weight()) and torch.equal(target.bias, source.bias)
    assert_index_is_fresh(target)
    target(X).sum().backward()


def test_a_convolution_too_with_tied_taps_and_groups():
    options = {"groups": 2, "seed": 0, "tie_taps": True, "sparsity": 0.5}
    source = sk.SparseConv2d(8, 12, 3, block_size=2, **options)
    target = sk.SparseConv2d(8, 12, 3, block_size=4, capacity=36, **options)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target.dense_weight(), source.dense_weight())


def test_fewer_blocks_leave_slots_free():
    source, target = layer(0, blocks=3), layer(1)
    target.load_state_dict(source.state_dict())
    assert target.topology.blocks() == 3 and torch.equal(target(X), source(X))
    source.load_state_dict(target.state_dict())
    assert torch.equal(target(X), source(X)), "free slots of the checkpoint are left out where there are fewer"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"blocks": 9},
            r"fills 9 blocks of \(4, 3\), the layer has 8 slots; .*=\(4, 3\), blocks=9, or with capa",
        ),
        (
            {"block_size": 5, "blocks": 6},
            r"fills 16 blocks of \(4, 3\) \(6 of \(5, 5\)\), the layer has 8 slots",
        ),
    ],
)
def test_too_many_blocks_name_the_way_out(source, message):
    with pytest.raises(RuntimeError, match=message):
        layer().load_state_dict(layer(1, **source).state_dict())


def test_the_metadata_say_what_matrix_it_is():
    other = sk.SparseLinear(12, 16, sparsity=0.5, block_size=(4, 3), seed=0, bias=False)
    target = layer(bias=False)
    state = other.state_dict()
    with pytest.raises(RuntimeError, match=r"is for a weight \(16, 12\), and the layer has \(14, 10\)"):
        target.load_state_dict(state)
    for version in (1, 99):
        state._metadata[""]["version"] = version
        with pytest.raises(RuntimeError, match=f"it has version {version}, and this sparsekern reads version 2"):
            target.load_state_dict(state)
    good = describe(target.grid)
    for damaged in (None, [], {}, {"out_features": "1"}, good | {"kernel": [1, 1, 1]}, good | {"transposed": 1}):
        state._metadata[""] = {"version": 2, "grid": damaged}
        with pytest.raises(RuntimeError, match="its metadata describe the grid as"):
            target.load_state_dict(state)


def test_a_state_without_metadata_is_made_and_loads():
    plain: dict = {}
    layer(0).state_dict(destination=plain)
    target = layer(1)
    target.load_state_dict(plain)
    assert torch.equal(target(X), layer(0)(X))


def test_a_layer_on_the_meta_device_takes_the_tensors_of_the_checkpoint():
    source = layer(0, blocks=3)
    with torch.device("meta"):
        target = layer(1)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target(X), source(X))
    with pytest.raises(RuntimeError, match="on the meta device must have the layer's blocks and slots"):
        layer(1).load_state_dict({k: v.to("meta") for k, v in source.state_dict().items()})


def test_torch_save_and_weights_only(tmp_path):
    source, target = nn.Sequential(layer(0)), nn.Sequential(layer(1))
    torch.save(source.state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert state._metadata["0"]["grid"] == describe(source[0].grid)
    target.load_state_dict(state)
    assert torch.equal(target(X), source(X))


def test_safetensors_round_trip(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="extra 'demo' is not installed")
    source, target = layer(0), layer(1)
    safetensors.save_file(source.state_dict(), tmp_path / "m.safetensors")
    target.load_state_dict(safetensors.load_file(tmp_path / "m.safetensors"))
    assert torch.equal(target(X), source(X))
