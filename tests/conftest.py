"""What all tests share. A test under ``tests/kernels`` runs in poisoned memory without asking for it.

Where there is no GPU, Triton's interpreter runs its kernels on CPU tensors. Triton reads the variable when it is
imported, so it is set here, before any test module is; importing torch does not import Triton.
"""

from __future__ import annotations

import os
import platform
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Threads that wait sleep. They spin by default: with tests running side by side, on a core that another one needs.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from packaging.version import Version
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Transformers asks for a package of this name and would import our folder, which a checkout has on its path.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

KERNEL_TESTS = Path(__file__).parent / "kernels"
GPU_TESTS = KERNEL_TESTS / "gpu"
LONGEST = (
    *("lab/test_distributed.py", "test_gpu_code.py", "test_fsdp.py", "test_cpu_sanitizers.py", "test_bench_gpu_run.py"),
    *("test_fsdp_checkpoint.py", "test_native_build.py", "test_fsdp_agent.py", "test_method_mutations.py"),
    *("test_gpu_conv2d_mutations.py", "lab/test_hosts.py", "test_true_gradient.py", "test_truly_sparse_building.py"),
    *("training/growth/test_gradient.py", "test_cpu_processes.py", "test_distributed.py", "test_examples.py"),
    *("cli/test_plan.py", "lab/test_train.py", "lab/test_formats.py", "test_distributed_checkpoint.py"),
)
"""Files that take long, though many have few tests: who runs all tests side by side begins with them."""
INTEGER_POISON = 0x5A
"""Byte of an unwritten integer: as int32 it is 1515870810, an index into nothing."""


def pytest_configure() -> None:
    """One thread: a second one that waits for a busy core makes an op on small tensors a hundred times slower."""
    if "TRITON_INTERPRET" in os.environ and find_spec("triton") is not None:
        triton, numpy = (Version(version(name)) for name in ("triton", "numpy"))
        if triton < Version("3.7") and numpy >= Version("2.4"):
            raise pytest.UsageError(
                f"the interpreter of Triton {triton} fails with NumPy {numpy}, which makes no number of an array: "
                "pip install 'numpy<2.4', or a newer Triton"
            )
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell in the background: tests press Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # PyTorch notes its constructors at the first use of a default device: let it be these, not poisoned ones.
    with torch.device("cpu"):
        torch.empty(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: one that began last would be waited for."""
    turns = {Path(__file__).parent / name: turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path, len(turns)))


@pytest.fixture(autouse=True)
def accelerate_forgets() -> Iterator[None]:
    """Reset what accelerate keeps for a process: a Trainer that stopped inside an epoch leaves its loader active."""
    yield
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.GradientState._reset_state()
        state.AcceleratorState._reset_state(True)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN (integers with a large number), so that a cell that nobody wrote is noticed.

    Fresh memory is often zero, and zero is often right.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            fresh = make(*args, **kwargs)
            if fresh.is_floating_point():
                return fresh.fill_(float("nan"))
            if fresh.dtype != torch.bool and not fresh.is_complex():
                return fresh.fill_(int.from_bytes([INTEGER_POISON] * fresh.element_size(), "little"))
            return fresh

        return poison

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _watched_kernel_tests(request: pytest.FixtureRequest) -> None:
    if request.path.is_relative_to(KERNEL_TESTS):
        request.getfixturevalue("poisoned_memory")
    if request.path.is_relative_to(GPU_TESTS):
        request.getfixturevalue("guarded_memory")
        request.getfixturevalue("no_tables")


@pytest.fixture
def guarded_memory() -> Iterator[None]:
    """Let no interpreted kernel touch memory that it was not given."""
    from tests.device import INTERPRETED
    from tests.guard import guarded

    if INTERPRETED:
        with guarded():
            yield
    else:
        yield


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Choose configurations as if nothing had been measured for this user; the folder of the user's tables."""
    from sparsekern.kernels.gpu import tables

    folder = tmp_path / "user" / "tables"
    monkeypatch.setenv("SPARSEKERN_CACHE", str(folder))
    monkeypatch.delenv("SPARSEKERN_AUTOTUNE", raising=False)
    tables.forget()
    yield folder
    tables.forget()


OF_X86 = ("amx", "avx512_bf16", "avx512", "avx2")
INSTRUCTIONS = ("neon_bf16", "generic") if platform.machine() == "aarch64" else (*OF_X86, "generic")


@contextmanager
def _native(instructions: str) -> Iterator[None]:
    """Run the native CPU kernels on an instruction set; skip the test where this machine lacks it."""
    from sparsekern.kernels.cpu import library

    if library._open()[0] is None and os.environ.get("SPARSEKERN_REQUIRE_CPU") != "1":
        pytest.skip(f"the native library {library._open()[1]}")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SPARSEKERN_CPU", instructions)
            library.load.cache_clear()
            try:
                library.load()
            except RuntimeError as error:
                pytest.skip(str(error))
            yield
    finally:
        library.load.cache_clear()
        library.load()  # the library keeps its last choice, and so would all tests that follow


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the native CPU kernels on one instruction set after the other; those that this machine lacks are skipped."""
    with _native(request.param):
        yield request.param


@pytest.fixture(params=["eager", *INSTRUCTIONS])
def backend(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The eager kernels, and the native ones on one instruction set after the other."""
    from sparsekern.kernels import cpu, eager

    if request.param == "eager":
        yield eager
    else:
        with _native(request.param):
            yield cpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the tests of a file and its ranks share."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, folder: Path) -> list[dict[str, Any]]:
    """What ``run_rank`` of the file, called with a rank and a folder, returned in each of ``RANKS`` processes."""
    from tests.ranks import on_ranks

    return on_ranks(request.module.run_rank, request.module.RANKS, folder, folder)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Return ``torch.set_num_threads``; one thread again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator, the same in every test."""
    return torch.Generator().manual_seed(0)
