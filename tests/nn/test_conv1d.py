"""SparseConv1d is a drop-in nn.Conv1d."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.files.conversion import dense_state, sparse_state
from sparsekern.topology import check_tied
from tests.oracle import assert_within


def layer(**options) -> sk.SparseConv1d:
    settings = {"in_channels": 6, "out_channels": 12, "block_size": (4, 2), "sparsity": 0.5, "seed": 0}
    return sk.SparseConv1d(**{**settings, "dtype": torch.float64, **options})


def test_it_is_right_to_the_arithmetic_of_its_dtype():
    """Against the dense convolution in float64, within the oracle's tolerance."""
    module = sk.SparseConv1d(32, 48, 3, padding=1, sparsity=0.5, block_size=16, seed=0)
    x = torch.randn(2, 32, 19)
    weight, bias = module.dense_weight().double(), module.bias.detach().double()
    exact = nn.functional.conv1d(x.double(), weight, bias, padding=1)
    magnitude = nn.functional.conv1d(x.double().abs(), weight.abs(), bias.abs(), padding=1)
    peer = nn.functional.conv1d(x, module.dense_weight(), module.bias.detach(), padding=1)
    terms = (weight != 0).sum((1, 2))[:, None]
    assert_within("y", module(x).detach(), exact, peer, magnitude, terms, torch.float32)


def test_from_dense_with_tied_taps():
    dense = nn.Conv1d(4, 8, 3)
    tied = sk.SparseConv1d.from_dense(dense, sparsity=0.5, block_size=2, tie_taps=True)
    check_tied(tied.topology)


def test_checkpoints_dense_and_sparse_and_of_the_wrong_shape():
    module, dense = layer(kernel_size=3), nn.Conv1d(6, 12, 3).double()
    kept = module.dense_weight() != 0
    module.load_state_dict(dense.state_dict())
    assert torch.equal(module.dense_weight(), dense.weight * kept)
    with pytest.raises(RuntimeError, match=r"shape \(12, 6, 1, 3\); it must be that of the layer, \(12, 6, 3\)"):
        module.load_state_dict({"weight": torch.zeros(12, 6, 1, 3), "bias": torch.zeros(12)})
    flat = sk.SparseConv2d(6, 12, (1, 3), block_size=(4, 2), sparsity=0.5, seed=0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"for a weight \(12, 6, 1, 3\), and the layer has \(12, 6, 3\)"):
        module.load_state_dict(flat.state_dict())


def test_files_say_that_it_has_one_dimension(tmp_path):
    pytest.importorskip("safetensors")
    module = layer(kernel_size=3)
    sk.save(module, tmp_path / "a.safetensors")
    state = sk.load_(nn.Conv1d(6, 12, 3, dtype=torch.float64), tmp_path / "a.safetensors").state_dict()
    assert torch.equal(state["weight"], module.dense_weight())
    assert torch.equal(dense_state(module.state_dict())["weight"], module.dense_weight())
    back = sparse_state(state, sparsity=None, block=(4, 2))
    other = layer(kernel_size=3, init="random")
    sk.load_(other, back)
    assert torch.equal(other.dense_weight(), module.dense_weight())


def audio() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(1, 16, 5),
        nn.ReLU(),
        nn.Conv1d(16, 32, 3, padding=1, stride=2),
        nn.Conv1d(32, 32, 3, groups=32),
        nn.Conv1d(32, 16, 1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 8),
    )


def test_sparsify_densify_and_summary():
    model = sk.sparsify_(audio(), 0.5, 8)
    assert [type(m).__name__ for m in model[:5]] == ["Conv1d", "ReLU", "SparseConv1d", "Conv1d", "SparseConv1d"]
    x = torch.randn(4, 1, 32)
    dense = sk.densify(model)
    assert type(dense[2]) is nn.Conv1d
    torch.testing.assert_close(dense(x), model(x))
    rows = {row.name: row for row in sk.summary(model, x).rows}
    assert rows["0"].note == "stem" and rows["3"].note == "depthwise"
    assert rows["2"].tokens == 4 * 14 and rows["2"].shape == (32, 16, 3)
    assert rows["2"].flops == 6 * 4 * 14 * 12 * 64  # 12 of 24 blocks of 8 x 8
    assert "2" in sk.summary(model, x).milliseconds
    profile = sk.analysis.profile(model, x)
    assert profile.layers["2"].multiply_adds == 4 * 14 * 12 * 64
    tied = sk.sparsify_(audio(), 0.5, 8, tie_taps=True, init="norm", distribution="erk")
    check_tied(tied[2].topology)


@pytest.mark.parametrize("method", [sk.SET, sk.RigL, sk.GSE])
def test_methods_move_its_blocks(method):
    """What RigL grows are the absent blocks of largest gradient in the dense twin."""
    torch.manual_seed(0)
    model = nn.Sequential(sk.SparseConv1d(16, 16, 3, padding=1, sparsity=0.5, block_size=4, seed=0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparse = method(model, optimizer, update_every=2)
    x, target = torch.randn(4, 16, 16), torch.randn(4, 16, 16)
    dense, grid = sk.densify(model), model[0].grid
    (dense(x) - target).square().sum().backward()
    norms = dense[0].weight.grad.view(4, 4, 4, 4, 3).norm(dim=(1, 3)).transpose(1, 2).flatten()  # rows, taps, channels
    before = set(model[0].topology.keys().tolist())
    for _ in range(2):
        (model(x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = sparse.step()
    after = set(model[0].topology.keys().tolist())
    grown, left = after - before, set(range(grid.cells)) - before - after
    assert moved and grown and len(after) == len(before)
    if method is sk.RigL:
        assert norms[list(grown)].min() > norms[list(left)].max()
