"""The native scores of a convolution against the oracle, on every instruction set that the machine has."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.cpu import scores

from tests.oracle_conv2d import ConvCase, conv_case
from tests.oracle_conv2d_scores import all_conv_cells, check_conv_norms, check_conv_sketch
from tests.oracle_scores import signs

pytestmark = pytest.mark.usefixtures("instructions")


def check_scores(case: ConvCase) -> None:
    block, shape = case.grid.block, case.shape
    u, v = signs(3, case.grid.out_features, 0), signs(3, case.grid.in_features, 1)
    check_conv_norms(case, cpu.conv2d_all_block_norms(case.dy, case.x, block, shape))
    check_conv_norms(case, cpu.conv2d_block_norms(case.dy, case.x, *all_conv_cells(case), block, shape))
    check_conv_sketch(case, cpu.conv2d_sketch(case.dy, case.x, u, v, block, shape), u, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 64)])
def test_scores_of_any_block_and_dtype(block: tuple[int, int], dtype: torch.dtype) -> None:
    for seed in range(3):
        check_scores(conv_case(seed, block=block, dtype=dtype))


@pytest.mark.parametrize("chunk", [1, 20_000])
def test_chunks_change_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = conv_case(3, block=(16, 16), images=2, dtype=torch.float32)
    block, shape = case.grid.block, case.shape
    expected = cpu.conv2d_all_block_norms(case.dy, case.x, block, shape)
    monkeypatch.setattr(scores, "CHUNK_BYTES", chunk)

    assert torch.equal(cpu.conv2d_all_block_norms(case.dy, case.x, block, shape), expected)
    found = cpu.conv2d_block_norms(case.dy, case.x, *all_conv_cells(case), block, shape)
    assert torch.equal(found.view_as(expected), expected)


def test_blocks_are_chosen_in_any_order_and_more_than_once(generator: torch.Generator) -> None:
    case = conv_case(4, block=(16, 16), images=2, dtype=torch.float32)
    block, shape = case.grid.block, case.shape
    row, col = all_conv_cells(case)
    which = torch.randint(len(row), (20,), generator=generator)
    expected = cpu.conv2d_all_block_norms(case.dy, case.x, block, shape).flatten()[which]

    assert torch.equal(cpu.conv2d_block_norms(case.dy, case.x, row[which], col[which], block, shape), expected)
    nothing = torch.empty(0, dtype=torch.int32)
    assert cpu.conv2d_block_norms(case.dy, case.x, nothing, nothing, block, shape).shape == (0,)
