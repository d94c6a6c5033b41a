"""The block-sparse convolution: ops closed under differentiation as those of :mod:`sparsekern.ops.linear` are.

Inside them everything is channels last. An input or a gradient in other strides is converted once, here, where autograd
sees it; a pointwise convolution is the linear op on a view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.contract import PADDING, ConvShape, Index
from sparsekern.ops import checks, conv2d_answers
from sparsekern.ops.backends import backend_for, requested_backend, resolve
from sparsekern.ops.library import below_autograd, define, wants_grad
from sparsekern.ops.linear import linear
from sparsekern.ops.probes import Probe
from sparsekern.ops.shapes import channels_last, pack_shape, unpack_shape
from sparsekern.topology import Grid

Tensors = tuple[Tensor, ...]


def conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    grid: Grid,
    shape: ConvShape,
    probe: Probe | None = None,
) -> Tensor:
    """Convolve with a block-sparse weight, as :func:`torch.nn.functional.conv2d` does with a dense one.

    Args:
        x: ``(N, Cin, H, W)`` or ``(Cin, H, W)``, on the device and of the dtype of ``values`` (autocast casts it). Any
            strides; channels last is native, anything else is copied into that.
        values: ``(Z, bo, bi)``, the stored blocks.
        bias: ``(Cout,)`` or None.
        index: where the blocks are; :func:`sparsekern.topology.build_index`.
        grid: the sizes of the weight; :func:`sparsekern.topology.conv_grid`.
        shape: stride, padding, dilation and the rest.
        probe: what to ask of the gradient of the whole weight; the answer is ``probe.tensor.grad``.

    Returns:
        ``(N, Cout, Ho, Wo)`` or ``(Cout, Ho, Wo)`` of the dtype of x, channels last.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: the backend that was asked for cannot run this.
    """
    checks.check_conv2d(x, values, bias, index, grid, shape)
    if probe is not None and torch._C._get_tracing_state() is not None:
        probe = None  # the graph is to be of fixed tensors, none of which may require grad
    if probe is not None:
        checks.check_probe(probe, x, grid)
    images = channels_last(x if x.dim() == 4 else x.unsqueeze(0))
    if shape.is_pointwise:
        y = linear(images.permute(0, 2, 3, 1), values, bias, index, grid, probe).permute(0, 3, 1, 2)
    else:
        y = _conv2d(
            images,
            values,
            bias,
            list(index),
            pack_shape(shape),
            None if probe is None else probe.tensor,
            "" if probe is None else probe.kind,
            [] if probe is None else list(probe.args),
            requested_backend(),
            0 if probe is None else probe.tokens,
        )
    return y if x.dim() == 4 else y.squeeze(0)


def _block(values: Tensor) -> tuple[int, int]:
    return values.shape[1], values.shape[2]


def _run_conv2d(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    shape: list[int],
    probe: Tensor | None,
    kind: str,
    probe_args: list[Tensor],
    backend: str,
    probe_tokens: int = 0,
) -> Tensor:
    chosen = backend_for(backend, "conv2d", x, _block(values))
    legal = checks.legal_index(index, values.shape, values)
    return chosen.conv2d_fwd(channels_last(x), values, bias, legal, unpack_shape(shape))


def _run_dx(
    dy: Tensor, values: Tensor, index: list[Tensor], shape: list[int], size: list[int], backend: str, *probe: Any
) -> Tensor:
    chosen = backend_for(backend, "conv2d", dy, _block(values))
    legal = checks.legal_index(index, values.shape, dy, values)
    return chosen.conv2d_dx(channels_last(dy), values, legal, unpack_shape(shape), (size[0], size[1]))


def _run_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, shape: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    chosen = backend_for(backend, "conv2d", x, (bo, bi))
    legal = checks.legal_index(index, (index[2].shape[0] - PADDING, bo, bi), dy, x)
    dy, x = channels_last(dy), channels_last(x)
    return chosen.conv2d_dvalues(dy, x, legal, (bo, bi), unpack_shape(shape), dtype)


def _run_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], shape: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    chosen = backend_for(backend, "conv2d", x, _block(values))
    legal = checks.legal_index(index, values.shape, dy, x, values)
    return chosen.conv2d_backward(channels_last(dy), channels_last(x), values, legal, unpack_shape(shape))


def _new_images(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    return like.new_empty(like.shape[0], height, width, channels).permute(0, 3, 1, 2)


def _fake_conv2d(x: Tensor, values: Tensor, bias: Any, index: Any, shape: list[int], *rest: Any) -> Tensor:
    sizes = unpack_shape(shape)
    return _new_images(x, sizes.out_channels, *sizes.output_size(x.shape[2], x.shape[3]))


def _fake_dx(
    dy: Tensor, values: Tensor, index: Any, shape: list[int], size: list[int], backend: str, *probe: Any
) -> Tensor:
    return _new_images(dy, unpack_shape(shape).in_channels, size[0], size[1])


def _fake_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, shape: Any, dtype: torch.dtype, backend: str
) -> Tensor:
    return x.new_empty(index[2].shape[0] - PADDING, bo, bi, dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: Any, shape: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    return _new_images(x, x.shape[1], x.shape[2], x.shape[3]), values.new_empty(values.shape)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        probe: Tensor | None,
        index: Tensors,
        shape: list[int],
        kind: str,
        probe_args: Tensors,
        backend: str,
        probe_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, probe, *index, *probe_args)
        ctx.backend, ctx.kind, ctx.shape, ctx.probe_tokens = backend, kind, shape, probe_tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        return below_autograd(
            _conv2d, x, values, bias, list(index), shape, probe, kind, list(probe_args), backend, probe_tokens
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        bo, bi = _block(values)
        dy = channels_last(dy)  # once for all that read it
        need_x, need_values, need_bias, need_probe = ctx.needs_input_grad[:4]
        dx = dvalues = dbias = dprobe = None
        if need_probe and torch.is_grad_enabled():  # as in the linear op
            asked = probe, ctx.kind, probe_args, ctx.probe_tokens
            dx = _conv2d_dx(dy, values, index, ctx.shape, list(x.shape[2:]), ctx.backend, *asked) if need_x else None
            need_x = False
        if need_x and need_values:
            dx, dvalues = _conv2d_backward(dy, x, values, index, ctx.shape, ctx.backend)
        elif need_x:
            dx = _conv2d_dx(dy, values, index, ctx.shape, list(x.shape[2:]), ctx.backend)
        elif need_values:
            dvalues = _conv2d_dvalues(dy, x, index, bo, bi, ctx.shape, values.dtype, ctx.backend)
        if need_bias:
            dbias = dy.sum((0, 2, 3), dtype=ctx.bias_dtype)
        if need_probe:
            dprobe = conv2d_answers.answer(
                ctx.kind, dy, x, probe_args, (bo, bi), ctx.shape, probe.dtype, ctx.backend, ctx.probe_tokens
            )
        return dx, dvalues, dbias, dprobe, None, None, None, None, None, None


class _Conv2dDx(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        values: Tensor,
        probe: Tensor | None,
        index: Tensors,
        shape: list[int],
        size: list[int],
        backend: str,
        kind: str,
        probe_args: Tensors,
        probe_tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(dy, values, probe, *index, *probe_args)
        ctx.backend, ctx.kind, ctx.shape, ctx.probe_tokens = backend, kind, shape, probe_tokens
        return below_autograd(_conv2d_dx, dy, values, list(index), shape, size, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        bo, bi = _block(values)
        g = channels_last(g)
        need_dy, need_values, need_probe = ctx.needs_input_grad[:3]
        ddy = dvalues = dprobe = None
        if need_dy:
            asked = probe, ctx.kind, probe_args, ctx.backend, ctx.probe_tokens
            ddy = _conv2d(g, values, None, index, ctx.shape, *asked)
        if need_values:
            dvalues = _conv2d_dvalues(dy, g, index, bo, bi, ctx.shape, values.dtype, ctx.backend)
        if need_probe:
            dprobe = conv2d_answers.answer(
                ctx.kind, dy, g, probe_args, (bo, bi), ctx.shape, probe.dtype, ctx.backend, ctx.probe_tokens
            )
        return ddy, dvalues, dprobe, None, None, None, None, None, None, None


class _Conv2dDvalues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        index: Tensors,
        bo: int,
        bi: int,
        shape: list[int],
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(dy, x, *index)
        ctx.backend, ctx.shape = backend, shape
        return below_autograd(_conv2d_dvalues, dy, x, list(index), bo, bi, shape, dtype, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, x, *index = ctx.saved_tensors
        ddy = dx = None
        if ctx.needs_input_grad[0]:
            ddy = _conv2d(x, g, None, index, ctx.shape, None, "", [], ctx.backend)
        if ctx.needs_input_grad[1]:
            dx = _conv2d_dx(dy, g, index, ctx.shape, list(x.shape[2:]), ctx.backend)
        return ddy, dx, None, None, None, None, None, None


# As for the linear op, the backend is settled at the forward.


def _conv2d_autograd(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: list[Tensor],
    shape: list[int],
    probe: Tensor | None,
    kind: str,
    probe_args: list[Tensor],
    backend: str,
    probe_tokens: int = 0,
) -> Tensor:
    probe_args = probe_args or []  # AOTInductor hands None for an empty list
    backend = resolve(backend, "conv2d", x, _block(values))
    if wants_grad(x, values, bias, probe):
        y: Tensor = _Conv2d.apply(
            x, values, bias, probe, tuple(index), shape, kind, tuple(probe_args), backend, probe_tokens
        )
        return y
    return below_autograd(_conv2d, x, values, bias, index, shape, probe, kind, probe_args, backend, probe_tokens)


def _dx_autograd(
    dy: Tensor,
    values: Tensor,
    index: list[Tensor],
    shape: list[int],
    size: list[int],
    backend: str,
    probe: Tensor | None = None,
    kind: str = "",
    probe_args: list[Tensor] | None = None,
    probe_tokens: int = 0,
) -> Tensor:
    backend = resolve(backend, "conv2d", dy, _block(values))
    if wants_grad(dy, values, probe):
        dx: Tensor = _Conv2dDx.apply(
            dy, values, probe, tuple(index), shape, size, backend, kind, tuple(probe_args or ()), probe_tokens
        )
        return dx
    return below_autograd(_conv2d_dx, dy, values, index, shape, size, backend)


def _dvalues_autograd(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, shape: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    backend = resolve(backend, "conv2d", x, (bo, bi))
    if wants_grad(dy, x):
        dvalues: Tensor = _Conv2dDvalues.apply(dy, x, tuple(index), bo, bi, shape, dtype, backend)
        return dvalues
    return below_autograd(_conv2d_dvalues, dy, x, index, bo, bi, shape, dtype, backend)


def _backward_autograd(
    dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], shape: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    if wants_grad(dy, x, values):  # of a higher order: the two ops know their derivatives
        dx = _conv2d_dx(dy, values, index, shape, list(x.shape[2:]), backend)
        return dx, _conv2d_dvalues(dy, x, index, *_block(values), shape, values.dtype, backend)
    return below_autograd(_conv2d_backward, dy, x, values, index, shape, resolve(backend, "conv2d", x, _block(values)))


_conv2d: Callable[..., Tensor] = define(
    "conv2d",
    "(Tensor x, Tensor values, Tensor? bias, Tensor[] index, int[] shape, "
    "Tensor? probe, str probe_kind, Tensor[] probe_args, str backend, SymInt probe_tokens=0) -> Tensor",
    fake=_fake_conv2d,
    run=_run_conv2d,
    autograd=_conv2d_autograd,
    casts=(0,),
)
_conv2d_dx: Callable[..., Tensor] = define(
    "conv2d_dx",
    "(Tensor dy, Tensor values, Tensor[] index, int[] shape, SymInt[] size, str backend, "
    "Tensor? probe=None, str probe_kind='', Tensor[]? probe_args=None, SymInt probe_tokens=0) -> Tensor",
    fake=_fake_dx,
    run=_run_dx,
    autograd=_dx_autograd,
)
_conv2d_dvalues: Callable[..., Tensor] = define(
    "conv2d_dvalues",
    "(Tensor dy, Tensor x, Tensor[] index, SymInt bo, SymInt bi, int[] shape, ScalarType dtype, str backend) -> Tensor",
    fake=_fake_dvalues,
    run=_run_dvalues,
    autograd=_dvalues_autograd,
)
_conv2d_backward: Callable[..., tuple[Tensor, Tensor]] = define(
    "conv2d_backward",
    "(Tensor dy, Tensor x, Tensor values, Tensor[] index, int[] shape, str backend) -> (Tensor, Tensor)",
    fake=_fake_backward,
    run=_run_backward,
    autograd=_backward_autograd,
)
