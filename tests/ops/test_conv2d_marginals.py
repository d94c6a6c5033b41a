"""The vectors that guide GSE's draws in a convolution, against windows laid out by F.unfold in float64."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape
from torch import Tensor
from torch.nn.functional import pad, unfold

from sparsekern.ops import marginals
from sparsekern.ops.marginals import magnitudes, signed_sums, token_signs

F64 = torch.float64
SHAPES = {
    "plain": ConvShape(5, 7, (3, 3), padding=(1, 1, 1, 1)),
    "groups": ConvShape(6, 8, (3, 2), padding=(0, 1, 2, 0), groups=2),
    "depthwise": ConvShape(4, 4, (3, 3), padding=(1, 1, 1, 1), groups=4),
    "stride": ConvShape(3, 4, (3, 3), stride=(2, 3), padding=(1, 1, 1, 1)),
    "dilation": ConvShape(3, 4, (3, 3), stride=(1, 2), padding=(3, 3, 2, 2), dilation=(3, 2)),
    "more taps than channels": ConvShape(2, 3, (5, 5), padding=(2, 2, 2, 2)),
    "padding that no pixel reaches": ConvShape(2, 2, (1, 1), stride=(3, 3), padding=(7, 7, 7, 7)),
    "larger than the image": ConvShape(2, 2, (7, 7), padding=(6, 6, 6, 6)),
}


def data(shape: ConvShape, dtype: torch.dtype = F64, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(images, shape.in_channels, 6, 5, dtype=F64, generator=generator)
    dy = torch.randn(images, shape.out_channels, *shape.output_size(6, 5), dtype=F64, generator=generator)
    return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (dy, x))


SEED = torch.tensor(1234567)


def tokens(dy: Tensor, x: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
    """Return ``dy (T, Cout)`` and the windows ``(T, groups, taps, Cin / groups)``."""
    top, bottom, left, right = shape.padding
    padded = pad(x.to(F64), (left, right, top, bottom))
    windows = unfold(padded, shape.kernel, shape.dilation, 0, shape.stride)  # (N, Cin * taps, T)
    windows = windows.view(x.shape[0], shape.groups, shape.group_in, shape.taps, -1)
    return dy.to(F64).permute(0, 2, 3, 1).flatten(0, 2), windows.permute(0, 4, 1, 3, 2).flatten(0, 1)


@pytest.mark.parametrize("block", [(1, 1), (3, 2), (2, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_magnitudes_are_those_of_the_unfolded_windows(name, block):
    shape = SHAPES[name]
    dy, x = data(shape)
    flat, windows = tokens(dy, x, shape)

    def sums(side: Tensor, length: int) -> Tensor:
        powers = (side.abs() if block == (1, 1) else side.square()).sum(0)
        return torch.stack([part.sum(-1) for part in powers.split(length, -1)], -1).flatten()

    out = sums(flat.unflatten(1, (shape.groups, -1)), block[0])  # blocks are cut in each group, and in each tap
    into = sums(windows, block[1])
    torch.testing.assert_close(magnitudes(dy, x, block, shape), torch.cat([out, into]))


@pytest.mark.parametrize("name", SHAPES)
def test_signs_and_their_sums_are_those_of_the_unfolded_windows(name):
    shape = SHAPES[name]
    dy, x = data(shape)
    flat, windows = tokens(dy, x, shape)
    signs = token_signs(flat, x.permute(0, 2, 3, 1).flatten(0, 2), SEED, len(flat)).to(F64)
    expected = torch.cat([signs @ flat, signs @ windows.flatten(1)])
    torch.testing.assert_close(signed_sums(dy, x, SEED, shape), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_sum_in_float32(dtype):
    shape = SHAPES["groups"]
    dy, x = data(shape, dtype)
    exact = [t.to(F64) for t in (dy, x)]
    for found, wanted in (
        (magnitudes(dy, x, (1, 1), shape), magnitudes(*exact, (1, 1), shape)),
        (magnitudes(dy, x, (2, 2), shape), magnitudes(*exact, (2, 2), shape)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.to(F64), wanted, rtol=1e-5, atol=1e-5)
    sums = signed_sums(dy, x, SEED, shape)
    assert sums.dtype == torch.float32
    parts = [part.flatten(1) for part in tokens(*exact, shape)]
    sides = [side.permute(0, 2, 3, 1).flatten(0, 2) for side in (dy, x)]  # other bits than those of the exact numbers
    signs = token_signs(*sides, SEED, len(parts[0])).to(F64)
    expected = torch.cat([signs @ part for part in parts])
    # As many terms as there are tokens, summed in float32, and the sum rounded once to the dtype.
    magnitude = torch.cat([part.abs().sum(0) for part in parts])
    bound = (len(parts[0]) + 2) * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert ((sums.to(F64) - expected).abs() <= bound).all()


def test_no_images():
    shape = SHAPES["groups"]
    dy, x = data(shape, images=0)
    assert not magnitudes(dy, x, (2, 2), shape).any() and not signed_sums(dy, x, SEED, shape).any()


def test_magnitudes_by_hand():
    """One image of 1 x 2 pixels, one channel, a kernel of 1 x 2 with one zero before and behind: three windows."""
    x, dy = torch.tensor([[[[3.0, -4.0]]]]), torch.tensor([[[[1.0, -2.0, 5.0]]]])
    shape = ConvShape(1, 1, (1, 2), padding=(0, 0, 1, 1))
    # windows: (0, 3), (3, -4), (-4, 0)
    assert magnitudes(dy, x, (1, 1), shape).tolist() == [8, 7, 7]
    shape = shape._replace(padding=(0, 0, 1, 0))  # (0, 3), (3, -4)
    assert magnitudes(dy[..., :2], x, (1, 1), shape).tolist() == [3, 3, 7]
    assert magnitudes(dy[..., :2], x, (2, 2), shape).tolist() == [5, 9, 25]


def test_no_more_than_the_input_is_held(monkeypatch):
    """The places that a tap looks at are laid out for as many taps at a time as there are channels."""
    taps = [list(range(s.start, s.stop)) for s in marginals._some_taps(ConvShape(2, 3, (5, 1)))]
    assert taps == [[0, 1], [2, 3], [4]]
