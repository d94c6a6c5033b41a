"""Every public name says what it is: what it takes, in which shapes, what it raises; and the examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
from types import FunctionType, ModuleType

import pytest
import torch
from torch import nn

import sparsekern as sk
from tests.test_house import ROOT, sources

PACKAGES = (
    "sparsekern",
    *(f"sparsekern.{name}" for name in ("topology", "ops", "nn", "analysis", "training")),
)
PACKAGES += ("sparsekern.lab",)
INTEGRATIONS = {
    f"sparsekern.integrations.{library}": importlib.util.find_spec(library) is not None
    for library in ("transformers", "lightning", "peft")
}
ABSENT = tuple(package for package, installed in INTEGRATIONS.items() if not installed)
PACKAGES += tuple(package for package, installed in INTEGRATIONS.items() if installed)

SELF_EVIDENT = {"self", "cls", "device", "dtype", "model", "optimizer", "generator", "kwargs", "args", "options"}
"""Arguments whose name and type say all."""


def public() -> dict[str, object]:
    """Return every name that a package offers, once, under the shortest path."""
    found: dict[int, tuple[str, object]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            thing = getattr(module, name)
            if isinstance(thing, (type, FunctionType)):
                found.setdefault(id(thing), (f"{package}.{name}", thing))
    return dict(found.values())


PUBLIC = public()


def words(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def arguments(thing: object) -> dict[str, inspect.Parameter]:
    """Return the arguments that a function, or the constructor of a class of its own, takes.

    A ``grid: Grid`` needs no words: its type has them.
    """
    if isinstance(thing, type) and "__init__" not in vars(thing):
        return {}
    parameters = inspect.signature(thing).parameters  # type: ignore[arg-type]
    return {
        name: p
        for name, p in parameters.items()
        if name not in SELF_EVIDENT and p.kind is not p.VAR_KEYWORD and str(p.annotation).lower() != name
    }


def test_nothing_else_is_public():
    names = {name for name, value in vars(sk).items() if not isinstance(value, ModuleType)}
    assert {name for name in names if not name.startswith("_")} <= set(sk.__all__)


def test_there_are_public_names():
    assert len(PUBLIC) > 80 and "sparsekern.sparsify_" in PUBLIC and "sparsekern.topology.Grid" in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_the_first_line_is_a_sentence(name):
    first = words(PUBLIC[name]).partition("\n")[0]
    assert len(first) > 15 and first.rstrip("*`").endswith((".", ":")), first


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_named(name):
    text = words(PUBLIC[name])
    absent = [argument for argument in arguments(PUBLIC[name]) if not re.search(rf"\b{argument}\b", text)]
    assert absent == []


@pytest.mark.parametrize("name", [n for n, thing in PUBLIC.items() if isinstance(thing, FunctionType)])
def test_tensors_have_a_shape(name):
    thing = PUBLIC[name]
    tensors = [p.name for p in inspect.signature(thing).parameters.values() if str(p.annotation) == "Tensor"]
    returned = str(inspect.signature(thing).return_annotation) == "Tensor"
    assert not (tensors or returned) or re.search(r"``[^`]*\(.*\)``", words(thing)), "no shape is said"


def raised(thing: object) -> set[str]:
    """Return the names of what a function raises itself."""
    body = thing if isinstance(thing, FunctionType) else vars(thing).get("__post_init__", vars(thing).get("__init__"))
    if (
        getattr(body, "__module__", None) in ("dataclasses", "typing")
        or not inspect.isfunction(body)
        or "<string>" in inspect.getfile(body)
    ):
        return set()
    names = re.findall(r"^\s+raise (\w+Error)\(", inspect.getsource(body), re.MULTILINE)
    return {"ValueError" if name == "InputError" else name for name in names}  # what a caller catches


@pytest.mark.parametrize("name", PUBLIC)
def test_what_is_raised_is_said(name):
    thing = PUBLIC[name]
    text = words(thing) + (words(thing.__init__) if isinstance(thing, type) else "")  # type: ignore[misc]
    assert {error for error in raised(thing) if error not in text} == set()


def modules() -> list[str]:
    return [
        m.name
        for m in pkgutil.walk_packages(sk.__path__, "sparsekern.")
        if not m.name.startswith(("sparsekern.cli", *ABSENT))
    ]


@pytest.mark.parametrize("name", [m for m in modules() if ">>>" in inspect.getsource(importlib.import_module(m))])
def test_examples_run(name):
    torch.manual_seed(0)
    result = doctest.testmod(
        importlib.import_module(name),
        extraglobs={"torch": torch, "nn": nn, "sk": sk},
        optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE,
    )
    assert result.attempted > 0 and result.failed == 0


SHOWN = (
    "SparseLinear",
    "SparseConv2d",
    "sparsify_",
    "densify",
    "SET",
    "RigL",
    "GSE",
    "VRPGE",
    "summary",
    "preset",
    "backend",
)


@pytest.mark.parametrize("name", SHOWN)
def test_what_users_begin_with_has_an_example(name):
    assert ">>>" in words(getattr(sk, name))


RIDDLES = {"What", "Of", "Let", "Who", "Where", "How", "Which", "Whether"}
"""Words that begin a question or a wish: a module is a noun phrase, and a function begins with a verb."""

NO_VERBS = RIDDLES | {"A", "An", "The", "In", "Nothing", "Nobody", "Returns", "Computes", "Gets", "Sets"}


def badly_begun(text: str) -> list[str]:
    """Return the first lines of docstrings of a module and its functions (not properties) that are not plain."""
    tree = ast.parse(text)
    documented: list[tuple[ast.Module | ast.FunctionDef, set[str]]] = [(tree, RIDDLES)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any("property" in ast.unparse(d) for d in node.decorator_list):
            documented.append((node, NO_VERBS))
    lines = [((ast.get_docstring(node) or "-").partition("\n")[0], banned) for node, banned in documented]
    return [line for line, banned in lines if line.split()[0].strip(",:;.") in banned]


def test_docstrings_begin_plainly():
    found = {str(path.relative_to(ROOT)): badly_begun(path.read_text()) for path in sources(ROOT)}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_riddle_is_found():
    text = '"""What becomes of it."""\ndef f():\n    """Let it be."""\n@property\ndef g():\n    """The side."""\n'
    assert badly_begun(text) == ["What becomes of it.", "Let it be."]
