"""The parameters of a model that are in no sparse layer: how many, and where."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from torch import nn

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.converters import class_name, converter_of, known_classes

SHOWN = 3
"""Groups that are named; the rest is small in most models."""


@dataclass(frozen=True)
class DenseGroup:
    """Parameters that stay dense for one reason.

    Attributes:
        what: the class that owns them, and what is special about them.
        first: name of the first module.
        modules: how many there are.
        parameters: their elements.
    """

    what: str
    first: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class DenseShare:
    """What stays dense in a model; as a string it is one sentence.

    Attributes:
        total: parameters of the model, those of sparse layers counted as if they were dense.
        groups: those outside sparse layers, the largest group first.
    """

    total: int
    groups: tuple[DenseGroup, ...]

    @property
    def parameters(self) -> int:
        """Parameters that stay dense."""
        return sum(group.parameters for group in self.groups)

    @property
    def fraction(self) -> float:
        """Share of the model's parameters that stay dense."""
        return self.parameters / max(1, self.total)

    def __str__(self) -> str:
        text = f"{self.fraction:.1%} of the model's {self.total:,} parameters stay dense"
        parts = [f"{g.parameters / max(1, self.total):.1%} in {g.what}" for g in self.groups[:SHOWN]]
        return f"{text}: {', '.join(parts)}" if parts else text


def dense_share(model: nn.Module) -> DenseShare:
    """Return which parameters of a model are in no sparse layer; a parameter with several names counts once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    by_name = dict(model.named_modules())  # get_submodule does not find what is inside of a parametrization
    sparse = [module for module in by_name.values() if isinstance(module, BlockSparse)]
    total = sum(layer.grid.numel + (0 if layer.bias is None else layer.bias.numel()) for layer in sparse)
    inside = {id(parameter) for layer in sparse for parameter in layer.parameters()}
    found: dict[str, tuple[str, set[str], int]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            continue
        owner_name, _, key = name.rpartition(".")
        owner = by_name[owner_name]
        total += parameter.numel()
        what = class_name(type(owner))
        if parameter.dim() > 2 and converter_of(owner) is None:
            what += f".{key} ({parameter.dim()}-dimensional)"
        if (others := names[id(parameter)][1:]) and parameter.dim() > 1:
            what += f" (tied to {', '.join(others)})"
        first, modules, elements = found.get(what, (owner_name, set(), 0))
        found[what] = first, modules | {owner_name}, elements + parameter.numel()
    groups = [DenseGroup(what, first, len(modules), n) for what, (first, modules, n) in found.items()]
    return DenseShare(total, tuple(sorted(groups, key=lambda group: -group.parameters)))


def dense_layers(model: nn.Module, reasons: Mapping[str, str], besides: Container[str] = ()) -> str:
    """Return which layers of a model stay dense and why, for an error: the largest kinds first.

    Args:
        model: searched for modules with a parameter of two axes or more, but for sparse ones.
        reasons: why those of a known class stay dense, by name.
        besides: names that the error has told of already.
    """
    kinds: dict[tuple[str, str], list[str]] = {}
    sizes: dict[tuple[str, str], int] = {}
    total = max(1, sum(parameter.numel() for parameter in model.parameters()))
    for name, module in model.named_modules():
        elements = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
        if elements and not isinstance(module, BlockSparse) and name not in besides:
            usual = "" if converter_of(module) is not None else "not one of these"
            key = (class_name(type(module)), reasons.get(name, usual))
            kinds.setdefault(key, []).append(name)
            sizes[key] = sizes.get(key, 0) + elements
    parts = []
    for (kind, why), names in sorted(kinds.items(), key=lambda item: -sizes[item[0]])[: SHOWN + 1]:
        many = f"{len(names)} layers such as " if len(names) > 1 else ""
        share = f"{sizes[kind, why] / total:.0%} of the parameters"
        parts.append(f"{kind} ({many}{names[0]!r}, {share}{f', {why}' if why else ''})")
    rest = f"dense are: {'; '.join(parts)}" if parts else "there is no other layer"
    return f"sparsify_ takes {known_classes()} (register_converter adds classes); {rest}"
