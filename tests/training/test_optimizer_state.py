"""The state of any optimizer is matched by its first axis; what cannot follow is refused."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.nn.surgery import param_group
from sparsekern.training.followers import mean_of_kept
from sparsekern.training.optimizer_state import slot_state


class Lion(torch.optim.Optimizer):
    """The shape of Lion's state: one momentum under its own name, and a Python counter."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("m", torch.zeros_like(p)).mul_(0.9).add_(p.grad, alpha=0.1)
                state["count"] = state.get("count", 0) + 1
                p.sub_(state["m"].sign(), alpha=group["lr"])


class Flat(Lion):
    """An optimizer that flattens, as many distributed ones do."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["flat"] = torch.zeros(p.numel())


class History(Lion):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [p.detach().clone()]


class Wrapper(Lion):
    """As ZeroRedundancyOptimizer: another optimizer does the work and has the state."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.optim = torch.optim.AdamW(params)


class Several(Lion):
    def __init__(self, params):
        params = list(params)
        super().__init__(params)
        self.optimizers = [torch.optim.AdamW(params)]


class Shampoo(Lion):
    """A preconditioner that happens to begin with an axis of Z."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p]["precond"] = torch.eye(p.shape[0])


def stepped(make) -> tuple[sk.SparseLinear, torch.optim.Optimizer]:
    layer = sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5, seed=0)
    optimizer = make(layer.parameters())
    for _ in range(2):
        layer(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
    return layer, optimizer


OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.1), set()),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "Adam": (torch.optim.Adam, {"exp_avg", "exp_avg_sq"}),
    "AdamW amsgrad": (lambda p: torch.optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "AdamW foreach": (lambda p: torch.optim.AdamW(p, foreach=True), {"exp_avg", "exp_avg_sq"}),
    "AdamW fused": (lambda p: torch.optim.AdamW(p, fused=True), {"exp_avg", "exp_avg_sq"}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, momentum=0.9), {"square_avg", "momentum_buffer"}),
    "Adagrad": (torch.optim.Adagrad, {"sum"}),
    "Adamax": (torch.optim.Adamax, {"exp_avg", "exp_inf"}),
    "NAdam": (torch.optim.NAdam, {"exp_avg", "exp_avg_sq"}),
    "RAdam": (torch.optim.RAdam, {"exp_avg", "exp_avg_sq"}),
    "Adadelta": (torch.optim.Adadelta, {"square_avg", "acc_delta"}),
    "ASGD": (torch.optim.ASGD, {"ax"}),
    "Rprop": (torch.optim.Rprop, {"prev", "step_size"}),
    "Adafactor": (torch.optim.Adafactor, {"row_var", "col_var"}),
    "Lion": (Lion, {"m"}),
}


@pytest.mark.parametrize(("make", "keys"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_slot_state_of_every_optimizer(make, keys):
    layer, optimizer = stepped(make)
    found = slot_state(optimizer, layer.values, "fc")
    assert {state.key for state in found} == keys
    for state in found:
        assert state.tensor is optimizer.state[layer.values][state.key]


def test_what_an_untouched_entry_holds():
    layer, adagrad = stepped(lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.5))
    assert [s.fresh for s in slot_state(adagrad, layer.values, "fc")] == [0.5]
    layer, rprop = stepped(lambda p: torch.optim.Rprop(p, lr=0.25))
    assert {s.key: s.fresh for s in slot_state(rprop, layer.values, "fc")} == {"prev": 0.0, "step_size": 0.25}


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (Flat, r"Flat keeps 'flat' for values of 'fc', of shape \(40,\), which has no axis of 5 slots"),
        (History, "History keeps 'history' for values of 'fc', a list"),
        (Shampoo, r"Shampoo keeps 'precond' for values of 'fc', of shape \(5, 5\)"),
        (Several, r"Several keeps its state in another optimizer \('optimizers'\)"),
        (Wrapper, r"Wrapper keeps its state in another optimizer \('optim'\)"),
        (torch.optim.LBFGS, "LBFGS keeps flat vectors over all parameters"),
    ],
)
def test_a_state_that_cannot_follow_is_refused(make, text):
    layer = sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5)
    optimizer = make(layer.parameters())
    layer(torch.ones(3, 8)).sum().backward()
    if not isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step()
    with pytest.raises(ValueError, match=text):
        slot_state(optimizer, layer.values, "fc")


def test_an_optimizer_without_the_layer_is_refused():
    layer = sk.SparseLinear(8, 12, block_size=(4, 2), blocks=5)
    optimizer = torch.optim.SGD([layer.bias])
    assert param_group(optimizer, layer.values) is None
    assert param_group(optimizer, layer.bias) is optimizer.param_groups[0]
    with pytest.raises(ValueError, match="values of 'fc' are not in this optimizer. Build it after sparsify_"):
        slot_state(optimizer, layer.values, "fc")


def test_a_half_precision_mean_does_not_overflow():
    state = torch.full((4096, 16, 16), 0.2, dtype=torch.float16)
    mean = mean_of_kept(state, torch.ones(4096, dtype=torch.bool), None)
    assert mean.dtype == torch.float16 and mean == state[0, 0, 0]


def test_mean_of_kept_by_hand():
    state = torch.tensor([[[1.0, 3]], [[5, 7]], [[100, 100]], [[9, 50]]])
    kept = torch.tensor([True, True, False, True])
    assert mean_of_kept(state, kept, None) == (1 + 3 + 5 + 7 + 9 + 50) / 6
    real = torch.ones(4, 1, 2, dtype=torch.bool)
    real[3, 0, 1] = False  # a phantom element
    assert mean_of_kept(state, kept, real) == (1 + 3 + 5 + 7 + 9) / 5
    assert mean_of_kept(state, torch.zeros(4, dtype=torch.bool), None) == 0
    assert mean_of_kept(state.sum(2, keepdim=True), kept, real) == (4 + 12 + 59) / 3, "a state of another shape"
