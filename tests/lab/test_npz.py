import zipfile

import numpy
import pytest

from sparsekern.lab.npz import KERAS_KEYS, KEYS, read_npz


def arrays(**changes):
    rng = numpy.random.default_rng(0)
    content = {
        "train_images": rng.integers(0, 256, (6, 4, 5), dtype="uint8"),
        "train_labels": numpy.array([0, 1, 2, 0, 1, 2]),
        "test_images": rng.integers(0, 256, (3, 4, 5), dtype="uint8"),
        "test_labels": numpy.array([2, 1, 0], dtype="uint8"),
    }
    return {key: value for key, value in (content | changes).items() if value is not None}


def npz(folder, **changes):
    path = folder / "data.npz"
    numpy.savez(path, **arrays(**changes))
    return path


@pytest.mark.parametrize("names", [KEYS, KERAS_KEYS])
def test_both_families_of_names(tmp_path, names):
    content = arrays()
    path = tmp_path / "data.npz"
    numpy.savez_compressed(path, **dict(zip(names, content.values(), strict=True)))
    read = read_npz(path)
    assert list(read) == list(KEYS)
    assert read["train_images"].shape == (6, 1, 4, 5)
    assert all(numpy.array_equal(read[key].reshape(content[key].shape), content[key]) for key in KEYS)


def test_channels_go_first(tmp_path):
    images = numpy.arange(6 * 4 * 5 * 3, dtype="uint8").reshape(6, 4, 5, 3)
    read = read_npz(npz(tmp_path, train_images=images))["train_images"]
    assert read.shape == (6, 3, 4, 5)
    assert all(numpy.array_equal(read[:, c], images[..., c]) for c in range(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "has no array test_labels; it must have train_images"),
        ({"train_images": numpy.ones((6, 4, 5))}, "train_images .* is float64 of shape"),
        ({"test_images": numpy.ones((3, 20), "uint8")}, r"test_images .* of shape \(3, 20\)"),
        ({"test_images": numpy.ones((3, 3, 4, 5), "uint8")}, r"\(3, 3, 4, 5\): 5 channels, and at most 4 .* come last"),
        ({"train_labels": numpy.ones(6)}, "train_labels .* is float64 .*must be integers"),
        ({"train_labels": numpy.ones((6, 1), "uint8")}, r"train_labels .* of shape \(6, 1\)"),
        (
            {"train_images": numpy.array([{}] * 6)},
            "damaged or no .npz file; write one with numpy.savez, of plain arrays",
        ),
    ],
)
def test_arrays_of_another_kind_are_described(tmp_path, changes, message):
    path = npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_npz(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"no archive", lambda b: b""])
def test_a_damaged_archive_is_described(tmp_path, damage):
    path = npz(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        read_npz(path)


def test_a_single_array_is_not_an_archive(tmp_path):
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        numpy.save(file, numpy.ones(3))
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        read_npz(path)


@pytest.mark.parametrize(
    "header",
    [
        b"\x93NUMPY\x01\x00\xff\x0f" + b"[" * 4095,  # deeper than Python's parser goes
        b"\x93NUMPY\x01\x00\x10\x00" + b"{'descr': '|u1'}",
        b"\x93NUMPY\x09\x00\x02\x00{}",
        b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 3, 4), }".ljust(70),
        b"",
    ],
)
def test_a_damaged_header_of_an_array_is_described(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("train_images.npy", header)
    with pytest.raises(ValueError, match="data.npz, which is damaged or no .npz file; write one with numpy.savez"):
        read_npz(tmp_path / "data.npz")
