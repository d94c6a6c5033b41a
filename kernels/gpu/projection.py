"""Blocks of columns of x times random directions: the two halves of a sketch of ``G = dy' x``.

out[q, b, t] = sum over i in block b of x[t, i] * direction[q, i]
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE_T = 64
"""Tokens of a program."""


@triton.jit(do_not_specialize=["T", "blocks", "pairs"])
def projection_kernel(
    x_ptr, direction_ptr, out_ptr,
    T, features, blocks, pairs, stride_t, stride_i,
    SIDE: tl.constexpr, TILE_T: tl.constexpr,
):  # fmt: skip
    """Write ``out[all q, one block, TILE_T tokens]``: x is read once for all directions, in float32."""
    block = tl.program_id(0) % blocks
    t = (tl.program_id(0) // blocks).to(tl.int64) * TILE_T + tl.arange(0, TILE_T)
    i = block * SIDE + tl.arange(0, SIDE)
    mask = (t < T)[:, None] & (i < features)[None, :]
    x = tl.load(x_ptr + t[:, None] * stride_t + i.to(tl.int64)[None, :] * stride_i, mask=mask, other=0.0)
    x = x.to(tl.float32)
    for q in range(pairs):
        line = tl.cast(q, tl.int64)
        direction = tl.load(direction_ptr + line * features + i, mask=i < features, other=0.0)
        out = out_ptr + (line * blocks + block) * T + t
        tl.store(out, tl.sum(x * direction[None, :], 1), mask=t < T)
