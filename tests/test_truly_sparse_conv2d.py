"""Promise 1 of the design for convolutions; as :mod:`tests.test_truly_sparse`, whose parts of a step it runs."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu
from torch import Tensor

import sparsekern as sk
from sparsekern.ops import conv2d_scores
from sparsekern.ops.shapes import pack_shape
from sparsekern.topology import dense_block_norms, gather_blocks, to_dense
from tests.memory import Allocations, allocations
from tests.test_truly_sparse import METHODS, SCRATCH, Training, VrpgeStep, small_scratch

__all__ = ["small_scratch"]  # a fixture, used by every test

# Convolutions: 256 -> 256 channels, 3 x 3; a dense weight has 2.25 MiB, and 36 pixels of activations 36 KiB a tensor.

CHANNELS, IMAGE = 256, 6
DENSE_CONV = CHANNELS * CHANNELS * 9 * 4


def conv_layer(block: tuple[int, int] = (16, 16)) -> sk.SparseConv2d:
    return sk.SparseConv2d(CHANNELS, CHANNELS, 3, padding=1, sparsity=0.9, block_size=block, seed=0)


def conv_peaks(layer: sk.SparseConv2d, part: str) -> tuple[Allocations, float]:
    """Return what a pass allocates, and how much it may."""
    x = torch.randn(1, CHANNELS, IMAGE, IMAGE).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer(x).sum().backward()
    layer.zero_grad(set_to_none=True)
    index = sum(t.numel() * 4 for t in (layer.row, layer.col, *layer.index))
    gradient = layer.values.numel() * 4
    activations = 3 * x.numel() * 4  # y or dx, dy, and a copy of one
    if part == "forward":
        return allocations(lambda: layer(x)), 0.25 * (gradient + index) + SCRATCH + activations
    y = layer(x)
    dy = torch.ones_like(y)
    return allocations(lambda: y.backward(dy)), gradient + 0.25 * (2 * gradient + index) + SCRATCH + activations


def check_conv(layer: sk.SparseConv2d, part: str) -> None:
    found, allowed = conv_peaks(layer, part)
    assert found.largest < DENSE_CONV / 4, f"{part} makes a tensor of {found.largest} bytes"
    assert found.peak <= allowed, f"{part} holds {found.peak} bytes, allowed are {allowed:.0f}"


@pytest.fixture(params=["cpu", "eager"])
def conv_kernels(request):
    """Run convolutions on a backend by name; return its module."""
    backend = sk.ops.BACKENDS[request.param]
    if (reason := backend.why_not("conv2d", torch.device("cpu"), torch.float32, (32, 32))) is not None:
        pytest.skip(reason)
    with sk.backend(request.param):
        yield backend


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (16, 32)], ids=str)
def test_a_convolution_by_the_allocator(part, block, conv_kernels):
    check_conv(conv_layer(block), part)


def test_scores_of_a_convolution_hold_no_gradient(conv_kernels):
    layer, x = conv_layer(), torch.randn(1, CHANNELS, IMAGE, IMAGE)
    row, col = torch.arange(16, dtype=torch.int32), torch.arange(16, dtype=torch.int32)
    u, v = torch.randn(8, CHANNELS), torch.randn(8, 9 * CHANNELS)
    args = (*layer.block_size, pack_shape(layer.conv_shape), sk.ops.requested_backend())
    for score in (
        lambda: conv2d_scores.all_block_norms(x, x, *args),
        lambda: conv2d_scores.block_norms(x, x, row, col, *args),
        lambda: conv2d_scores.sketch(x, x, u, v, *args),
    ):
        found = allocations(score)
        assert found.largest <= DENSE_CONV / 4 and found.peak < DENSE_CONV / 2


def plant_conv_forward(monkeypatch, kernels, layer):
    def fwd(x, values, bias, index, shape):
        return layer.dense_forward(x, to_dense(layer.topology, values))

    monkeypatch.setattr(kernels, "conv2d_fwd", fwd)


def plant_conv_backward(monkeypatch, kernels, layer):
    def backward(dy, x, values, index, shape):
        weight = torch.nn.grad.conv2d_weight(x, layer.weight.shape, dy, padding=1)
        dx = kernels.conv2d_dx(dy, values, index, shape, (x.shape[2], x.shape[3]))
        return dx, gather_blocks(layer.topology, weight)

    monkeypatch.setattr(kernels, "conv2d_backward", backward)


@pytest.mark.parametrize(("part", "plant"), [("forward", plant_conv_forward), ("backward", plant_conv_backward)])
def test_a_densifying_convolution_is_found(part, plant, conv_kernels, monkeypatch):
    layer = conv_layer()
    check_conv(layer, part)
    plant(monkeypatch, conv_kernels, layer)
    with pytest.raises(AssertionError, match=f"{part} makes a tensor of"):
        check_conv(layer, part)


@pytest.mark.parametrize("block", [(32, 32), (1, 1)], ids=str)
def test_the_native_scratch_of_a_convolution_does_not_grow_with_the_images(block):
    """It is the stored blocks and the panels that fit into the caches; beside it there are x, y and their gradients."""
    if (reason := cpu.why_not("conv2d", torch.device("cpu"), torch.float32, block)) is not None:
        pytest.skip(reason)
    layer = sk.SparseConv2d(64, 64, 3, padding=1, sparsity=0.95, block_size=block, seed=0)
    held = []
    for images in (64, 128):
        x = torch.randn(images, 64, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
        cpu.release_scratch()
        with sk.backend("cpu"):
            y = layer(x)
            dy = torch.ones_like(y)
            found = allocations(lambda y=y, dy=dy: y.backward(dy))
        held.append(cpu.scratch_bytes())
        assert found.peak <= x.numel() * 4 + 2 * layer.values.numel() * 4 + SCRATCH  # dx, and less than another image
    assert held[0] == held[1] > 0


class ConvTraining(Training):
    """A step of a convolution and its method."""

    def make(self, block: tuple[int, int], sparsity: float) -> tuple[sk.SparseConv2d, Tensor]:
        layer = sk.SparseConv2d(CHANNELS, CHANNELS, 3, padding=1, sparsity=sparsity, block_size=block, seed=0)
        x = torch.randn(1, CHANNELS, IMAGE, IMAGE).contiguous(memory_format=torch.channels_last)
        return layer, x.requires_grad_()


class ConvVrpgeStep(VrpgeStep):
    """A step of VR-PGE in a convolution."""

    make = ConvTraining.make


def check_method(part: str, block: tuple[int, int], method: str, plant=None) -> None:
    training = ConvTraining(block, 0.99 if block == (1, 1) else 0.9, method)
    found, allowed = training.run(part, plant)
    assert found.largest < DENSE_CONV / 4, (
        f"{part} makes a tensor of {found.largest} bytes, the dense weight {DENSE_CONV}"
    )
    assert found.peak <= allowed, f"{part} holds {found.peak} bytes, allowed are {allowed:.0f}"


PARTS = [
    ("SET", "step"),
    ("SET", "summary"),
    *((method, part) for method in METHODS for part in ("backward", "update")),
]


@pytest.mark.parametrize("block", [(16, 16), (1, 1)], ids=str)
@pytest.mark.parametrize(("method", "part"), PARTS)
def test_every_method_by_the_allocator(method, part, block, conv_kernels):
    if block == (1, 1) and "RigL" in method:
        pytest.skip("scores every element, and says so: allow_dense_scores")
    check_method(part, block, method)


@pytest.mark.parametrize("part", ["backward", "step", "update", "finish"])
@pytest.mark.parametrize("block", [(16, 16), (1, 1)], ids=str)
def test_a_step_of_vrpge_by_the_allocator(part, block, conv_kernels):
    training = ConvVrpgeStep(block, 0.99 if block == (1, 1) else 0.9)
    if part in ("step", "update"):
        training.backward()
    if part == "update":
        training.step()
    allowed = training.allowed(part)
    found = allocations(getattr(training, part))
    assert found.largest < DENSE_CONV / 4, f"{part} makes a tensor of {found.largest} bytes"
    assert found.peak <= allowed, f"{part} holds {found.peak} bytes, allowed are {allowed:.0f}"


def test_an_update_that_densifies_is_found(conv_kernels, monkeypatch):
    """The control."""

    def block_norms(layer):
        return dense_block_norms(layer.grid, layer.dense_weight())[layer.row.long(), layer.col.long()]

    check_method("update", (16, 16), "GSE")
    monkeypatch.setattr("sparsekern.training.base.block_norms", block_norms)
    with pytest.raises(AssertionError, match="update makes a tensor of"):
        check_method("update", (16, 16), "GSE")
