"""A method as a ``Stateful`` of torch.distributed.checkpoint: saved, loaded into a fresh one, continued bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

import sparsekern as sk
from tests.training.test_base import batch, bits, equal, make, train

METHODS = {
    "SET": (sk.SET, {"min_age": 1}),
    "RigL": (sk.RigL, {}),
    "RigL, screened": (sk.RigL, {"scoring": "screen"}),
    "GSE": (sk.GSE, {}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "VRPGE": (sk.VRPGE, {"refill": 0.3, "floor": 0.05}),
    "VRPGE, sgd": (sk.VRPGE, {"probability_optimizer": "sgd"}),
    "Gradual": (sk.Gradual, {"final_sparsity": 0.8}),
    "MEST": (sk.MEST, {}),
    "SRigL": (sk.SRigL, {}),
    "DSR": (sk.DSR, {"threshold": 0.05}),
    "TopKAST": (sk.TopKAST, {}),
    "GraNet": (sk.GraNet, {"final_sparsity": 0.8}),
}
AGENTS = {
    "AGENT": {},
    "AGENT, gradients": {"estimate": "gradients", "scope": "layer"},
    "AGENT, no pass": {"estimate": "gradients", "every": 4},
}


def build(name: str, seed: int):
    model = make(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    kind, options = METHODS.get(name, (sk.GSE, {}))
    method = kind(model, optimizer, update_every=3, stop=40, seed=7, **options)
    if name in AGENTS:
        method = sk.AGENT(model, optimizer, method=method, gamma=0.5, **AGENTS[name])
    return model, optimizer, method


def go_on(model, optimizer, method, steps) -> None:
    for step in steps:
        if isinstance(method, sk.AGENT) and method.every is None and step % 5 == 1:
            method.refresh([batch(s) for s in range(3)], lambda x: model(x).square().mean())
        train(model, optimizer, method, [step])


def save(path, model, optimizer, method) -> None:
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optim": state, "method": method}, checkpoint_id=path)


def load(path, model, optimizer, method) -> None:
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optim": state}
    dcp.load(loaded, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])
    dcp.load({"method": method}, checkpoint_id=path)


def keys(state: object) -> object:
    """Return the names of a state, and where a leaf is no tensor, nothing of it."""
    if not isinstance(state, dict):
        return tuple(state.shape) if isinstance(state, torch.Tensor) else None
    return {key: keys(value) for key, value in state.items()}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PyTorch, about saving without ranks
@pytest.mark.parametrize("at", [1, 5, 11])
@pytest.mark.parametrize("name", [*METHODS, *AGENTS])
def test_saved_loaded_and_continued_bit_for_bit(tmp_path, name, at):
    through = build(name, 0)
    go_on(*through, range(20))
    first = build(name, 0)
    fresh = keys(first[2].state_dict())
    go_on(*first, range(at))
    assert keys(first[2].state_dict()) == fresh, "the same names, and tensors of the same shapes, from the beginning on"
    assert isinstance(first[2], Stateful)
    save(tmp_path / "saved", *first)
    second = build(name, 1)
    load(tmp_path / "saved", *second)
    go_on(*second, range(at, 20))
    assert equal(bits(second[0]), bits(through[0]))
    theirs = {k: v for k, v in through[2].metrics().items() if not k.endswith("_seconds")}
    assert {k: v for k, v in second[2].metrics().items() if not k.endswith("_seconds")} == theirs


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [*METHODS, *AGENTS])
def test_asking_for_the_state_of_an_optimizer_is_no_step(name):
    """PyTorch makes one, at a rate of 0, where there is no state yet: with plain SGD at each save."""
    model = make(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kind, options = METHODS.get(name, (sk.SET, {}))
    method = kind(model, optimizer, update_every=2, stop=8, **options)
    whole = sk.AGENT(model, optimizer, method=method, estimate="gradients", every=3) if name in AGENTS else method
    for step in range(4):
        before = bits(model)
        get_state_dict(model, optimizer)
        assert method.steps == step and equal(bits(model), before)
        assert name not in AGENTS or whole.since == step % 3
        go_on(model, optimizer, whole, [step + 10])


def test_a_step_at_a_rate_of_zero_counts_where_there_is_a_gradient():
    """The first step of a warm-up."""
    model = make(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = sk.SET(model, optimizer)
    go_on(model, optimizer, method, range(2))
    assert method.steps == 2
