"""Where a configuration comes from: memory, the user's table, the package's, the roofline, a measurement."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from sparsekern.kernels.gpu import roofline, tables
from sparsekern.kernels.gpu.config import Config, Multiply, Outer, Problem
from torch import Tensor

PROBLEM = Problem("fwd", "sm_90", "fp16", 32, 32, 12, 3)
GUESS = roofline.candidates(PROBLEM)[0]
USERS = Multiply(tile_t=64, tile_k=64, group=7, warps=4, stages=3)
PACKAGES = Multiply(tile_t=64, tile_k=64, group=6, warps=4, stages=3)
MEASURED = Multiply(tile_t=64, tile_k=64, group=5, warps=4, stages=3)


def never(config: Config) -> Tensor:
    raise AssertionError("launched")


def exact() -> Tensor:
    return torch.ones(2)


@pytest.fixture
def folder(no_tables: Path) -> Path:
    """The folder of the user's tables, which is not there yet."""
    return no_tables


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the package have a table."""

    def give(configs: dict[str, Any]) -> None:
        def read(name: str) -> Any:
            return {"measured": {}, "configs": configs} if name == "sm_90.json" else healthy(name)

        healthy = tables.package_data
        read.cache_clear = lambda: None  # type: ignore[attr-defined]
        monkeypatch.setattr(tables, "package_data", read)

    return give


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> list[list[Config]]:
    """``SPARSEKERN_AUTOTUNE=1`` on a machine that can; every list of configurations that was measured."""
    measured: list[list[Config]] = []
    monkeypatch.setenv("SPARSEKERN_AUTOTUNE", "1")
    monkeypatch.setattr(tables, "why_not_measured", lambda: None)
    monkeypatch.setattr(tables, "fastest", lambda configs, *_: measured.append(list(configs)) or MEASURED)
    return measured


def give_user(folder: Path, configs: dict[str, Any], arch: str = "sm_90") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{arch}.json").write_text(json.dumps({"measured": {}, "configs": configs}))
    tables.forget()


# The order.


def test_where_nothing_was_measured_the_roofline_guesses(folder: Path) -> None:
    assert tables.choose(PROBLEM, never, exact) == GUESS
    assert not folder.exists()


def test_the_table_of_the_package_comes_before_the_guess(package: Callable[..., None]) -> None:
    package({PROBLEM.key: asdict(PACKAGES)})

    assert tables.choose(PROBLEM, never, exact) == PACKAGES
    assert tables.choose(PROBLEM._replace(bi=64), never, exact) != PACKAGES


def test_the_table_of_the_user_comes_before_that_of_the_package(folder: Path, package: Callable[..., None]) -> None:
    package({PROBLEM.key: asdict(PACKAGES)})
    give_user(folder, {PROBLEM.key: asdict(USERS)})

    assert tables.choose(PROBLEM, never, exact) == USERS


def test_a_table_is_of_one_architecture(folder: Path) -> None:
    give_user(folder, {PROBLEM.key: asdict(USERS)}, arch="sm_80")

    assert tables.choose(PROBLEM, never, exact) == GUESS
    assert tables.choose(PROBLEM._replace(arch="sm_80"), never, exact) == USERS


@pytest.mark.parametrize(
    ("tokens", "blocks", "found"), [(1, 0, True), (0, -2, True), (-3, 3, True), (4, 0, False), (0, -4, False)]
)
def test_the_nearest_entry_serves_where_there_is_none(folder: Path, tokens: int, blocks: int, found: bool) -> None:
    """An eighth or eight times of what was measured; beyond that the roofline guesses."""
    other = PROBLEM._replace(log2_tokens=PROBLEM.log2_tokens + tokens, log2_blocks=PROBLEM.log2_blocks + blocks)
    give_user(folder, {other.key: asdict(USERS)})

    assert tables.choose(PROBLEM, never, exact) == (USERS if found else GUESS)


def test_of_two_entries_the_nearer_one_serves(folder: Path) -> None:
    near, far = (PROBLEM._replace(log2_tokens=PROBLEM.log2_tokens + step) for step in (1, -2))
    give_user(folder, {near.key: asdict(USERS), far.key: asdict(PACKAGES)})

    assert tables.choose(PROBLEM, never, exact) == USERS


def test_a_near_entry_does_not_keep_a_problem_from_being_measured(folder: Path, measuring: list[list[Config]]) -> None:
    give_user(folder, {PROBLEM._replace(log2_tokens=PROBLEM.log2_tokens + 1).key: asdict(USERS)})

    assert tables.choose(PROBLEM, never, exact) == MEASURED
    assert len(measuring) == 1


def test_a_choice_is_remembered_until_it_is_forgotten(folder: Path) -> None:
    assert tables.choose(PROBLEM, never, exact) == GUESS
    folder.mkdir(parents=True)
    (folder / "sm_90.json").write_text(json.dumps({"configs": {PROBLEM.key: asdict(USERS)}}))
    assert tables.choose(PROBLEM, never, exact) == GUESS

    tables.forget()

    assert tables.choose(PROBLEM, never, exact) == USERS


# The modes.


def test_a_mode_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_AUTOTUNE", "yes")

    with pytest.raises(ValueError, match="SPARSEKERN_AUTOTUNE is 'yes'; it must be one of offline, 0, 1"):
        tables.choose(PROBLEM, never, exact)


@pytest.mark.parametrize("mode", ["offline", "0", "1"])
def test_the_modes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKERN_AUTOTUNE", mode)

    assert tables.mode() == mode


def test_by_default_nothing_is_measured() -> None:
    assert tables.mode() == "offline"


def test_mode_0_reads_no_table(folder: Path, package: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    package({PROBLEM.key: asdict(PACKAGES)})
    give_user(folder, {PROBLEM.key: asdict(USERS)})
    monkeypatch.setenv("SPARSEKERN_AUTOTUNE", "0")

    assert tables.choose(PROBLEM, never, exact) == GUESS


def test_mode_1_measures_once_and_remembers(folder: Path, measuring: list[list[Config]]) -> None:
    assert tables.choose(PROBLEM, never, exact) == MEASURED
    assert tables.choose(PROBLEM, never, exact) == MEASURED
    assert measuring == [roofline.candidates(PROBLEM)]

    tables.forget()  # as in another process

    assert tables.choose(PROBLEM, never, exact) == MEASURED
    assert len(measuring) == 1


def test_mode_1_measures_nothing_that_is_in_a_table(folder: Path, measuring: list[list[Config]]) -> None:
    give_user(folder, {PROBLEM.key: asdict(USERS)})

    assert tables.choose(PROBLEM, never, exact) == USERS
    assert measuring == []


def test_mode_1_waits_until_it_can_measure(
    folder: Path, measuring: list[list[Config]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A guess made inside a graph capture must not be remembered as if it were measured."""
    monkeypatch.setattr(tables, "why_not_measured", lambda: "a CUDA graph is being captured")
    with caplog.at_level(logging.INFO, "sparsekern"):
        assert tables.choose(PROBLEM, never, exact) == GUESS
    assert caplog.messages == [f"{PROBLEM.key} is not tuned: a CUDA graph is being captured"]
    assert measuring == [] and not folder.exists()

    monkeypatch.setattr(tables, "why_not_measured", lambda: None)

    assert tables.choose(PROBLEM, never, exact) == MEASURED


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_mode_1_measures_nothing_whose_answer_cannot_be_checked(
    folder: Path, measuring: list[list[Config]], bad: float
) -> None:
    """A training that has diverged must not decide what the next one runs."""
    assert tables.choose(PROBLEM, never, lambda: torch.tensor([1.0, bad])) == GUESS
    assert measuring == [] and not folder.exists()
    assert tables.choose(PROBLEM, never, exact) == MEASURED


def test_what_cannot_be_measured_is_chosen_once(
    folder: Path, measuring: list[list[Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks would read the table in every step; and take the nearest entry, as offline does."""
    near = PROBLEM._replace(log2_tokens=PROBLEM.log2_tokens + 1)
    give_user(folder, {near.key: asdict(USERS)})
    monkeypatch.setattr(tables, "why_not_measured", lambda: "several ranks are running")

    assert tables.choose(PROBLEM, never, exact) == USERS
    monkeypatch.setattr(tables, "read", lambda problem: pytest.fail("the table was read again"))
    assert tables.choose(PROBLEM, never, exact) == USERS
    assert measuring == []


def test_a_folder_that_cannot_be_written_costs_one_measurement(
    tmp_path: Path, measuring: list[list[Config]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "file" / "folder"))

    assert [tables.choose(PROBLEM, never, exact) for _ in range(3)] == [MEASURED] * 3
    assert len(measuring) == 1
    (message,) = caplog.messages
    assert "is not written" in message and "SPARSEKERN_CACHE" in message


def test_threads_that_measure_at_once_lose_nothing(folder: Path) -> None:
    problems = [PROBLEM._replace(log2_tokens=t, log2_blocks=n) for t in range(12) for n in range(6)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda problem: tables.write(problem, MEASURED), problems))

    assert all(tables.read(problem) == MEASURED for problem in problems)


def test_without_a_home_there_is_no_table_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("SPARSEKERN_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", "elsewhere")
    assert tables.cache_folder() == Path("elsewhere/sparsekern")

    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tables.cache_folder() is None
    assert tables.choose(PROBLEM, never, exact) == GUESS


# Files.


def test_a_measurement_is_added_to_what_was_there(folder: Path) -> None:
    other = PROBLEM._replace(log2_tokens=5)
    give_user(folder, {PROBLEM.key: asdict(USERS)})

    tables.write(other, MEASURED)

    table = json.loads((folder / "sm_90.json").read_text())
    assert table["configs"] == {PROBLEM.key: asdict(USERS), other.key: asdict(MEASURED)}
    assert set(table["measured"]) == {"device", "torch", "triton", "date"}
    assert tables.read(other) == MEASURED and tables.read(PROBLEM) == USERS


def test_a_table_is_replaced_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads while it is written sees the old table; a writer that fails leaves it."""
    give_user(folder, {PROBLEM.key: asdict(USERS)})
    seen = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, to: seen.append(tables.read(PROBLEM)) or replace(self, to))

    tables.write(PROBLEM, MEASURED)

    assert seen == [USERS]
    assert tables.read(PROBLEM) == MEASURED
    assert [p.name for p in folder.iterdir()] == ["sm_90.json"]


@pytest.mark.parametrize("text", ["", "{", "[1", "\x00"])
def test_a_broken_table_is_told_and_passed_over(
    text: str, folder: Path, package: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    package({PROBLEM.key: asdict(PACKAGES)})
    folder.mkdir(parents=True)
    (folder / "sm_90.json").write_text(text)

    assert tables.choose(PROBLEM, never, exact) == PACKAGES
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{folder / 'sm_90.json'} is not read: " in record.getMessage()


def test_a_broken_table_is_replaced_by_the_next_measurement(folder: Path, measuring: list[list[Config]]) -> None:
    folder.mkdir(parents=True)
    (folder / "sm_90.json").write_text("{")

    assert tables.choose(PROBLEM, never, exact) == MEASURED
    assert tables.read(PROBLEM) == MEASURED


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"configs": []}'])
def test_a_table_of_another_form_is_none(text: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "sm_90.json").write_text(text)

    assert tables.choose(PROBLEM, never, exact) == GUESS


@pytest.mark.parametrize(
    "fields",
    [
        {**asdict(USERS), "cluster": 2},  # a later version
        {"tile_t": 64},  # an earlier one
        asdict(Outer(64, 16, 4, 3)),  # another kernel
        asdict(Multiply(tile_t=256, tile_k=256, group=8, warps=8, stages=8)),  # too large for the device
        {**asdict(USERS), "tile_t": "64"},
        {**asdict(USERS), "tile_t": 48},  # no power of two
        {**asdict(USERS), "warps": 0},
        {**asdict(USERS), "stages": 1.5},
        {**asdict(USERS), "tma": 1},
        [64, 64],
        "fast",
    ],
)
def test_an_entry_that_does_not_fit_is_passed_over(fields: Any, folder: Path, package: Callable[..., None]) -> None:
    package({PROBLEM.key: asdict(PACKAGES)})
    give_user(folder, {PROBLEM.key: fields})

    assert tables.choose(PROBLEM, never, exact) == PACKAGES


def test_where_the_tables_of_the_user_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEKERN_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert tables.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SPARSEKERN_CACHE")
    assert tables.cache_folder() == tmp_path / "b" / "sparsekern"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "c")
    assert tables.cache_folder() == tmp_path / "c" / ".cache" / "sparsekern"


def test_a_link_in_place_of_the_users_table_is_replaced_and_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(parents=True)
    (victim := tmp_path / "victim").write_text("mine")
    for name in ("sm_90.json", f"sm_90.{os.getpid()}.tmp"):
        (folder / name).symlink_to(victim)

    tables.write(PROBLEM, USERS)

    assert victim.read_text() == "mine" and not (folder / "sm_90.json").is_symlink()
    assert json.loads((folder / "sm_90.json").read_text())["configs"] == {PROBLEM.key: asdict(USERS)}
