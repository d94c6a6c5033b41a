"""Armed probes: what they hear lives and dies with the gradient of the layer's values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import sparsekern as sk
from sparsekern.ops import Probe
from sparsekern.training.growth.probe_set import ProbeSet

LAYER = sk.SparseLinear(8, 8, block_size=4, sparsity=0.5, seed=0)
KINDS: dict[str, Callable[[], Probe]] = {
    "norms": lambda: Probe.counted_norms(LAYER.grid),
    "magnitudes": lambda: Probe.magnitudes(LAYER.grid),
}


@pytest.fixture(params=KINDS)
def armed(request):
    LAYER.zero_grad()
    probes = ProbeSet({"fc": LAYER})
    probes.arm("fc", KINDS[request.param]())
    yield probes
    probes.disarm()
    assert LAYER.probe is None and probes.answers() == {}
    assert not LAYER.values._backward_hooks and not LAYER.values._post_accumulate_grad_hooks


def backward(*seeds: int) -> None:
    for seed in seeds:
        LAYER(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def taken(armed: ProbeSet) -> torch.Tensor:
    """Return the answer as the optimizer's step leaves it."""
    assert armed.keep() == []
    return armed.answers()["fc"].clone()


def answer_to(armed: ProbeSet, *seeds: int) -> torch.Tensor:
    """Return the sum of the answers to some backwards, one by one."""
    total = torch.zeros(armed.probes["fc"].tensor.shape)
    for seed in seeds:
        LAYER.zero_grad()
        backward(seed)
        total += taken(armed)
    LAYER.zero_grad()
    return total


def clip() -> None:
    clip_grad_norm_(LAYER.parameters(), 1e-3)


def replace() -> None:
    LAYER.values.grad = LAYER.values.grad * 0.5


def an_extra_pass() -> None:
    probe, kept = LAYER.probe, LAYER.values.grad
    LAYER.probe = LAYER.values.grad = None
    backward(7)
    LAYER.probe, LAYER.values.grad = probe, kept


def ask_for_a_gradient() -> None:
    torch.autograd.grad(LAYER(torch.ones(1, 8)).sum(), [LAYER.values])


@pytest.mark.parametrize("between", [lambda: None, clip, replace, an_extra_pass, ask_for_a_gradient])
def test_answers_add_up_as_gradients_do(armed, between):
    expected = answer_to(armed, 0, 1, 2)
    backward(0)
    between()
    backward(1)
    between()
    backward(2)
    between()
    assert torch.equal(taken(armed), expected)
    if expected.numel() == 5:
        assert expected[-1] == 3, "parts are counted"


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("dropped", [1, 2])
def test_answers_are_dropped_with_gradients(armed, to_none, dropped):
    expected = answer_to(armed, 3, 4)
    backward(*range(dropped))
    LAYER.zero_grad(set_to_none=to_none)
    backward(3, 4)
    assert torch.equal(taken(armed), expected)
    backward(5)
    LAYER.zero_grad(set_to_none=to_none)
    assert not taken(armed).any(), "a step without gradients"


def test_a_gradient_of_zeros_is_not_one_that_was_dropped(armed):
    """All stored blocks in columns that saw nothing: clipping writes into the gradient all the same."""
    answers = []
    for backwards in (1, 2):
        LAYER.zero_grad()
        for _ in range(backwards):
            LAYER(torch.zeros(2, 8)).sum().backward()
            clip()
        assert LAYER.values.grad is not None and not LAYER.values.grad.any()
        answers.append(taken(armed))
    assert answers[0].any() and torch.equal(answers[1], 2 * answers[0])


def test_what_comes_after_the_step_belongs_to_the_next(armed):
    first, second = answer_to(armed, 0), answer_to(armed, 1)
    backward(0)
    assert torch.equal(taken(armed), first)
    LAYER.zero_grad()
    backward(1)
    assert torch.equal(armed.answers()["fc"], first), "not yet"
    assert torch.equal(taken(armed), second)


def test_an_optimizer_that_drops_gradients_in_its_step(armed):
    expected = answer_to(armed, 0)
    backward(0)
    armed.settle()
    LAYER.zero_grad()
    assert torch.equal(taken(armed), expected)


def test_gradients_that_no_probe_heard_of_are_told(armed):
    backward(0)
    armed.probes["fc"].tensor.grad = None
    assert armed.keep() == ["fc"] and not armed.answers()["fc"].any()
    LAYER.values.grad = torch.zeros_like(LAYER.values)
    assert armed.keep() == [], "zeros are no gradient"


def test_what_was_heard_can_be_taken_up_again(armed):
    first, second = answer_to(armed, 0), answer_to(armed, 1, 2)
    backward(0)
    armed.keep()
    LAYER.zero_grad()
    backward(1)
    saved, gradient, probe = armed.state_dict(), LAYER.values.grad.clone(), armed.probes["fc"]
    armed.disarm()
    armed.arm("fc", probe._replace(tensor=probe.tensor.detach().requires_grad_()))
    armed.load_state_dict(saved)
    assert torch.equal(armed.answers()["fc"], first)
    LAYER.values.grad = gradient
    backward(2)
    assert torch.equal(taken(armed), second)
