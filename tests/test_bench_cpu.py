"""The race on a CPU: its cases, answers, ratios, goals, tables, and what it writes into the README."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import bench_linear, race, readme
from bench.cpu import contestants, peers, run
from bench.cpu.cases import LARGE, SMALL, WIDE, Case, cases, quick_cases
from bench.cpu.clock import Stopwatch
from bench.cpu.contestants import DENSE, OURS
from bench.cpu.goals import GOALS, findings
from bench.cpu.results import COMMITTED, Race, case_of, circumstances, rows_of, write_rows
from bench.cpu.scene import MOVED, make_scene
from bench.cpu.table import case_table, goal_table, losing, milliseconds, times
from bench.gpu.clock import Timing
from bench.gpu.contestants import SPARSE, Contestant
from bench.gpu.peers import NotSupported
from bench.gpu.results import read_rows
from bench.gpu.scene import Judge
from sparsekern.topology import random
from tests.oracle import dense_weight, stored_blocks

HEAD = Case("step", "fp32", *WIDE, 32, 0.9)
TINY = Case("step", "fp32", 24, 64, 128, 16, 0.75)


def made_up(case: Case = HEAD, **ms: float) -> list[dict]:
    """Return the rows of a case in which each contestant took the milliseconds given for it."""
    kinds = {"sparsekern": OURS, "SparseLinear": OURS, "avx2": OURS, "linear": DENSE, "onednn": DENSE}
    names = {
        "linear": "F.linear",
        "onednn": "oneDNN",
        "csr": "torch-csr",
        "bsr": "torch-bsr",
        "avx2": "sparsekern-avx2",
    }
    timings = {names.get(name, name): Timing([0.9 * t, t, 1.2 * t]) for name, t in ms.items()}
    taking_part = {
        names.get(name, name): Contestant(name, kinds.get(name, SPARSE), lambda: None, lambda _: {}) for name in ms
    }
    elements = round((1 - case.sparsity) * case.in_features * case.out_features)
    common = {"device": "a processor", "path": "avx512", "torch": "2", "commit": "abc", "date": "2026-11-21"}
    return [{**row, **common} for row in rows_of(case, elements, taking_part, timings)]


def text_of(table) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


# Cases.


def test_cases_are_distinct_and_those_that_share_tensors_follow_each_other():
    every = cases(2)
    assert len({case.key for case in every}) == len(every) and set(quick_cases()) <= set(every)
    scenes = [case.scene for case in every]
    assert len(dict.fromkeys(scenes)) == 1 + sum(a != b for a, b in pairwise(scenes))
    assert {case.threads for case in cases(1)} == {1} and {case.threads for case in every} == {1, 2}


def test_every_goal_is_in_the_cases_and_every_line_of_the_readme_too():
    every = set(cases(2))
    assert {finding.case for finding in findings(Race([]))} <= every
    assert {line.case(s) for line in readme.LINES for s in readme.SPARSITIES} <= every
    assert {readme._few(op, tokens, b) for op in ("fwd", "step") for tokens in (1, 16) for b in (1, 32)} <= every


def test_a_scene_is_a_layer_in_whose_middle_blocks_have_moved():
    scene = make_scene(TINY)
    layer, (bo, bi) = scene.layer, scene.grid.block
    drawn = random(scene.grid, len(scene.row), torch.Generator().manual_seed(0))
    assert len(scene.row) == 8 and (bo, bi) == (16, 16) and drawn.slots == 8
    keys = layer.topology.keys()
    assert keys.unique().numel() == 8 and not torch.equal(keys, keys.sort().values) and 0 < MOVED < 1
    exact = dense_weight(scene.values, scene.row, scene.col, TINY.out_features, TINY.in_features)
    assert torch.equal(scene.weight.double(), exact)
    assert torch.equal(scene.blocks_of(exact), stored_blocks(exact, scene.row, scene.col, scene.grid.block))
    assert layer.index.row_ptr.data_ptr() == scene.index.row_ptr.data_ptr()


# Contestants.


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("block", [1, 16, 32])
@pytest.mark.parametrize("op", ["fwd", "dvalues", "step"])
def test_all_contestants_agree_with_the_oracle(op, block, dtype):
    case = TINY._replace(op=op, block=block, dtype=dtype)
    scene = make_scene(case)
    judge = Judge(scene, "step", tf32=False)
    weight = dense_weight(scene.values, scene.row, scene.col, case.out_features, case.in_features)
    exact = {
        "y": scene.x.double() @ weight.T,
        "dx": scene.dy.double() @ weight,
        "dvalues": stored_blocks(scene.dy.double().T @ scene.x.double(), scene.row, scene.col, scene.grid.block),
    }
    for name, tensor in exact.items():
        torch.testing.assert_close(judge.exact[name][0], tensor)
    agreed, refused = set(), set()
    for name, make in run.makers(case._replace(tokens=WIDE[0], in_features=WIDE[1], out_features=WIDE[2])).items():
        try:
            contestant = make(scene, op)
        except NotSupported as error:
            refused.add((name, str(error)))
            continue
        answer = contestant.answer(contestant.run())
        assert set(answer) == {"fwd": {"y"}, "dvalues": {"dvalues"}, "step": {"y", "dx", "dvalues"}}[op]
        assert judge.wrong(answer, by_element=contestant.kind == OURS) is None, name
        assert contestant.name == name
        agreed.add(name)
    assert {"F.linear", "oneDNN"} <= agreed
    assert ("torch-csr" in agreed) == (dtype == "fp32") and ("torch-bsr" in agreed) == (dtype == "fp32" and block > 1)
    assert all(reason for _, reason in refused)


def test_float32_is_judged_as_float32():
    scene = make_scene(TINY)
    good = contestants.f_linear(scene, "fwd")
    y = good.answer(good.run())["y"]
    off = {"y": y * (1 + 2**-12)}  # as tf32 would be
    assert Judge(scene, "fwd").wrong(off, by_element=False) is None
    assert "of its norm" in (Judge(scene, "fwd", tf32=False).wrong(off, by_element=False) or "")


def test_the_avx2_contestant_leaves_the_path_as_it_was(monkeypatch):
    calls = []

    class Library:
        def sk_use(self, name: bytes) -> int:
            calls.append(name)
            return 1

    monkeypatch.setattr(contestants, "load", lambda: (Library(), "avx512"))
    monkeypatch.setenv("SPARSEKERN_CPU", "avx512")
    plain = Contestant("sparsekern", OURS, lambda: calls.append(b"call"), lambda _: {})
    monkeypatch.setattr(contestants, "sparsekern", lambda scene, op: plain)
    contestant = contestants.sparsekern_avx2(make_scene(TINY), "fwd")
    contestant.run()
    assert calls == [b"avx2", b"avx512", b"avx2", b"call", b"avx512"] and contestant.name == "sparsekern-avx2"


@pytest.mark.parametrize(
    ("library", "path", "said"),
    [(None, "not built", "not built"), (object(), "avx2", "the path is avx2")],
)
def test_the_avx2_contestant_says_why_it_does_not_run(monkeypatch, library, path, said):
    monkeypatch.setattr(contestants, "load", lambda: (library, path))
    with pytest.raises(NotSupported, match=said):
        contestants.sparsekern_avx2(make_scene(TINY), "step")


def test_who_takes_part():
    assert "nn.Linear" in contestants.makers(HEAD) and "sparsekern-avx2" in contestants.makers(HEAD)
    assert "nn.Linear" not in contestants.makers(
        HEAD._replace(tokens=LARGE[0], in_features=LARGE[1], out_features=LARGE[2])
    )
    assert "sparsekern-avx2" not in contestants.makers(HEAD._replace(threads=2))
    assert set(peers.makers(HEAD)) == {"torch-csr", "torch-bsr"}
    assert {"scipy-csr", "scipy-bsr"} < set(peers.makers(HEAD._replace(op="fwd")))


def test_what_is_not_installed_or_not_possible_says_so(monkeypatch):
    scene = make_scene(TINY)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotSupported, match=r"scipy is not installed; pip install -e '\.\[bench\]'"):
        peers.scipy("csr", scene, "fwd")
    monkeypatch.undo()
    pytest.importorskip("scipy")
    with pytest.raises(NotSupported, match="no product for dvalues"):
        peers.scipy("csr", scene, "step")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(NotSupported, match="without oneDNN"):
        contestants.onednn(scene, "fwd")
    monkeypatch.setattr(contestants.cpu, "why_not", lambda *_: "it was not built")
    with pytest.raises(NotSupported, match="it was not built"):
        contestants.sparsekern(scene, "fwd")


# Running, and the file.


def test_a_wrong_answer_is_recorded_and_not_timed():
    def wrong(scene, op):
        dense = contestants.f_linear(scene, op)
        return Contestant("liar", DENSE, dense.run, lambda r: {k: 1.5 * v for k, v in dense.answer(r).items()})

    def breaks(scene, op):
        raise RuntimeError("no such kernel")

    def unable(scene, op):
        raise NotSupported("not here")

    scene = make_scene(TINY)
    taking_part = {"F.linear": contestants.f_linear, "liar": wrong, "none": breaks, "unable": unable}
    rows = run.run_case(TINY, scene, Judge(scene, "step", tf32=False), taking_part, seconds=0.0)
    found = {row["contestant"]: row for row in rows}
    assert found["F.linear"]["ms"] > 0 and found["F.linear"]["samples"] >= 2
    assert "of its norm" in found["liar"]["refused"] and "ms" not in found["liar"]
    assert found["none"]["error"] == "RuntimeError: no such kernel" and found["unable"]["not_supported"] == "not here"


def test_cases_run_with_their_threads_and_leave_the_number_as_it_was(monkeypatch, threads):
    seen, said = [], []

    def spy(scene, op):
        seen.append(torch.get_num_threads())
        return contestants.f_linear(scene, op)

    def unable(scene, op):
        raise NotSupported("not here")

    monkeypatch.setattr(run, "makers", lambda case: {"F.linear": spy, "unable": unable})
    threads(1)
    rows = run.run_cases([TINY, TINY._replace(threads=2)], {"device": "here"}, said.append, seconds=0.0)
    assert seen == [1, 2] and torch.get_num_threads() == 1
    assert [(row["contestant"], row["threads"]) for row in rows] == [("F.linear", 1), ("unable", 1), ("F.linear", 2)]
    assert {row["device"] for row in rows} == {"here"} and case_of(rows[2]) == TINY._replace(threads=2)
    assert len(said) == 2 and all("F.linear" in line and "unable NOT TIMED (not here)" in line for line in said)


def test_a_short_call_is_made_twice_and_the_second_is_timed(monkeypatch):
    made, now = [], [0.0]
    monkeypatch.setattr("bench.gpu.clock.time.perf_counter", lambda: now[0])

    def call(milliseconds: float):
        made.append(milliseconds)
        now[0] += milliseconds / 1e3

    timing = Timing()
    watch = Stopwatch()
    assert watch._sample(lambda: call(3.0), timing) == pytest.approx(3.0) and len(made) == 2
    timing.samples.append(3.0)
    assert watch._sample(lambda: call(3.0), timing) == pytest.approx(3.0) and len(made) == 4
    timing.samples.append(600.0)
    assert watch._sample(lambda: call(600.0), timing) == pytest.approx(600.0) and len(made) == 5


def test_the_ratios_of_a_case():
    rows = {r["contestant"]: r for r in made_up(sparsekern=2.0, linear=20.0, onednn=16.0, csr=5.0, bsr=6.0)}
    ours = rows["sparsekern"]
    assert (ours["ms"], ours["p25"], ours["p75"], ours["samples"]) == (2.0, 1.8, 2.4, 3) or ours["samples"] == 3
    assert (ours["vs_dense"], ours["best_dense"]) == (8.0, "oneDNN") and ours["vs_linear"] == 10.0
    assert (ours["vs_sparse"], ours["best_sparse"]) == (2.5, "torch-csr")
    assert ours["rate_vs_dense"] == pytest.approx(0.8, rel=1e-3)  # 8 times as fast on a tenth of the products
    assert "vs_dense" not in rows["oneDNN"]
    assert rows["oneDNN"]["gflops"] == pytest.approx(3 * 2 * 512 * 1024 * 4096 / 16e-3 / 1e9, rel=1e-3)
    (alone,) = made_up(sparsekern=2.0)
    assert alone["vs_dense"] is alone["vs_linear"] is alone["vs_sparse"] is None and "rate_vs_dense" not in alone


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, made_up(sparsekern=2.0, linear=4.0))
    assert [row["contestant"] for row in read_rows(path)] == ["sparsekern", "F.linear"]

    def torn():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, torn())
    assert len(read_rows(path)) == 2 and [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_row_says_on_what_it_was_measured():
    here = circumstances()
    assert here["torch"] == torch.__version__ and here["device"] and here["path"] and len(here["date"]) == 10
    assert json.loads(json.dumps(here)) == here and {"commit", "python", "scipy", "sparsekern"} <= set(here)


# Goals and tables.


@pytest.mark.parametrize(("ours", "said"), [(2.0, "reached aim"), (2.4, "reached must"), (2.6, "MISSED")])
def test_goals_are_judged(ours, said):
    found = Race(made_up(sparsekern=ours, linear=50.0, onednn=20.0, SparseLinear=2 * ours))
    judged = [f for f in findings(found) if f.measured is not None]
    by_name = {(f.goal.what, f.goal.contestant): f for f in judged}
    dense = by_name["best dense", "sparsekern"]
    assert dense.measured == pytest.approx(20.0 / ours)
    assert (dense.verdict, dense.must, dense.aim) == (said, 8, 9.5)
    assert by_name["F.linear", "sparsekern"].measured == pytest.approx(50.0 / ours)
    assert by_name["autograd / the kernels alone", "SparseLinear"].verdict == "MISSED"
    others = [f for f in findings(found) if f.case != HEAD]
    assert {f.verdict for f in others} == {"not measured"}
    assert {id(f.goal) for f in findings(found)} == {id(goal) for goal in GOALS}


def test_the_tables_show_losing_cells_and_missed_goals():
    slow = HEAD._replace(sparsity=0.5)
    found = Race(
        made_up(sparsekern=2.0, SparseLinear=2.1, linear=20.0, onednn=19.0, csr=9.0)
        + made_up(slow, sparsekern=20.0, linear=19.99, onednn=21.0, csr=90.0)
    )
    text = text_of(case_table(found))
    winning, lost = (next(line for line in text.splitlines() if f" {s} " in line) for s in ("90%", "50%"))
    assert "LOSES" in lost and "LOSES" not in winning and losing(found) == [slow]
    assert "0.99" in lost and "1.00" not in lost  # never rounded up to a draw
    assert "9.5" in winning and "4.5 torch-csr" in winning and "95%" in winning
    goals = text_of(goal_table(found, "another processor"))
    assert "MISSED 1 of 2" in goals and "50% 0.99/1.9!" in goals and "90% 9.5/8*" in goals
    assert "they were set on an AMD EPYC" in goals and "set on" not in text_of(goal_table(found, "AMD EPYC 9"))


def test_figures_as_text():
    assert [times(r) for r in (None, 0.999, 0.5, 1.0, 9.94, 9.96, 28.4)] == [
        "-",
        "0.99",
        "0.50",
        "1.0",
        "9.9",
        "10",
        "28",
    ]
    assert [milliseconds(t) for t in (0.0123, 1.234, 12.34, 99.96, 123.4)] == ["0.012", "1.23", "12.3", "100", "123"]


# The command line.


def test_the_options():
    assert race.options(["--quick"]).quick and not race.options([]).quick
    assert race.options(["--out", "a.jsonl"]).out == Path("a.jsonl")


@pytest.mark.parametrize("argv", [["--show", "no such file"], ["--show", "README.md", "--quick"], ["--fast"]])
def test_options_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        race.options(argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_quick_runs_the_quick_cases_writes_them_and_shows_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.cpu.cases.quick_cases", lambda: [TINY])
    monkeypatch.setattr("bench.cpu.cases.cases", lambda cores: [])
    monkeypatch.setattr(run, "SECONDS", 0.0)
    out = tmp_path / "quick.jsonl"
    assert race.main(["--quick", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert "fwd+bwd fp32 24x64x128 b16" in captured.out and f"written: {out}" in captured.out
    assert TINY.key in captured.err
    assert {case_of(row) for row in read_rows(out)} == {TINY}
    assert race.main(["--show", str(out)]) == 0 and "written" not in capsys.readouterr().out
    assert race.main(["--out", str(tmp_path / "none.jsonl")]) == 0 and "nothing was measured" in capsys.readouterr().out


def test_a_wrong_answer_fails_the_command(tmp_path, capsys):
    rows = made_up(sparsekern=2.0, linear=4.0)
    rows.append({**rows[0], "contestant": "liar", "refused": "y is off"})
    del rows[-1]["ms"]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert race.main(["--show", str(tmp_path / "rows.jsonl")]) == 1
    assert "liar refused: y is off" in capsys.readouterr().out


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
    assert race.main(["--quick"]) == race.NEEDED and "pip install -e '.[bench]'" in capsys.readouterr().err


# pytest-benchmark.


class OneCall:
    """What stands in for the fixture of pytest-benchmark."""

    group = ""

    def __call__(self, call) -> None:
        assert torch.get_num_threads() == 1
        call()


def test_the_benchmarks_of_pytest_check_before_they_time(monkeypatch):
    benchmark = OneCall()
    bench_linear.test_linear(benchmark, TINY, "F.linear")
    assert benchmark.group == TINY.key
    assert {case for case, _ in bench_linear.CONTESTANTS} == set(quick_cases())

    def liar(scene, op):
        dense = contestants.f_linear(scene, op)
        return Contestant("liar", DENSE, dense.run, lambda r: {k: -v for k, v in dense.answer(r).items()})

    monkeypatch.setattr(bench_linear, "makers", lambda case: {"liar": liar})
    with pytest.raises(AssertionError, match="of its norm"):
        bench_linear.checked(TINY, "liar")
    monkeypatch.undo()
    with pytest.raises(pytest.skip.Exception, match="torch-csr"):
        bench_linear.checked(TINY._replace(block=1), "torch-bsr")


# The README.


def test_the_readme_shows_the_committed_results(capsys):
    assert readme.main(["--check"]) == 0, capsys.readouterr().err
    assert {row["torch"] for row in read_rows(COMMITTED)}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files as options: results and a README."""
    few = HEAD._replace(op="fwd", tokens=1)
    rows = [
        *made_up(sparsekern=2.0, SparseLinear=2.1, linear=20.0, onednn=19.0, csr=9.0),
        *made_up(HEAD._replace(block=1), sparsekern=40.0, SparseLinear=41.0, linear=20.0, csr=30.0),
        *made_up(few, sparsekern=0.02, linear=0.2, onednn=0.1),
        *made_up(Case("step", "fp32", *SMALL, 32, 0.99), sparsekern=0.5, linear=10.0),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "README.md").write_text(f"above\n{readme.BEGIN}\n(the last run)\n{readme.END}\nbelow\n")
    return [
        *("--results", str(tmp_path / "rows.jsonl"), "--conv-results", str(tmp_path / "conv.jsonl")),
        *("--readme", str(tmp_path / "README.md")),
    ]


def test_the_readme_is_written_and_checked(files, tmp_path, capsys):
    page = tmp_path / "README.md"
    assert readme.main([*files, "--check"]) == 1 and "run: python -m bench.readme" in capsys.readouterr().err
    assert "the last run" in page.read_text()  # --check writes nothing
    assert readme.main(files) == 0 and readme.main([*files, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "the last run" not in text
    assert "| 90 % | 2 | 2.1 | 19 | 10 | 9.5 | 4.5 |" in text
    assert "| 90 % | 40 | 41 | 20 | **0.50** | **0.50** | **0.75** |" in text
    assert "| 32x32, forward | 5.0 | - | - | - | - |" in text
    assert "| 32x32, 128 x 1024 x 1024 | - | - | - | - | 20 |" in text and "2 threads" not in text
    assert "In 1 of 4 measured cases another contestant is faster." in text
    assert "a processor, avx512, PyTorch 2, 2026-11-21, commit abc" in text
    page.write_text(text.replace("| 90 % | 2 |", "| 90 % | 1 |"))
    assert readme.main([*files, "--check"]) == 1


def test_a_readme_without_marks_or_results_of_two_machines_are_refused(files, tmp_path, capsys):
    page, rows = tmp_path / "README.md", tmp_path / "rows.jsonl"
    for text in ("nothing", readme.END + readme.BEGIN, f"{readme.BEGIN}{readme.END}{readme.BEGIN}"):
        page.write_text(text)
        assert readme.main(files) == 2 and "once each" in capsys.readouterr().err and page.read_text() == text
    page.write_text(f"{readme.BEGIN}{readme.END}")
    write_rows(rows, [*read_rows(rows), {**read_rows(rows)[0], "device": "another"}])
    assert readme.main(files) == 2 and "2 machines" in capsys.readouterr().err
    rows.unlink()
    assert readme.main(files) == 2 and "no rows" in capsys.readouterr().err
    assert readme.main(["--readme", str(tmp_path / "none.md")]) == 2
