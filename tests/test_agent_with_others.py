"""AGENT beside what else makes a step: micro-batches, loss scaling, methods, and perturbed batches."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from tests.training.agent.models import ESTIMATES, F64, batches, loss_of, make, sgd, train


@pytest.mark.parametrize("options", [{"estimate": "losses"}, *ESTIMATES[1:]])
@pytest.mark.parametrize("to_none", [True, False])
def test_micro_batches_add_up(to_none, options):
    models = [make(dtype=F64) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    agents = [sk.AGENT(m, o, gamma=0.5, **options) for m, o in zip(models, optimizers, strict=True)]
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
    torch.testing.assert_close(agents[1].c, agents[0].c, rtol=1e-9, atol=0)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    a, b = (agent.metrics()["variance_ratio"] for agent in agents)
    assert a == pytest.approx(b, rel=1e-5) and a != 1


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("options", ESTIMATES)
def test_gradient_scaling_changes_nothing_and_a_skipped_step_begins_anew(options, to_none):
    models = [make(dtype=F64) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    agents = [sk.AGENT(m, o, gamma=0.5, **options) for m, o in zip(models, optimizers, strict=True)]
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
    torch.testing.assert_close(agent.c, agents[0].c, rtol=1e-9, atol=0)
    for a, b in zip(models[0].parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


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
    heard = {name: probe.tensor.grad.clone() for name, probe in method._armed.probes.items()}
    assert heard and (kind is sk.GSE or all(answer[-1] == 1 for answer in heard.values())), "one backward, not two"
    for probe in method._armed.probes.values():
        probe.tensor.grad = None
    loss(data[1]).backward()
    for name, probe in method._armed.probes.items():
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
