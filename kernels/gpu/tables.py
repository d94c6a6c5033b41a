"""Which configuration a call gets: a measured one where there is one, else the best guess of the roofline.

``SPARSEKERN_AUTOTUNE`` says how:

    offline   (default) the tables: the user's own first, then those of the package; the nearest entry, if there is
              none for just these magnitudes. Nothing is measured.
    0         the roofline only: the same choice everywhere, whatever was measured.
    1         as offline, and what is in no table is measured at its first call and added to the user's table.

A table is ``sm_90.json`` and so on: ``{"measured": {...where, when...}, "configs": {key: {...}}}``. The user's are in
``SPARSEKERN_CACHE`` (default: ``sparsekern`` under ``XDG_CACHE_HOME`` or ``~/.cache``).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsekern.kernels.gpu import roofline, tune
from sparsekern.kernels.gpu.config import KINDS, Config, Problem, package_data, well_formed

MODES = ("offline", "0", "1")

_NEAR = sorted((abs(t) + abs(n), t, n) for t in range(-3, 4) for n in range(-3, 4))
"""How far, in powers of two: distance, tokens, blocks. Farther than that the roofline knows better."""

_chosen: dict[Problem, Config] = {}
_log = logging.getLogger("sparsekern")
_writing = threading.Lock()  # backward threads of several GPUs may measure at the same time


def choose(problem: Problem, launch: Callable[[Config], object]) -> Config:
    """Return the configuration for a problem; ``launch`` runs the call with a given one, should it be measured."""
    config = _chosen.get(problem)
    if config is None:
        config = _choose(problem, launch)
    return config


def forget() -> None:
    """Let the next calls read the environment and the tables again."""
    _chosen.clear()
    package_data.cache_clear()


def mode() -> str:
    """Return the value of ``SPARSEKERN_AUTOTUNE``.

    Raises:
        ValueError: it is none of those above.
    """
    value = os.environ.get("SPARSEKERN_AUTOTUNE", MODES[0])
    if value not in MODES:
        raise ValueError(f"SPARSEKERN_AUTOTUNE is {value!r}; it must be one of {', '.join(MODES)}")
    return value


def cache_folder() -> Path | None:
    """Return the folder of the user's tables; None for a user without a home."""
    if given := os.environ.get("SPARSEKERN_CACHE"):
        return Path(given)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "sparsekern"
    try:
        return Path.home() / ".cache" / "sparsekern"
    except RuntimeError:
        return None


def read(problem: Problem) -> Config | None:
    """Return the configuration measured for a problem, or None."""
    for table in (_user_table(problem.arch), package_data(f"{problem.arch}.json")):
        config = _entry(table, problem, problem)
        if config is not None:
            return config
    return None


def read_near(problem: Problem) -> Config | None:
    """Return the configuration measured for the nearest magnitudes of tokens and blocks, or None."""
    for table in (_user_table(problem.arch), package_data(f"{problem.arch}.json")):
        for _, tokens, blocks in _NEAR:
            near = problem._replace(log2_tokens=problem.log2_tokens + tokens, log2_blocks=problem.log2_blocks + blocks)
            config = _entry(table, near, problem)
            if config is not None:
                return config
    return None


def write(problem: Problem, config: Config) -> None:
    """Add a measured configuration to the user's table, or warn that it cannot be."""
    folder = cache_folder()
    if folder is None:
        return
    path = folder / f"{problem.arch}.json"
    with _writing:
        table = _user_table(problem.arch) or {"measured": {}, "configs": {}}
        table["measured"] = tune.circumstances()
        table["configs"][problem.key] = asdict(config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as private:  # nothing is there yet: no link is followed
                unfinished = Path(private, path.name)
                unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
                unfinished.replace(path)
        except OSError as error:
            _log.warning("%s is not written: %s. Set SPARSEKERN_CACHE to a folder that can be", path, error)


def _choose(problem: Problem, launch: Callable[[Config], object]) -> Config:
    asked = mode()
    config = None if asked == "0" else read(problem)
    if config is None and asked == "1":
        reason = tune.why_not()
        if reason is not None:
            _log.info("%s is not tuned: %s", problem.key, reason)
            if reason == tune.CAPTURING:  # not remembered: the next call may be able to
                return read_near(problem) or roofline.candidates(problem)[0]
        else:
            config = tune.fastest(roofline.candidates(problem), launch)
            _chosen[problem] = config
            write(problem, config)
    if config is None and asked != "0":
        config = read_near(problem)
    _chosen[problem] = config or roofline.candidates(problem)[0]
    return _chosen[problem]


def _entry(table: dict[str, Any] | None, entry: Problem, problem: Problem) -> Config | None:
    fields = (table or {}).get("configs", {}).get(entry.key)
    if fields is None:
        return None
    try:
        config: Config = KINDS[problem.kernel](**fields)
    except TypeError:  # written by another version
        return None
    return config if well_formed(config) and roofline.fits(problem, config) else None


def _user_table(arch: str) -> dict[str, Any] | None:
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{arch}.json"
    try:
        table = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s is not read: %s. Delete it to measure again", path, error)
        return None
    return table if isinstance(table, dict) and isinstance(table.get("configs"), dict) else None
