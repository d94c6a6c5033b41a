"""Reading the pickles in which CIFAR is distributed, without running anything that a pickle asks for.

A pickle is a program: it names functions and calls them with what it likes. Here the names that a numpy array needs
stand for classes that only remember what they are given; every other name is refused. No code of numpy runs either.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

from sparsekern.errors import InputError

if TYPE_CHECKING:
    import numpy


class _Remembered:
    """Stands for whatever a pickle calls; keeps the arguments and the state, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Array(_Remembered):
    pass


class _DType(_Remembered):
    pass


ALLOWED: dict[tuple[str, str], type[_Remembered]] = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _DType,
}


class _Unpickler(pickle._Unpickler):
    """Python's own reader in Python: the one in C takes the memory that a pickle of ten bytes asks for."""

    dispatch: ClassVar = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

    def find_class(self, module: str, name: str) -> type[_Remembered]:
        """Return what stands for a name that an array needs; refuse every other."""
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data need: it is not loaded") from None


def unpickle(content: bytes, source: str) -> Any:
    """Return what a pickle holds, if that is bytes, text, numbers, lists, tuples, dicts and arrays of bytes.

    Text written by Python 2 comes as bytes.

    Args:
        content: the pickle.
        source: what to call it in an error.

    Raises:
        ValueError: it holds anything else, or is damaged. Nothing of it has run.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load(), {})
    except Exception as error:  # what a damaged pickle makes the reader raise is any exception at all
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{source} is damaged, or no pickle of plain data: {reason}; fetch it again") from None


def _plain(content: Any, done: dict[int, Any]) -> Any:
    """Return the content with arrays in place of what stands for them.

    ``done`` holds what was made of each object: a list of twice the same list, of twice the same, has no end otherwise.
    """
    if id(content) not in done:
        done[id(content)] = _made(content, done)
    return done[id(content)]


def _made(content: Any, done: dict[int, Any]) -> Any:
    if isinstance(content, _Array):
        return _array(content.state)
    if isinstance(content, dict):
        return {_plain(key, done): _plain(value, done) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(_plain(item, done) for item in content)
    if content is None or isinstance(content, (bytes, str, int, float)):
        return content
    raise InputError(f"it holds a {type(content).__name__.strip('_').lower()}")


def _array(state: Any) -> numpy.ndarray:
    """Return the array of unsigned bytes that a state ``(version, shape, dtype, fortran, bytes)`` describes."""
    import numpy

    _, shape, dtype, fortran, content = state
    if not isinstance(dtype, _DType) or dtype.arguments[0] not in ("u1", b"u1"):
        raise InputError("it holds an array that is not one of unsigned bytes")
    return numpy.frombuffer(content, dtype=numpy.uint8).reshape(shape, order="F" if fortran else "C")
