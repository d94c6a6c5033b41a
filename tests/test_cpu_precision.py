"""Half precision in the native CPU kernels: every bit pattern, and how sums are rounded, on every instruction set.

The conversions are instructions on one machine and bit arithmetic on another; here they must agree with PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import Index, LinearShape
from sparsekern.kernels.cpu import library
from torch import Tensor

from sparsekern.topology import Grid, Topology, build_index

pytestmark = pytest.mark.usefixtures("instructions", "poisoned_memory")

HALVES = (torch.bfloat16, torch.float16)
WAYS = ("fwd few", "fwd", "dx", "fwd 1x1", "dx 1x1")


def diagonal(features: int, side: int) -> tuple[Tensor, Index]:
    """Return values and index of the identity."""
    blocks = features // side
    place = torch.arange(blocks, dtype=torch.int32)
    topology = Topology(Grid(features, features, (side, side)), place, place.clone())
    return torch.eye(side).expand(blocks, side, side).contiguous(), build_index(topology)


def product(x: Tensor, way: str, row: Tensor, col: Tensor, features: int) -> Tensor:
    """Return ``x`` times identities at some places, by one of the kernels that read and write half precision."""
    side = 1 if "1x1" in way else 16
    values = torch.eye(side).expand(row.shape[0], side, side).contiguous()
    if way.startswith("dx"):
        index = build_index(Topology(Grid(x.shape[1], features, (side, side)), col, row))
        return cpu.products.dx(x, values, index, LinearShape(features, x.shape[1]))
    index = build_index(Topology(Grid(features, x.shape[1], (side, side)), row, col))
    parts = x.split(2) if way == "fwd few" else [x]
    return torch.cat([cpu.products.fwd(part, values, None, index, LinearShape(x.shape[1], features)) for part in parts])


def through(x: Tensor, way: str) -> Tensor:
    """Return ``x`` times the identity."""
    place = torch.arange(x.shape[1] // (1 if "1x1" in way else 16), dtype=torch.int32)
    return product(x, way, place, place.clone(), x.shape[1])


def one_sum(way: str, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b`` as the kernels round it: two weights of one, one product each, in one sum."""
    place = torch.arange(2 * a.shape[1] // (1 if "1x1" in way else 16), dtype=torch.int32)
    return product(torch.cat([a, b], 1), way, place % (place.shape[0] // 2), place, a.shape[1])


def same(found: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless both have the same bits, where they are not NaN."""
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_bit_pattern_comes_back_unchanged(dtype: torch.dtype, way: str) -> None:
    """At 1x1 all of them; in a larger block infinity and NaN meet the zeros of the identity, so they are left out.

    The processor's own bfloat16 instructions take every subnormal number for zero.
    """
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    if "1x1" not in way:
        x = torch.where(x.isfinite(), x, 0)

    found = through(x.view(128, 512), way).flatten()

    if dtype == torch.bfloat16 and library.takes_bfloat16() and "1x1" not in way:
        x = torch.where(x.abs() < torch.finfo(dtype).smallest_normal, 0, x)
    same(found, torch.where(x == 0, 0, x))  # a sum that starts at zero is never the negative zero


@pytest.mark.parametrize("side", [1, 16])
@pytest.mark.parametrize("tokens", [2, 30])
@pytest.mark.parametrize("dtype", HALVES)
def test_nan_and_infinity_stay_what_they_are(dtype: torch.dtype, tokens: int, side: int) -> None:
    """Through a weight of ones: each output is the sum over a block."""
    x = torch.ones(tokens, 4 * side, dtype=dtype)
    for block, number in enumerate((float("nan"), float("inf"), float("-inf"))):
        x[:, block * side] = number
    values, index = diagonal(4 * side, side)

    y = cpu.products.fwd(x, torch.ones_like(values), None, index, LinearShape(x.shape[-1], 4 * side))

    expected = torch.tensor([float("nan"), float("inf"), float("-inf"), side]).repeat_interleave(side).to(dtype)
    same(y, expected.expand(tokens, -1).contiguous())


def random_sums(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    a, b = (torch.randn(64, 512, generator=generator) for _ in range(2))
    scale = torch.randint(-12, 12, (64, 512), generator=generator)
    return torch.ldexp(a, scale).to(dtype), torch.ldexp(b, scale - 6).to(dtype)


def ties(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers, and half of the step to the next one: the sum lies exactly between two."""
    bits = 10 if dtype == torch.float16 else 7
    whole = torch.randint(2**bits, 2 ** (bits + 1), (64, 512), generator=generator).float()
    sign = torch.randint(0, 2, (64, 512), generator=generator) * 2 - 1
    return (sign * whole).to(dtype), (sign * torch.full((64, 512), 0.5)).to(dtype)


def small(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Subnormal numbers of float16, of both signs."""
    return tuple((torch.randn(64, 512, generator=generator) * 2**-16).to(dtype) for _ in range(2))  # type: ignore


def large(dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sums around the largest finite number: some of them round to infinity."""
    most = torch.finfo(dtype).max
    b = torch.rand(64, 512, generator=generator) * most * 2.0 ** (-10 if dtype == torch.float16 else -7)
    return torch.full((64, 512), most, dtype=dtype), b.to(dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("numbers", [random_sums, ties, small, large], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_rounded_to_nearest_even(
    dtype: torch.dtype, numbers: Callable[..., tuple[Tensor, Tensor]], way: str, generator: torch.Generator
) -> None:
    a, b = numbers(dtype, generator)
    expected = (a.float() + b.float()).to(dtype)

    same(one_sum(way, a, b), torch.where(expected == 0, expected.abs(), expected))


@pytest.mark.parametrize("side", [1, 16])
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_over_many_inputs_are_not_formed_in_half_precision(dtype: torch.dtype, side: int) -> None:
    """4096 ones: a float16 sum would stop at 2048, a bfloat16 sum at 256."""
    col = torch.arange(4096 // side, dtype=torch.int32)
    index = build_index(Topology(Grid(side, 4096, (side, side)), torch.zeros_like(col), col))
    ones, shape = torch.ones(4096 // side, side, side).to(dtype), LinearShape(4096, side)

    for tokens in (1, 30):
        assert (cpu.products.fwd(torch.ones(tokens, 4096).to(dtype), ones, None, index, shape) == 4096).all()
    x, dy = torch.ones(4096, 4096).to(dtype), torch.ones(4096, side).to(dtype)
    assert (cpu.products.dvalues(dy, x, index, (side, side), shape, torch.float32) == 4096).all()


@pytest.mark.parametrize("side", [1, 16])
def test_dvalues_of_half_precision_inputs_keep_the_precision_of_their_sums(side: int) -> None:
    """1 + 2**-13 is no float16 number; the sum of its two parts must not have been one on the way."""
    values, index = diagonal(side, side)
    x, dy = torch.ones(2, side).half(), torch.tensor([[1.0], [2**-13]]).expand(2, side).half()

    found = cpu.products.dvalues(dy, x, index, (side, side), LinearShape(side, side), torch.float32)
    assert (found == 1 + 2**-13).all()
    assert values.shape == (1, side, side)
