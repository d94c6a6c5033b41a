"""AGENT in numbers: steps by hand, against passes of a copy, and how c comes about."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from tests.training.agent.models import ESTIMATES, F64, METHODS, batches, gradients, loss_of, make, same, sgd, train


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


def test_a_convolution_and_a_frozen_layer_and_a_part_that_is_not_used():
    model = nn.ModuleDict({"conv": nn.Conv2d(8, 8, 3, padding=1), "out": nn.Linear(128, 8), "idle": nn.Linear(8, 8)})
    sk.sparsify_(model, 0.5, 4, seed=0)
    model["out"].values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    agent = sk.AGENT(model, optimizer, method=sk.SET(model, optimizer, update_every=2))
    idle = model["idle"].values.detach().clone()
    data = [torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    loss = lambda x: model["out"](model["conv"](x).flatten(1)).square().mean()  # noqa: E731
    train(model, optimizer, agent, 2, data, loss=loss)
    assert agent.c[""] > 0 and torch.equal(
        model["idle"].values[agent.snapshot.same["idle.values"]], idle[agent.snapshot.same["idle.values"]]
    )
    assert "out.values" not in agent.snapshot.values and "out.bias" in agent.snapshot.values


class TestErrors:
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


def test_parts_that_do_not_belong_together():
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


def test_a_static_graph_of_ranks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(make(), static_graph=True)
        with pytest.raises(NotImplementedError, match=r"static_graph=True.*leave static_graph out"):
            sk.AGENT(model, sgd(model))
        sk.AGENT(model, sgd(model), gamma=0.0)
        sk.AGENT(DistributedDataParallel(make()), sgd(model))
    finally:
        dist.destroy_process_group()
