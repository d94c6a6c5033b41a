"""Methods on convolutions: what they choose against the dense gradient, micro-batches, resumption."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.topology import generator_for, part_of
from sparsekern.training import GradientMethod
from sparsekern.training.growth.gse import DISTRIBUTIONS, weights
from tests.oracle_conv2d import conv_blocks, dense_gradients
from tests.topology.test_sampling import chi_square_quantile
from tests.training.test_base import check_resumed

F64 = torch.float64
CONVS: dict[str, Callable[[], nn.Conv2d]] = {
    "plain": lambda: nn.Conv2d(10, 14, 3, padding=1),
    "groups": lambda: nn.Conv2d(12, 16, 3, stride=2, padding=1, groups=2),
    "dilation": lambda: nn.Conv2d(6, 10, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
    "same": lambda: nn.Conv2d(6, 10, 2, padding="same"),
    "pointwise": lambda: nn.Conv2d(12, 20, 1),
}
METHODS = {
    "SET": (sk.SET, {}),
    "RigL": (sk.RigL, {"scoring": "exact"}),
    "RigL, screened": (sk.RigL, {"scoring": "screen", "shortlist": 1e6}),
    "RigL, some tokens": (sk.RigL, {"score_tokens": 20}),
    "GSE": (sk.GSE, {}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
    "GraEst, global, some tokens": (sk.GSE, {"distribution": "graest", "scope": "global", "score_tokens": 20}),
    "VRPGE": (sk.VRPGE, {"floor": 0.05}),
    "Gradual": (sk.Gradual, {"final_sparsity": 0.8}),
    "MEST": (sk.MEST, {"soft_bound": True}),
    "SRigL": (sk.SRigL, {"scoring": "screen"}),
    "DSR": (sk.DSR, {"threshold": 0.05}),
    "TopKAST": (sk.TopKAST, {}),
    "GraNet": (sk.GraNet, {"final_sparsity": 0.8, "scoring": "screen", "shortlist": 1e6}),
}


def conv(name: str, block: tuple[int, int] = (2, 3), sparsity: float = 0.7) -> sk.SparseConv2d:
    torch.manual_seed(0)
    return sk.SparseConv2d.from_dense(CONVS[name]().to(F64), sparsity=sparsity, block_size=block, seed=0)


def step_of(layer: sk.SparseConv2d, method: sk.Method, step: int) -> Tensor:
    """Train a step without learning; return the blocks ``(R * C, bo, bi)`` of the dense gradient."""
    x = torch.randn(3, layer.in_channels, 8, 7, dtype=F64, generator=generator_for(step))
    y = layer(x)
    dy = torch.randn(y.shape, dtype=F64, generator=generator_for(step, "dy"))
    y.backward(dy)
    method.optimizer.step()
    method.optimizer.zero_grad()
    cells, shape = torch.arange(layer.grid.cells, dtype=torch.int32), layer.conv_shape
    gradient = dense_gradients(dy, x, layer.dense_weight(), shape)[1]
    return conv_blocks(gradient, cells // layer.grid.cols, cells % layer.grid.cols, layer.block_size, shape)


def build(layer: sk.SparseConv2d, kind: type[sk.Method], **options) -> sk.Method:
    options = {"update_every": 2, "drop_fraction": lambda step: 0.3} | options
    return kind(layer, torch.optim.SGD(layer.parameters(), lr=0.0), **options)


@pytest.mark.parametrize("block", [(2, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", CONVS)
def test_gse_scores_are_the_norms_of_the_dense_gradients_blocks(name, distribution, block):
    layer = conv(name, block)
    method = build(layer, sk.GSE, distribution=distribution)
    kept = {}
    method._clear_scores = lambda: kept.update(method._offers)
    before = layer.topology.keys().clone()
    for step in range(2):
        blocks = step_of(layer, method, step)
        assert method.step() == (step == 1)
    offer = kept[""]
    norms = blocks.norm(dim=(1, 2))[offer.keys]
    torch.testing.assert_close(offer.scores, norms)
    assert offer.keys.numel() > 0.7 * before.numel() and not torch.isin(offer.keys, before).any()
    grown = layer.topology.keys()[layer.topology.keys() != before]
    count = part_of(before.numel(), 0.3)
    assert sorted(grown.tolist()) == sorted(offer.keys[norms.topk(count).indices].tolist())


@pytest.mark.parametrize("distribution", ["grabo", "graest"])
def test_guided_candidates_of_groups_follow_the_joint_distribution(distribution):
    """A pair is drawn by what *its* group sees of the window."""
    layer = conv("groups", (4, 3), sparsity=0.9)
    method = build(layer, sk.GSE, distribution=distribution, with_replacement=True)
    method.subset_factor = 1 / layer.topology.blocks()
    x = torch.randn(3, 12, 8, 7, dtype=F64, generator=generator_for(1))
    x[:, :3] *= 4  # group 0 sees the first half of its channels better, group 1 the second
    x[:, 9:] *= 3
    y = layer(x)
    y.backward(torch.randn(y.shape, dtype=F64, generator=generator_for(2)))
    rows, cols = weights(layer.grid, distribution, layer.probe.tensor.grad)
    joint = torch.stack([rows[r] * cols[r // layer.grid.group_rows] for r in range(layer.grid.rows)]).flatten()
    joint[layer.topology.keys().long()] = 0
    counts = torch.zeros(layer.grid.cells)
    for step in range(4000):
        method.steps = step
        counts[method._draw("", layer, (rows, cols))] += 1
    some = joint > 0
    assert not counts[~some].any()
    expected = counts.sum() * joint / joint.sum()  # given that a draw is not wasted
    statistic = float(((counts - expected)[some] ** 2 / expected[some]).sum())
    assert statistic < chi_square_quantile(int(some.sum()) - 1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(12, 8, 1),
        nn.Flatten(),
        nn.Linear(8 * 9, 10),
    )
    return sk.sparsify_(model.to(F64), 0.5, (2, 3), capacity=1.25, seed=0)


def images(step: int) -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=F64, generator=generator_for(step))


def start(name: str) -> tuple[nn.Module, torch.optim.Optimizer, sk.Method]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    kind, options = METHODS[name]
    options = options if kind is sk.Gradual else {"drop_fraction": 0.4} | options
    return model, optimizer, kind(model, optimizer, update_every=4, stop=13, **options)


def train(model, optimizer, method, steps, parts: int = 1) -> None:
    for step in steps:
        for part in images(step).chunk(parts):
            method.backward(lambda part=part: model(part).square().mean() / parts)
        optimizer.step()
        optimizer.zero_grad()
        method.step()


def places(model: nn.Module) -> list[list[int]]:
    return [layer.topology.keys().tolist() for layer in sk.sparse_layers(model).values()]


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("SET", "RigL", "GraEst") and "some tokens" not in name]
)
def test_micro_batches_are_one_large_batch(name):
    """But where a slice of the tokens is scored, that of two halves is another one, and so are GraEst's signs."""
    one, many = start(name), start(name)
    train(*one, range(9))
    train(*many, range(9), parts=2)
    assert places(one[0]) == places(many[0])
    assert places(one[0]) != places(network()) or name == "VRPGE"


@pytest.mark.parametrize("at", [2, 3, 4, 6])
@pytest.mark.parametrize("name", METHODS)
def test_killed_and_resumed_bit_for_bit(name, at):
    """Updates after steps 4, 8 and 12: after 3 a probe is armed, after 2 and 6 the first of two may be."""

    def build(seed):
        parts = start(name)
        if seed:
            train(*parts, range(1))  # what is there before must not matter
        return parts

    def go_on(model, optimizer, method, steps):
        train(model, optimizer, method, steps)
        if isinstance(method, GradientMethod) and steps.stop == at != 4:
            assert (model[2].probe is not None) == (at % 4 >= 4 - method.stages())

    model, _, _ = check_resumed(build, at, 14, go_on)
    assert places(model) != places(network())
    assert copy.deepcopy(model)[2].probe is None


def test_tied_taps_are_refused_by_methods_that_score_blocks():
    layer = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True, seed=0)
    for kind in (sk.RigL, sk.GSE):
        with pytest.raises(
            NotImplementedError, match=f"tie_taps=True, but {kind.__name__} moves every block by itself.*use SET"
        ):
            kind(layer, torch.optim.SGD(layer.parameters()))
