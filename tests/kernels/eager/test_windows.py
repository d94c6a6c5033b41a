from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape
from sparsekern.kernels.eager.chunks import Panel
from sparsekern.kernels.eager.windows import Windows, buffer_bytes, one_tap
from torch import Tensor
from torch.nn.functional import unfold

from tests.oracle_conv2d import conv_case


def numbered(images: int, channels: int, height: int, width: int) -> Tensor:
    """Return ``(N, C, H, W)``, channels last; the pixel (1, 2) of image 0 holds 120, 121, 122 ... in its channels."""
    n, h, w, c = torch.meshgrid(*(torch.arange(s) for s in (images, height, width, channels)), indexing="ij")
    return (1000 * n + 100 * h + 10 * w + c).float().permute(0, 3, 1, 2)


def test_load_fills_the_padding_and_the_last_block_of_each_group_with_zeros() -> None:
    """Two groups of one channel in blocks of two; output row 0 of a 3x1 kernel sees rows -1, 0, 1."""
    shape = ConvShape(2, 2, (3, 1), padding=(1, 1, 0, 0), groups=2)
    windows = Windows(shape, (4, 2), Panel(0, 1, 0, 1), 2)

    buffer = windows.load(numbered(1, 2, 4, 2), torch.float32)

    assert buffer.shape == (1, 3, 2, 2, 2)
    assert not buffer[0, 0].any()
    assert buffer[0, 1:, :, :, 0].tolist() == [[[0, 1], [10, 11]], [[100, 101], [110, 111]]]
    assert not buffer[..., 1].any()


def test_gather_and_tap_see_the_same_pixels() -> None:
    """Rows 1 and 2 of image 1, stride 2, dilation 2: tap (1, 0) of output pixel (1, 0) is input pixel (4, 0)."""
    shape = ConvShape(4, 1, (2, 2), stride=(2, 2), dilation=(2, 2))
    windows = Windows(shape, (8, 6), Panel(1, 2, 1, 3), 2)
    buffer = windows.load(numbered(2, 4, 8, 6), torch.float32)
    group, col = torch.tensor([0, 0]), torch.tensor([4, 5])  # tap 2, both blocks of two channels

    gathered = windows.gather(buffer, group, col)
    seen = windows.tap(buffer, 2)

    assert windows.tokens == 4
    assert gathered[1].tolist() == [[1402, 1403], [1422, 1423], [1602, 1603], [1622, 1623]]
    assert torch.equal(gathered.transpose(0, 1).flatten(1), seen.reshape(4, 4))


@pytest.mark.parametrize("seed", range(30))
def test_all_taps_together_are_the_unfolded_input(seed: int) -> None:
    case = conv_case(seed, images=2, dtype=torch.float32)
    shape, (top, bottom, left, right) = case.shape, case.shape.padding
    rows, width = shape.output_size(*case.size)
    windows = Windows(shape, case.size, Panel(0, 2, 0, rows), 3)
    padded = torch.nn.functional.pad(case.x, (left, right, top, bottom))

    columns = unfold(padded, shape.kernel, shape.dilation, 0, shape.stride)  # (N, Cin * taps, Ho * Wo)
    buffer = windows.load(case.x, torch.float32)

    for tap in range(shape.taps):
        seen = windows.tap(buffer, tap)[..., : shape.group_in].flatten(3)
        assert torch.equal(seen, columns[:, tap :: shape.taps].permute(0, 2, 1).reshape(2, rows, width, -1))
        one = one_tap(shape, tap)
        assert one.output_size(*case.size) == (rows, width)
        alone = Windows(one, case.size, Panel(0, 2, 0, rows), 3)
        assert torch.equal(alone.tap(alone.load(case.x, torch.float32), 0), windows.tap(buffer, tap))


def test_store_writes_the_rows_it_is_given_and_no_other() -> None:
    shape = ConvShape(2, 1, (3, 3), padding=(1, 1, 1, 1))
    windows = Windows(shape, (4, 3), Panel(0, 1, 0, 4), 4)
    x = numbered(1, 2, 4, 3) + 1
    dx = torch.zeros_like(x)

    windows.store(windows.load(x, torch.float32), dx, (1, 3))

    assert torch.equal(dx[:, :, 1:3], x[:, :, 1:3])
    assert not dx[:, :, 0].any() and not dx[:, :, 3].any()


def test_a_window_that_sees_nothing_but_padding() -> None:
    shape = ConvShape(1, 1, (1, 1), padding=(5, 0, 0, 0))
    windows = Windows(shape, (2, 2), Panel(0, 1, 0, 3), 1)
    dx = torch.ones(1, 1, 2, 2)

    assert not windows.load(torch.ones(1, 1, 2, 2), torch.float32).any()
    windows.store(windows.empty(dx, torch.float32), dx, (0, 2))
    assert dx.all()


@pytest.mark.parametrize("seed", range(10))
def test_the_bytes_of_a_buffer_are_no_less_than_it_has(seed: int) -> None:
    case = conv_case(seed, images=2)
    rows = case.shape.output_size(*case.size)[0]
    windows = Windows(case.shape, case.size, Panel(0, 2, 0, rows), 4)

    per_row, per_image = buffer_bytes(case.shape, case.size, 4, 4)

    needed = windows.empty(case.x, torch.float32).nbytes
    assert needed <= 2 * (rows * per_row + per_image)
    assert 2 * ((rows - 1) * per_row + per_image) == needed
