import subprocess
import sys
from pathlib import Path

import pytest

from sparsekern.report.plots import BlockMap, Curves, draw_training

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


def test_a_long_name_takes_two_lines(tmp_path):
    draw(tmp_path / "x.svg", layer="layers.0.attention.qkv of seed 0")
    content = (tmp_path / "x.svg").read_text()
    assert ">layer layers.0.attention.qkv of seed<" in content and ">0 at the start<" in content


def test_blocks_that_stay_are_not_called_grown(tmp_path):
    draw(tmp_path / "x.svg", end=(0, 5))
    assert "grown" not in (tmp_path / "x.svg").read_text() and "stays (2)" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(("seeds", "epochs", "labels"), [(1, 1, ("sparse",)), (1, 4, ("sparse", "dense"))])
def test_few_numbers(tmp_path, seeds, epochs, labels):
    draw(tmp_path / "x.svg", seeds=seeds, epochs=epochs, labels=labels)
    assert "range of" not in (tmp_path / "x.svg").read_text()


def test_a_png(tmp_path):
    draw(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_pyplot_and_its_global_state_are_not_needed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sparsekern.report.plots import *;"
        "c = [Curves('a', [[1.0, 2.0]])];"
        f"draw_training(Path({str(tmp_path / 'x.png')!r}), title='', subtitle='', accuracy=c, loss=c,"
        " block_map=BlockMap('l', 1, 1, 1, [0], [0])); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
