"""Which classes of dense layers can become sparse, and how each goes there and back: a small open registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsekern.topology import Grid

if TYPE_CHECKING:
    from sparsekern.nn.block_sparse import BlockSparse

CONVERTERS: dict[type[nn.Module], Converter] = {}
"""By class of the dense layer; see :func:`register_converter`."""


@dataclass(frozen=True)
class Converter:
    """How layers of one class become sparse, and dense again.

    Attributes:
        dense: the class, whose instances have a ``weight`` and a ``bias`` (or None).
        sparse: the class that takes their place.
        arguments: returns the arguments of ``sparse`` for a dense layer: its sizes and ``bias``, not device and dtype.
        rebuild: returns a new dense layer for a sparse one; its weight and bias are then replaced. Default: ``dense``
            with what ``arguments`` says of the sparse layer, for classes that name their sizes alike.
        transposed: whether the dense weight is ``(in, out)``.
    """

    dense: type[nn.Module]
    sparse: type[BlockSparse]
    arguments: Callable[[Any], dict[str, Any]]
    rebuild: Callable[[Any], nn.Module] | None = None
    transposed: bool = False

    def grid(self, layer: nn.Module, block_size: int | tuple[int, int] | None) -> Grid:
        """Return the grid of a dense layer's sparse twin; without a block size, that of its device's default."""
        assert isinstance(layer.weight, torch.Tensor)
        grid = self.sparse.grid_for(self.arguments(layer), block_size, layer.weight.device)
        return replace(grid, transposed=self.transposed)

    def dense_layer(self, layer: BlockSparse) -> nn.Module:
        """Return a dense layer of a sparse layer's sizes, on the meta device."""
        with torch.device("meta"):
            return self.dense(**self.arguments(layer)) if self.rebuild is None else self.rebuild(layer)


def register_converter(
    dense: type[nn.Module],
    sparse: type[BlockSparse],
    arguments: Callable[[Any], dict[str, Any]],
    *,
    rebuild: Callable[[Any], nn.Module] | None = None,
    transposed: bool = False,
) -> None:
    """Teach :func:`sparsify_`, ``densify``, ``summary`` and ``load_`` a class of dense layers.

    Args:
        dense, sparse, arguments, rebuild, transposed: as in :class:`Converter`. A class that is known already is learnt
            anew.

    Example:
        A linear layer as GPT-2 has it, whose weight is ``(in, out)``:

        >>> class Transposed(nn.Module):
        ...     def __init__(self, outs, ins):
        ...         super().__init__()
        ...         self.weight, self.bias = nn.Parameter(torch.randn(ins, outs)), nn.Parameter(torch.zeros(outs))
        >>> register_converter(
        ...     Transposed,
        ...     sk.SparseLinear,
        ...     lambda layer: {"in_features": layer.weight.shape[0], "out_features": layer.weight.shape[1]},
        ...     rebuild=lambda layer: Transposed(layer.out_features, layer.in_features),
        ...     transposed=True,
        ... )
        >>> sk.sparsify_(nn.Sequential(Transposed(64, 32)), sparsity=0.75, block_size=16)[0].weight
        WeightInfo(shape=(32, 64), dtype=torch.float32, device='cpu')
    """
    CONVERTERS[dense] = Converter(dense, sparse, arguments, rebuild, transposed)


def converter_of(layer: nn.Module) -> Converter | None:
    """Return the converter of a dense layer's class, or of the nearest class that it derives from; else None."""
    return next((CONVERTERS[kind] for kind in type(layer).__mro__ if kind in CONVERTERS), None)


def converter_for(layer: object, sparse: type[BlockSparse], name: str) -> Converter:
    """Return the converter of a dense layer, given as the argument ``name``, to the class ``sparse``.

    Raises:
        TypeError: ``layer`` is not of a class that becomes that.
    """
    converter = converter_of(layer) if isinstance(layer, nn.Module) else None
    if converter is None or converter.sparse is not sparse:
        what = "None" if layer is None else f"a {type(layer).__name__}"
        known = " or ".join(f"an {class_name(c.dense)}" for c in CONVERTERS.values() if c.sparse is sparse)
        raise TypeError(f"{name} is {what}; it must be {known}")
    return converter


def out_features(layer: nn.Module, output: torch.Tensor) -> int:
    """Return the features, or channels, of the ``output`` of a sparse layer or of a dense one of a known class."""
    converter = converter_of(layer)
    dimensions: Any = layer.dimensions if converter is None else converter.sparse.dimensions
    features: int = output.shape[-1 - dimensions]
    return features


def is_replaceable(module: nn.Module, name: str = "") -> bool:
    """Return whether ``module`` is of a class that can become sparse. A selector: ``name`` plays no part."""
    return converter_of(module) is not None


def class_name(kind: type[nn.Module]) -> str:
    """Return the name of a class of modules as users write it: ``nn.Linear`` of PyTorch, the bare name of others."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.modules.") else kind.__name__


def known_classes() -> str:
    """Return the names of the classes that can become sparse, for errors."""
    return ", ".join(class_name(kind) for kind in CONVERTERS)
