"""What a probe hears in the backward of a linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.ops import marginals, scores


def answer(
    kind: str,
    dy: Tensor,
    x: Tensor,
    args: list[Tensor],
    block: tuple[int, int],
    dtype: torch.dtype,
    backend: str,
    tokens: int,
) -> Tensor:
    """Return the gradient of a probe; :class:`sparsekern.ops.probes.Probe` says what each kind asks for.

    Args:
        kind, args, tokens: of the probe.
        dy: ``(T, O)``.
        x: ``(T, I)``.
        block: ``(bo, bi)``.
        dtype: of the result.
        backend: by name.
    """
    (bo, bi), (dy, x) = block, spread(dy, x, tokens)
    if kind == "candidates":
        blocks: Tensor = torch.ops.sparsekern.linear_dvalues.default(dy, x, args, bo, bi, dtype, backend)
        return blocks
    if kind == "norms":
        return scores.block_norms(dy, x, args[0], args[1], bo, bi, backend).to(dtype)
    if kind == "all_norms":
        return scores.all_block_norms(dy, x, bo, bi, backend).to(dtype)
    if kind == "counted_norms":
        return counted(scores.all_block_norms(dy, x, bo, bi, backend).to(dtype))
    if kind == "magnitudes":
        return marginals.magnitudes(dy, x, block).to(dtype)
    if kind == "signed_sums":
        return marginals.signed_sums(dy, x, args[0]).to(dtype)
    return scores.sketch(dy, x, args[0], args[1], bo, bi, backend).to(dtype)


def counted(norms: Tensor) -> Tensor:
    """Return norms ``(R, C)`` as ``(R * C + 1,)``, with a one behind: when answers add up, their number."""
    return torch.cat([norms.flatten(), norms.new_ones(1)])


def spread(dy: Tensor, x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Return at most so many tokens, evenly spread over the batch, as views; all of them for 0."""
    if tokens == 0 or x.shape[0] <= tokens:
        return dy, x
    step = x.shape[0] // tokens
    return dy[::step][:tokens], x[::step][:tokens]
