import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import summary
from sparsekern.lab import Config
from sparsekern.lab.history import History
from sparsekern.lab.report import page as module
from sparsekern.lab.report.page import (
    MARK,
    command_of,
    page_contents,
    page_values,
    render,
    results_so_far,
)
from sparsekern.lab.store import Record

DOT = "data:image/png;base64,AAAA"

CONFIG = Config(width=32, block_size=8, epochs=2, seeds=2, device="cpu", sparsity=0.75).resolved(100)


def row(network, seed, epoch):
    numbers = {"test_accuracy": 0.4 + 0.1 * epoch, "loss": 1 / epoch, "ms_per_step": 2.0 + (network == "dense")}
    numbers |= {"seconds": 1.0, "network": network, "seed": seed, "epoch": epoch}
    if network == "sparse":
        numbers |= {f"{key}/{name}": 0.5 for key in ("churn", "itop", "kept", "sparsity") for name in ("0", "2")}
        numbers |= {"itop/global": 0.5, "sparsity/global": 0.75}
    return numbers


ROWS = [row(network, seed, epoch) for seed in (0, 1) for epoch in (1, 2) for network in ("sparse", "dense")]
SIZES = {
    "sparse": {"network_sparsity": 0.7, "stored_parameters": 10, "training_bytes": 40},
    "dense": {"network_sparsity": 0.0, "stored_parameters": 40, "training_bytes": 80},
}


def trained(layer=None, block=8):
    model = nn.Sequential(layer or nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    sk.sparsify_(model, 0.75, block, targets="0")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer, update_every=1, drop_fraction=0.5)
    history = History(method)
    for _ in range(3):
        optimizer.step()
        method.step()
        history.step()
    return model, history.state_dict()


def record(**changes):
    data = {"name": "digits <&>", "train_images": 100, "test_images": 10, "sha256": "sha <1>"}
    whole = Record(
        Path("run"),
        CONFIG,
        data,
        {"device": "a CPU", "threads": 1, "kernels": "eager"},
        ROWS,
        None,
        None,
        trained()[1],
        [],
    )
    return replace(whole, **changes)


class Checker(HTMLParser):
    """Checks that elements are closed in order, and notes what is there."""

    def __init__(self, page):
        super().__init__()
        self.page, self.open, self.addresses, self.classes = page, [], [], set()
        self.pieces = {"style": "", "script": "", "text": ""}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href", "data-src") if key in values]
        self.classes |= set((values.get("class") or "").split())
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        kind = self.open[-1] if self.open and self.open[-1] in self.pieces else "text"
        self.pieces[kind] += f"{data} "

    @property
    def text(self):
        return " ".join(self.pieces["text"].split())


@pytest.fixture(scope="module")
def contents():
    """What the page of a run shows; the layers are said to have been timed."""
    model, history = trained()
    run = record(history=history, missing=["no <history>"])
    account = replace(summary(model), milliseconds={"0": (1.25, 200.0)})
    return page_contents(run, results_so_far(run, SIZES), account, "measured on a <machine>")


@pytest.fixture
def read(contents):
    """Returns a function that renders the page with changes, and reads it."""

    def read_page(**changes):
        checker = Checker(render(contents | changes))
        assert checker.open == []
        return checker

    return read_page


def test_the_page_of_a_run(read, contents):
    page = read()
    assert page.page.startswith(MARK)
    for words in (
        "digits <&>: MLP of width 32, hidden layers 75 % sparse (blocks of 8 x 8; set) beside its dense twin",
        "Not finished: 2 seeds, 2 epochs each; seed 2 has done epoch 2.",
        "The sparse network reaches a test accuracy of 60.00 %, its dense twin 60.00 %. It stores 4.00 times fewer "
        "numbers (70.0 % of all weights are absent), needs 2.00 times less memory to train, and a training step is "
        "1.50 times faster.",
        "What this page cannot show no <history>",
        "stored parameters 10 40 4.00x fewer",
        "ratio: time of a sparse step",
        "Accuracy is measured on test data that no training step has seen; higher is better.",
        "A cell is a block of 8 x 8 weights; down: output features, across: input features; 4 x 4 places for blocks.",
        "before training, epoch 0.0: 4 blocks, 100 % of them where blocks were at the start",
        "after update 3, step 3, epoch 1.5: 4 blocks, ",
        "start update 1, epoch 0.5 update 2, epoch 1.0 update 3, epoch 1.5 (so far)",
        "Churn is the share",
        "ITOP",
        "0 SparseLinear 32 x 32 4 of 16 (8 x 8) 75.0 %",
        "1.25 200",
        "2 Linear 32 x 32 dense 0.0 % 8",
        "values 0.000977 MiB gradient 0.000977 MiB optimizer 0 MiB index ",
        "dense 0.00781 MiB",
        "measured on a <machine>",
        "sparsekern train --recipe mlp --sparsity 0.75 --block-size 8",
        "data — data_max_gib",
        "sha <1>",
        "device a CPU",
    ):
        assert words in page.text, words
    assert len(contents["charts"]) == 2 and len(contents["moves"]) == 3 and "median" not in contents["moves"][0]
    assert page.page.count("<svg") == 5 and "options" not in contents["settings"]["Configuration"]


def test_text_from_elsewhere_is_neither_markup_nor_controls(read, contents):
    hostile = '\udc80<script>\x1b"'
    films = [contents["films"][0] | {"layer": hostile, "frames": [(hostile, hostile, DOT)], "thumbnails": []}]
    films.append(films[0] | {"thumbnails": [(hostile, hostile, DOT)]})
    page = read(title=hostile, notes=[(hostile, hostile)], films=films, command=hostile).page
    assert page.count(r"\udc80&lt;script&gt;\x1b&#34;") == 13 and page.count("<script>") == 1
    page.encode()  # half a character cannot be


def test_a_browser_loads_nothing_else(read):
    page = read()
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "default-src 'none'" in page.page
    assert not re.search(r"(?<!xmlns=.)(?<!xmlns:xlink=.)https?://|@import|url\((?!#)", page.page)


def test_thumbnails_stand_for_the_film(read, contents):
    film = contents["films"][0]
    assert (film["layer"], film["width"], film["height"]) == ("0", 4, 4) and film["thumbnails"] == film["frames"]
    frames = [(f"caption {i}", f"short {i}", DOT + str(i)) for i in range(9)]
    page = read(films=[film | {"frames": frames, "thumbnails": frames[::2]}])
    assert page.addresses == [f"{DOT}{i}" for i in (8, 0, 2, 4, 6, 8, *range(9))]
    assert re.findall(r"short \d", page.text) == [f"short {i}" for i in (0, 2, 4, 6, 8)]
    assert re.search(r'max="8"\s+value="8"', page.page)


def test_a_map_has_a_whole_number_of_pixels_a_cell(read, contents):
    def sizes(width, height):
        page = read(films=[contents["films"][0] | {"width": width, "height": height}]).page
        return set(re.findall(r'width="\d+" height="\d+"', page))

    assert sizes(4, 2) == {'width="460" height="230"', 'width="132" height="66"'}
    assert sizes(700, 10) == {'width="700" height="10"'}


def test_bars_are_in_proportion(read):
    page = read(memory=({"values": 3 * 2**20, "index": 2**20}, 8 * 2**20)).page
    assert page.count('class="bar sparse"') == 2 and page.count('class="bar dense"') == 3, "a dense layer has one bar"
    for percent in ("75.00", "0.62", "37.50", "12.50", "100.00"):
        assert f"width:{percent}%" in page, percent
    assert "3 MiB" in page and "8 MiB" in page and "4 MiB" in page
    assert "width:50.00%" in read(layers=None, memory=({"values": 3.0}, 1.5)).page, "the sparse ones are larger"
    assert "width:0.00%" in read(layers=None, memory=({"values": 0.0}, 0.0)).page


def test_small_memory_is_in_kib(read, contents):
    assert "memory, KiB" in read().page
    large = [(layer, (2**20, 2**21), times) for layer, _, times in contents["layers"]]
    assert "memory, MiB" in read(layers=large).page


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("missing", "cannot show"),
        ("table", "training state"),
        ("charts", "Learning"),
        ("films", "move the slider"),
        ("moves", "Churn"),
        ("layers", "Layer by layer"),
        ("memory", "Memory of the sparse layers"),
    ],
)
def test_what_is_not_there_is_left_out(read, part, words):
    assert words.lower() in read().text.lower()
    assert words.lower() not in read(**{part: None}).text.lower()


def test_what_was_not_compared_or_timed_is_not_spoken_of(read, contents):
    assert "no twin" not in read().text and "time, ms" in read().text
    assert "no twin" in read(table=(["", "sparse"], [["test accuracy", "97 %"]])).text
    page = read(layers=[(layer, size, None) for layer, size, _ in contents["layers"]]).text
    assert "time, ms" not in page and "measured on a <machine>" not in page


def test_every_rule_of_the_style_is_about_something_in_the_page(read):
    page = read()
    style, script = page.pieces["style"], page.pieces["script"]
    named = set(re.findall(r"\.([a-z]+)", re.sub(r"\{.*?\}", "", style, flags=re.DOTALL)))
    assert named and named - page.classes == set()
    assert style.count("{") == style.count("}") and script.count("{") == script.count("}")


PLAYED = """
const events = {}, ticks = [];
const element = (more) => ({addEventListener: (name, f) => { events[name] = f; }, ...more});
const frames = [0, 1, 2].map(i => ({dataset: {src: "image" + i}, textContent: "caption " + i}));
const image = element({}), slider = element({value: "2"}), button = element({}), caption = element({});
const parts = {img: image, input: slider, button, ".caption": caption};
const player = {hidden: true, querySelector: name => parts[name]};
const film = {querySelectorAll: () => frames, querySelector: () => player};
const document = {querySelectorAll: () => [film]};
const setInterval = f => { ticks.push(f); return ticks.length; }, clearInterval = () => {};
SCRIPT
const seen = [[player.hidden, image.src, caption.textContent]];
slider.value = "1"; events.input(); seen.push([image.src, caption.textContent]);
slider.value = "2"; events.click(); seen.push(image.src);
for (let i = 0; i < 3; i++) { ticks.at(-1)(); seen.push(image.src); }
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the script with")
def test_the_slider_and_the_button_move_the_film(read):
    code = PLAYED.replace("SCRIPT", read().pieces["script"])
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        '[[false,"image2","caption 2"],["image1","caption 1"],"image0","image1","image2","image2"]'
    )


def test_the_page_of_a_finished_run():
    done = results_so_far(record(), SIZES)
    page = page_contents(record(results=done), done, None, "")
    assert page["status"] == "Finished: 2 seeds, 2 epochs each."
    assert page["films"][0]["frames"][-1][1] == "update 3, epoch 1.5 (the last one)"
    assert results_so_far(record(results=done), None) is done


def test_results_of_some_seeds_are_called_so():
    results = results_so_far(record(rows=ROWS[:4]), SIZES)
    assert results["config"]["seeds"] == 1 and results["networks"]["sparse"]["test_accuracy"]["by_seed"] == [
        pytest.approx(0.6)
    ]
    assert results_so_far(record(rows=ROWS[:1]), SIZES) is None, "the twin has not done the epoch"
    assert results_so_far(record(), None) is None


def test_a_run_that_has_done_nothing():
    page = page_contents(record(rows=[], history=None), None, None, "")
    assert (page["charts"], page["films"], page["moves"], page["layers"], page["memory"]) == ([], [], [], [], None)
    assert page["status"] == "Not finished: 2 seeds, 2 epochs each; no epoch is done."
    assert page["summary"] == "No epoch is finished yet." and page["table"] is None and render(page)


def test_a_run_without_a_sparse_network():
    config = replace(CONFIG, sparse=False)
    rows = [r for r in ROWS if r["network"] == "dense"]
    alone = record(config=config, rows=rows, history=None)
    results = results_so_far(alone, {"dense": SIZES["dense"]})
    page = page_contents(alone, results, None, "")
    assert page["title"] == "digits <&>: MLP of width 32, dense"
    assert page["summary"] == "The dense network reaches a test accuracy of 60.00 % and stores 40 numbers."
    assert page["moves"] == [] and len(page["charts"]) == 2


def test_a_network_that_is_slower_and_larger():
    results = results_so_far(record(), {"sparse": SIZES["dense"], "dense": SIZES["sparse"]})
    results["comparison"]["time_sparse_over_dense"]["median"] = 2.0
    sentence = page_contents(record(), results, None, "")["summary"]
    assert (
        "4.00 times more numbers (0.0 % of all weights are absent), needs 2.00 times more memory to train, and a "
        "training step is 2.00 times slower."
    ) in sentence
    results["comparison"]["time_sparse_over_dense"] = dict.fromkeys(("median", "low", "high", "highest"))
    assert page_contents(record(), results, None, "")["summary"].endswith("more memory to train.")


def test_what_a_cell_is():
    def about(layer, block, **changes):
        return page_contents(record(history=trained(layer, block)[1], **changes), None, None, "")["films"][0]["about"]

    conv = about(nn.Conv2d(8, 8, 3, groups=2), 4)
    assert "3 x 3 panels, one for each place of the kernel; in each panel, down: output channels" in conv
    assert "the 2 groups lie below each other" in conv and "2 x 9 places" in conv
    assert "A cell is a single weight;" in about(nn.Linear(16, 16), 1)
    assert "A cell is a tile of 2 x 2 places, each for a single weight;" in about(nn.Linear(200, 200), 1)
    candidates = replace(CONFIG, method="vrpge", update_every=1)
    assert "candidates" in about(nn.Linear(32, 32), 8, config=candidates)


def test_films_are_thinned_out_until_they_fit(monkeypatch):
    whole = page_contents(record(), None, None, "")["films"][0]["frames"]
    monkeypatch.setattr(module, "FILM_BYTES", 1)
    few = page_contents(record(), None, None, "")["films"][0]["frames"]
    assert few == [whole[0], whole[-1]]


@pytest.mark.parametrize(
    ("options", "command"),
    [
        ({}, "sparsekern train --recipe mlp"),
        ({"data": "/a b", "dense": False}, "sparsekern train --recipe mlp --data '/a b' --no-dense"),
        (
            {"method": "set", "options": {"drop_fraction": 0.5, "keep_connected": True}, "rate": 0.01},
            "sparsekern train --recipe mlp --rate 0.01 --drop-fraction 0.5 --keep-connected",
        ),
        ({"recipe": "resnet20", "epochs": 3}, "sparsekern train --recipe resnet20 --epochs 3"),
    ],
)
def test_the_command_that_trains_the_same(options, command):
    assert command_of(Config(**options)) == command


def test_plain_values():
    model, _ = trained()
    values = page_values(record(), None, summary(model))
    assert (values["finished"], values["rows"], values["missing"]) == (False, ROWS, [])
    assert values["layers"][0]["blocks"] == 4 and values["layers"][0]["milliseconds"] is None
    assert [frame["update"] for frame in values["topology"]] == [0, 1, 2, 3]
    assert page_values(record(history=None), None, None)["layers"] == []
