"""Modules that read a child's weight instead of calling the child, found in the code of their forward.

A sparse layer has no weight to compute with, so such a child must stay dense, and it is better to know before the first
forward. Nothing is run: the bytecode of ``forward``, and of methods it names, is searched for ``self.<child>.weight``.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

from sparsekern.nn.converters import class_name
from sparsekern.nn.weight import WeightInfo

ANSWERED = {name for name in dir(WeightInfo((1, 1), nn.Parameter())) if not name.startswith("_")}
"""Attributes of a weight that a sparse layer's has too: reading them is no computation."""

HARMLESS_CALLS = {"isinstance", "hasattr", "type", "id"}


def readers(model: nn.Module) -> dict[str, str]:
    """Return the modules whose weight an ancestor reads in its forward, by name, with what reads it."""
    found: dict[str, str] = {}
    for owner, module in model.named_modules(remove_duplicate=False):
        kind: Any = type(module)
        for path, method in _reads_of(kind).items():
            name = f"{owner}.{path}" if owner else path
            found.setdefault(name, class_name(kind) + f".{method}")
    return found


@functools.cache
def _reads_of(kind: Any) -> dict[str, str]:
    """Return the children ``a.b`` for which ``self.a.b.weight`` is read on the way from ``forward``, and by what."""
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
    """Yield the code of a method, and that of the base classes' methods of its name, as far as it calls ``super()``."""
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
    """Yield each chain of attributes ``self.a.b`` as its names, and whether what follows a weight cannot compute."""
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
    for inner in code.co_consts:  # functions, lambdas and comprehensions inside
        if isinstance(inner, CodeType):
            yield from _chains(inner, self_name)


def _loads(step: dis.Instruction, name: str) -> bool:
    """Return whether an instruction puts the variable ``name`` on top of the stack."""
    value: Any = step.argval
    last = value[-1] if isinstance(value, tuple) and value else value  # 3.13 loads two at once
    return step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")) and last == name
