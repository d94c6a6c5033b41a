"""Bounds of memory for Triton's interpreter: a kernel may touch what it was given, and nothing else.

The interpreter reads and writes raw addresses, so an access beside a tensor mostly hits some other one and goes
unnoticed, as on a GPU. :func:`guarded` checks each address whose mask is on against the arguments of the launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor


class Extent(NamedTuple):
    """The bytes from the first to the last element of an argument, which may be a view."""

    name: str
    start: int
    stop: int
    dtype: np.dtype[Any]

    def distance(self, address: int) -> int:
        """Return how many bytes an address is away; 0 inside."""
        return max(self.start - address, address - self.stop + 1, 0)


def extent(name: str, tensor: Tensor) -> Extent:
    """Return the extent of a tensor that is not empty."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    bits = torch.uint16 if tensor.dtype == torch.bfloat16 else tensor.dtype  # as the interpreter keeps it
    dtype = np.dtype(str(bits).removeprefix("torch."))
    return Extent(name, start, start + (last + 1) * tensor.element_size(), dtype)


class Guard:
    """Stands before the interpreter's own load and store."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.kernel = ""
        self.patched: set[str] = set()
        self.extents: list[Extent] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def load(self, addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        self._check("reads", addresses, mask, np.dtype(dtype))
        return self._native.load(addresses, mask, other, dtype)

    def store(self, addresses: Any, value: Any, mask: Any) -> Any:
        self._check("writes", addresses, mask, value.dtype)
        return self._native.store(addresses, value, mask)

    def _check(self, verb: str, addresses: Any, mask: Any, dtype: np.dtype[Any]) -> None:
        touched = addresses[np.broadcast_to(mask, addresses.shape)]
        if touched.size == 0:
            return
        mine = [e for e in self.extents if e.dtype == dtype]
        low, high = int(touched.min()), int(touched.max()) + dtype.itemsize
        if any(e.start <= low and high <= e.stop for e in mine):
            return
        inside = np.zeros(touched.shape, bool)
        for e in mine:
            inside |= (touched >= e.start) & (touched <= e.stop - dtype.itemsize)
        if inside.all():
            return
        address = int(touched[~inside][0])
        if not mine:
            raise AssertionError(f"{self.kernel} {verb} {dtype} and was given none")
        near = min(mine, key=lambda e: e.distance(address))
        element, end = ((place - near.start) // dtype.itemsize for place in (address, near.stop))
        raise AssertionError(
            f"{self.kernel} {verb} element {element} of {near.name}, which ends at {end}; "
            f"{int((~inside).sum())} of {touched.size} addresses are wrong"
        )


@contextmanager
def guarded() -> Iterator[None]:
    """Raise AssertionError when an interpreted kernel reads or writes what it was not given."""
    from triton.runtime import interpreter
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpreterOptions
    from triton.tools.tensor_descriptor import TensorDescriptor

    guard = Guard(interpreter._interpreter)
    to_host, launch = interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__
    patch_language = interpreter._patch_lang

    def recording(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = to_host(self, args, kwargs)
        named = {**dict(zip(self.arg_names, on_host[0], strict=False)), **on_host[1]}
        tensors = {n: a.base if isinstance(a, TensorDescriptor) else a for n, a in named.items()}
        guard.kernel = self.fn.__name__
        guard.extents = [extent(n, t) for n, t in tensors.items() if isinstance(t, Tensor) and t.numel() > 0]
        return on_host

    def patch_once(fn: Any) -> Any:
        """Put the interpreter's language in place once a launch, not at each call of a function in it: it is slow."""
        module = fn.__globals__["__name__"]
        if module in guard.patched:
            return None
        guard.patched.add(module)
        return patch_language(fn)

    def launching(self: Any, *args: Any, **kwargs: Any) -> Any:
        guard.patched.clear()
        try:
            return launch(self, *args, **kwargs)
        except InterpreterError as error:  # one around each function of the kernel
            cause: BaseException | None = error
            while isinstance(cause, InterpreterError):
                cause = cause.__cause__
            if isinstance(cause, AssertionError):
                raise cause from None
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", guard)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        # Without debug it only computes for each sum whether it overflows, and drops that: half the time of a kernel.
        patch.setattr(interpreter.interpreter_builder, "options", InterpreterOptions(sanitize_overflow=False))
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", recording)
        patch.setattr(interpreter.GridExecutor, "__call__", launching)
        yield
