"""The ``weight`` attribute of sparse layers: it has a shape, dtype and device, and refuses to compute."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

_OPERATORS = (
    "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg abs lt le gt ge getitem setitem len iter "
    "bool float int array iadd imul"
)


class WeightInfo:
    """Shape, dtype and device of a weight that is stored as blocks.

    Other libraries read ``layer.weight.dtype`` and the like, which works. Computing with the weight would be dense or
    would not train the blocks, so it raises TypeError and names ``to_dense()``.

    Args:
        shape: shape of the dense weight.
        values: the stored blocks, which give the dtype, the device and any attributes that other libraries set.
    """

    def __init__(self, shape: tuple[int, ...], values: torch.Tensor) -> None:
        self.shape = torch.Size(shape)
        self.dtype = values.dtype
        self.device = values.device
        self.requires_grad = values.requires_grad
        self.ndim = len(shape)
        self.__dict__ |= {key: noted for key, noted in vars(values).items() if key not in self.__dict__}

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape of the dense weight, or one dimension of it."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Return the number of dimensions: 2 for a linear layer, 3 or 4 for a convolution."""
        return self.ndim

    def numel(self) -> int:
        """Return the number of elements of the dense weight."""
        return self.shape.numel()

    def __repr__(self) -> str:
        return f"WeightInfo(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        _refuse(getattr(func, "__name__", str(func)))

    def __getattr__(self, name: str) -> NoReturn:
        # AttributeError, so that hasattr() answers False
        raise AttributeError(f"the weight of a sparse layer has no {name!r}: {_WAY_OUT}")


_WAY_OUT = (
    "only its blocks exist. Use layer.values to train, initialise or inspect them, or layer.to_dense() for a dense copy"
)


def _refuse(what: str) -> NoReturn:
    raise TypeError(f"cannot compute {what} on the weight of a sparse layer: {_WAY_OUT}")


def _operator(name: str) -> Any:
    def method(self: WeightInfo, *args: Any) -> NoReturn:
        _refuse(name)

    return method


for _name in _OPERATORS.split():
    setattr(WeightInfo, f"__{_name}__", _operator(f"__{_name}__"))
