"""Images that stay on the disk, and the random order in which they are read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import pytest
import torch

from sparsekern.errors import InputError
from sparsekern.lab.data import load
from sparsekern.lab.data_files import KEYS
from sparsekern.lab.stored import MOST, Rows, Shuffled
from sparsekern.lab.tasks import Classification
from tests.lab.runs import learner_of
from tests.lab.test_data_files import arrays, npz
from tests.lab.test_train import CONFIG


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored(folder: Path, **changes: numpy.ndarray | None) -> Path:
    """Write a data set as four files."""
    made = folder / "stored"
    made.mkdir()
    for key, array in arrays(**changes).items():
        numpy.save(made / f"{key}.npy", array)
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 64, 65, 1000, 4097])
def test_each_place_comes_once_and_any_part_is_computed_alone(count):
    for seed in range(3):
        order = Shuffled(count, seeded(seed))
        places = order[:]
        assert torch.equal(places.sort().values, torch.arange(count))
        for part in (slice(0, 3), slice(count // 2, count + 5), slice(count, count + 9), slice(count - 1, count)):
            assert torch.equal(order[part], places[part])
        assert torch.equal(Shuffled(count, seeded(seed))[:], places)  # on any rank, and after a stop
    if count > 16:
        orders = [Shuffled(count, seeded(seed))[:] for seed in range(8)]
        assert all((a == b).sum() < 12 for i, a in enumerate(orders) for b in orders[:i])


def test_every_place_is_as_likely_first():
    """Within five standard deviations."""
    first = torch.cat([Shuffled(6, seeded(seed))[:1] for seed in range(600)])
    counts = first.bincount(minlength=6)
    assert (counts - 100).abs().max() < 5 * (600 * 5 / 36) ** 0.5


def test_far_places_are_computed_as_quickly_as_near_ones():
    order = Shuffled(10**12, seeded(0))
    places = order[10**12 - 5 : 10**12]
    assert places.shape == (5,) and places.unique().numel() == 5 and places.min() >= 0 and places.max() < 10**12


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_a_folder_is_the_data_of_an_npz_file(tmp_path, channels):
    drawn = numpy.random.default_rng(1)
    images = {
        key: drawn.integers(0, 256, (n, 4, 5, *channels), "uint8") for key, n in zip(KEYS[::2], (6, 3), strict=True)
    }
    on_disk, in_memory = load(str(stored(tmp_path, **images))), load(str(npz(tmp_path, **images)))
    assert on_disk.describe() == in_memory.describe() | {"name": "stored"}
    for part in (slice(None), slice(1, 3), torch.tensor([2, 0])):
        for key in KEYS:
            torch.testing.assert_close(getattr(on_disk, key)[part], getattr(in_memory, key)[part], rtol=0, atol=1e-6)
    moved = on_disk.to(torch.device("meta"))
    assert moved.train_images[:2].is_meta and moved.test_labels[:1].is_meta


def test_a_training_sees_each_image_once_an_epoch_and_both_networks_alike(tmp_path):
    drawn = numpy.random.default_rng(0)
    data = load(
        str(
            stored(
                tmp_path,
                train_images=drawn.integers(0, 256, (1100, 8, 8), "uint8"),
                train_labels=numpy.arange(1100) % 3,
                test_images=drawn.integers(0, 256, (3, 8, 8), "uint8"),
            )
        )
    )
    seen = []
    for network in ("sparse", "dense"):
        learner = learner_of(network, CONFIG, data)
        batches = []
        for number in range(learner.batches):
            learner.batch = number
            batches.append(learner.next_batch().batch[0])
        seen.append(torch.cat(batches))
        learner.batch = 0
        learner.step()
        assert 0 <= learner.evaluate()["test_accuracy"] <= 1
    assert torch.equal(*seen)
    assert torch.equal(seen[0].flatten(1).sort(0).values, data.train_images[:].flatten(1).sort(0).values)


def resident(peak: bool = False) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:" if peak else "VmRSS:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is asked of Linux")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """4 GiB of images, most of them a hole in the file."""
    count = 4 * 2**30 // (3 * 32 * 32)
    folder = stored(tmp_path, test_images=numpy.zeros((3, 32, 32, 3), "uint8"), train_labels=numpy.arange(count) % 3)
    with (folder / "train_images.npy").open("wb") as file:
        numpy.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, 32, 32, 3)}
        )
        file.write(os.urandom(3072))
        file.truncate(file.tell() - 3072 + count * 3072)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()
    task = Classification(load(str(folder)))
    order = task.order(seeded(0))
    for number in (0, 1, count // 64 - 1):
        images, labels = task.batch(order, number, 64, seeded(1))
        assert images.shape == (64, 3, 32, 32) and torch.equal(labels, order[number * 64 : (number + 1) * 64] % 3)
    assert count > 80 * MOST and resident(peak=True) - before < 2**26


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_images", b"nothing", "train_images.npy is no .npy file; write it with numpy.save"),
        ("test_labels", None, "test_labels.npy is no .npy file"),
        ("test_images", numpy.asfortranarray(numpy.ones((3, 4, 5), "uint8")), "no plain array in C order"),
        ("test_images", numpy.ones((3, 4, 5)), "test_images in .* is float64 of shape"),
        ("test_images", numpy.ones((3, 5, 5), "uint8"), "images of shape .1, 4, 5., test images of .1, 5, 5."),
        ("train_images", numpy.ones((6, 4, 5), "uint8"), "all pixels are equal"),
        ("train_images", numpy.ones((0, 4, 5), "uint8"), "has 0 train images but 6 train labels"),
        ("train_labels", numpy.array([0, 1, -1, 0, 1, 2]), "train label -1; labels are 0 and up"),
    ],
)
def test_files_that_do_not_fit_are_described(tmp_path, name, content, message):
    folder = stored(tmp_path)
    path = folder / f"{name}.npy"
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        numpy.save(path, content)
    with pytest.raises(ValueError, match=message):
        load(str(folder))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (-6, 4, 5)}", "holds no plain array in C order"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (6, -4, 5)}", "holds no plain array in C order"),
        ("{'descr': '|S0', 'fortran_order': False, 'shape': (6, 4, 5)}", "is .S0 of shape"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 4, 5", "is no .npy file"),
        ("{'descr': '|u1', 'fortran_order': False, 'shape': (6, 2097152, 2097152)}", "is shorter than its header says"),
    ],
)
def test_a_damaged_header_is_described(tmp_path, header, message):
    folder = stored(tmp_path)
    padded = header.ljust(117).encode() + b"\n"
    (folder / "train_images.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"x" * 120
    )
    with pytest.raises(InputError, match=f"train_images.npy {message}"):
        load(str(folder))


def test_a_file_that_becomes_shorter(tmp_path):
    path = stored(tmp_path) / "train_images.npy"
    rows = Rows.open(path)
    path.write_bytes(path.read_bytes()[:-1])
    for call in (lambda: rows.read(slice(5, 6)), lambda: Rows.open(path)):
        with pytest.raises(ValueError, match="is shorter than its header says, or gone; restore it"):
            call()
