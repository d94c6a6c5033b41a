import re
from xml.etree import ElementTree

import pytest

from sparsekern.lab.report.charts import FEW, curve_chart, layer_chart
from sparsekern.lab.report.plots import Curves


def words(svg):
    ElementTree.fromstring(svg)
    return re.findall(r"<text[^>]*>(?:<tspan[^>]*>)?([^<]+)<", svg)


def test_the_curves_of_networks():
    svg = curve_chart([Curves("sparse", [[1, 2, 3], [2, 3]]), Curves("dense", [[3, 4, 5]])], "loss")
    assert {"sparse", "dense", "epoch", "loss: mean and range of 2 seeds"} <= set(words(svg))
    assert "data-width" in svg and not re.search(r'<svg[^>]* width="', svg), "the page gives the size"
    assert "metadata" not in svg


def test_seeds_of_unequal_length_are_averaged_where_they_are(monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: drawn.append(list(y)) or plot(axes, x, y, **how))
    curve_chart([Curves("sparse", [[1.0, 2.0, 3.0], [3.0, 4.0]])], "loss")
    assert drawn == [[2.0, 3.0, 3.0]]


@pytest.mark.parametrize("log", [True, False])
def test_one_epoch_is_a_dot(log):
    assert "epoch" in words(curve_chart([Curves("sparse", [[1.0]])], "loss", log=log))


def test_a_few_layers_have_a_line_and_a_name_each():
    svg = layer_chart({"a": [1, 2], "<b>": [1, 2]}, "churn")
    assert {"a", "&lt;b&gt;", "churn", "%", "epoch"} <= set(words(svg))


def test_many_layers_have_a_median(monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: drawn.append(list(y)) or plot(axes, x, y, **how))
    lines = {str(i): [float(i), float(-i)] for i in range(FEW + 1)}
    assert f"median of {FEW + 1} layers" in words(layer_chart(lines, "ITOP"))
    assert len(drawn) == FEW + 2 and drawn[-1] == [FEW / 2, -FEW / 2]


def test_the_same_chart_is_the_same_text():
    charts = {layer_chart({"a": [1, 2]}, "churn") for _ in range(2)}
    assert len(charts) == 1


@pytest.mark.parametrize(("line", "top"), [([70.0, 70.0], 75.6), ([0.0, 0.0], 1.0)])
def test_a_level_line_does_not_lie_on_the_frame(monkeypatch, line, top):
    from matplotlib.axes import Axes

    limits, set_ylim = [], Axes.set_ylim
    monkeypatch.setattr(Axes, "set_ylim", lambda axes, *at, **how: limits.append(at) or set_ylim(axes, *at, **how))
    layer_chart({"a": line}, "kept")
    assert limits[-1] == (0, pytest.approx(top))
