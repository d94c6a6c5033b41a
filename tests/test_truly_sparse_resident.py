"""Promise 1 of the design by resident memory of a process, native scratch included: at 1x1, 2x2, 16 and 32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"
)

PEAK = """
import ctypes, json, sys, torch, sparsekern as sk

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

def forget_peak():
    open("/proc/self/clear_refs", "w").write("5")
"""

AROUND = (
    PEAK
    + """
from sparsekern.topology import index, topology
from sparsekern.training.vrpge import candidates, projection, sampling

try:
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
except (OSError, AttributeError):
    pass
block, folder, planted = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "dense"
SIDE = 4096
held = {}

def measure(name, run):
    forget_peak()
    before = status("VmRSS")
    result = run()
    if planted and name == "a layer":
        sk.topology.to_dense(result.topology, result.values)
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
    return layer.values.numel()

around(256, lambda name, run: run())  # libraries, and what is made once
stored = around(SIDE, measure)
print(json.dumps({"held": held, "stored": stored}))
"""
)

RESIDENT = """
import sys, torch, sparsekern as sk

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024

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
before = peak()
stored = train(kind, 8192, 0.95, sys.argv[2] == "dense")
print(peak() - before, stored)
"""

BUILDING, WORKING, LOADING = 48, 12, 24
"""Bytes a stored element, as in :mod:`tests.test_truly_sparse_building`."""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("planted", [False, True], ids=["sparse", "a dense weight planted"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_training(kind, planted):
    """8192 x 8192 at 95 %: 256 MiB dense, 52 MiB of values, gradient and Adam's two moments.

    The convolution of 2048 -> 2048 channels: 144 MiB dense, 29 MiB.
    """
    done = run(RESIDENT, kind, "dense" if planted else "sparse")
    grown, stored = (int(number) for number in done.split())
    activations = 8 * 64 * 8192 * 4  # x, y, their gradients, the loss's square and its gradient, and two copies
    allowed = 1.25 * stored + 16 * 2**20 + activations
    assert (grown <= allowed) == (not planted), f"grew by {grown / 2**20:.0f} MiB, allowed {allowed / 2**20:.0f}"


@pytest.mark.parametrize(("block", "planted"), [(1, False), (2, False), (16, False), (32, False), (32, True)])
def test_around_the_steps(block, planted, tmp_path):
    """4096 x 4096 at 95 %: 64 MiB dense, 3.2 MiB of values. Chunks of scratch, and a heap that is cut, are 8 MiB."""
    found = json.loads(run(AROUND, str(block), str(tmp_path), "dense" if planted else "sparse"))
    stored = found["stored"]
    allowed = {"save": LOADING, "load_": LOADING, "a layer": BUILDING} | {
        name: BUILDING for name in found["held"] if name.endswith("built")
    }
    over = {
        name: f"{held / 2**20:.1f} MiB, {held / stored:.0f} bytes a stored element"
        for name, held in found["held"].items()
        if held > allowed.get(name, WORKING) * stored + 8 * 2**20
    }
    assert (not over) == (not planted), over
