"""What the choice of a configuration may depend on, and the names in the tables."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sparsekern.kernels import gpu
from sparsekern.kernels.gpu import tables
from sparsekern.kernels.gpu.config import KINDS, Problem, log2_ceil, package_data, problem
from torch import Tensor

from tests.device import DEVICE
from tests.gpu_checks import HOLES, drawn, dvalues, dx, fwd
from tests.gpu_conv2d_checks import edge_case
from tests.oracle import Case


def of(kernel: str = "fwd", **given: object) -> Problem:
    fields = {"arch": "sm_90", "dtype": "fp16", "bo": 32, "bi": 64, "log2_tokens": 12, "log2_blocks": 3}
    return Problem(kernel, **{**fields, **given})


@pytest.mark.parametrize(
    ("number", "log2"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (1024, 10), (1025, 11), (2**31 + 1, 32)]
)
def test_the_magnitude_of_a_number(number: int, log2: int) -> None:
    assert log2_ceil(number) == log2


@pytest.mark.parametrize(
    ("dtype", "precision", "name"),
    [
        (torch.float16, "tf32", "fp16"),
        (torch.bfloat16, "tf32", "bf16"),
        (torch.float32, "tf32", "fp32"),
        (torch.float32, "ieee", "ieee"),
        (torch.float16, "ieee", "fp16"),
    ],
)
def test_float32_without_tensor_cores_is_another_problem(dtype: torch.dtype, precision: str, name: str) -> None:
    assert problem("fwd", "sm_90", dtype, precision, (16, 16), 1, 1, 1).dtype == name


def test_a_problem_by_hand() -> None:
    """100 slots in 16 rows: up to 7 a row, so at most 8."""
    found = problem("dx", "sm_80", torch.float16, "tf32", (32, 64), 1000, 100, 16)

    assert found == Problem("dx", "sm_80", "fp16", 32, 64, 10, 3)
    assert found.key == "dx fp16 32x64 t10 n3"


def test_keys_name_all_but_the_architecture() -> None:
    """That is the name of the table."""
    base = of()
    others = {"dtype": "fp32", "bo": 16, "bi": 16, "log2_tokens": 3, "log2_blocks": 2}

    assert len({of(**{name: value}).key for name, value in others.items()} | {base.key, of("dx").key}) == 7
    assert of(arch="sm_80").key == base.key


@pytest.mark.parametrize(
    ("kernel", "summed", "kept"),
    [("fwd", 64, 32), ("dx", 32, 64), ("few_dx", 32, 64), ("conv2d_fwd", 64, 32), ("conv2d_dx", 32, 64)],
)
def test_the_sides_of_a_block_in_a_product(kernel: str, summed: int, kept: int) -> None:
    assert (of(kernel).summed, of(kernel).kept) == (summed, kept)


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 2), ("bf16", 2), ("fp32", 4), ("ieee", 4)])
def test_bytes_of_an_element(dtype: str, size: int) -> None:
    assert of(dtype=dtype).itemsize == size


def test_data_that_the_package_does_not_have() -> None:
    assert package_data("sm_1.json") is None
    assert "sm_90" in package_data("devices.json")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """All problems for which a configuration was asked."""
    problems: list[Problem] = []
    healthy = tables.run

    def run(problem: Problem, launch: tables.Launch, exact: Callable[[], Tensor]) -> None:
        problems.append(problem)
        healthy(problem, launch, exact)

    monkeypatch.setattr(tables, "run", run)
    return problems


def run_all(case: Case) -> None:
    fwd(case), dx(case), dvalues(case)
    here, places = case.on(DEVICE), torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    gpu.linear.block_norms(here.dy, here.x, places, places, case.grid.block, case.geometry)
    gpu.linear.all_block_norms(here.dy, here.x, case.grid.block, case.geometry)


def run_all_of_a_convolution() -> None:
    case = edge_case(images=1, height=2, width=2, kernel=(1, 2))
    here, shape, block = case.on(DEVICE), case.shape, case.grid.block
    gpu.conv2d.fwd(here.x, here.values, None, here.index, shape)
    gpu.conv2d.dx(here.dy, here.values, here.index, shape, case.size)
    gpu.conv2d.dvalues(here.dy, here.x, here.index, block, shape, torch.float32)
    places = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    gpu.conv2d.block_norms(here.dy, here.x, places, places, block, shape)
    gpu.conv2d.all_block_norms(here.dy, here.x, block, shape)


def test_every_kernel_asks_under_its_name(asked: list[Problem]) -> None:
    run_all(drawn(HOLES, block=(16, 16), tokens=33))
    run_all(drawn(HOLES, block=(16, 16), tokens=32))

    assert [p.kernel for p in asked[:5]] == ["fwd", "dx", "dvalues", "block_norms", "all_block_norms"]
    run_all_of_a_convolution()
    assert {p.kernel for p in asked} == set(KINDS)


def test_a_topology_that_moves_or_grows_within_a_magnitude_is_the_same_problem(asked: list[Problem]) -> None:
    """HOLES has 8 blocks and 2 free slots in 6 rows; a recompilation every step would be the end of any speed."""
    sizes = {"block": (16, 16), "out_features": 96, "in_features": 96}
    moved = ("x.....", "......", ".....x", "xxxxxx", "......", "......")
    fuller = ("xx....", "x.....", ".....x", "xx....", "....xx", "x.....")

    for pattern, free, tokens in ((HOLES, 2, 33), (moved, 2, 40), (fuller, 0, 64), (fuller, 3, 50)):
        run_all(drawn(pattern, free=free, tokens=tokens, **sizes))

    assert len(asked) == 20
    assert len(set(asked)) == 5


@pytest.mark.parametrize("kernel", KINDS)
def test_what_kind_of_kernel_it_is(kernel: str) -> None:
    assert of(kernel).is_conv2d is kernel.startswith("conv2d")
    assert of(kernel).takes_norms is (kernel in ("block_norms", "conv2d_block_norms"))
