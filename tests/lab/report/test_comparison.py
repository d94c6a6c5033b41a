from __future__ import annotations

import pytest

from sparsekern.lab.report.comparison import HEADINGS, draw_comparison, markdown, table_cells


def numbers(mean, deviation=None):
    return {"mean": mean, "standard_deviation": deviation}


def row(method, sparsity=None, block_size=None, accuracy=0.5, deviation=0.01, gap=None):
    return {
        "method": method,
        "sparsity": sparsity,
        "network_sparsity": 0.0 if sparsity is None else sparsity - 0.05,
        "block_size": block_size,
        "test_accuracy": numbers(accuracy, deviation),
        "gap_to_dense": None if gap is None else numbers(gap),
        "seconds": numbers(12.34, 0.5),
        "ms_per_step": 3.0,
        "training_flops": 1_234_000_000_000,
        "peak_bytes": 3 * 2**20,
    }


ROWS = [row("dense", accuracy=0.9)] + [
    row(method, sparsity, block, 0.8, gap=-0.1)
    for block in (1, 16)
    for sparsity in (0.9, 0.95)
    for method in ("static", "gse, scope global")
]


def test_the_cells():
    dense, sparse = table_cells(ROWS)[:2]
    assert dense == ("dense", "", "", "", "90.00 ± 1.00", "", "12.3 ± 0.5", "3.00", "1.23T", "3.0")
    assert sparse == ("static", "90 %", "85.0 %", "1", "80.00 ± 1.00", "-10.00", "12.3 ± 0.5", "3.00", "1.23T", "3.0")
    assert len(HEADINGS) == len(dense)


@pytest.mark.parametrize(("flops", "text"), [(2e15, "2P"), (999e9, "999G"), (1.5e6, "1.5M")])
def test_large_numbers_are_short(flops, text):
    assert table_cells([{**ROWS[1], "training_flops": flops, "ms_per_step": None}])[0][7:9] == ("", text)


def test_a_run_that_does_not_say_how_sparse_the_whole_network_is():
    assert table_cells([{**ROWS[1], "network_sparsity": None}])[0][1:3] == ("90 %", "")


def test_markdown():
    lines = markdown(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS) and len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| method | sparsity") and lines[1].startswith("| --- | ---:")


def test_the_picture(tmp_path, monkeypatch):
    import matplotlib
    from matplotlib.axes import Axes

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axes, x, y, yerr, **how: drawn.append((y, yerr)) or errorbar(axes, x, y, yerr, **how)
    )
    draw_comparison(tmp_path / "x.svg", "a title", ROWS)
    text = (tmp_path / "x.svg").read_text()
    for said in (
        "a title",
        ">blocks of 1 x 1<",
        ">blocks of 16 x 16<",
        ">90<",
        ">95<",
        ">static<",
        ">gse, scope global<",
    ):
        assert said in text
    assert text.count(">dense<") == 1, "the legend names each once"
    assert drawn == [([80, 80], [1, 1])] * 4


@pytest.mark.parametrize("rows", [ROWS[:1], [row("set", 0.9, 16, deviation=None)]])
def test_few_rows(tmp_path, rows):
    draw_comparison(tmp_path / "x.png", "", rows)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_failed_leaves_its_place_empty(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, errorbar = [], Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda axes, x, y, yerr, **how: drawn.append(x) or errorbar(axes, x, y, yerr, **how)
    )
    rows = [row("static", 0.9, 16), row("static", 0.95, 16), row("set", 0.95, 16)]
    draw_comparison(tmp_path / "x.svg", "", rows)
    assert [[round(x) for x in places] for places in drawn] == [[0, 1], [1]]


@pytest.mark.parametrize(("deviation", "said"), [(None, False), (0.1, True)])
def test_the_axis_speaks_of_seeds_where_there_are_several(tmp_path, deviation, said):
    draw_comparison(tmp_path / "x.svg", "", [row("set", 0.9, 16, deviation=deviation)])
    assert ("mean and deviation over seeds" in (tmp_path / "x.svg").read_text()) == said
