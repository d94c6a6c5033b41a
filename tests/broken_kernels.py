"""Triton kernels with an edited text, for the tests of mutations."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from sparsekern.kernels import gpu

FOLDER = Path(__file__).parent.parent / "kernels/gpu"
MODULES = (
    "conv2d",
    "conv2d_lists",
    "conv2d_multiply",
    "conv2d_outer",
    "conv2d_projection",
    "conv2d_scores",
    "conv2d_supertiles",
    "few_tokens",
    "launch",
    "linear",
    "multiply",
    "multiply_tma",
    "outer",
    "pixels",
    "projection",
    "scores",
    "supertiles",
)

SEEN = r" elements are wrong$| addresses are wrong$|the NaN of (token|slot|channel|row)|^assert \(?not"
"""What the oracle, the guard and the checks for NaN and for phantom elements say."""


def mutate(file: str, old: str, new: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load the edited file, and give its functions to all that took them from the healthy module.

    What is replaced must be there once.
    """
    source = (FOLDER / f"{file}.py").read_text()
    assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
    path = folder / f"broken_{file}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)

    healthy = importlib.import_module(f"sparsekern.kernels.gpu.{file}")
    users: list[ModuleType] = [importlib.import_module(f"sparsekern.kernels.gpu.{name}") for name in MODULES]
    for user in [*users, broken]:
        for name, value in list(vars(user).items()):
            of = getattr(getattr(value, "fn", value), "__module__", None)
            if user is not healthy and of == healthy.__name__:
                patch.setattr(user, name, vars(broken)[name])
    patch.setattr(gpu, file, broken)
