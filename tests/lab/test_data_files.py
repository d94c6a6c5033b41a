import gzip
import pickle
import tarfile
import tracemalloc
import zipfile

import numpy
import pytest

from sparsekern.files.size_limits import Limits
from sparsekern.lab import data_files
from sparsekern.lab.data_files import CIFAR, KERAS_KEYS, KEYS, read_cifar, read_idx, read_npz

LIMITS = Limits()


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


def idx(array):
    head = bytes([0, 0, 8, array.ndim])
    return head + b"".join(side.to_bytes(4, "big") for side in array.shape) + array.astype("uint8").tobytes()


def write_idx(folder, content, name="{stem}-idx{axes}-ubyte"):
    """Write four IDX files; an array that is bytes already is the content of its file."""
    for key, stem in zip(KEYS, ("train-images", "train-labels", "t10k-images", "t10k-labels"), strict=True):
        path = folder / name.format(stem=stem, axes=3 if "images" in key else 1)
        data = content[key] if isinstance(content[key], bytes) else idx(content[key])
        raw = isinstance(content[key], bytes) or path.suffix != ".gz"
        path.write_bytes(data if raw else gzip.compress(data, mtime=0))


@pytest.mark.parametrize("names", [KEYS, KERAS_KEYS])
def test_npz_has_either_family_of_names(tmp_path, names):
    content = arrays()
    path = tmp_path / "data.npz"
    numpy.savez_compressed(path, **dict(zip(names, content.values(), strict=True)))
    read = read_npz(path, LIMITS)
    assert list(read) == list(KEYS)
    assert read["train_images"].shape == (6, 1, 4, 5)
    assert all(numpy.array_equal(read[key].reshape(content[key].shape), content[key]) for key in KEYS)


def test_channels_of_npz_go_first(tmp_path):
    images = numpy.arange(6 * 4 * 5 * 3, dtype="uint8").reshape(6, 4, 5, 3)
    read = read_npz(npz(tmp_path, train_images=images), LIMITS)["train_images"]
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
        ({"train_images": numpy.array([{}] * 6)}, "damaged or no .npz file; write one with numpy.savez, of plain"),
    ],
)
def test_arrays_of_another_kind_are_described(tmp_path, changes, message):
    path = npz(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        read_npz(path, LIMITS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("damage", [lambda b: b[:200], lambda b: b"no archive", lambda b: b"", lambda b: None])
def test_a_damaged_npz_file_is_described(tmp_path, damage):
    path = npz(tmp_path)
    content = damage(path.read_bytes())
    if content is None:  # a single array is not an archive
        with path.open("wb") as file:
            numpy.save(file, numpy.ones(3))
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no .npz file"):
        read_npz(path, LIMITS)


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
        read_npz(tmp_path / "data.npz", LIMITS)


@pytest.mark.parametrize("name", ["{stem}-idx{axes}-ubyte", "{stem}.idx{axes}-ubyte", "{stem}-idx{axes}-ubyte.gz"])
def test_idx_files_of_every_spelling_are_read(tmp_path, name):
    content = arrays()
    write_idx(tmp_path, content, name)
    read = read_idx(tmp_path, LIMITS)
    assert read["train_images"].shape == (6, 1, 4, 5)
    assert all(numpy.array_equal(read[key].reshape(content[key].shape), content[key]) for key in KEYS)
    next(tmp_path.glob("t10k-labels*")).unlink()
    with pytest.raises(ValueError, match="has no t10k-labels-idx1-ubyte"):
        read_idx(tmp_path, LIMITS)


IMAGES = arrays()["train_images"][:2, :3, :4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: it has 0 bytes"),
        (idx(IMAGES)[:9], "truncated: it has 9 bytes"),
        (idx(IMAGES)[:-1], "truncated: its header promises 2 x 3 x 4 = 24 bytes, 23 follow"),
        (idx(IMAGES) + b"x", "damaged: its header promises 2 x 3 x 4 = 24 bytes, more follow"),
        (idx(numpy.arange(3)), "magic number 0x00000801; an IDX file of images begins with 0x00000803"),
        (b"<html>404</html>", "magic number 0x3c68746d"),
        # without the time, which is in the names of the tests: two workers of pytest-xdist must find the same ones
        (gzip.compress(idx(IMAGES), mtime=0)[:-12], "compressed data end too early"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "not a gzip file, or damaged"),
        (idx(IMAGES), "not a gzip file"),
    ],
)
def test_a_damaged_idx_file_is_described(tmp_path, content, message):
    packed = ".gz" * ("gzip" in message or "compressed" in message)
    changes = {"train_images": content, "train_labels": numpy.arange(2)}
    write_idx(tmp_path, arrays(**changes), f"{{stem}}-idx{{axes}}-ubyte{packed}")
    with pytest.raises(ValueError, match=message) as error:
        read_idx(tmp_path, LIMITS)
    assert str(tmp_path / "train-images-idx3-ubyte") in str(error.value)


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_no_more_is_read_of_an_idx_file_than_its_header_promises(tmp_path, packed):
    content = idx(IMAGES) + bytes(2**24)
    images = gzip.compress(content) if packed else content
    write_idx(
        tmp_path, arrays(train_images=images, train_labels=numpy.arange(2)), f"{{stem}}-idx{{axes}}-ubyte{packed}"
    )
    tracemalloc.start()
    with pytest.raises(ValueError, match="is damaged: its header promises 2 x 3 x 4 = 24 bytes, more follow"):
        read_idx(tmp_path, LIMITS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


FORMS = {form.name: form for form in CIFAR}


def records(form, images, labels):
    head = numpy.zeros((len(labels), form.head), "uint8")
    head[:, 0], head[:, -1] = 7, labels  # of CIFAR-100 the coarse label comes first
    return numpy.hstack([head, images]).tobytes()


def write_cifar(folder, name, labels=None, **changes):
    """Write all files of CIFAR and return what they hold; ``changes`` are contents by file name, None for no file."""
    form, expected = FORMS[name], []
    for i, file in enumerate(form.files):
        rng = numpy.random.default_rng(i)
        images = rng.integers(0, 256, (4, 3072), dtype="uint8")
        own = rng.integers(0, form.classes, 4) if labels is None else labels
        expected.append((images.reshape(-1, 3, 32, 32), own))
        content = changes.get(file.removesuffix(".bin"), records(form, images, own))
        if content is not None:
            (folder / file).write_bytes(content)
    return form, *expected


def archive(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, "cifar-batches")
    return path


@pytest.fixture(params=[False, True], ids=["folder", "archive"])
def cifar(tmp_path, request):
    """A folder for CIFAR, and a function that reads it, or its archive."""
    folder = tmp_path / "data"
    folder.mkdir()

    def read():
        return read_cifar(archive(folder, tmp_path / "x.tar.gz") if request.param else folder, LIMITS)

    return folder, read


@pytest.mark.parametrize("name", FORMS)
def test_cifar_is_read_as_it_was_written(cifar, name):
    folder, read = cifar
    _, *train, test = write_cifar(folder, name)
    (folder / "readme.html").write_text("not data")
    found = read()
    expected = [numpy.concatenate(kind) for kind in zip(*train, strict=True)] + list(test)
    assert list(found) == list(KEYS) and not (folder.parent / "cifar-batches").exists()
    for key, right in zip(KEYS, expected, strict=True):
        assert found[key].dtype == right.dtype and numpy.array_equal(found[key], right), key


def test_red_green_and_blue_are_the_channels(tmp_path):
    images = numpy.repeat(numpy.arange(3, dtype="uint8"), 1024)[None].repeat(4, 0)
    images[:, 1024 + 32 * 2 + 5] = 99  # green, row 2, column 5
    write_cifar(tmp_path, "CIFAR-100", train=records(FORMS["CIFAR-100"], images, numpy.arange(4)))
    first = read_cifar(tmp_path, LIMITS)["train_images"][0]
    assert first[1, 2, 5] == 99
    assert [sorted(set(first[c].ravel())) for c in range(3)] == [[0], [1, 99], [2]]


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        ("CIFAR-10", "data_batch_3", None, "has no data_batch_3.bin; CIFAR-10 has data_batch_1.bin, data_batch_2.bin"),
        ("CIFAR-10", "test_batch", None, "has no test_batch.bin"),
        ("CIFAR-100", "test", None, "has no test.bin; CIFAR-100 has train.bin, test.bin"),
        ("CIFAR-10", "test_batch", b"", "test_batch.bin is truncated or damaged: it has 0 bytes"),
        ("CIFAR-10", "test_batch", bytes(3072), "it has 3072 bytes, not a multiple of the 3073"),
        ("CIFAR-10", "data_batch_1", b"<html>404</html>", "data_batch_1.bin is truncated or damaged: it has 16 bytes"),
        ("CIFAR-100", "train", bytes(3073), "train.bin .* not a multiple of the 3074 of an image of CIFAR-100"),
        ("CIFAR-10", "data_batch_1", b"\x0a" + bytes(3072), "data_batch_1.bin has label 10; .* are 0 to 9"),
        ("CIFAR-100", "test", b"\x00\x64" + bytes(3072), "test.bin has label 100; .* are 0 to 99"),
    ],
)
def test_what_is_wrong_with_cifar_is_described(cifar, form, name, content, message):
    folder, read = cifar
    write_cifar(folder, form, **{name: content})
    with pytest.raises(ValueError, match=message) as error:
        read()
    assert str(folder.parent) in str(error.value)


class Harm:
    def __reduce__(self):
        return exec, ("import os; os.mkdir('harmed')",)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("data_batch_1", "test_batch"), "CIFAR-10 as Python pickles, .*; fetch the .*, cifar-10-binary.tar.gz$"),
        (("train", "test"), "CIFAR-100 as Python pickles, .*; fetch the .*, cifar-100-binary.tar.gz$"),
    ],
)
def test_pickles_are_refused_and_not_read(cifar, monkeypatch, files, said):
    folder, read = cifar
    monkeypatch.chdir(folder)
    for name in files:
        (folder / name).write_bytes(pickle.dumps({b"data": Harm(), b"labels": []}, 4))
    with pytest.raises(ValueError, match=said):
        read()
    assert not (folder / "harmed").exists()


def test_a_folder_or_an_archive_of_something_else(cifar):
    with pytest.raises(ValueError, match="has no file of CIFAR-10 or CIFAR-100"):
        cifar[1]()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"<html>404</html>", lambda b: b""])
def test_a_damaged_archive_is_described(tmp_path, damage):
    folder = tmp_path / "data"
    folder.mkdir()
    write_cifar(folder, "CIFAR-100")
    path = archive(folder, tmp_path / "x.tar.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or no tar archive; fetch it again"):
        read_cifar(path, LIMITS)


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_cifar(folder, "CIFAR-100", test=None)
    (folder / "test.bin").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="has no test.bin"):
        read_cifar(archive(folder, tmp_path / "x.tar", "w"), LIMITS)


def test_no_more_is_read_than_a_file_of_cifar_can_have(cifar, monkeypatch):
    folder, read = cifar
    write_cifar(folder, "CIFAR-100")
    monkeypatch.setattr(data_files, "LARGEST_FILE", 3074 + 10)
    with pytest.raises(ValueError, match="it has 3084 bytes"):
        read()


@pytest.mark.parametrize("reader", [read_cifar, read_idx])
def test_a_file_that_cannot_be_read(tmp_path, monkeypatch, reader):
    write_cifar(tmp_path, "CIFAR-100")
    write_idx(tmp_path, arrays())
    monkeypatch.setattr("pathlib.Path.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        reader(tmp_path, LIMITS)
