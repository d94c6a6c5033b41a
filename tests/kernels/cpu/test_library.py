"""Opening the native library: what is chosen, what is refused, and what the user is told."""

from __future__ import annotations

import ctypes
import logging
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import Backend, LinearShape
from sparsekern.kernels.cpu import library

from sparsekern.topology import Grid, balanced, build_index, generator_for
from tests.oracle import random_case

ROOT = Path(__file__).parent.parent.parent.parent
CPU = torch.device("cpu")
BUILT = library._open()[0] is not None
needs_library = pytest.mark.skipif(not BUILT, reason=f"the native library {library._open()[1]}")


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test chooses anew; what was live before is live again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SPARSEKERN_CPU", raising=False)
        library.load.cache_clear()
        yield
    monkeypatch.undo()
    library.load.cache_clear()
    library.load()


class Fake:
    """A library of a machine that has only what ``has`` names, and no memory."""

    def __init__(self, *has: str) -> None:
        self.has = has

    def sk_use(self, name: bytes) -> int:
        return int(name.decode() in self.has)

    def sk_name(self) -> bytes:
        return b"fake"

    def sk_openmp(self) -> int:
        return 0

    def sk_scratch_bytes(self) -> int:
        return 0

    def sk_multiply(self, *calls: Any) -> int:
        return 1

    sk_outer = sk_backward = sk_multiply


def why_not(*, dtype: torch.dtype = torch.float32, block: tuple[int, int] = (32, 32), device: str = "cpu") -> Any:
    return cpu.why_not("linear", torch.device(device), dtype, block)


# What the kernels take.


def test_they_have_every_function_of_the_contract() -> None:
    assert [name for name in vars(Backend) if not name.startswith("_") and not hasattr(cpu, name)] == []


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [(1, 1), (16, 16), (32, 128), (128, 16)])
def test_they_take_the_blocks_and_dtypes_that_they_have(block: tuple[int, int], dtype: torch.dtype) -> None:
    assert why_not(dtype=dtype, block=block) is None
    assert cpu.why_not("conv2d", CPU, dtype, block) is None


@pytest.mark.parametrize("block", [(8, 8), (16, 1), (1, 16), (48, 48), (256, 256)])
def test_other_blocks_are_refused_with_the_reason(block: tuple[int, int]) -> None:
    assert why_not(block=block) == f"blocks are {block[0]}x{block[1]}; it has 1x1 and sides 16, 32, 64, 128"


def test_other_ops_devices_and_dtypes_are_refused_with_the_reason() -> None:
    assert cpu.why_not("attention", CPU, torch.float32, (32, 32)) == "it has no kernels for attention"
    assert why_not(device="meta") == "the tensors are on meta"
    assert "the dtype is torch.float64; it has torch.float32, " in why_not(dtype=torch.float64)


# Which instruction set.


@needs_library
def test_the_best_instruction_set_of_the_machine_is_taken() -> None:
    if platform.machine() != "x86_64" or not Path("/proc/cpuinfo").exists():
        pytest.skip("the instruction sets of x86 are read from Linux's /proc/cpuinfo")
    text = Path("/proc/cpuinfo").read_text()
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}

    bf16 = avx512 | {"avx512_bf16"}
    levels = {
        "amx": bf16 | {"amx_tile", "amx_bf16"},
        "avx512_bf16": bf16,
        "avx512": avx512,
        "avx2": avx2,
        "generic": set(),
    }
    assert library.load()[1] == next(name for name, needs in levels.items() if needs <= flags)


@needs_library
def test_an_instruction_set_can_be_asked_for(instructions: str) -> None:
    assert library.load()[1] == instructions
    assert why_not() is None


@needs_library
def test_only_the_levels_with_instructions_for_it_take_bfloat16(instructions: str) -> None:
    assert library.takes_bfloat16() == (instructions in ("amx", "avx512_bf16", "neon_bf16"))


@pytest.mark.parametrize("wrong", ["AVX2", "sse", "1", " "])
def test_an_unknown_request_names_the_choices(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_CPU", wrong)

    with pytest.raises(
        ValueError,
        match=f"SPARSEKERN_CPU is '{wrong}'; it must be one of amx, avx512_bf16, avx512, avx2, neon_bf16, generic, off",
    ):
        why_not()


def test_off_is_a_reason_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_CPU", "off")

    assert why_not() == "SPARSEKERN_CPU is off"
    assert library.scratch_bytes() == 0
    library.release_scratch()
    with pytest.raises(RuntimeError, match="SPARSEKERN_CPU is off"):
        library.call("sk_multiply", library.Call())


def test_what_the_machine_lacks_is_an_error_and_one_thread_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_open", lambda: (Fake("", "generic"), ""))
    with caplog.at_level(logging.WARNING, "sparsekern"):
        assert library.load() is library.load() and library.load()[1] == "fake"
    assert [record.message for record in caplog.records] == [
        "the native kernels run on one thread: they were built without GCC's OpenMP; build with CXX=g++"
    ]
    library.load.cache_clear()
    monkeypatch.setenv("SPARSEKERN_CPU", "avx512")

    for _ in range(2):  # an error is not remembered as an answer
        with pytest.raises(RuntimeError, match="SPARSEKERN_CPU is 'avx512', but this processor lacks it; unset it"):
            why_not()


# Which file.


def broken(kind: str, folder: Path) -> Path:
    path = folder / "library.so"
    if kind.startswith("cut"):
        whole = library.FILE.read_bytes()
        path.write_bytes(whole[: {"cut at 40": 40, "cut at 5000": 5000, "cut by half": len(whole) // 2}[kind]])
    elif kind == "text":
        path.write_text("not a library")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "foreign":
        return Path(next(Path(torch.__file__).parent.glob("lib/libc10.*")))
    return path


@needs_library
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", r"the native library was not built \(no C\+\+ compiler at installation\?\); install one and run: "),
        ("a folder", "the native library was not built"),
        ("text", "the native library cannot be used: .*"),
        ("cut at 40", "the native library is truncated; build again: "),
        ("cut at 5000", "the native library is truncated; build again: "),
        ("cut by half", "the native library is truncated; build again: "),
        ("foreign", "the native library cannot be used: .*sk_abi"),
    ],
)
def test_a_file_that_cannot_be_used_is_a_reason_and_an_error_when_asked_for(
    kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FILE", broken(kind, tmp_path))

    assert re.match(reason, why_not())
    library.load.cache_clear()
    monkeypatch.setenv("SPARSEKERN_CPU", "generic")
    with pytest.raises(RuntimeError, match=f"SPARSEKERN_CPU is 'generic', but {reason}"):
        why_not()


@needs_library
def test_a_library_of_another_interface_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    real = library.ABI
    monkeypatch.setattr(library, "ABI", real + 1)

    expected = f"the native library has interface {real} and this source needs {real + 1}; build again: "
    assert why_not().startswith(expected)


def test_the_structure_agrees_with_the_header() -> None:
    """Same fields in the same order, 64 bits each."""
    header = re.sub(r"//.*", "", (library.FILE.parent / "csrc" / "api.h").read_text())
    parts = {"Matrix": lambda name: [f"{name}_{part}" for part in fields("Matrix")], "Sizes": lambda _: fields("Sizes")}

    def fields(structure: str) -> list[str]:
        body = re.search(rf"struct {structure} {{(.*?)}};", header, re.DOTALL)
        assert body is not None
        found = []
        for line in filter(str.strip, body[1].split(";")):
            kind, _, names = line.replace("const ", "").strip().partition(" ")
            assert kind in ("int64_t", *parts) or "*" in names, line
            for name in names.replace("*", "").replace(" ", "").split(","):
                pair = [f"{name[:-3]}_rows", f"{name[:-3]}_cols"] if name.endswith("[2]") else [name]
                found += parts[kind](name) if kind in parts else pair
        return found

    assert [name for name, _ in library.Call._fields_] == fields("Call")
    assert all(kind is ctypes.c_int64 for _, kind in library.Call._fields_)


# Memory.


def test_no_memory_for_the_scratch_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(0, block=(16, 16), tokens=7, dtype=torch.float32)
    index = case.index
    monkeypatch.setattr(library, "_open", lambda: (Fake(""), ""))
    library.load.cache_clear()

    with pytest.raises(MemoryError, match="sk_multiply finds no memory for its scratch"):
        cpu.products.fwd(case.x, case.values, None, index, case.geometry)
    with pytest.raises(MemoryError, match="sk_outer finds no memory for its scratch"):
        cpu.products.dvalues(case.dy, case.x, index, (16, 16), case.geometry, torch.float32)
    with pytest.raises(MemoryError, match="sk_backward finds no memory for its scratch"):
        cpu.products.backward(case.dy, case.x, case.values, index, case.geometry)


TOO_LITTLE = """
import resource, torch, sparsekern as sk
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
torch.set_num_threads(1)
layer = sk.SparseLinear(2**19, 16, block_size=16, sparsity=0.999)
x = torch.ones(24, 2**19)
run = lambda: cpu.products.fwd(x, layer.values.detach(), None, layer.index, LinearShape(2**19, 16))
expected = (x @ layer.dense_weight().detach().T)
run()
assert cpu.scratch_bytes() >= 24 * 2**19 * 4
cpu.release_scratch()
assert cpu.scratch_bytes() == 0
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, hard))  # the panel has 48 MiB
try:
    run()
except MemoryError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
torch.testing.assert_close(run(), expected)
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited by what Linux's /proc says")
def test_a_call_that_found_no_memory_leaves_a_library_that_works() -> None:
    done = subprocess.run([sys.executable, "-c", TOO_LITTLE], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert (done.returncode, done.stdout) == (0, "sk_multiply finds no memory for its scratch\n"), done.stderr


@needs_library
def test_the_scratch_is_kept_for_the_next_call_and_can_be_given_back() -> None:
    case = random_case(0, block=(32, 32), tokens=65, dtype=torch.float32)
    library.release_scratch()
    assert library.scratch_bytes() == 0

    y = cpu.products.fwd(case.x, case.values, None, case.index, case.geometry)
    held = library.scratch_bytes()
    again = cpu.products.fwd(case.x, case.values, None, case.index, case.geometry)

    assert torch.equal(y, again)
    assert library.scratch_bytes() == held > 0
    library.release_scratch()
    assert library.scratch_bytes() == 0
    assert torch.equal(cpu.products.fwd(case.x, case.values, None, case.index, case.geometry), y)


# One OpenMP.


ONE_RUNTIME = """
import torch, sparsekern as sk
from sparsekern.kernels.cpu import library
torch.set_num_threads(2)
layer = sk.SparseLinear(512, 512, block_size=32, sparsity=0.5)
layer(torch.ones(300, 512)).sum().backward()
torch.ones(2000, 2000) @ torch.ones(2000, 2000)
assert library.load()[0].sk_openmp()
print(*{line.split()[-1] for line in open("/proc/self/maps")}, sep="\\n")
"""


@needs_library
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is loaded is read from Linux's /proc")
def test_the_library_and_torch_share_one_openmp_runtime() -> None:
    """Two would each start their own threads, twice as many as there are cores."""
    done = subprocess.run([sys.executable, "-c", ONE_RUNTIME], cwd=ROOT, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stderr
    runtimes = [path for path in done.stdout.split() if re.search(r"/lib[gi]?omp[^/]*$", path)]
    assert len(runtimes) == 1, runtimes


def test_a_thread_that_ends_gives_its_scratch_back():
    library.release_scratch()
    x, index = torch.ones(300, 64), build_index(balanced(Grid(64, 64, (16, 16)), 8, generator_for(0)))
    held = []

    def run() -> None:
        cpu.products.fwd(x, torch.ones(8, 16, 16), None, index, LinearShape(x.shape[-1], 64))
        held.append(library.scratch_bytes())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert held[0] > 0
    deadline = time.monotonic() + 10  # join returns a moment before the system's thread is gone
    while library.scratch_bytes() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert library.scratch_bytes() == 0
