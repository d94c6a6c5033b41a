"""A method acts in the steps of its optimizer until it is closed, replaced or forgotten; a copy acts in its copy's."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.training import METHODS
from sparsekern.training.attachment import Freeze
from tests.training.test_base import batch, bits, built, equal, make, train


def build(name: str, **options):
    return built(METHODS[name], 0, torch.optim.AdamW, update_every=3, stop=40, **options)


def hooks(optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def plain(model, optimizer, steps=1) -> None:
    for step in range(steps):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


class TestClose:
    @pytest.mark.parametrize("name", METHODS)
    def test_the_optimizer_and_the_model_are_as_if_it_had_never_been(self, name):
        model, optimizer, method = build(name)
        train(model, optimizer, method, range(2))  # RigL and GSE: probes are armed
        method.close()
        method.close()
        assert method.closed and hooks(optimizer) == 0
        assert all(layer.probe is None for layer in method.layers.values())
        other = make()
        other.load_state_dict(model.state_dict())
        twin = torch.optim.AdamW(other.parameters(), lr=0.01)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # which would share tensors
        plain(model, optimizer, 3)
        plain(other, twin, 3)
        assert equal(bits(model), bits(other)) and method.steps == 2
        assert method.metrics()["steps"] == 2 and method.state_dict()["steps"] == 2
        for call in (method.step, method.update, lambda: method.backward(lambda: model(batch(0)).sum())):
            with pytest.raises(RuntimeError, match=f"this {type(method).__name__} is closed, by close"):
                call()

    def test_agent_closes_its_method(self):
        model, optimizer, method = build("set")
        agent = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=2)
        agent.close()
        assert method.closed and agent.closed and hooks(optimizer) == 0
        for call in (agent.step, lambda: agent.backward(lambda: model(batch(0)).sum())):
            with pytest.raises(RuntimeError, match="this AGENT is closed"):
                call()
        with pytest.raises(RuntimeError, match="this SET is closed"):
            sk.AGENT(model, optimizer, method=method)


class TestReplaced:
    @pytest.mark.parametrize("name", METHODS)
    def test_a_second_method_closes_the_first(self, name, caplog):
        """A cell of a notebook that runs twice."""
        model, optimizer, first = build(name)
        once = hooks(optimizer)
        options = {"threshold": 0.1} if name == "dsr" else {}  # from its default two updates reach no block
        second = METHODS[name](model, optimizer, update_every=3, stop=40, seed=7, **options)
        assert first.closed and hooks(optimizer) == once
        assert "takes the place of the" in caplog.text
        moved = train(model, optimizer, second, range(7))
        assert second.steps == 7 and first.steps == 0
        assert any(moved) == (name not in ("static", "vrpge"))
        with pytest.raises(RuntimeError, match="another was built later for the same layers"):
            first.step()

    def test_with_another_optimizer(self):
        """Two methods on one model."""
        model, optimizer, first = build("set")
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        second = sk.RigL(model, other)
        assert first.closed and not second.closed and hooks(optimizer) == 0

    def test_methods_of_other_layers_live_side_by_side(self):
        """The two networks of a GAN, even in one optimizer."""
        a, b = make(0), make(1)
        optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
        first, second = (sk.SET(m, optimizer, update_every=1) for m in (a, b))
        plain(nn.Sequential(a, nn.Linear(4, 8), b), optimizer)
        assert first.step() and second.step()

    def test_one_that_fails_to_be_built_for_its_optimizer_closes_nothing(self):
        model, _, first = build("set")
        with pytest.raises(ValueError, match="not in this optimizer"):
            sk.SET(model, torch.optim.SGD([nn.Parameter(torch.ones(1))]))
        assert not first.closed

    @pytest.mark.parametrize(
        ("name", "refused"),
        [
            ("set", {"drop": "none"}),
            ("gse", {"subset_factor": 0.0}),
            ("rigl", {"scoring": "none"}),
            ("rigl", {"regrow": True, "scope": "global"}),
            ("srigl", {"min_salient": -1.0}),
            ("mest", {"soft_bound": True}),
            ("granet", {"sketches": 0}),
            ("vrpge", {"masks": 1}),
            ("vrpge", {"refill": 0.5, "group": "row"}),
        ],
    )
    def test_one_whose_options_are_refused_closes_nothing(self, name, refused):
        model, optimizer, first = build("set")
        with pytest.raises(InputError):
            METHODS[name](model, optimizer, **refused)
        assert not first.closed

    @pytest.mark.parametrize("name", ["gse", "rigl", "dsr"])
    def test_one_that_refuses_tied_taps_closes_nothing(self, name):
        conv = sk.SparseConv2d(8, 8, 3, block_size=4, sparsity=0.5, tie_taps=True)
        optimizer = torch.optim.SGD(conv.parameters(), lr=0.1)
        first = sk.SET(conv, optimizer)
        with pytest.raises(NotImplementedError, match="tie_taps=True"):
            METHODS[name](conv, optimizer)
        assert not first.closed

    def test_agent_and_its_method_live_together_and_a_second_agent_closes_the_first(self):
        model, optimizer, method = build("set")
        first = sk.AGENT(model, optimizer, method=method)
        once, followers = hooks(optimizer), len(method.followers._tensors["0"])
        second = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=3)
        assert first.closed and not method.closed and not second.closed
        assert hooks(optimizer) == once and len(method.followers._tensors["0"]) == followers
        train(model, optimizer, second, range(4))
        assert second.since > 0 and first.since == 0 and method.steps == 4


class TestForgotten:
    @pytest.mark.parametrize("name", METHODS)
    def test_what_was_garbage_collected_does_not_act(self, name):
        model, optimizer, method = build(name)
        layers = list(method.layers.values())
        train(model, optimizer, method, range(2))
        del method
        gc.collect()
        assert hooks(optimizer) == 0 and all(layer.probe is None for layer in layers)
        plain(model, optimizer)  # VR-PGE would say that its backward is missing

    def test_no_step_is_lost_to_a_forgotten_skip(self):
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sk.RigL(model, optimizer, update_every=2, skip_step=True)
        static = sk.Static(model, optimizer)
        changed = 0
        for step in range(10):
            before = model[0].values.detach().clone()
            train(model, optimizer, static, [step])
            changed += not torch.equal(before, model[0].values)
        assert changed == 10 and static.steps == 10

    def test_a_hook_keeps_no_method_alive(self):
        model, optimizer, method = build("set")
        alive = weakref.ref(method)
        del method
        gc.collect()
        assert alive() is None and optimizer and model


class TestCopies:
    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    @pytest.mark.parametrize("name", METHODS)
    def test_a_copy_of_the_three_goes_on_alike_and_apart(self, name, how):
        three = build(name)
        train(*three, range(5))  # two steps into an interval: probes are armed before the update at 6
        other = copy.deepcopy(three) if how == "deepcopy" else pickle.loads(pickle.dumps(three))
        assert other[2].optimizer is other[1] and other[2].layers["0"] is other[0][0]
        expected = train(*three, range(5, 14))
        steps = three[2].steps
        assert other[2].steps == 5 and three[2].steps == 14
        assert train(*other, range(5, 14)) == expected
        assert equal(bits(three[0]), bits(other[0])) and three[2].steps == steps == other[2].steps
        assert not three[2].closed and not other[2].closed

    def test_of_a_probe_that_has_heard_something(self):
        three = build("gse")
        model = three[0]
        train(*three, range(2))
        for part in range(2):
            model(batch(part)).square().mean().backward()
        copied = copy.deepcopy(three)
        for mine, parameter in zip(copied[0].parameters(), model.parameters(), strict=True):
            mine.grad = parameter.grad.clone()  # which PyTorch leaves behind
        for _, optimizer, method in (three, copied):
            optimizer.step()
            optimizer.zero_grad()
            assert method.step()
        assert equal(bits(model), bits(copied[0]))

    def test_of_agent(self):
        model, optimizer, method = build("set")
        agent = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=4, gamma=1.0)
        four = (model, optimizer, method, agent)
        train(model, optimizer, agent, range(5))
        other = copy.deepcopy(four)
        for m, o, _, a in (four, other):
            train(m, o, a, range(5, 11))
        assert equal(bits(model), bits(other[0])) and other[3].method is other[2]
        assert agent.snapshot.corrected() == other[3].snapshot.corrected() < 1

    def test_a_closed_one_stays_closed(self):
        three = build("set")
        three[2].close()
        other = copy.deepcopy(three)
        assert other[2].closed and hooks(other[1]) == 0


class TestAnotherOptimizerSteps:
    @pytest.mark.parametrize("name", METHODS)
    def test_the_log_says_so_once(self, name, caplog):
        model, _, method = build(name)
        other = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            plain(model, other)
            assert method.step() is False
            said = caplog.text.count("values of sparse layers changed, but the AdamW that")
            assert said == 1, step

    @pytest.mark.parametrize("name", METHODS)
    def test_nothing_is_said_where_all_is_well(self, name, caplog):
        """Accumulation, skipped steps, loading, updates by hand, AGENT."""
        model, optimizer, method = build(name)
        scaler = torch.amp.GradScaler("cpu")
        for step in range(4):
            method.backward(lambda: model(batch(0)).square().mean())
            assert method.step() is False
            method.backward(lambda: model(batch(0)).sum() * float("inf"), scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            method.step()
            optimizer.zero_grad()
            train(model, optimizer, method, [step])
        if name == "set":
            method.update()
        model.load_state_dict(model.state_dict())
        method.load_state_dict(method.state_dict())
        method.step()
        assert "values of sparse layers changed" not in caplog.text

    def test_nor_with_agent(self, caplog):
        model, optimizer, method = build("set")
        agent = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=2, gamma=1.0)
        for step in range(6):
            for _ in range(2):
                agent.backward(lambda step=step: model(batch(step)).square().mean() / 2)
                agent.step()
            optimizer.step()
            optimizer.zero_grad()
            agent.step()
        assert "values of sparse layers changed" not in caplog.text


class TestFrozen:
    def test_an_update_waits_for_every_evaluation(self):
        model, _, method = build("set")
        entered, leave, seen = threading.Barrier(3), threading.Event(), []

        def evaluate():
            with method.frozen():
                entered.wait(5)
                before = model[0].row.clone()
                leave.wait(5)
                with torch.no_grad():
                    model(batch(0))
                seen.append(torch.equal(before, model[0].row))

        threads = [threading.Thread(target=evaluate) for _ in range(2)]
        for thread in threads:
            thread.start()
        entered.wait(5)
        updating = threading.Thread(target=method.update)
        updating.start()
        updating.join(0.2)
        assert updating.is_alive() and method.updates == 0
        leave.set()
        for thread in (*threads, updating):
            thread.join(5)
        assert seen == [True, True] and method.updates == 1

    @pytest.mark.parametrize("name", ["vrpge", "agent"])
    def test_passes_that_exchange_the_index_wait_too(self, name):
        model, optimizer, method = build("set" if name == "agent" else name)
        if name == "agent":
            method = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=5, gamma=1.0)
            train(model, optimizer, method, range(2))
        done = threading.Event()

        def step():
            method.backward(lambda: model(batch(0)).square().mean())
            done.set()

        thread = threading.Thread(target=step)
        with method.frozen():
            thread.start()
            assert not done.wait(0.2)
        thread.join(5)
        assert done.is_set()

    def test_an_update_in_the_thread_that_froze(self):
        model, _, method = build("set")
        before = bits(model)
        with pytest.raises(RuntimeError, match=r"inside frozen\(\) of the same thread"), method.frozen():
            method.update()
        assert equal(bits(model), before) and method.updates == 0
        assert method.update()

    def test_an_update_comes_between_evaluations_that_never_end(self):
        freeze, wrote, leave = Freeze(), threading.Event(), threading.Event()
        inside = threading.Semaphore(0)

        def evaluate():  # two in turn, so that one of them always reads
            while not leave.is_set():
                with freeze.reading():
                    inside.release()
                    with freeze.reading():  # whoever is in may go in again
                        time.sleep(0.01)

        def write():
            with freeze.writing():
                wrote.set()

        threads = [threading.Thread(target=evaluate) for _ in range(2)]
        for thread in threads:
            thread.start()
            inside.acquire(timeout=5)
            time.sleep(0.005)
        writer = threading.Thread(target=write)
        writer.start()
        came = wrote.wait(2)
        leave.set()
        for thread in (*threads, writer):
            thread.join(5)
        assert came and freeze._writer is None and not freeze._readers and not freeze._waiting

    def test_a_context_that_fails_lets_go(self):
        freeze = Freeze()
        with pytest.raises(KeyError), freeze.reading():
            raise KeyError
        with pytest.raises(KeyError), freeze.writing(), freeze.writing():
            raise KeyError
        with freeze.writing(), freeze.reading():
            pass
        assert freeze._writer is None and not freeze._readers
