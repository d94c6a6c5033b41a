import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.lab.config import Config
from sparsekern.lab.history import _packed
from sparsekern.lab.report.charts import DROPPED, EMPTY, GROWN, KEPT
from sparsekern.lab.report.pictures import GRAPHS, NAMED, draw_comparison, draw_graphs, draw_summary, run_title

ROOT = Path(__file__).parent.parent.parent.parent


def film(layer="hidden1", rows=2, cols=3, kernel=None, start=(0, 5), end=(1, 5), tile=1):
    """What a run keeps of the blocks of a layer, ``tile`` pixels each way for its places."""

    def image(keys):
        cells = torch.zeros(rows * cols, dtype=torch.uint8)
        cells[list(keys)] = 255
        return cells.view(rows, cols)[::tile, ::tile].contiguous()

    kept = set(start) & set(end)
    frames = [(start, start), (end, kept)]
    about = {"shape": tuple(image(()).shape), "tile": tile, "rows": rows, "cols": cols, "kernel": kernel}
    return {
        "layers": {layer: about | {"groups": 1, "block": (16, 16)}},
        "start": {layer: _packed(image(start))},
        "frames": [
            {
                "step": 9 * i,
                "update": i,
                "images": {layer: _packed(torch.stack([image(now), image(stay)]))},
                "blocks": {layer: (len(now), len(stay))},
            }
            for i, (now, stay) in enumerate(frames)
        ],
    }


def draw(path, *, seeds=2, epochs=3, dense=True, **where):
    networks = {"sparse": (0.9751, 12345), "dense": (0.9812, 1234567)}
    shown = {
        name: {"test_accuracy": {"mean": mean}, "stored_parameters": parameters}
        for name, (mean, parameters) in networks.items()
        if dense or name == "sparse"
    }
    rows = [
        {"network": name, "seed": seed, "epoch": epoch, "test_accuracy": 0.1 * epoch + 0.01 * seed, "loss": 1 / epoch}
        for seed in range(seeds)
        for epoch in range(1, epochs + 1)
        for name in shown
    ]
    config = Config(epochs=epochs, dense=dense)
    draw_summary(path, config, {"data": {"name": "digits"}, "networks": shown}, rows, film(**where))
    return path.read_text() if path.suffix == ".svg" else ""


def test_the_picture_explains_itself(tmp_path):
    text = draw(tmp_path / "x.svg")
    for said in (
        ">digits: MLP of width 2048, hidden layers 90 % sparse (blocks of 16 x 16; set) beside its dense twin<",
        ">test accuracy after 3 epochs: sparse 97.5 %, dense 98.1 %;  stored parameters: 12,345 against 1,234,567<",
        ">90 % sparse<",
        ">dense twin<",
        "test accuracy (%): mean and range of 2 seeds",
        "training loss",
        ">epoch<",
        "input block",
        "output block",
        "layer hidden1 of seed 0 at the start",
        "layer hidden1 of seed 0 at the end",
        "2 of 6 blocks, 33.3 %",
        "stays (1)",
        "kept from the start (1)",
        "dropped later (1)",
        "grown since (1)",
    ):
        assert said in text, said


def test_the_title_of_a_run():
    assert run_title(Config(recipe="wrn-28-4"), "x").startswith("x: WRN-28-4, hidden")
    assert run_title(Config(sparse=False), "x") == "x: MLP of width 2048, dense"


@pytest.mark.parametrize(("epochs", "dense"), [(1, False), (4, True)])
def test_few_numbers(tmp_path, epochs, dense):
    text = draw(tmp_path / "x.svg", seeds=1, epochs=epochs, dense=dense)
    assert "range of" not in text and ("dense" in text) == dense


def test_a_long_name_takes_two_lines(tmp_path):
    text = draw(tmp_path / "x.svg", layer="layers.0.attention.qkv")
    assert ">layer layers.0.attention.qkv of seed<" in text and ">0 at the start<" in text


def test_blocks_that_stay_are_not_called_grown(tmp_path):
    text = draw(tmp_path / "x.svg", end=(0, 5))
    assert "grown" not in text and "stays (2)" in text


def colours(call):
    """A letter a pixel of an image: of no block, one that is kept, dropped or grown; a space between panels."""
    letters = {tuple(bytes.fromhex(c[1:])): n for c, n in zip((EMPTY, KEPT, DROPPED, GROWN), "EKDG", strict=True)}
    return ["".join(letters.get(tuple(pixel), " ") for pixel in row) for row in call[0].tolist()]


def test_tiles_are_drawn_in_the_places_of_their_blocks(tmp_path):
    text = draw(tmp_path / "x.svg", rows=4, cols=4, start=(0,), end=(2,), tile=2)
    assert ">3<" in text and "1 of 16 blocks" in text


def test_the_taps_of_a_convolution_are_panels_in_the_shape_of_the_kernel(calls, tmp_path):
    images = calls("imshow")
    # 2 block rows, 2 x 2 taps of 2 block columns each: key = row * 8 + tap * 2 + column
    start, end = (0, 3, 12), (0, 3, 15)  # (row 0, tap 0, 0), (row 0, tap 1, 1), then (row 1, tap 2, 0) or (.., 3, 1)
    text = draw(tmp_path / "x.svg", cols=8, start=start, end=end, kernel=(2, 2))
    before, after = map(colours, images)
    assert before == ["KE EK", "EE EE", "     ", "EE EE", "DE EE"]
    assert after == [*before[:3], "EE EE", "EE EG"]
    for said in (
        ">column of the 2 x 2 kernel; in each of its 4 panels,<",
        "input block (of 16 channels)",
        "output block",
    ):
        assert said in text


def test_a_pointwise_convolution_is_drawn_as_one_panel(calls, tmp_path):
    images = calls("imshow")
    text = draw(tmp_path / "x.svg", start=(0,), end=(5,), kernel=(1, 1))
    assert list(map(colours, images)) == [["DEE", "EEE"], ["EEE", "EEG"]]
    assert ">input block (of 16 channels)<" in text and "kernel" not in text


def test_pyplot_and_its_global_state_are_not_needed(tmp_path):
    """In a process of its own; the picture is a PNG."""
    code = (
        "import sys; from pathlib import Path; from tests.lab.report.test_pictures import draw;"
        f"draw(Path({str(tmp_path / 'x.png')!r})); print('matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def graphs(path, *records):
    """Draw spectral measures from ``(step, values by layer)``; what is a dictionary already is one record."""
    layers = [
        {
            "step": step,
            "layers": {
                f"layer{i}": v if isinstance(v, dict) else dict.fromkeys(GRAPHS, v) for i, v in enumerate(values)
            },
        }
        for step, *values in records
    ]
    rows = [{"seed": 0, "spectral": layers}, {"seed": 1, "spectral": [None]}, {"seed": 0}]
    draw_graphs(path, Config(), {"data": {"name": "digits"}}, rows)
    return path.read_text()


@pytest.mark.parametrize("records", [[(1, 0.5)], [(1, 0.5, None), (9, -0.5, None)]])
def test_spectral_measures_are_drawn(tmp_path, records):
    text = graphs(tmp_path / "a.svg", *records)
    assert text.count(">digits: MLP of width 2048, 90 % sparse (set), block graphs of seed 0<") == 1
    assert all(f">{said}<" in text for words in GRAPHS.values() for said in words)
    assert ">layer0<" in text and ">layer1<" not in text


def test_only_measures_that_are_defined_have_a_panel(tmp_path):
    text = graphs(tmp_path / "a.svg", (1, dict.fromkeys(GRAPHS) | {"ramanujan_gap": 0.5}))
    assert [title for title, _ in GRAPHS.values() if f">{title}<" in text] == ["Ramanujan gap"]
    assert "No measure is defined: fewer than three blocks" in graphs(tmp_path / "b.svg", (1, None))


def test_many_layers_are_told_by_their_shade(tmp_path):
    text = graphs(tmp_path / "a.svg", (1, *[0.5] * (NAMED + 1)))
    assert f"{NAMED + 1} layers, the first ones dark" in text and ">layer3<" not in text


def test_a_run_without_spectral_measures_has_no_such_picture(tmp_path):
    draw_graphs(tmp_path / "a.svg", Config(), {}, [{"seed": 0}])
    assert not (tmp_path / "a.svg").exists()


def compared(method, sparsity=None, block_size=None, accuracy=0.8, deviation=0.01):
    numbers = {"mean": accuracy, "standard_deviation": deviation}
    row = {"method": method, "sparsity": sparsity, "block_size": block_size, "test_accuracy": numbers}
    return row | {"network_sparsity": sparsity or 0.0}


ROWS = [compared("dense", accuracy=0.9)] + [
    compared(method, sparsity, block)
    for block in (1, 16)
    for sparsity in (0.9, 0.95)
    for method in ("static", "gse, scope global")
]


def test_the_picture_of_a_comparison(tmp_path, calls):
    drawn = calls("errorbar")
    draw_comparison(tmp_path / "x.svg", "a title", ROWS)
    text = (tmp_path / "x.svg").read_text()
    for said in ("a title", "blocks of 1 x 1", "blocks of 16 x 16", "90 %", "95 %", "static", "gse, scope global"):
        assert f">{said}<" in text
    assert text.count(">dense<") == 1, "the legend names each once"
    assert [(y, deviation) for _, y, deviation in drawn] == [([80, 80], [1, 1])] * 4


@pytest.mark.parametrize(
    ("rows", "several"),
    [(ROWS[:1], True), ([compared("set", 0.9, 16, deviation=None)], False), ([compared("set", 0.9, 16)], True)],
)
def test_the_axis_speaks_of_seeds_where_there_are_several(tmp_path, rows, several):
    draw_comparison(tmp_path / "x.svg", "", rows)
    assert ("test accuracy (%): mean and deviation over seeds" in (tmp_path / "x.svg").read_text()) == several


def test_a_run_that_failed_leaves_its_place_empty(tmp_path, calls):
    drawn = calls("errorbar")
    draw_comparison(tmp_path / "x.svg", "", [ROWS[5], ROWS[7], compared("set", 0.95, 16)])
    assert [[round(x) for x in places] for places, *_ in drawn] == [[0, 1], [1]]
