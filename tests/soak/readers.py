"""Gives every file reader damaged and hostile files, and lets it do two things: succeed, or say so in one sentence.

``python -m tests.soak.readers --inputs 20000``. Any other exception than ValueError, a text of more than one line, a
call that takes over ten seconds, memory beyond a limit, or an attempt to run something ends it with the file that did
it.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import resource
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import sparsekern as sk
from sparsekern.cli.inspect import describe_state
from sparsekern.files.conversion import bsr_state, dense_state
from sparsekern.files.weight_files import read_state
from sparsekern.lab import Config, checkpoint
from sparsekern.lab.data import load
from sparsekern.lab.store import CONFIG, create, read_config, read_json

MEMORY = 2**31
"""Bytes of address space beyond what the imports take."""

SECONDS = 10

FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "os.mkdir", "os.remove"}
"""What a reader has no business to do; names of Python's audit events."""


class Harm:
    """Makes a folder if it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


@dataclass(frozen=True)
class Reader:
    """A reader, and valid files to start from.

    Attributes:
        name: for the counts.
        read: gets the folder in which the file is.
        file: its name there.
        seeds: contents.
    """

    name: str
    read: Callable[[Path], object]
    file: str
    seeds: tuple[bytes, ...]


def _arrays() -> dict[str, Any]:
    drawn = numpy.random.default_rng(0)
    return {
        "train_images": drawn.integers(0, 256, (6, 4, 4), "uint8"),
        "train_labels": numpy.arange(6) % 3,
        "test_images": drawn.integers(0, 256, (3, 4, 4), "uint8"),
        "test_labels": numpy.arange(3) % 3,
    }


def _bytes(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def _idx(array: Any) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype("uint8").tobytes()


def _tar(content: bytes, mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name in ("train.bin", "test.bin"):
            entry = tarfile.TarInfo(f"cifar-100-binary/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def _weights(folder: Path, name: str) -> bytes:
    torch.manual_seed(0)
    model = nn.Sequential(sk.SparseLinear(8, 6, block_size=(4, 3), sparsity=0.5, seed=0), nn.Linear(6, 2))
    sk.save(model, folder / name)
    return (folder / name).read_bytes()


def _use(state: Any) -> None:
    describe_state(state)
    dense_state(state)


def readers(base: Path) -> list[Reader]:
    """Return all readers; what their valid files lie beside is written below ``base``."""
    arrays = _arrays()
    npz = tuple(_bytes(lambda f, save=save: save(f, **arrays)) for save in (numpy.savez, numpy.savez_compressed))
    (folder := base / "idx").mkdir()
    images, labels = _idx(arrays["train_images"]), _idx(arrays["train_labels"])
    for name, content in (("train-labels-idx1", labels), ("t10k-images-idx3", images), ("t10k-labels-idx1", labels)):
        (folder / f"{name}-ubyte").write_bytes(content)
    (base / "cifar").mkdir()
    records = numpy.random.default_rng(0).integers(0, 100, (4, 3074), "uint8").tobytes()
    (base / "cifar" / "test.bin").write_bytes(records)
    for name in ("npz", "safetensors", "torch", "idx.gz", "tar", "state", "config", "json"):
        (base / name).mkdir()
    for path in (base / "idx").iterdir():
        (base / "idx.gz" / path.name).write_bytes(path.read_bytes())
    data = {"name": "x", "train_images": 6, "test_images": 3, "classes": 2, "image_shape": [1, 4, 4], "sha256": ""}
    create(run := base / "run", Config(epochs=3).resolved(6), data, {"torch": "1"})
    config = (run / CONFIG).read_bytes()
    model = nn.Sequential(sk.SparseLinear(8, 6, block_size=(4, 3), sparsity=0.5, seed=0))
    even = sk.SparseLinear(4, 4, block_size=2, sparsity=0.5, seed=0)
    bsr = _bytes(lambda f: torch.save(bsr_state(nn.Sequential(even).state_dict()), f))
    hostile = _bytes(lambda f: torch.save({"a": Harm()}, f))
    state = {"rows": [], "finished": False, "history": None, "t": torch.arange(50)}
    step = checkpoint.save(base / "made", 5, {"sparse": model.state_dict()}, state)
    (base / "state" / "sparse.safetensors").write_bytes((step / "sparse.safetensors").read_bytes())
    torch_seeds = (_weights(base, "a.pt"), bsr, hostile)
    return [
        Reader("npz", lambda f: load(str(f / "a.npz")), "a.npz", npz),
        Reader("idx", lambda f: load(str(f)), "train-images-idx3-ubyte", (images,)),
        Reader("idx.gz", lambda f: load(str(f)), "train-images-idx3-ubyte.gz", (gzip.compress(images, mtime=0),)),
        Reader("cifar", lambda f: load(str(f)), "train.bin", (records,)),
        Reader("tar", lambda f: load(str(f / "a.tar.gz")), "a.tar.gz", (_tar(records, "w:gz"), _tar(records, "w"))),
        Reader("safetensors", lambda f: _use(read_state(f / "a")), "a", (_weights(base, "a.safetensors"),)),
        Reader("torch", lambda f: _use(read_state(f / "a")), "a", torch_seeds),
        Reader("state", checkpoint.load_state, checkpoint.STATE, ((step / checkpoint.STATE).read_bytes(), hostile)),
        Reader("config", read_config, CONFIG, (config,)),
        Reader("json", lambda f: read_json(f / "results.json"), "results.json", (config, b"[" * 10**6)),
    ]


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["cut", "flip", "write", "insert", "delete", "double", "ones"]),
        st.floats(0, 1, exclude_max=True),
        st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 8, bytes(4), b'{"a":', b"[", b"-1"])),
    ),
    max_size=5,
)


def edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Return the content after some edits, each at a place that is a fraction of its length."""
    for what, place, piece in edits:
        at = int(place * len(content))
        if what == "cut":
            content = content[:at]
        elif what == "flip":
            content = content[:at] + bytes([content[at] ^ piece[0]]) + content[at + 1 :] if content else content
        elif what == "write":
            content = content[:at] + piece + content[at + len(piece) :]
        elif what == "insert":
            content = content[:at] + piece + content[at:]
        elif what == "delete":
            content = content[:at] + content[at + 16 * len(piece) :]
        elif what == "double":
            content = content[:at] + content[at : at + 64] + content[at:]
        else:
            content = content[:at] + b"\xff" * 4 + content[at + 4 :]
    return content


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just(10**400)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@st.composite
def documents(draw: Any, content: bytes) -> bytes:
    """Draw a JSON document like ``content``, in which some values are others, or gone."""
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        inner = document
        while isinstance(inner, dict) and inner:
            key = draw(st.sampled_from(sorted(inner)))
            if not isinstance(inner[key], dict) or not inner[key] or draw(st.booleans()):
                if draw(st.integers(0, 5)):
                    inner[key] = draw(PLAIN)
                else:
                    del inner[key]
                break
            inner = inner[key]
    return json.dumps(document).encode()


class Hang(BaseException):
    """A reader took too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """End a call that takes too long."""

    def stop(number: int, frame: object) -> None:
        raise Hang(f"over {SECONDS} seconds")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def soak(inputs: int, number: int, base: Path) -> Counter[str]:
    """Give each reader ``inputs`` files; returns how many it was given, took and refused."""
    counted: Counter[str] = Counter()
    reading = [False]

    def watch(event: str, arguments: object) -> None:
        if reading[0] and event in FORBIDDEN:
            reading[0] = False
            raise AssertionError(f"a reader did {event}{arguments}")

    sys.addaudithook(watch)
    for reader in readers(base):
        folder = base / reader.name

        def trial(content: bytes, *, reader: Reader, folder: Path) -> None:
            (folder / reader.file).write_bytes(content)
            counted[f"{reader.name} given"] += 1
            reading[0] = True
            try:
                with bounded():
                    reader.read(folder)
                counted[f"{reader.name} taken"] += 1
            except ValueError as error:
                if not str(error).strip() or "\n" in str(error):
                    raise AssertionError(f"not one sentence: {error!r}") from error
                counted[f"{reader.name} refused"] += 1
            finally:
                assert reading[0], "a reader did what it must not, and hid it"
                reading[0] = False

        for content in reader.seeds:
            trial(content, reader=reader, folder=folder)
        contents = st.one_of(st.binary(max_size=64), st.builds(edited, st.sampled_from(reader.seeds), EDITS))
        if reader.file.endswith(".json"):
            contents = st.one_of(contents, documents(reader.seeds[0]), documents(reader.seeds[0]))

        def one(content: bytes) -> None:
            trial(content, reader=reader, folder=folder)  # noqa: B023  it runs within this turn of the loop

        run = seed(number)(given(contents)(one))
        settings(
            max_examples=inputs,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )(run)()
        if not counted[f"{reader.name} taken"]:
            raise AssertionError(f"{reader.name}: not even the valid file was taken")
        given_, taken = (counted[f"{reader.name} {what}"] for what in ("given", "taken"))
        print(f"{reader.name:12} {given_:7} files, {taken:6} taken, {given_ - taken:7} refused", flush=True)
    return counted


def main() -> None:
    """Read the options, fuzz, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3000, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import sklearn  # noqa: F401  what is imported later would count as a reader's memory
    from safetensors import torch as _  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sparsekern readers ") as folder:
        os.chdir(folder)
        counted = soak(options.inputs, options.seed, Path(folder))
    total = sum(count for what, count in counted.items() if what.endswith(" given"))
    print(f"{total} files, {time.perf_counter() - began:.0f} s: each was read, or refused in one sentence")


if __name__ == "__main__":
    main()
