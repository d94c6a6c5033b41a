import gzip
import io
import tarfile
import zipfile

import numpy
import pytest
import torch

from sparsekern.lab.data import load
from sparsekern.lab.data_files import KEYS
from tests.lab.test_data_files import arrays, npz, write_cifar, write_idx


def test_digits_are_split_class_by_class_and_always_alike():
    data = load()
    assert (data.train_images.shape, data.test_images.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    share = data.test_labels.bincount() / (data.test_labels.bincount() + data.train_labels.bincount())
    assert torch.allclose(share, torch.tensor(0.2), atol=0.005)
    again = load()
    assert torch.equal(again.test_images, data.test_images) and again.digest == data.digest
    assert data.digest.startswith("242825554185d354")


def test_standardised_by_the_training_set(tmp_path):
    data = load(str(npz(tmp_path)))
    assert data.train_images.dtype == torch.float32
    assert abs(float(data.train_images.mean())) < 1e-6 and abs(float(data.train_images.std()) - 1) < 1e-6
    assert abs(float(data.test_images.mean())) > 1e-3
    assert (data.name, data.classes, data.image_shape) == ("data", 3, (1, 4, 5))


def standard(pixels):
    pixels = pixels.astype("float64")
    return torch.from_numpy((pixels - pixels.mean()) / pixels.std(ddof=1))


def test_each_channel_has_its_own_mean_and_deviation(tmp_path):
    images = numpy.random.default_rng(1).integers(0, 256, (6, 4, 5, 4), dtype="uint8")
    images[..., 1] //= 8
    images[..., 3] = 255  # no contrast: zero
    data = load(str(npz(tmp_path, train_images=images, test_images=images[:3])))
    assert data.image_shape == (4, 4, 5)
    for channel in range(3):
        exact = standard(images[..., channel])
        torch.testing.assert_close(data.train_images[:, channel].double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(data.test_images[:, channel].double(), exact[:3], rtol=1e-5, atol=1e-6)
    assert not data.train_images[:, 3].any() and not data.test_images[:, 3].any()


def test_idx_folder_and_npz_are_the_same_data(tmp_path):
    folder = tmp_path / "fashion"
    folder.mkdir()
    write_idx(folder, arrays())
    from_idx, from_npz = load(str(folder)), load(str(npz(tmp_path)))
    assert from_idx.name == "fashion"
    assert all(torch.equal(getattr(from_idx, key), getattr(from_npz, key)) for key in KEYS)


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_as_a_folder_and_as_an_archive(tmp_path, packed):
    path = folder = tmp_path / "cifar-100-binary"
    folder.mkdir()
    labels = numpy.arange(4) * 33
    _, (train, _), _ = write_cifar(folder, "CIFAR-100", labels=labels)
    if packed:
        path = tmp_path / "cifar-100-binary.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(folder, folder.name)
    data = load(str(path))
    assert (data.name, data.classes, data.image_shape) == ("cifar-100-binary", 100, (3, 32, 32))
    torch.testing.assert_close(data.train_images[:, 1].double(), standard(train[:, 1]), rtol=1e-5, atol=1e-6)


def test_describe_and_move(tmp_path):
    data = load(str(npz(tmp_path))).to(torch.device("meta"))
    assert data.train_images.is_meta and data.test_labels.is_meta
    assert data.describe() == {
        "name": "data",
        "train_images": 6,
        "test_images": 3,
        "image_shape": [1, 4, 5],
        "classes": 3,
        "sha256": data.digest,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": numpy.arange(5)}, "has 6 train images but 5 train labels"),
        ({"test_labels": numpy.arange(2)}, "has 3 test images but 2 test labels"),
        ({"train_images": numpy.ones((0, 4, 5), "uint8"), "train_labels": numpy.ones(0, int)}, "empty train set"),
        ({"train_labels": numpy.array([0, 1, -1, 0, 1, 2])}, "train label -1; labels are 0 and up"),
        ({"train_labels": numpy.array([0, 1, 2, 0, 1, 10**8])}, "train label 100000000 with 6 train images"),
        ({"train_labels": numpy.zeros(6, int)}, "1 class only; there must be 2"),
        ({"test_labels": numpy.array([0, 1, 7])}, "test labels that no train image has: 7"),
        ({"test_images": numpy.ones((3, 5, 5), "uint8")}, r"images of shape \(1, 4, 5\), test images of \(1, 5, 5\)"),
        ({"train_images": numpy.ones((6, 4, 5), "uint8")}, "all pixels are equal"),
    ],
)
def test_data_that_do_not_fit_are_described(tmp_path, changes, message):
    path = str(npz(tmp_path, **changes))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert path in str(error.value)


def test_a_path_that_is_nothing(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load(str(tmp_path / "nothing.npz"))
    (tmp_path / "data.csv").touch()
    with pytest.raises(ValueError, match="does not end in .npz, .tar.gz, .tgz, .tar; give an .npz file, CIFAR"):
        load(str(tmp_path / "data.csv"))
    with pytest.raises(ValueError, match="has no train-images-idx3-ubyte"):
        load(str(tmp_path))


TOO_MUCH = r"has \d+ bytes and asks for 0.015[67] GiB of memory, and data_max_gib is 0.01; if you trust"


def test_an_npz_file_is_measured_by_its_headers_before_anything_is_read(tmp_path, monkeypatch):
    """Of a file of a few kB, whose training images are 4 MB of zeros."""

    def write(labels):
        sets = {"train_labels": numpy.arange(labels), "test_images": numpy.zeros((2, 32, 32), "uint8")}
        with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in (sets | {"test_labels": numpy.arange(2)}).items():
                with archive.open(f"{name}.npy", "w") as file:
                    numpy.lib.format.write_array(file, array)
            with archive.open("train_images.npy", "w") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (4096, 32, 32)}
                numpy.lib.format.write_array_header_1_0(file, header)
                file.write(bytes(2**22))
        return str(tmp_path / "a.npz")

    monkeypatch.setattr(numpy, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="has 4096 train images but 4 train labels"):
        load(write(4))
    with pytest.raises(ValueError, match=f"a.npz {TOO_MUCH}"):
        load(write(4096), max_gib=0.01)
    with pytest.raises(ValueError, match="data_max_gib is 0; it must be a number above 0"):
        load(write(4096), max_gib=0)


def test_idx_files_are_measured_by_their_headers_before_anything_is_read(tmp_path, monkeypatch):
    def write(name, *shape):
        head = bytes([0, 0, 8, len(shape)]) + b"".join(side.to_bytes(4, "big") for side in shape)
        (tmp_path / name).write_bytes(gzip.compress(head + bytes(numpy.prod(shape)), mtime=0))

    monkeypatch.setattr("sparsekern.lab.data_files._idx_array", lambda *_: pytest.fail("it was read"))
    write("train-images-idx3-ubyte.gz", 4096, 32, 32)
    write("train-labels-idx1-ubyte.gz", 4)
    write("t10k-images-idx3-ubyte.gz", 2, 32, 32)
    write("t10k-labels-idx1-ubyte.gz", 2)
    with pytest.raises(ValueError, match="has 4096 train images but 4 train labels"):
        load(str(tmp_path))
    write("train-labels-idx1-ubyte.gz", 4096)
    with pytest.raises(ValueError, match=TOO_MUCH):
        load(str(tmp_path), max_gib=0.01)


def test_a_tar_archive_is_measured_before_each_file_is_read(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("cifar/train.bin")
        entry.size = 2**22
        archive.addfile(entry, io.BytesIO(bytes(entry.size)))
    with pytest.raises(ValueError, match=f"a.tar.gz {TOO_MUCH}"):
        load(str(tmp_path / "a.tar.gz"), max_gib=0.01)
