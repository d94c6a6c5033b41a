"""The results that kernels must give: those of a masked dense layer in float64, built from row and col alone.

Nothing here uses sparsekern's own conversions. The checks take a :class:`Case` of a linear layer or a
:class:`tests.oracle_conv2d.ConvCase`. They compare a result with the exact one, element by element, under a tolerance
that follows from the arithmetic:

    |err| <= 2 * err_dense + (k + 2) * eps_acc * magnitude + eps_out * |exact|

``err_dense`` is the error of PyTorch's own dense op of that dtype on the same numbers, ``k`` how many products the sum
has, ``eps_acc`` the precision in which sums are formed, ``magnitude`` the same sum over absolute values. Where nothing
is stored, all of it is zero: an empty block row, a free slot and a phantom element are checked to the bit.

PyTorch's dense op gets its numbers contiguous: on a processor with AMX its bfloat16 one multiplies what lies beside a
strided row by zero, and with the NaN that a case has there the tolerance would be NaN.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from sparsekern.kernels.contract import ConvShape, Index, LinearShape, accumulate_dtype
from torch import Tensor
from torch.nn.functional import linear as dense_linear

from sparsekern.ops import Probe, linear
from sparsekern.topology import Grid, Topology, build_index

if TYPE_CHECKING:
    AnyCase = "Case | ConvCase"

F64 = torch.float64
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCKS = (
    *((1, 1), (2, 3), (3, 2), (4, 4), (1, 5), (5, 7), (8, 16), (16, 8), (16, 16)),
    *((32, 32), (64, 64), (128, 128), (32, 64), (128, 16)),
)
X_LAYOUTS = ("contiguous", "transposed", "columns of a wider one", "every second row")
DY_LAYOUTS = (*X_LAYOUTS, "one row expanded", "one number expanded")
GARBAGE = 1000.0
"""What free slots and phantom elements of ``values`` hold in a case: no kernel may let it through."""


# The oracle.


def dense_weight(values: Tensor, row: Tensor, col: Tensor, out_features: int, in_features: int) -> Tensor:
    """Return the float64 ``(O, I)`` weight: each stored block at its place, cut off at the edge, zero elsewhere."""
    cells = _cells(torch.zeros(0, dtype=F64), out_features, in_features, values.shape[1:])
    used = row >= 0
    cells[row[used].long(), :, col[used].long(), :] = values[used].to(F64)
    return cells.flatten(2).flatten(0, 1)[:out_features, :in_features]


def stored_blocks(weight: Tensor, row: Tensor, col: Tensor, block: tuple[int, int]) -> Tensor:
    """Return ``(Z, bo, bi)``: what a dense ``(O, I)`` matrix holds at each slot; zero in free slots and phantom."""
    cells = _cells(weight, *weight.shape, block)
    cells.flatten(2).flatten(0, 1)[: weight.shape[0], : weight.shape[1]] = weight
    values = weight.new_zeros(len(row), *block)
    used = row >= 0
    values[used] = cells[row[used].long(), :, col[used].long(), :]
    return values


def _cells(like: Tensor, out_features: int, in_features: int, block: tuple[int, ...]) -> Tensor:
    """Return zeros ``(R, bo, C, bi)``: whole blocks that an ``(O, I)`` matrix fits into."""
    bo, bi = block
    return like.new_zeros(-(-out_features // bo), bo, -(-in_features // bi), bi)


@dataclass(frozen=True)
class Case:
    """One linear layer with the numbers that go through it."""

    grid: Grid
    row: Tensor
    col: Tensor
    x: Tensor
    values: Tensor
    bias: Tensor | None
    dy: Tensor

    @property
    def index(self) -> Index:
        return build_index(Topology(self.grid, self.row, self.col))

    @property
    def geometry(self) -> LinearShape | ConvShape:
        return LinearShape(self.grid.in_features, self.grid.out_features)

    @property
    def size(self) -> tuple[int, ...]:
        return ()

    def op(self, x: Tensor, values: Tensor, bias: Tensor | None, probe: Probe | None = None) -> Tensor:
        return linear(x, values, bias, self.index, self.grid, probe)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return dense_linear(x, weight, bias)

    def gradients(self, dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return dy @ weight, dy.T @ x

    def gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        return dy.T @ x

    def blocks_at(self, gradient: Tensor, row: Tensor, col: Tensor) -> Tensor:
        return stored_blocks(gradient, row, col, self.grid.block)

    def scaled(self, gradient: Tensor, u: Tensor, v: Tensor) -> Tensor:
        return gradient * u.view(-1, 1) * v

    @property
    def terms_of_y(self) -> Tensor:
        return self.stored.sum(1)

    @property
    def terms_of_dx(self) -> Tensor:
        return self.stored.sum(0)

    def on(self, device: str) -> Case:
        """Return the case with its tensors on a device, in the same layout; checks want the one on the CPU."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        return replace(self, **{name: moved(tensor, device) for name, tensor in tensors.items()})

    def dense(self, values: Tensor) -> Tensor:
        return dense_weight(values, self.row, self.col, self.grid.out_features, self.grid.in_features)

    @cached_property
    def weight(self) -> Tensor:
        """The exact weight as a kernel reads it: rounded to the compute dtype."""
        return self.dense(self.values.to(self.x.dtype))

    @cached_property
    def stored(self) -> Tensor:
        """1 where an element of the weight is stored, else 0."""
        return self.dense(torch.ones_like(self.values))


# The tolerance.


def check_y(case: AnyCase, y: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``y`` is ``x W' + bias``; ``products`` is the precision of a factor, if not exact."""
    weight, dtype, bias = case.weight, case.x.dtype, case.bias
    exact = case.product(case.x.to(F64), weight, None if bias is None else bias.to(F64))
    magnitude = case.product(case.x.to(F64).abs(), weight.abs(), None if bias is None else bias.to(F64).abs())
    peer = case.product(alone(case.x), weight.to(dtype), None if bias is None else bias.to(dtype))
    assert_within("y", y, exact, peer, magnitude, case.terms_of_y, dtype, products=products)


def check_dx(case: AnyCase, dx: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``dx`` is ``dy W``."""
    weight, dtype, dy, x = case.weight, case.dy.dtype, case.dy.to(F64), case.x.to(F64)
    exact, magnitude = (case.gradients(dy, x, weight)[0], case.gradients(dy.abs(), x, weight.abs())[0])
    peer = case.gradients(alone(case.dy), alone(case.x), weight.to(dtype))[0]
    assert_within("dx", dx, exact, peer, magnitude, case.terms_of_dx, dtype, products=products)


def check_dvalues(case: AnyCase, dvalues: Tensor, dtype: torch.dtype, products: float = 0.0) -> None:
    """Raise AssertionError unless ``dvalues`` are the stored blocks of ``dy' x`` in ``dtype``."""
    dy, x = case.dy.to(F64), case.x.to(F64)
    wide = torch.promote_types(case.x.dtype, dtype)  # an output wider than the input is compared with a wide dense op

    def blocks(dy: Tensor, x: Tensor) -> Tensor:
        return case.blocks_at(case.gradient(dy, x), case.row, case.col)

    exact, magnitude = blocks(dy, x), blocks(dy.abs(), x.abs())
    peer = blocks(alone(case.dy.to(wide)), alone(case.x.to(wide))).to(dtype)
    if dy.dim() == 4:
        # oneDNN's bfloat16 gradient of some dilated kernels reads memory that nobody wrote (torch 2.13): no peer there.
        peer = torch.where(peer.isfinite(), peer, exact.to(dtype))
    sums = accumulate_dtype(case.x.dtype)
    assert_within("dvalues", dvalues, exact, peer, magnitude, tokens_of(dy), dtype, sums, products)


def tokens_of(dy: Tensor) -> Tensor:
    return torch.tensor(float(dy[:, :1].numel()))


def alone(x: Tensor) -> Tensor:
    """Return tokens as a contiguous copy: PyTorch's bfloat16 product was seen to read the NaN beside strided ones."""
    return x.contiguous() if x.dim() == 2 else x


def assert_within(
    name: str,
    result: Tensor,
    exact: Tensor,
    peer: Tensor,
    magnitude: Tensor,
    terms: Tensor,
    dtype: torch.dtype,
    sums: torch.dtype | None = None,
    products: float = 0.0,
) -> None:
    """Raise AssertionError unless ``result`` has the shape of ``exact``, the ``dtype``, and errors in the tolerance.

    Both factors of a product may be off by ``products``, where the hardware rounds them (tf32); else they are exact.
    """
    assert result.shape == exact.shape, f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}"
    assert result.dtype == dtype, f"{name} is {result.dtype}, not {dtype}"
    result = result.cpu()
    eps_acc, eps_out = torch.finfo(sums or accumulate_dtype(dtype)).eps, torch.finfo(dtype).eps
    err_dense = (peer.to(F64) - exact).abs()
    bound = 2 * err_dense + ((terms + 2) * eps_acc + 2 * products) * magnitude + eps_out * exact.abs()
    good = (result.to(F64) - exact).abs() <= bound  # NaN is not
    if not bool(good.all()):
        at = tuple((~good).nonzero()[0].tolist())
        raise AssertionError(
            f"{name}[{at}] is {float(result[at])!r}, not {float(exact[at])!r} +- {float(bound[at]):.3g}; "
            f"{int((~good).sum())} of {good.numel()} elements are wrong"
        )


def check_kernels(backend: ModuleType, case: AnyCase, device: str = "cpu", products: float = 0.0) -> None:
    """Raise AssertionError unless the products of a backend are what the oracle says, in the layout of the contract."""
    here, geometry, dtype = case.on(device), case.geometry, case.values.dtype
    index, kernels = here.index, backend.kernels(geometry)
    y = kernels.fwd(here.x, here.values, here.bias, index, geometry)
    check_y(case, y, products)
    dx = kernels.dx(here.dy, here.values, index, geometry, case.size)
    check_dx(case, dx, products)
    for name, result in (("y", y), ("dx", dx)):
        native = result.permute(0, 2, 3, 1) if result.dim() == 4 else result
        assert native.is_contiguous(), f"{name} is not channels last, or not contiguous: {result.stride()}"
    dvalues = kernels.dvalues(here.dy, here.x, index, case.grid.block, geometry, dtype)
    check_dvalues(case, dvalues, dtype, products)
    both = kernels.backward(here.dy, here.x, here.values, index, geometry)
    assert all(torch.equal(a, b) for a, b in zip(both, (dx, dvalues), strict=True)), "backward differs from its halves"
    assert both[0].stride() == dx.stride() and both[1].dtype == dtype and both[1].is_contiguous()


def check_op(case: AnyCase, device: str = "cpu") -> None:
    """Raise AssertionError unless the op of ``sparsekern.ops`` and its backward give what the oracle says."""
    here = case.on(device)
    x, values = here.x.detach().requires_grad_(), here.values.detach().requires_grad_()
    bias = None if here.bias is None else here.bias.detach().requires_grad_()
    y = here.op(x, values, bias)
    check_y(case, y.detach())
    y.backward(here.dy)
    assert x.grad is not None and values.grad is not None
    check_dx(case, x.grad)
    check_dvalues(case, values.grad, values.dtype)
    if bias is not None:
        assert bias.grad is not None
        dy, axes = case.dy.to(F64), tuple(axis for axis in range(case.dy.dim()) if axis != 1)
        exact, peer, magnitude = dy.sum(axes), case.dy.sum(axes), dy.abs().sum(axes)
        assert_within("dbias", bias.grad, exact, peer, magnitude, tokens_of(dy), bias.dtype)


# Scores.


def all_cells(case: AnyCase) -> tuple[Tensor, Tensor]:
    keys = torch.arange(case.grid.cells, dtype=torch.int32)
    return keys // case.grid.cols, keys % case.grid.cols


def gradient_blocks(dy: Tensor, x: Tensor, case: AnyCase) -> Tensor:
    """Return the gradient of the whole weight as ``(R * C, bo, bi)``, in the dtype of dy and x."""
    return case.blocks_at(case.gradient(dy, x), *all_cells(case))


def check_norms(case: AnyCase, norms: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``norms`` are those of all blocks, within the tolerance of their elements.

    A norm moves by no more than the norm of what its elements move by, so the elements' tolerance, taken as blocks,
    bounds it; and it is itself a sum of ``bo * bi`` squares.
    """
    dy, x, dtype = case.dy.to(F64), case.x.to(F64), accumulate_dtype(case.x.dtype)
    exact = gradient_blocks(dy, x, case).norm(dim=(1, 2))
    magnitude = gradient_blocks(dy.abs(), x.abs(), case).norm(dim=(1, 2))
    peer = gradient_blocks(case.dy.to(dtype), case.x.to(dtype), case).norm(dim=(1, 2))
    terms = tokens_of(dy) + case.grid.block[0] * case.grid.block[1]
    assert_within("norms", norms.flatten(), exact, peer, magnitude, terms, dtype, products=products)


def check_sketch(case: AnyCase, sketch: Tensor, u: Tensor, v: Tensor, products: float = 0.0) -> None:
    """Raise AssertionError unless ``sketch (r, R, C)`` is ``u' G v`` of every block."""
    grid, dtype = case.grid, accumulate_dtype(case.x.dtype)

    def of(dy: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        gradient = case.gradient(dy, x)
        scaled = (case.scaled(gradient, a, b) for a, b in zip(u, v, strict=True))
        sums = [case.blocks_at(g, *all_cells(case)).sum((1, 2)) for g in scaled]
        return torch.stack(sums).view(-1, grid.rows, grid.cols)

    dy, x, u64, v64 = case.dy.to(F64), case.x.to(F64), u.to(F64), v.to(F64)
    terms = tokens_of(dy) + sum(grid.block)  # two inner products, then the sum over tokens
    magnitude = of(dy.abs(), x.abs(), u64.abs(), v64.abs())
    peer = of(case.dy.to(dtype), case.x.to(dtype), u.to(dtype), v.to(dtype))
    assert_within("sketch", sketch, of(dy, x, u64, v64), peer, magnitude, terms, dtype, products=products)


def signs(count: int, features: int, seed: int) -> Tensor:
    """Return ``(count, features)`` of -1 and 1."""
    return torch.randint(2, (count, features), generator=torch.Generator().manual_seed(seed)).float() * 2 - 1


# Layouts.


def moved(tensor: Tensor, device: str) -> Tensor:
    """Return the tensor on a device with its strides and its offset, beside the rest of its storage."""
    if tensor.device == torch.device(device):
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return storage.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())


# Random cases.


def random_case(seed: int, **given: Any) -> Case:
    """Draw a case from a seed; what is ``given`` is not drawn.

    Args:
        seed: of everything.
        given: any of ``block``, ``rows`` and ``cols`` (of blocks), ``out_features`` and ``in_features`` (else the
            matrix ends anywhere inside the last block row and column), ``blocks`` (stored), ``free`` (slots),
            ``tokens``, ``dtype``, ``values_dtype``, ``bias``, ``x_layout``, ``dy_layout``.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def pick(name: str, choices: Any) -> Any:
        drawn = draw.choice(choices)  # always drawn, so that what is given does not change the rest
        return given.pop(name, drawn)

    bo, bi = pick("block", BLOCKS)
    most = 12 if max(bo, bi) <= 8 else 5 if max(bo, bi) <= 32 else 3
    rows, cols = pick("rows", range(1, most + 1)), pick("cols", range(1, most + 1))
    out_features = pick("out_features", [rows * bo, *range((rows - 1) * bo + 1, rows * bo + 1)])
    in_features = pick("in_features", [cols * bi, *range((cols - 1) * bi + 1, cols * bi + 1)])
    grid = Grid(out_features, in_features, (bo, bi))
    blocks = pick("blocks", range(1, grid.cells + 1))
    free = pick("free", (0, 0, 1, 3))
    tokens = pick("tokens", (0, 1, 2, 7, 17, 33, 65))
    dtype = pick("dtype", DTYPES)
    values_dtype = given.pop("values_dtype", dtype)
    bias = pick("bias", (True, False))
    x_layout, dy_layout = pick("x_layout", X_LAYOUTS), pick("dy_layout", DY_LAYOUTS)
    if given:
        raise TypeError(f"unknown: {', '.join(given)}")

    cells = torch.randperm(grid.cells, generator=generator)[:blocks].int()
    order = torch.randperm(blocks + free, generator=generator)  # slots are in no order, free ones between
    row, col = (torch.cat([c, c.new_full((free,), -1)])[order] for c in (cells // grid.cols, cells % grid.cols))
    values = torch.randn(blocks + free, bo, bi, generator=generator, dtype=F64)
    values[row < 0] = GARBAGE
    values[row == grid.rows - 1, out_features - (grid.rows - 1) * bo :, :] = GARBAGE
    values[col == grid.cols - 1, :, in_features - (grid.cols - 1) * bi :] = GARBAGE
    return Case(
        grid=grid,
        row=row,
        col=col,
        x=lay_out(torch.randn(tokens, in_features, generator=generator, dtype=F64).to(dtype), x_layout),
        values=values.to(values_dtype),
        bias=torch.randn(out_features, generator=generator, dtype=F64).to(values_dtype) if bias else None,
        dy=lay_out(torch.randn(tokens, out_features, generator=generator, dtype=F64).to(dtype), dy_layout),
    )


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return ``x (T, F)`` in other strides; an expanded one repeats the first row, or the first element."""
    tokens, features = x.shape
    if layout == "contiguous":
        return x
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "columns of a wider one":
        wide = x.new_full((tokens, features + 3), float("nan"))
        wide[:, 1:-2] = x
        return wide[:, 1:-2]
    if layout == "every second row":
        tall = x.new_full((2 * tokens, features), float("nan"))
        tall[::2] = x
        return tall[::2]
    if layout == "one row expanded":
        return x[:1].expand(tokens, features)
    if layout == "one number expanded":
        return x[:1, :1].expand(tokens, features)
    raise ValueError(f"layout {layout!r}")


def with_slots_reordered(case: AnyCase, order: Tensor) -> AnyCase:
    """Return the same weight with its blocks in other slots: slot ``order[z]`` becomes slot ``z``."""
    return replace(case, row=case.row[order], col=case.col[order], values=case.values[order])
