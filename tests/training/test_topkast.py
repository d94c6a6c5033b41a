"""Top-KAST on hand-worked 4x4 grids: the forward set computes, all stored blocks learn, the weakest are replaced."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sparsekern as sk
from sparsekern.topology import check_tied
from tests.saved import through_a_file
from tests.training.grids import F, G, changed, free, grid_layer
from tests.training.test_base import batch, bits, equal, make, train


def topkast(model, lr: float = 0.25, **options) -> sk.TopKAST:
    options = {"update_every": 1, "regularization": 0.0, "drop_fraction": lambda step: 0.34} | options
    return sk.TopKAST(model, torch.optim.SGD(model.parameters(), lr=lr), **options)


def step(layer, method, g=G, f=F) -> bool:
    """A step in which the norm of block (J, I) grows by ``lr * g[J] * f[I]``, whether it computes or not."""
    block = layer.block_size[0]
    x, dy = (torch.tensor(numbers).repeat_interleave(block).unsqueeze(0) for numbers in (f, g))
    method.backward(lambda: -(layer(x) * dy / block).sum())
    method.optimizer.step()
    method.optimizer.zero_grad()
    return method.step()


def forward_set(layer, method) -> list[int]:
    """Return the slots of the blocks that have an effect on the output."""
    with method.evaluation():
        index = layer.index
    return sorted(index.row_slot[: int(index.row_ptr[-1])].tolist())


def norms(layer) -> list[float]:
    return layer.values.detach().flatten(1).norm(dim=1).tolist()


@pytest.mark.parametrize("block", [1, 2])
def test_two_refreshes_by_hand(block):
    layer = grid_layer(block)
    method = topkast(layer)
    before = layer.topology.keys().clone()
    assert forward_set(layer, method) == [0, 3, 5], "9, 8 and 4 of 9, 1, 2, 8, 3 and 4"

    # 10, 1.5, 3.75, 8.75, 7 and 5: slot 4 has learnt outside and rises; of the three that are left one in three goes
    assert changed(layer, lambda: step(layer, method)) == [1]
    assert norms(layer) == pytest.approx([10, 0, 3.75, 8.75, 7, 5])
    assert forward_set(layer, method) == [0, 3, 4]
    assert layer.topology.keys()[1] not in before.tolist()

    # the second block row learns: slot 2 has 3.75 + 8 * 3.5 / 4 = 10.75, and slot 1, where it is in that row, 8 at most
    new = 2 * F[int(layer.col[1])] * (int(layer.row[1]) == 1)
    weakest = 1 if new < 5 else 5
    assert changed(layer, lambda: step(layer, method, g=[0.0, 8, 0, 0])) == [weakest]
    expected = [10, new, 10.75, 8.75, 7, 5]
    expected[weakest] = 0
    assert norms(layer) == pytest.approx(expected)
    assert forward_set(layer, method) == [0, 2, 3]
    assert layer.topology.blocks() == 6 and method.metrics()["forward_sparsity/"] == 13 / 16

    assert method.finish() and method.finished and not method.finish()
    assert free(layer) == [1, 4, 5] and method.metrics()["sparsity/"] == 13 / 16
    assert method.metrics()["churn/"] == 0.5 and forward_set(layer, method) == [0, 2, 3]
    assert changed(layer, lambda: step(layer, method)) == []


@pytest.mark.parametrize("block", [1, 2])
def test_the_output_and_the_input_s_gradient_are_those_of_the_forward_set(block):
    layer = grid_layer(block).double()
    method = topkast(layer)
    x = torch.randn(5, 4 * block, dtype=torch.float64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = method.backward(lambda: layer(x).square().sum())
    assert counter.get_total_flops() == 2 * 5 * block**2 * (3 + 3 + 6), "forward and dx of three blocks, six gradients"
    kept = torch.tensor([1, 0, 0, 1, 0, 1], dtype=torch.float64).view(6, 1, 1)
    weight = sk.topology.to_dense(layer.topology, layer.values * kept).requires_grad_()
    twin = x.detach().requires_grad_()
    expected = torch.nn.functional.linear(twin, weight, layer.bias).square().sum()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.values.grad, sk.topology.gather_blocks(layer.topology, weight.grad))
    with method.evaluation(), torch.no_grad():
        torch.testing.assert_close(layer(x).square().sum(), expected.detach())


@pytest.mark.parametrize("fused", [False, True])
def test_exploration_is_regularized_by_the_density_of_the_forward_set(fused):
    """Also where a fused optimizer undoes the scale of the gradients."""
    layer = grid_layer(2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, fused=fused)
    method = sk.TopKAST(layer, optimizer, regularization=0.01, update_every=100)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = layer.values.detach().clone()
    method.backward(lambda: layer(torch.zeros(1, 8)).sum(), scaler=scaler)
    scaler.step(optimizer)
    left = layer.values.detach() / before
    rate = torch.tensor([1.0, 16 / 3, 16 / 3, 1, 16 / 3, 1]) * 0.01
    torch.testing.assert_close(left, (1 - rate).view(6, 1, 1).expand(6, 2, 2))


def test_the_fraction_of_a_sparsity_that_layers_have_together():
    """6 of 16 blocks are stored; at 0.875 two compute, at 0.99 one, which is the least."""
    assert [len(forward_set(m, topkast(m, sparsity=s))) for s in (0.625, 0.875, 0.99) for m in [grid_layer(1)]] == [
        6,
        2,
        1,
    ]


def test_tied_taps_compute_and_move_together():
    conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.0, blocks=27, tie_taps=True, seed=0)
    method = topkast(conv, sparsity=0.5, stop=3, drop_fraction=lambda step: 1.0)
    for _ in range(3):
        taps = conv.col[forward_set(conv, method)] // conv.grid.tap_cols
        assert taps.bincount().tolist() == [2] * 9
        method.backward(lambda: conv(torch.randn(2, 8, 4, 4)).square().mean())
        method.optimizer.step()
        assert method.step()
        check_tied(conv.topology)
    assert conv.topology.blocks() == 18


def test_what_finishing_frees_goes_with_compact_and_training_goes_on():
    model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)), 0.5, 2, seed=0)
    method = topkast(model, stop=2, regularization=0.1)
    x = batch(0)
    for number in range(4):
        method.backward(lambda: model(x).square().mean())
        method.optimizer.step()
        method.optimizer.zero_grad()
        method.step()
        if number == 1:
            expected = model(x)
            assert sk.compact_(model, method.optimizer) > 0 and model[0].topology.slots == 4
            torch.testing.assert_close(model(x), expected)
    assert method.state_dict()["forward"]["0"].tolist() == [True] * 4


@pytest.mark.parametrize("at", [2, 4, 7])
def test_saved_loaded_and_continued_bit_for_bit(at):
    def build(seed):
        model = make(seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, sk.TopKAST(model, optimizer, update_every=2, stop=7, drop_fraction=0.9, seed=1)

    through, first, second = build(0), build(0), build(1)
    train(*through, range(10))
    train(*first, range(at))
    saved = through_a_file(first)
    train(*second, range(3))  # what is there before must not matter
    if at < 7:
        for part, state in zip(second, saved, strict=True):
            part.load_state_dict(state)
        train(*second, range(at, 10))
        assert equal(bits(second[0]), bits(through[0]))
        assert second[2].finished and second[2].updates == through[2].updates == 4
    else:
        second = copy.deepcopy(first)
        train(*second, range(at, 10))
        assert equal(bits(second[0]), bits(through[0]))


def test_compiled_layers_are_not_compiled_again_by_refreshes():
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        model = sk.sparsify_(torch.nn.Sequential(torch.nn.Linear(8, 8)), 0.5, 2, seed=0)
        method = topkast(model, drop_fraction=lambda step: 1.0)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for number in range(3):
            if compiled and number == 1:
                torch.compiler.set_stance("fail_on_recompile")
            try:
                method.backward(lambda run=run: run(batch(0)).square().mean())
            finally:
                torch.compiler.set_stance("default")
            method.optimizer.step()
            method.optimizer.zero_grad()
            assert method.step()
        results.append(model[0].values.detach().clone())
    torch.testing.assert_close(*results)


def test_what_is_refused():
    for options, text in (
        ({"regularization": -1.0}, "regularization is -1.0; it must be 0 or more"),
        ({"sparsity": 0.1}, "sparsity is 0.1, but the layers store too few blocks"),
        ({"keep_connected": True}, "keep_connected is no option of TopKAST"),
        ({"min_age": 1}, "min_age is no option of TopKAST"),
    ):
        with pytest.raises(ValueError, match=text) as raised:
            topkast(make(), **options)
        assert raised.value.parameter == next(iter(options))
    frozen = make().requires_grad_(False)
    with pytest.raises(ValueError, match="no sparse layer that trains stores a block; Top-KAST needs one"):
        topkast(frozen)


def test_a_backward_that_is_not_the_method_s_is_refused():
    """It would compute with all stored blocks."""
    model = make()
    method = topkast(model)
    model(batch(0)).sum().backward()
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"in place of loss.backward\(\) write sparse.backward"):
        method.optimizer.step()
    assert equal(bits(model), before) and method.steps == 0
