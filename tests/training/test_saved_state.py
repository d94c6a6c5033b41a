import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training.attachment import check_like

OWN = {"count": 3, "rate": 0.5, "on": True, "name": "x", "none": None, "start": {"a": torch.arange(3)}, "odd": ({}, 1)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"count": 0, "rate": 2, "on": False, "name": "y"},
        {"start": {"a": torch.arange(7)}},
        {"odd": ({"anything": 1}, 2)},
    ],
)
def test_what_a_state_may_hold(changes):
    check_like(OWN | changes, OWN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, r"state\['count'\] is -1; it must be finite, and 0 or more if it counts something"),
        ({"count": 2**62}, r"state\['count'\] is 4611686018427387904; it must be finite"),
        ({"count": True}, r"state\['count'\] is True; it must be a whole number"),
        ({"count": 1.5}, r"state\['count'\] is 1.5; it must be a whole number"),
        ({"count": None}, r"state\['count'\] is None; it must be a whole number"),
        ({"rate": float("nan")}, r"state\['rate'\] is nan; it must be finite"),
        ({"rate": "fast"}, r"state\['rate'\] is 'fast'; it must be a number"),
        ({"on": 1}, r"state\['on'\] is 1; it must be a bool"),
        ({"name": 3}, r"state\['name'\] is 3; it must be a str"),
        ({"none": "x"}, r"state\['none'\] is 'x'; it must be None"),
        ({"more": 1}, "state must be a dictionary of count, rate, on, name, none, start, odd"),
        ({"start": {}}, r"state\['start'\] must be a dictionary of a;"),
        ({"start": {"a": [1]}}, r"state\['start'\]\['a'\] must be a tensor of torch.int64"),
        ({"start": {"a": torch.zeros(3)}}, r"\['a'\] must be a tensor of torch.int64"),
        ({"start": {"a": torch.arange(3).to_sparse()}}, r"\['a'\] must be a tensor of torch.int64"),
        ({"start": {"a": torch.empty(3, dtype=torch.int64, device="meta")}}, r"\['a'\] must be a tensor"),
        ({"start": {"a": torch.ones(3, 1, dtype=torch.int64)}}, r"has shape \(3, 1\); it must have \(3,\)"),
        ({"odd": [{}, 1]}, r"state\['odd'\] must be a tuple of 2"),
        ({"odd": ({},)}, r"state\['odd'\] must be a tuple of 2"),
    ],
)
def test_what_it_may_not(changes, message):
    with pytest.raises(ValueError, match=message):
        check_like(OWN | changes, OWN)


ENTRIES = {"stage": [None, 0, 1], "averaged": [None, 0, 3], "before": [None, (), (torch.zeros(2), torch.zeros(2))]}


@pytest.mark.parametrize("name", ENTRIES)
def test_what_comes_and_goes_may_be_there_in_either_state(name):
    for own in ENTRIES[name]:
        for saved in ENTRIES[name]:
            check_like({name: saved}, {name: own})
        for saved in ("x", -1, 1.5, True, [], 2**62) + ((1,) if name == "before" else ((),)):
            with pytest.raises(ValueError, match=rf"state\['{name}'\] is .*; it must be a .*, or None"):
                check_like({name: saved}, {name: own})


@pytest.mark.parametrize("name", ["RigL", "GSE", "AGENT"])
def test_states_load_into_a_method_that_is_in_another_part_of_a_step(name):
    """Whether probes are armed, and whether there is a step before, may differ between who saves and who loads."""

    def built():
        model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), 0.5, 8, seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = getattr(sk, "GSE" if name == "AGENT" else name)(model, optimizer, update_every=3, offset=1)
        if name == "AGENT":
            method = sk.AGENT(model, optimizer, method=method, every=2, estimate="gradients", gamma=0.5)
        return model, optimizer, method

    torch.manual_seed(0)
    model, optimizer, method = built()
    states = [copy.deepcopy(method.state_dict())]
    for _ in range(5):
        method.backward(lambda: model(torch.randn(4, 32)).square().sum())
        optimizer.step()
        optimizer.zero_grad()
        method.step()
        states.append(copy.deepcopy(method.state_dict()))
    for state in states:
        for other in states:
            fresh = built()[2]
            fresh.load_state_dict(other)
            fresh.load_state_dict(state)
            assert in_use(fresh.state_dict()) == in_use(state)


def in_use(state):
    """Return a state as text, without where it last was what it now is not: armed, or in possession of a snapshot."""
    method = state if "stage" in state else state["method"]
    method = {k: v for k, v in method.items() if k != "armed_at" or method["stage"] is not None}
    return plain({k: v for k, v in state.items() if k != "snapshot" or v["taken"]} | {"method": method, "armed_at": 0})


def test_only_the_first_topology_may_be_of_another_length():
    with pytest.raises(ValueError, match=r"state\['seen'\] has shape \(4,\); it must have \(3,\)"):
        check_like({"seen": torch.zeros(4)}, {"seen": torch.zeros(3)})


def trained(name):
    """Return a method in the middle of a step that hears probes, where it has any."""
    torch.manual_seed(0)
    model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)), 0.5, 8, seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"VRPGE": {"sparsity": 0.75}, "Gradual": {"stop": 40}, "GraNet": {"stop": 40}}.get(name, {})
    host = getattr(sk, "SET" if name == "AGENT" else name)(model, optimizer, update_every=3, **options)
    method = sk.AGENT(model, optimizer, method=host, every=1, estimate="gradients") if name == "AGENT" else host
    for step in range(3):
        method.backward(lambda: model(torch.randn(4, 32)).square().sum())
        if step < 2:
            optimizer.step()
            optimizer.zero_grad()
            method.step()
    return method


def plain(state):
    """Return a state as text that tells everything in it."""
    if isinstance(state, dict):
        return {str(key): plain(value) for key, value in state.items()}
    if isinstance(state, tuple):
        return [plain(value) for value in state]
    return state.tolist() if isinstance(state, torch.Tensor) else state


@pytest.mark.parametrize(
    "name", ["Static", "SET", "RigL", "GSE", "VRPGE", "Gradual", "GraNet", "MEST", "SRigL", "DSR", "TopKAST", "AGENT"]
)
def test_a_state_that_is_refused_changes_nothing(name):
    method = trained(name)
    state = copy.deepcopy(method.state_dict())
    before = plain(state)
    for key, value in state.items():
        for wrong in ("x", -1.5, [value], {"y": 0}, (1, 2, 3, 4), torch.zeros(2, 2)):
            if type(wrong) is type(value):  # another text or number may be right
                continue
            with pytest.raises(ValueError, match="state"):
                method.load_state_dict(state | {key: wrong})
            assert plain(method.state_dict()) == before
    method.load_state_dict(state)
    assert plain(method.state_dict()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys, answers: ({n: k.flip(0) for n, k in keys.items()}, answers), "are no places of its grid"),
        (lambda keys, answers: ({n: k + 10**6 for n, k in keys.items()}, answers), "are no places of its grid"),
        (lambda keys, answers: ({n: k.float() for n, k in keys.items()}, answers), "are no places of its grid"),
        (lambda keys, answers: ({"9": keys["0"]}, answers), "are no places of its grid"),
        (lambda keys, answers: (keys, {"heard": {}}), "have no 'kept'"),
        (lambda keys, answers: (keys, answers | {"heard": {"0": 5}}), "answer of '0' to a probe must be a tensor"),
        (
            lambda keys, answers: (keys, answers | {"heard": {"0": torch.zeros(1, 1, 1)}}),
            r"answer of a probe has shape \(1, 1, 1\)",
        ),
        (lambda keys, answers: ({}, answers), "no candidates of '0'"),
    ],
)
def test_candidates_and_answers_that_are_none(change, message):
    method = trained("GSE")
    state = method.state_dict()
    assert state["stage"] is not None
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(state | {"probes": change(*state["probes"])})


def test_a_stage_that_no_method_has():
    method = trained("RigL")
    with pytest.raises(ValueError, match=r"state\['stage'\] is 7; a method has two stages at most"):
        method.load_state_dict(method.state_dict() | {"stage": 7})


@pytest.mark.parametrize("before", [(torch.zeros(3),), (torch.zeros(3), torch.zeros(3)), (1, 2)])
def test_samples_of_the_variance_of_another_number(before):
    method = trained("AGENT")
    state = method.state_dict()
    with pytest.raises(ValueError, match="the samples of the variance must be two tensors"):
        method.load_state_dict(state | {"variance": state["variance"] | {"before": before}})


class Counting(sk.SET):
    """A method of a user, with entries of its own of any kind."""

    best, last = -1, None

    def state_dict(self):
        return super().state_dict() | {"best": self.best, "last": self.last}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.best, self.last = state["best"], state["last"]


def test_the_entries_of_a_users_method_are_its_own():
    def build():
        model = sk.sparsify_(nn.Sequential(nn.Linear(32, 32)), 0.5, 8, seed=0)
        return Counting(model, torch.optim.SGD(model.parameters()))

    saved, built = build(), build()
    saved.best, saved.last = 0.25, {"any": "thing"}
    built.load_state_dict(saved.state_dict())
    assert (built.best, built.last) == (0.25, {"any": "thing"})
    with pytest.raises(ValueError, match=r"state\['steps'\] is 'x'; it must be a whole number"):
        built.load_state_dict(saved.state_dict() | {"steps": "x"})
