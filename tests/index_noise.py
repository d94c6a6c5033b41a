"""Indices that hold anything, for every native kernel: what is read of them must be checked, and raise a ValueError."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import Index
from torch import Tensor

from tests.kernels import calls
from tests.kernels.calls import AnyCase

Calls = dict[str, tuple[Callable[[Index], object], tuple[int, ...]]]
"""By name: a kernel on an index, and the numbers of the lists that it reads."""

NATIVE = calls.Calls(cpu)
ROWS, COLS = (0, 1, 2), (3, 4, 5)
LOWEST, HIGHEST = -(2**31), 2**31 - 1


def calls_of(case: AnyCase) -> Calls:
    """Return the native products of a layer or of a convolution."""
    return {
        "fwd": (lambda index: NATIVE.fwd(case, index), ROWS),
        "dx": (lambda index: NATIVE.dx(case, index), COLS),
        "dvalues": (lambda index: NATIVE.dvalues(case, None, index), ROWS),
        "backward": (lambda index: NATIVE.backward(case, index), ROWS + COLS),
    }


def copy_of(index: Index) -> Index:
    return Index(*(tensor.clone() for tensor in index))


def illegal(index: Index, number: int, block: tuple[int, int], seed: int) -> Iterator[Index]:
    """Yield copies of an index of which list ``number`` has one number that no kernel may follow."""
    draw = random.Random(seed)
    first = number // 3 * 3
    ptr, _, slot = index[first : first + 3]
    used, slots, others = int(ptr[-1]), index.slots, index[3 - first].shape[0] - 1
    for bad in (LOWEST, -1, (slots + 1, others, slots)[number % 3], HIGHEST):
        wrong = copy_of(index)
        entry = draw.randrange(used)
        if number == first:
            wrong[number][draw.choice((0, ptr.shape[0] - 1))] = bad
        else:
            wrong[number][int(slot[entry]) if number == first + 1 and block == (1, 1) else entry] = bad
        yield wrong


def noises(index: Index, seed: int) -> Iterator[Index]:
    """Yield copies of an index of which one list, or all of them, hold noise of several kinds."""
    for number in (*range(6), None):
        for kind in range(5):
            wrong = copy_of(index)
            for at in range(6) if number is None else (number,):
                write_noise(wrong[at], index, kind, seed + at)
            yield wrong


def write_noise(tensor: Tensor, index: Index, kind: int, seed: int) -> None:
    """Write over an int32 list: anything, near what is legal, legal but in no order, one number, or bits of floats."""
    generator = torch.Generator().manual_seed(seed)
    near = max(index.slots, index.row_ptr.shape[0], index.col_ptr.shape[0])
    if kind == 4:
        tensor.copy_(torch.randn(tensor.shape, generator=generator).view(torch.int32))
    elif kind == 3:
        tensor.fill_((LOWEST, -1, 0, 1, near, HIGHEST)[seed % 6])
    else:
        low, high = ((LOWEST, HIGHEST), (-2, near + 3), (0, min(t.shape[0] for t in (index[0], index[3])) - 1))[kind]
        drawn = torch.randint(low, high, tensor.shape, generator=generator).int()
        tensor.copy_(drawn.sort().values if kind == 2 and seed % 2 else drawn)


def survive(call: Callable[[Index], object], index: Index) -> bool:
    """Call a kernel; return whether it refused the index."""
    try:
        call(index)
    except ValueError as error:
        if "was given an index" not in str(error):
            raise
        return True
    return False


def survive_writer(kernels: Calls, index: Index, times: int) -> None:
    """Call kernels while another thread writes into the lists of the index that they read."""
    legal, over = copy_of(index), threading.Event()

    def write() -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            for tensor, good in zip(index, legal, strict=True):
                write_noise(tensor, legal, turn % 5, turn)
                tensor.copy_(good)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(times):
            for call, _ in kernels.values():
                survive(call, index)
    finally:
        over.set()
        writer.join()
    for tensor, good in zip(index, legal, strict=True):
        tensor.copy_(good)
    assert not any(survive(call, index) for call, _ in kernels.values())
