"""The launchers of norms and sketches of a convolution: order, panels, and nothing to do."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import conv2d
from sparsekern.kernels.gpu.linear import PROJECTED

from tests.device import DEVICE
from tests.gpu_conv2d_checks import check_sketches, edge_case, norms_of
from tests.oracle import signs


def test_norms_in_any_order() -> None:
    case = edge_case(images=1, height=3, width=3, kernel=(1, 2))
    order = torch.arange(case.grid.cells)

    assert torch.equal(norms_of(case, order), norms_of(case, order.flip(0)))


def test_scores_of_no_images_are_zero_and_no_blocks_have_no_norms() -> None:
    case = edge_case(images=0)
    here, none = case.on(DEVICE), torch.empty(0, dtype=torch.int32, device=DEVICE)
    u, v = signs(2, case.shape.out_channels, 0).to(DEVICE), signs(2, case.grid.in_features, 1).to(DEVICE)
    zeros = torch.zeros(case.grid.rows, case.grid.cols)

    assert torch.equal(gpu.conv2d.all_block_norms(here.dy, here.x, (16, 16), case.shape).cpu(), zeros)
    assert torch.equal(gpu.conv2d.sketch(here.dy, here.x, u, v, (16, 16), case.shape).cpu(), zeros.expand(2, -1, -1))
    assert gpu.conv2d.block_norms(here.dy, here.x, none, none, (16, 16), case.shape).shape == (0,)
    assert not norms_of(case, torch.arange(case.grid.cells)).any()


def test_a_sketch_of_no_directions_is_empty() -> None:
    case = edge_case(images=1)
    here, none = case.on(DEVICE), torch.empty(0, 1, device=DEVICE)

    shape = gpu.conv2d.sketch(here.dy, here.x, none, none, (16, 16), case.shape).shape
    assert shape == (0, case.grid.rows, case.grid.cols)


def test_sketches_over_several_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at least one tile of pixels each, over the end of images."""
    monkeypatch.setattr(conv2d, "SKETCH_BYTES", 1)
    panels = []
    healthy = conv2d._project
    monkeypatch.setattr(conv2d, "_project", lambda *args: panels.append(args[2]) or healthy(*args))

    check_sketches(edge_case(images=3, groups=2, group_out=20, group_in=20))

    assert panels == [(0, PROJECTED), (PROJECTED, 105 - PROJECTED)]
