import pytest

from sparsekern.lab.report.tables import count, printable
from sparsekern.lab.tasks import ACCURACY, metric_of

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


def test_one_thread_is_not_threads():
    assert [count(n, "thread") for n in (1, 2, 1000)] == ["1 thread", "2 threads", "1,000 threads"]


def test_a_metric_has_its_words_and_unit():
    assert metric_of({"loss": 1.0, "test_accuracy": 0.5}) is ACCURACY
    assert (ACCURACY.title, ACCURACY.label) == ("test accuracy", "test accuracy (%)")
    assert (ACCURACY.text(0.97766), ACCURACY.text(0.97766, 1)) == ("97.77 %", "97.8 %")
