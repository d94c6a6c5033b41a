"""Probes: how a training method reads the gradient of blocks that are not stored, without hooks or a second pass.

A probe is a tensor of zeros that takes part in the forward without changing it. Its gradient, which autograd adds up
over micro-batches and reduces over ranks like any other, *is* what the method asks for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology import Grid, Topology, build_index

KINDS = ("candidates", "norms", "all_norms", "counted_norms", "sketch", "magnitudes", "signed_sums")


class Probe(NamedTuple):
    """What to ask of the gradient ``G = dy' x`` of the whole weight; after the backward the answer is ``tensor.grad``.

    Make one with a class method; places that are not distinct ones of the grid raise ValueError. A loss that contains a
    derivative of the layer is heard whole. Norms do not add up to the norm of a sum: use one of the other kinds, which
    are linear in the tokens, where gradients are accumulated or reduced over ranks, where a layer is called several
    times, or a derivative of it is part of the loss; :meth:`counted_norms` tell whether that was so.

    With ``tokens`` above 0 the answer is that of so many tokens of each backward, evenly spread; :meth:`of_tokens`.

    Of a convolution G is the matrix of all taps, its tokens the output positions and x the windows there. Two kinds ask
    what *columns* see of x: with groups each sees channels of its own, and the answer has the columns once a group.
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

        Where ``row = col = -1`` nothing is asked and the answer is zero: so K can stay the same, which it must not to
        be compiled anew, while the number of places changes. With ``checked`` the caller knows that the places are
        distinct ones of the grid, in the order of their keys ``row * C + col``, -1 last.
        """
        if not checked:
            _check_places(grid, row, col)
        index = build_index(Topology(grid, row, col), checked=True, ascending=checked)
        shape = (row.shape[0], *grid.block)
        return cls("candidates", _zeros(shape, dtype, row.device), tuple(index))

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
        """Ask what block rows see of dy and block columns of x: ``(R + groups * C,)``.

        See :mod:`sparsekern.ops.marginals` and :mod:`sparsekern.ops.conv2d_marginals`.
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
        """Return a probe that asks the same of only so many tokens of each backward; 0 for all.

        Of a convolution fewer may be taken: they form a lattice.
        """
        return self._replace(tokens=tokens)


def _check_places(grid: Grid, row: Tensor, col: Tensor) -> None:
    if row.numel() == 0 and row.shape == col.shape:
        return  # nothing to ask, as in a layer that is full
    Topology(grid, row, col).validate()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    """Return zeros that take no memory: one number, seen everywhere. Nobody reads a probe."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape).requires_grad_()
