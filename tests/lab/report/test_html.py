import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from sparsekern.lab.report.html import MARK, BlockFilm, LayerRow, Page, render

DOT = "data:image/png;base64,AAAA"

PAGE = Page(
    title="digits <&> MLP",
    status="Finished: 2 seeds.",
    summary="It learnt.",
    table=(["", "sparse", "dense", "against"], [["test accuracy", "97 %", "98 %", "-1 points"]]),
    notes=["time  on a <machine>"],
    charts=["<svg>curve</svg>"],
    films=[
        BlockFilm("a/<layer>", "what a cell is", 4, 2, [(f"caption {i}", f"short {i}", DOT + str(i)) for i in range(9)])
    ],
    moves=["<svg>churn</svg>"],
    layers=[
        LayerRow("0", "SparseLinear", "8 x 8", "2 of 4 (4 x 4)", 0.5, (0.5, 1.0), (1.25, 200.0)),
        LayerRow("1", "Linear", "8 x 8", "dense", 0.0, (1.0, 1.0), None),
    ],
    memory=({"values": 0.25, "index": 0.25}, 1.0),
    measured="measured on a CPU",
    command="sparsekern train --out 'a b'",
    settings={"Configuration": {"rate": 0.1, "data": None}},
)


class Checker(HTMLParser):
    """Checks that elements are closed in order, and notes what is there."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.classes, self.text = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href", "data-src") if key in values]
        self.classes |= set((values.get("class") or "").split())
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read(page):
    checker = Checker()
    checker.feed(render(page))
    assert checker.open == []
    return checker, " ".join(" ".join(checker.text).split())


def test_everything_is_said_and_escaped():
    _, text = read(PAGE)
    for words in (
        "digits <&> MLP",
        "It learnt.",
        "97 %",
        "time on a <machine>",
        "a/<layer>",
        "caption 8",
        "2 of 4 (4 x 4)",
        "1.25",
        "200",
        "values 0.25 MiB",
        "measured on a CPU",
        "sparsekern train --out 'a b'",
        "rate 0.1 data —",
        "Churn",
        "ITOP",
    ):
        assert words in text, words
    assert render(PAGE).startswith(MARK)


def test_a_browser_loads_nothing_else():
    checker, _ = read(PAGE)
    assert checker.addresses and all(address.startswith("data:image/png;base64,") for address in checker.addresses)
    page = render(PAGE)
    assert "default-src 'none'" in page and not re.search(r"https?://|@import|url\(", page)


def test_five_thumbnails_stand_for_the_film_from_start_to_end():
    checker, text = read(PAGE)
    assert [a for a in checker.addresses if a.endswith(("0", "2", "4", "6", "8"))][1:6] == [
        f"{DOT}{i}" for i in (0, 2, 4, 6, 8)
    ]
    assert [w for w in re.findall(r"short \d", text)] == [f"short {i}" for i in (0, 2, 4, 6, 8)]
    assert 'max="8" value="8"' in render(PAGE)


def test_a_map_has_a_whole_number_of_pixels_a_cell():
    assert 'width="460" height="230"' in render(PAGE) and 'width="132" height="66"' in render(PAGE)
    large = replace(PAGE, films=[BlockFilm("x", "", 700, 10, [("", "", DOT)])])
    assert 'width="700" height="10"' in render(large)


def test_small_memory_is_in_kib():
    layers = [replace(layer, mebibytes=(0.25, 0.5)) for layer in PAGE.layers]
    assert "memory, KiB" in render(replace(PAGE, layers=layers)) and "256" in render(replace(PAGE, layers=layers))


def test_a_dense_layer_has_one_bar():
    page = render(PAGE)
    assert page.count('class="bar sparse"') == 2 and page.count('class="bar dense"') == 3


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("table", "training state"),
        ("charts", "Learning"),
        ("films", "move the slider"),
        ("moves", "Churn"),
        ("layers", "Layer by layer"),
        ("memory", "Memory of the sparse layers"),
    ],
)
def test_what_is_not_there_is_left_out(part, words):
    assert words.lower() in read(PAGE)[1].lower()
    empty = None if part in ("table", "memory") else []
    assert words.lower() not in read(replace(PAGE, **{part: empty}))[1].lower()


def test_a_run_without_a_twin_does_not_speak_of_one():
    alone = replace(PAGE, table=(["", "sparse"], [["test accuracy", "97 %"]]))
    assert "no twin" in read(alone)[1] and "no twin" not in read(PAGE)[1]


def test_layers_that_were_not_timed_have_no_column_for_it():
    page = render(replace(PAGE, layers=[replace(layer, milliseconds=None) for layer in PAGE.layers]))
    assert "time, ms" not in page and "measured on a CPU" not in page


def test_what_is_missing_is_said():
    assert "cannot show" in read(replace(PAGE, missing=["no <history>"]))[1]
    assert "no <history>" in read(replace(PAGE, missing=["no <history>"]))[1] and "cannot show" not in read(PAGE)[1]
