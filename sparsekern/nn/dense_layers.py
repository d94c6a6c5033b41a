"""Layers that stay dense: which must and why, which do because that is faster, and the share of parameters they hold.

A sparse layer has no weight to compute with, so a layer whose weight another module reads must stay dense. Such reads
are found without running anything: the bytecode of ``forward``, and of the methods it calls, is searched for
``self.<child>.weight``.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import CodeType
from typing import Any

from torch import Tensor, nn

from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.converters import CONVERTERS, class_name, converter_of, known_classes
from sparsekern.nn.weight import WeightInfo

STEM_CHANNELS = 3
"""Convolutions with at most this many input channels are stems: little work, and no block of channels to leave out."""

SHOWN = 3
"""Number of groups that are listed; in most models the others are small."""

ANSWERED = {name for name in dir(WeightInfo((1, 1), nn.Parameter())) if not name.startswith("_")}
"""Attributes of a weight that :class:`WeightInfo` has too, so reading them is allowed."""

HARMLESS_CALLS = {"isinstance", "hasattr", "type", "id"}
"""Functions that may be given the weight of a sparse layer."""


def left_dense(module: nn.Module, stem_width: int | None = None) -> str | None:
    """Return why a layer is left dense without an error, because blocks would not pay; None if it is not.

    Args:
        module: a dense layer.
        stem_width: columns of a block; stems with at least that many input channels are not left dense. None leaves
            every stem dense.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None
    if module.groups > 1 and module.in_channels == module.groups:
        return "depthwise"
    if 0 < module.in_channels <= STEM_CHANNELS:  # 0 in a lazy convolution
        return "stem" if stem_width is None or stem_width > module.in_channels else None
    return None


def tied_heads(model: nn.Module) -> dict[str, str]:
    """Return why the heads of language models that share the weight of an embedding stay dense, by name."""
    by_name = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    found: dict[str, str] = {}
    for names in owners.values():
        embedding = next((name for name in names if isinstance(by_name[name], nn.Embedding)), None)
        if embedding is not None:
            found |= {name: f"its weight is tied to the embedding {embedding!r}" for name in names if name != embedding}
    return found


def refusals(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return why layers of a model cannot become sparse, by name; layers that can are left out.

    Args:
        model: the model.
        layers: some of its layers by name, of classes that have a converter.
    """
    read = readers(model)
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found = {}
    for name, module in layers.items():
        why = f"{read[name]} reads its weight instead of calling it" if name in read else _own_reason(module, uses)
        if name in read and isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            why = f"{why} (sparsekern.nn.split_attention_ changes that)"
        if why is not None:
            found[name] = why
    return found


def _own_reason(module: nn.Module, uses: dict[int, list[str]]) -> str | None:
    converter = converter_of(module)
    assert converter is not None
    if type(module) not in CONVERTERS:
        return f"it is a {type(module).__name__}, which may do more than {class_name(converter.dense)} does"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, as accelerate's hooks do, and would be lost"
    extra = sorted(key for key, _ in module.named_parameters() if key not in ("weight", "bias"))
    if extra or "weight" not in module._parameters:
        return f"its weight is computed from other tensors ({', '.join(extra) or 'parametrized'})"
    if buffers := [key for key, _ in module.named_buffers()]:
        return f"it has buffers of its own, which would be lost ({', '.join(buffers)})"
    for kind in ("weight", "bias"):
        own = getattr(module, kind)
        if isinstance(own, Tensor) and len(shared := uses[id(own)]) > 1:
            return f"its {kind} is shared: {', '.join(shared)}"
    return None


SPARED: dict[str, Callable[[Any], set[str]]] = {
    # Its fast path asks torch.overrides.has_torch_function first, and WeightInfo answers.
    "torch.nn.modules.transformer.TransformerEncoderLayer": lambda layer: (
        {"linear1", "linear2"}
        if isinstance(layer.self_attn, nn.MultiheadAttention)
        else {"linear1", "linear2", "self_attn.out_proj"}
    ),
}
"""Children whose weight a module does not read after all, by the full name of its class."""


def readers(model: nn.Module) -> dict[str, str]:
    """Return, by name, the modules whose weight another module reads in its forward, with the method that reads it."""
    found: dict[str, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        spared = SPARED.get(f"{kind.__module__}.{kind.__qualname__}", lambda module: set())(module)
        for path, method in _reads_of(kind).items():
            if path in spared:
                continue
            name = f"{owner}.{path}" if owner else path
            found.setdefault(name, class_name(kind) + f".{method}")
    return found


@functools.cache
def _reads_of(kind: Any) -> dict[str, str]:
    """Return the children ``a.b`` whose ``self.a.b.weight`` is read in ``forward`` or a method it calls, and which."""
    found: dict[str, str] = {}
    todo, seen = ["forward"], {"forward"}
    while todo:
        method = todo.pop()
        for chain, harmless in (read for code in _codes(kind, method) for read in _chains(code, code.co_varnames[0])):
            if len(chain) > 1 and chain[-1] == "weight" and not harmless:
                found.setdefault(".".join(chain[:-1]), method)
            elif chain[0] not in seen and inspect.isfunction(inspect.getattr_static(kind, chain[0], None)):
                if not hasattr(nn.Module, chain[0]):  # PyTorch's own methods read no child's weight
                    todo.append(chain[0])
                seen.add(chain[0])
    return found


def _codes(kind: Any, method: str) -> Iterator[CodeType]:
    """Yield the code of a method, and of the base classes' methods that it reaches through ``super()``."""
    for owner in kind.__mro__:
        function = vars(owner).get(method)
        if function is None:
            continue
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if not isinstance(code, CodeType) or not code.co_argcount:
            return
        yield code
        if "super" not in code.co_names:
            return


def _chains(code: CodeType, self_name: str) -> Iterator[tuple[list[str], bool]]:
    """Yield each attribute chain ``self.a.b`` as a list of names, and whether its use is no computation."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("PUSH_NULL", "PRECALL", "CACHE")]
    for at, step in enumerate(steps):
        if not _loads(step, self_name):
            continue
        chain: list[str] = []
        end = at + 1
        while end < len(steps) and steps[end].opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain.append(str(steps[end].argval))
            end += 1
            if chain[-1] == "weight" and len(chain) > 1:
                break
        if chain:
            after = steps[end : end + 2]
            answered = bool(after) and after[0].opname in ("LOAD_ATTR", "LOAD_METHOD") and after[0].argval in ANSWERED
            compared = any(s.opname == "IS_OP" for s in after) or "NONE" in "".join(s.opname for s in after[:1])
            asked = at > 0 and steps[at - 1].argval in HARMLESS_CALLS
            yield chain, answered or compared or asked
    for inner in code.co_consts:  # nested functions, lambdas and comprehensions
        if isinstance(inner, CodeType):
            yield from _chains(inner, self_name)


def _loads(step: dis.Instruction, name: str) -> bool:
    """Return whether an instruction pushes the variable ``name`` last onto the stack."""
    value: Any = step.argval
    last = value[-1] if isinstance(value, tuple) and value else value  # Python 3.13 loads two at once
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")) and last == name


@dataclass(frozen=True)
class DenseGroup:
    """Parameters outside sparse layers that belong to modules of one class.

    Attributes:
        what: the class of the modules, with the parameter's name and dimensions or its ties where these are special.
        first: name of the first module.
        modules: number of modules.
        parameters: number of elements.
    """

    what: str
    first: str
    modules: int
    parameters: int


@dataclass(frozen=True)
class DenseShare:
    """The parameters of a model that are in no sparse layer; ``str`` of it is one sentence.

    Attributes:
        total: number of parameters of the model, with sparse layers counted as if they were dense.
        groups: the parameters outside sparse layers, the largest group first.
    """

    total: int
    groups: tuple[DenseGroup, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters that stay dense."""
        return sum(group.parameters for group in self.groups)

    @property
    def fraction(self) -> float:
        """Fraction of the model's parameters that stay dense."""
        return self.parameters / max(1, self.total)

    def __str__(self) -> str:
        text = f"{self.fraction:.1%} of the model's {self.total:,} parameters stay dense"
        parts = [f"{g.parameters / max(1, self.total):.1%} in {g.what}" for g in self.groups[:SHOWN]]
        return f"{text}: {', '.join(parts)}" if parts else text


def dense_share(model: nn.Module) -> DenseShare:
    """Return the parameters of a model that are in no sparse layer; a parameter with several names counts once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    by_name = dict(model.named_modules())  # get_submodule does not find modules inside parametrizations
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
    """Return the end of an error message: which layers of a model stay dense and why, the largest kinds first.

    Args:
        model: searched for dense modules with a parameter of two or more axes.
        reasons: why layers of registered classes stay dense, by name.
        besides: names that the message has already mentioned.
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


@dataclass(frozen=True)
class Choice:
    """What a race found about one layer; ``print`` it for a sentence.

    Attributes:
        name: the layer's name.
        block: block size of the sparse layer that takes its place; None if the layer stays dense.
        milliseconds: medians of forward and backward of the sparse layers, by block size.
        dense_ms: that of the dense layer.
    """

    name: str
    block: tuple[int, int] | None
    milliseconds: dict[tuple[int, int], float]
    dense_ms: float

    @classmethod
    def of(cls, milliseconds: dict[tuple[int, int], float], dense_ms: float) -> Choice:
        """Return the choice of the fastest, for a layer without a name."""
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        return cls("", fastest if milliseconds[fastest] < dense_ms else None, milliseconds, dense_ms)

    def named(self, name: str) -> Choice:
        """Return the same choice for an equal layer."""
        return replace(self, name=name)

    def __str__(self) -> str:
        if not self.milliseconds:
            return f"{self.name}: stays dense (the sample does not reach it)"
        fastest = min(self.milliseconds, key=self.milliseconds.__getitem__)
        ms, (rows, cols) = self.milliseconds[fastest], fastest
        if self.block is None:
            return f"{self.name}: stays dense ({self.dense_ms:.3g} ms; {rows}x{cols} blocks: {ms:.3g} ms)"
        ratio = self.dense_ms / ms
        return f"{self.name}: {rows}x{cols} blocks, {ratio:.2f}x as fast as dense ({ms:.3g} of {self.dense_ms:.3g} ms)"


Choose = Callable[[str, Sequence[BlockSparse]], Choice]
"""Function of a layer's name and the sparse layers that could take its place, one for each block size."""

Racer = Callable[[nn.Module, Mapping[str, nn.Module], Any], Choose]
"""Function of a model, the layers that could become sparse, and a sample of the model's input."""

_racers: list[Racer] = []


def register_racer(racer: Racer) -> None:
    """Register the function that races layers; the last one is taken."""
    _racers.append(racer)


def racer() -> Racer:
    """Return the registered function that races layers."""
    return _racers[-1]
