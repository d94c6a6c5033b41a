"""Attention of one tensor of queries, keys and values: against PyTorch's in float64, and what is left to PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels.cpu import attention as kernels
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from sparsekern import backend
from sparsekern.errors import InputError
from sparsekern.nn import qkv_attention

NAN, INFINITY = float("nan"), float("inf")


def drawn(batch: int, tokens: int, width: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def wanted(qkv: Tensor, heads: int, *, is_causal: bool = False) -> Tensor:
    """Compute it by PyTorch."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2).flatten(2)


def with_gradient(qkv: Tensor, heads: int, dy: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    y = qkv_attention(qkv, heads, is_causal=is_causal)
    return y, torch.autograd.grad(y, qkv, dy)[0]


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the native calls."""
    calls: list[int] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(kernels, name, counted(getattr(kernels, name), calls))
    return calls


def counted(f: Callable[..., object], calls: list[int]) -> Callable[..., object]:
    def call(*args: object) -> object:
        calls.append(1)
        return f(*args)

    return call


@pytest.mark.usefixtures("instructions", "poisoned_memory")
@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_outputs_and_gradients_are_those_of_float64(is_causal: bool, native: list[int]) -> None:
    shapes = [(2, 128, 3, 64), (1, 77, 2, 32), (3, 1, 1, 32), (1, 5, 2, 128), (2, 33, 1, 96), (1, 800, 1, 32)]
    for batch, tokens, heads, features in shapes:
        qkv, dy = drawn(batch, tokens, 3 * heads * features, scale=2), drawn(batch, tokens, heads * features, 1)
        exact = qkv.double().requires_grad_()
        y = wanted(exact, heads, is_causal=is_causal)
        (dx,) = torch.autograd.grad(y, exact, dy.double())
        for one, other in zip(with_gradient(qkv, heads, dy, is_causal), (y, dx), strict=True):
            torch.testing.assert_close(
                one.double(), other, rtol=0, atol=2e-5 * float(other.detach().abs().max()) + 1e-12
            )
    assert len(native) == 2 * len(shapes)


def errors(scale: float, tokens: int, is_causal: bool) -> Tensor:
    """Return root mean square errors of y and of the gradients of q, k and v: ours divided by PyTorch's in float32.

    The geometric mean over draws: in a few of them two keys nearly tie, and their errors would outweigh all others.
    """
    logarithms = []
    for seed in range(2 if tokens > 100 else 32):
        qkv, dy = drawn(2, tokens, 192, seed, scale), drawn(2, tokens, 64, 100 + seed)
        exact, theirs = (t.requires_grad_() for t in (qkv.double(), qkv.clone()))
        pairs = [
            (y := wanted(t, 1, is_causal=is_causal), *torch.autograd.grad(y, t, dy.to(t))) for t in (exact, theirs)
        ]
        parts = [(y.detach(), *dx.chunk(3, -1)) for y, dx in (*pairs, with_gradient(qkv, 1, dy, is_causal))]
        for found in (parts[2], parts[1]):
            squares = [((a - b).square().mean() / b.square().mean()) for a, b in zip(found, parts[0], strict=True)]
            logarithms.append((torch.stack(squares) + 1e-20).log() / 2)
    ours, theirs = torch.stack(logarithms).unflatten(0, (-1, 2)).mean(0)
    return (ours - theirs).exp()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize(("scale", "tokens"), [(0.3, 512), (3, 60), (30, 60), (100, 60)])
def test_errors_are_no_larger_than_those_of_pytorch(scale: float, tokens: int) -> None:
    """Where many small scores are summed, and where one key outweighs all and differences cancel."""
    for is_causal in (False, True):
        y, *gradients = errors(scale, tokens, is_causal).tolist()
        assert y < 1.5 and max(gradients) < 1.1, (y, gradients)


@pytest.mark.usefixtures("instructions")
def test_equal_scores_give_means() -> None:
    equal = torch.zeros(1, 40, 96)
    equal[..., 64:] = torch.arange(40.0)[:, None]
    means = qkv_attention(equal, 1, is_causal=True)
    torch.testing.assert_close(means[0, :, 0], torch.arange(40.0) / 2)


def with_threads(qkv: Tensor, heads: int, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the results of one, two and three threads."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_gradient(qkv, heads, dy, True))
    finally:
        torch.set_num_threads(before)
    return results


def test_results_do_not_depend_on_threads_nor_on_the_layout_of_the_gradient() -> None:
    one_head = with_threads(drawn(1, 800, 96), 1, drawn(1, 800, 32, 1))  # cut into parts
    assert all(map(torch.equal, one_head[0] * 2, one_head[1] + one_head[2]))
    qkv, dy = drawn(3, 70, 384), drawn(3, 70, 128, 1)
    results = with_threads(qkv, 2, dy)
    results.append(with_gradient(qkv, 2, dy.transpose(0, 1).contiguous().transpose(0, 1), True))
    results.append(with_gradient(qkv, 2, dy.neg()._neg_view(), True))
    results.append(with_gradient(qkv.transpose(0, 1).contiguous().transpose(0, 1), 2, dy, True))
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY], ids=str)
def test_nan_and_infinity_reach_what_reads_them_and_no_other_head(value: float) -> None:
    whole = drawn(2, 50, 3 * 64)
    for at, part in enumerate("qkv"):
        qkv = whole.clone()
        qkv[1, 20, at * 64 + 3] = value
        y, dx = with_gradient(qkv, 2, drawn(2, 50, 64, 1), True)
        assert y[0].isfinite().all() and y[1, :, 32:].isfinite().all() and dx[0].isfinite().all()
        # A later value that is not finite may count as 0 * value for earlier tokens, as it does in PyTorch's.
        first = 20 if part == "v" else 0
        assert torch.equal(y[1, first:].isfinite(), wanted(qkv, 2, is_causal=True)[1, first:].isfinite())
        assert dx.unflatten(2, (3, 2, 32))[:, :, :, 1].isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
def test_second_derivatives_and_batches_of_gradients(is_causal: bool, native: list[int]) -> None:
    qkv, dy = drawn(1, 9, 192).requires_grad_(), drawn(1, 9, 64, 1).requires_grad_()
    seen: list[Tensor] = []
    qkv.register_hook(seen.append)

    def second(qkv: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        y = qkv_attention(qkv, 2, is_causal=is_causal)
        (dx,) = torch.autograd.grad(y, qkv, dy, create_graph=True)
        return dx, *torch.autograd.grad(dx.square().sum(), (qkv, dy))

    found = second(qkv, dy)
    assert native == [1]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = second(*(t.detach().double().requires_grad_() for t in (qkv, dy)))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    y, several = qkv_attention(qkv, 2, is_causal=is_causal), torch.stack([dy.detach(), 2 * dy.detach()])
    (batch,) = torch.autograd.grad(y, qkv, several, is_grads_batched=True, retain_graph=True)
    for one, g in zip(batch, several, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(y, qkv, g, retain_graph=True)[0], rtol=1e-4, atol=1e-5)


def test_a_backward_is_transformed_and_counted(native: list[int]) -> None:
    """Its function was called outside, natively: a gradient is linear in dy, so its tangent is that of dy's tangent."""
    qkv, dy, tangent = drawn(1, 9, 192).requires_grad_(), drawn(1, 9, 64, 1), drawn(1, 9, 64, 2)
    y = qkv_attention(qkv, 2, is_causal=True)

    def gradient(dy: Tensor) -> Tensor:
        return torch.autograd.grad(y, qkv, dy, retain_graph=True, create_graph=torch.is_grad_enabled())[0]

    with torch.no_grad():
        one, other = gradient(dy), gradient(tangent)
        assert len(native) == 3
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(gradient(forward_ad.make_dual(dy, tangent)))
        assert dual.tangent is not None
        for found in (
            dual,
            torch.func.jvp(gradient, (dy,), (tangent,)),
            torch.func.vmap(gradient)(torch.stack([dy, tangent])),
        ):
            torch.testing.assert_close(tuple(found), (one, other), rtol=1e-4, atol=1e-5)
        with FlopCounterMode(display=False) as counter:
            gradient(dy)
        assert counter.get_total_flops() == 5 * 2 * 2 * 9 * 9 * 32
    slope = torch.func.grad(lambda scale: gradient(scale * dy).square().sum())(torch.ones(()))
    torch.testing.assert_close(slope, 2 * one.square().sum(), rtol=1e-4, atol=1e-5)
    assert len(native) == 3


class Heads(nn.Module):
    """Two heads."""

    def forward(self, qkv: Tensor) -> Tensor:
        return qkv_attention(qkv, 2, is_causal=True)


def test_everything_else_is_computed_by_pytorch(native: list[int]) -> None:
    qkv = drawn(2, 10, 192)
    y = wanted(qkv, 2, is_causal=True)
    heads = Heads()
    for other in (qkv.double(), qkv.bfloat16(), drawn(2, 10, 96), drawn(1, 2, 3 * 2 * 160), drawn(1, 0, 192)):
        assert torch.equal(heads(other), wanted(other, 2, is_causal=True))
    with backend("eager"):
        assert torch.equal(heads(qkv), y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads(qkv).dtype is torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        heads(qkv)
    assert counter.get_total_flops() == 2 * 2 * 2 * 2 * 10 * 10 * 32
    assert torch.equal(torch.compile(heads, fullgraph=True, backend="eager")(qkv), y)
    assert torch.equal(torch.fx.symbolic_trace(heads)(qkv), y)
    ones = torch.func.grad(lambda qkv: heads(qkv).sum())(qkv)
    torch.testing.assert_close(ones, torch.func.grad(lambda x: wanted(x, 2, is_causal=True).sum())(qkv))
    assert not native


def test_its_ops_pass_the_checks_of_pytorch() -> None:
    qkv, dy, ops = drawn(2, 10, 192).requires_grad_(), drawn(2, 10, 64, 1), torch.ops.sparsekern
    _, stats = ops.qkv_attention(qkv.detach(), 2, True)
    assert set(opcheck(ops.qkv_attention.default, (qkv, 2, True)).values()) == {"SUCCESS"}
    given = dy, qkv.detach(), stats, 2, True
    assert set(opcheck(ops.qkv_attention_backward.default, given).values()) == {"SUCCESS"}


def test_a_graph_of_it_is_one_of_pytorchs_ops(native: list[int]) -> None:
    qkv = drawn(1, 9, 192)
    for mode in ("real", "fake"):
        graph = make_fx(Heads(), tracing_mode=mode)(qkv)
        assert "sparsekern" not in graph.code and torch.equal(graph(qkv), wanted(qkv, 2, is_causal=True))
    assert not native


def test_a_tensor_of_another_shape_is_refused() -> None:
    for qkv, heads in ((drawn(1, 2, 64), 2), (drawn(1, 2, 96)[0], 1), (drawn(1, 2, 96), 0)):
        with pytest.raises(InputError, match=r"must be \(N, tokens, 3 \* heads \* features\)"):
            qkv_attention(qkv, heads)
