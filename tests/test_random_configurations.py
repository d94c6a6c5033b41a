"""Everything at once: random shapes, edges, layouts, dtypes and capacities against the float64 oracle."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager

from tests.oracle import DTYPES, X_LAYOUTS, check_kernels, check_op, random_case

SEEDS, GROUP = range(200), 10

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("start", SEEDS[::GROUP])
def test_random_configurations(start: int) -> None:
    for seed in range(start, start + GROUP):
        case = random_case(seed)
        try:
            check_kernels(eager, case)
            check_op(case)
        except Exception as error:
            raise AssertionError(f"random_case({seed}): {error}") from error


def test_the_configurations_cover_what_they_should() -> None:
    cases = [random_case(seed) for seed in SEEDS]

    assert {case.x.dtype for case in cases} == set(DTYPES)
    assert {case.x.shape[0] for case in cases} >= {0, 1, 7}
    assert {case.grid.block for case in cases} >= {(1, 1), (128, 128), (128, 16)}
    assert len({case.x.stride() for case in cases}) >= len(X_LAYOUTS)
    for what, holds in {
        "a bias": [case.bias is not None for case in cases],
        "an edge": [case.grid.has_edge for case in cases],
        "free slots": [bool((case.row < 0).any()) for case in cases],
        "an empty block row": [bool((case.stored.sum(1) == 0).any()) for case in cases],
        "an empty block column": [bool((case.stored.sum(0) == 0).any()) for case in cases],
        "dy of stride 0": [case.dy.numel() > 0 and 0 in case.dy.stride() for case in cases],
        "x not contiguous": [not case.x.is_contiguous() for case in cases],
    }.items():
        assert 20 <= sum(holds) <= 190, f"{what}: {sum(holds)} of {len(cases)}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_of_no_tokens_has_zero_gradients(dtype: torch.dtype) -> None:
    case = random_case(1, tokens=0, block=(4, 4), dtype=dtype, bias=True)
    values = case.values.requires_grad_()
    torch.ops.sparsekern.linear(
        case.x, values, case.bias, list(case.index), list(case.geometry), "auto"
    ).sum().backward()
    assert values.grad is not None
    assert not values.grad.any()
