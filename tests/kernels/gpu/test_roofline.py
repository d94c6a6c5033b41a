"""The configurations worth trying: there are some for every problem, and they fit. Their order is a guess."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from sparsekern.kernels.gpu import SIDES, roofline
from sparsekern.kernels.gpu.config import KINDS, Config, FewTokens, Multiply, Outer, Problem, Supertile
from sparsekern.kernels.gpu.roofline import candidates, device, fits, shared_bytes, tile

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
PROBLEM = Problem("fwd", "sm_90", "fp16", 64, 32, 12, 3)


def magnitudes(kernel: str) -> tuple[tuple[int, int], ...]:
    """Return magnitudes of tokens and of blocks a row."""
    return ((0, 10), (5, 0)) if kernel.startswith("few") else ((0, 4), (6, 0), (24, 10))


def fits_the_kernel(problem: Problem, config: Config) -> bool:
    """Say what each kernel asks of its tiles: whole blocks, or whole parts of one."""
    if isinstance(config, (Multiply, FewTokens)):
        whole = problem.summed % config.tile_k == 0 or config.tile_k % problem.summed == 0
        if isinstance(config, FewTokens):
            return whole and problem.kept % config.tile_n == 0
        return whole and not (config.tma and problem.summed % config.tile_k)
    if isinstance(config, Outer):
        whole = problem.bi % config.tile_in == 0 or config.tile_in % problem.bi == 0
        return whole and (not problem.takes_norms or config.tile_in >= problem.bi)
    return config.tile_out % problem.bo == 0 and config.tile_in % problem.bi == 0


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "ieee"])
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KINDS)
def test_every_problem_has_candidates_and_they_fit(kernel: str, arch: str, dtype: str) -> None:
    """All blocks, rectangles too, from one token to millions."""
    for bo, bi, (tokens, blocks) in itertools.product(SIDES, SIDES, magnitudes(kernel)):
        problem = Problem(kernel, arch, dtype, bo, bi, tokens, blocks)
        found = candidates(problem)
        assert 1 <= len(found) <= roofline.MOST, problem
        assert len(set(found)) == len(found), problem
        for config in found:
            assert isinstance(config, KINDS[kernel])
            assert fits(problem, config) and fits_the_kernel(problem, config), (problem, config)
            assert config.warps in (1, 2, 4, 8) and config.stages >= 2
            assert min(tile(problem, config)) >= 16, "tl.dot takes no less"
            if isinstance(config, Multiply):
                assert not config.tma or (device(arch)["tma"] and min(bo, bi) >= 64 and not problem.is_conv2d)


@pytest.mark.parametrize("kernel", KINDS)
def test_the_order_is_always_the_same(kernel: str) -> None:
    problem = PROBLEM._replace(kernel=kernel, log2_tokens=5)

    assert candidates(problem) == candidates(Problem(*problem))


@pytest.mark.parametrize("kernel", KINDS)
def test_bfloat16_is_like_float16(kernel: str) -> None:
    problem = PROBLEM._replace(kernel=kernel, log2_tokens=5)

    assert candidates(problem._replace(dtype="bf16")) == candidates(problem)


@pytest.mark.parametrize(
    ("arch", "nearest"),
    [
        ("sm_75", "sm_80"),
        ("sm_80", "sm_80"),
        ("sm_87", "sm_86"),
        ("sm_90", "sm_90"),
        ("sm_99", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_150", "sm_120"),
    ],
)
def test_an_unknown_device_is_taken_for_the_nearest_older_one(arch: str, nearest: str) -> None:
    assert device(arch) == device(nearest)
    assert candidates(PROBLEM._replace(arch=arch))[0] == candidates(PROBLEM._replace(arch=nearest))[0]


@pytest.mark.parametrize(
    ("kernel", "config", "expected"),
    [
        ("fwd", Multiply(128, 16, 8, 4, 3), (128, 64, 16)),
        ("dx", Multiply(128, 16, 8, 4, 3), (128, 32, 16)),
        ("few_fwd", FewTokens(16, 32, 4, 4), (16, 32, 32)),
        ("dvalues", Outer(128, 16, 4, 3), (128, 64, 16)),
        ("all_block_norms", Supertile(128, 64, 16, 4, 3), (128, 64, 16)),
        ("conv2d_fwd", Multiply(128, 16, 8, 4, 3), (128, 64, 16)),
        ("conv2d_dx", Multiply(128, 16, 8, 4, 3), (128, 32, 16)),
    ],
)
def test_the_tile_of_a_product(kernel: str, config: Config, expected: tuple[int, int, int]) -> None:
    """Blocks of 64 x 32; the few tokens are 20, filled up to 32."""
    assert tile(PROBLEM._replace(kernel=kernel, log2_tokens=5), config) == expected


def test_few_tokens_are_at_least_16() -> None:
    assert tile(PROBLEM._replace(kernel="few_fwd", log2_tokens=0), FewTokens(16, 32, 4, 4)) == (16, 16, 32)


@pytest.mark.parametrize(
    ("arch", "dtype", "stages", "buffers", "expected"),
    [
        ("sm_90", "fp16", 4, 4, 98_304),  # (128 + 64) * 64 elements of 2 bytes, four times
        ("sm_80", "fp16", 4, 3, 73_728),  # registers hold the tile in use
        ("sm_90", "fp32", 3, 3, 147_456),
        ("sm_90", "ieee", 3, 2, 98_304),
    ],
)
def test_shared_memory_by_hand(arch: str, dtype: str, stages: int, buffers: int, expected: int) -> None:
    problem, config = PROBLEM._replace(arch=arch, dtype=dtype), Multiply(128, 64, 8, 4, stages)

    assert roofline.buffers(problem, config) == buffers
    assert shared_bytes(problem, config) == expected


def test_few_tokens_are_counted_with_values_of_float32() -> None:
    """Under autocast they are, and are converted after they are read."""
    problem = PROBLEM._replace(kernel="few_fwd", arch="sm_80", log2_tokens=4)

    assert shared_bytes(problem, FewTokens(16, 64, 4, 3)) == 2 * 64 * (16 * 4 + 16 * 2)


@pytest.mark.parametrize(
    ("arch", "config", "expected"),
    [
        ("sm_90", Multiply(128, 64, 8, 4, 9), True),  # 216 KiB and 1 of 227
        ("sm_90", Multiply(128, 64, 8, 4, 10), False),  # 240
        ("sm_86", Multiply(128, 64, 8, 4, 5), True),  # 96 and 1 of 99
        ("sm_86", Multiply(128, 64, 8, 4, 6), False),
        ("sm_90", Multiply(128, 16, 8, 4, 3), True),  # 128 * 64 sums, 64 a thread
        ("sm_90", Multiply(256, 16, 8, 4, 3), True),  # 128 a thread, with both operands in shared memory
        ("sm_90", Multiply(512, 16, 8, 4, 3), False),
        ("sm_80", Multiply(256, 16, 8, 4, 3), False),
        ("sm_80", Multiply(256, 16, 8, 8, 3), True),
    ],
)
def test_what_fits_by_hand(arch: str, config: Config, expected: bool) -> None:
    assert fits(PROBLEM._replace(arch=arch), config) is expected


def test_tiles_that_the_compiler_handles_badly_do_not_fit() -> None:
    """Two groups of warps on m64n8; two cache lines of K in a convolution."""
    narrow, conv = PROBLEM._replace(kernel="dvalues", bo=16, bi=16), PROBLEM._replace(kernel="conv2d_fwd", bi=128)

    assert fits(narrow, Outer(64, 64, 4, 4)) and fits(narrow, Outer(128, 64, 8, 4))
    assert not fits(narrow, Outer(64, 64, 8, 4)) and fits(narrow._replace(arch="sm_80"), Outer(64, 64, 8, 4))
    assert not fits(PROBLEM._replace(bo=16), Multiply(64, 32, 8, 8, 4))
    assert fits(conv, Multiply(128, 64, 8, 4, 3)) and not fits(conv, Multiply(128, 128, 8, 4, 3))
    assert not fits(conv._replace(dtype="fp32"), Multiply(64, 64, 8, 4, 3))


@pytest.mark.parametrize(("tokens", "cut"), [(5, True), (6, True), (7, True), (13, False)])
def test_with_few_tokens_programs_share_rows_of_large_blocks(tokens: int, cut: bool) -> None:
    """A layer of 4096 features has 32 rows of them, and an H200 132 multiprocessors."""
    best = candidates(PROBLEM._replace(bo=128, bi=128, log2_tokens=tokens, log2_blocks=2))[0]

    assert (best.cut > 1) is cut


def test_cuts_of_a_row_are_whole_and_not_of_a_convolution() -> None:
    large = PROBLEM._replace(bo=128, bi=128)

    assert fits(large, Multiply(64, 64, 8, 4, 4, cut=4)) and not fits(large, Multiply(64, 64, 8, 4, 4, cut=8))
    assert not fits(large, Multiply(64, 64, 8, 4, 4, tma=True, cut=4)), "the copy engine loads 64 columns or more"
    assert not fits(large._replace(kernel="conv2d_fwd"), Multiply(64, 64, 8, 4, 4, cut=2))


def test_large_blocks_are_given_tiles_of_256() -> None:
    for kernel, blocks in (("dvalues", 2), ("fwd", 2)):
        found = candidates(PROBLEM._replace(kernel=kernel, bo=128, bi=128, log2_tokens=13, log2_blocks=blocks))
        assert any(tile(PROBLEM._replace(kernel=kernel, bo=128, bi=128), c)[0] == 256 and c.warps == 8 for c in found)


def test_the_number_of_splits_is_tuned() -> None:
    found = candidates(PROBLEM._replace(kernel="dvalues", bo=128, bi=128, log2_tokens=13, log2_blocks=2))

    assert found[0].waves == 2 and {c.waves for c in found} == {1, 2, 4}


def test_a_tile_that_cuts_a_block_into_fractions_does_not_fit() -> None:
    """Such an entry of a table would launch nothing, and leave y unwritten."""
    few = PROBLEM._replace(kernel="few_fwd", bo=16, log2_tokens=4)
    norms = PROBLEM._replace(kernel="all_block_norms", bo=128)

    whole = PROBLEM._replace(kernel="block_norms", bi=128)

    assert fits(whole, Outer(128, 32, 8, 3)) and not fits(whole, Outer(64, 32, 4, 3))
    assert not fits(PROBLEM, Multiply(128, 64, 8, 4, 3, tma=True)), "a turn takes a whole tile of one block"
    assert fits(PROBLEM, Multiply(128, 32, 8, 4, 3, tma=True))
    assert not fits(PROBLEM._replace(kernel="conv2d_fwd"), Multiply(128, 32, 8, 4, 3, tma=True)), "pixels lie apart"
    assert fits(few, FewTokens(16, 32, 4, 4)) and not fits(few, FewTokens(32, 32, 4, 4))
    assert fits(norms, Supertile(128, 64, 32, 8, 3)) and not fits(norms, Supertile(64, 64, 32, 8, 3))


def test_the_tuner_is_given_many_shapes() -> None:
    """Not one tile in all its numbers of stages."""
    found = candidates(PROBLEM)

    assert len({replace(c, stages=0) for c in found}) >= 5
    assert len({c.stages for c in found if replace(c, stages=0) == replace(found[0], stages=0)}) > 1
