"""VR-PGE in whole steps: against masked dense networks, by what it leaves alone, and in what it finds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.topology import to_dense
from sparsekern.training.vrpge.masks import score_gradient
from tests.training.grids import advance
from tests.training.test_base import check_resumed


def make(block: int = 4, norm: bool = False, dropout: float = 0.0, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    extra = [nn.BatchNorm1d(16)] if norm else []
    extra += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 12))
    return sk.sparsify_(model, 0.25, block, seed=0).to(dtype)


def batch(step: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def sgd(model: nn.Module, momentum: float = 0.9) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.01)


def built(model: nn.Module, **options) -> sk.VRPGE:
    return sk.VRPGE(model, sgd(model), **options)


def one_step(model: nn.Module, method: sk.VRPGE, step: int) -> None:
    method.backward(lambda: model(batch(step)).square().mean())
    advance(method)


def masked_twin(model: nn.Module, method: sk.VRPGE, units: torch.Tensor) -> nn.Module:
    """Return a dense network with the weights of a mask."""
    twin = sk.densify(copy.deepcopy(model))
    with torch.no_grad():
        for name, layer in method.layers.items():
            keep = method.candidates[name].slots(units[method.budget.parts[name]]).view(-1, 1, 1)
            twin.get_submodule(name).weight.copy_(to_dense(layer.topology, layer.values * keep))
    return twin


@pytest.mark.parametrize("weight_step", ["one", "all"])
@pytest.mark.parametrize("block", [1, 4])
def test_gradients_and_scores_are_those_of_masked_dense_networks(block, weight_step):
    model = make(block, dtype=torch.float64)
    method = built(model, masks=3, weight_step=weight_step, probability_optimizer="sgd", score_clip=None, seed=3)
    loss = method.backward(lambda: model(batch(0, torch.float64)).square().mean())
    masks = method._masks
    twins = [masked_twin(model, method, units) for units in masks]
    losses = [twin(batch(0, torch.float64)).square().mean() for twin in twins]
    used = range(3) if weight_step == "all" else [0]
    torch.testing.assert_close(loss, sum(losses[j].detach() for j in used) / len(used))
    for j in used:
        losses[j].backward()
    for name, layer in method.layers.items():
        expected = torch.zeros_like(layer.values)
        for j in used:
            keep = method.candidates[name].slots(masks[j][method.budget.parts[name]]).view(-1, 1, 1)
            weight = twins[j].get_submodule(name).weight.grad
            expected += sk.topology.gather_blocks(layer.topology, weight) * keep / len(used)
        torch.testing.assert_close(layer.values.grad, expected, atol=1e-12, rtol=1e-9)
    before = method.probabilities.value.clone()
    advance(method)
    scores = score_gradient(torch.stack(losses).detach().float(), masks, before)
    wanted = method.budget.project(before - method.probabilities.rate * scores)
    torch.testing.assert_close(method.probabilities.value, wanted, atol=1e-6, rtol=0)


def test_the_extra_passes_leave_no_graph_and_values_are_computed_once():
    model = make()
    method = built(model, masks=4)
    graphs = []

    def closure():
        loss = model(batch(0)).square().mean()
        graphs.append(loss.requires_grad)
        return loss

    method.backward(closure)
    assert graphs == [False, False, False, True]


def test_structure_every_few_steps_takes_one_pass_between():
    model = make()
    method = built(model, structure_every=3, start=2)
    calls, moved = [], []
    for step in range(7):
        count = []
        method.backward(lambda step=step, count=count: (count.append(1), model(batch(step)).square().mean())[1])
        before = method.probabilities.value.clone()
        advance(method)
        calls.append(len(count))
        moved.append(not torch.equal(before, method.probabilities.value))
    assert calls == [1, 1, 1, 2, 1, 1, 2]
    assert [c == 2 for c in calls] == moved


def test_dropout_is_the_same_in_all_passes_and_drawn_once():
    model = make(dropout=0.5)
    method = built(model, masks=3)
    dropped = []
    model[1].register_forward_hook(lambda module, args, y: dropped.append((y == 0) & (args[0] != 0)))
    state = torch.get_rng_state()
    method.backward(lambda: model(batch(0)).square().mean())
    after = torch.get_rng_state()
    assert len(dropped) == 3 and dropped[0].any() and torch.equal(dropped[0], dropped[1])
    assert torch.equal(dropped[0], dropped[2])
    torch.set_rng_state(state)
    model(batch(0))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("weight_step", ["one", "all"])
def test_running_statistics_see_the_first_mask_only(weight_step):
    model = make(norm=True)
    method = built(model, masks=3, weight_step=weight_step)
    twin = copy.deepcopy(model)
    method.backward(lambda: model(batch(0)).square().mean())
    dense = masked_twin(twin, method, method._masks[0])
    dense(batch(0))
    assert model[1].num_batches_tracked == 1
    torch.testing.assert_close(model[1].running_mean, dense[1].running_mean)


@pytest.mark.parametrize("make_optimizer", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.1)])
def test_blocks_that_no_mask_held_are_untouched_state_included(make_optimizer):
    model = make()
    optimizer = make_optimizer(model)
    method = sk.VRPGE(model, optimizer)
    for step in range(4):
        method.backward(lambda step=step: model(batch(step)).square().mean())
        out = ~method.candidates["0"].slots(method._masks[0][method.budget.parts["0"]])
        values = model[0].values
        state = {k: v.clone() for k, v in optimizer.state[values].items() if isinstance(v, torch.Tensor) and v.dim()}
        before = values.detach().clone()
        optimizer.step()
        assert torch.equal(values[out], before[out]) and not torch.equal(values, before)
        for key, tensor in state.items():
            assert torch.equal(optimizer.state[values][key][out], tensor[out])
        method.step()


def test_without_lazy_steps_decay_acts_on_all():
    model = make()
    method = built(model, unsampled="decay")
    before = model[0].values.detach().clone()
    method.backward(lambda: model(batch(0)).square().mean())
    out = ~method.candidates["0"].slots(method._masks[0][method.budget.parts["0"]])
    method.optimizer.step()
    torch.testing.assert_close(model[0].values[out], before[out] * (1 - 0.1 * 0.01))


def test_micro_batches_have_the_same_masks_and_add_up():
    model = make(dtype=torch.float64)
    first, second = copy.deepcopy(model), copy.deepcopy(model)
    methods = [built(m, seed=5, score_clip=None) for m in (first, second)]
    for half in batch(0, torch.float64).chunk(2):
        methods[0].backward(lambda half=half: first(half).square().mean() / 2)
        assert methods[0].step() is False
    methods[1].backward(lambda: second(batch(0, torch.float64)).square().mean())
    for method in methods:
        advance(method)
    torch.testing.assert_close(first[0].values, second[0].values)
    torch.testing.assert_close(methods[0].probabilities.value, methods[1].probabilities.value, atol=1e-6, rtol=0)


def test_a_skipped_step_has_the_same_masks_again_and_its_losses_do_not_count():
    model = make()
    optimizer = sgd(model)
    method = sk.VRPGE(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    method.backward(lambda: model(batch(0)).sum() * float("inf"), scaler=scaler)
    masks, before = method._masks.clone(), method.probabilities.value.clone()
    scaler.step(optimizer)
    scaler.update()
    assert method.step() is False and method.steps == 0
    optimizer.zero_grad()
    method.backward(lambda: model(batch(0)).square().mean(), scaler=scaler)
    assert torch.equal(method._masks, masks)
    scaler.step(optimizer)
    scaler.update()
    method.step()
    assert method.steps == 1 and method.probabilities.value.isfinite().all()
    assert not torch.equal(before, method.probabilities.value)


def test_refilled_candidates_start_at_zero_with_a_small_probability():
    model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32)), 0.6, 4, seed=0)
    optimizer = torch.optim.AdamW(model.parameters())
    method = sk.VRPGE(model, optimizer, sparsity=0.8, refill=0.1, update_every=1, drop_fraction=0.5)
    method.backward(lambda: model(torch.randn(5, 32)).square().mean())
    optimizer.step()
    s = method.probabilities._value
    with torch.no_grad():
        s[:6] = 0
    places, blocks = model[0].topology.keys().clone(), model[0].topology.blocks()
    assert method.update()
    moved = (model[0].topology.keys() != places).nonzero().squeeze(1)
    assert moved.tolist() == list(range(6)) and model[0].topology.blocks() == blocks
    torch.testing.assert_close(s[:6].detach(), torch.full((6,), 0.1))
    assert not model[0].values[:6].any() and not optimizer.state[model[0].values]["exp_avg"][:6].any()
    assert method.metrics()["churn/0"] == pytest.approx(6 / blocks)


@pytest.mark.parametrize("group", ["block", "row", "column"])
def test_the_end_is_the_budget_exactly_and_ordinary_training_follows(group):
    model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)), 0, 4, seed=0)
    optimizer = sgd(model)
    method = sk.VRPGE(model, optimizer, sparsity=0.75, group=group, stop=4)
    x = torch.randn(5, 32)
    for step in range(4):
        method.backward(lambda: model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        with method.evaluation():
            y = model(x)
        assert method.step() == (step == 3)
    assert method.finished and method.metrics()["sparsity/global"] == 0.75
    assert method.metrics()["expected_sparsity/global"] == 0.75
    top = method.budget.top(method.probabilities.value)
    assert torch.equal(method.candidates["0"].slots(top[method.budget.parts["0"]]), model[0].topology.used())
    assert y.shape == model(x).shape
    keys, calls = model[0].topology.keys().clone(), []
    method.backward(lambda: (calls.append(1), model(x).square().mean())[1])
    optimizer.step()
    assert calls == [1] and method.step() is False and method.finish() is False
    assert torch.equal(model[0].topology.keys(), keys)
    assert not model[0].values[~model[0].topology.used()].any()
    with method.evaluation():
        model(x)


def test_an_evaluation_is_the_network_of_the_end():
    model = make()
    method = built(model)
    for step in range(3):
        one_step(model, method, step)
    with method.evaluation():
        before = model(batch(9))
    whole = model(batch(9))
    method.finish()
    torch.testing.assert_close(model(batch(9)), before)
    assert not torch.allclose(before, whole)


def test_it_finds_the_blocks_that_matter():
    """A quarter of 16 blocks makes the targets; the others only add noise."""
    torch.manual_seed(0)
    layer = sk.SparseLinear(16, 16, bias=False, block_size=4, sparsity=0, seed=0)
    true = torch.zeros(16, dtype=torch.bool)
    true[torch.randperm(16)[:4]] = True
    target = to_dense(layer.topology, torch.randn(16, 4, 4) * true.view(-1, 1, 1))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    method = sk.VRPGE(layer, optimizer, sparsity=0.75, masks=4, stop=800, refill=0, floor=0.05)
    generator = torch.Generator().manual_seed(1)
    for _ in range(800):
        x = torch.randn(32, 16, generator=generator)
        method.backward(lambda x=x: (layer(x) - x @ target.T).square().mean())
        advance(method)
    assert torch.equal(layer.topology.used(), true)


@pytest.mark.parametrize("options", [{}, {"weight_step": "all", "group": "row"}, {"probability_optimizer": "sgd"}])
def test_killed_and_resumed_bit_for_bit(options):
    def build(seed):
        model = make(norm=True, dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        settings = {"sparsity": 0.6, "update_every": 3, "stop": 14, "floor": 0.05, "seed": 7, **options}
        return model, optimizer, sk.VRPGE(model, optimizer, **settings)

    def run(model, optimizer, method, steps):
        for step in steps:
            torch.manual_seed(step)  # dropout, which the loop has to save
            one_step(model, method, step)

    _, _, method = check_resumed(build, 7, 18, run)
    assert method.finished


def test_a_convolution_with_tied_taps_and_a_layer_that_is_frozen():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 8))
    sk.sparsify_(model, 0.5, 4, seed=0, tie_taps=True)
    model[2].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    method = sk.VRPGE(model, optimizer, update_every=1, floor=0.1)
    before = model[2].row.clone()
    for step in range(4):
        x = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(step))
        method.backward(lambda x=x: model(x).square().mean())
        advance(method)
    assert method.finish() and torch.equal(model[2].row, before) and list(method.candidates) == ["0"]
    assert method.metrics()["expected_sparsity/2"] == 0.5


class TestErrors:
    def test_a_step_without_its_backward(self):
        model = make()
        method = built(model)
        model(batch(0)).sum().backward()
        with pytest.raises(RuntimeError, match=r"in place of loss.backward\(\) write sparse.backward"):
            method.optimizer.step()
        assert method.steps == 0

    def test_all_frozen(self):
        model = make()
        for layer in sk.sparse_layers(model).values():
            layer.values.requires_grad_(False)
        with pytest.raises(ValueError, match="the values of all sparse layers are frozen"):
            built(model)

    def test_a_state_of_other_candidates(self):
        with pytest.raises(ValueError, match="the state has other candidates"):
            built(make()).load_state_dict(built(make(2)).state_dict())
