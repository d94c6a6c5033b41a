"""Two kernels that do one thing each: gather blocks of columns from the L2 cache, and multiply in shared memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    words_ptr, out_ptr, stride_units, turns, tiles, last_block,
    WORDS: tl.constexpr, TILE_K: tl.constexpr, TILE_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add up TILE_T rows of ``turns`` tiles, each made of TILE_K // WORDS scattered blocks of columns.

    The unit is a word of 32 bits (integers wrap, so that any order gives the same sum). It is the access of the
    package's product, but for the index: which block comes next is computed, so that nothing but the gather is timed.
    """
    pid = tl.program_id(0)
    t = (pid % tiles) * TILE_T + tl.arange(0, TILE_T)
    k = tl.arange(0, TILE_K)
    BLOCKS: tl.constexpr = TILE_K // WORDS
    total = tl.zeros((TILE_T, TILE_K), tl.int32)
    for turn in tl.range(0, turns, num_stages=STAGES):
        number = (pid * turns + turn) * BLOCKS + k // WORDS
        block = (number * -1640531535 >> 16) & last_block  # 2 ** 32 over the golden ratio: scatters neighbours
        column = tl.max_contiguous(tl.multiple_of(block * WORDS + k % WORDS, WORDS), WORDS)
        total += tl.load(words_ptr + t[:, None] * (stride_units * 4) + column[None, :])
    out = out_ptr + (pid * TILE_T + tl.arange(0, TILE_T))[:, None] * TILE_K + k[None, :]
    tl.store(out, total)


@triton.jit
def dots_kernel(
    a_ptr, b_ptr, out_ptr, turns,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, FED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write ``turns`` times ``a (M, K) @ b (K, N)``: the rate of the matrix instruction at this N.

    The operands stay in shared memory, or are loaded again each turn (FED), which the L2 cache answers: turns alternate
    between two copies of them, so that no compiler takes the load out of the loop.
    """
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a_ptrs = a_ptr + m[:, None] * K + k[None, :]
    b_ptrs = b_ptr + k[:, None] * N + n[None, :]
    acc = tl.zeros((M, N), tl.float32)
    if FED:
        for turn in tl.range(0, turns, num_stages=STAGES):
            copy = turn % 2
            acc = tl.dot(tl.load(a_ptrs + copy * M * K), tl.load(b_ptrs + copy * K * N), acc)
    else:
        a, b = tl.load(a_ptrs), tl.load(b_ptrs)
        for _ in range(turns):
            acc = tl.dot(a, b, acc)
    out = out_ptr + tl.program_id(0).to(tl.int64) * M * N + m[:, None] * N + n[None, :]
    tl.store(out, acc)
