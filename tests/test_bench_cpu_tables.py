"""The race on a CPU as it is shown: goals, tables, its command line, and its section of the README."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import bench_conv2d, bench_linear, race, readme
from bench.cpu import contestants, run
from bench.cpu.cases import SMALL, Case, quick_cases
from bench.cpu.contestants import DENSE
from bench.cpu.conv_cases import quick_conv_cases
from bench.cpu.conv_goals import conv_findings
from bench.cpu.goals import GOALS, findings
from bench.cpu.results import COMMITTED, Race, case_of, write_rows
from bench.cpu.table import case_table, goal_table, losing, milliseconds, times
from bench.gpu.contestants import Contestant
from bench.gpu.results import read_rows
from tests.bench_rows import CONV_HEAD, CONV_TINY, HEAD, TINY, made_up, text_of

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


@pytest.mark.parametrize(("ours", "said"), [(2.0, "reached aim"), (2.6, "reached must"), (4.0, "MISSED")])
def test_goals_of_convolutions_are_judged_against_channels_last(ours, said):
    found = Race(made_up(CONV_HEAD, sparsekern=ours, channels_last=16.0, contiguous=1.0))
    (finding,) = (f for f in conv_findings(found) if f.measured is not None)
    assert (finding.verdict, finding.must, finding.aim, finding.measured) == (said, 5.5, 7.5, pytest.approx(16 / ours))
    assert f"90% {16 / ours:.1f}/5.5" in text_of(goal_table(found, "AMD EPYC"))


def test_the_table_names_the_layer_and_who_it_is_against():
    slow = CONV_HEAD._replace(sparsity=0.5)
    found = Race(
        made_up(CONV_HEAD, sparsekern=2.0, SparseConv2d=2.5, channels_last=16.0, contiguous=12.0)
        + made_up(slow, sparsekern=20.0, channels_last=19.0)
    )
    text = text_of(case_table(found))
    assert "SparseConv2d" in text and "x channels_last" in text and "12 contiguous" in text and losing(found) == [slow]
    assert "8.0" in text and "fwd+bwd fp32 32x64x32x32->64 k3 b32 1T" in text
    assert [case_of(row) for row in found.rows[:1]] == [CONV_HEAD]


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


@pytest.mark.parametrize(
    "argv", [["--show", "no such file"], ["--show", "README.md", "--quick"], ["--fast"], ["--kernel", "attention"]]
)
def test_options_that_make_no_sense(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        race.options(argv)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kernel", "tiny", "shown"),
    [("linear", TINY, "fwd+bwd fp32 24x64x128 b16"), ("conv2d", CONV_TINY, "2x32x7x7->48 k3")],
)
def test_quick_runs_the_quick_cases_writes_them_and_shows_them(kernel, tiny, shown, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.cpu.cases.quick_cases", lambda: [TINY])
    monkeypatch.setattr("bench.cpu.conv_cases.quick_conv_cases", lambda: [CONV_TINY])
    monkeypatch.setattr("bench.cpu.cases.cases", lambda cores: [])
    monkeypatch.setattr(run, "SECONDS", 0.0)
    out = tmp_path / "quick.jsonl"
    assert race.main(["--kernel", kernel, "--quick", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert shown in captured.out and f"written: {out}" in captured.out
    assert tiny.key in captured.err
    assert {case_of(row) for row in read_rows(out)} == {tiny}
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

    group, calls = "", 0

    def __call__(self, call) -> None:
        assert torch.get_num_threads() == 1
        call()
        self.calls += 1


def test_the_benchmarks_of_pytest_check_before_they_time(monkeypatch):
    for test, tiny, name in (
        (bench_linear.test_linear, TINY, "F.linear"),
        (bench_conv2d.test_conv2d, CONV_TINY, "channels_last"),
    ):
        benchmark = OneCall()
        test(benchmark, tiny, name)
        assert benchmark.group == tiny.key and benchmark.calls == 1
    assert {case for case, _ in bench_linear.CONTESTANTS} == set(quick_cases())
    assert {case for case, _ in bench_conv2d.CONTESTANTS} == set(quick_conv_cases())

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


def test_the_readme_shows_convolutions_too():
    rows = made_up(CONV_HEAD, sparsekern=2.0, channels_last=16.0)
    rows += made_up(CONV_HEAD._replace(threads=2, sparsity=0.5), sparsekern=20.0, channels_last=19.0)
    text = readme.conv_section(rows)
    assert "| 32x64x32x32->64 k3, 32x32 | - | - | 8.0 | - |" in text
    assert "0.95" not in text, "two threads are in the file only"
    assert "16x16" not in text and "In 1 of 2 measured cases another contestant is faster." in text
