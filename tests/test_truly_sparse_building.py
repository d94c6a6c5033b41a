"""Promise 1 of the design around the steps: building, counting, checking, saving, loading, choosing; at all blocks.

First by the peak of PyTorch's allocator, less what is still there at the end, which was asked for; then by the resident
memory of a process of its own, native scratch included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsekern.kernels.eager import places
from torch import nn

import sparsekern as sk
from sparsekern.nn import BlockSparse, init
from sparsekern.topology import topology
from sparsekern.training.vrpge import budget, masks
from tests.memory import allocations
from tests.test_truly_sparse import DENSE, SCRATCH, SIDE, TOKENS, small_scratch

__all__ = ["small_scratch"]  # a fixture, used by every test

BLOCKS = [1, 2, 16, 32]
SPARSITY = 0.95
STORED = SIDE * SIDE // 20

BUILDING, WORKING, LOADING = 48, 12, 24
"""Bytes a stored element that a call may hold beside what it leaves: to load are 12 bytes an element in the file."""


def layer(block: int, sparsity: float = SPARSITY) -> sk.SparseLinear:
    return sk.SparseLinear(SIDE, SIDE, sparsity=sparsity, block_size=block, seed=0)


def conv2d(block: int) -> sk.SparseConv2d:
    """As many elements: 256 channels to 455, of 3 x 3."""
    return sk.SparseConv2d(256, 455, 3, sparsity=SPARSITY, block_size=block, seed=0)


def check(run: Any, allowed: float, stored: int = STORED) -> None:
    """Run, and check what it held above what it leaves."""
    found = allocations(run)
    assert found.largest < DENSE / 4, f"a tensor of {found.largest} bytes; the dense weight has {DENSE}"
    held = found.peak - max(0, found.kept)
    assert held <= allowed * stored + SCRATCH, f"{(held - SCRATCH) / stored:.1f} bytes a stored element above the rest"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """What is done some slots or units at a time is done in few: layers of this size are not larger than a chunk."""
    for module in (init, topology, places, budget, masks):
        monkeypatch.setattr(module, "CHUNK", 2**11)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("how", ["balanced", "random"])
def test_a_layer(block, how):
    check(lambda: sk.SparseLinear(SIDE, SIDE, sparsity=SPARSITY, block_size=block, init=how, seed=0), BUILDING)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_layer_without_the_native_library(block, monkeypatch):
    """Sorts: 8 bytes for each position, beside the numbers."""
    monkeypatch.setenv("SPARSEKERN_CPU", "off")
    check(lambda: layer(block), 1.5 * BUILDING)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sparsity", [0.3, 0.75])
def test_a_layer_with_many_blocks(block, sparsity):
    """Also where most places hold a block, and those that hold none are drawn."""
    stored = int((1 - sparsity) * SIDE * SIDE)
    found = allocations(lambda: layer(block, sparsity))
    assert found.peak - found.kept <= BUILDING * stored + SCRATCH


@pytest.mark.parametrize("block", BLOCKS)
def test_a_convolution(block):
    check(lambda: conv2d(block), BUILDING)


@pytest.mark.parametrize("block", BLOCKS)
def test_sparsify(block):
    """On the meta device there is no dense weight; the layers come on the CPU."""
    model = nn.Sequential(nn.Linear(SIDE, SIDE, bias=False, device="meta"))
    sk.sparsify_(model, SPARSITY, block)
    check(lambda: model.to_empty(device="cpu"), BUILDING)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("make", [layer, conv2d])
def test_counting_and_describing(block, make):
    model = nn.Sequential(make(block))
    check(lambda: str(sk.summary(model, measure=False)), WORKING)
    check(lambda: str(model), WORKING)
    check(lambda: sk.analysis.stored_parameters(model), WORKING)


@pytest.mark.parametrize("block", BLOCKS)
def test_checking_and_resetting(block):
    model = nn.Sequential(layer(block))
    model[0](torch.ones(1, SIDE))
    check(lambda: sk.refresh_(model), WORKING)
    check(model[0].reset_parameters, WORKING)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_state_dict(block):
    model, other = nn.Sequential(layer(block)), nn.Sequential(layer(block))
    check(lambda: other.load_state_dict(model.state_dict()), WORKING)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_file(block, tmp_path):
    model, path = nn.Sequential(layer(block)), tmp_path / "model.safetensors"
    check(lambda: sk.save(model, path), LOADING)
    check(lambda: sk.load_(model, path), LOADING)


METHODS = {
    "Static": (sk.Static, {}),
    "SET": (sk.SET, {}),
    "GSE": (sk.GSE, {}),
    "GSE, global": (sk.GSE, {"scope": "global"}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
    "RigL": (sk.RigL, {}),
    "VRPGE": (sk.VRPGE, {"floor": 0.05}),
    "MEST": (sk.MEST, {}),
    "SRigL": (sk.SRigL, {}),
    "DSR": (sk.DSR, {"threshold": 1.0}),
    "TopKAST": (sk.TopKAST, {}),
    "Gradual": (sk.Gradual, {"final_sparsity": 0.99, "stop": 5}),
    "GraNet": (sk.GraNet, {"final_sparsity": 0.99, "stop": 5, "compact": True}),
    "Gradual, compact": (sk.Gradual, {"final_sparsity": 0.99, "stop": 5, "scope": "global", "compact": True}),
}


class Step:
    """One layer, its optimizer and a method, which updates in every step, and AGENT around it if asked."""

    def __init__(self, name: str, block: int, agent: bool = False) -> None:
        kind, options = METHODS[name]
        self.layer: BlockSparse = layer(block)
        self.x = torch.randn(TOKENS // 4, SIDE)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=0.01, momentum=0.9)
        self.method = kind(self.layer, self.optimizer, update_every=1, **options)
        self.agent = sk.AGENT(self.layer, self.optimizer, method=self.method, gamma=0.5) if agent else None

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).square().mean()

    def refresh(self) -> None:
        assert self.agent is not None
        self.agent.refresh([self.x, 2 * self.x], self.loss)
        self.agent.c = dict.fromkeys(self.agent.c, 0.5)

    def backward(self) -> None:
        (self.agent or self.method).backward(lambda: self.loss(self.x))

    def step(self) -> None:
        self.optimizer.step()
        (self.agent or self.method).step()
        self.optimizer.zero_grad(set_to_none=False)


def skip_rigl(name: str, block: int) -> None:
    if name in ("RigL", "SRigL", "GraNet") and block < 16:
        pytest.skip("scores every place, and asks for allow_dense_scores")


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", METHODS)
def test_a_method(name, block):
    """What it is built with, and three steps: of the last two nothing is for the first time."""
    skip_rigl(name, block)
    model = layer(block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kind, options = METHODS[name]
    check(lambda: kind(model, optimizer, update_every=1, **options), BUILDING)
    training = Step(name, block)
    activations = 6 * training.x.numel() * 4 / STORED
    for _ in range(2):
        training.backward()
        training.step()
    for _ in range(2):
        check(training.backward, WORKING + activations)
        check(training.step, WORKING + 4 + activations)  # and a gradient that comes and goes
    check(training.method.metrics, LOADING)


@pytest.mark.parametrize("block", BLOCKS)
def test_agent(block):
    training = Step("SET", block, agent=True)
    activations = 6 * training.x.numel() * 4 / STORED
    check(training.refresh, WORKING + activations)
    for _ in range(2):
        check(training.backward, WORKING + activations)
        check(training.step, WORKING + activations + 4)
        check(training.refresh, WORKING + activations)


# Resident memory.

on_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"
)


STATUS = """
import ctypes, json, sys, torch, sparsekern as sk

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
"""

AROUND = """
from sparsekern.kernels.eager import places
from sparsekern.topology import topology
from sparsekern.training.vrpge import budget, masks

try:
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
except (OSError, AttributeError):
    pass
folder = sys.argv[1]
SIDE = 4096

def measure(name, run):
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = status("VmRSS")
    result = run()
    held[name] = max(held.get(name, 0), status("VmHWM") - max(before, status("VmRSS")))
    return result

def make(side):
    return sk.SparseLinear(side, side, sparsity=0.95, block_size=block, seed=0)

def around(side, note):
    layer = note("a layer", lambda: make(side))
    model, other = torch.nn.Sequential(layer), torch.nn.Sequential(make(side))
    note("summary", lambda: str(sk.summary(model, measure=False)))
    note("refresh_", lambda: sk.refresh_(model))
    note("load_state_dict", lambda: other.load_state_dict(model.state_dict()))
    note("save", lambda: sk.save(model, folder + "/model.safetensors"))
    note("load_", lambda: sk.load_(model, folder + "/model.safetensors"))
    x = torch.randn(4, side)
    for kind, options in ((sk.SET, {}), (sk.GSE, {}), (sk.VRPGE, {"floor": 0.05})):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        method = note(kind.__name__ + " built", lambda: kind(model, optimizer, update_every=1, **options))
        for step in range(3):
            part = note if step else lambda name, run: run()
            part(kind.__name__ + " backward", lambda: method.backward(lambda: layer(x).square().mean()))
            part("optimizer under " + kind.__name__, optimizer.step)
            part(kind.__name__ + " step", method.step)
            optimizer.zero_grad(set_to_none=False)
        if kind is sk.SET:
            agent = sk.AGENT(model, optimizer, method=method, gamma=0.5)
            for step in range(2):
                part = note if step else lambda name, run: run()
                part("AGENT refresh", lambda: agent.refresh([x, 2 * x], lambda batch: layer(batch).square().mean()))
                agent.c = dict.fromkeys(agent.c, 0.5)
                part("AGENT backward", lambda: agent.backward(lambda: layer(x).square().mean()))
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            agent.close()
        method.close()
    note("a dense weight", lambda: sk.topology.to_dense(layer.topology, layer.values).sum())  # the control
    return layer.values.numel()

found = {}
for block in map(int, sys.argv[2:]):
    around(256, lambda name, run: run())  # libraries, and what is made once
    sk.release_scratch()
    held = {}
    found[block] = {"stored": around(SIDE, measure), "held": held}
print(json.dumps(found))
"""

RESIDENT = """
def linear(side, sparsity):
    layer = sk.SparseLinear(side, side, sparsity=sparsity, block_size=32, seed=0)
    return layer, torch.randn(64, side, requires_grad=True)

def conv2d(side, sparsity):
    layer = sk.SparseConv2d(side // 4, side // 4, 3, padding=1, sparsity=sparsity, block_size=32, seed=0)
    return layer, torch.randn(1, side // 4, 8, 8, requires_grad=True)

def train(kind, side, sparsity, dense):
    layer, x = kind(side, sparsity)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    method = sk.SET(layer, optimizer, update_every=1)
    for _ in range(3):
        y = layer(x)
        if dense:
            y = y + 0 * sk.topology.to_dense(layer.topology, layer.values).sum()
        y.square().mean().backward()
        optimizer.step()
        assert method.step()
        optimizer.zero_grad()
    state = sum(s.numel() * 4 for s in optimizer.state[layer.values].values())
    index = sum(t.numel() * 4 for t in (layer.row, layer.col, *layer.index))
    return 2 * layer.values.numel() * 4 + state + index

kind = {"linear": linear, "conv2d": conv2d}[sys.argv[1]]
train(kind, 1024, 0.5, False)      # libraries, threads and the scratch are there from here on
before = status("VmHWM")
for dense in (False, True):  # the second is the control
    print(train(kind, 8192, 0.95, dense), status("VmHWM") - before)
"""


def resident(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", STATUS + program, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@on_linux
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_training(kind):
    """8192 x 8192 at 95 %: 256 MiB dense, 52 MiB of values, gradient and Adam's two moments.

    The convolution of 2048 -> 2048 channels: 144 MiB dense, 29 MiB. Afterwards a dense weight is planted, and found.
    """
    stored, grown, _, with_dense = map(int, resident(RESIDENT, kind).split())
    activations = 8 * 64 * 8192 * 4  # x, y, their gradients, the loss's square and its gradient, and two copies
    allowed = 1.25 * stored + 16 * 2**20 + activations
    assert grown <= allowed < with_dense, f"{grown / 2**20:.0f}, {allowed / 2**20:.0f}, {with_dense / 2**20:.0f} MiB"


@on_linux
def test_around_the_steps(tmp_path):
    """4096 x 4096 at 95 %: 64 MiB dense, 3.2 MiB of values. Chunks of scratch, and a heap that is cut, are 8 MiB."""
    allowed = {"save": LOADING, "load_": LOADING, "a layer": BUILDING}
    allowed |= {f"{kind.__name__} built": BUILDING for kind in (sk.SET, sk.GSE, sk.VRPGE)}
    for block, found in json.loads(resident(AROUND, str(tmp_path), *map(str, BLOCKS))).items():
        over = {
            name: f"{held / 2**20:.1f} MiB, {held / found['stored']:.0f} bytes a stored element"
            for name, held in found["held"].items()
            if held > allowed.get(name, WORKING) * found["stored"] + 8 * 2**20
        }
        assert list(over) == ["a dense weight"], (block, over)
