"""Probes: how a training method reads the gradient of blocks that are not stored, without hooks or a second pass.

A probe is a tensor of zeros that takes part in the forward without changing it. Its gradient, which autograd adds up
over micro-batches and reduces over ranks like any other, *is* the result that the method asks for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.kernels.contract import ConvShape, Geometry, Index
from sparsekern.ops import marginals, scores
from sparsekern.ops.library import channels_last, pack
from sparsekern.topology import Grid, Topology, build_index

KINDS = ("candidates", "norms", "all_norms", "counted_norms", "sketch", "magnitudes", "signed_sums")


class Probe(NamedTuple):
    """What to compute from the gradient ``G = dy' x`` of the whole weight; the backward puts it into ``tensor.grad``.

    Make one with a class method; places that are not distinct ones of the grid raise ValueError. If the loss contains a
    derivative of the layer, G includes its part. Norms do not add up to the norm of a sum: use one of the other kinds,
    which are linear in the tokens, where gradients are accumulated or reduced over ranks, where a layer is called
    several times, or where a derivative of it is part of the loss; :meth:`counted_norms` tell whether that was so.

    With ``tokens`` above 0 the result is that of this many tokens of each backward, evenly spread; :meth:`of_tokens`.

    For a convolution G is the matrix of all taps; its tokens are the output positions and x the windows there. Two
    kinds sum what *columns* see of x: each group sees its own channels, and the result has the columns once a group.
    """

    kind: str
    tensor: Tensor
    args: tuple[Tensor, ...]
    tokens: int = 0

    @classmethod
    def candidates(
        cls, grid: Grid, row: Tensor, col: Tensor, *, dtype: torch.dtype = torch.float32, checked: bool = False
    ) -> Probe:
        """Ask for the blocks ``(row[k], col[k])`` of G: ``(K, bo, bi)``. The places are distinct, int32 ``(K,)``.

        Where ``row = col = -1`` the result is zero. So K can stay the same while the number of places changes; another
        K would compile anew. With ``checked`` the caller knows that the places are distinct ones of the grid, in the
        order of their keys ``row * C + col``, -1 last.
        """
        if not checked:
            _check_places(grid, row, col)
        index = build_index(Topology(grid, row, col), checked=True, ascending=checked)
        shape = (row.shape[0], *grid.block)
        return cls("candidates", _zeros(shape, dtype, row.device), tuple(index))

    @classmethod
    def of_stored(cls, values: Tensor, index: Index) -> Probe:
        """Ask for the blocks of G that an index has, as the gradient of ``values (Z, bo, bi)``, which are the probe.

        The product takes these values detached, and an index of some of the blocks.
        """
        return cls("candidates", values, tuple(index))

    @classmethod
    def norms(cls, grid: Grid, row: Tensor, col: Tensor, *, dtype: torch.dtype = torch.float32) -> Probe:
        """Ask for the Frobenius norms of the blocks ``(row[k], col[k])`` of G: ``(K,)``."""
        _check_places(grid, row, col)
        if bool((row < 0).any()):
            raise InputError("a probe asks for norms of blocks (-1, -1); that is a free slot, not a place")
        return cls("norms", _zeros(row.shape, dtype, row.device), (row, col))

    @classmethod
    def all_norms(
        cls, grid: Grid, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Probe:
        """Ask for the Frobenius norms of all blocks of G: ``(R, C)``, one number a block."""
        return cls("all_norms", _zeros((grid.rows, grid.cols), dtype, device), ())

    @classmethod
    def counted_norms(
        cls, grid: Grid, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Probe:
        """Ask for the norms of all blocks of G, by rows, and then of how many parts of G they are: ``(R * C + 1,)``.

        Each backward of each call of the layer is one part; with more than one, the norms are sums.
        """
        return cls("counted_norms", _zeros((grid.rows * grid.cols + 1,), dtype, device), ())

    @classmethod
    def sketch(cls, grid: Grid, u: Tensor, v: Tensor) -> Probe:
        """Ask for ``u[q]' G v[q]`` in every block: ``(r, R, C)``.

        With independent entries of mean 0 and variance 1 in ``u (r, out)`` and ``v (r, in)``, the mean of the squares
        over q estimates the squared norm of a block, with relative deviation about ``sqrt(8 / r)``.
        """
        return cls("sketch", _zeros((u.shape[0], grid.rows, grid.cols), u.dtype, u.device), (u, v))

    @classmethod
    def magnitudes(
        cls, grid: Grid, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> Probe:
        """Ask how much block rows see of dy and block columns of x: ``(R + groups * C,)``.

        See :mod:`sparsekern.ops.marginals`.
        """
        return cls("magnitudes", _zeros((grid.rows + grid.groups * grid.cols,), dtype, device), ())

    @classmethod
    def signed_sums(cls, grid: Grid, seed: Tensor, *, dtype: torch.dtype = torch.float32) -> Probe:
        """Ask for the sums of dy and x over tokens with random signs: ``(out + groups * in,)``.

        The seed ``()``, int64, decides the signs: :func:`sparsekern.ops.marginals.token_signs`.
        """
        shape = (grid.out_features + grid.groups * grid.in_features,)
        return cls("signed_sums", _zeros(shape, dtype, seed.device), (seed,))

    def of_tokens(self, tokens: int) -> Probe:
        """Return the same probe for at most this many tokens of each backward; 0 for all.

        For a convolution fewer may be taken: they form a lattice.
        """
        return self._replace(tokens=tokens)


def _check_places(grid: Grid, row: Tensor, col: Tensor) -> None:
    if row.numel() == 0 and row.shape == col.shape:
        return  # no candidates, as in a layer that is full
    Topology(grid, row, col).validate()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Return zeros that take no memory, one number expanded: kernels never read a probe."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()


def probe_gradient(
    kind: str,
    dy: Tensor,
    x: Tensor,
    args: Sequence[Tensor],
    block: tuple[int, int],
    geometry: Geometry,
    dtype: torch.dtype,
    backend: str,
    tokens: int,
) -> Tensor:
    """Return the gradient of a probe; :class:`Probe` says what it is for each kind.

    Args:
        kind, args, tokens: of the probe.
        dy: ``(T, O)``, or ``(N, Cout, Ho, Wo)`` channels last.
        x: ``(T, I)``, or ``(N, Cin, H, W)`` channels last.
        block: ``(bo, bi)``.
        geometry: of the layer.
        dtype: of the result.
        backend: by name.
    """
    dy, x, geometry = spread(dy, x, geometry, tokens)
    if kind == "candidates":
        op = getattr(torch.ops.sparsekern, f"{geometry.op}_dvalues").default
        blocks: Tensor = op(dy, x, args, *block, pack(geometry), dtype, backend)
        return blocks
    if kind == "norms":
        result = scores.block_norms(dy, x, args[0], args[1], *block, backend, geometry)
    elif kind in ("all_norms", "counted_norms"):
        result = scores.all_block_norms(dy, x, *block, backend, geometry)
    elif kind == "magnitudes":
        result = marginals.magnitudes(dy, x, block, geometry)
    elif kind == "signed_sums":
        result = marginals.signed_sums(dy, x, args[0], geometry)
    else:
        result = scores.sketch(dy, x, args[0], args[1], *block, backend, geometry)
    result = result.to(dtype)
    return counted(result) if kind == "counted_norms" else result


def counted(norms: Tensor) -> Tensor:
    """Return norms ``(R, C)`` as ``(R * C + 1,)``, with a one at the end: sums of such results count their parts."""
    return torch.cat([norms.flatten(), norms.new_ones(1)])


def spread(dy: Tensor, x: Tensor, geometry: Geometry, tokens: int) -> tuple[Tensor, Tensor, Geometry]:
    """Return at most this many tokens, evenly spread over the batch; all of them for 0.

    Those of a linear layer are views. Those of a convolution lie on a regular lattice and are all tokens of the
    returned geometry, which has larger strides. Output positions are thinned before images, for neighbours are alike.
    """
    if tokens == 0 or dy.shape[0] * math.prod(dy.shape[2:]) <= tokens:
        return dy, x, geometry
    if isinstance(geometry, ConvShape):
        return _lattice(dy, x, geometry, tokens)
    step = x.shape[0] // tokens
    return dy[::step][:tokens], x[::step][:tokens], geometry


def _lattice(dy: Tensor, x: Tensor, geometry: ConvShape, tokens: int) -> tuple[Tensor, Tensor, ConvShape]:
    images, _, *size_out = dy.shape
    rows, cols = _side_lengths(max(1, tokens // images), size_out[0], size_out[1])
    rows_of = _thin(geometry, 0, x.shape[2], size_out[0], rows)
    cols_of = _thin(geometry, 1, x.shape[3], size_out[1], cols)
    if rows_of is None or cols_of is None:
        return dy, x, geometry  # the positions that would remain see only padding
    (above, below, high, wide), (left, right, begin, end) = rows_of[1], cols_of[1]
    some = slice(None, None, max(1, images // tokens))
    dy = dy[some, :, rows_of[0], cols_of[0]][:tokens]
    x = x[some, :, high:wide, begin:end][:tokens]
    stride = geometry.stride[0] * rows_of[0].step, geometry.stride[1] * cols_of[0].step
    return channels_last(dy), channels_last(x), geometry._replace(stride=stride, padding=(above, below, left, right))


def _side_lengths(positions: int, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of a lattice of at most this many positions, in about the proportions of the image."""
    rows = min(height, positions, max(1, math.isqrt(positions * height // width)))
    cols = min(width, positions // rows)
    return min(height, positions // cols), cols


def _thin(
    geometry: ConvShape, axis: int, size: int, size_out: int, count: int
) -> tuple[slice, tuple[int, int, int, int]] | None:
    """Return which rows (axis 0) or columns (1) of the output remain, and what they see of ``size`` rows of the input.

    That is the padding before and behind, and the first and last row; None if they see only padding.
    """
    every = size_out // count
    first = (every - 1) // 2  # in the middle: the edge of an image is not like the rest
    kept = slice(first, first + every * (count - 1) + 1, every)
    stride, reach = geometry.stride[axis], (geometry.kernel[axis] - 1) * geometry.dilation[axis]
    start = first * stride - geometry.padding[2 * axis]
    stop = start + every * (count - 1) * stride + reach + 1
    if start >= size or stop <= 0:
        return None
    return kept, (max(0, -start), max(0, stop - size), max(0, start), min(size, stop))
