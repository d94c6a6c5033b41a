"""densify_ and sparsify_ in the middle of a training: the optimizer goes on."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.25),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}
FRESH = {"adagrad": {"sum": 0.25}, "rprop": {"step_size": 0.01}}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 36), nn.Tanh(), nn.Linear(36, 24, bias=False))


def batch(number: int) -> Tensor:
    return torch.randn(16, 40, generator=torch.Generator().manual_seed(number))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for number in steps:
        (model(batch(number)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def scattered(layer: nn.Module, blocks: Tensor, fresh: float = 0.0) -> Tensor:
    """A dense matrix with the blocks at their places, by nothing but row and col."""
    (bo, bi), (out, ins) = blocks.shape[1:], layer.weight.shape
    dense = torch.full((-(-out // bo) * bo, -(-ins // bi) * bi), fresh)
    for block, row, col in zip(blocks, layer.row.tolist(), layer.col.tolist(), strict=True):
        if row >= 0:
            dense[row * bo : (row + 1) * bo, col * bi : (col + 1) * bi] = block
    return dense[:out, :ins]


def cut(layer: nn.Module, dense: Tensor) -> Tensor:
    """The blocks that a layer has, cut from a dense matrix."""
    bo, bi = layer.block_size
    padded = nn.functional.pad(dense, (0, -dense.shape[1] % bi, 0, -dense.shape[0] % bo))
    places = zip(layer.row.tolist(), layer.col.tolist(), strict=True)
    return torch.stack([padded[r * bo : (r + 1) * bo, c * bi : (c + 1) * bi] for r, c in places])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dense_from_sparse_is_a_dense_model_that_was_trained_so_by_hand(name: str):
    model = sk.sparsify_(make(), 0.5, 16, capacity=1.3)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))

    twin = make()
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    for key in ("0", "2"):
        layer, dense = model.get_submodule(key), twin.get_submodule(key)
        dense.weight.data = scattered(layer, layer.values.detach())
        state = optimizer.state[layer.values]
        twin_optimizer.state[dense.weight] = {
            part: scattered(layer, value, FRESH.get(name, {}).get(part, 0.0)) if value.dim() else value.clone()
            for part, value in ((k, v) for k, v in state.items() if isinstance(v, Tensor))
        }
        if dense.bias is not None:
            dense.bias.data = layer.bias.detach().clone()
            twin_optimizer.state[dense.bias] = copy.deepcopy(optimizer.state[layer.bias])

    assert sk.densify_(model, optimizer=optimizer) is model
    assert not sk.sparse_layers(model) and type(model[0]) is nn.Linear
    train(model, optimizer, range(5, 12))
    train(twin, twin_optimizer, range(5, 12))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert len(optimizer.state) == len(list(model.parameters())) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_from_dense_is_a_sparse_model_that_was_trained_so_by_hand(name: str):
    model = make()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(5))

    twin = sk.sparsify_(copy.deepcopy(model), 0.5, 16, init="norm")
    twin_optimizer = OPTIMIZERS[name](twin.parameters())
    for key in ("0", "2"):
        dense, layer = model.get_submodule(key), twin.get_submodule(key)
        state = optimizer.state[dense.weight]
        twin_optimizer.state[layer.values] = {
            part: cut(layer, value) if value.dim() else value.clone()
            for part, value in ((k, v) for k, v in state.items() if isinstance(v, Tensor))
        }
        if layer.bias is not None:
            twin_optimizer.state[layer.bias] = copy.deepcopy(optimizer.state[dense.bias])

    sk.sparsify_(model, 0.5, 16, init="norm", optimizer=optimizer)
    assert len(sk.sparse_layers(model)) == 2
    train(model, optimizer, range(5, 12))
    train(twin, twin_optimizer, range(5, 12))
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    assert len(optimizer.state) == 3
    sk.SET(model, optimizer, drop_fraction=0.5).update()  # a method finds the state that it has to move


def test_there_and_back_gives_the_same_bits():
    model = sk.sparsify_(make(), 0.5, 16)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(3))
    values = {name: layer.dense_weight() for name, layer in sk.sparse_layers(model).items()}
    moments = {name: scattered(layer, optimizer.state[layer.values]["exp_avg"]) for name, layer in
               sk.sparse_layers(model).items()}  # fmt: skip
    sk.densify_(model, optimizer=optimizer)
    sk.sparsify_(model, 0.5, 16, init="norm", optimizer=optimizer)
    for name, layer in sk.sparse_layers(model).items():
        assert torch.equal(layer.dense_weight(), values[name])
        assert torch.equal(scattered(layer, optimizer.state[layer.values]["exp_avg"]), moments[name])


def test_groups_schedules_shared_layers_and_convolutions():
    shared = nn.Linear(36, 36)
    model = nn.Sequential(nn.Conv2d(4, 36, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(), shared, shared)
    sk.sparsify_(nn.Sequential(*model[:1]), 0.5, 4)
    model[0] = sk.SparseConv2d(4, 36, 3, sparsity=0.5, block_size=4)
    model[4] = model[5] = sk.SparseLinear(36, 36, sparsity=0.5, block_size=4)
    conv, linear = [model[0].values, model[0].bias], list(model[4].parameters())
    optimizer = torch.optim.AdamW([{"params": conv, "lr": 0.01}, {"params": linear, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    step()
    sk.densify_(model, optimizer=optimizer)
    assert model[4] is model[5] and type(model[0]) is nn.Conv2d
    assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [
        [id(model[0].weight), id(model[0].bias)],
        [id(model[4].weight), id(model[4].bias)],
    ]
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.0005]
    before = model[0].weight.detach().clone()
    step()
    assert (model[0].weight != before).all()  # absent weights train too
    assert optimizer.state[model[0].weight]["step"] == 2


def test_without_an_optimizer():
    model = sk.sparsify_(make(), 0.5, 16)
    expected = model(batch(0))
    torch.testing.assert_close(sk.densify_(model)(batch(0)), expected)


def test_what_cannot_go_on_is_refused_before_anything_changes():
    model = sk.sparsify_(make(), 0.5, 16)
    other = torch.optim.SGD(make().parameters(), lr=0.1)
    lbfgs = torch.optim.LBFGS(model.parameters())
    loss = lambda: (model(batch(0)) - 1).square().mean()  # noqa: E731

    def closure():
        lbfgs.zero_grad()
        value = loss()
        value.backward()
        return value

    lbfgs.step(closure)
    factored = torch.optim.Adafactor(model.parameters())
    loss().backward()
    factored.step()
    cases = [
        (lambda: sk.densify_(model, optimizer=other), ValueError, "the weight of '0' is not in this optimizer"),
        (lambda: sk.densify_(model, optimizer=lbfgs), ValueError, "LBFGS keeps"),
        (lambda: sk.densify_(model, optimizer=factored), ValueError, "Adafactor keeps 'row_var' of shape"),
        (lambda: sk.densify_(model, optimizer=3), TypeError, "optimizer is a int"),
        (lambda: sk.densify_(model[0]), ValueError, "model is itself a sparse layer"),
        (lambda: sk.densify_(3), TypeError, "model"),
    ]
    for wrong, kind, message in cases:
        with pytest.raises(kind, match=message):
            wrong()
        assert len(sk.sparse_layers(model)) == 2
    dense = make()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    for wrong, message in [
        (lambda: sk.sparsify_(dense, 0.5, 16, optimizer=optimizer), "optimizer is given, but init='balanced'"),
        (lambda: sk.sparsify_(dense, 0.5, 16, init="norm", optimizer=other), "is not in this optimizer"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
        assert not sk.sparse_layers(dense)


def test_a_frozen_layer_need_not_be_in_the_optimizer():
    model = sk.sparsify_(make(), 0.5, 16)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    sk.densify_(model, optimizer=optimizer)
    assert not model[0].weight.requires_grad and optimizer.param_groups[0]["params"] == [model[2].weight]


def test_a_method_that_was_not_closed_says_that_its_layers_are_gone():
    model = sk.sparsify_(make(), 0.5, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = sk.SET(model, optimizer, update_every=1)
    sk.densify_(model, optimizer=optimizer)
    train(model, optimizer, range(1))
    with pytest.raises(ValueError, match="not in this optimizer"):
        sparse.step()
