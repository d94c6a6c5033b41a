"""The lists of dx against lists made one block at a time."""

from __future__ import annotations

from typing import Any

import pytest
from sparsekern.kernels.contract import PADDING
from sparsekern.kernels.gpu.conv2d import lists_by_phase

from tests.device import DEVICE
from tests.gpu_conv2d_checks import SHAPES, edge_case
from tests.oracle_conv2d import ConvCase


def lists_by_hand(case: ConvCase) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """Return by phase, group and block of channels the ``(tap, row of the group)`` and slot of each stored block."""
    grid, shape, found = case.grid, case.shape, {}
    for slot, (r, c) in enumerate(zip(case.row.tolist(), case.col.tolist(), strict=True)):
        if r >= 0:
            tap, block = divmod(c, grid.tap_cols)
            i, j = divmod(tap, shape.kernel[1])
            y = (i * shape.dilation[0] - shape.padding[0]) % shape.stride[0]
            x = (j * shape.dilation[1] - shape.padding[2]) % shape.stride[1]
            place = (y * shape.stride[1] + x, r // grid.group_rows, block)
            found.setdefault(place, []).append((tap * grid.group_rows + r % grid.group_rows, slot))
    return {place: sorted(entries) for place, entries in found.items()}


@pytest.mark.parametrize("given", [*SHAPES.values(), {"blocks": 1}, {"group_in": 16 * 20, "kernel": (3, 5)}])
def test_lists(given: dict[str, Any]) -> None:
    """Also of more columns than a program reads at a time, and with groups that store nothing."""
    case = edge_case(**{"images": 1, "height": 6, "width": 9, **given})
    starts, numbers, slots = (n.cpu() for n in lists_by_phase(case.on(DEVICE).index, case.shape, case.grid.block))
    expected, groups, per_tap = lists_by_hand(case), case.shape.groups, case.grid.tap_cols

    stored = int((case.row >= 0).sum())
    assert starts[0] == 0 and starts[-1] == stored
    assert len(starts) == case.shape.stride[0] * case.shape.stride[1] * groups * per_tap + 1
    for number in range(len(starts) - 1):
        place = (number // per_tap // groups, number // per_tap % groups, number % per_tap)
        part = slice(int(starts[number]), int(starts[number + 1]))
        found = list(zip(numbers[part].tolist(), slots[part].tolist(), strict=True))
        assert found == expected.get(place, []), f"phase, group and block {place}"
    assert not numbers[stored : stored + PADDING].any() and not slots[stored : stored + PADDING].any()
