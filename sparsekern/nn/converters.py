"""A registry of the dense layer classes that can become sparse, and how each is converted there and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsekern.topology import Grid

if TYPE_CHECKING:
    from sparsekern.nn.block_sparse import BlockSparse

CONVERTERS: dict[type[nn.Module], Converter] = {}
"""Converters by class of the dense layer; see :func:`register_converter`."""


@dataclass(frozen=True)
class Converter:
    """How the layers of one class become sparse, and dense again.

    Attributes:
        dense, sparse, arguments, rebuild, transposed: as in :func:`register_converter`.
    """

    dense: type[nn.Module]
    sparse: type[BlockSparse]
    arguments: Callable[[Any], dict[str, Any]]
    rebuild: Callable[[Any], nn.Module] | None = None
    transposed: bool = False

    def dense_layer(self, layer: BlockSparse) -> nn.Module:
        """Return a dense layer with the sizes of a sparse layer, on the meta device."""
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
    """Register a class of dense layers that :func:`sparsify_`, ``densify``, ``summary`` and ``load_`` then handle.

    Args:
        dense: the dense class, whose instances have a ``weight`` and a ``bias`` (or None). If it is registered already,
            its converter is replaced.
        sparse: the sparse class that replaces it.
        arguments: function that returns the constructor arguments of ``sparse`` for a dense layer: its sizes and
            ``bias``, without device and dtype.
        rebuild: function that returns a new dense layer for a sparse one; its weight and bias are then replaced.
            Default: ``dense`` with ``arguments`` of the sparse layer, for classes with the same constructor arguments.
        transposed: whether the dense weight is ``(in, out)``.

    Example:
        A linear layer as in GPT-2, whose weight is ``(in, out)``:

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
    """Return the converter of a dense layer's class, or of its nearest base class that has one; None without any."""
    return next((CONVERTERS[kind] for kind in type(layer).__mro__ if kind in CONVERTERS), None)


def grid_of(
    layer: nn.Module, block_size: int | tuple[int, int] | None, device: torch.device | str | None = None
) -> Grid:
    """Return the grid of the sparse layer that would replace a dense one.

    Args:
        layer: a dense layer of a registered class.
        block_size: side of the blocks, or ``(out, in)``; None takes the default block size of the device.
        device: the device of the sparse layer. Default: that of the dense weight.
    """
    converter = converter_of(layer)
    assert converter is not None and isinstance(layer.weight, torch.Tensor)
    device = layer.weight.device if device is None else device
    grid = converter.sparse.grid_for(converter.arguments(layer), block_size, device)
    return replace(grid, transposed=converter.transposed)


def converter_for(layer: object, sparse: type[BlockSparse], name: str) -> Converter:
    """Return the converter of a dense layer to the class ``sparse``.

    Args:
        layer: the dense layer.
        sparse: the class it must become.
        name: name of the argument ``layer``, for the error.

    Raises:
        TypeError: the class of ``layer`` does not become ``sparse``.
    """
    converter = converter_of(layer) if isinstance(layer, nn.Module) else None
    if converter is None or converter.sparse is not sparse:
        what = "None" if layer is None else f"a {type(layer).__name__}"
        known = " or ".join(f"an {class_name(c.dense)}" for c in CONVERTERS.values() if c.sparse is sparse)
        raise TypeError(f"{name} is {what}; it must be {known}")
    return converter


def out_features(layer: nn.Module, output: torch.Tensor) -> int:
    """Return the number of features or channels in the ``output`` of a sparse layer, or of a dense one it replaces."""
    converter = converter_of(layer)
    dimensions: Any = layer.dimensions if converter is None else converter.sparse.dimensions
    features: int = output.shape[-1 - dimensions]
    return features


def is_replaceable(module: nn.Module, name: str = "") -> bool:
    """Return whether the class of ``module`` can become sparse. A selector: ``name`` is ignored."""
    return converter_of(module) is not None


def class_name(kind: type[nn.Module]) -> str:
    """Return the name of a module class as users write it: ``nn.Linear`` for PyTorch's, the bare name for others."""
    return f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.modules.") else kind.__name__


def known_classes() -> str:
    """Return the names of the classes that can become sparse, separated by commas."""
    return ", ".join(class_name(kind) for kind in CONVERTERS)


HOSTS: dict[str, str] = {}
"""By package: the module to import; see :func:`register_host`."""


def register_host(package: str, integration: str) -> None:
    """Import ``integration`` when :func:`sparsify_` meets a module of a class from ``package``.

    Args:
        package: the top-level package of the library's classes.
        integration: the name of a module, imported only then, which may register converters. Its function
            ``stays_dense(model)`` returns layers to leave dense, by name, with the reason; ``settle(model)`` is called
            after layers of the model were replaced.
    """
    HOSTS[package] = integration


def hosts_of(model: nn.Module) -> list[ModuleType]:
    """Return the integrations for the libraries whose classes are in a model."""
    kinds = {base for module in model.modules() for base in type(module).__mro__}
    packages = {kind.__module__.partition(".")[0] for kind in kinds}
    return [importlib.import_module(HOSTS[package]) for package in sorted(packages & HOSTS.keys())]
