"""A probe changes nothing in the forward, and its gradient is what it asks of the gradient of the whole weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels.contract import ConvShape, LinearShape
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import pad

import sparsekern as sk
from sparsekern.ops import Probe, marginals
from sparsekern.ops.probes import spread
from sparsekern.topology import Grid, dense_block_norms
from tests.kernels.calls import AnyCase
from tests.ops.cases import F64, make
from tests.ops.test_marginals import windows_of
from tests.oracle import all_cells, gradient_blocks
from tests.oracle_conv2d import ConvCase, conv_case

SHAPES = {
    "plain": ConvShape(4, 6, (3, 3), padding=(1, 1, 1, 1)),
    "groups": ConvShape(6, 8, (3, 2), stride=(1, 2), padding=(0, 1, 2, 0), groups=2),
    "stride and dilation": ConvShape(3, 4, (3, 2), stride=(2, 1), padding=(3, 0, 1, 2), dilation=(1, 3)),
    "pointwise in groups": ConvShape(6, 4, (1, 1), groups=2),
    "pointwise": ConvShape(6, 4, (1, 1)),
}


def case_of(name: str, images: int = 3) -> AnyCase:
    """Return seven tokens of 3 x 5 blocks with edges below and to the right, or images of 9 x 8 pixels."""
    if name == "linear":
        return make("edges", tokens=7, bias=False)
    shape = SHAPES[name]._asdict()
    sizes = {"group_in": SHAPES[name].group_in, "group_out": SHAPES[name].group_out, "height": 9, "width": 8}
    given = {side: shape[side] for side in ("kernel", "stride", "padding", "dilation", "groups")} | sizes
    return conv_case(1, block=(2, 2), images=images, blocks=4, free=0, dtype=F64, bias=False, **given)


GRID = case_of("linear").grid


def sometimes(case: AnyCase) -> tuple[Tensor, Tensor]:
    """Return the places of every third block."""
    row, col = all_cells(case)
    return row[::3], col[::3]


def directions(grid: Grid) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    u, v = (torch.randn(2, n, dtype=F64, generator=generator) for n in (grid.out_features, grid.in_features))
    return u, v


PROBES = {
    "candidates": lambda case: Probe.candidates(case.grid, *sometimes(case), dtype=F64),
    "norms": lambda case: Probe.norms(case.grid, *sometimes(case), dtype=F64),
    "all_norms": lambda case: Probe.all_norms(case.grid, dtype=F64),
    "sketch": lambda case: Probe.sketch(case.grid, *directions(case.grid)),
}
MARGINALS = {
    "magnitudes": lambda case: Probe.magnitudes(case.grid, dtype=F64),
    "signed_sums": lambda case: Probe.signed_sums(case.grid, torch.tensor(7), dtype=F64),
}


def answer(kind: str, case: AnyCase, dy: Tensor) -> Tensor:
    """Return what a probe must find, from the gradient of the whole weight."""
    blocks, grid = gradient_blocks(dy, case.x, case), case.grid
    if kind == "sketch":
        g = case.gradient(dy, case.x)
        scaled = [case.scaled(g, u, v) for u, v in zip(*directions(grid), strict=True)]
        sums = [case.blocks_at(part, *all_cells(case)).sum((1, 2)) for part in scaled]
        return torch.stack(sums).view(-1, grid.rows, grid.cols)
    norms = blocks.norm(dim=(1, 2))
    return {"candidates": blocks[::3], "norms": norms[::3], "all_norms": norms.view(grid.rows, grid.cols)}[kind]


def ask(probe: Probe, case: AnyCase) -> Tensor:
    """Return the gradient of a probe; the forward does not see it, and the stored blocks hear all tokens."""
    values = torch.ones_like(case.values, requires_grad=True)
    y = case.op(case.x, values, None, probe)
    y.backward(case.dy)
    assert torch.equal(y.detach(), case.op(case.x, values.detach(), None))
    gradient = case.gradient(case.dy, case.x)
    torch.testing.assert_close(values.grad, case.blocks_at(gradient, case.row, case.col))
    assert probe.tensor.grad is not None and probe.tensor.grad.shape == probe.tensor.shape
    return probe.tensor.grad


def kept(case: AnyCase, tokens: int) -> Tensor:
    """Return which tokens ``(T, 1)`` or ``(N, 1, Ho, Wo)`` are taken: of numbered ones, the numbers that are left."""
    dy, shape = case.dy, case.geometry
    numbers = torch.arange(dy[:, :1].numel(), dtype=F64).view_as(dy[:, :1])
    if dy.dim() == 2 or shape.is_pointwise:  # the linear op on a view
        left = spread(numbers.view(-1, 1), numbers.view(-1, 1), LinearShape(1, 1), tokens)[0]
    else:
        left = spread(numbers.expand_as(dy), case.x, shape, tokens)[0]
    return torch.isin(numbers, left.contiguous())


CASES = [("linear", tokens) for tokens in (0, 1, 3, 7, 9)]
CASES += [(name, tokens) for name in SHAPES for tokens in (0, 1, 7, 30, 10**6)]


@pytest.mark.parametrize("kind", PROBES)
@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_the_gradient_of_a_probe_is_the_answer_for_its_tokens(name, tokens, kind):
    case = case_of(name)
    found = ask(PROBES[kind](case).of_tokens(tokens), case)
    torch.testing.assert_close(found, answer(kind, case, case.dy * kept(case, tokens)))


@pytest.mark.parametrize(("name", "tokens"), CASES[5:])
def test_what_guides_is_of_the_windows_of_these_tokens(name, tokens):
    case = case_of(name)
    dy, x, shape = case.dy, case.x, case.shape
    taken = kept(case, tokens).flatten()
    flat, windows = (t[taken] for t in windows_of(dy, x, shape))
    seed = torch.tensor(7)
    sums = ask(Probe.signed_sums(case.grid, seed, dtype=F64).of_tokens(tokens), case)
    if name == "pointwise":  # a linear layer
        sides = flat, windows.flatten(1)
    else:
        sides = [side.permute(0, 2, 3, 1).flatten(0, 2) for side in spread(dy, x, shape, tokens)[:2]]
    signs = marginals.token_signs(*sides, seed, len(flat)).to(F64)
    torch.testing.assert_close(sums, torch.cat([signs @ flat, signs @ windows.flatten(1)]))
    squares = ask(Probe.magnitudes(case.grid, dtype=F64).of_tokens(tokens), case)
    sides = flat.unflatten(1, (shape.groups, -1)).square().sum(0), windows.square().sum(0)
    whole = [pad(side, (0, side.shape[-1] % 2)).unflatten(-1, (-1, 2)).sum(-1) for side in sides]
    torch.testing.assert_close(squares, torch.cat([part.flatten() for part in whole]))


# Sums over micro-batches.


def micro_batches() -> list[AnyCase]:
    case, generator = case_of("linear"), torch.Generator().manual_seed(0)
    drawn = [(torch.randn(5, 9, dtype=F64, generator=generator), torch.randn(5, 11, dtype=F64, generator=generator))]
    drawn += [(x * 2 + 1, dy.flip(0) - 1) for x, dy in drawn] + [(x.roll(1, 0), dy * 3) for x, dy in drawn]
    return [replace(case, x=x, dy=dy) for x, dy in drawn]


def ask_all(probe: Probe, cases: list[AnyCase]) -> Tensor:
    for case in cases:
        case.op(case.x, torch.ones_like(case.values), None, probe).backward(case.dy)
    assert probe.tensor.grad is not None
    return probe.tensor.grad


@pytest.mark.parametrize("kind", MARGINALS)
def test_marginals_add_up_over_micro_batches(kind):
    cases = micro_batches()
    together = ask_all(MARGINALS[kind](cases[0]), cases)
    assert together.any()
    torch.testing.assert_close(together, sum(ask(MARGINALS[kind](case), case) for case in cases))


@pytest.mark.parametrize("kind", ["candidates", "sketch"])
def test_linear_answers_add_up_over_micro_batches(kind):
    cases = micro_batches()
    found = ask_all(PROBES[kind](cases[0]), cases)
    torch.testing.assert_close(found, sum(answer(kind, case, case.dy) for case in cases))


def test_norms_do_not_add_up():
    """Why RigL over micro-batches needs another way: the sum of norms is not the norm of the sum."""
    cases = micro_batches()
    found = ask_all(PROBES["norms"](cases[0]), cases)
    whole = replace(cases[0], x=torch.cat([case.x for case in cases]), dy=torch.cat([case.dy for case in cases]))
    assert (found > answer("norms", whole, whole.dy) + 1e-3).all()


# Places.

ROW, COL = torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([4, 0, 2], dtype=torch.int32)


@pytest.mark.parametrize("make_probe", [Probe.candidates, Probe.norms])
def test_no_places_and_free_places(make_probe):
    case = case_of("linear")
    assert ask(make_probe(GRID, ROW[:0], COL[:0], dtype=F64), case).shape[0] == 0
    free = torch.full((1,), -1, dtype=torch.int32)
    if make_probe == Probe.norms:
        with pytest.raises(ValueError, match=r"asks for norms of blocks \(-1, -1\)"):
            make_probe(GRID, free, free)
        return
    padded = make_probe(GRID, torch.cat([ROW[:1], free, ROW[1:]]), torch.cat([COL[:1], free, COL[1:]]), dtype=F64)
    found, plain = ask(padded, case), ask(make_probe(GRID, ROW, COL, dtype=F64), case)
    assert torch.equal(found[[0, 2, 3]], plain) and not found[1].any()


@pytest.mark.parametrize("make_probe", [Probe.candidates, Probe.norms])
def test_places_are_checked(make_probe):
    """Out of range a place would wrap to another block."""
    with pytest.raises(ValueError, match=r"slot 0 is at block \(0, 5\); the grid has 3 x 5 blocks"):
        make_probe(GRID, ROW[:1], COL[:1] + 1)
    with pytest.raises(ValueError, match="slots 0 and 1 are both at block"):
        make_probe(GRID, ROW[[0, 0]], COL[[0, 0]])
    with pytest.raises(ValueError, match="row is torch.int64"):
        make_probe(GRID, ROW.long(), COL)


def test_a_probe_takes_no_memory():
    probe = Probe.candidates(GRID, ROW, COL)
    assert probe.tensor.shape == (3, 4, 2) and probe.tensor.untyped_storage().nbytes() == 4


def test_a_layer_under_compile_has_two_graphs_armed_and_not():
    layer = sk.SparseLinear(9, 11, block_size=(4, 2), sparsity=0.5, dtype=torch.float64, seed=0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 9, dtype=torch.float64)
    for armed in (False, True, False, True, True):
        layer.probe = Probe.all_norms(layer.grid, dtype=F64) if armed else None
        compiled(x).sum().backward()
        if armed:
            g = torch.ones(5, 11, dtype=torch.float64).T @ x
            torch.testing.assert_close(layer.probe.tensor.grad, dense_block_norms(layer.grid, g))
    assert counter.frame_count == 2


# Which tokens a probe hears.


@pytest.mark.parametrize(
    ("tokens", "taken"), [(0, range(7)), (7, range(7)), (9, range(7)), (3, (0, 2, 4)), (2, (0, 3)), (1, (0,))]
)
def test_tokens_are_evenly_spread_and_not_copied(tokens, taken):
    dy, x = torch.arange(14.0).view(7, 2), torch.arange(7.0).view(7, 1)
    found = spread(dy, x, LinearShape(1, 2), tokens)
    assert found[1].flatten().tolist() == list(taken) and torch.equal(found[0], dy[list(taken)])
    assert found[0].data_ptr() == dy.data_ptr() and found[1].data_ptr() == x.data_ptr()


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "pointwise"])
@pytest.mark.parametrize("images", [1, 3, 40])
def test_tokens_are_spread_over_images_and_positions(name, images):
    case = case_of(name, images)
    assert isinstance(case, ConvCase)
    positions = case.dy[:, :1].numel()
    for tokens in (1, 2, 5, 12, 39, 40, 41, positions - 1):
        if tokens >= positions:
            continue
        taken = kept(case, tokens)[:, 0]
        assert tokens / 4 <= taken.sum() <= tokens
        assert taken.any(2).any(1).sum() == min(images, tokens), "as many images as can be"
    few = kept(case, 4 * images)[:, 0]
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
