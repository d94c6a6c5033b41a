"""The launchers of the convolution: what they make when there is nothing to do, and the layout of the results."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import conv2d, tables
from sparsekern.kernels.gpu.config import Config, Problem

import sparsekern
from tests.device import DEVICE
from tests.gpu_checks import forced
from tests.gpu_conv2d_checks import GATHER, check_far_pixels, check_kernels, edge_case, whole_case
from tests.oracle import check_op
from tests.oracle_conv2d import conv_case


@pytest.mark.parametrize("seed", range(8))
def test_drawn_convolutions(seed: int) -> None:
    """Of any kernel, stride, padding and dilation; without images, too."""
    check_kernels(conv_case(seed, block=(16, 16), groups=1 + seed % 2, group_out=21, group_in=24, dtype=torch.float32))


def test_the_op_runs_on_these_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the choice of a backend, forward and backward."""
    asked: list[str] = []

    def choose(problem: Problem, launch: object) -> Config:
        asked.append(problem.kernel)
        return GATHER[problem.kernel == "conv2d_dvalues"]

    monkeypatch.setattr(tables, "choose", choose)
    with sparsekern.backend("gpu"):
        check_op(edge_case(stride=(2, 2), images=1), DEVICE)
    assert sorted(asked) == ["conv2d_dvalues", "conv2d_dx", "conv2d_fwd"]


def test_pixels_behind_the_element_2_to_the_31() -> None:
    check_far_pixels()


def test_no_blocks_are_the_bias_and_zeros() -> None:
    case = whole_case(images=1, free=0)
    here = case.on(DEVICE)
    none = here.values[:0]
    index = here.index._replace(
        row_ptr=torch.zeros_like(here.index.row_ptr), col_ptr=torch.zeros_like(here.index.col_ptr),
        **{name: getattr(here.index, name)[-16:] for name in ("row_col", "row_slot", "col_row", "col_slot")},
    )  # fmt: skip
    with forced(*GATHER):
        y = gpu.conv2d.fwd(here.x, none, here.bias, index, case.shape)
        dx = gpu.conv2d.dx(here.dy, none, index, case.shape, case.size)
        dvalues = gpu.conv2d.dvalues(here.dy, here.x, index, (16, 16), case.shape, torch.float32)
    assert torch.equal(y, here.bias.view(1, -1, 1, 1).expand_as(y)) and not dx.any() and dvalues.shape == (0, 16, 16)


def test_the_gradient_of_no_images_is_zero() -> None:
    case = edge_case(images=0)
    here = case.on(DEVICE)
    assert not gpu.conv2d.dvalues(here.dy, here.x, here.index, (16, 16), case.shape, torch.float32).any()


def test_problems_are_counted_by_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2 x 5 x 7 pixels a phase has up to 2 x 3 x 4; blocks are shared by 4 phases of 3 blocks of channels."""
    asked: list[Problem] = []
    healthy = tables.choose
    monkeypatch.setattr(tables, "choose", lambda problem, launch: asked.append(problem) or healthy(problem, launch))
    case = edge_case(stride=(2, 2), blocks=46, free=2)
    here = case.on(DEVICE)
    conv2d.dx(here.dy, here.values, here.index, case.shape, case.size)
    assert [(p.kernel, p.log2_tokens, p.log2_blocks) for p in asked] == [("conv2d_dx", 5, 2)]
