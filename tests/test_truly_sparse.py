"""Promise 1 of the design: nothing with one entry per element of the dense matrix is ever made in a step.

Peak bytes above inputs and outputs stay within 1.25 times the stored state and index, plus the declared scratch; and no
single tensor is as large as the dense weight. Read off PyTorch's allocator, of linear layers and of convolutions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.cpu import products
from sparsekern.kernels.eager import chunks
from sparsekern.kernels.eager import linear as eager_linear
from torch import Tensor

import sparsekern as sk
from sparsekern.nn import BlockSparse
from sparsekern.topology import dense_block_norms, gather_blocks, to_dense
from tests.memory import Allocations, allocations

SIDE, TOKENS, CHANNELS, IMAGE = 1024, 32, 256, 6
SCRATCH = 2**18
"""The kernels are told to work in a quarter of a MiB: in the usual 16 a dense weight of this size could hide."""

Block = tuple[int, int]


class Kind(NamedTuple):
    """A kind of layer.

    Attributes:
        make: returns a layer of a block and a sparsity.
        input: returns its input.
        dense: bytes of its dense weight.
        largest: bytes that no tensor may reach.
    """

    make: Callable[[Block, float], BlockSparse]
    input: Callable[[], Tensor]
    dense: int
    largest: float


def linear(block: Block, sparsity: float) -> BlockSparse:
    return sk.SparseLinear(SIDE, SIDE, sparsity=sparsity, block_size=block, seed=0)


def conv2d(block: Block, sparsity: float) -> BlockSparse:
    return sk.SparseConv2d(CHANNELS, CHANNELS, 3, padding=1, sparsity=sparsity, block_size=block, seed=0)


def image() -> Tensor:
    return torch.randn(1, CHANNELS, IMAGE, IMAGE).contiguous(memory_format=torch.channels_last).requires_grad_()


DENSE, DENSE_CONV = SIDE * SIDE * 4, CHANNELS * CHANNELS * 9 * 4
KINDS = {
    "linear": Kind(linear, lambda: torch.randn(TOKENS, SIDE, requires_grad=True), DENSE, DENSE),
    "conv2d": Kind(conv2d, image, DENSE_CONV, DENSE_CONV / 4),
}
METHODS = {
    **{kind.__name__: (kind, {}) for kind in (sk.Static, sk.RigL, sk.GSE, sk.MEST, sk.SRigL)},
    "DSR": (sk.DSR, {"threshold": 1.0}),
    "SET": (sk.SET, {"keep_connected": True}),
    "RigL, screened": (sk.RigL, {"scoring": "screen", "sketches": 8}),
    "RigL, some tokens": (sk.RigL, {"score_tokens": 8}),
    "GSE, global": (sk.GSE, {"scope": "global"}),
    **{name: (sk.GSE, {"distribution": name.lower()}) for name in ("GraBo", "GraEst")},
    **{kind.__name__: (kind, {"final_sparsity": 0.995, "stop": 4}) for kind in (sk.Gradual, sk.GraNet)},
    "Gradual, compact": (sk.Gradual, {"final_sparsity": 0.995, "stop": 4, "compact": True}),
}


def stored_bytes(layer: BlockSparse, optimizer: torch.optim.Optimizer | None = None) -> tuple[int, int, int]:
    """Return the bytes of the values, of the index and of the optimizer's state."""
    state = 0 if optimizer is None else sum(s.numel() * 4 for s in optimizer.state[layer.values].values())
    return layer.values.numel() * 4, sum(t.numel() * 4 for t in (layer.row, layer.col, *layer.index)), state


class Training:
    """One layer with its optimizer and a method, and the parts of a step as functions.

    Probes are armed in every step; a method with two stages has heard the first of them, and moves blocks in the next.
    """

    def __init__(self, kind: str, block: Block, sparsity: float, method: str = "SET") -> None:
        self.kind, (make, options) = KINDS[kind], METHODS[method]
        self.layer, self.x = self.kind.make(block, sparsity), self.kind.input()
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), fused=True)  # the others make temporaries
        self.method = make(self.layer, self.optimizer, update_every=1, **options)
        self.dy = torch.randn_like(self.layer(self.x))
        self.forward()
        self.backward()
        self.step()
        self.method.step()

    def forward(self):
        self.y = self.layer(self.x)
        return self.y

    def backward(self):
        self.y.backward(self.dy)

    def step(self):
        self.optimizer.step()

    def update(self):
        moved = self.method.step()  # SRigL grows what it dropped where the gradient is always the same
        assert moved == (type(self.method) is not sk.Static) or type(self.method) is sk.SRigL

    def summary(self):
        self.method.metrics()

    def check(self, part: str, plant: Callable[[BlockSparse], None] | None = None) -> None:
        """Check what ``part`` allocates, after the parts that come before it."""
        parts = ("forward", "backward", "step", "update", "summary")
        if part == "backward":
            self.layer.zero_grad(set_to_none=True)
        for before in parts[: parts.index(part)]:
            getattr(self, before)()
        if plant is not None:
            plant(self.layer)
        allowed = self.allowed(part)
        check_bytes(part, allocations(getattr(self, part)), self.kind.largest, allowed)

    def allowed(self, part: str) -> float:
        """Return the bytes that may be held above what is there already, beside this call's input and output."""
        values, index, state = stored_bytes(self.layer, self.optimizer)
        gradient = values if part == "backward" else 0
        return gradient + 0.25 * (2 * values + index + state) + SCRATCH + (self.x.numel() + self.dy.numel()) * 4


def check_bytes(part: str, found: Allocations, largest: float, allowed: float) -> None:
    assert found.largest < largest, f"{part} makes a tensor of {found.largest} bytes; none may have {largest:.0f}"
    assert found.peak <= allowed, f"{part} holds {found.peak} bytes, allowed are {allowed:.0f}"


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch):
    monkeypatch.setattr(chunks, "SCRATCH_BYTES", SCRATCH)
    monkeypatch.setattr(products, "CHUNK_BYTES", SCRATCH)
    monkeypatch.setattr(eager_linear, "TILE", 128)


@pytest.fixture(params=["cpu", "eager"])
def kernels(request):
    """Run on a backend by name; return its module."""
    backend = sk.ops.BACKENDS[request.param]
    for op in KINDS:
        if (reason := backend.why_not(op, torch.device("cpu"), torch.float32, (32, 32))) is not None:
            pytest.skip(reason)
    with sk.backend(request.param):
        yield backend


def test_the_shape_is_one_that_the_promise_covers():
    assert SIDE // 64 >= 16 and TOKENS * SIDE < SIDE * SIDE / 4


@pytest.mark.parametrize("part", ["forward", "backward", "step", "update", "summary"])
@pytest.mark.parametrize(
    ("kind", "block", "sparsity"),
    [
        *(("linear", *given) for given in [((32, 32), 0.9), ((64, 64), 0.75), ((16, 32), 0.95), ((1, 1), 0.99)]),
        *(("conv2d", *given) for given in [((16, 16), 0.9), ((1, 1), 0.99)]),
    ],
    ids=str,
)
def test_a_step(part, kind, block, sparsity, kernels):
    Training(kind, block, sparsity).check(part)


@pytest.mark.parametrize("part", ["forward", "backward"])
@pytest.mark.parametrize("block", [(16, 16), (32, 32), (16, 32)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_without_an_optimizer(kind, part, block, kernels):
    """A quarter of the values and the index, and at most three activations: y or dx, dy, and a copy of one."""
    layer, x = KINDS[kind].make(block, 0.9), KINDS[kind].input()
    layer(x).sum().backward()
    layer.zero_grad(set_to_none=True)
    values, index, _ = stored_bytes(layer)
    activations = 3 * x.numel() * 4
    if part == "forward":
        found, allowed = allocations(lambda: layer(x)), 0.25 * (values + index)
    else:
        y = layer(x)
        dy = torch.ones_like(y)
        found, allowed = allocations(lambda: y.backward(dy)), values + 0.25 * (2 * values + index)
    check_bytes(part, found, DENSE_CONV / 4, allowed + SCRATCH + activations)


@pytest.mark.parametrize("part", ["backward", "update"])
@pytest.mark.parametrize(
    ("kind", "method", "block"),
    [
        (kind, method, block)
        for kind, large in (("linear", (32, 32)), ("conv2d", (16, 16)))
        for method in METHODS
        for block in (large, (1, 1))
        if method != "SET"
        and not (
            method.startswith(("RigL", "SRigL", "GraNet")) and block == (1, 1)
        )  # which asks for allow_dense_scores
    ],
    ids=str,
)
def test_a_method(kind, method, block, part, kernels):
    """The step that leads to an update, probe and all, and the update itself."""
    Training(kind, block, 0.99 if block == (1, 1) else 0.9, method).check(part)


@pytest.mark.parametrize(("block", "sparsity"), [((8, 8), 0.75), ((8, 8), 0.9), ((16, 16), 0.95), ((4, 8), 0.75)])
@pytest.mark.parametrize("method", ["RigL", "RigL, 16 sketches"])
def test_scores_of_small_blocks(method, block, sparsity, monkeypatch):
    """Norms, and the first stage of screening, which takes as many sketches as may be."""
    monkeypatch.setitem(METHODS, "RigL, 16 sketches", (sk.RigL, {"scoring": "screen"}))
    with sk.backend("eager"):
        training = Training("linear", block, sparsity, method)
        if training.method.stages() == 2:
            for part in (training.forward, training.backward, training.step, training.update):
                part()
            assert training.layer.probe.kind == "sketch"
        training.forward()
        training.layer.zero_grad(set_to_none=True)
        allowed = training.allowed("backward")
        check_bytes("backward", allocations(training.backward), DENSE, allowed)
        training.step()
        found, allowed = allocations(training.method.step), training.allowed("update")
        check_bytes("update", found, DENSE, allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_hold_no_gradient(kind, kernels):
    x, name = KINDS[kind].input().detach(), sk.ops.requested_backend()
    row, col = torch.arange(16, dtype=torch.int32), torch.arange(16, dtype=torch.int32)
    u, v, args = torch.randn(8, SIDE), torch.randn(8, SIDE), (32, 32, name)
    if kind == "conv2d":
        u, v, args = torch.randn(8, CHANNELS), torch.randn(8, 9 * CHANNELS), (16, 16, name)
        args = (*args, conv2d((16, 16), 0.9).conv_shape)
    for score in (
        lambda: sk.ops.all_block_norms(x, x, *args),
        lambda: sk.ops.block_norms(x, x, row, col, *args),
        lambda: sk.ops.sketch(x, x, u, v, *args),
    ):
        found = allocations(score)
        assert found.largest <= KINDS[kind].dense / 4 and found.peak < KINDS[kind].dense / 2


# The native scratch, which no allocator of PyTorch sees: the library says itself what it holds.


@pytest.mark.parametrize("block", [(32, 32), (1, 1)], ids=str)
def test_the_native_scratch_is_the_stored_blocks_and_panels_of_tokens(block):
    """A dense weight has 64 MiB here."""
    if (reason := cpu.why_not("linear", torch.device("cpu"), torch.float32, block)) is not None:
        pytest.skip(reason)
    layer = sk.SparseLinear(4096, 4096, sparsity=0.95, block_size=block, seed=0)
    x = torch.randn(64, 4096, requires_grad=True)
    cpu.release_scratch()
    with sk.backend("cpu"):
        layer(x).sum().backward()
        layer(x[:1]).sum().backward()

    lists, tokens = (4, 256) if block == (1, 1) else (1, 64)  # copies of the entries; tokens of a packed panel
    panels = 2 * 4096 * tokens * 4
    assert 0 < cpu.scratch_bytes() <= lists * layer.values.numel() * 4 + panels + 2 * 2**21  # in pieces of 2 MiB


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


class SamplerStep:
    """A layer that stores twice as many blocks as remain, and the parts of a step of VR-PGE or Top-KAST."""

    def __init__(self, kind: str, block: Block, sparsity: float, method: type[sk.Method] = sk.VRPGE) -> None:
        self.layer, self.x = KINDS[kind].make(block, 1 - 2 * (1 - sparsity)), KINDS[kind].input()
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), fused=True)
        # At 1x1 a unit is a single value, beside which the sums of a sort are large.
        how = {"floor": 0.05, "projection": "bisection" if block == (1, 1) else "sort"} if method is sk.VRPGE else {}
        self.method = method(self.layer, self.optimizer, sparsity=sparsity, update_every=1, **how)
        for part in ("backward", "step", "update"):
            getattr(self, part)()

    def backward(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.x.grad = None
        self.method.backward(lambda: self.layer(self.x).square().mean())

    def step(self):
        self.optimizer.step()

    def update(self):
        self.method.step()

    def finish(self):
        assert self.method.finish()

    def allowed(self, part: str) -> float:
        """Return a quarter of what is stored; the gradient and the index of a mask; in VR-PGE's step sampled blocks."""
        values, index, state = stored_bytes(self.layer, self.optimizer)
        stored = 2 * values + state + index
        masks = getattr(self.method, "_masks", None)
        more = {"backward": values + 2 * index, "step": 0 if masks is None else float(masks[0].float().mean()) * stored}
        return 0.25 * stored + more.get(part, 0) + SCRATCH + 6 * self.x.numel() * 4


@pytest.mark.parametrize("part", ["backward", "step", "update", "finish"])
@pytest.mark.parametrize(
    ("kind", "block"),
    [*(("linear", b) for b in [(32, 32), (16, 32), (1, 1)]), *(("conv2d", b) for b in [(16, 16), (1, 1)])],
    ids=str,
)
@pytest.mark.parametrize("method", [sk.VRPGE, sk.TopKAST])
def test_a_step_with_a_part_of_the_blocks(part, kind, block, method, kernels):
    training = SamplerStep(kind, block, 0.99 if block == (1, 1) else 0.9, method)
    if part in ("step", "update"):
        training.backward()
    if part == "update":
        training.step()
    allowed = training.allowed(part)
    check_bytes(part, allocations(getattr(training, part)), KINDS[kind].dense / 4, allowed)


# The control: the same checks, with the dense weight or gradient formed on the way.


def module_of(kernels, layer):
    return kernels.kernels(getattr(layer, "conv_shape", LinearShape(SIDE, SIDE)))


def plant_forward(monkeypatch, kernels, layer):
    def linear(x, values, bias, index, geometry):
        return torch.nn.functional.linear(x, to_dense(layer.topology, values), bias)

    def conv2d(x, values, bias, index, geometry):
        return layer.dense_forward(x, to_dense(layer.topology, values))

    monkeypatch.setattr(module_of(kernels, layer), "fwd", conv2d if hasattr(layer, "conv_shape") else linear)


def plant_backward(monkeypatch, kernels, layer):
    dx = module_of(kernels, layer).dx

    def linear(dy, x, values, index, geometry):
        return dx(dy, values, index, geometry), gather_blocks(layer.topology, dy.T @ x)

    def conv2d(dy, x, values, index, geometry):
        weight = torch.nn.grad.conv2d_weight(x, layer.weight.shape, dy, padding=1)
        return dx(dy, values, index, geometry, (x.shape[2], x.shape[3])), gather_blocks(layer.topology, weight)

    monkeypatch.setattr(module_of(kernels, layer), "backward", conv2d if hasattr(layer, "conv_shape") else linear)


def plant_update(monkeypatch, kernels, layer):
    def block_norms(layer):
        return dense_block_norms(layer.grid, layer.dense_weight())[layer.row.long(), layer.col.long()]

    monkeypatch.setattr(sys.modules["sparsekern.training.base"], "block_norms", block_norms)


@pytest.mark.parametrize(
    ("part", "plant"), [("forward", plant_forward), ("backward", plant_backward), ("update", plant_update)]
)
@pytest.mark.parametrize(("kind", "method"), [("linear", "SET"), ("conv2d", "GSE")])
def test_a_densifying_line_is_found(kind, method, part, plant, kernels, monkeypatch):
    block = (32, 32) if kind == "linear" else (16, 16)
    Training(kind, block, 0.9, method).check(part)
    with pytest.raises(AssertionError, match=f"{part} makes a tensor of"):
        Training(kind, block, 0.9, method).check(part, lambda layer: plant(monkeypatch, kernels, layer))


def test_a_step_of_vrpge_that_multiplies_a_dense_weight_by_a_mask_is_found(kernels, monkeypatch):
    training = SamplerStep("linear", (32, 32), 0.9)
    plant_forward(monkeypatch, kernels, training.layer)
    assert allocations(training.backward).largest >= DENSE
