import pytest

from sparsekern.lab.report.html import render
from sparsekern.lab.report.plots import save_figure
from sparsekern.lab.report.text import escape, printable
from tests.lab.report.test_html import PAGE

CLEARS_THE_SCREEN, FILLS_THE_CLIPBOARD = "\x1b[2J", "\x1b]52;c;aGk=\x07"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer3.0.conv2 \u00d7 5 \u2212 1, 90\u00a0%, \u6f22\u3000\u5b57", None),
        ("two\nlines\tand a tab", None),
        (f"a{CLEARS_THE_SCREEN}b", r"a\x1b[2Jb"),
        (FILLS_THE_CLIPBOARD, r"\x1b]52;c;aGk=\x07"),
        ("\x9b2J\r\x08\x7f\0", r"\x9b2J\r\x08\x7f\x00"),
        ("back\u202ewards\u2028", r"back\u202ewards\u2028"),
        ("half a character \udc80", r"half a character \udc80"),
    ],
)
def test_what_a_terminal_obeys_is_shown_as_its_escape(text, shown):
    assert printable(text) == (text if shown is None else shown)


def test_a_page_has_neither_markup_nor_controls():
    assert escape("<b>&\x1b\udc80") == r"&lt;b&gt;&amp;\x1b\udc80"
    page = render(PAGE.__class__(**{**PAGE.__dict__, "title": "\udc80<script>\x1b"}))
    assert r"\udc80&lt;script&gt;\x1b" in page
    page.encode()  # half a character cannot be


@pytest.mark.parametrize("name", [r"$\frac{1}{$.npz", "$x^2$", "100 $", r"\$_{", "\x1b[2J\udc80", "a\x00b"])
def test_a_figure_draws_text_as_it_is_written(tmp_path, monkeypatch, name):
    import matplotlib
    from matplotlib.figure import Figure

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 2], label=name)
    axes.set_title(name)
    axes.legend()
    figure.suptitle(name)
    save_figure(figure, tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text().count(f">{printable(name)}<") == 3
