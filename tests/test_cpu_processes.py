"""The native CPU kernels in a program: several Python threads, forks, data loaders, a long run, freed memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.cpu import library

from tests.oracle import Case, random_case

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=library.load()[1])
linux_only = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs fork and Linux's /proc")

ROOT = Path(__file__).parent.parent
PAGE = 4096


def all_three(case: Case) -> list[torch.Tensor]:
    grid, index = case.grid, case.index
    return [
        cpu.products.fwd(case.x, case.values, case.bias, index, case.geometry),
        cpu.products.dx(case.dy, case.values, index, case.geometry),
        cpu.products.dvalues(case.dy, case.x, index, grid.block, case.geometry, case.values.dtype),
    ]


def run(code: str) -> str:
    """Run a program of its own: what it does to threads and memory ends with it, and so does what hangs."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("count", [1, 2])
def test_several_python_threads_at_once(count: int, threads) -> None:
    """Each gets its own scratch; shapes differ, so that one on another's memory would show."""
    threads(count)
    blocks = ((1, 1), (16, 16), (32, 32), (64, 16))
    cases = [random_case(seed, block=blocks[seed % 4], dtype=torch.float32, tokens=65) for seed in range(16)]
    expected = [all_three(case) for case in cases]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, wanted in zip(pool.map(all_three, cases), expected, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


SETTING = """
import os, sys, threading, time
import torch
import sparsekern as sk
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape

torch.set_num_threads(2)
layer = sk.SparseLinear(512, 512, block_size=32, sparsity=0.5, seed=0)
values, index = layer.values.detach(), layer.index
x = torch.randn(300, 512)
sizes = LinearShape(512, 512)
call = lambda: (cpu.products.fwd(x, values, None, index, sizes), cpu.products.dx(x, values, index, sizes),
                cpu.products.dvalues(x, x, index, (32, 32), sizes, torch.float32))
expected = call()  # on two threads, which live on and which no child will have

def right():
    found = call()
    torch.set_num_threads(1)  # PyTorch's own loops on several threads would hang in a child, as they always do
    same = all(torch.equal(a, b) for a, b in zip(found, expected))
    torch.set_num_threads(2)
    return same

def end_of(child, seconds=30):
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    return "hangs"
"""

FORK = """
for _ in range(3):
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if right() else 3)
        os._exit(0 if right() and end_of(grandchild) == 0 else 4)
    print(end_of(child), right(), flush=True)
"""

FORK_WHILE_CALLING = """
stop = False
def call_on():
    while not stop:
        call()
callers = [threading.Thread(target=call_on) for _ in range(2)]
for caller in callers:
    caller.start()
ends = []
for _ in range(20):
    child = os.fork()
    if child == 0:
        os._exit(0 if right() else 3)
    ends.append(end_of(child))
stop = True
for caller in callers:
    caller.join()
print(set(ends), right())
"""

FORK_WHILE_SCRATCH_COMES_AND_GOES = """
torch.set_num_threads(1)
stop = False
def grow_and_release():
    while not stop:
        cpu.products.fwd(x[:16], values, None, index, sizes)
        cpu.release_scratch()
other = threading.Thread(target=grow_and_release)
other.start()
ends = []
for _ in range(150):
    child = os.fork()
    if child == 0:
        cpu.products.fwd(x[:16], values, None, index, sizes)
        os._exit(0)
    ends.append(end_of(child))
stop = True
other.join()
print(set(ends))
"""

FIRST_IN_CHILD = """
from sparsekern.kernels.cpu import library
del os.environ["SPARSEKERN_CPU"]
library.load.cache_clear()
assert "_sparsekern_cpu" not in open("/proc/self/maps").read()
torch.relu(torch.randn(4000, 1000))  # PyTorch's loop on two threads
child = os.fork()
if child == 0:
    call()
    os._exit(0)
print(end_of(child))
"""

LOADER = """
class Multiplied(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, item):
        return cpu.products.fwd(x + item, values, None, index, sizes)[:4]

alone = [Multiplied()[item] for item in range(8)]
loader = torch.utils.data.DataLoader(
    Multiplied(), num_workers=2, batch_size=None, timeout=30, multiprocessing_context="fork"
)
print([torch.equal(a, b) for a, b in zip(loader, alone)].count(True), right())
"""


@linux_only
def test_forks_and_data_loaders() -> None:
    """Children and grandchildren; workers; forks while others are in a call, and while the scratch comes and goes."""
    said = run(SETTING + FORK + LOADER + FORK_WHILE_CALLING + FORK_WHILE_SCRATCH_COMES_AND_GOES)
    assert said.splitlines() == ["0 True"] * 3 + ["8 True", "{0} True", "{0}"]


@linux_only
def test_a_child_that_is_the_first_to_open_the_library() -> None:
    """A layer orders its places with the library, so the parent makes it without."""
    without = 'os.environ["SPARSEKERN_CPU"] = "off"'
    setting = SETTING.replace("expected = call()", "# ").replace("layer = ", f"{without}\nlayer = ")
    assert run(setting + FIRST_IN_CHILD) == "0\n"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@linux_only
def test_ten_thousand_calls_of_changing_shapes_leave_memory_as_it_was() -> None:
    cases = [random_case(s, block=((1, 1), (16, 16))[s % 2], rows=2, cols=2, dtype=torch.float32) for s in range(40)]
    ready = [(c, c.index) for c in cases]

    def calls(number: int) -> None:
        for n in range(number):
            case, index = ready[n % len(ready)]
            cpu.products.fwd(case.x, case.values, case.bias, index, case.geometry)
            cpu.products.dvalues(case.dy, case.x, index, case.grid.block, case.geometry, torch.float32)

    calls(1000)
    before, scratch = resident(), library.scratch_bytes()
    calls(5000)

    assert resident() - before < 2**20
    assert library.scratch_bytes() == scratch


@linux_only
def test_threads_that_come_and_go_share_the_scratch() -> None:
    case = random_case(1, block=(32, 32), dtype=torch.float32, tokens=65)
    library.release_scratch()
    for _ in range(20):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(all_three, [case] * 8))

    assert library.scratch_bytes() <= 4 * 2**21  # as many pieces as ever ran at the same time
    library.release_scratch()
    assert library.scratch_bytes() == 0


# Freed memory stays with the process: page faults tell.


FAULTS = """
import resource, torch
import sparsekern as sk

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        large = [torch.ones(size << 18) for size in (8, 40, 70)]  # MiB
        del large
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
assert sk.keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="only glibc can be told so")
def test_large_tensors_are_not_faulted_in_anew() -> None:
    """Without it the 1.2 GB are faulted in anew: 300,000 pages, or 600 huge ones."""
    assert int(run(FAULTS)) < 100


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not cpu.keep_freed_memory()


def test_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not cpu.keep_freed_memory()
