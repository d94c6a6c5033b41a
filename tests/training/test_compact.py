"""Giving the memory of free slots back: what is kept keeps its bits, and what holds the old parameter is told."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsekern as sk
from tests.training.test_base import batch, bits, equal, make, train


def with_free_slots(kind: str = "AdamW", **options):
    """A trained model, some of whose slots are free, and its optimizer."""
    model = make()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01, **options)
    method = sk.Gradual(model, optimizer, final_sparsity=0.8, update_every=2, stop=5)
    train(model, optimizer, method, range(5))
    method.close()
    return model, optimizer


def plain(model, optimizer, steps=3) -> list[torch.Tensor]:
    for step in range(steps):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return bits(model)


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "Adagrad", "Adamax", "Rprop"])
def test_training_goes_on_with_the_same_bits(kind):
    model, optimizer = with_free_slots(kind)
    other, twin = copy.deepcopy((model, optimizer))
    model[0].values.grad = gradient = torch.randn_like(model[0].values)
    used = {name: layer.topology.used() for name, layer in sk.sparse_layers(model).items()}
    held = sum(t.numel() * 4 for t in optimizer.state[model[2].values].values() if t.dim())
    assert sk.compact_(model, optimizer) > held / 3
    assert torch.equal(model[0].values.grad, gradient[used["0"]])
    optimizer.zero_grad()
    for name, layer in sk.sparse_layers(model).items():
        assert layer.topology.slots == int(used[name].sum()) == layer.values.shape[0] < used[name].shape[0]
        assert layer.row_slot.shape[0] == layer.values.shape[0] + 16
    plain(model, optimizer), plain(other, twin)
    for name, layer in sk.sparse_layers(model).items():
        theirs = other.get_submodule(name)
        assert torch.equal(layer.values, theirs.values[used[name]]) and torch.equal(layer.bias, theirs.bias)


def test_groups_of_the_optimizer_attributes_and_hooks_stay():
    model, _ = with_free_slots()
    values = model[0].values
    values.no_decay = True
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD([{"params": [model[2].values]}, {"params": [values, model[0].bias], "lr": 0.5}], lr=0.1)
    sk.compact_(nn.Sequential(model[0], model[2]), optimizer)
    assert optimizer.param_groups[1]["params"][0] is model[0].values is not values
    assert model[0].values.no_decay and optimizer.param_groups[1]["lr"] == 0.5
    model(batch(0)).sum().backward()
    optimizer.step()
    assert calls and model[0].values.grad is not None


def test_a_model_without_free_slots_stays_the_same_object():
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [layer.values for layer in model[::2]]
    assert sk.compact_(model, optimizer) == 0 == sk.compact_(model)
    assert all(a is layer.values for a, layer in zip(before, model[::2], strict=True))


def test_a_layer_without_a_block_keeps_a_slot():
    layer = sk.SparseLinear(8, 8, block_size=4, blocks=2, seed=0)
    layer.move_(torch.arange(2), torch.full((2,), -1), torch.full((2,), -1))
    sk.compact_(layer)
    assert layer.values.shape[0] == 1 and torch.equal(layer(torch.ones(1, 8)), layer.bias[None])


def test_copies_pickles_states_and_files_of_a_smaller_layer(tmp_path):
    model, optimizer = with_free_slots()
    sk.compact_(model, optimizer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(batch(0)), model(batch(0)))
    fresh = make(1)
    fresh.load_state_dict(model.state_dict())  # has more slots, which stay free
    assert torch.equal(fresh(batch(0)), model(batch(0)))
    sk.save(model, tmp_path / "small.safetensors")
    sk.load_(other, tmp_path / "small.safetensors")
    assert torch.equal(other(batch(0)), model(batch(0)))


def test_compiled_code_is_compiled_again():
    model, optimizer = with_free_slots()
    compiled = torch.compile(model, backend="eager")
    before = compiled(batch(0))
    sk.compact_(compiled, optimizer)
    torch.testing.assert_close(compiled(batch(0)), before)
    assert equal(plain(compiled, optimizer), bits(model))


@pytest.mark.parametrize("kind", [sk.SET, sk.RigL, sk.GSE])
def test_a_method_goes_on(kind):
    """With probes armed and ages counted: the same moves as with the free slots there."""
    runs = []
    for compact in (False, True):
        model, optimizer = with_free_slots("SGD", momentum=0.9)
        method = kind(model, optimizer, update_every=2, min_age=1, drop_fraction=0.4)
        train(model, optimizer, method, range(3))
        if compact:
            assert sk.compact_(model, optimizer) > 0
        train(model, optimizer, method, range(3, 9))
        runs.append(model)
    for a, b in zip(*(model[::2] for model in runs), strict=True):
        used = a.topology.used()
        assert torch.equal(a.values[used], b.values) and torch.equal(a.topology.keys()[used], b.topology.keys())


class TestRefused:
    def test_what_holds_numbers_for_each_slot(self):
        model, optimizer = with_free_slots()
        before = bits(model)
        method = sk.VRPGE(model, optimizer)
        with pytest.raises(NotImplementedError, match="VRPGE holds numbers for each slot, so slots cannot go"):
            sk.compact_(model, optimizer)
        method.close()
        agent = sk.AGENT(model, optimizer)
        with pytest.raises(NotImplementedError, match="AGENT holds numbers for each slot, so slots cannot go"):
            sk.compact_(model, optimizer)
        agent.close()
        method = sk.SET(model, optimizer)
        method.follow(torch.zeros(model[0].values.shape[0]), layer="0")
        with pytest.raises(ValueError, match="a tensor follows the blocks of '0', one entry a slot"):
            sk.compact_(model, optimizer)
        assert equal(before, bits(model))

    def test_a_copy_with_other_blocks(self):
        model, optimizer = with_free_slots()
        method = sk.SET(model, optimizer)
        other = copy.deepcopy(model)
        method.follow(other)
        other[0].move_(torch.tensor([0]), torch.tensor([-1]), torch.tensor([-1]))
        with pytest.raises(ValueError, match="'0' has other blocks in a copy that follows"):
            sk.compact_(model, optimizer)

    @pytest.mark.parametrize("given", [False, True])
    def test_another_optimizer(self, given):
        model, optimizer = with_free_slots()
        method = sk.SET(model, optimizer)
        other = torch.optim.SGD(model.parameters(), lr=0.1) if given else None
        with pytest.raises(ValueError, match="optimizer is not the one of the SET that moves the blocks"):
            sk.compact_(model, other)
        method.close()
        with pytest.raises(ValueError, match="values of '0' are not in this optimizer"):
            sk.compact_(model, torch.optim.SGD([nn.Parameter(torch.ones(1))]))

    @pytest.mark.parametrize("frozen", [False, True])
    def test_an_optimizer_that_cannot_follow_changes_nothing(self, frozen):
        model, optimizer = with_free_slots()
        model[2].values.requires_grad_(not frozen)
        optimizer.state[model[2].values]["flat"] = torch.zeros(3)
        before = bits(model)
        with pytest.raises(ValueError, match="keeps 'flat' for values of '2'"):
            sk.compact_(model, optimizer)
        assert equal(before, bits(model))

    def test_parallel_and_sharded_models(self, monkeypatch):
        model, optimizer = with_free_slots()
        monkeypatch.setattr("sparsekern.training.followers.parallel_modules", lambda module: [module])
        with pytest.raises(NotImplementedError, match="call compact_ on the module inside, then wrap it again"):
            sk.compact_(model, optimizer)
        monkeypatch.undo()
        model[0].values.device_mesh = None
        with pytest.raises(NotImplementedError, match="values of '0' are a DTensor; compact_ works before fully_shard"):
            sk.compact_(model, optimizer)

    def test_a_state_that_is_not_of_the_model(self):
        model, optimizer = with_free_slots()
        for like, found in (({}, "nothing"), ({"0.row": torch.zeros(99)}, "99 slots")):
            with pytest.raises(ValueError, match=f"like has {found} for '0', which has 4; build the model as it was"):
                sk.compact_(model, optimizer, like=like)

    def test_types(self):
        with pytest.raises(TypeError, match=r"model is a int; it must be a torch.nn.Module"):
            sk.compact_(3)
        with pytest.raises(TypeError, match=r"optimizer is a int; it must be a torch.optim.Optimizer"):
            sk.compact_(make(), 3)
