"""Every form into every other, compared with the dense weight."""

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.files.conversion import EIGHT_BIT, bsr_state, dense_state, sparse_state
from sparsekern.files.states import stored_layers, with_metadata
from sparsekern.files.weight_files import read_state, write_state
from tests.nn.test_block_sparse import layer


def model():
    conv = sk.SparseConv2d(8, 6, 3, sparsity=0.5, block_size=2, seed=1)
    even = sk.SparseLinear(12, 8, sparsity=0.5, block_size=4, seed=2)
    return nn.Sequential(even, nn.BatchNorm1d(8), nn.Linear(8, 6), conv)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_to_dense_is_densify():
    net = model()
    assert same(dense_state(net.state_dict()), sk.densify(net).state_dict())
    assert list(dense_state(net.state_dict())) == list(sk.densify(net).state_dict()), "in the same order"


def test_to_bsr_and_back(tmp_path):
    net = model()
    bsr = bsr_state(net.state_dict())
    assert bsr["0.weight"].layout == torch.sparse_bsr and bsr["0.weight"].values().shape == net[0].values.shape
    assert bsr["3.weight"].shape == (6, 8, 3, 3), "a convolution is dense there"
    write_state(tmp_path / "a.pt", bsr)
    found = read_state(tmp_path / "a.pt")
    assert same(dense_state(found), sk.densify(net).state_dict())
    back = sparse_state(found, sparsity=None, block=None, chosen=lambda name: name == "0")
    assert same(dense_state(back), sk.densify(net).state_dict())
    assert sorted(back["0.col"].tolist()) == sorted(net[0].col.tolist())


def test_exact_from_dense():
    dense = sk.densify(model()).state_dict()
    new = sparse_state(dense, sparsity=None, block=(4, 4), chosen=lambda name: name in ("0", "3"))
    assert same(dense_state(new), dense)
    assert torch.equal(new["0.row"].sort().values, model()[0].row.sort().values)


def test_by_magnitude_is_sparsify():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 12), nn.Conv2d(8, 6, 3), nn.Conv2d(3, 6, 3), nn.BatchNorm1d(12))
    new = sparse_state(net.state_dict(), sparsity=0.5, block=(4, 4))
    assert list(stored_layers(new)) == ["0", "1"], "a stem stays dense"
    sk.sparsify_(net, 0.5, 4, targets=["0", "1"], init="norm")
    assert same(dense_state(new), sk.densify(net).state_dict())
    assert sk.load_(net, new) is net


def test_sparse_layers_are_cut_anew():
    net = nn.Sequential(layer(0))
    dense = sk.densify(net).state_dict()
    new = sparse_state(net.state_dict(), sparsity=None, block=(2, 2))
    assert new["0.values"].shape[1:] == (2, 2) and same(dense_state(new), dense)
    fewer = sparse_state(net.state_dict(), sparsity=0.75, block=None)
    assert fewer["0.values"].shape == (4, 4, 3)
    kept = stored_layers(fewer)["0"].topology
    norms = dense["0.weight"].square().sum()
    assert dense_state(fewer)["0.weight"].square().sum() > norms / 2 and kept.blocks() == 4


def test_the_way_out_of_blocks_that_do_not_divide_works():
    state = layer(0).state_dict()
    cut = sparse_state(state, sparsity=None, block=(2, 2))
    assert torch.equal(bsr_state(cut)["weight"].to_dense(), dense_state(state)["weight"])


def test_blocks_that_stick_out_one_way_are_no_error():
    cut = sparse_state({"weight": torch.ones(3, 32)}, sparsity=None, block=(16, 16))
    assert cut["values"].shape == (2, 16, 16)


def test_a_layer_of_zeros_keeps_a_block():
    free = torch.full((3,), -1, dtype=torch.int32)
    source = nn.Sequential(layer(0, blocks=3))
    state = source.state_dict() | {"0.row": free, "0.col": free}
    state = with_metadata(state, source.state_dict()._metadata)
    assert sparse_state(state, sparsity=None, block=(2, 2))["0.values"].shape == (1, 2, 2)
    zeros = {"weight": torch.zeros(4, 4)}
    assert sparse_state(zeros, sparsity=None, block=(2, 2))["values"].shape == (1, 2, 2)
    assert sparse_state({"weight": torch.full((4, 4), torch.nan)}, sparsity=None, block=(2, 2))["values"].shape[0] == 4


@pytest.mark.parametrize(
    ("state", "convert", "message"),
    [
        (dict(layer(0).state_dict()), dense_state, "does not hold the size of layer ''; load it"),
        (
            layer(0).state_dict(),
            bsr_state,
            "is 14 x 10 in blocks of 4x3, which do not divide it .* first convert it to sparse, .*, such as 2x2$",
        ),
        ({"a": torch.ones(3)}, lambda s: sparse_state(s, sparsity=0.5, block=(1, 1)), "nothing to convert"),
        ({"weight": torch.ones(3, 3)}, lambda s: sparse_state(s, sparsity=0.5, block=None), "block_size is missing"),
        ({"weight": torch.ones(3, 3)}, lambda s: sparse_state(s, sparsity=0.99, block=(3, 3)), "every layer needs"),
        (
            {"a.weight": torch.ones(3, 5)},
            lambda s: sparse_state(s, sparsity=None, block=(9, 6)),
            "block_size is 9x6, larger than layer 'a' of 3 x 5; choose smaller blocks",
        ),
        (
            {"weight": torch.ones(3, 8, 3, 3)},
            lambda s: sparse_state(s, sparsity=0.5, block=(16, 16)),
            "block_size is 16x16, larger than layer '' of 3 x 8",
        ),
    ],
)
def test_what_cannot_be_done_is_said(state, convert, message):
    with pytest.raises(ValueError, match=message):
        convert(state)


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_eight_bit_weights_go_into_every_form_and_back_to_the_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(10, 9, generator=generator) * (torch.rand(10, 9, generator=generator) < 0.5)).to(dtype)
    weight[:4, :3] = torch.zeros(4, 3).to(dtype)
    state = {"a.weight": weight, "a.scale": torch.ones(1).to(dtype)}
    sparse = sparse_state(state, sparsity=None, block=(4, 3))
    assert sparse["a.values"].dtype == dtype and 0 < sparse["a.values"].shape[0] < 9
    other = sparse_state(sparse, sparsity=None, block=(2, 3))
    for form in (sparse, other, bsr_state(other)):
        dense = dense_state(form)["a.weight"]
        assert dense.dtype == dtype and torch.equal(dense.view(torch.uint8), weight.view(torch.uint8))
    strongest = sparse_state(state, sparsity=2 / 3, block=(5, 3))
    norms = weight.double().view(2, 5, 3, 3).square().sum((1, 3)).flatten()
    kept = strongest["a.row"] * 3 + strongest["a.col"]
    assert set(kept.tolist()) == set(norms.topk(2).indices.tolist())
