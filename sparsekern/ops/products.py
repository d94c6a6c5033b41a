"""The block-sparse product ``y = x W' + bias``, where W is its stored blocks and an index, for both geometries.

Three ops, closed under differentiation, so that derivatives of any order exist:

    forward     y = x W'            dx = dx(dy, W)          dW = dvalues(dy, x)
    dx          dx = dy W           ddy = forward(g, W)     dW = dvalues(dy, g)
    dvalues     dW = dy' x on W     ddy = forward(x, G)     dx = dx(dy, G)

A fourth, ``backward``, computes the last two at once, for a backward that is not differentiated itself. They are
defined once and registered twice: as ``linear``, ``linear_dx`` and so on, and as ``conv2d``, ``conv2d_dx`` and so on.

A probe is a part of W that is zero, so the ops that multiply by W take it: the gradient of a loss that contains dx
reaches W through the op ``dx`` too, and what is stored of W and what a probe collects receive the same gradient.

Inside the ops of a convolution everything is channels last. An input or a gradient with other strides is converted
once, where autograd sees it; a pointwise convolution is the linear op on a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.kernels.contract import PADDING, ConvShape, Index, new_input, new_output
from sparsekern.ops import checks
from sparsekern.ops.backends import kernels_for, requested_backend
from sparsekern.ops.library import below_autograd, channels_last, define, derivative, pack, unpack, wants_grad
from sparsekern.ops.probes import Probe, probe_gradient
from sparsekern.topology import Grid


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
        probe: what to compute from the gradient of the whole weight; the result is ``probe.tensor.grad``.

    Returns:
        ``(*, out_features)`` of the dtype of x.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: the backend that was asked for cannot run this.
    """
    checks.check_linear(x, values, bias, index, grid, probe)
    flat = x if x.dim() == 2 else x.reshape(-1, grid.in_features)
    y = _forward(LINEAR, flat, values, bias, index, [grid.in_features, grid.out_features], probe)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], grid.out_features)


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
            strides; channels last is native, anything else is copied into it.
        values: ``(Z, bo, bi)``, the stored blocks.
        bias: ``(Cout,)`` or None.
        index: where the blocks are; :func:`sparsekern.topology.build_index`.
        grid: the sizes of the weight; :func:`sparsekern.topology.conv_grid`.
        shape: stride, padding, dilation and the rest.
        probe: what to compute from the gradient of the whole weight; the result is ``probe.tensor.grad``.

    Returns:
        ``(N, Cout, Ho, Wo)`` or ``(Cout, Ho, Wo)`` of the dtype of x, channels last.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that do not fit.
        NotImplementedError: the backend that was asked for cannot run this.
    """
    checks.check_conv2d(x, values, bias, index, grid, shape, probe)
    images = channels_last(x if x.dim() == 4 else x.unsqueeze(0))
    if shape.is_pointwise:
        y = linear(images.permute(0, 2, 3, 1), values, bias, index, grid, probe).permute(0, 3, 1, 2)
    else:
        y = _forward(CONV2D, images, values, bias, index, pack(shape), probe)
    return y if x.dim() == 4 else y.squeeze(0)


def _forward(
    products: Products,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    index: Index,
    sizes: list[int],
    probe: Probe | None,
) -> Tensor:
    asked: tuple[Any, ...] = ()
    if probe is not None and torch._C._get_tracing_state() is None:  # a traced graph takes no tensor that requires grad
        asked = probe.tensor, probe.kind, probe.args, probe.tokens
    y: Tensor = products.forward(x, values, bias, list(index), sizes, requested_backend(), *asked)
    return y


# The implementations. A backend is chosen here, once a call. The choice depends on the request, which goes with the
# op's arguments into the backward, and on device, dtype and block: so a backward runs on the backend of its forward,
# on whatever thread.


def _block(values: Tensor) -> tuple[int, int]:
    return values.shape[1], values.shape[2]


def _run_forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: list[Tensor], sizes: list[int], backend: str, *probe: Any
) -> Tensor:
    geometry = unpack(sizes)
    kernels = kernels_for(backend, geometry, x, _block(values))
    return kernels.fwd(channels_last(x), values, bias, checks.legal_index(index, values.shape, values, bias), geometry)


def _run_dx(
    dy: Tensor, values: Tensor, index: list[Tensor], sizes: list[int], size: list[int], backend: str, *probe: Any
) -> Tensor:
    geometry = unpack(sizes)
    kernels = kernels_for(backend, geometry, dy, _block(values))
    legal = checks.legal_index(index, values.shape, dy, values)
    return kernels.dx(channels_last(dy), values, legal, geometry, tuple(size))


def _run_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, sizes: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    geometry = unpack(sizes)
    kernels = kernels_for(backend, geometry, x, (bo, bi))
    legal = checks.legal_index(index, (index[2].shape[0] - PADDING, bo, bi), dy, x)
    return kernels.dvalues(channels_last(dy), channels_last(x), legal, (bo, bi), geometry, dtype)


def _run_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], sizes: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    geometry = unpack(sizes)
    kernels = kernels_for(backend, geometry, x, _block(values))
    legal = checks.legal_index(index, values.shape, dy, x, values)
    return kernels.backward(channels_last(dy), channels_last(x), values, legal, geometry)


# Their results without data.


def _fake_forward(x: Tensor, values: Tensor, bias: Any, index: Any, sizes: list[int], *_: Any) -> Tensor:
    return new_output(x, unpack(sizes))


def _fake_dx(dy: Tensor, values: Tensor, index: Any, sizes: list[int], size: list[int], *_: Any) -> Tensor:
    return new_input(dy, unpack(sizes), size)


def _fake_dvalues(
    dy: Tensor, x: Tensor, index: list[Tensor], bo: int, bi: int, sizes: Any, dtype: torch.dtype, backend: str
) -> Tensor:
    return x.new_empty(index[2].shape[0] - PADDING, bo, bi, dtype=dtype)


def _fake_backward(
    dy: Tensor, x: Tensor, values: Tensor, index: Any, sizes: list[int], backend: str
) -> tuple[Tensor, Tensor]:
    return new_input(x, unpack(sizes), x.shape[2:]), values.new_empty(values.shape)


# The derivatives.


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: list[Tensor],
        sizes: list[int],
        backend: str,
        probe: Tensor | None,
        kind: str,
        probe_args: Sequence[Tensor],
        tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(x, values, probe, *index, *probe_args)
        ctx.given = products, sizes, backend, kind, tokens
        ctx.bias_dtype = None if bias is None else bias.dtype
        return below_autograd(products.forward, x, values, bias, index, sizes, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        products, sizes, backend, kind, tokens = ctx.given
        bo, bi = _block(values)
        dy = channels_last(dy)  # once for all that read it
        _, need_x, need_values, need_bias, *_, need_probe, _, _, _ = ctx.needs_input_grad
        dx = dvalues = dbias = dprobe = None
        if need_x and need_probe and torch.is_grad_enabled():
            # A derivative of dx reaches the probe as it does the values.
            asked = probe, kind, probe_args, tokens
            dx = products.dx(dy, values, index, sizes, list(x.shape[2:]), backend, *asked)
        elif need_x and need_values:
            dx, dvalues = derivative(products.backward, dy, x, values, index, sizes, backend)
        elif need_x:
            dx = derivative(products.dx, dy, values, index, sizes, list(x.shape[2:]), backend)
        if need_values and dvalues is None:
            dvalues = derivative(products.dvalues, dy, x, index, bo, bi, sizes, values.dtype, backend)
        if need_bias:
            dbias = dy.sum((0, 2, 3) if dy.dim() == 4 else 0, dtype=ctx.bias_dtype)
        if need_probe:
            dprobe = probe_gradient(kind, dy, x, probe_args, (bo, bi), unpack(sizes), probe.dtype, backend, tokens)
        return None, dx, dvalues, dbias, None, None, None, dprobe, None, None, None


class _ProductDx(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        dy: Tensor,
        values: Tensor,
        index: list[Tensor],
        sizes: list[int],
        size: list[int],
        backend: str,
        probe: Tensor | None,
        kind: str,
        probe_args: Sequence[Tensor],
        tokens: int,
    ) -> Tensor:
        ctx.save_for_backward(dy, values, probe, *index, *probe_args)
        ctx.given = products, sizes, backend, kind, tokens
        return below_autograd(products.dx, dy, values, index, sizes, size, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, values, probe, *rest = ctx.saved_tensors
        index, probe_args = rest[:6], rest[6:]
        products, sizes, backend, kind, tokens = ctx.given
        bo, bi = _block(values)
        g = channels_last(g)
        _, need_dy, need_values, *_, need_probe, _, _, _ = ctx.needs_input_grad
        ddy = dvalues = dprobe = None
        if need_dy:
            ddy = products.forward(g, values, None, index, sizes, backend, probe, kind, probe_args, tokens)
        if need_values:
            dvalues = products.dvalues(dy, g, index, bo, bi, sizes, values.dtype, backend)
        if need_probe:
            dprobe = probe_gradient(kind, dy, g, probe_args, (bo, bi), unpack(sizes), probe.dtype, backend, tokens)
        return None, ddy, dvalues, None, None, None, None, dprobe, None, None, None


class _ProductDvalues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        products: Products,
        dy: Tensor,
        x: Tensor,
        index: list[Tensor],
        bo: int,
        bi: int,
        sizes: list[int],
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(dy, x, *index)
        ctx.given = products, sizes, backend
        return below_autograd(products.dvalues, dy, x, index, bo, bi, sizes, dtype, backend)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        dy, x, *index = ctx.saved_tensors
        products, sizes, backend = ctx.given
        _, need_dy, need_x, *_ = ctx.needs_input_grad
        ddy = products.forward(x, g, None, index, sizes, backend) if need_dy else None
        dx = products.dx(dy, g, index, sizes, list(x.shape[2:]), backend) if need_x else None
        return None, ddy, dx, None, None, None, None, None, None


class Products:
    """The ops of one geometry.

    Args:
        op: their name, ``"linear"`` or ``"conv2d"``.
        sizes: the type of a packed geometry in the schemas. Sizes of linear layers are ``SymInt``, so that layers of
            different sizes share a compiled graph; those of a convolution decide how it is computed.
    """

    def __init__(self, op: str, sizes: str) -> None:
        probe = "Tensor? probe=None, str probe_kind='', Tensor[]? probe_args=None, SymInt probe_tokens=0"
        self.forward = define(
            op,
            f"(Tensor x, Tensor values, Tensor? bias, Tensor[] index, {sizes}[] sizes, str backend, {probe}) -> Tensor",
            fake=_fake_forward,
            run=_run_forward,
            autograd=self._forward_at_autograd,
            casts=(0,),
        )
        self.dx = define(
            f"{op}_dx",
            f"(Tensor dy, Tensor values, Tensor[] index, {sizes}[] sizes, SymInt[] size, str backend, {probe})"
            " -> Tensor",
            fake=_fake_dx,
            run=_run_dx,
            autograd=self._dx_at_autograd,
        )
        self.dvalues = define(
            f"{op}_dvalues",
            f"(Tensor dy, Tensor x, Tensor[] index, SymInt bo, SymInt bi, {sizes}[] sizes, ScalarType dtype, "
            "str backend) -> Tensor",
            fake=_fake_dvalues,
            run=_run_dvalues,
            autograd=self._dvalues_at_autograd,
        )
        self.backward = define(
            f"{op}_backward",
            f"(Tensor dy, Tensor x, Tensor values, Tensor[] index, {sizes}[] sizes, str backend) -> (Tensor, Tensor)",
            fake=_fake_backward,
            run=_run_backward,
            autograd=self._backward_at_autograd,
        )

    def _forward_at_autograd(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        index: list[Tensor],
        sizes: list[int],
        backend: str,
        probe: Tensor | None = None,
        kind: str = "",
        probe_args: list[Tensor] | None = None,
        tokens: int = 0,
    ) -> Tensor:
        if not wants_grad(x, values, bias, probe):
            return below_autograd(self.forward, x, values, bias, index, sizes, backend)
        asked = probe, kind, probe_args or (), tokens
        y: Tensor = _Product.apply(self, x, values, bias, index, sizes, backend, *asked)
        return y

    def _dx_at_autograd(
        self,
        dy: Tensor,
        values: Tensor,
        index: list[Tensor],
        sizes: list[int],
        size: list[int],
        backend: str,
        probe: Tensor | None = None,
        kind: str = "",
        probe_args: list[Tensor] | None = None,
        tokens: int = 0,
    ) -> Tensor:
        if not wants_grad(dy, values, probe):
            return below_autograd(self.dx, dy, values, index, sizes, size, backend)
        asked = probe, kind, probe_args or (), tokens
        dx: Tensor = _ProductDx.apply(self, dy, values, index, sizes, size, backend, *asked)
        return dx

    def _dvalues_at_autograd(self, dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        if not wants_grad(dy, x):
            return below_autograd(self.dvalues, dy, x, *rest)
        dvalues: Tensor = _ProductDvalues.apply(self, dy, x, *rest)
        return dvalues

    def _backward_at_autograd(
        self, dy: Tensor, x: Tensor, values: Tensor, index: list[Tensor], sizes: list[int], backend: str
    ) -> tuple[Tensor, Tensor]:
        if not wants_grad(dy, x, values):
            return below_autograd(self.backward, dy, x, values, index, sizes, backend)
        dx = self.dx(dy, values, index, sizes, list(x.shape[2:]), backend)  # these two know their derivatives
        return dx, self.dvalues(dy, x, index, *_block(values), sizes, values.dtype, backend)


LINEAR = Products("linear", "SymInt")
CONV2D = Products("conv2d", "int")
