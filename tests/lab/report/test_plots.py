import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.lab.report.plots import BlockMap, Curves, draw_curves, draw_training, scale_by_factors

ROOT = Path(__file__).parent.parent.parent


def draw(path, *, seeds=2, epochs=3, end=(1, 5), labels=("sparse", "dense"), layer="hidden1"):
    numbers = [[seed + epoch + 1.0 for epoch in range(epochs)] for seed in range(seeds)]
    curves = [Curves(label, numbers) for label in labels]
    block_map = BlockMap(layer, side=16, rows=2, cols=3, start=(0, 5), end=end)
    draw_training(path, title="a title", subtitle="what came out", accuracy=curves, loss=curves, block_map=block_map)


@pytest.fixture(autouse=True)
def _text_stays_text(monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


def test_the_picture_explains_itself(tmp_path):
    draw(tmp_path / "x.svg")
    content = (tmp_path / "x.svg").read_text()
    for text in (
        "a title",
        "what came out",
        ">sparse<",
        ">dense<",
        "test accuracy (%): mean and range of 2 seeds",
        "training loss",
        ">epoch<",
        "input block",
        "output block",
        "layer hidden1 at the start",
        "layer hidden1 at the end",
        "2 of 6 blocks, 33.3 %",
        "stays (1)",
        "kept from the start (1)",
        "dropped later (1)",
        "grown since (1)",
    ):
        assert text in content


def test_a_scale_of_factors_has_plain_numbers_that_do_not_crowd():
    from matplotlib.figure import Figure

    def labels(low, high):
        figure = Figure()
        axes = figure.subplots()
        axes.plot([low, high])
        scale_by_factors(axes)
        figure.canvas.draw()
        return [text.get_text() for text in axes.get_yticklabels(which="both") if text.get_text()]

    assert {"1.6", "2"} <= set(labels(1.55, 2.3)) and {"0.001", "100"} <= set(labels(0.001, 100))
    assert len(labels(0.001, 100)) < 10


def test_a_long_name_takes_two_lines(tmp_path):
    draw(tmp_path / "x.svg", layer="layers.0.attention.qkv of seed 0")
    content = (tmp_path / "x.svg").read_text()
    assert ">layer layers.0.attention.qkv of seed<" in content and ">0 at the start<" in content


def test_blocks_that_stay_are_not_called_grown(tmp_path):
    draw(tmp_path / "x.svg", end=(0, 5))
    assert "grown" not in (tmp_path / "x.svg").read_text() and "stays (2)" in (tmp_path / "x.svg").read_text()


def _drawn(monkeypatch, tmp_path, block_map):
    """Return the two arrays of colours that a block map is drawn as, and the text of the picture."""
    from matplotlib.axes import Axes

    images, show = [], Axes.imshow
    monkeypatch.setattr(Axes, "imshow", lambda axes, image, **how: images.append(image) or show(axes, image, **how))
    curves = [Curves("sparse", [[1.0]])]
    draw_training(tmp_path / "x.svg", title="", subtitle="", accuracy=curves, loss=curves, block_map=block_map)
    return images, (tmp_path / "x.svg").read_text()


def test_the_taps_of_a_convolution_are_panels_in_the_shape_of_the_kernel(monkeypatch, tmp_path):
    # 2 block rows, 2 x 2 taps of 2 block columns each: key = row * 8 + tap * 2 + column
    start, end = (0, 3, 12), (0, 3, 15)  # (row 0, tap 0, 0), (row 0, tap 1, 1), then (row 1, tap 2, 0) or (.., 3, 1)
    block_map = BlockMap("conv", side=16, rows=2, cols=8, start=start, end=end, kernel=(2, 2))
    (before, after), text = _drawn(monkeypatch, tmp_path, block_map)
    assert before.tolist() == [
        [1, 0, 3, 0, 1],
        [0, 0, 3, 0, 0],
        [3, 3, 3, 3, 3],
        [0, 0, 3, 0, 0],
        [2, 0, 3, 0, 0],
    ]
    assert after.tolist()[3:] == [[0, 0, 3, 0, 0], [0, 0, 3, 0, 2]] and (after[:2] == before[:2]).all()
    for said in (
        ">column of the 2 x 2 kernel; in each of its 4 panels,<",
        "input block (of 16 channels)",
        "output block",
    ):
        assert said in text


def test_a_pointwise_convolution_is_drawn_as_one_panel(monkeypatch, tmp_path):
    block_map = BlockMap("conv", side=16, rows=2, cols=3, start=(0,), end=(5,), kernel=(1, 1))
    (before, after), text = _drawn(monkeypatch, tmp_path, block_map)
    assert before.tolist() == [[2, 0, 0], [0, 0, 0]] and after.tolist() == [[0, 0, 0], [0, 0, 2]]
    assert ">input block (of 16 channels)<" in text and "kernel" not in text


@pytest.mark.parametrize(("seeds", "epochs", "labels"), [(1, 1, ("sparse",)), (1, 4, ("sparse", "dense"))])
def test_few_numbers(tmp_path, seeds, epochs, labels):
    draw(tmp_path / "x.svg", seeds=seeds, epochs=epochs, labels=labels)
    assert "range of" not in (tmp_path / "x.svg").read_text()


def test_a_png(tmp_path):
    draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_pyplot_and_its_global_state_are_not_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sparsekern.lab.report.plots import *;"
        "c = [Curves('a', [[1.0, 2.0]])];"
        f"draw_training(Path({str(tmp_path / 'x.png')!r}), title='', subtitle='', accuracy=c, loss=c,"
        " block_map=BlockMap('l', 1, 1, 1, [0], [0])); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_names_stand_where_no_line_is():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    draw_curves(axes, [Curves("sparse", [[20.0, 28.0]]), Curves("dense", [[50.0, 80.0]])], "test accuracy (%)")
    figure.draw_without_rendering()
    box = axes.get_legend().get_window_extent()
    for line in axes.lines:
        points = axes.transData.transform(line.get_xydata())
        along = [points[0] + share / 50 * (points[1] - points[0]) for share in range(51)]
        assert not any(box.contains(*point) for point in along)
