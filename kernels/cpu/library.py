"""The compiled library: finding it, choosing its instruction set, calling it.

``SPARSEKERN_CPU`` asks for one: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2``, ``neon_bf16``, ``generic``, or ``off``
for none. The first two are ``avx512`` with instructions for bfloat16, ``neon_bf16`` is ``generic`` with those of ARM.
What the machine lacks, or a library that was never built, is an error then; without the variable it is a reason to
take the eager kernels.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
from pathlib import Path

import torch
from sparsekern.kernels.contract import ConvShape, Geometry
from torch import Tensor

_log = logging.getLogger("sparsekern")

ABI = 14
FILE = Path(__file__).parent / "_sparsekern_cpu.so"
CHOICES = ("amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "generic", "off")
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


MATRIX = ("data", "rows", "cols", "row_stride", "col_stride", "dtype")
SIZES = ("in_size", "out_size", "kernel", "stride", "padding", "dilation")


class Call(ctypes.Structure):
    """``Call`` of ``csrc/api.h``: one product of a layer. It holds addresses: keep the tensors until it is over."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *(f"{tensor}_{field}" for tensor in "xy" for field in MATRIX),
            *("values", "bias", "ptr", "other", "slot", "lists", "slots"),
            *("bo", "bi", "transposed", "values_dtype", "threads", "images", "groups"),
            *(f"{size}_{axis}" for size in SIZES for axis in ("rows", "cols")),
            *("u", "v", "pairs"),
        )
    )

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        values: Tensor,
        bias: Tensor | None,
        lists: tuple[Tensor, Tensor, Tensor],
        geometry: Geometry,
        *,
        transposed: bool = False,
    ) -> Call:
        """Describe a product. No tensor may be a negated view.

        Args:
            x: the input ``(T, I)``, or its gradient; of a convolution ``(N, Cin, H, W)``, channels last.
            y: the output ``(T, O)``, or its gradient; of a convolution ``(N, Cout, Ho, Wo)``, channels last.
            values: ``(Z, bo, bi)``, contiguous: the stored blocks or their gradient.
            bias: contiguous float32, or None.
            lists: an order of the index: where the entries of each list begin, the other coordinate, the slot.
            geometry: of the layer; only its kind is read of a linear one.
            transposed: whether the product is the input's gradient; then ``lists`` are by block column.
        """
        slots, bo, bi = values.shape
        ptr, other, slot = lists
        sizes = _sizes(x, y, geometry) if isinstance(geometry, ConvShape) else ()
        described = _pixels if sizes else _matrix
        return cls(
            *described(x),
            *described(y),
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            ptr.data_ptr(),
            other.data_ptr(),
            slot.data_ptr(),
            ptr.shape[0] - 1,
            slots,
            bo,
            bi,
            transposed,
            DTYPES[values.dtype],
            threads(),
            *sizes,
        )

    @classmethod
    def sketch(
        cls,
        x: Tensor,
        y: Tensor,
        out: Tensor,
        u: Tensor,
        v: Tensor,
        pairs: int,
        block: tuple[int, int],
        geometry: Geometry,
    ) -> Call:
        """Describe a sketch of the weight's gradient; ``out`` takes its tiles, ``u`` and ``v`` are as in ``Call``."""
        sizes = _sizes(x, y, geometry) if isinstance(geometry, ConvShape) else ()
        described = _pixels if sizes else _matrix
        weight = out.data_ptr(), 0, 0, 0, 0, 0, 0, *block, 0, 0, threads()
        call = cls(*described(x), *described(y), *weight, *sizes)
        call.u, call.v, call.pairs = u.data_ptr(), v.data_ptr(), pairs
        return call


def _matrix(x: Tensor) -> tuple[int, ...]:
    return x.data_ptr(), *x.shape, *x.stride(), DTYPES[x.dtype]


def _pixels(x: Tensor) -> tuple[int, ...]:
    images, channels, height, width = x.shape
    return x.data_ptr(), images * height * width, channels, channels, 1, DTYPES[x.dtype]


def _sizes(x: Tensor, y: Tensor, shape: ConvShape) -> tuple[int, ...]:
    before = shape.padding[0], shape.padding[2]
    return x.shape[0], shape.groups, *x.shape[2:], *y.shape[2:], *shape.kernel, *shape.stride, *before, *shape.dilation


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
    if not library.sk_openmp():
        _log.warning("the native kernels run on one thread: they were built without GCC's OpenMP; build with CXX=g++")
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
    if not header.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian; dlopen refuses any other file itself
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
    """Return how many threads a call may take: one in a forked child, which has none of its parent's OpenMP threads.

    A library that was opened before the fork checks this itself; this covers one that is first opened in the child.
    """
    return 1 if _forked else torch.get_num_threads()


def call(name: str, *calls: ctypes.Structure) -> None:
    """Run one function of the library; ctypes lets other Python threads run meanwhile.

    Raises:
        MemoryError: no memory for the scratch.
        ValueError: an illegal index, or a tensor without memory.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    result = getattr(library, name)(*map(ctypes.byref, calls))
    if result:
        kind, text = FAILURES[result]
        raise kind(f"{name} {text}")


def positive(x: Tensor) -> Tensor:
    """Return a tensor that is no negated view: the library reads memory, which does not show the negation."""
    return x.resolve_neg() if x.is_neg() else x


def numbers(x: Tensor) -> Tensor:
    """Return a tensor as the library reads weights: contiguous float32."""
    # Each check costs less than a conversion that changes nothing.
    x = positive(x if x.dtype is torch.float32 else x.float())
    return x if x.is_contiguous() else x.contiguous()


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values rounded to the dtype of the inputs, as :func:`numbers`."""
    return numbers(values if values.dtype is dtype else values.to(dtype))


def takes_bfloat16() -> bool:
    """Return whether the instruction set in use has products of bfloat16, except at 1x1."""
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
