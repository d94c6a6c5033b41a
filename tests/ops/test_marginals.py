"""The two vectors that guide GSE's draws, against the plainest way, and what their product says of the gradient.

Those of a convolution are compared with windows laid out by F.unfold in float64.
"""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape, LinearShape
from torch import Tensor
from torch.nn.functional import pad, unfold

from sparsekern.ops import marginals
from sparsekern.ops.marginals import magnitudes, signed_sums, token_signs

F64 = torch.float64


def shape_of(dy: Tensor, x: Tensor) -> LinearShape:
    return LinearShape(x.shape[1], dy.shape[1])


def data(tokens: int = 6, dtype: torch.dtype = F64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(tokens, n, dtype=F64, generator=generator).to(dtype) for n in (7, 5))


def seeded(seed: int) -> torch.Tensor:
    return torch.randint(2**62, (), generator=torch.Generator().manual_seed(seed))


def test_magnitudes_by_hand():
    dy, x = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0]]), torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    assert magnitudes(dy, x, (1, 1), shape_of(dy, x)).tolist() == [1, 6, 4, 3, 1]
    # blocks of 2 x 1: squares of dy in rows {0, 1} and {2}, and of x
    torch.testing.assert_close(magnitudes(dy, x, (2, 1), shape_of(dy, x)), torch.tensor([21.0, 10, 5, 1]))
    assert magnitudes(dy, x, (2, 2), shape_of(dy, x)).tolist() == [21, 10, 6]


@pytest.mark.parametrize("block", [(1, 1), (4, 2), (1, 3), (4, 1)])
def test_their_product_bounds_the_gradient(block):
    """Equation of GraBo: |G| <= (|dy|' 1)(1' |x|) at 1x1; for blocks the Frobenius norms."""
    dy, x = data()
    rows = -(-7 // block[0])
    g = torch.zeros(rows * block[0], -(-5 // block[1]) * block[1], dtype=F64)
    g[:7, :5] = dy.T @ x
    norms = g.unflatten(0, (rows, block[0])).unflatten(2, (-1, block[1])).norm(dim=(1, 3))
    parts = magnitudes(dy, x, block, shape_of(dy, x))
    parts = parts if block == (1, 1) else parts.sqrt()
    bound = parts[:rows, None] * parts[rows:]
    assert (norms <= bound).all() and (norms > bound / 10).any()


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_signed_sums_use_one_sign_a_token_for_both(dtype):
    dy, x = data(dtype=dtype)
    signs = token_signs(dy, x, seeded(0), 6)
    assert set(signs.tolist()) == {-1, 1}
    sums = signed_sums(dy, x, seeded(0), shape_of(dy, x))
    assert sums.dtype == (F64 if dtype == F64 else torch.float32)
    expected = torch.cat([signs.to(F64) @ dy.to(F64), signs.to(F64) @ x.to(F64)])
    # Six signed numbers summed in float32 and the sum rounded once to the dtype, as the design bounds a kernel's error.
    magnitude = torch.cat([dy.to(F64).abs().sum(0), x.to(F64).abs().sum(0)])
    bound = 8 * torch.finfo(sums.dtype).eps * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert ((sums.to(F64) - expected).abs() <= bound).all()


def test_signs_depend_on_all_bits_of_a_batch_and_on_its_order():
    dy, x = data(64)
    whole = token_signs(dy, x, seeded(1), 64)
    assert torch.equal(whole, token_signs(dy.t().contiguous().t(), x.clone(), seeded(1), 64)), "not on the strides"
    for dtype in (F64, torch.float32, torch.bfloat16, torch.float16):
        low = dy.to(dtype), x.to(dtype)
        scaled = token_signs(low[0] * 128, low[1], seeded(1), 64)
        assert torch.equal(token_signs(*low, seeded(1), 64), scaled), "gradient scaling"
    nudged = x.clone()
    nudged[17, 3] = torch.nextafter(nudged[17, 3], torch.tensor(9.0, dtype=F64))
    swapped = torch.arange(64).roll(1)
    others = (token_signs(dy, nudged, seeded(1), 64), token_signs(dy[swapped], x[swapped], seeded(1), 64))
    for other in (*others, token_signs(dy, x, seeded(2), 64)):
        assert 16 < (whole != other).sum() < 48


@pytest.mark.parametrize("case", ["random", "equal tokens", "zeros"])
def test_signs_are_fair_and_independent_in_pairs(case):
    """Whatever the tokens are: those of a padded or flat image are all alike."""
    dy, x = data(6, torch.float32)
    if case != "random":
        dy, x = (side[:1].expand_as(side) * (case != "zeros") for side in (dy, x))
    draws = 4000
    signs = torch.stack([token_signs(dy, x, seeded(seed), 6) for seed in range(draws)]).double()
    products = signs.T @ signs / draws - torch.eye(6)
    assert (signs.mean(0).abs() < 5 / draws**0.5).all()
    assert (products.abs() < 5 / draws**0.5).all()


def sketch_error(batches: list[tuple[torch.Tensor, torch.Tensor]], draws: int) -> torch.Tensor:
    """Return how many standard deviations the mean of the sketches of all batches is from their gradient, at most."""
    dy, x = (torch.cat(sides).double() for sides in zip(*batches, strict=True))
    g = dy.T @ x
    variance = (dy**2).sum(0)[:, None] * (x**2).sum(0) + g**2 - 2 * (dy**2).T @ x**2
    mean = torch.zeros_like(g)
    for seed in range(draws):
        sums = sum(signed_sums(*batch, seeded(seed), shape_of(*batch)) for batch in batches).double()
        mean += torch.outer(sums[: dy.shape[1]], sums[dy.shape[1] :]) / draws
    return ((mean - g) / (variance / draws).sqrt()).abs().max()


def test_the_product_of_the_sums_is_an_unbiased_sketch_of_the_gradient():
    """E[(s dy)(s x)'] = dy' x, with variance |x|^2 |y|^2 + (x.y)^2 - 2 sum x^2 y^2 for an element."""
    dy, x = data(8)
    assert sketch_error([(dy, x)], 4000) < 5
    sums = torch.stack([signed_sums(dy, x, seeded(seed), shape_of(dy, x)) for seed in range(6000)])
    estimates, g = sums[:, :7, None] * sums[:, None, 7:], dy.T @ x
    variance = (dy**2).sum(0)[:, None] * (x**2).sum(0) + g**2 - 2 * (dy**2).T @ x**2
    assert (estimates.var(0) / variance - 1).abs().max() < 0.25


def classifier(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of a cross-entropy over ten classes at the logits, and positive inputs, as behind a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(tokens, 16, generator=generator)
    dy = (x @ torch.randn(16, 10, generator=generator) / 10).softmax(1)
    dy[torch.arange(tokens), torch.randint(10, (tokens,), generator=generator)] -= 1
    return dy / tokens, x


@pytest.mark.parametrize("batches", [[128], [64, 64], [1] * 12], ids=str)
def test_the_sketch_is_unbiased_where_tokens_have_few_patterns_of_signs(batches):
    """Ten at most here. Signs that hash such patterns agree among the tokens of a class, and products do not cancel."""
    parts = [classifier(tokens, seed) for seed, tokens in enumerate(batches)]
    assert sketch_error(parts, 2000) < 5


# Convolutions.

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


def images_of(shape: ConvShape, dtype: torch.dtype = F64, images: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(images, shape.in_channels, 6, 5, dtype=F64, generator=generator)
    dy = torch.randn(images, shape.out_channels, *shape.output_size(6, 5), dtype=F64, generator=generator)
    return tuple(t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (dy, x))


SEED = torch.tensor(1234567)


def windows_of(dy: Tensor, x: Tensor, shape: ConvShape) -> tuple[Tensor, Tensor]:
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
    dy, x = images_of(shape)
    flat, windows = windows_of(dy, x, shape)

    def sums(side: Tensor, length: int) -> Tensor:
        powers = (side.abs() if block == (1, 1) else side.square()).sum(0)
        return torch.stack([part.sum(-1) for part in powers.split(length, -1)], -1).flatten()

    out = sums(flat.unflatten(1, (shape.groups, -1)), block[0])  # blocks are cut in each group, and in each tap
    into = sums(windows, block[1])
    torch.testing.assert_close(magnitudes(dy, x, block, shape), torch.cat([out, into]))


@pytest.mark.parametrize("name", SHAPES)
def test_signs_and_their_sums_are_those_of_the_unfolded_windows(name):
    shape = SHAPES[name]
    dy, x = images_of(shape)
    flat, windows = windows_of(dy, x, shape)
    signs = token_signs(flat, x.permute(0, 2, 3, 1).flatten(0, 2), SEED, len(flat)).to(F64)
    expected = torch.cat([signs @ flat, signs @ windows.flatten(1)])
    torch.testing.assert_close(signed_sums(dy, x, SEED, shape), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_sum_in_float32(dtype):
    shape = SHAPES["groups"]
    dy, x = images_of(shape, dtype)
    exact = [t.to(F64) for t in (dy, x)]
    for found, wanted in (
        (magnitudes(dy, x, (1, 1), shape), magnitudes(*exact, (1, 1), shape)),
        (magnitudes(dy, x, (2, 2), shape), magnitudes(*exact, (2, 2), shape)),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.to(F64), wanted, rtol=1e-5, atol=1e-5)
    sums = signed_sums(dy, x, SEED, shape)
    assert sums.dtype == torch.float32
    parts = [part.flatten(1) for part in windows_of(*exact, shape)]
    sides = [side.permute(0, 2, 3, 1).flatten(0, 2) for side in (dy, x)]  # other bits than those of the exact numbers
    signs = token_signs(*sides, SEED, len(parts[0])).to(F64)
    expected = torch.cat([signs @ part for part in parts])
    # As many terms as there are tokens, summed in float32, and the sum rounded once to the dtype.
    magnitude = torch.cat([part.abs().sum(0) for part in parts])
    bound = (len(parts[0]) + 2) * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * expected.abs()
    assert ((sums.to(F64) - expected).abs() <= bound).all()


def test_no_images():
    shape = SHAPES["groups"]
    dy, x = images_of(shape, images=0)
    assert not magnitudes(dy, x, (2, 2), shape).any() and not signed_sums(dy, x, SEED, shape).any()


def test_magnitudes_of_a_convolution_by_hand():
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
