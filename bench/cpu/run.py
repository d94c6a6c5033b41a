"""Runs cases: every answer is checked before its contestant is timed, and the contestants of a case take turns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from bench.cpu import contestants, conv_contestants, peers
from bench.cpu.conv_cases import ConvCase
from bench.cpu.conv_scene import make_conv_scene
from bench.cpu.results import AnyCase, rounded, rows_of
from bench.cpu.scene import make_scene
from bench.gpu.contestants import OURS, Contestant
from bench.gpu.part import say_what_failed
from bench.gpu.peers import NotSupported
from bench.gpu.results import Row
from bench.gpu.scene import Judge, Scene
from sparsekern.analysis.clock import Clock

SECONDS = 1.0
"""After which five rounds of a case are enough. A contestant that alone takes that long has fewer, but at least two."""

MOST_ROUNDS = 100

CPU = torch.device("cpu")

Say = Callable[[str], None]


def makers(case: AnyCase) -> dict[str, Callable[[Any, str], Contestant]]:
    """Return all who take part in a case."""
    if isinstance(case, ConvCase):
        return dict(conv_contestants.makers(case))
    return contestants.makers(case) | peers.makers(case)


def run_cases(chosen: Iterable[AnyCase], common: Row, say: Say, seconds: float) -> list[Row]:
    """Run cases in turn and return their rows; why a contestant cannot run such cases is in them once.

    Args:
        chosen: those that share a scene should follow each other.
        common: added to every row.
        say: told, for each case, what was found.
        seconds: of a case; see :data:`SECONDS`.
    """
    before = torch.get_num_threads()
    rows: list[Row] = []
    known: set[tuple[str, str]] = set()
    try:
        for case in chosen:
            scene, judge = tensors(case.scene), answers(case.scene)
            torch.set_num_threads(case.threads)
            found = run_case(case, scene, judge, makers(case), seconds)
            rows += [{**row, **common} for row in found if not _said_before(row, known)]
            say(f"{case.key}: " + ", ".join(_said(row) for row in found))
            torch.set_num_threads(before)
    finally:
        torch.set_num_threads(before)
        tensors.cache_clear()
        answers.cache_clear()
    return rows


@functools.lru_cache(maxsize=1)
def tensors(case: AnyCase) -> Scene:
    """Return the scene of a case; of the next one if that shares it."""
    return make_conv_scene(case) if isinstance(case, ConvCase) else make_scene(case)


@functools.lru_cache(maxsize=1)
def answers(case: AnyCase) -> Judge:
    """Return the exact answers of a case."""
    return Judge(tensors(case), "step", tf32=False)


def run_case(
    case: AnyCase,
    scene: Scene,
    judge: Judge,
    taking_part: Mapping[str, Callable[[Any, str], Contestant]],
    seconds: float,
) -> list[Row]:
    """Return the rows of a case: those that were timed, then those that were not, with the reason."""
    right: dict[str, Contestant] = {}
    reasons: dict[str, Row] = {}
    for name, make in taking_part.items():
        try:
            contestant = make(scene, case.op)
            wrong = judge.wrong(contestant.answer(contestant.run()), by_element=contestant.kind == OURS)
            if wrong is None:
                right[name] = contestant
            else:
                reasons[name] = {"refused": wrong}
        except NotSupported as error:
            reasons[name] = {"not_supported": str(error)}
        except Exception as error:
            reasons[name] = {"error": say_what_failed(error)}
    timings, errors = Clock(CPU).race({name: c.run for name, c in right.items()}, MOST_ROUNDS, seconds)
    reasons |= {name: {"error": say_what_failed(error)} for name, error in errors.items()}
    rows = rows_of(case, scene.elements, right, timings)
    return rows + [{**case._asdict(), "contestant": name, **reason} for name, reason in reasons.items()]


def _said_before(row: Row, known: set[tuple[str, str]]) -> bool:
    """Return whether a row only repeats that a contestant cannot run such cases, and remember that it was said."""
    reason = (row["contestant"], row.get("not_supported", ""))
    before = bool(reason[1]) and reason in known
    known.add(reason)
    return before


def _said(row: Row) -> str:
    if "ms" in row:
        return f"{row['contestant']} {rounded(row['ms']):g} ms"
    return f"{row['contestant']} NOT TIMED ({next(row[w] for w in ('refused', 'not_supported', 'error') if w in row)})"
