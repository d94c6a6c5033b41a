import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.files.stored_layers import stored_layers
from sparsekern.files.weight_files import with_metadata
from tests.nn.test_block_sparse import layer


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
        ("col", torch.full((8,), 2**31 - 1, dtype=torch.int32), "the index is int32 and holds fewer"),
    ],
)
def test_damage_is_named_with_the_layer(part, tensor, message):
    state = with_metadata({f"a.{key}": value for key, value in layer(0).state_dict().items()}, {})
    state[f"a.{part}"] = tensor
    with pytest.raises(ValueError, match=f"layer 'a' .*{message}"):
        stored_layers(state)
