"""Text: how it is found, split and read."""

from __future__ import annotations

import hashlib

import pytest
import torch

from sparsekern.errors import InputError
from sparsekern.lab.language import Piece, Text, load_text


@pytest.fixture
def pieces(tmp_path):
    """Three files, of which the text takes parts: "bcd", "xyz", "1"."""
    for name, content in (("a", b"abcde"), ("b", b"xyz"), ("c", b"12")):
        (tmp_path / name).write_bytes(content)
    return Text([Piece(tmp_path / "a", 1, 3), Piece(tmp_path / "b", 0, 3), Piece(tmp_path / "c", 0, 1)])


WHOLE = b"bcd\0xyz\x001"


def test_every_window_is_that_of_the_whole_text(pieces):
    assert len(pieces) == len(WHOLE)
    for length in range(1, len(WHOLE) + 1):
        for start in range(len(WHOLE) - length + 1):
            assert pieces.read(start, length) == WHOLE[start : start + length], (start, length)


def test_windows_are_tokens(pieces):
    windows = pieces.windows(torch.tensor([0, 5]), 4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(b"bcd\0"), list(b"yz\x001")]


def test_random_windows_come_from_the_seed_and_reach_both_ends(pieces):
    def draw(seed):
        return pieces.windows(pieces.random_starts(100, 3, torch.Generator().manual_seed(seed)), 3)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert {bytes(window.tolist()) for window in draw(0)} == {WHOLE[i : i + 3] for i in range(len(WHOLE) - 2)}


def test_even_windows_do_not_overlap(pieces):
    assert [bytes(w) for w in pieces.even_windows(2, 3).tolist()] == [WHOLE[0:3], WHOLE[4:7]]
    assert len(pieces.even_windows(100, 3)) == 3  # as many as there is room for


def test_a_file_that_shrank_is_refused(pieces):
    pieces.pieces[1].path.write_bytes(b"x")
    with pytest.raises(InputError, match="became shorter while it was read"):
        pieces.read(0, 7)


def test_the_last_tenth_of_a_file_is_held_out(tmp_path):
    content = bytes(range(1, 256)) * 4  # no UTF-8
    (tmp_path / "text.txt").write_bytes(content)
    corpus = load_text(str(tmp_path / "text.txt"))
    assert corpus.train.read(0, len(corpus.train)) + corpus.held_out.read(0, len(corpus.held_out)) == content
    assert len(corpus.held_out) == 102


def test_a_folder_is_split_by_file(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden" * 100)
    (tmp_path / "binary").write_bytes(b"\0" * 100)
    (tmp_path / "empty").write_bytes(b"")
    for number in range(20):
        (tmp_path / ("deeper" if number % 2 else ".") / f"{number}.txt").write_text(f"{number:04}" * 25)
    corpus = load_text(str(tmp_path))
    parts = [{piece.path.name for piece in part.pieces} for part in (corpus.train, corpus.held_out)]
    assert parts[0] | parts[1] == {f"{number}.txt" for number in range(20)}
    assert not parts[0] & parts[1] and len(parts[1]) == 2  # a tenth of the bytes
    described = corpus.describe()
    assert described == load_text(str(tmp_path)).describe()
    (tmp_path / "0.txt").write_text("!" * 100)
    assert described != load_text(str(tmp_path)).describe()


def test_the_digest_is_that_of_the_bytes(tmp_path):
    (tmp_path / "text.txt").write_text("ab" * 100)
    corpus = load_text(str(tmp_path / "text.txt"))
    assert corpus.train.digest() == hashlib.sha256(b"ab" * 90 + b"\0").hexdigest()


def test_the_default_is_the_source_of_the_standard_library():
    corpus = load_text(None)
    names = {piece.path.name for part in (corpus.train, corpus.held_out) for piece in part.pieces}
    assert {"argparse.py", "dataclasses.py", "random.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert len(corpus.train) > 4e6 and 0.09 < len(corpus.held_out) / len(corpus.train) < 0.2


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "does not exist; give a file of text or a folder"),
        ("empty.txt", b"", "is empty"),
        ("binary", b"text\0text" * 100, "is binary: it has a zero byte near its start"),
        ("wide.txt", ("wide " * 100).encode("utf-16"), "is binary"),
    ],
)
def test_what_is_no_text_is_refused_in_one_sentence(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        load_text(str(tmp_path / name))
    assert caught.value.parameter == "data"


def test_a_folder_with_one_text_is_refused(tmp_path):
    (tmp_path / "one.txt").write_text("one" * 1000)
    with pytest.raises(InputError, match="has 1 files of text; a folder is split by file and needs 2 or more"):
        load_text(str(tmp_path))
