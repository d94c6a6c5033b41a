"""No index, whatever it holds, makes a native kernel read or write outside its tensors.

Here: what is illegal is refused, and what is legal is still computed afterwards. That nothing else was touched is for
the sanitizers to say: tests/sanitize_cpu.py calls the same.
"""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu

from tests.index_noise import Calls, conv_calls, illegal, linear_calls, noises, survive, survive_writer
from tests.oracle import Case, check_kernels, random_case
from tests.oracle_conv2d import ConvCase, check_conv, conv_case

pytestmark = pytest.mark.usefixtures("instructions")

CASES = [((1, 1), 3), ((1, 1), 40), ((16, 32), 2), ((16, 32), 40)]


def linear_case(block: tuple[int, int], tokens: int, dtype: torch.dtype = torch.float32) -> Case:
    given = {"rows": 7, "cols": 9, "blocks": 30, "free": 4, "dtype": dtype, "tokens": tokens, "bias": True}
    return random_case(3, block=block, x_layout="contiguous", dy_layout="contiguous", **given)


def conv2d_case(
    block: tuple[int, int], groups: int = 1, stride: int = 1, dtype: torch.dtype = torch.float32
) -> ConvCase:
    given = {"kernel": (3, 3), "stride": (stride, stride), "dilation": (1, 1), "padding": (1, 1, 1, 1), "images": 2}
    given |= {"height": 6, "width": 7, "groups": groups, "group_in": 2 * block[1] + 1, "group_out": 3 * block[0]}
    return conv_case(5, block=block, dtype=dtype, blocks=9, **given)


def check_refusals(calls: Calls, case: Case | ConvCase) -> None:
    index, block = case.index, case.grid.block
    for name, (call, lists) in calls.items():
        for number in lists:
            for seed, wrong in enumerate(illegal(index, number, block, 0)):
                assert survive(call, wrong), (name, number, seed)
        for wrong in noises(index, 1):
            survive(call, wrong)


@pytest.mark.parametrize(("block", "tokens"), CASES)
def test_a_linear_layer_refuses_what_is_not_in_its_grid(block, tokens):
    case = linear_case(block, tokens)
    check_refusals(linear_calls(case), case)
    check_kernels(cpu, case)


def test_in_bfloat16_too():
    case = linear_case((16, 32), 40, torch.bfloat16)
    check_refusals(linear_calls(case), case)
    conv = conv2d_case((16, 32), dtype=torch.bfloat16)
    check_refusals(conv_calls(conv), conv)
    check_kernels(cpu, case)


@pytest.mark.parametrize(
    ("block", "groups", "stride"), [((1, 1), 1, 1), ((1, 1), 3, 2), ((16, 16), 1, 1), ((16, 16), 2, 2)]
)
def test_a_convolution_refuses_what_is_not_in_its_grid(block, groups, stride):
    case = conv2d_case(block, groups, stride)
    check_refusals(conv_calls(case), case)
    check_conv(cpu, case)


@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_another_thread_may_write_into_an_index_meanwhile(block):
    case, conv = linear_case(block, 40), conv2d_case(block, 2)
    survive_writer(linear_calls(case), case.index, 10)
    survive_writer(conv_calls(conv), conv.index, 10)


def test_an_index_of_another_grid_is_refused():
    case, larger = linear_case((16, 32), 40), random_case(3, block=(16, 32), rows=8, cols=9, blocks=30, free=4)
    assert all(survive(call, larger.index) for call, _ in linear_calls(case).values())
