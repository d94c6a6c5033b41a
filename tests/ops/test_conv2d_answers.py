"""Probes of a convolution, each kind against the dense gradient; and those of some output positions only."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import ConvShape, LinearShape
from torch import Tensor
from torch.nn.functional import pad

from sparsekern import ops
from sparsekern.ops import Probe, marginals
from sparsekern.ops.probes import spread
from sparsekern.topology import Grid, balanced, build_index, conv_grid, generator_for
from tests.ops.test_conv2d_marginals import tokens as unfolded
from tests.oracle_conv2d import conv_blocks, dense_gradients

F64 = torch.float64
SHAPES = {
    "plain": ConvShape(4, 6, (3, 3), padding=(1, 1, 1, 1)),
    "groups": ConvShape(6, 8, (3, 2), stride=(1, 2), padding=(0, 1, 2, 0), groups=2),
    "stride and dilation": ConvShape(3, 4, (3, 2), stride=(2, 1), padding=(3, 0, 1, 2), dilation=(1, 3)),
    "pointwise in groups": ConvShape(6, 4, (1, 1), groups=2),
    "pointwise": ConvShape(6, 4, (1, 1)),
}
BLOCK = (2, 2)


def case(shape: ConvShape, images: int = 3) -> tuple[Tensor, Tensor, Grid]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, shape.in_channels, 9, 8, dtype=F64, generator=generator)
    dy = torch.randn(images, shape.out_channels, *shape.output_size(9, 8), dtype=F64, generator=generator)
    return dy, x, conv_grid(shape.in_channels, shape.out_channels, shape.kernel, BLOCK, shape.groups)


def gradient(dy: Tensor, x: Tensor, shape: ConvShape) -> Tensor:
    """Return the dense gradient of the weight."""
    weight = torch.zeros(shape.out_channels, shape.group_in, *shape.kernel, dtype=F64)
    return dense_gradients(dy, x, weight, shape)[1]


def ask(probe: Probe, dy: Tensor, x: Tensor, grid: Grid, shape: ConvShape) -> Tensor:
    topology = balanced(grid, 4, generator_for(0))
    values = torch.ones(4, *BLOCK, dtype=F64, requires_grad=True)
    y = ops.conv2d(x, values, None, build_index(topology), grid, shape, probe)
    y.backward(dy)
    weight = gradient(dy, x, shape)
    torch.testing.assert_close(values.grad, conv_blocks(weight, topology.row, topology.col, BLOCK, shape))
    assert probe.tensor.grad is not None and probe.tensor.grad.shape == probe.tensor.shape
    return probe.tensor.grad


def all_blocks(weight: Tensor, grid: Grid, shape: ConvShape) -> Tensor:
    cells = torch.arange(grid.cells, dtype=torch.int32)
    return conv_blocks(weight, cells // grid.cols, cells % grid.cols, BLOCK, shape)


def kept(dy: Tensor, x: Tensor, shape: ConvShape, tokens: int) -> Tensor:
    """Return which output positions ``(N, 1, Ho, Wo)`` are taken: of numbered ones, the numbers that are left."""
    positions = dy.shape[0] * dy.shape[2] * dy.shape[3]
    numbers = torch.arange(positions, dtype=F64).view(dy.shape[0], 1, *dy.shape[2:])
    if shape.is_pointwise:  # the linear op on a view
        left = spread(numbers.view(-1, 1), numbers.view(-1, 1), LinearShape(1, 1), tokens)[0]
    else:
        left = spread(numbers.expand_as(dy), x, shape, tokens)[0]
    return torch.isin(numbers, left.contiguous())


CASES = [(name, tokens) for name in SHAPES for tokens in (0, 1, 7, 30, 10**6)]


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_every_kind_is_of_the_dense_gradient_of_these_tokens(name, tokens):
    """The stored blocks hear all tokens all the same: :func:`ask` looks."""
    shape = SHAPES[name]
    dy, x, grid = case(shape)
    cells = torch.arange(grid.cells, dtype=torch.int32)
    row, col = cells[::3] // grid.cols, cells[::3] % grid.cols
    generator = generator_for(2)
    u, v = (torch.randn(2, n, dtype=F64, generator=generator) for n in (grid.out_features, grid.in_features))
    taken = kept(dy, x, shape, tokens)
    weight = gradient(dy * taken, x, shape)
    blocks = all_blocks(weight, grid, shape)

    found = ask(Probe.candidates(grid, row, col, dtype=F64).of_tokens(tokens), dy, x, grid, shape)
    torch.testing.assert_close(found, blocks[::3])
    found = ask(Probe.norms(grid, row, col, dtype=F64).of_tokens(tokens), dy, x, grid, shape)
    torch.testing.assert_close(found, blocks.norm(dim=(1, 2))[::3])
    found = ask(Probe.all_norms(grid, dtype=F64).of_tokens(tokens), dy, x, grid, shape)
    torch.testing.assert_close(found.flatten(), blocks.norm(dim=(1, 2)))
    by_tap = v.view(2, 1, *shape.kernel, shape.group_in).permute(0, 1, 4, 2, 3)
    sketched = [all_blocks(weight * u[q].view(-1, 1, 1, 1) * by_tap[q], grid, shape) for q in range(2)]
    found = ask(Probe.sketch(grid, u, v).of_tokens(tokens), dy, x, grid, shape)
    torch.testing.assert_close(found.flatten(1), torch.stack(sketched).sum((2, 3)))


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_what_guides_is_of_the_windows_of_these_tokens(name, tokens):
    shape = SHAPES[name]
    dy, x, grid = case(shape)
    taken = kept(dy, x, shape, tokens).flatten()
    flat, windows = (t[taken] for t in unfolded(dy, x, shape))
    seed = torch.tensor(7)
    sums = ask(Probe.signed_sums(grid, seed, dtype=F64).of_tokens(tokens), dy, x, grid, shape)
    if name == "pointwise":  # a linear layer
        sides = flat, windows.flatten(1)
    else:
        sides = [side.permute(0, 2, 3, 1).flatten(0, 2) for side in spread(dy, x, shape, tokens)[:2]]
    signs = marginals.token_signs(*sides, seed, len(flat)).to(F64)
    torch.testing.assert_close(sums, torch.cat([signs @ flat, signs @ windows.flatten(1)]))
    squares = ask(Probe.magnitudes(grid, dtype=F64).of_tokens(tokens), dy, x, grid, shape)
    rows = flat.unflatten(1, (shape.groups, -1)).square().sum(0)
    cols = windows.square().sum(0)
    whole = [
        part.sum(-1) for side in (rows, cols) for part in [pad(side, (0, side.shape[-1] % 2)).unflatten(-1, (-1, 2))]
    ]
    torch.testing.assert_close(squares, torch.cat([part.flatten() for part in whole]))


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "pointwise"])
@pytest.mark.parametrize("images", [1, 3, 40])
def test_tokens_are_spread_over_images_and_positions(name, images):
    shape = SHAPES[name]
    dy, x, _ = case(shape, images)
    positions = dy.shape[2] * dy.shape[3]
    for tokens in (1, 2, 5, 12, 39, 40, 41, images * positions - 1):
        if tokens >= images * positions:
            continue
        taken = kept(dy, x, shape, tokens)[:, 0]
        assert tokens / 4 <= taken.sum() <= tokens
        assert taken.any(2).any(1).sum() == min(images, tokens), "as many images as can be"
    few = kept(dy, x, shape, 4 * images)[:, 0]
    assert few.any(0).any(1).sum() * few.any(0).any(0).sum() == 4, "a lattice of 2 x 2, or 1 x 4"


def test_a_lattice_by_hand():
    """Output 6 x 4, one image, 4 tokens: 2 x 2 positions, every third row and every second column."""
    shape = ConvShape(1, 1, (3, 1), padding=(1, 1, 0, 0))
    x = torch.arange(24.0).view(1, 1, 6, 4)
    dy, seen, thinned = spread(x, x, shape, 4)
    # rows 1 and 4 with those around them, 0 to 5; columns 0 and 2
    assert dy.flatten().tolist() == [4, 6, 16, 18]
    assert torch.equal(seen, x[:, :, :, :3])
    assert thinned == shape._replace(stride=(3, 2), padding=(0, 0, 0, 0))


def test_where_the_lattice_would_see_padding_only_all_tokens_are_taken():
    shape = ConvShape(2, 2, (1, 1), stride=(4, 1), padding=(3, 3, 0, 0))  # one row of pixels: tokens at rows -3 and 1
    dy, x = torch.ones(1, 2, 2, 3), torch.ones(1, 2, 1, 3)
    assert spread(dy, x, shape, 1)[0] is dy


@pytest.mark.parametrize(("height", "width"), [(128, 32), (32, 1), (1, 32), (4, 1)])
@pytest.mark.parametrize("positions", [1, 2, 3, 5])
def test_a_lattice_of_few_positions_in_a_tall_or_wide_image(height, width, positions):
    """One or two positions an image: a column of the image's proportions would be longer than that."""
    shape = ConvShape(1, 1, (3, 1), padding=(1, 1, 0, 0))
    x = torch.ones(7, 1, height, width)
    taken, most = spread(x, x, shape, 7 * positions)[0], min(positions, height * width)
    assert taken.shape[0] == 7 and most / 2 < taken[0].numel() <= most
