"""The kernels of stored gradients and of the norms of chosen blocks: groups, pieces, splits, free slots."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.gpu import conv2d, linear
from sparsekern.kernels.gpu.config import Outer
from sparsekern.kernels.gpu.outer import outer_kernel, sum_splits_kernel

from tests.device import DEVICE, DTYPES, huge, in_dtypes
from tests.gpu_checks import HOLES, OUTERS, check_block_norms, check_outer, corners, drawn, dvalues, far_apart, forced
from tests.gpu_conv2d_checks import GATHER, PARTS, check_that_phantom_elements_are_zero, edge_case
from tests.oracle import DY_LAYOUTS, X_LAYOUTS, check_dvalues


def config(tile_in: int = 32, tile_t: int = 16) -> Outer:
    return Outer(tile_in, tile_t, warps=4, stages=3)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of splits that were added up."""
    found: list[int] = []
    healthy = linear.sum_splits_kernel

    class Counting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: found.append(args[3]) or healthy[grid](*args, **kwargs)

    for module in (linear, conv2d):
        monkeypatch.setattr(module, "sum_splits_kernel", Counting())
    return found


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(
        ((16, 16), 16),  # one block a program
        ((16, 16), 32),  # two blocks a program
        ((16, 16), 128),  # more blocks a program than a row has
        ((32, 32), 16),  # half a block a program
        ((64, 64), 64),
        ((128, 128), 64),
        ((64, 16), 64),
        ((16, 64), 32),
    ),
)
def test_any_block_in_groups_and_in_pieces(sizes: tuple[tuple[int, int], int], dtype: torch.dtype) -> None:
    check_outer(corners(sizes[0], dtype=dtype), config(sizes[1]))


@pytest.mark.parametrize("tokens", [1, 16, 17, 33, 65])
@pytest.mark.parametrize("tile_t", [16, 64])
def test_any_number_of_tokens(tile_t: int, tokens: int) -> None:
    check_outer(corners((16, 16), tokens=tokens), config(tile_t=tile_t))


@pytest.mark.parametrize("tile_in", [16, 32, 64, 128])
@pytest.mark.parametrize("pattern", [HOLES, ("...", "xxx"), ("x", ".", "."), ("xxxxx", "x....", "xxxx.")])
@pytest.mark.parametrize("free", [0, 1, 5])
def test_programs_find_their_row(pattern: tuple[str, ...], tile_in: int, free: int) -> None:
    """Empty rows, rows that end inside a group, idle programs of a row, free slots in several groups."""
    check_outer(drawn(pattern, block=(16, 16), tokens=5, free=free), config(tile_in))


@pytest.mark.parametrize(("out_features", "in_features"), [(48, 61), (43, 64), (40, 56)])
@pytest.mark.parametrize("name", OUTERS)
def test_edges_on_either_side_aligned_or_not(name: str, out_features: int, in_features: int) -> None:
    outer, (bo, bi) = OUTERS[name]
    sizes = {"out_features": out_features + 3 * (bo - 16), "in_features": in_features + 4 * (bi - 16)}

    check_outer(corners((bo, bi), dtype=torch.float16, **sizes), outer)


@pytest.mark.parametrize("dy_layout", DY_LAYOUTS)
@pytest.mark.parametrize("features", [(48, 64), (43, 61)])
def test_any_strides(features: tuple[int, int], dy_layout: str) -> None:
    out_features, in_features = features
    x_layout = X_LAYOUTS[DY_LAYOUTS.index(dy_layout) % len(X_LAYOUTS)]
    sizes = {"out_features": out_features, "in_features": in_features}

    check_outer(corners((16, 16), x_layout=x_layout, dy_layout=dy_layout, **sizes), config())


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [(torch.float16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)],
)
@pytest.mark.parametrize("tokens", [20, 300])
def test_the_gradient_comes_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype, wanted: torch.dtype, tokens: int
) -> None:
    """Also through the workspace of splits."""
    check_outer(corners((16, 16), dtype=dtype, tokens=tokens), config(), dtype=wanted)


@pytest.mark.parametrize("name", OUTERS)
@pytest.mark.parametrize("tokens", [256, 259, 400])
def test_tokens_in_splits(name: str, tokens: int, sums: list[int]) -> None:
    """So few blocks that the tokens are cut: the parts meet in a workspace; the last split is short."""
    outer, block = OUTERS[name]

    check_outer(corners(block, tokens=tokens), outer)

    assert sums == [tokens // (8 * 16)]


@pytest.mark.parametrize("tokens", [37, 300])
@pytest.mark.parametrize("name", OUTERS)
def test_two_calls_agree_to_the_bit(name: str, tokens: int) -> None:
    outer, block = OUTERS[name]
    case = corners(block, tokens=tokens)

    with forced(outer):
        assert torch.equal(dvalues(case), dvalues(case))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [5, 300])
@pytest.mark.parametrize("name", OUTERS)
def test_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(name: str, tokens: int, number: float) -> None:
    outer, (bo, bi) = OUTERS[name]
    case = corners((bo, bi), tokens=tokens)
    case = replace(case, x=torch.full_like(case.x, number), dy=torch.full_like(case.dy, number))

    with forced(outer):
        grad = dvalues(case).cpu()

    assert not grad[case.row < 0].any()
    assert not grad[case.row == 2, bo - 11 :, :].any()
    assert not grad[case.col == 3, :, bi - 9 :].any()
    assert not grad[(case.row == 0) & (case.col == 0)].isfinite().any()


def test_a_nan_in_dy_reaches_only_its_row_and_one_in_x_only_its_column() -> None:
    """Blocks side by side in one program, too."""
    outer, (bo, bi) = OUTERS["groups"]
    case = corners((bo, bi))
    dy, x = case.dy.clone(), case.x.clone()
    dy[3, 2 * bo + 1] = x[30, bi + 1] = float("nan")

    with forced(outer):
        clean, grad = dvalues(case).cpu(), dvalues(replace(case, dy=dy, x=x)).cpu()

    hit = torch.zeros_like(grad, dtype=torch.bool)
    hit[case.row == 2, 1] = hit[case.col == 1, :, 1] = True
    hit[case.col == 3, :, -9:] = hit[case.row == 2, -11:] = hit[case.row < 0] = False
    assert torch.equal(grad.isnan(), hit)
    assert torch.equal(grad[~hit], clean[~hit])


# Norms.


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    in_dtypes(((16, 16), 16), ((16, 16), 64), ((32, 32), 64), ((64, 16), 32), ((16, 128), 128)),
)
def test_norms_of_chosen_blocks(sizes: tuple[tuple[int, int], int], dtype: torch.dtype) -> None:
    check_block_norms(corners(sizes[0], dtype=dtype), config(sizes[1]))


def test_norms_of_tokens_in_splits() -> None:
    """The norm of a sum is formed after the sum."""
    check_block_norms(corners((16, 16), tokens=300), config())


# Far away.


@pytest.mark.parametrize("tile_t", [16, 64])
@pytest.mark.parametrize("per_split", [16, 64])
def test_tokens_behind_the_element_2_to_the_31(tile_t: int, per_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reached by a later turn, by a later token of one turn, and by a later split."""
    monkeypatch.setattr(linear, "tokens_per_split", lambda *args: max(tile_t, per_split))
    case = drawn(("xx",), block=(16, 16), tokens=33, out_features=16, in_features=32, dtype=torch.float16)
    here = case.on(DEVICE)

    with forced(config(tile_t=tile_t)):
        grad = linear.dvalues(far_apart(case.dy), far_apart(case.x), here.index, (16, 16), case.geometry, torch.float16)

    check_dvalues(case, grad, torch.float16)


def test_rows_that_are_2_to_the_31_elements_apart() -> None:
    """The stride itself is no int32."""
    case = drawn(("xx",), block=(16, 16), tokens=2, out_features=16, in_features=32, dtype=torch.float16)
    x, dy = far_apart(case.x, 2**31), far_apart(case.dy, 2**31)

    with forced(config(tile_t=16)):
        grad = linear.dvalues(
            dy, x, case.on(DEVICE).index, (16, 16), LinearShape(x.shape[-1], dy.shape[-1]), torch.float16
        )

    check_dvalues(case, grad, torch.float16)


def test_a_slot_behind_the_element_2_to_the_31() -> None:
    """The only block, in slot 2**23: the launcher is told of one slot, so the others need not be written."""
    case = drawn(("x",), block=(16, 16), tokens=5, out_features=16, in_features=16, free=0)
    here, slot = case.on(DEVICE), 2**23
    out = huge((slot + 1) * 256, torch.float32).view(-1, 16, 16)
    row_ptr, column, slots = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 1], [0], [slot]))

    with forced(config()):
        linear.outer_blocks("dvalues", here.dy, here.x, (row_ptr, column, slots), 1, (16, 16), out, lambda: out)

    check_dvalues(case, out[slot:], torch.float32)


def test_a_workspace_of_more_than_2_to_the_31_elements() -> None:
    """The second split of as many slots; only the first slot of each is computed and added up."""
    case = drawn(("x",), block=(16, 16), tokens=32, out_features=16, in_features=16, free=0)
    here, slots = case.on(DEVICE), 2**23
    parts, out = huge(2 * slots * 256, torch.float32), torch.empty(1, 16, 16, device=DEVICE)
    row_ptr, zero = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0, 1], [0]))

    outer_kernel[(1, 2, 1)](
        here.dy, here.x, row_ptr, zero, zero, parts,
        32, 16, 1, slots, 2, 16, 16, 4, 4, 4, 4,
        ALIGN=4, BO=16, BI=16, TILE_IN=32, TILE_T=16, EDGE_T=False, EDGE_IN=False, EDGE_OUT=False,
        NORMS=False, PRECISION="ieee",
    )  # fmt: skip
    sum_splits_kernel[(1,)](parts, out, slots, 2, SIZE=256, NORMS=False)

    check_dvalues(case, out, torch.float32)


# Convolutions.

SPLIT = {"images": 4, "height": 9, "width": 11, "blocks": 3, "padding": (0, 1, 1, 0)}
"""So few blocks that the pixels are cut; the last split is short."""


@pytest.mark.parametrize("tile_in", [16, 64, 128])
@pytest.mark.parametrize("free", [0, 5])
def test_of_a_convolution_programs_find_their_row(tile_in: int, free: int) -> None:
    check_outer(edge_case(images=1, height=3, width=3, free=free, blocks=9, groups=2), Outer(tile_in, 16, 4, 3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("given", "config"), [({}, GATHER), ({"block": (16, 32)}, PARTS)])
def test_pixels_in_splits(given: dict, config: tuple, dtype: torch.dtype, sums: list[int]) -> None:
    check_outer(edge_case(**SPLIT, **given, dtype=dtype), *config)
    assert sums == [2]


@pytest.mark.parametrize("tile_t", [16, 64, 128])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (2, 40), (9, 2)])
def test_tiles_over_rows_and_images(tile_t: int, height: int, width: int) -> None:
    """A tile spans less than a row, several rows, several images, with a stride."""
    given = {"height": height, "width": width, "images": 5, "stride": (2, 3), "padding": (1, 1, 2, 1), "blocks": 4}

    check_outer(edge_case(**given), Outer(32, tile_t, 4, 3))


def test_of_a_convolution_the_gradient_comes_in_the_dtype_that_is_asked_for() -> None:
    check_outer(edge_case(dtype=torch.float16, blocks=3), *GATHER, dtype=torch.float32)


def test_of_a_convolution_two_calls_agree_to_the_bit() -> None:
    case = edge_case(**SPLIT)
    with forced(*GATHER):
        assert torch.equal(dvalues(case), dvalues(case))


@pytest.mark.parametrize("given", [{}, {"groups": 2, "group_out": 21, "group_in": 16}])
def test_of_a_convolution_phantom_elements_and_free_slots_are_zero_whatever_dy_and_x_hold(given: dict) -> None:
    check_that_phantom_elements_are_zero(edge_case(**{"padding": (0, 0, 0, 0), **given}), *GATHER)


@pytest.mark.parametrize("given", [{"images": 1}, {"kernel": (1, 2), "images": 8, "groups": 2}])
def test_of_a_convolution_norms_of_chosen_blocks(given: dict) -> None:
    """The second one in splits: the norm of a sum is formed after the sum."""
    check_block_norms(edge_case(**given), *GATHER)
