"""Triton kernels with an edited text, for the tests of mutations."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from sparsekern.kernels import gpu

FOLDER = Path(__file__).parent.parent / "kernels/gpu"
MODULES = ("conv2d", "conv2d_multiply", "conv2d_outer", "launch", "linear", "multiply", "outer", "pixels")

SEEN = r" elements are wrong$| addresses are wrong$|the NaN of (token|slot|channel|row)|^assert \(?not"
"""What the oracle, the guard and the checks for NaN and for phantom elements say."""

Check = Callable[[], None]
Table = dict[str, list[tuple[str, Check, str, str]]]
"""By file, or function of a file: a name, the check that must turn red, what is replaced, by what."""


def mutations(table: Table) -> list[Any]:
    """Return the rows as parameters ``place, check, old, new`` of a test, by their names."""
    rows = [pytest.param(place, *rest, id=name) for place, rows in table.items() for name, *rest in rows]
    assert len({row.id for row in rows}) == len(rows)
    return rows


def checks(table: Table) -> list[Check]:
    """Return each check of a table once, for the healthy kernels to pass."""
    return list(dict.fromkeys(check for rows in table.values() for _, check, *_ in rows))


def assert_noticed(place: str, check: Check, old: str, new: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Raise AssertionError unless a check notices a mutation: by the oracle or by the guard, not by a crash."""
    mutate(place, old, new, folder, patch)
    with pytest.raises(AssertionError, match=SEEN):
        check()


def mutate(place: str, old: str, new: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Load an edited file, and give its functions to all modules that took them from the healthy one.

    Args:
        place: ``file``, or ``file.function`` to edit that function only.
        old: what is replaced; it must be there once.
        new: by what.
        folder: for the edited file.
        patch: undoes it.
    """
    file, _, function = place.partition(".")
    source = (FOLDER / f"{file}.py").read_text()
    begin = source.index(f"def {function}(") if function else 0
    end = source.find("\n\n\n", begin) if function else -1
    part = source[begin : end if end >= 0 else len(source)]
    assert part.count(old) == 1, f"{old!r} is there {part.count(old)} times"
    source = source[:begin] + part.replace(old, new) + source[begin + len(part) :]
    path = folder / f"broken_{file}.py"
    path.write_text(source)
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
