"""Initial topologies by score: against gradients of the whole model in float64, and by hand."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.nn import block_scores
from sparsekern.topology import check_tied
from tests.memory import allocations

F64 = torch.float64


class Transposed(nn.Module):
    """A linear layer whose weight is ``(in, out)``, as in GPT-2."""

    def __init__(self, outs: int, ins: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(ins, outs) / ins**0.5), nn.Parameter(torch.zeros(outs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


@pytest.fixture(autouse=True)
def transposed():
    sk.nn.register_converter(
        Transposed,
        sk.SparseLinear,
        lambda layer: {"in_features": layer.weight.shape[0], "out_features": layer.weight.shape[1]},
        rebuild=lambda layer: Transposed(layer.out_features, layer.in_features),
        transposed=True,
    )
    yield
    del sk.nn.converters.CONVERTERS[Transposed]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        Transposed(12, 8 * 4),
        nn.Tanh(),
        nn.Linear(12, 5),
    ).to(F64)


X, Y = torch.randn(6, 4, 6, 6, dtype=F64, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(X), Y)


def products(model: nn.Module, score: str) -> dict[str, Tensor]:
    """The score of each weight, from gradients of the whole model."""
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.dim() > 1}
    gradients = torch.autograd.grad(loss_of(model), list(weights.values()), create_graph=True)
    if score == "grasp":
        norm = sum(g.square().sum() for g in gradients)
        gradients = [g / 2 for g in torch.autograd.grad(norm, list(weights.values()))]
    return {n: (w * g).detach() for (n, w), g in zip(weights.items(), gradients, strict=True)}


def by_loops(layer: sk.nn.BlockSparse, product: Tensor) -> Tensor:
    """The sums ``(R, C)`` over the blocks of a product like the dense weight, element by element."""
    grid = layer.grid
    sums = torch.zeros(grid.rows, grid.cols, dtype=F64)
    matrix = product.t() if grid.transposed else product
    if grid.kernel is not None:
        matrix = product.movedim(1, -1).reshape(grid.out_features, -1)
    for out in range(grid.out_features):
        for at in range(grid.in_features):
            tap, channel = divmod(at, grid.tap_in)
            group, inside = divmod(out, grid.group_out)
            row = group * grid.group_rows + inside // grid.block[0]
            sums[row, tap * grid.tap_cols + channel // grid.block[1]] += matrix[out, at]
    return sums


@pytest.mark.parametrize("block", [1, 2, (4, 3)], ids=str)
@pytest.mark.parametrize("score", ["snip", "grasp"])
@pytest.mark.parametrize("distribution", ["erk", "global"])
def test_the_blocks_are_those_of_the_gradients_of_the_whole_model(score, block, distribution):
    model = network()
    scores = products(network().train(), score)
    dense = copy.deepcopy(model)
    sk.sparsify_(model, 0.7, block, score=score, sample=(X, Y), distribution=distribution, stems=True)
    layers = sk.sparse_layers(model)
    assert len(layers) == 4
    each = {name: by_loops(layer, scores[name]).flatten() for name, layer in layers.items()}
    each = {name: s.abs() if score == "snip" else s for name, s in each.items()}
    if distribution == "global":
        total = sum(layer.topology.blocks() for layer in layers.values())
        assert total == int(0.3 * sum(layer.grid.cells for layer in layers.values()) + 0.5 + 1e-9)
        lifted = {n: s.index_fill(0, s.argmax(), math.inf) for n, s in each.items()}
        least = torch.cat(list(lifted.values())).topk(total).values[-1]
        wanted = {name: (s >= least).nonzero().flatten() for name, s in lifted.items()}
    else:
        wanted = {
            name: each[name].topk(layer.topology.blocks()).indices.sort().values for name, layer in layers.items()
        }
    for name, layer in layers.items():
        assert layer.topology.sorted_keys().tolist() == wanted[name].tolist()
        kept = layer.dense_weight()
        assert torch.equal(kept[kept != 0], dense.get_submodule(name).weight[kept != 0]), "with their values"


def test_snip_by_hand():
    """y = w2 (w1 x): with x = (1, 2), w1 = (3, -1), w2 = 2 and the loss y, the products are 6, -4 and 2."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -1]]))
        model[1].weight.copy_(torch.tensor([[2.0], [0.1]]))
    x = torch.tensor([[1.0, 2]])
    # products: w1: 3 * 1 * 2.1, -1 * 2 * 2.1; w2: 2 * 1, 0.1 * 1
    scoring = block_scores.Scoring(model, sk_grids(model), "snip", lambda: model(x).sum(), False, 0)
    found = scoring._of_gradients()
    torch.testing.assert_close(found["0"], torch.tensor([[6.3, 4.2]]))
    torch.testing.assert_close(found["1"], torch.tensor([[2.0], [0.1]]))
    sk.sparsify_(model, 0.5, 1, score="snip", sample=lambda: model(x).sum(), distribution="global")
    assert model[0].topology.keys().tolist() == [0] and model[1].topology.keys().tolist() == [0], "no layer is empty"


def sk_grids(model: nn.Module, block: int = 1):
    return {
        name: sk.nn.converters.grid_of(layer, block)
        for name, layer in model.named_modules()
        if sk.nn.is_replaceable(layer)
    }


def test_synaptic_flow_by_hand():
    """R is the sum over paths of the products of absolute weights; a weight's score is that of its paths."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2], [3, 0.5]]))
        model[1].weight.copy_(torch.tensor([[-1.0, 2]]))
    before = copy.deepcopy(model.state_dict())
    scoring = block_scores.Scoring(model, sk_grids(model), "synflow", torch.zeros(3, 2), False, 0)
    with block_scores._only_trained(model, scoring.weights.values()), block_scores._absolute(model):
        found = scoring._reduced(scoring._checked_loss())
    assert found["0"].tolist() == [[1, 2], [6, 1]] and found["1"].tolist() == [[3, 7]]
    # To 4 of 6 in 100 rounds: the 1 that comes first goes, then all of the other path's are as strong as before: 1.
    kept = scoring.places([(["0", "1"], 4)])
    assert kept["0"].keys().tolist() == [1, 2] and kept["1"].keys().tolist() == [0, 1]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_synaptic_flow_is_conserved_and_disconnects_no_layer():
    """Tanaka et al. 2020, theorem 1: the scores of each layer add up to the same. At 99 % of 1x1 the flow goes on."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(40, 40, bias=False), nn.ReLU()))).to(F64)
    scoring = block_scores.Scoring(model, sk_grids(model, 4), "synflow", torch.zeros(1, 40, dtype=F64), False, 0)
    with block_scores._only_trained(model, scoring.weights.values()), block_scores._absolute(model):
        flows = [float(score.sum()) for score in scoring._reduced(scoring._checked_loss()).values()]
    assert flows == pytest.approx([flows[0]] * 4)
    sk.sparsify_(model, 0.99, 1, score="synflow", sample=torch.zeros(1, 40, dtype=F64), distribution="global")
    layers = list(sk.sparse_layers(model).values())
    assert sum(layer.topology.blocks() for layer in layers) == 64
    for first, second in pairwise(layers):
        assert set(second.col.tolist()) == set(first.row.tolist()), "what goes in comes out"


@pytest.mark.parametrize("score", ["magnitude", "random", "snip", "synflow"])
def test_tied_taps_are_scored_together(score):
    model = network().float()
    model[7] = nn.ReLU()  # the gradient of tanh is 0 where all weights are positive
    sample = {"snip": (X.float(), Y), "synflow": X.float()}.get(score)
    sk.sparsify_(
        model, 0.6, 2, score=score, sample=sample, tie_taps=True, distribution="global", targets=nn.Conv2d, stems=True
    )
    for layer in sk.sparse_layers(model).values():
        check_tied(layer.topology)


def test_magnitude_is_init_norm():
    first, second = network(), network()
    sk.sparsify_(first, 0.7, 2, init="norm", distribution="erk", stems=True)
    sk.sparsify_(second, 0.7, 2, score="magnitude", distribution="erk", stems=True)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    third = network()
    sk.sparsify_(third, 0.7, 2, init="norm", distribution="global", stems=True)
    layers = sk.sparse_layers(third)
    norms = [layer.values.square().sum((1, 2)).sqrt() for layer in layers.values()]
    dropped = torch.cat([n for n in norms if n.shape[0] > 1]).min()  # a single block is there because a layer needs one
    for name, layer in layers.items():
        dense = sk.topology.dense_block_norms(layer.grid, network().get_submodule(name).weight).flatten()
        dense[layer.topology.sorted_keys().long()] = 0
        assert dense.max() <= dropped


def test_random_is_uniform_and_seeded():
    def keys(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        sk.sparsify_(model, 0.75, 4, score="random", seed=seed)
        return [layer.topology.keys().tolist() for layer in model]

    assert keys(0) == keys(0) != keys(1) and keys(0)[0] != keys(0)[1]
    counts = torch.zeros(16)
    for seed in range(300):
        counts[keys(seed)[0]] += 1
    assert ((counts - 75).abs() < 5 * (300 * 0.25 * 0.75) ** 0.5).all()


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_nothing_of_the_model_changes_but_its_layers(score):
    model = network()
    model[8].weight.requires_grad_(False)
    model[1].weight.grad = gradient = torch.ones(6, dtype=F64)
    state = copy.deepcopy(model.state_dict())
    sample = X if score == "synflow" else lambda: loss_of(model)
    sk.sparsify_(model, 0.7, 2, score=score, sample=sample, targets=["0", "3", "8"], stems=True)
    assert model[1].weight.grad is gradient and model[6].weight.grad is None and model.training
    assert not model[8].values.requires_grad and model[0].values.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in model[1].state_dict(prefix="1.").items())


def test_an_optimizer_goes_on():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    x = torch.randn(8, 16)
    model(x).square().sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    sk.sparsify_(model, 0.5, 4, score="snip", sample=lambda: model(x).square().sum(), optimizer=optimizer)
    stored = optimizer.state[model[0].values]["momentum_buffer"]
    assert torch.equal(stored, sk.topology.gather_blocks(model[0].topology, momentum))


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_gradients_come_one_layer_at_a_time(score):
    """Eight layers of 1 MiB: SNIP holds two gradients at most, with its products; GraSP besides one of each layer."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(8)))
    x = torch.randn(4, 512)
    scoring = block_scores.Scoring(model, sk_grids(model, 16), score, lambda: model(x).square().sum(), False, 0)
    found = allocations(scoring._of_gradients)
    assert found.peak < (4 if score == "snip" else 8 * 1.5 + 6) * 2**20 and found.kept < 2**20


REFUSED = [
    ({"score": "snap", "sample": (X, Y)}, "score is 'snap'; it must be one of magnitude, random, snip, grasp, synflow"),
    ({"score": "snip"}, r"sample is missing; for the score 'snip' it must be a batch \(inputs, classes\), or a func"),
    ({"score": "snip", "sample": X}, r"sample is a Tensor; for the score 'snip' it must be a batch"),
    ({"score": "synflow", "sample": Y}, "sample is a Tensor; for the score 'synflow' it must be an input of the model"),
    ({"score": "random", "sample": X}, "sample has no effect on the score 'random'; leave it out"),
    ({"sample": X}, "sample is given without a score that reads it; give a score"),
    ({"score": "snip", "sample": lambda: 3}, "the sample gives a loss of type int; it must be a tensor of one number"),
    ({"score": "snip", "sample": lambda: X}, r"the sample gives a loss of shape \(6, 4, 6, 6\)"),
    ({"score": "random", "init": "random"}, "init is 'random', but score='random' keeps the trained values"),
    ({"score": "random", "init_scale": 2.0}, "init_scale is 2.0, but score='random' keeps the trained values"),
    ({"distribution": "global"}, "distribution is 'global', which ranks trained weights; give a score, or init='norm'"),
]


@pytest.mark.parametrize(("options", "text"), REFUSED)
def test_arguments_that_contradict_each_other(options, text):
    model = network()
    with pytest.raises(ValueError, match=text):
        sk.sparsify_(model, 0.7, 2, **options)
    assert not sk.sparse_layers(model)


def test_what_cannot_be_scored():
    model = network()
    for score in ("snip", "grasp"):
        with pytest.raises(ValueError, match="'8' has no gradient: the sample does not use it"):
            sk.sparsify_(model, 0.7, 2, score=score, sample=lambda: model[:8](X).square().sum(), targets=["6", "8"])
    with pytest.raises(ValueError, match="scores of '8' by snip are NaN or infinite; compute them in float64"):
        sk.sparsify_(model, 0.7, 2, score="snip", sample=lambda: loss_of(model) * math.nan, targets="8")
    with pytest.raises(ValueError, match="score is 'random', and '0' has no weight on the meta device"):
        sk.sparsify_(nn.Sequential(nn.Linear(8, 8, device="meta")), 0.5, 2, score="random")


@pytest.mark.parametrize("score", ["snip", "grasp", "synflow"])
def test_scores_that_are_all_zero(score):
    model = network()
    nn.init.zeros_(model[-1].weight)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"all scores by {score} are 0, as no gradient passes a layer of zeros"):
        sk.sparsify_(
            model,
            0.5,
            (2, 3),
            score=score,
            sample=X if score == "synflow" else (X, Y),
            ignore=["8"],
            targets=["6", "3"],
        )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_grasp_differentiates_attention_twice():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(nn.functional.scaled_dot_product_attention(y, y, y)).mean(1)

    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 8), torch.tensor([1, 2])
    model = Attending()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        weight = model.first.weight
        loss = nn.functional.cross_entropy(model(x), y)
        both = torch.autograd.grad(loss, [weight, model.last.weight], create_graph=True)
        (second,) = torch.autograd.grad(sum((g * g.detach()).sum() for g in both), weight)
    best = (weight * second).unflatten(1, (2, 4)).unflatten(0, (2, 4)).sum((1, 3)).flatten().topk(2).indices
    sk.sparsify_(model, 0.5, 4, score="grasp", sample=(x, y))
    assert model.first.topology.sorted_keys().tolist() == sorted(best.tolist())
