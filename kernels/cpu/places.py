"""Operations on lists of places that an update of the topology needs, by counting instead of sorting, in C++.

The functions are those of :mod:`sparsekern.kernels.eager.places`, and return the same numbers. A list that is
``(n,)`` there takes at most 12 bytes an entry in the scratch of the library here.
"""

from __future__ import annotations

import ctypes

import torch
from sparsekern.kernels.contract import Index
from sparsekern.kernels.cpu.library import load
from sparsekern.kernels.eager import places as eager
from torch import Tensor

NO_MEMORY, REFUSED = 1, 2
"""Of ``csrc/places.cpp``; the second where a number lies outside the range that it was said to have."""


def takes(*lists: Tensor) -> bool:
    """Return whether these functions can read such lists: plain tensors on a CPU where the library is."""
    return all(type(a) is Tensor and a.device.type == "cpu" for a in lists) and load()[0] is not None


def orders_(index: Index, row: Tensor, col: Tensor, *, by_slot: bool, ascending: bool) -> None:
    """Write both orders of an index; see :func:`sparsekern.kernels.eager.places.orders_`."""
    rows, cols = index.row_ptr.shape[0] - 1, index.col_ptr.shape[0] - 1
    others = (None, None) if by_slot else (index.row_col, index.col_row)
    into = (index.row_ptr, index.row_slot, others[0], index.col_ptr, index.col_slot, others[1])
    written = [tensor for tensor in into if tensor is not None]
    fits = row.dtype is col.dtype is torch.int32 and row.shape == col.shape
    fits = fits and all(tensor.dtype is torch.int32 and tensor.is_contiguous() for tensor in written)
    fits = fits and min(t.shape[0] for t in written if t is not into[0] and t is not into[3]) >= row.shape[0]
    arguments = (_flat(row), _flat(col), row.shape[0], rows, cols, int(ascending), *into)
    if not fits or _run("sk_orders", *arguments) == REFUSED:
        eager.orders_(index, row, col, by_slot=by_slot, ascending=ascending)  # an order of its own for what is illegal
    else:  # a backward whose forward read the former index must notice
        torch.autograd.graph.increment_version(written)


def masked_(into: Index, index: Index, keep: Tensor, *, by_slot: bool) -> None:
    """Write the index of some slots; see :func:`sparsekern.kernels.eager.places.masked_`."""
    keep = _flat(keep)
    for (ptr, other, slot), (into_ptr, into_other, into_slot) in ((index[:3], into[:3]), (index[3:], into[3:])):
        others = (None, None) if by_slot else (other, into_other)
        sizes = ptr.shape[0] - 1, keep.shape[0]
        try:
            _must("sk_masked", ptr, others[0], slot, *sizes, keep, into_ptr, others[1], into_slot)
        finally:  # a backward whose forward read the former index must notice, also where the call ended midway
            written = (into_ptr, into_slot) if by_slot else (into_ptr, into_other, into_slot)
            torch.autograd.graph.increment_version(written)


def are_legal(row: Tensor, col: Tensor, rows: int, cols: int) -> bool:
    """Return whether places are; see :func:`sparsekern.kernels.eager.places.are_legal`."""
    return _run("sk_check", _flat(row), _flat(col), row.shape[0], rows, cols) != REFUSED


def distinct(keys: Tensor, present: Tensor, bound: int) -> Tensor:
    """Return different absent keys in order; see :func:`sparsekern.kernels.eager.places.distinct`."""
    into = torch.empty(keys.shape, dtype=torch.int32, device="cpu")
    count = torch.empty(1, dtype=torch.int64, device="cpu")
    lists = _flat(keys), keys.shape[0], _flat(present), present.shape[0]
    _must("sk_distinct", *lists, bound, into, count)
    return into[: int(count)]


def leave_out_(numbers: Tensor, positions: Tensor) -> Tensor:
    """Return the numbers at all other positions; see :func:`sparsekern.kernels.eager.places.leave_out_`."""
    _must("sk_leave_out", numbers, numbers.shape[0], positions, positions.shape[0])
    return numbers[: numbers.shape[0] - positions.shape[0]]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return positions of the lowest scores; see :func:`sparsekern.kernels.eager.places.lowest`."""
    return eager.lowest(scores, count) if scores.dtype is not torch.float32 else _select(scores, count, highest=False)


def highest(scores: Tensor, count: int) -> Tensor:
    """Return positions of the highest scores; see :func:`sparsekern.kernels.eager.places.highest`."""
    return eager.highest(scores, count) if scores.dtype is not torch.float32 else _select(scores, count, highest=True)


def _select(scores: Tensor, count: int, *, highest: bool) -> Tensor:
    wanted = min(count, scores.shape[0])
    positions = torch.empty(wanted + 1, dtype=torch.int64, device="cpu")  # how many were found is behind them
    _run("sk_select", _flat(scores), scores.shape[0], int(highest), wanted, positions)
    return positions[: int(positions[wanted])]


def find(places: Tensor, keys: Tensor, bound: int) -> Tensor:
    """Return the positions of keys; see :func:`sparsekern.kernels.eager.places.find`."""
    found = torch.empty(keys.shape, dtype=torch.int32, device="cpu")
    _must("sk_find", _flat(places), places.shape[0], bound, _flat(keys), keys.shape[0], found)
    return found


def first_occurrences(keys: Tensor, present: Tensor, bound: int) -> Tensor:
    """Return which keys are new; see :func:`sparsekern.kernels.eager.places.first_occurrences`."""
    keep = torch.empty(keys.shape, dtype=torch.bool, device="cpu")
    _must("sk_first", _flat(keys), keys.shape[0], _flat(present), present.shape[0], bound, keep)
    return keep


def places_of(keys: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Return the places of keys; see :func:`sparsekern.kernels.eager.places.places_of`."""
    row, col = (torch.empty(keys.shape, dtype=torch.int32, device="cpu") for _ in range(2))
    _run("sk_places", _flat(keys), keys.shape[0], cols, row, col)
    return row, col


def search(edges: Tensor, queries: Tensor) -> Tensor:
    """Return the first edges above queries; see :func:`sparsekern.kernels.eager.places.search`."""
    found = torch.empty(queries.shape, dtype=torch.int32, device="cpu")
    _must("sk_search", _flat(edges), edges.shape[0], _flat(queries), queries.shape[0], found)
    return found


def _flat(numbers: Tensor) -> Tensor:
    """Return a list as the library reads it; the caller keeps it until the call is over, by passing it on."""
    return numbers if numbers.is_contiguous() else numbers.contiguous()


def _must(name: str, *arguments: Tensor | int | None) -> None:
    """Run a function of the library on numbers that are in their range.

    Raises:
        ValueError: they are not.
    """
    if _run(name, *arguments) == REFUSED:
        raise ValueError(f"{name} met a number below 0 or too large: lists of places and their grid do not agree")


def _run(name: str, *arguments: Tensor | int | None) -> int:
    """Run a function of the library and return 0 or :data:`REFUSED`.

    Raises:
        MemoryError: no memory for the scratch.
        ValueError: a list without memory.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    result = int(getattr(library, name)(*map(_plain, arguments)))
    if result == NO_MEMORY:
        raise MemoryError(f"{name} finds no memory for its scratch")
    return result


def _plain(argument: Tensor | int | None) -> ctypes.c_void_p | ctypes.c_int64:
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    address = argument.data_ptr()
    if not address and argument.numel():
        raise ValueError("the storage of a list of places was resized to nothing: restore it before the call")
    return ctypes.c_void_p(address)
