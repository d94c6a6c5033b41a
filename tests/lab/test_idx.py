import gzip
import tracemalloc

import numpy
import pytest

from sparsekern.lab.idx import IMAGES, LABELS, find_idx, idx_shape, read_idx


def idx(array: numpy.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim])
    return head + b"".join(side.to_bytes(4, "big") for side in array.shape) + array.astype("uint8").tobytes()


IMAGE_ARRAY = numpy.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_reads_what_was_written(tmp_path, name):
    content = idx(IMAGE_ARRAY)
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert numpy.array_equal(read_idx(path, IMAGES), IMAGE_ARRAY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: it has 0 bytes"),
        (idx(IMAGE_ARRAY)[:9], "truncated: it has 9 bytes"),
        (idx(IMAGE_ARRAY)[:-1], "truncated: its header promises 2 x 3 x 4 = 24 bytes, 23 follow"),
        (idx(IMAGE_ARRAY) + b"x", "damaged: its header promises 2 x 3 x 4 = 24 bytes, 25 follow"),
        (idx(numpy.arange(3)), "magic number 0x00000801; an IDX file of images begins with 0x00000803"),
        (b"<html>404</html>", "magic number 0x3c68746d"),
    ],
)
def test_a_damaged_file_is_described(tmp_path, content, message):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, IMAGES)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [  # without the time, which is in the names of the tests: two workers of pytest-xdist must find the same ones
        (gzip.compress(idx(IMAGE_ARRAY), mtime=0)[:-12], "compressed data end too early"),
        (idx(IMAGE_ARRAY), "not a gzip file"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "not a gzip file, or damaged"),
    ],
)
def test_a_damaged_gzip_file_is_described(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(path, IMAGES)


def test_an_unreadable_file_is_described(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_idx(tmp_path, LABELS)


@pytest.mark.parametrize("name", ["t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte", "t10k-labels-idx1-ubyte.gz"])
def test_finds_every_spelling(tmp_path, name):
    (tmp_path / name).touch()
    assert find_idx(tmp_path, "t10k-labels", LABELS) == tmp_path / name


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no t10k-labels-idx1-ubyte"):
        find_idx(tmp_path, "t10k-labels", LABELS)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_no_more_is_read_than_the_header_promises(tmp_path, name):
    content = idx(IMAGE_ARRAY) + bytes(2**24)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert idx_shape(tmp_path / name, IMAGES) == (2, 3, 4)
    follow = "25 or more" if name.endswith(".gz") else "16777240"
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"is damaged: its header promises 2 x 3 x 4 = 24 bytes, {follow} follow"):
        read_idx(tmp_path / name, IMAGES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
