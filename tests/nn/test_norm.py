"""Batch norm, residual and ReLU in one pass: against PyTorch's ops in float64, and what falls back on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import backend
from sparsekern.nn import norm as norm_module
from sparsekern.nn import norm_relu
from sparsekern.nn.norm import keep_norm_statistics
from sparsekern.ops import batch_norm_relu, fuses_batch_norm_relu

LARGE = (2, 64, 32, 32)
ODD = (5, 37, 19, 19)
"""Not a whole number of vectors of channels, nor of four pixels, nor of chunks of them."""


def images(shape: tuple[int, ...], seed: int, requires_grad: bool = False) -> Tensor:
    """Return images, channels last, whose channels have means far from zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) + 5 * torch.randn(1, shape[1], 1, 1, generator=generator)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_(requires_grad)


def norm_of(channels: int, **options: Any) -> nn.BatchNorm2d:
    """Return a norm with weights of either sign."""
    generator = torch.Generator().manual_seed(channels)
    norm = nn.BatchNorm2d(channels, **options)
    with torch.no_grad():
        norm.weight.normal_(generator=generator)
        norm.bias.normal_(generator=generator)
    return norm


def composed(norm: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    return F.relu(norm(x) if residual is None else norm(x) + residual)


def gradients(f: Callable[..., Tensor], norm: nn.Module, dy: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    """Return y and the gradients of the inputs, weight and bias."""
    wanted = [t for t in inputs if t is not None]
    y = f(norm, *inputs)
    return [y, *torch.autograd.grad(y, [*wanted, *norm.parameters()], dy)]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record each question whether a call is fused, and its answer."""
    answers: list[bool] = []

    def asked(*args: Any) -> bool:
        answers.append(fuses_batch_norm_relu(*args))
        return answers[-1]

    monkeypatch.setattr(norm_module, "fuses_batch_norm_relu", asked)
    return answers


@pytest.mark.usefixtures("instructions", "poisoned_memory")
@pytest.mark.parametrize("shape", [LARGE, ODD], ids=["whole", "odd"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_outputs_and_gradients_are_those_of_float64(
    shape: tuple[int, ...], with_residual: bool, fused: list[bool]
) -> None:
    norm = norm_of(shape[1])
    exact = copy.deepcopy(norm).double()
    x, residual = images(shape, 0, True), images(shape, 1, True) if with_residual else None
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual)]
    dy = images(shape, 2)
    with torch.no_grad():  # where ReLU bends, rounding decides
        near = exact(wide[0]) + (0 if wide[1] is None else wide[1])
        dy[near.abs() < 1e-3] = 0
    exact.reset_running_stats()
    found = gradients(norm_relu, norm, dy, x, residual)
    wanted = gradients(composed, exact, dy.double(), *wide)
    assert fused == [True]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(found, wanted, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * scale)
    for one, other in zip(norm.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    norm, x, residual, dy = norm_of(37), images(ODD, 0, True), images(ODD, 1, True), images(ODD, 2)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients(norm_relu, norm, dy, x, residual) + gradients(norm_relu, norm, dy, x, None))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
def test_running_statistics_follow_as_those_of_pytorch(momentum: float | None, fused: list[bool]) -> None:
    ours, theirs = norm_of(64, momentum=momentum), norm_of(64, momentum=momentum)
    for seed in range(3):
        norm_relu(ours, images(LARGE, seed))
        theirs(images(LARGE, seed))
    assert fused == [True] * 3
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    free = norm_of(64, track_running_stats=False)
    torch.testing.assert_close(norm_relu(free, images(LARGE, 0)), F.relu(free(images(LARGE, 0))), rtol=1e-4, atol=1e-4)


def test_gradients_arrive_in_any_layout() -> None:
    norm, x = norm_of(64), images(LARGE, 0, True)
    plain = images(LARGE, 1).contiguous()
    same = gradients(norm_relu, norm, plain.contiguous(memory_format=torch.channels_last), x, None)
    for dy in (plain, plain.neg()._neg_view()):
        assert all(torch.equal(a, b) for a, b in zip(gradients(norm_relu, norm, dy, x, None), same, strict=True))
    expanded = torch.ones(()).expand(LARGE)
    ones = gradients(norm_relu, norm, expanded.contiguous(memory_format=torch.channels_last), x, None)
    assert all(torch.equal(a, b) for a, b in zip(gradients(norm_relu, norm, expanded, x, None), ones, strict=True))


def test_nan_and_infinity_stay_in_their_channel() -> None:
    norm, x = norm_of(64), images(LARGE, 0)
    with torch.no_grad():
        x[0, 3, 0, 0], x[1, 8, 2, 2] = float("nan"), float("inf")
    y = norm_relu(norm, x)
    assert y.isnan().any((0, 2, 3)).nonzero().flatten().tolist() == [3, 8]


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_a_second_derivative_is_that_of_pytorch(with_residual: bool) -> None:
    norm = norm_of(64)
    x, residual = images(LARGE, 0, True), images(LARGE, 1, True) if with_residual else None
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]

    def second(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(norm, x, residual).square().mean(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    for one, other in zip(second(norm_relu), second(composed), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.detach().abs().max()))


@pytest.mark.parametrize("frozen", [(), ("x", "weight", "bias")], ids=["all", "residual alone"])
def test_a_second_derivative_calls_hooks_once_and_leaves_the_residual_alone(frozen: tuple[str, ...]) -> None:
    norm, x, residual = norm_of(64), images(LARGE, 0, "x" not in frozen), images(LARGE, 1, True)
    norm.requires_grad_("weight" not in frozen)
    twice = [t.register_hook(lambda g: 2 * g) for t in (x, norm.weight) if t.requires_grad]
    inputs = [t for t in (x, residual, norm.weight) if t.requires_grad]
    y = norm_relu(norm, x, residual)
    with torch.no_grad():
        residual.zero_()  # it is not read again
    plain = torch.autograd.grad(y, inputs, x.detach(), retain_graph=True)
    again = torch.autograd.grad(y, inputs, x.detach().requires_grad_(), create_graph=True)
    assert len(twice) == len(inputs) - 1 and all(t.requires_grad for t in again)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_a_backward_is_transformed(with_residual: bool, fused: list[bool]) -> None:
    """The norm was called outside, natively: a gradient is linear in dy, so its tangent is that of dy's tangent."""
    norm, x, residual = norm_of(64), images(LARGE, 0, True), images(LARGE, 1, True) if with_residual else None
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]
    y, dy, tangent = norm_relu(norm, x, residual), images(LARGE, 2), images(LARGE, 3)

    def gradient(dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, inputs, dy, retain_graph=True, create_graph=torch.is_grad_enabled())

    with torch.no_grad():
        plain = gradient(dy), gradient(tangent)
        with forward_ad.dual_level():
            duals = [forward_ad.unpack_dual(t) for t in gradient(forward_ad.make_dual(dy, tangent))]
        assert all(dual.tangent is not None for dual in duals)
        for found in (
            tuple(zip(*duals, strict=True)),
            torch.func.jvp(gradient, (dy,), (tangent,)),
            tuple(zip(*torch.func.vmap(gradient)(torch.stack([dy, tangent])), strict=True)),
        ):
            torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-3)
    slope = torch.func.grad(lambda scale: sum(t.square().sum() for t in gradient(scale * dy)))(torch.ones(()))
    torch.testing.assert_close(slope, 2 * sum(t.square().sum() for t in plain[0]), rtol=1e-3, atol=0)
    assert fused == [True]


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_gradients_may_come_in_batches(with_residual: bool, fused: list[bool]) -> None:
    norm, x, residual = norm_of(64), images(LARGE, 0, True), images(LARGE, 1, True) if with_residual else None
    inputs = [t for t in (x, residual, *norm.parameters()) if t is not None]
    y, dy = norm_relu(norm, x, residual), torch.stack([images(LARGE, 2), images(LARGE, 3)])
    found = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    for i in range(2):
        for one, other in zip(found, torch.autograd.grad(y, inputs, dy[i], retain_graph=True), strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    assert fused == [True]


def test_a_norm_of_other_channels_is_refused_by_pytorch(fused: list[bool]) -> None:
    for channels in (32, 128):
        with pytest.raises(RuntimeError, match=f"should contain 64 elements not {channels}"):
            norm_relu(norm_of(channels, track_running_stats=False), images(LARGE, 0))
    weight = torch.ones(64)
    assert not fuses_batch_norm_relu(images(LARGE, 0), weight.to("meta"), weight, None)
    assert not fuses_batch_norm_relu(images(LARGE, 0), weight, weight, images(LARGE, 1).to("meta"))
    assert not any(fused)


@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_a_norm_that_returns_its_input_leaves_it_as_it_is(with_residual: bool) -> None:
    x, residual = images(LARGE, 0), images(LARGE, 1) if with_residual else None
    before = x.clone()
    assert torch.equal(norm_relu(nn.Identity(), x, residual), composed(nn.Identity(), before, residual))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda norm, x: (norm.eval(), x),
        lambda norm, x: (norm.bfloat16(), x.bfloat16()),
        lambda norm, x: (norm, x.contiguous()),
        lambda norm, x: (norm, x[:, :, :8, :8].contiguous(memory_format=torch.channels_last)),
        lambda norm, x: (nn.InstanceNorm2d(64), x),
        lambda norm, x: (nn.BatchNorm2d(64, affine=False), x),
        lambda norm, x: (norm.register_forward_hook(lambda *_: None) and norm, x),
    ],
    ids=["evaluation", "bfloat16", "layout", "small", "other", "affine", "hook"],
)
def test_everything_else_is_computed_by_pytorch(
    change: Callable[..., Any], fused: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_module, "batch_norm_relu", None)
    norm, x = change(norm_of(64), images(LARGE, 0))
    residual = torch.randn_like(x)
    assert torch.equal(norm_relu(norm, x, residual), composed(norm, x, residual))
    assert not any(fused)


def test_a_hook_of_all_modules_is_called(fused: list[bool]) -> None:
    called: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(module))
    try:
        norm_relu(norm := norm_of(64), images(LARGE, 0))
    finally:
        hook.remove()
    assert called == [norm] and not any(fused)


def test_transformed_and_compiled_calls_are_computed_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_module, "batch_norm_relu", None)
    norm, x = norm_of(64, track_running_stats=False), images(LARGE, 0)
    wanted = composed(norm, x, x)
    with backend("eager"):
        assert torch.equal(norm_relu(norm, x, x), wanted)
    compiled = torch.compile(norm_relu, fullgraph=True, backend="eager")
    assert torch.equal(compiled(norm, x, x), wanted)
    found = torch.func.grad(lambda x: norm_relu(norm, x, x).sum())(x)
    assert torch.equal(found, torch.func.grad(lambda x: composed(norm, x, x).sum())(x))
    traced = torch.fx.symbolic_trace(Unit(norm))
    assert torch.equal(traced(x), wanted)


class Unit(nn.Module):
    """A norm, a residual and ReLU."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return norm_relu(self.norm, x, x)


def test_statistics_carry_no_gradient() -> None:
    x = images(LARGE, 0, True)
    _, mean, variance = batch_norm_relu(x, torch.ones(64), torch.zeros(64))
    assert not mean.requires_grad and not variance.requires_grad
    torch.testing.assert_close(mean, x.detach().mean((0, 2, 3)))
    torch.testing.assert_close(variance, x.detach().var((0, 2, 3), correction=0))


def test_statistics_are_kept_and_the_pass_sees_the_batch():
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None))
    x = torch.randn(16, 8) * 3 + 1
    twin = copy.deepcopy(model)
    with keep_norm_statistics(model):
        y = model(x)
    assert torch.equal(y, twin(x))
    fresh = nn.BatchNorm1d(8).state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model[0], name), fresh[name])
    assert not torch.equal(twin[0].running_mean, fresh["running_mean"])


def test_instance_norm_and_errors():
    norm = nn.InstanceNorm1d(4, track_running_stats=True)
    before = norm.running_mean.clone()
    try:
        with keep_norm_statistics(norm):
            norm(torch.randn(2, 4, 6) + 5)
            raise KeyError
    except KeyError:
        pass
    assert torch.equal(norm.running_mean, before)


def test_statistics_are_the_means_over_the_batches():
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[0].eval()
    batches = [torch.randn(10, 3) + k for k in range(4)]
    model(torch.full((5, 3), 100.0))  # what is to be forgotten
    assert sk.recalibrate_norms(model, [(b, "label") for b in batches]) == 1
    torch.testing.assert_close(model[1].running_mean, torch.stack([b.mean(0) for b in batches]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([b.var(0) for b in batches]).mean(0))
    assert model[1].momentum == 0.1 and model[1].training and not model[0].training


def test_no_batch_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model(torch.randn(8, 3))
    before = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="batches is empty; give some of the training set"):
        sk.recalibrate_norms(model, [])
    assert torch.equal(model[0].running_mean, before)


def test_a_model_without_norms():
    assert sk.recalibrate_norms(nn.Linear(2, 2), []) == 0
