"""AGENT in a training loop: what its passes leave alone and cost, exact resumption, and what else makes a step."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsekern as sk
from tests.memory import allocations
from tests.training.agent.models import ESTIMATES, F64, METHODS, batches, loss_of, make, sgd, train
from tests.training.test_base import check_resumed


@pytest.mark.parametrize("kind", METHODS)
def test_the_model_is_itself_again_and_no_address_changes(kind):
    model = make(norm=True)
    optimizer = sgd(model)
    method = kind(model, optimizer, update_every=3)
    agent = sk.AGENT(model, optimizer, method=method)
    train(model, optimizer, agent, 2, batches())
    agent.c[""] = 1.0
    before = copy.deepcopy(model.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    places = [t.data_ptr() for t in tensors]
    seen = []

    def closure():
        seen.append([t.clone() for t in tensors])
        return loss_of(model)(batches()[0])

    before_backward = [t.clone() for t in tensors]
    agent.backward(closure)
    assert len(seen) == 2 and not torch.equal(seen[0][0], seen[1][0])
    assert all(torch.equal(a, b) for a, b in zip(seen[1], before_backward, strict=True))
    assert [t.data_ptr() for t in tensors] == places
    for _ in range(2):  # after a backward, and after one that failed
        state = model.state_dict()
        assert all(torch.equal(before[k], v) for k, v in state.items() if "running" not in k and "num" not in k)
        with pytest.raises(KeyError):
            agent.backward(lambda: {}["broken"])


def test_statistics_of_norms_see_each_batch_once():
    models = [make(norm=True) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    agents = [sk.AGENT(m, o, gamma=g) for m, o, g in zip(models, optimizers, (0.5, 0.0), strict=True)]
    for model, optimizer, agent in zip(models, optimizers, agents, strict=True):
        train(model, optimizer, agent, 3, batches())
    assert agents[0].metrics()["c"] > 0 and models[0][1].num_batches_tracked == 12
    assert torch.equal(models[0][1].running_mean, models[1][1].running_mean)
    assert torch.equal(models[0][1].running_var, models[1][1].running_var)


def test_both_passes_have_the_same_dropout_and_random_numbers_are_drawn_once():
    model = make(dropout=0.5)
    agent = sk.AGENT(model, sgd(model))
    dropped = []
    model[1].register_forward_hook(lambda module, args, y: dropped.append((y == 0) & (args[0] != 0)))
    loss = loss_of(model)
    for _ in range(2):
        agent.refresh(batches(2), loss)
    assert len(dropped) == 2 + 4  # the second time each batch at the snapshot too
    assert torch.equal(dropped[2], dropped[3]) and torch.equal(dropped[4], dropped[5])
    assert not torch.equal(dropped[3], dropped[4])
    assert agent.c[""] == pytest.approx(0.3)  # nothing has changed: the estimate is 1
    state = torch.get_rng_state()
    agent.backward(lambda: loss(batches()[0]))
    assert len(dropped) == 8 and torch.equal(dropped[6], dropped[7])
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    model(batches()[0])
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("options", [*ESTIMATES, {"estimate": "gradients", "every": 3}])
@pytest.mark.parametrize("kind", [sk.SET, sk.GSE])
def test_killed_and_resumed_bit_for_bit(kind, options):
    def build(seed):
        model = make(norm=True, dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        method = kind(model, optimizer, update_every=3, seed=2)
        return model, optimizer, sk.AGENT(model, optimizer, method=method, gamma=0.5, **options)

    def run(model, optimizer, agent, steps):
        loss, data = loss_of(model), batches(4)
        for step in steps:
            torch.manual_seed(step)  # dropout, which the loop has to save
            if step % 4 == 0 and agent.every is None:
                agent.refresh(data, loss)
            agent.backward(lambda step=step: loss(data[step % 4]))
            optimizer.step()
            optimizer.zero_grad()
            agent.step()

    _, _, agent = check_resumed(build, 10, 16, run)
    assert all(c > 0 for c in agent.c.values())


def test_a_state_from_before_the_first_snapshot():
    model = make()
    agent = sk.AGENT(model, sgd(model))
    state = agent.state_dict()
    agent.refresh(batches(), loss_of(model))
    agent.load_state_dict(state)
    agent.backward(lambda: loss_of(model)(batches()[0]))
    assert agent.metrics()["corrected"] == 0 and agent.snapshot.state_dict()["taken"] is False


def test_a_state_of_something_else():
    model, other = make(), make(block=2)
    optimizer = sgd(model)
    agent = sk.AGENT(model, optimizer)
    agent.refresh(batches(), loss_of(model))
    with pytest.raises(ValueError, match="the state is none of AGENT's of version 2"):
        agent.load_state_dict({"version": 2})
    with pytest.raises(ValueError, match="another method or scope"):
        sk.AGENT(model, optimizer, method=sk.SET(model, optimizer)).load_state_dict(agent.state_dict())
    with pytest.raises(ValueError, match="has shape .4, 4, 4.; it must have .16, 2, 2."):
        sk.AGENT(other, sgd(other)).load_state_dict(agent.state_dict())


def test_it_holds_twice_the_values_and_one_index_and_one_copy_more_during_a_step():
    torch.manual_seed(0)
    model = sk.SparseLinear(512, 512, bias=False, sparsity=0.75, block_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer)
    agent = sk.AGENT(model, optimizer, method=method)
    x = torch.randn(16, 512)
    values = model.values.numel() * 4
    index = sum(t.numel() * 4 for t in (model.row, model.col, *model.index))
    held = allocations(lambda: agent.refresh([x], lambda x: model(x).square().mean()))
    model.values.grad = None
    agent.c[""] = 1.0
    method.update()
    plain = allocations(lambda: model(x).square().mean().backward())
    model.values.grad = None
    agent.backward(lambda: model(x).square().mean())  # counts FLOPs once
    model.values.grad = None
    step = allocations(lambda: agent.backward(lambda: model(x).square().mean()))
    kept = sum(t.numel() * t.element_size() for t in (*agent.snapshot.values.values(), *agent.snapshot.mean.values()))
    small = x.numel() * 4 * 4 + values // 16
    assert kept == 2 * values
    assert held.peak <= 2 * values + index + plain.peak + small
    assert step.peak <= plain.peak + values + 2**20 + small  # a copy, and what an exchange holds
    assert step.largest <= values


def test_flops_are_those_of_the_passes():
    model = sk.SparseLinear(64, 32, bias=False, sparsity=0.5, block_size=16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = sk.AGENT(model, optimizer)
    data, elements = [torch.randn(10, 64) for _ in range(3)], 32 * 64 // 2
    train_loss = lambda x: model(x).square().mean()  # noqa: E731
    forward = 2 * 10 * elements
    agent.refresh(data, train_loss)
    assert agent.metrics()["extra_flops"] == 3 * 2 * forward  # the first layer needs no gradient of its input
    agent.refresh(data, train_loss)
    assert agent.metrics()["extra_flops"] == 3 * (2 * forward + 3 * forward)
    for x in data:
        agent.backward(lambda x=x: train_loss(x))
    metrics = agent.metrics()
    assert metrics["extra_flops"] == 3 * (2 + 3 + 2) * forward and metrics["extra_seconds"] > 0


def two_in_float64(options):
    models = [make(dtype=F64) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    return models, optimizers, [sk.AGENT(m, o, gamma=0.5, **options) for m, o in zip(models, optimizers, strict=True)]


def assert_nearly_equal(models, agents):
    torch.testing.assert_close(agents[1].c, agents[0].c, rtol=1e-9, atol=0)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{"estimate": "losses"}, *ESTIMATES[1:]])
@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_add_up(to_none, options):
    models, optimizers, agents = two_in_float64(options)
    for parts, model, optimizer, agent in zip((1, 3), models, optimizers, agents, strict=True):
        loss = loss_of(model)
        for _ in range(3):
            agent.refresh(batches(dtype=F64), loss)
            for x in batches(dtype=F64):
                for part in x.chunk(parts):
                    agent.backward(lambda part=part, loss=loss, parts=parts: loss(part) / parts)
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
                agent.step()
    assert all(c > 0 for c in agents[0].c.values())
    assert_nearly_equal(models, agents)
    a, b = (agent.metrics()["variance_ratio"] for agent in agents)
    assert a == pytest.approx(b, rel=1e-5) and a != 1


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("options", ESTIMATES)
def test_gradient_scaling_changes_nothing_and_a_skipped_step_begins_anew(options, to_none):
    models, optimizers, agents = two_in_float64(options)
    train(models[0], optimizers[0], agents[0], 3, batches(dtype=F64))
    model, optimizer, agent = models[1], optimizers[1], agents[1]
    loss, scaler = loss_of(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    for _ in range(3):
        poisoned = [batches(dtype=F64)[0] * float("inf"), *batches(dtype=F64)]  # it does not count
        agent.refresh(poisoned, loss, scaler=scaler)
        for i, x in enumerate(batches(dtype=F64)):
            for factor in [float("inf"), 1.0] if i == 1 else [1.0]:
                agent.backward(lambda x=x, factor=factor: loss(x) * factor, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=to_none)
                agent.step()
    assert agent.since == 4
    assert_nearly_equal(models, agents)


@pytest.mark.parametrize("kind", [sk.RigL, sk.GSE])
def test_growth_sees_the_gradient_that_is_not_corrected(kind):
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = kind(model, optimizer, update_every=2)
    agent = sk.AGENT(model, optimizer, method=method, gamma=1.0)
    data, loss = batches(), loss_of(model)
    for _ in range(2):
        agent.refresh(data, loss)
    agent.c[""] = 1.0
    agent.backward(lambda: loss(data[0]))
    optimizer.step()
    optimizer.zero_grad()
    agent.step()
    agent.refresh(data, loss)  # in an armed step
    agent.backward(lambda: loss(data[1]))
    heard = {name: probe.tensor.grad.clone() for name, probe in method._probes.probes.items()}
    assert heard and (kind is sk.GSE or all(answer[-1] == 1 for answer in heard.values())), "one backward, not two"
    for probe in method._probes.probes.values():
        probe.tensor.grad = None
    loss(data[1]).backward()
    for name, probe in method._probes.probes.items():
        assert torch.equal(probe.tensor.grad, heard[name])


def test_perturbed_batches_are_made_once_and_leave_no_trace():
    model = make(norm=True)
    agent = sk.AGENT(model, sgd(model))
    loss, x = loss_of(model), batches()[0]
    for _ in range(2):
        agent.refresh(batches(), loss)
    agent.c[""] = 1.0
    made, seen = [], []

    def attack():
        made.append(1)
        y = x.clone().requires_grad_()
        loss(y).backward()
        return (x + 0.1 * y.grad.sign()).detach()

    def closure(batch):
        seen.append(batch)
        return loss(batch)

    assert all(p.grad is None for p in model.parameters())
    agent.backward(closure, perturb=attack)
    assert len(made) == 1 and len(seen) == 2 and seen[0] is seen[1] and not torch.equal(seen[0], x)
    assert model[1].num_batches_tracked == 1
    twin = make(norm=True)
    plain = sk.AGENT(twin, sgd(twin))
    for _ in range(2):
        plain.refresh(batches(), loss_of(twin))
    plain.c[""] = 1.0
    plain.backward(lambda: loss_of(twin)(seen[0]))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_a_method_that_draws_networks_is_corrected_once_it_has_chosen():
    model = make()
    optimizer = sgd(model)
    method = sk.VRPGE(model, optimizer, stop=4)
    agent = sk.AGENT(model, optimizer, method=method)
    train(model, optimizer, agent, 1, batches())
    assert method.finished and agent.metrics()["extra_flops"] == 0
    train(model, optimizer, agent, 2, batches())
    assert agent.c[""] > 0 and agent.metrics()["extra_flops"] > 0
    with agent.evaluation():
        model(batches()[0])
