"""The checks of convolutions turn red when an eager kernel is broken; as :mod:`tests.test_mutations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.eager.windows import Windows
from torch import Tensor

from tests.oracle import check_kernels
from tests.oracle_conv2d import ConvCase, conv_case
from tests.test_mutations import assert_red, dvalues_are_right, dx_is_right, y_is_right

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def case() -> ConvCase:
    """2 groups of 7 x 6 channels in blocks of 4 x 4, kernel 2 x 3, everything else different both ways."""
    given: dict[str, Any] = {"block": (4, 4), "kernel": (2, 3), "stride": (1, 2), "dilation": (2, 1), "groups": 2}
    given |= {"padding": (2, 0, 1, 0), "group_out": 7, "group_in": 6, "height": 5, "width": 8, "images": 2}
    return conv_case(1, **given, blocks=40, free=2, dtype=torch.float32, bias=True)


def mutated_gather(change: Callable[[Windows, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    healthy = Windows.gather

    def gather(self: Windows, buffer: Tensor, group: Tensor, col: Tensor) -> Tensor:
        return healthy(self, buffer, *change(self, group, col))

    return gather


def with_tap(windows: Windows, col: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(col // windows.cols) * windows.cols + col % windows.cols


GATHERS = {
    "the taps in reverse order": lambda w, group, col: (group, with_tap(w, col, lambda tap: 5 - tap)),
    "taps column by column": lambda w, group, col: (group, with_tap(w, col, lambda tap: tap % 2 * 3 + tap // 2)),
    "all groups read the first": lambda w, group, col: (group * 0, col),
    "channels in reverse order": lambda w, group, col: (group, col + 1 - 2 * (col % 2)),
}


@pytest.mark.parametrize("check", [y_is_right, dvalues_are_right])
@pytest.mark.parametrize("change", GATHERS.values(), ids=GATHERS)
def test_the_wrong_pixels_gathered(case, check, change, monkeypatch):
    check(case)
    monkeypatch.setattr(Windows, "gather", mutated_gather(change))
    assert_red(check, case)


@pytest.mark.parametrize("check", [y_is_right, dx_is_right, dvalues_are_right])
@pytest.mark.parametrize("attribute", ["first_row", "first_col"])
def test_the_padding_on_the_wrong_side(case, check, attribute, monkeypatch):
    check(case)
    healthy = Windows.__init__

    def init(self: Windows, *args: Any) -> None:
        healthy(self, *args)
        setattr(self, attribute, getattr(self, attribute) + 1)

    monkeypatch.setattr(Windows, "__init__", init)
    assert_red(check, case)


def test_the_taps_of_dx_in_reverse_order(case, monkeypatch):
    dx_is_right(case)
    healthy = Windows.tap
    monkeypatch.setattr(Windows, "tap", lambda self, buffer, number: healthy(self, buffer, 5 - number))
    assert_red(dx_is_right, case)


@pytest.mark.parametrize("check", [y_is_right, dx_is_right])
def test_a_free_slot_multiplied(case, check, monkeypatch):
    check(case)
    healthy = eager.conv2d.entry_owners
    monkeypatch.setattr(
        eager.conv2d, "entry_owners", lambda ptr, *span: healthy(ptr, *span).clamp(max=ptr.shape[0] - 2)
    )
    assert_red(check, case)


def test_phantom_elements_not_cleared_where_a_nan_meets_the_filling(case, monkeypatch):
    nan = torch.full_like(case.x, float("nan"))

    def phantom(case: ConvCase) -> bool:
        grad = eager.conv2d.dvalues(case.dy, nan, case.index, case.grid.block, case.shape, torch.float32)
        return bool(grad[case.row % 2 == 1, 3:].any())  # 7 = 4 + 3 channels in each group

    assert not phantom(case)
    monkeypatch.setattr(eager.conv2d, "clear_phantom", lambda *args, **kwargs: None)
    assert phantom(case)


def test_a_result_that_is_not_channels_last(case, monkeypatch):
    check_kernels(eager, case)
    healthy = eager.conv2d.fwd
    monkeypatch.setattr(eager.conv2d, "fwd", lambda *args: healthy(*args).contiguous())
    with pytest.raises(AssertionError, match="y is not channels last"):
        check_kernels(eager, case)
