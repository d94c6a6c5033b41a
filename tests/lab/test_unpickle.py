import os
import pickle
import struct

import numpy
import pytest

from sparsekern.lab.unpickle import unpickle


def short(text):
    """The opcode of a string of Python 2."""
    return b"U" + bytes([len(text)]) + text


def of_python_2(array, labels):
    """A batch as it is distributed: protocol 2, strings of Python 2, the array by way of ``_reconstruct``."""
    rows, columns = array.shape
    content = array.tobytes()
    return b"".join(
        (
            b"\x80\x02}q\x01(",
            short(b"batch_label") + short(b"training batch 1 of 5"),
            short(b"labels") + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e",
            short(b"data"),
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R(K\x01",
            b"M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86",
            b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|"),
            b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<i", len(content)) + content + b"tbu.",
        )
    )


ARRAY = numpy.arange(12, dtype="uint8").reshape(2, 6)


def test_a_batch_of_python_2():
    content = of_python_2(ARRAY, [7, 3])
    batch = unpickle(content, "x")
    assert batch.keys() == {b"batch_label", b"labels", b"data"}
    assert batch[b"batch_label"] == b"training batch 1 of 5" and batch[b"labels"] == [7, 3]
    assert batch[b"data"].dtype == "uint8" and numpy.array_equal(batch[b"data"], ARRAY)
    # numpy's own reading of the same bytes is the oracle
    assert numpy.array_equal(pickle.loads(content, encoding="bytes")[b"data"], ARRAY)


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_batch_of_python_3(protocol):
    batch = unpickle(pickle.dumps({"data": ARRAY, "more": (1, 2.5, None, [b"x"])}, protocol), "x")
    assert numpy.array_equal(batch["data"], ARRAY) and batch["more"] == (1, 2.5, None, [b"x"])


class Calls:
    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.mkdir, ("harmed",), "mkdir"),
        (eval, ("__import__('os').mkdir('harmed')",), "eval"),
        (numpy.load, ("harmed",), "load"),
        (getattr, (ARRAY, "tofile"), "getattr"),
    ],
)
def test_a_pickle_that_calls_something_is_refused_and_nothing_is_called(
    tmp_path, monkeypatch, protocol, function, arguments, named
):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps({"data": Calls(function, *arguments)}, protocol)
    with pytest.raises(
        ValueError, match=rf"x is damaged, .*asks for .*\.{named}, which no data need: it is not loaded"
    ):
        unpickle(content, "x")
    assert list(tmp_path.iterdir()) == []


def test_a_class_that_is_allowed_does_nothing_when_it_is_called():
    # numpy.ndarray((10**15,)) would ask for a petabyte, numpy.dtype would parse what it is given
    for name, arguments in (("ndarray", b"J\x00\x00\x00\x7f\x85"), ("dtype", short(b"nonsense") + b"\x85")):
        with pytest.raises(ValueError, match="x is damaged, or no pickle of plain data"):
            unpickle(b"\x80\x02cnumpy\n" + name.encode() + b"\n" + arguments + b"R.", "x")


@pytest.mark.parametrize("array", [numpy.ones((2, 2)), numpy.ones(2, "i4"), numpy.array([[], {}], dtype=object)])
def test_arrays_of_another_kind_are_refused(array):
    with pytest.raises(ValueError, match="an array that is not one of unsigned bytes"):
        unpickle(pickle.dumps(array, 4), "x")


def test_an_array_in_fortran_order():
    assert numpy.array_equal(unpickle(pickle.dumps(numpy.asfortranarray(ARRAY), 4), "x"), ARRAY)


@pytest.mark.parametrize("content", [{1, 2}, 1j, bytearray(b"x")])
def test_other_kinds_of_data_are_refused(content):
    with pytest.raises(ValueError, match="x is damaged, or no pickle of plain data"):
        unpickle(pickle.dumps(content, 4), "x")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:-1],
        lambda b: b[: len(b) // 2],
        lambda b: b"<html>404</html>",
        lambda b: b.replace(b"K\x01M\x02\x00M", b"K\x01M\x03\x00M"),  # the shape promises a row more
    ],
)
def test_a_damaged_pickle_is_described(damage):
    with pytest.raises(ValueError, match="x is damaged, or no pickle of plain data: .+; fetch it again"):
        unpickle(damage(of_python_2(ARRAY, [7, 3])), "x")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04\x8c\x01ar\xff\xff\xff\x7f.", None),  # remembers as number 2**31 - 1: the reader in C takes 16 GB
        (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".", "150"),  # a bytearray of a terabyte
    ],
)
def test_ten_bytes_do_not_take_all_memory(content, words):
    if words is None:
        unpickle(content, "x")
        return
    with pytest.raises(ValueError, match=f"x is damaged, or no pickle of plain data: {words}"):
        unpickle(content, "x")


def test_a_list_of_twice_the_same_list_again_and_again_has_an_end():
    nested = []
    for _ in range(200):
        nested = [nested, nested]
    found = unpickle(pickle.dumps(nested), "x")
    assert found[0] is found[1]
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="x is damaged"):
        unpickle(pickle.dumps(endless), "x")


def test_a_reason_of_two_lines_becomes_one():
    with pytest.raises(ValueError, match=r"x is damaged.*persistent.*") as caught:
        unpickle(b"P", "x")
    assert "\n" not in str(caught.value)
