"""Tables and break-even sparsities of rows that are made up, by hand."""

from __future__ import annotations

import pytest

from sparsekern.lab.bench.results import break_even, break_evens, milliseconds, model_cells, ratio, table_cells


def rows(layer="a", count=1, which="forward + backward", **times):
    """Return rows at 50 and 90 %: for each contestant its milliseconds at both; dense takes 8."""
    found = []
    for place, sparsity in enumerate((0.5, 0.9)):
        for name, ms in {"dense": (8.0, 8.0), **times}.items():
            about = {"layer": layer, "count": count, "pass": which, "dtype": "float32", "threads": 1, "samples": 5}
            figures = {"ms": ms[place], "p25": 0.9 * ms[place], "p75": 1.5 * ms[place], "vs_dense": 8 / ms[place]}
            found.append({**about, "sparsity": sparsity, "contestant": name.removeprefix("b"), **figures})
    return found


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.5, 0.8), (0.9, 4.0)], (0.6, "between")),  # 1.25 and 0.25 of the dense time: a quarter of the way
        ([(0.5, 2.0), (0.9, 4.0)], (0.5, "below")),
        ([(0.5, 0.5), (0.9, 0.9)], (0.9, "above")),
        ([(0.5, 2.0), (0.7, 0.5), (0.9, 2.0)], (0.7 + 0.2 * 2 / 3, "between")),  # the last crossing counts
        ([(0.9, 1.0)], (0.9, "below")),
    ],
)
def test_the_break_even_is_interpolated_between_times_as_fractions_of_dense(points, expected):
    sparsity, kind = break_even(points)
    assert (sparsity, kind) == (pytest.approx(expected[0]), expected[1])


def test_the_table_of_a_layer_marks_what_is_slower():
    heading, lines = table_cells(rows(b1x1=(10.0, 2.0), b16x16=(4.0, 1.0)))
    assert heading == ["pass", "sparsity", "dense", "1x1", "16x16"]
    assert lines[0][1:] == [
        "0.5", "8 ms (7.2-12)", "0.80x slower\n10 ms (9-15)", "2.00x\n4 ms (3.6-6)",
    ]  # fmt: skip
    assert [line[1] for line in lines] == ["0.5", "0.9", "break-even"]
    assert lines[2][2:] == ["", "60%", "below 50%"]


def test_a_contestant_that_was_not_raced_is_a_gap():
    found = [row for row in rows(b1x1=(10.0, 2.0)) if (row["contestant"], row["sparsity"]) != ("1x1", 0.5)]
    _, lines = table_cells(found)
    assert lines[0][3] == "-" and lines[2][3] == "below 90%"


def test_the_break_even_of_each_contestant_and_pass():
    found = list(break_evens([*rows(b1x1=(10.0, 2.0)), *rows(which="forward", b1x1=(20.0, 16.0))]))
    known = [(even["which"], even["kind"], round(even["sparsity"], 2)) for even in found]
    assert known == [("forward + backward", "between", 0.6), ("forward", "above", 0.9)]
    lines = table_cells(rows(which="forward", b1x1=(20.0, 16.0)))[1]
    assert lines[-1] == ["forward", "break-even", "", "above 90%"]


def test_the_table_of_a_model_adds_its_layers_up_as_often_as_they_occur():
    """Of the second layer 1x1 was not raced: it stays dense in the sum."""
    found = [*rows("a", 3, b1x1=(4.0, 2.0), b32x32=(16.0, 4.0)), *rows("b", b32x32=(8.0, 8.0))]
    heading, lines = model_cells(found)
    assert heading == ["layer", "sparsity", "dense ms", "1x1", "32x32"]
    assert lines[:2] == [["a", "0.5", "8", "2.00x", "0.50x slower"], ["a", "0.9", "8", "4.00x", "2.00x"]]
    assert lines[2] == ["b", "0.5", "8", "-", "1.00x"]
    assert lines[4] == ["all layers", "0.5", "32", "1.60x", "0.57x slower"]  # 32 / (3 * 4 + 8); 32 / (3 * 16 + 8)


def test_numbers_as_text():
    assert [ratio(r) for r in (0.999, 1.0, 9.99, 12.34)] == ["0.99x slower", "1.00x", "9.99x", "12.3x"]
    assert [milliseconds(ms) for ms in (0.01234, 1.5, 99.9, 123.4)] == ["0.0123", "1.5", "99.9", "123"]
