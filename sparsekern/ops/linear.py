"""The block-sparse linear op: ``y = x W' + bias``, where W is its stored blocks and an index.

Three ops, closed under differentiation, so that derivatives of any order exist:

    linear          y = x W'            dx = linear_dx(dy, W)       dW = linear_dvalues(dy, x)
    linear_dx       dx = dy W           ddy = linear(g, W)          dW = linear_dvalues(dy, g)
    linear_dvalues  dW = dy' x on W     ddy = linear(x, G)          dx = linear_dx(dy, G)

A fourth, ``linear_backward``, is the last two at once, for a backward that is not differentiated itself.

A probe is a part of W that is zero, so the ops that multiply by W take it: the gradient of a loss that contains dx
reaches W through ``linear_dx`` too, and what is stored of it and what a probe hears of it are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.contract import PADDING, Index
from sparsekern.ops import checks, linear_answers
from sparsekern.ops.backends import backend_for, requested_backend, resolve
from sparsekern.ops.library import below_autograd, define, wants_grad
from sparsekern.ops.probes import Probe
from sparsekern.topology import Grid

Tensors = tuple[Tensor, ...]


def linear(
    x: Tensor, values: Tensor, bias: Tensor | None, index: Index, grid: Grid, probe: Probe | None = None
) -> Tensor:
    """Multiply by a block-sparse weight, as :func:`torch.nn.functional.linear` does by a dense one.

    Args:
        x: ``(*, in_features)``, on the device and of the dtype of ``values`` (autocast casts it).
        values: ``(Z, bo, bi)``, the stored blocks.
        bias: ``(out_features,)`` or None.
        index: where the blocks are; :func:`sparsekern.topology.build_index`.
        grid: the sizes.
        probe: what to ask of the gradient of the whole weight; the answer is ``probe.tensor.grad``.

    Returns:
        ``(*, out_features)`` of the dtype of x.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: the backend that was asked for cannot run this.
    """
    checks.check_linear(x, values, bias, index, grid)
    if probe is not None and torch._C._get_tracing_state() is not None:
        probe = None  # the graph is to be of fixed tensors, none of which may require grad
    if probe is not None:
        checks.check_probe(probe, x, grid)
    flat = x if x.dim() == 2 else x.reshape(-1, grid.in_features)
    y = _linear(
        flat,
        values,
        bias,
        list(index),
        grid.out_features,
        None if probe is None else probe.tensor,
        "" if probe is None else probe.kind,
        [] if probe is None else list(probe.args),
        requested_backend(),
        0 if probe is None else probe.tokens,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], grid.out_features)


def _block(values: Tensor) -> tuple[int, int]:
    return values.shape[1], values.shape[2]


# The schema names of the index, once for all ops: row_ptr, row_col, row_slot, col_ptr, col_row, col_slot.


def _run_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    out_features: int,
    probe: Tensor | None,
    kind: str,
    probe_args: list[Tensor],
    backend: str,
    probe_tokens: int = 0,
) -> Tensor:
    chosen = backend_for(backend, "linear", x, _block(values))
    return chosen.fwd(x, values, bias, checks.legal_index(index, values.shape, values), out_features)


def _run_dx(dy: Tensor, values: Tensor, index: list[Tensor], in_features: int, backend: str, *probe: Any) -> Tensor:
    legal = checks.legal_index(index, values.shape, dy, values)
    return backend_for(backend, "linear", dy, _block(values)).dx(dy, values, legal, in_features)


def _run_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, dtype: torch.dtype, backend: str
) -> Tensor:
    chosen = backend_for(backend, "linear", x, (bo, bi))
    legal = checks.legal_index(index, (index[2].shape[0] - PADDING, bo, bi), dy, x)
    return chosen.dvalues(dy, x, legal, (bo, bi), dtype)


def _run_backward(dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], backend: str) -> tuple[Tensor, Tensor]:
    legal = checks.legal_index(index, values.shape, dy, x, values)
    return backend_for(backend, "linear", x, _block(values)).backward(dy, x, values, legal)


def _fake_linear(x: Tensor, values: Tensor, bias: Any, index: Any, out_features: int, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


def _fake_dx(dy: Tensor, values: Tensor, index: Any, in_features: int, backend: str, *probe: Any) -> Tensor:
    return dy.new_empty(dy.shape[0], in_features)


def _fake_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, dtype: torch.dtype, backend: str
) -> Tensor:
    return x.new_empty(index[2].shape[0] - PADDING, bo, bi, dtype=dtype)


def _fake_backward(dy: Tensor, x: Tensor, values: Tensor, index: Any, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), values.new_empty(values.shape)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        index: Tensors,
        out_features: int,
        kind: str,
        probe_args: Tensors,
        backend: str,
        probe_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, probe, *index, *probe_args)
        ctx.backend, ctx.kind, ctx.probe_tokens = backend, kind, probe_tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        return below_autograd(
            _linear, x, values, bias, list(index), out_features, probe, kind, list(probe_args), backend, probe_tokens
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        bo, bi = _block(values)
        need_x, need_values, need_bias, need_probe = ctx.needs_input_grad[:4]
        dx = dvalues = dprobe = None
        if need_probe and torch.is_grad_enabled():  # a derivative of dx reaches the probe as it does the values
            asked = probe, ctx.kind, probe_args, ctx.probe_tokens
            dx = _linear_dx(dy, values, index, x.shape[1], ctx.backend, *asked) if need_x else None
            need_x = False
        if need_x and need_values:
            dx, dvalues = _linear_backward(dy, x, values, index, ctx.backend)
        elif need_x:
            dx = _linear_dx(dy, values, index, x.shape[1], ctx.backend)
        elif need_values:
            dvalues = _linear_dvalues(dy, x, index, bo, bi, values.dtype, ctx.backend)
        dbias = dy.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        if need_probe:
            dprobe = linear_answers.answer(
                ctx.kind, dy, x, probe_args, (bo, bi), probe.dtype, ctx.backend, ctx.probe_tokens
            )
        return dx, dvalues, dbias, dprobe, None, None, None, None, None, None


class _LinearDx(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        values: Tensor,
        probe: Tensor | None,
        index: Tensors,
        in_features: int,
        backend: str,
        kind: str,
        probe_args: Tensors,
        probe_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(dy, values, probe, *index, *probe_args)
        ctx.backend, ctx.kind, ctx.probe_tokens = backend, kind, probe_tokens
        return below_autograd(_linear_dx, dy, values, list(index), in_features, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        bo, bi = _block(values)
        need_dy, need_values, need_probe = ctx.needs_input_grad[:3]
        ddy = dvalues = dprobe = None
        if need_dy:
            asked = probe, ctx.kind, probe_args, ctx.backend, ctx.probe_tokens
            ddy = _linear(g, values, None, index, dy.shape[1], *asked)
        if need_values:
            dvalues = _linear_dvalues(dy, g, index, bo, bi, values.dtype, ctx.backend)
        if need_probe:
            dprobe = linear_answers.answer(
                ctx.kind, dy, g, probe_args, (bo, bi), probe.dtype, ctx.backend, ctx.probe_tokens
            )
        return ddy, dvalues, dprobe, None, None, None, None, None, None


class _LinearDvalues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dy: Tensor, x: Tensor, index: Tensors, bo: int, bi: int, dtype: torch.dtype, backend: str
    ) -> Tensor:
        ctx.save_for_backward(dy, x, *index)
        ctx.backend = backend
        return below_autograd(_linear_dvalues, dy, x, list(index), bo, bi, dtype, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, x, *index = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = _linear(x, g, None, index, dy.shape[1], None, "", [], ctx.backend)
        if ctx.needs_input_grad[1]:
            dx = _linear_dx(dy, g, index, x.shape[1], ctx.backend)
        return ddy, dx, None, None, None, None, None


# The backend is settled here, at the forward: a backward runs on another thread, perhaps under another setting.


def _linear_autograd(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    out_features: int,
    probe: Tensor | None,
    kind: str,
    probe_args: list[Tensor],
    backend: str,
    probe_tokens: int = 0,
) -> Tensor:
    probe_args = probe_args or []  # AOTInductor hands None for an empty list
    backend = resolve(backend, "linear", x, _block(values))
    if wants_grad(x, values, bias, probe):
        y: Tensor = _Linear.apply(
            x, values, bias, probe, tuple(index), out_features, kind, tuple(probe_args), backend, probe_tokens
        )
        return y
    return below_autograd(_linear, x, values, bias, index, out_features, probe, kind, probe_args, backend, probe_tokens)


def _dx_autograd(
    dy: Tensor,
    values: Tensor,
    index: list[Tensor],
    in_features: int,
    backend: str,
    probe: Tensor | None = None,
    kind: str = "",
    probe_args: list[Tensor] | None = None,
    probe_tokens: int = 0,
) -> Tensor:
    backend = resolve(backend, "linear", dy, _block(values))
    if wants_grad(dy, values, probe):
        dx: Tensor = _LinearDx.apply(
            dy, values, probe, tuple(index), in_features, backend, kind, tuple(probe_args or ()), probe_tokens
        )
        return dx
    return below_autograd(_linear_dx, dy, values, index, in_features, backend)


def _dvalues_autograd(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, dtype: torch.dtype, backend: str
) -> Tensor:
    backend = resolve(backend, "linear", x, (bo, bi))
    if wants_grad(dy, x):
        dvalues: Tensor = _LinearDvalues.apply(dy, x, tuple(index), bo, bi, dtype, backend)
        return dvalues
    return below_autograd(_linear_dvalues, dy, x, index, bo, bi, dtype, backend)


def _backward_autograd(
    dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], backend: str
) -> tuple[Tensor, Tensor]:
    if wants_grad(dy, x, values):  # of a higher order: the two ops know their derivatives
        dx = _linear_dx(dy, values, index, x.shape[1], backend)
        return dx, _linear_dvalues(dy, x, index, *_block(values), values.dtype, backend)
    return below_autograd(_linear_backward, dy, x, values, index, resolve(backend, "linear", x, _block(values)))


_linear: Callable[..., Tensor] = define(
    "linear",
    "(Tensor x, Tensor values, Tensor? bias, Tensor[] index, SymInt out_features, "
    "Tensor? probe, str probe_kind, Tensor[] probe_args, str backend, SymInt probe_tokens=0) -> Tensor",
    fake=_fake_linear,
    run=_run_linear,
    autograd=_linear_autograd,
    casts=(0,),
)
_linear_dx: Callable[..., Tensor] = define(
    "linear_dx",
    "(Tensor dy, Tensor values, Tensor[] index, SymInt in_features, str backend, "
    "Tensor? probe=None, str probe_kind='', Tensor[]? probe_args=None, SymInt probe_tokens=0) -> Tensor",
    fake=_fake_dx,
    run=_run_dx,
    autograd=_dx_autograd,
)
_linear_dvalues: Callable[..., Tensor] = define(
    "linear_dvalues",
    "(Tensor dy, Tensor x, Tensor[] index, SymInt bo, SymInt bi, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_dvalues,
    run=_run_dvalues,
    autograd=_dvalues_autograd,
)
_linear_backward: Callable[..., tuple[Tensor, Tensor]] = define(
    "linear_backward",
    "(Tensor dy, Tensor x, Tensor values, Tensor[] index, str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    run=_run_backward,
    autograd=_backward_autograd,
)
