import numpy
import pytest
import torch

from sparsekern.recipes.data import KEYS, load


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
    return str(path)


def write_idx(folder, content):
    for key, stem in zip(KEYS, ("train-images", "train-labels", "t10k-images", "t10k-labels"), strict=True):
        array = content[key]
        head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
        (folder / f"{stem}-idx{array.ndim}-ubyte").write_bytes(head + array.astype("uint8").tobytes())


def test_digits_are_split_class_by_class_and_always_alike():
    data = load()
    assert (data.train_images.shape, data.test_images.shape) == ((1438, 64), (359, 64))
    share = data.test_labels.bincount() / (data.test_labels.bincount() + data.train_labels.bincount())
    assert torch.allclose(share, torch.tensor(0.2), atol=0.005)
    again = load()
    assert torch.equal(again.test_images, data.test_images) and again.digest == data.digest
    assert data.digest.startswith("242825554185d354")


def test_standardised_by_the_training_set(tmp_path):
    data = load(npz(tmp_path))
    assert data.train_images.dtype == torch.float32
    assert abs(float(data.train_images.mean())) < 1e-6 and abs(float(data.train_images.std()) - 1) < 1e-6
    assert abs(float(data.test_images.mean())) > 1e-3
    assert (data.name, data.classes, data.features) == ("data", 3, 20)


def test_idx_folder_and_npz_are_the_same_data(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    write_idx(folder, arrays())
    from_idx, from_npz = load(str(folder)), load(npz(tmp_path))
    assert from_idx.name == "fashion"
    assert all(torch.equal(getattr(from_idx, key), getattr(from_npz, key)) for key in KEYS)


def test_colour_images(tmp_path):
    colour = {"train_images": numpy.eye(6, 12, dtype="uint8").reshape(6, 2, 2, 3)}
    data = load(npz(tmp_path, **colour, test_images=numpy.ones((3, 2, 2, 3), dtype="uint8")))
    assert data.features == 12


def test_describe_and_move(tmp_path):
    data = load(npz(tmp_path)).to(torch.device("meta"))
    assert data.train_images.is_meta and data.test_labels.is_meta
    assert data.describe() == {
        "name": "data",
        "train_images": 6,
        "test_images": 3,
        "features": 20,
        "classes": 3,
        "sha256": data.digest,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "has no array test_labels; it must have train_images"),
        ({"train_labels": numpy.arange(5)}, "has 6 train images but 5 train labels"),
        ({"test_labels": numpy.arange(2)}, "has 3 test images but 2 test labels"),
        ({"train_images": numpy.ones((6, 4, 5))}, "train_images .* is float64 of shape"),
        ({"test_images": numpy.ones((3, 20), "uint8")}, r"test_images .* of shape \(3, 20\)"),
        ({"train_labels": numpy.ones(6)}, "train_labels .* is float64 .*must be integers"),
        ({"train_labels": numpy.ones((6, 1), "uint8")}, r"train_labels .* of shape \(6, 1\)"),
        ({"train_images": numpy.ones((0, 4, 5), "uint8"), "train_labels": numpy.ones(0, int)}, "empty train set"),
        ({"train_labels": numpy.array([0, 1, -1, 0, 1, 2])}, "train label -1; labels are 0 and up"),
        (
            {"train_labels": numpy.array([0, 1, 2, 0, 1, 10**8])},
            "train label 100000000 with 6 train images",
        ),
        ({"train_labels": numpy.zeros(6, int)}, "1 class only; there must be 2"),
        ({"test_labels": numpy.array([0, 1, 7])}, "test labels that no train image has: 7"),
        ({"test_images": numpy.ones((3, 5, 5), "uint8")}, r"train images of shape \(4, 5\), test images of \(5, 5\)"),
        ({"train_images": numpy.ones((6, 4, 5), "uint8")}, "all pixels are equal"),
        (
            {"train_images": numpy.array([{}] * 6)},
            "damaged or no .npz file; write one with numpy.savez, of plain arrays",
        ),
    ],
)
def test_data_that_do_not_fit_are_described(tmp_path, changes, message):
    path = npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert path in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"no archive", lambda b: b""])
def test_a_damaged_archive_is_described(tmp_path, damage):
    path = tmp_path / "data.npz"
    numpy.savez(path, **arrays())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        load(str(path))


def test_a_single_array_is_not_an_archive(tmp_path):
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        numpy.save(file, numpy.ones(3))
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        load(str(path))


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(str(tmp_path / "nothing.npz"))
    (tmp_path / "data.csv").touch()
    with pytest.raises(ValueError, match="does not end in .npz"):
        load(str(tmp_path / "data.csv"))
    with pytest.raises(ValueError, match="has no train-images-idx3-ubyte"):
        load(str(tmp_path))
