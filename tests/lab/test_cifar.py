import pickle
import tarfile

import numpy
import pytest

from sparsekern.lab import cifar
from sparsekern.lab.cifar import FORMS, is_cifar, read_cifar_folder, read_cifar_tar
from sparsekern.lab.npz import KEYS

TEN_BINARY, HUNDRED_BINARY, TEN, HUNDRED = FORMS


def batch(seed, images=4, classes=10):
    rng = numpy.random.default_rng(seed)
    return rng.integers(0, 256, (images, 3072), dtype="uint8"), rng.integers(0, classes, images)


def encoded(form, images, labels):
    """The content of a file of that form."""
    if form.head:
        head = numpy.zeros((len(labels), form.head), "uint8")  # of CIFAR-100 the coarse label comes first
        head[:, form.label] = labels
        return numpy.hstack([head, images]).tobytes()
    entries = {"data": images, "fine_labels": labels.tolist(), "coarse_labels": [0] * len(labels)}
    if form is TEN:
        entries = {b"data": images, b"labels": labels.tolist()}
    return pickle.dumps(entries, 4)


def write(folder, form, **changes):
    """Write all files of a form; ``changes`` are contents by file name, None for a file that is not there."""
    expected = []
    for i, name in enumerate((*form.train, form.test)):
        images, labels = batch(i, classes=form.classes)
        expected.append((images.reshape(-1, 3, 32, 32), labels))
        content = changes.get(name.removesuffix(".bin"), encoded(form, images, labels))
        if content is not None:
            (folder / name).write_bytes(content)
    return expected


def archive(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        tar.add(folder, "cifar-batches")
    return path


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("packed", [False, True])
def test_reads_what_was_written(tmp_path, form, packed):
    folder = tmp_path / "data"
    folder.mkdir()
    assert not is_cifar(folder)
    *train, test = write(folder, form)
    (folder / "readme.html").write_text("not data")
    assert is_cifar(folder)
    arrays = read_cifar_tar(archive(folder, tmp_path / "x.tar.gz")) if packed else read_cifar_folder(folder)
    expected = [numpy.concatenate(kind) for kind in zip(*train, strict=True)] + list(test)
    assert list(arrays) == list(KEYS)
    for key, right in zip(KEYS, expected, strict=True):
        assert arrays[key].dtype == right.dtype and numpy.array_equal(arrays[key], right), key
    assert not (tmp_path / "cifar-batches").exists()


def test_red_green_and_blue_are_the_channels(tmp_path):
    images = numpy.repeat(numpy.arange(3, dtype="uint8"), 1024)[None].repeat(4, 0)
    images[:, 1024 + 32 * 2 + 5] = 99  # green, row 2, column 5
    write(tmp_path, HUNDRED_BINARY, train=encoded(HUNDRED_BINARY, images, numpy.arange(4)))
    first = read_cifar_folder(tmp_path)["train_images"][0]
    assert first[1, 2, 5] == 99
    assert [sorted(set(first[c].ravel())) for c in range(3)] == [[0], [1, 99], [2]]


def test_the_fine_labels_are_read(tmp_path):
    images, _ = batch(0)
    content = b"".join(bytes([7, label]) + row.tobytes() for label, row in zip((90, 91, 92, 93), images, strict=True))
    write(tmp_path, HUNDRED_BINARY, train=content)
    assert read_cifar_folder(tmp_path)["train_labels"].tolist() == [90, 91, 92, 93]


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        (TEN, "data_batch_3", None, "has no data_batch_3; CIFAR-10 .python. has data_batch_1, data_batch_2"),
        (TEN, "test_batch", None, "has no test_batch"),
        (TEN_BINARY, "data_batch_3", None, "has no data_batch_3.bin; CIFAR-10 .binary. has"),
        (HUNDRED, "test", None, "has no test; CIFAR-100 .python. has train, test"),
        (TEN_BINARY, "test_batch", b"", "test_batch.bin is truncated or damaged: it has 0 bytes"),
        (TEN_BINARY, "test_batch", bytes(3072), "it has 3072 bytes, not a multiple of the 3073"),
        (HUNDRED_BINARY, "train", bytes(3073), "train.bin .* not a multiple of the 3074 of an image of CIFAR-100"),
        (TEN_BINARY, "data_batch_1", b"\x0a" + bytes(3072), "data_batch_1.bin has label 10; .* are 0 to 9"),
        (HUNDRED_BINARY, "test", b"\x00\x64" + bytes(3072), "test.bin has label 100; .* are 0 to 99"),
        (TEN, "data_batch_1", b"<html>404</html>", "data_batch_1 is damaged, or no pickle of plain data"),
        (TEN, "data_batch_1", [1, 2], "holds a list; a batch of CIFAR-10 .python. is a dict"),
        (TEN, "data_batch_1", {b"labels": [1]}, r"has data of shape None; .* has \(images, 3072\)"),
        (TEN, "data_batch_1", {b"data": batch(0)[0][:, :9], b"labels": [1] * 4}, r"has data of shape \(4, 9\)"),
        (TEN, "data_batch_1", {b"data": batch(0)[0]}, "has no list b'labels' of whole numbers"),
        (TEN, "data_batch_1", {b"data": batch(0)[0], b"labels": [1, 2, 3, "4"]}, "no list b'labels' of whole numbers"),
        (TEN, "data_batch_1", {b"data": batch(0)[0], b"labels": [1, 2, 3, 2**80]}, "no list b'labels' of whole"),
        (TEN, "data_batch_1", {b"data": batch(0)[0], b"labels": [1, 2, 3]}, "has 4 images but 3 labels"),
        (TEN, "data_batch_1", {b"data": batch(0)[0], b"labels": [1, 2, 3, -4]}, "has label -4; .* are 0 to 9"),
        (HUNDRED, "train", {b"data": batch(0)[0], b"labels": [1] * 4}, "has no list b'fine_labels'"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_wrong_is_described(tmp_path, form, name, content, message, packed):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, form, **{name: pickle.dumps(content, 4) if isinstance(content, (dict, list)) else content})
    path = archive(folder, tmp_path / "x.tar") if packed else folder
    with pytest.raises(ValueError, match=message) as error:
        (read_cifar_tar if packed else read_cifar_folder)(path)
    assert str(path) in str(error.value)


class Harm:
    def __reduce__(self):
        return exec, ("import os; os.mkdir('harmed')",)


def test_a_batch_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, TEN, data_batch_2=pickle.dumps({b"data": Harm(), b"labels": []}, 4))
    with pytest.raises(ValueError, match=r"data_batch_2 is damaged, .* asks for .*\.exec, which no data need"):
        read_cifar_folder(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_a_folder_or_an_archive_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="has no file of CIFAR-10 or CIFAR-100"):
        read_cifar_folder(tmp_path)
    with pytest.raises(ValueError, match="has no file of CIFAR-10 or CIFAR-100"):
        read_cifar_tar(archive(tmp_path, tmp_path / "x.tar"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"<html>404</html>", lambda b: b""])
def test_a_damaged_archive_is_described(tmp_path, damage):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, HUNDRED_BINARY)
    path = archive(folder, tmp_path / "x.tar.gz")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged or no tar archive; fetch it again"):
        read_cifar_tar(path)


def test_a_link_in_an_archive_is_not_followed(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, HUNDRED_BINARY, test=None)
    (folder / "test.bin").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="has no test.bin"):
        read_cifar_tar(archive(folder, tmp_path / "x.tar"))


def test_no_more_is_read_than_a_file_can_have(tmp_path, monkeypatch):
    write(tmp_path, HUNDRED_BINARY)
    monkeypatch.setattr(cifar, "LARGEST_FILE", 3074 + 10)
    with pytest.raises(ValueError, match="it has 3084 bytes"):
        read_cifar_folder(tmp_path)
    with pytest.raises(ValueError, match="it has 3084 bytes"):
        read_cifar_tar(archive(tmp_path, tmp_path.parent / "y.tar"))


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    write(tmp_path, HUNDRED_BINARY)
    monkeypatch.setattr("pathlib.Path.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ValueError, match="cannot be read: Permission denied"):
        read_cifar_folder(tmp_path)
