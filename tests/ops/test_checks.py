"""Every error of the op names the argument, its value and the rule."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape

from sparsekern import ops
from sparsekern.ops import Probe
from sparsekern.topology import Grid, balanced, build_index, conv_grid, generator_for

GRID = Grid(8, 12, (4, 4))
COARSE = Grid(8, 12, (4, 6))
TOPOLOGY = balanced(GRID, 3, generator_for(0))
INDEX = build_index(TOPOLOGY)
X, VALUES, BIAS = torch.ones(2, 12), torch.ones(3, 4, 4), torch.ones(8)
ROW, COL = TOPOLOGY.row, TOPOLOGY.col

CASES = [
    (dict(x=torch.ones(2, 11)), ValueError, r"input has shape \(2, 11\); its last axis must be in_features = 12"),
    (dict(x=torch.ones(())), ValueError, r"input has shape \(\)"),
    (dict(values=torch.ones(3, 4, 5)), ValueError, r"values has shape \(3, 4, 5\); it must be \(slots, 4, 4\)"),
    (dict(values=torch.ones(3, 16)), ValueError, r"values has shape \(3, 16\)"),
    (dict(values=torch.ones(5, 4, 4)), ValueError, "the index is for 3 slots in 2 x 3 blocks; values has 5 slots"),
    (dict(index=build_index(balanced(Grid(8, 16, (4, 4)), 3, generator_for(0)))), ValueError,
     "the index is for 3 slots in 2 x 4 blocks"),
    (dict(bias=torch.ones(7)), ValueError, r"bias has shape \(7,\); it must be \(8,\)"),
    (dict(values=torch.ones(3, 4, 4, device="meta")), ValueError, "input is on cpu but values on meta; move one"),
    (dict(bias=torch.ones(8, device="meta")), ValueError, "input is on cpu but bias on meta"),
    (dict(x=torch.ones(2, 12, dtype=torch.int32)), TypeError, "input is torch.int32 and values are torch.float32"),
    (dict(x=X.double()), TypeError, "input is torch.float64 but values are torch.float32; convert one"),
    (dict(bias=BIAS.half()), TypeError, "bias is torch.float16 but values are torch.float32"),
    (dict(probe=Probe("norm", X, ())), ValueError, "probe kind is 'norm'; it must be one of candidates, norms"),
    (dict(probe=Probe.all_norms(COARSE)), ValueError, r"the probe for 'all_norms' has shape \(2, 2\).*\(2, 3\)"),
    (dict(probe=Probe.sketch(COARSE, torch.ones(5, 8), torch.ones(5, 12))), ValueError, r"'sketch'.*\(5, 2, 3\)"),
    (dict(probe=Probe.norms(GRID, ROW, COL)._replace(tensor=torch.zeros(2))), ValueError, r"'norms'.*\(3,\)"),
    (dict(probe=Probe.candidates(COARSE, ROW[:1], COL[:1] * 0)), ValueError, r"'candidates'.*\(1, 4, 4\)"),
    (dict(probe=Probe.magnitudes(COARSE)), ValueError, r"'magnitudes' has shape \(4,\); .* \(5,\)"),
    (dict(probe=Probe.signed_sums(Grid(8, 8, (4, 4)), torch.tensor(1))), ValueError, r"must be \(20,\)"),
    (dict(probe=Probe.all_norms(GRID, device="meta")), ValueError, "input is on cpu but the probe on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), CASES, ids=[c[2][:40] for c in CASES])
def test_errors(change, error, text):
    arguments = dict(x=X, values=VALUES, bias=BIAS, index=INDEX, grid=GRID, probe=None) | change
    with pytest.raises(error, match=text):
        ops.linear(**arguments)


def test_autocast_accepts_what_it_will_cast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(X.half(), VALUES, BIAS, INDEX, GRID).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"float64 but values are torch.float32"):
            ops.linear(X.double(), VALUES, BIAS, INDEX, GRID)


def test_meta_tensors_pass_through():
    """A device that autocast does not know."""
    meta = [t.to("meta") for t in (X, VALUES, BIAS)]
    index = type(INDEX)(*(t.to("meta") for t in INDEX))
    assert ops.linear(*meta, index, GRID).shape == (2, 8)


SHAPE = ConvShape(6, 8, (3, 3))
CONV_GRID = conv_grid(6, 8, (3, 3), (4, 4))
CONV_INDEX = build_index(balanced(CONV_GRID, 3, generator_for(0)))

CONV_CASES = [
    (dict(x=torch.ones(2, 5, 9, 9)), ValueError, r"input has shape \(2, 5, 9, 9\); it must be .* in_channels = 6"),
    (dict(x=torch.ones(6, 9)), ValueError, r"input has shape \(6, 9\); it must be \(N, C, H, W\) or \(C, H, W\)"),
    (dict(x=torch.ones(2, 6, 2, 9)), ValueError, r"\(2, 6, 2, 9\), which is smaller than the kernel \(3, 3\)"),
    (dict(x=torch.ones(6, 9, 2)), ValueError, r"\(6, 9, 2\), which is smaller than the kernel"),
    (dict(shape=SHAPE._replace(groups=2)), ValueError, r"the grid is for .* in 1 groups, .*; make it with conv_grid"),
    (dict(grid=Grid(8, 54, (4, 4))), ValueError, r"the grid is for a weight \(8, 54\)"),
    (dict(values=torch.ones(3, 4, 5)), ValueError, r"values has shape \(3, 4, 5\); it must be \(slots, 4, 4\)"),
    (dict(index=INDEX), ValueError, "the index is for 3 slots in 2 x 3 blocks"),
    (dict(bias=torch.ones(7)), ValueError, r"bias has shape \(7,\); it must be \(8,\)"),
    (dict(x=torch.ones(2, 6, 9, 9).double()), TypeError, "input is torch.float64 but values are torch.float32"),
    (dict(probe=Probe.all_norms(GRID)), ValueError, r"the probe for 'all_norms' has shape \(2, 3\).*\(2, 18\)"),
    (dict(probe=Probe.magnitudes(GRID)), ValueError, r"the probe for 'magnitudes' has shape \(5,\).*\(20,\)"),
]


@pytest.mark.parametrize(("change", "error", "text"), CONV_CASES, ids=[c[2][:40] for c in CONV_CASES])
def test_errors_of_a_convolution(change, error, text):
    arguments = dict(x=torch.ones(2, 6, 9, 9), values=VALUES, bias=BIAS, index=CONV_INDEX, grid=CONV_GRID)
    arguments |= dict(shape=SHAPE, probe=None) | change
    with pytest.raises(error, match=text):
        ops.conv2d(**arguments)
