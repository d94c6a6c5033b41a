"""``sparsekern bench``: what it prints and writes."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from sparsekern.cli import bench as module
from sparsekern.cli.main import application

TINY = ["--linear", "32x48", "--tokens", "4", "--sparsity", "0.5,0.75", "--block", "8", "--seconds", "0.001"]


def run(*options):
    return CliRunner().invoke(application(), ["bench", *options])


def test_tables_say_who_is_slower_and_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw_bench", lambda path, rows, place: path.write_text("drawn") and 2)
    picture = tmp_path / "a.png"
    result = run(*TINY, "--threads", "1", "--picture", str(picture))
    assert result.exit_code == 0, result.output
    for words in (
        "linear 32 -> 48, 4 tokens, float32, 1 thread", "forward + backward", "break-even", "8x8", "PyTorch",
        "x: times as fast as dense, slower where it is not; in parentheses the quartiles",
        "interpolated linearly between the measured times", f"picture: {picture}",
        "the picture shows the first 12 layers; 2 layers more are in the tables",
    ):  # fmt: skip
        assert words in result.stdout
    assert picture.read_text() == "drawn"


def test_json_has_the_rows_and_the_break_even():
    result = run(*TINY, "--json")
    found = json.loads(result.stdout)
    assert len(found["rows"]) == 2 * 2 * 2 and {"place", "date", "python", "busy", "notes"} < found.keys()
    assert [even["which"] for even in found["break_even"]] == ["forward", "forward + backward"]
    assert {"ms", "p25", "p75", "vs_dense", "samples"} < found["rows"][0].keys()


def test_the_table_of_a_model(monkeypatch):
    result = run("--model", "gpt-nano", "--sparsity", "0.9", "--block", "32", "--seconds", "0.001", "--image", "2x8x8")
    assert result.exit_code == 0, result.output
    assert "gpt-nano, forward + backward, float32" in result.stdout and "all layers" in result.stdout
    assert "break-even" not in result.stdout


def test_a_busy_machine_is_said_last(monkeypatch):
    report = module.Report(rows=[], busy="the machine is too busy to believe these figures")
    monkeypatch.setattr(module, "run_bench", lambda request, advance: report)
    assert run().stdout.endswith("warning: the machine is too busy to believe these figures\n")


def test_the_help_has_examples():
    text = run("--help").stdout
    assert "Race sparse layers against the dense layer that they replace" in text
    assert "sparsekern bench --model resnet18-cifar --sparsity 0.9" in text
