"""AGENT in whole steps: by hand, against passes of a copy, by what it leaves alone, and in what it costs."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sparsekern as sk
from tests.memory import allocations

F64 = torch.float64
METHODS = [sk.SET, sk.RigL, sk.GSE]
ESTIMATES = [{}, {"estimate": "gradients"}, {"estimate": "gradients", "scope": "layer"}]


def make(*, norm: bool = False, dropout: float = 0.0, dtype=torch.float32, block: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    extra = [nn.BatchNorm1d(16)] if norm else []
    extra += [nn.Dropout(dropout)] if dropout else []
    model = nn.Sequential(nn.Linear(8, 16), *extra, nn.Tanh(), nn.Linear(16, 12))
    return sk.sparsify_(model, 0.5, block, seed=0).to(dtype)


def batches(count: int = 4, dtype=torch.float32, rows: int = 6) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 8, generator=generator, dtype=dtype) for _ in range(count)]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


def loss_of(model: nn.Module):
    return lambda x: (model(x) - x.sum(1, keepdim=True)).square().mean()


def train(model, optimizer, agent, epochs: int, data, *, refresh: bool = True) -> None:
    loss = loss_of(model)
    for _ in range(epochs):
        if refresh:
            agent.refresh(data, loss)
        for x in data:
            agent.backward(lambda x=x: loss(x))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            agent.step()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_two_parameters_by_hand():
    """Loss ``(w x - t)^2 / 2``, rate 0.1, gamma = alpha = 0.5; batches A: x = (1, 0), t = 1, and B: x = (1, 1), t = 0.

    Epoch 1 from w = (0, 0), c = 0: gradients (-1, 0) and (0.1, 0.1), so w = (0.1, 0), then (0.09, -0.01).
    Losses there 0.41405 and 0.0032, at the snapshot (0, 0) 0.5 and 0: covariance / variance = 0.1027125 / 0.125 =
    0.8217, c = 0.41085, gamma c = 0.205425. Mean gradient at (0.09, -0.01): of (-0.91, 0) and (0.08, 0.08), so
    (-0.415, 0.04).
    Epoch 2, A: (-0.91, 0) - 0.205425 (-0.495, -0.04) = (-0.808314625, 0.008217); w = (0.1708314625, -0.0108217).
    B: 0.1600097625 (1, 1) - 0.205425 (0.495, 0.04) = (0.0583243875, 0.1517927625).
    """
    model = sk.SparseLinear(2, 1, bias=False, sparsity=0, block_size=1, dtype=F64)
    nn.init.zeros_(model.values)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = sk.AGENT(model, optimizer, gamma=0.5, alpha=0.5)
    data = [([[1.0, 0.0]], 1.0), ([[1.0, 1.0]], 0.0)]
    data = [(torch.tensor(x, dtype=F64), t) for x, t in data]
    column = model.topology.keys().long()
    seen = []
    for _ in range(2):
        agent.refresh(data, lambda b: (model(b[0]) - b[1]).square().sum() / 2)
        for x, t in data:
            agent.backward(lambda x=x, t=t: (model(x) - t).square().sum() / 2)
            optimizer.step()
            optimizer.zero_grad()
            assert agent.step() is False
            seen.append(model.values.detach().flatten()[column.argsort()].tolist())
    assert agent.metrics()["c"] == pytest.approx(0.41085, abs=1e-12)
    assert (
        torch.tensor(seen, dtype=F64)
        .sub(
            torch.tensor(
                [[0.1, 0], [0.09, -0.01], [0.1708314625, -0.0108217], [0.16499902375, -0.02600097625]], dtype=F64
            )
        )
        .abs()
        .max()
        < 1e-15
    )


@pytest.mark.parametrize("method", METHODS)
def test_gamma_zero_is_no_agent_bit_for_bit(method):
    models = [make(norm=True, dropout=0.3) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    methods = [method(m, o, update_every=3) for m, o in zip(models, optimizers, strict=True)]
    torch.manual_seed(5)
    train(models[0], optimizers[0], methods[0], 3, batches(), refresh=False)
    torch.manual_seed(5)
    agent = sk.AGENT(models[1], optimizers[1], method=methods[1], gamma=0.0)
    train(models[1], optimizers[1], agent, 3, batches())
    assert same(*models) and agent.metrics()["extra_flops"] == 0


@pytest.mark.parametrize("options", ESTIMATES)
def test_the_first_epoch_has_c_zero_and_is_plain(options):
    models = [make(norm=True) for _ in range(2)]
    optimizers = [sgd(model) for model in models]
    train(models[0], optimizers[0], sk.SET(models[0], optimizers[0], update_every=3), 1, batches(), refresh=False)
    agent = sk.AGENT(models[1], optimizers[1], method=sk.SET(models[1], optimizers[1], update_every=3), **options)
    train(models[1], optimizers[1], agent, 1, batches())
    assert same(*models) and agent.metrics()["c"] == 0


def test_at_the_snapshot_every_corrected_gradient_is_the_full_one():
    model = make(dtype=F64)
    agent = sk.AGENT(model, sgd(model), gamma=1.0)
    data, loss = batches(dtype=F64), loss_of(model)
    agent.refresh(data, loss)
    agent.c[""] = 1.0
    (sum(loss(x) for x in data) / len(data)).backward()
    full = gradients(model)
    for x in data:
        model.zero_grad()
        agent.backward(lambda x=x: loss(x))
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, full[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("estimate", ["losses", "gradients"])
@pytest.mark.parametrize("block", [1, 4])
def test_each_correction_is_that_of_a_copy_and_moved_blocks_have_none(block, estimate):
    model = make(dtype=F64, block=block)
    optimizer = sgd(model)
    method = sk.SET(model, optimizer, drop_fraction=0.4)
    agent = sk.AGENT(model, optimizer, method=method, gamma=0.5, estimate=estimate)
    data, loss = batches(dtype=F64), loss_of(model)
    agent.refresh(data, loss)
    old = copy.deepcopy(model)
    (sum(loss_of(old)(x) for x in data) / len(data)).backward()
    mean = gradients(old)
    stayed = {f"{name}.values": torch.ones(layer.values.shape[0]) for name, layer in method.layers.items()}
    for name, flags in stayed.items():
        method.follow(flags, layer=name.removesuffix(".values"))
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=F64))
        method.update()
    agent.c[""] = 0.7
    moved = {name: flags == 0 for name, flags in stayed.items()}
    assert all(m.any() and not m.all() for m in moved.values())
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x in data:
        for network in (model, old):
            network.zero_grad()
            loss_of(network)(x).backward()
        new, residual = gradients(model), {n: g - mean[n] for n, g in gradients(old).items()}
        model.zero_grad()
        agent.backward(lambda x=x: loss(x))
        for name, gradient in gradients(model).items():
            r = residual[name]
            if name in moved:
                r[moved[name]] = 0
                assert torch.equal(gradient[moved[name]], new[name][moved[name]])
            torch.testing.assert_close(gradient, new[name] - 0.35 * r, rtol=1e-12, atol=1e-15)
            total[name] += gradient - new[name]
    for t in total.values():  # over all batches the corrections cancel
        torch.testing.assert_close(t, torch.zeros_like(t), rtol=0, atol=1e-14)
    assert agent.metrics()["corrected"] == pytest.approx(float(1 - torch.cat(list(moved.values())).double().mean()))


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
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if "running" not in k and "num" not in k
    )
    with pytest.raises(KeyError):
        agent.backward(lambda: {}["broken"])
    assert all(
        torch.equal(before[k], v) for k, v in model.state_dict().items() if "running" not in k and "num" not in k
    )


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
    assert heard and all(method._armed.backwards(name) == 1 for name in heard)
    for probe in method._armed.probes.values():
        probe.tensor.grad = None
    loss(data[1]).backward()
    for name, probe in method._armed.probes.items():
        assert torch.equal(probe.tensor.grad, heard[name])


@pytest.mark.parametrize("options", [*ESTIMATES, {"estimate": "gradients", "every": 3}])
@pytest.mark.parametrize("kind", [sk.SET, sk.GSE])
def test_killed_and_resumed_bit_for_bit(kind, options):
    def build():
        model = make(norm=True, dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        method = kind(model, optimizer, update_every=3, seed=2)
        return model, optimizer, sk.AGENT(model, optimizer, method=method, gamma=0.5, **options)

    def run(parts, steps):
        model, optimizer, agent = parts
        loss, data = loss_of(model), batches(4)
        for step in steps:
            torch.manual_seed(step)  # dropout, which the loop has to save
            if step % 4 == 0 and agent.every is None:
                agent.refresh(data, loss)
            agent.backward(lambda step=step: loss(data[step % 4]))
            optimizer.step()
            optimizer.zero_grad()
            agent.step()

    through = build()
    run(through, range(16))
    assert all(c > 0 for c in through[2].c.values())
    first = build()
    run(first, range(10))
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in first], saved)
    saved.seek(0)
    second = build()
    for part, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(second, range(10, 16))
    assert same(second[0], through[0])
    metrics = [{k: v for k, v in parts[2].metrics().items() if "seconds" not in k} for parts in (second, through)]
    assert metrics[0] == metrics[1]


def test_a_state_from_before_the_first_snapshot():
    model = make()
    agent = sk.AGENT(model, sgd(model))
    state = agent.state_dict()
    agent.refresh(batches(), loss_of(model))
    agent.load_state_dict(state)
    agent.backward(lambda: loss_of(model)(batches()[0]))
    assert agent.metrics()["corrected"] == 0 and agent.snapshot.state_dict() == {"taken": False}


def test_without_a_pass_the_mean_is_that_of_the_steps_before():
    model = make(dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = sk.AGENT(model, optimizer, gamma=0.5, alpha=1.0, estimate="gradients", every=3)
    data, loss = batches(7, dtype=F64), loss_of(model)
    c = 0.0
    for start in (0, 3):
        old, seen = copy.deepcopy(model), []
        products = torch.zeros(2, dtype=F64)
        for step in range(start, start + 3):
            old.zero_grad()
            loss_of(old)(data[step]).backward()
            loss(data[step]).backward()
            new, mean = gradients(model), {n: sum(g[n] for g in seen) / max(1, len(seen)) for n in gradients(old)}
            residual = {n: g - mean[n] for n, g in gradients(old).items()}
            seen.append(gradients(old))
            model.zero_grad()
            agent.backward(lambda step=step: loss(data[step]))
            for name, gradient in gradients(model).items():
                wanted = new[name] - (0.5 * c * residual[name] if step > start else 0)
                torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15)
                if step > start:
                    products += torch.stack([(new[name] * residual[name]).sum(), residual[name].square().sum()])
            optimizer.step()
            optimizer.zero_grad()
            agent.step()
        c = min(1.0, max(0.0, float(products[0] / products[1])))
        assert agent.c[""] == pytest.approx(c, rel=1e-9) and c > 0
    assert agent.since == 0
    agent.refresh()
    assert agent.c[""] == pytest.approx(c, rel=1e-9)


def test_c_of_each_module_is_that_of_its_own_gradients():
    model = make(dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = sk.AGENT(model, optimizer, gamma=0.5, alpha=1.0, estimate="gradients", scope="layer")
    data, loss = batches(dtype=F64), loss_of(model)
    agent.refresh(data, loss)
    old = copy.deepcopy(model)
    (sum(loss_of(old)(x) for x in data) / len(data)).backward()
    mean, products = gradients(old), {"0": torch.zeros(2, dtype=F64), "2": torch.zeros(2, dtype=F64)}
    for x in data:
        old.zero_grad()
        loss_of(old)(x).backward()
        agent.backward(lambda x=x: loss(x))
        for name, new in gradients(model).items():
            r = old.get_parameter(name).grad - mean[name]
            products[name[0]] += torch.stack([(new * r).sum(), r.square().sum()])
        optimizer.step()
        optimizer.zero_grad()
    agent.refresh(data, loss)
    metrics = agent.metrics()
    for name, (product, square) in products.items():
        assert metrics[f"c/{name}"] == pytest.approx(min(1.0, float(product / square)), rel=1e-9)
    assert metrics["c"] == pytest.approx((metrics["c/0"] + metrics["c/2"]) / 2)


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


def test_a_convolution_and_a_frozen_layer_and_a_part_that_is_not_used():
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1), "out": nn.Linear(128, 8), "idle": nn.Linear(8, 8)})
    sk.sparsify_(model, 0.5, 4, seed=0)
    model["out"].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    agent = sk.AGENT(model, optimizer, method=sk.SET(model, optimizer, update_every=2))
    idle = model["idle"].values.detach().clone()
    data = [torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    loss = lambda x: model["out"](model["conv"](x).flatten(1)).square().mean()  # noqa: E731
    for _ in range(2):
        agent.refresh(data, loss)
        for x in data:
            agent.backward(lambda x=x: loss(x))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            agent.step()
    assert agent.c[""] > 0 and torch.equal(
        model["idle"].values[agent.snapshot._same["idle.values"]], idle[agent.snapshot._same["idle.values"]]
    )
    assert "out.values" not in agent.snapshot.values and "out.bias" in agent.snapshot.values


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"gamma": 1.1}, r"gamma is 1.1; it must be in \[0, 1\]"),
            ({"alpha": 0}, r"alpha is 0; it must be in \(0, 1\]"),
            ({"estimate": "guess"}, "estimate is 'guess'; it must be one of losses, gradients"),
            ({"scope": "head"}, "scope is 'head'; it must be one of global, layer"),
            ({"batches": 0}, "batches is 0; it must be 1 or more"),
            ({"every": 0, "estimate": "gradients"}, "every is 0; it must be 1 or more"),
            ({"every": 5}, "every is 5, but the losses of batches give one c after a pass; estimate must be gradients"),
            ({"scope": "layer"}, "scope is 'layer', but the losses"),
        ],
    )
    def test_numbers_out_of_range(self, options, text):
        model = make()
        with pytest.raises(ValueError, match=text):
            sk.AGENT(model, sgd(model), **options)

    def test_parts_that_do_not_belong_together(self):
        model, other = make(), make()
        optimizer = sgd(model)
        with pytest.raises(TypeError, match=r"optimizer is a list; it must be a torch.optim.Optimizer"):
            sk.AGENT(model, [])
        with pytest.raises(TypeError, match=r"method is a str; it must be a sparsekern.Method"):
            sk.AGENT(model, optimizer, method="set")
        with pytest.raises(ValueError, match="method is of another model or optimizer"):
            sk.AGENT(model, sgd(model), method=sk.SET(model, optimizer))
        with pytest.raises(ValueError, match="method is of another model or optimizer"):
            sk.AGENT(other, optimizer, method=sk.SET(model, optimizer))

    def test_a_refresh_without_what_it_needs(self):
        model = make()
        agent = sk.AGENT(model, sgd(model))
        with pytest.raises(ValueError, match="takes batches and their loss together"):
            agent.refresh(batches())
        with pytest.raises(ValueError, match="needs batches and a loss: c is estimated from losses"):
            agent.refresh()
        with pytest.raises(ValueError, match="batches is empty"):
            agent.refresh([], loss_of(model))
        agent.backward(lambda: loss_of(model)(batches()[0]))  # and goes on without a correction
        assert agent.metrics()["extra_flops"] == 0

    def test_a_pass_that_fails_leaves_no_half_a_mean(self):
        model = make()
        agent = sk.AGENT(model, sgd(model))
        loss = loss_of(model)
        for _ in range(2):
            agent.refresh(batches(), loss)

        def broken():
            yield batches()[0]
            raise OSError("the disk")

        with pytest.raises(OSError, match="the disk"):
            agent.refresh(broken(), loss)
        flops = agent.metrics()["extra_flops"]
        agent.backward(lambda: loss(batches()[0]))
        assert agent.metrics()["extra_flops"] == flops

    def test_a_first_pass_that_fails_is_no_snapshot_to_compare_with(self):
        model = make()
        agent = sk.AGENT(model, sgd(model))
        loss = loss_of(model)

        def broken():
            yield batches()[0]
            raise OSError("the disk")

        with pytest.raises(OSError, match="the disk"):
            agent.refresh(broken(), loss)
        agent.refresh(batches(), loss)
        assert agent.metrics()["c"] == 0  # as in the first interval of a run without a failure
        agent.refresh(batches(), loss)
        assert agent.metrics()["c"] == pytest.approx(agent.alpha)  # the weights are those of the snapshot

    def test_a_state_of_something_else(self):
        model, other = make(), make(block=2)
        optimizer = sgd(model)
        agent = sk.AGENT(model, optimizer)
        agent.refresh(batches(), loss_of(model))
        with pytest.raises(ValueError, match="the state is none of AGENT's of version 1"):
            agent.load_state_dict({"version": 2})
        with pytest.raises(ValueError, match="another method or scope"):
            sk.AGENT(model, optimizer, method=sk.SET(model, optimizer)).load_state_dict(agent.state_dict())
        with pytest.raises(ValueError, match="the state is of other parameters"):
            sk.AGENT(other, sgd(other)).load_state_dict(agent.state_dict())

    def test_a_sparse_gradient(self):
        model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Linear(8, 8))
        agent = sk.AGENT(model, torch.optim.SGD(model.parameters(), lr=0.1), estimate="gradients", every=2)
        with pytest.raises(ValueError, match=r"0.weight has a sparse gradient, .* use sparse=False"):
            agent.backward(lambda: model(torch.arange(4)).sum())

    def test_blocks_that_move_behind_its_back(self):
        model = make()
        optimizer = sgd(model)
        agent = sk.AGENT(model, optimizer)
        agent.refresh(batches(), loss_of(model))
        sk.SET(model, optimizer).update()
        with pytest.raises(ValueError, match="blocks moved, but AGENT knows of no method; give the one"):
            agent.refresh(batches(), loss_of(model))


def test_it_says_what_it_is():
    model = make()
    assert repr(sk.AGENT(model, sgd(model))) == (
        "AGENT(gamma=0.1, alpha=0.3, estimate='losses', scope='global', c=0, None)"
    )
