"""Iterative magnitude pruning with rewinding: by hand, truly sparse, resumed bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training import Lottery, compact_

X, Y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
STEPS, REWIND = 6, 2


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    return sk.sparsify_(model, 0.0, 4, ignore=["3"])


def built(kind=torch.optim.AdamW, rewind=REWIND, **options):
    model = network()
    optimizer = kind(model.parameters(), lr=0.05, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
    values = {"final_sparsity": 0.75, "rounds": 3, "rewind": rewind}
    return model, optimizer, Lottery(model, optimizer, **values | options)


def train(model, optimizer, tickets, until=STEPS):
    for _ in range(tickets.steps, until):
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert not tickets.step()


def blocks(model):
    layer = model[0]
    return dict(zip(layer.topology.keys().tolist(), layer.values.detach().clone(), strict=True))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_ticket_has_the_values_and_the_state_of_the_step_recorded_by_hand(kind):
    model, optimizer, tickets = built(kind)
    train(model, optimizer, tickets, REWIND)
    early, state = blocks(model), copy.deepcopy(optimizer.state_dict()["state"])
    others = {name: tensor.clone() for name, tensor in model.state_dict().items() if not name.startswith("0.")}
    key = {torch.optim.AdamW: "exp_avg", torch.optim.SGD: "momentum_buffer"}[kind]
    by_key = dict(zip(model[0].topology.keys().tolist(), state[0][key], strict=True))
    for left in (8, 4):  # 16 blocks fall by the same factor to 4
        train(model, optimizer, tickets)
        norms = {at: float(values.norm()) for at, values in blocks(model).items()}
        best = sorted(sorted(norms, key=norms.get)[-left:])
        assert tickets.next_round() and tickets.steps == REWIND
        assert sorted(blocks(model)) == best and model[0].values.shape == (left, 4, 4)
        assert all(torch.equal(values, early[at]) for at, values in blocks(model).items())
        mine = optimizer.state[model[0].values]
        assert all(
            torch.equal(entry, by_key[at])
            for at, entry in zip(model[0].topology.keys().tolist(), mine[key], strict=True)
        )
        for name, tensor in others.items():
            assert torch.equal(model.state_dict()[name], tensor), name
        for number, parameter in enumerate(model.parameters()):
            if number:
                saved = state[number]
                assert all(torch.equal(optimizer.state[parameter][entry], saved[entry]) for entry in saved)
    train(model, optimizer, tickets)
    assert not tickets.next_round() and tickets.steps == STEPS


def test_the_original_ticket_starts_from_the_initial_values_without_state():
    model, optimizer, tickets = built(rewind=0, rounds=2)
    first = blocks(model)
    train(model, optimizer, tickets)
    assert tickets.next_round() and len(blocks(model)) == 4
    assert all(torch.equal(values, first[at]) for at, values in blocks(model).items())
    assert not optimizer.state and int(model[1].num_batches_tracked) == 0


class Counting(torch.optim.Optimizer):
    """Keeps plain numbers, None, and a list, for each parameter."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                steps = state.get("steps", 0) + 1
                state.update({"steps": steps, "rate": 1 / steps, "none": None, "pair": [steps, 1.0]})
                parameter.sub_(parameter.grad, alpha=group["lr"] * state["rate"])


OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad, torch.optim.NAdam, Counting]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("rewind", "rounds"), [(2, 0), (2, 1), (0, 1), (3, 2)])
def test_a_resumed_one_ends_bit_for_bit_alike(kind, rewind, rounds):
    def finish(model, optimizer, tickets):
        train(model, optimizer, tickets)
        while tickets.next_round():
            train(model, optimizer, tickets)
        return model.state_dict()

    model, optimizer, tickets = built(kind, rewind)
    for _ in range(rounds):
        train(model, optimizer, tickets)
        tickets.next_round()
    train(model, optimizer, tickets, 4)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), tickets.state_dict()])
    straight = finish(model, optimizer, tickets)
    model, optimizer, tickets = built(kind, rewind)
    compact_(model, optimizer, like=saved[0])
    for part, state in zip((model, optimizer, tickets), saved, strict=True):
        part.load_state_dict(state)
    resumed = finish(model, optimizer, tickets)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rounds": 1}, "rounds is 1"),
        ({"rewind": -1}, "rewind is -1"),
        ({"update_every": 5}, "update_every is no option of Lottery"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ValueError, match=text):
        built(**options)


def test_state_that_is_no_tensor_rewinds():
    model, optimizer, tickets = built(Counting)
    train(model, optimizer, tickets)
    assert optimizer.state[model[0].values]["steps"] == STEPS and tickets.next_round()
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        assert [state[key] for key in ("steps", "rate", "none", "pair")] == [REWIND, 1 / REWIND, None, [REWIND, 1.0]]


def test_a_copy_that_follows_loses_the_same_blocks_and_takes_the_state_of_the_model():
    model, optimizer, tickets = built()
    tickets.follow(average := copy.deepcopy(model))
    train(model, optimizer, tickets)
    late = {at: values + 1 for at, values in blocks(model).items()}
    with torch.no_grad():
        average[0].values.copy_(model[0].values + 1)
    assert tickets.next_round() and sorted(blocks(average)) == sorted(blocks(model))
    assert all(torch.equal(values, late[at]) for at, values in blocks(average).items()), "its values stay"
    average.load_state_dict(model.state_dict())
    assert all(torch.equal(average.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    train(model, optimizer, tickets)
    assert tickets.next_round() and sorted(blocks(average)) == sorted(blocks(model))


def test_a_round_that_is_too_short():
    model, optimizer, tickets = built()
    train(model, optimizer, tickets, 1)
    before = blocks(model)
    with pytest.raises(ValueError, match="rewind is 2, but only 1 steps are made"):
        tickets.next_round()
    assert all(torch.equal(values, before[at]) for at, values in blocks(model).items()) and tickets.round == 0


def test_a_round_that_cannot_begin_changes_nothing():
    model, optimizer, tickets = built()
    train(model, optimizer, tickets)
    with torch.no_grad():
        model[0].values[0, 0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="values of '0' hold NaN or infinity"):
            tickets.next_round()
    assert tickets.round == 0 and len(blocks(model)) == 16


def test_a_state_of_other_tensors():
    model, optimizer, tickets = built()
    train(model, optimizer, tickets)
    state = tickets.state_dict()
    for recorded in (state["recorded"][1:], (("0.values", "", torch.ones(3)), *state["recorded"][1:]), (1,), 1):
        with pytest.raises(ValueError, match="recorded is of other tensors"):
            tickets.load_state_dict(state | {"recorded": recorded})
    for odd in (object(), [object()]):
        with pytest.raises(ValueError, match="recorded is of other tensors"):
            tickets.load_state_dict(state | {"recorded": (*state["recorded"], ("0.values", "odd", odd))})
    wrong = tuple((n, k, t if k != "exp_avg" else t[:1]) for n, k, t in state["recorded"])
    with pytest.raises(ValueError, match="recorded is of other tensors"):
        tickets.load_state_dict(state | {"recorded": wrong})
    with pytest.raises(ValueError, match="the state is of round 4; there are 3"):
        tickets.load_state_dict(state | {"round": 3})
    with pytest.raises(ValueError, match="the state is of round 2, but nothing was recorded"):
        tickets.load_state_dict(state | {"round": 1, "recorded": ()})
