"""The compiled library: finding it, choosing its instruction set, calling it.

``SPARSEKERN_CPU`` asks for one: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2``, ``generic``, or ``off`` for none. The
first two are ``avx512`` with instructions for bfloat16. What the machine lacks, or a library that was never built, is
an error then; without the variable it is a reason to take the eager kernels.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

ABI = 9
FILE = Path(__file__).parent / "_sparsekern_cpu.so"
CHOICES = ("amx", "avx512_bf16", "avx512", "avx2", "generic", "off")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


FAILURES: dict[int, tuple[type[Exception], str]] = {
    1: (MemoryError, "finds no memory for its scratch"),
    2: (
        ValueError,
        "was given an index with a block row, block column or slot that its grid does not have, or one that another "
        "thread changed meanwhile: build it anew, of a layer with sparsekern.refresh_(model)",
    ),
    3: (ValueError, "was given a tensor whose storage was resized to nothing: restore the storage before the call"),
    4: (
        MemoryError,
        "cannot plan a convolution of such a padding, stride or dilation: the part of the padded input that it would "
        "hold at a time has more than 2**30 numbers",
    ),
}
"""What the codes of ``csrc/library.h`` mean."""


class Matrix(ctypes.Structure):
    """``Matrix`` of ``csrc/api.h``."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_stride", ctypes.c_int64),
        ("col_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )

    @classmethod
    def of(cls, x: Tensor) -> Matrix:
        """Describe a 2-D tensor that is no negated view and that outlives the call."""
        return cls(x.data_ptr(), *x.shape, *x.stride(), DTYPES[x.dtype])


class Order(ctypes.Structure):
    """``Order`` of ``csrc/api.h``; what the library fills in itself is last."""

    _fields_ = (
        ("ptr", ctypes.c_void_p),
        ("other", ctypes.c_void_p),
        ("slot", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("slots", ctypes.c_int64),
        ("others", ctypes.c_int64),
        ("illegal", ctypes.c_void_p),
    )

    @classmethod
    def of(cls, ptr: Tensor, other: Tensor, slot: Tensor, slots: int) -> Order:
        """Describe one order of an index."""
        return cls(ptr.data_ptr(), other.data_ptr(), slot.data_ptr(), ptr.shape[0] - 1, slots)


class ElementPlan(ctypes.Structure):
    """``ElementPlan`` of ``csrc/api.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("lanes", "tokens", "strip", "strips", "chunks", "entries")),
        ("shift", ctypes.c_int32),
    )


class Multiply(ctypes.Structure):
    """``Multiply`` of ``csrc/api.h``; what the library fills in itself is last."""

    _fields_ = (
        ("x", Matrix),
        ("y", Matrix),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("order", Order),
        ("side_in", ctypes.c_int32),
        ("side_out", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("values_dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("past", ctypes.c_int32),
        ("wanted", ctypes.c_void_p),
        ("panel", ctypes.c_int64),
        ("plan", ElementPlan),
        ("groups", ctypes.c_int64),
        ("group_entries", ctypes.c_int64),
        ("shared", ctypes.c_int32),
        ("scratch", ctypes.c_void_p),
    )


class Outer(ctypes.Structure):
    """``Outer`` of ``csrc/api.h``."""

    _fields_ = (
        ("dy", Matrix),
        ("x", Matrix),
        ("out", ctypes.c_void_p),
        ("order", Order),
        ("bo", ctypes.c_int32),
        ("bi", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("panel", ctypes.c_int64),
        ("panels_at_once", ctypes.c_int64),
        ("wanted_dy", ctypes.c_void_p),
        ("wanted_x", ctypes.c_void_p),
        ("plan", ElementPlan),
        ("scratch", ctypes.c_void_p),
    )


class SketchPlan(ctypes.Structure):
    """``SketchPlan`` of ``csrc/api.h``."""

    _fields_ = (("panel", ctypes.c_int64), ("floats", ctypes.c_int64))


class Sketch(ctypes.Structure):
    """``Sketch`` of ``csrc/api.h``."""

    _fields_ = (
        ("dy", Matrix),
        ("x", Matrix),
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("pairs", ctypes.c_int64),
        ("bo", ctypes.c_int32),
        ("bi", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("plan", SketchPlan),
        ("scratch", ctypes.c_void_p),
    )


class Backward(ctypes.Structure):
    """``Backward`` of ``csrc/api.h``."""

    _fields_ = (("dx", Multiply), ("dvalues", Outer))


Pair = ctypes.c_int64 * 2


class Conv(ctypes.Structure):
    """``Conv`` of ``csrc/conv.h``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("order", Order),
        ("images", ctypes.c_int64),
        ("in_channels", ctypes.c_int64),
        ("out_channels", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("in_size", Pair),
        ("out_size", Pair),
        ("kernel", Pair),
        ("stride", Pair),
        ("padding", Pair),
        ("dilation", Pair),
        ("bo", ctypes.c_int32),
        ("bi", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


class ConvGradients(ctypes.Structure):
    """``ConvGradients`` of ``csrc/conv.h``."""

    _fields_ = (("dx", Conv), ("dvalues", Conv))


class ConvSketch(ctypes.Structure):
    """``ConvSketch`` of ``csrc/conv.h``; what the library fills in itself is last."""

    _fields_ = (
        ("conv", Conv),
        ("u", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("pairs", ctypes.c_int64),
        ("plan", SketchPlan),
        ("scratch", ctypes.c_void_p),
    )


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """Return the opened library and the name of its instruction set, or None and the reason why there is none.

    Raises:
        ValueError: ``SPARSEKERN_CPU`` is none of :data:`CHOICES`.
        RuntimeError: it asks for what cannot be had.
    """
    asked = os.environ.get("SPARSEKERN_CPU", "")
    if asked and asked not in CHOICES:
        raise ValueError(f"SPARSEKERN_CPU is {asked!r}; it must be one of {', '.join(CHOICES)}")
    if asked == "off":
        return None, "SPARSEKERN_CPU is off"
    library, reason = _open()
    if library is None:
        if asked:
            raise RuntimeError(f"SPARSEKERN_CPU is {asked!r}, but the native library {reason}")
        return None, f"the native library {reason}"
    if not library.sk_use(asked.encode()):
        raise RuntimeError(f"SPARSEKERN_CPU is {asked!r}, but this processor lacks it; unset it to take the best")
    return library, library.sk_name().decode()


def _open() -> tuple[ctypes.CDLL | None, str]:
    if not FILE.is_file():
        return None, "was not built (no C++ compiler at installation?); install one and run: pip install -e ."
    try:
        if _is_truncated(FILE):
            return None, "is truncated; build again: pip install -e ."
        library = ctypes.CDLL(str(FILE))  # torch was imported first: its OpenMP runtime is shared, not doubled
        abi = library.sk_abi()
    except (OSError, AttributeError) as error:  # a missing runtime, not our file
        return None, f"cannot be used: {error}"
    if abi != ABI:
        return None, f"has interface {abi} and this source needs {ABI}; build again: pip install -e ."
    library.sk_name.restype = ctypes.c_char_p
    library.sk_scratch_bytes.restype = ctypes.c_int64
    return library, ""


def _is_truncated(file: Path) -> bool:
    """Return whether an ELF file ends before its table of sections, the last thing in it: opening it would crash."""
    with file.open("rb") as opened:
        header = opened.read(64)
    if not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian; what is none is refused by dlopen
        return False
    if len(header) < 64:
        return True
    (table,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return bool(table + size * count > file.stat().st_size)


_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """Return how many threads a call may take: one in a forked child, which OpenMP's threads did not come to.

    The library says so too, to children of a process that had opened it; this is for one that is opened in the child.
    """
    return 1 if _forked else torch.get_num_threads()


def call(name: str, arguments: ctypes.Structure) -> None:
    """Run one function of the library; ctypes lets other Python threads run meanwhile.

    Raises:
        MemoryError: no memory for the scratch.
        ValueError: an illegal index, or a tensor without memory.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    result = getattr(library, name)(ctypes.byref(arguments))
    if result:
        kind, text = FAILURES[result]
        raise kind(f"{name} {text}")


def takes_bfloat16() -> bool:
    """Return whether the live instruction set multiplies bfloat16 numbers itself, except at 1x1."""
    library, _ = load()
    return library is not None and bool(library.sk_bfloat16())


def scratch_bytes() -> int:
    """Return the bytes of scratch that the library holds for its next calls."""
    library, _ = load()
    return 0 if library is None else int(library.sk_scratch_bytes())


def release_scratch() -> None:
    """Give the scratch of the native CPU kernels back to the system.

    They keep it for their next calls: some MiB for each thread that runs layers, until the thread ends.
    """
    library, _ = load()
    if library is not None:
        library.sk_release_scratch()
