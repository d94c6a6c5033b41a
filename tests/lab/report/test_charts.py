import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from sparsekern.lab.report.charts import (
    FEW,
    curve_chart,
    curves_of,
    draw_curves,
    layer_chart,
    save_figure,
    scale_by_factors,
)
from sparsekern.lab.report.tables import printable


def words(svg):
    ElementTree.fromstring(svg)
    return re.findall(r"<text[^>]*>(?:<tspan[^>]*>)?([^<]+)<", svg)


def test_the_curves_of_networks():
    svg = curve_chart({"sparse": [[1, 2, 3], [2, 3]], "dense": [[3, 4, 5]]}, "loss")
    assert {"sparse", "dense", "epoch", "loss: mean and range of 2 seeds"} <= set(words(svg))
    assert "data-width" in svg and not re.search(r'<svg[^>]* width="', svg), "the page gives the size"
    assert "metadata" not in svg


def test_the_numbers_of_a_run_by_network_and_seed():
    rows = [
        {"network": network, "seed": seed, "epoch": epoch, "x": 0.1 * epoch + 0.01 * seed}
        for seed in (0, 1)
        for epoch in (1, 2)
        for network in ("sparse", "dense")
    ]
    curves = curves_of(rows[:-1], {"sparse": "90 % sparse", "dense": "dense twin"}, "x", 100)
    assert curves["90 % sparse"] == [pytest.approx([10, 20]), pytest.approx([11, 21])]
    assert list(map(len, curves["dense twin"])) == [2, 1]
    assert curves_of(rows[:1], {"sparse": "a", "dense": "b"}, "x").keys() == {"a"}


def test_seeds_of_unequal_length_are_averaged_where_they_are(calls):
    drawn = calls("plot")
    curve_chart({"sparse": [[1.0, 2.0, 3.0], [3.0, 4.0]]}, "loss")
    assert [list(y) for _, y in drawn] == [[2.0, 3.0, 3.0]]


@pytest.mark.parametrize("log", [True, False])
def test_one_epoch_is_a_dot(log):
    assert "epoch" in words(curve_chart({"sparse": [[1.0]]}, "loss", log=log))


def test_a_few_layers_have_a_line_and_a_name_each():
    svg = layer_chart({"a": [1, 2], "<b>": [1, 2]}, "churn")
    assert {"a", "&lt;b&gt;", "churn", "%", "epoch"} <= set(words(svg))


def test_many_layers_have_a_median(calls):
    drawn = calls("plot")
    lines = {str(i): [float(i), float(-i)] for i in range(FEW + 1)}
    assert f"median of {FEW + 1} layers" in words(layer_chart(lines, "ITOP"))
    assert len(drawn) == FEW + 2 and list(drawn[-1][1]) == [FEW / 2, -FEW / 2]


def test_the_same_chart_is_the_same_text():
    assert layer_chart({"a": [1, 2]}, "churn") == layer_chart({"a": [1, 2]}, "churn")


@pytest.mark.parametrize(("line", "top"), [([70.0, 70.0], 75.6), ([0.0, 0.0], 1.0)])
def test_a_level_line_does_not_lie_on_the_frame(calls, line, top):
    limits = calls("set_ylim")
    layer_chart({"a": line}, "kept")
    assert limits[-1] == (0, pytest.approx(top))


def test_a_scale_of_factors_has_plain_numbers_that_do_not_crowd():
    def labels(low, high):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([low, high])
        scale_by_factors(axes)
        figure.canvas.draw()
        return [text.get_text() for text in axes.get_yticklabels(which="both") if text.get_text()]

    assert {"1.6", "2"} <= set(labels(1.55, 2.3)) and {"0.001", "100"} <= set(labels(0.001, 100))
    assert len(labels(0.001, 100)) < 10


def test_the_names_stand_where_no_line_is():
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, {"sparse": [[20.0, 28.0]], "dense": [[50.0, 80.0]]}, "test accuracy (%)")
    figure.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        along = [points[0] + share / 50 * (points[1] - points[0]) for share in range(51)]
        assert not any(box.contains(*point) for point in along)


@pytest.mark.parametrize("name", [r"$\frac{1}{$.npz", "$x^2$", "100 $", r"\$_{", "\x1b[2J\udc80", "a\x00b"])
def test_a_figure_draws_text_as_it_is_written(tmp_path, name):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], label=name)
    axes.set_title(name)
    axes.legend()
    figure.suptitle(name)
    save_figure(figure, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count(f">{printable(name)}<") == 3
