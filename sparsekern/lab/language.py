"""Language modelling: a decoder learns to expect the next byte of a text."""

from __future__ import annotations

import bisect
import hashlib
import math
import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern.errors import InputError
from sparsekern.lab.models import GPT
from sparsekern.lab.models.gpt import generate
from sparsekern.lab.tasks import BITS_PER_BYTE, Batch, Task

if TYPE_CHECKING:
    from sparsekern.lab.recipes import Recipe

VOCABULARY = 256
"""A token is a byte."""

HELD_OUT = 0.1
"""Of the bytes, at least; of the standard library's source too."""

SNIFFED = 8000
"""Bytes at the start of a file in which a zero byte says that it is not text, as git judges."""

NOT_SOURCE = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
"""Folders of the standard library that some installations lack, or that are not it."""


@dataclass(frozen=True)
class Piece:
    """A part of a file: ``length`` bytes from ``start`` on."""

    path: Path
    start: int
    length: int


class Text:
    """Pieces of files as one sequence of bytes, with a zero byte between two pieces.

    Args:
        pieces: in order; none is empty.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        self._ends = list(accumulate(piece.length + 1 for piece in self.pieces))

    def __len__(self) -> int:
        """Return the number of bytes, those between the pieces included."""
        return self._ends[-1] - 1

    def read(self, start: int, length: int) -> bytes:
        """Return ``length`` bytes from ``start`` on.

        Raises:
            ValueError: a file became shorter since it was found.
        """
        parts = []
        number = bisect.bisect_right(self._ends, start)
        while length > 0:
            piece = self.pieces[number]
            offset = start - (self._ends[number] - piece.length - 1)
            wanted = min(length, piece.length - offset)
            with piece.path.open("rb") as file:
                file.seek(piece.start + offset)
                part = file.read(wanted)
            if len(part) != wanted:
                raise InputError(f"{piece.path} became shorter while it was read; restore it", parameter="data")
            if wanted < length:
                part += b"\0"
            parts.append(part)
            start, length, number = start + len(part), length - len(part), number + 1
        return b"".join(parts)

    def windows(self, starts: Tensor, length: int) -> Tensor:
        """Return ``(N, length)`` int64: that many bytes from each of ``starts (N,)``, int64, on."""
        content = bytearray().join(self.read(start, length) for start in starts.tolist())
        return torch.frombuffer(content, dtype=torch.uint8).view(-1, length).long()

    def random_starts(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        """Return the first bytes of windows of that length, ``(count,)`` int64, drawn uniformly."""
        return torch.randint(len(self) - length + 1, (count,), generator=generator)

    def even_windows(self, count: int, length: int) -> Tensor:
        """Return ``(N, length)`` int64 from evenly spaced places without overlap; N is at most ``count``."""
        places = min(count, len(self) // length)
        return self.windows(torch.arange(places) * (len(self) // places), length)

    def digest(self) -> str:
        """Return the SHA-256 of the bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            with piece.path.open("rb") as file:
                file.seek(piece.start)
                left = piece.length
                while left and (part := file.read(min(left, 2**20))):
                    digest.update(part)
                    left -= len(part)
            digest.update(b"\0")
        return digest.hexdigest()


class Noise(Text):
    """Random bytes in place of a text of that length, to measure a network on.

    Args:
        length: number of bytes.
    """

    def __init__(self, length: int) -> None:
        super().__init__([Piece(Path("noise"), 0, length)])

    def read(self, start: int, length: int) -> bytes:
        """Return ``length`` bytes that ``start`` decides."""
        generator = torch.Generator().manual_seed(start)
        return bytes(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


@dataclass(frozen=True)
class Corpus:
    """A text in two parts.

    Attributes:
        name: for titles.
        train, held_out: the parts; a network is measured on the second, which it never trains on.
    """

    name: str
    train: Text
    held_out: Text

    def describe(self) -> dict[str, Any]:
        """Return what ``config.json`` says about the data."""
        return {
            "name": self.name,
            "train_bytes": len(self.train),
            "held_out_bytes": len(self.held_out),
            "files": len({piece.path for part in (self.train, self.held_out) for piece in part.pieces}),
            "sha256": self._sha256,
        }

    @cached_property
    def _sha256(self) -> str:
        """Of both parts. A run asks for it at its beginning and its end, and it reads the whole text."""
        return hashlib.sha256((self.train.digest() + self.held_out.digest()).encode()).hexdigest()


def load_text(path: str | None) -> Corpus:
    """Find a text.

    Args:
        path: a file, a folder, whose files are found at any depth; None for the standard library's source of the
            Python that runs.

    Raises:
        ValueError: there is no text, or it is binary.
    """
    source = Path(sysconfig.get_path("stdlib")) if path is None else Path(path)
    if source.is_file():
        return _of_file(source)
    if source.is_dir():
        return _of_folder(source, standard_library=path is None)
    raise InputError(f"data is {path}, which does not exist; give a file of text or a folder", parameter="data")


def _of_file(path: Path) -> Corpus:
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"data is {path}, which is empty; give a file of text", parameter="data")
    if not _is_text(path):
        raise InputError(
            f"data is {path}, which is binary: it has a zero byte near its start; give a file of text, such as UTF-8",
            parameter="data",
        )
    cut = size - max(1, round(HELD_OUT * size))
    return Corpus(path.name, Text([Piece(path, 0, cut)]), Text([Piece(path, cut, size - cut)]))


def _of_folder(folder: Path, *, standard_library: bool) -> Corpus:
    """Split a folder by file: the first by the hash of their names, up to a tenth of the bytes, are held out."""
    found = []
    skipped = NOT_SOURCE if standard_library else frozenset()
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for name in names:
            path = Path(root, name)
            if name.startswith(".") or (standard_library and path.suffix != ".py") or not path.is_file():
                continue
            if (size := path.stat().st_size) and _is_text(path):
                found.append((path.relative_to(folder).as_posix(), Piece(path, 0, size)))
    if len(found) < 2:
        raise InputError(
            f"data is {folder}, which has {len(found)} files of text; a folder is split by file and needs 2 or more: "
            "give a file, or another folder",
            parameter="data",
        )
    by_hash = sorted(found, key=lambda item: hashlib.sha256(item[0].encode(errors="surrogateescape")).digest())
    total, held, cut = sum(piece.length for _, piece in found), 0, 0
    while held < HELD_OUT * total and cut < len(by_hash) - 1:
        held += by_hash[cut][1].length
        cut += 1
    name = "the Python standard library" if standard_library else folder.resolve().name
    parts = [
        Text([piece for _, piece in sorted(part, key=lambda item: item[0])]) for part in (by_hash[cut:], by_hash[:cut])
    ]
    return Corpus(name, *parts)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(SNIFFED)


EXAMPLES = 1600
"""Windows of an epoch: drawn anew each time, as a text has no natural number of them."""

MEASURED = 256
"""Windows of the held-out text on which a network is measured, the same ones each time."""

EVALUATION_BATCH = 32

PROMPT, WRITTEN, TEMPERATURE = 64, 512, 0.8
"""Bytes of the held-out text that a sample begins with, bytes that the network writes, and how boldly."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Language(Task):
    """The next byte of a text, judged by the bits per byte of the held-out part.

    Attributes:
        corpus: the text.
        context: bytes that the network sees.
        device: of the batches.
    """

    metric = BITS_PER_BYTE

    corpus: Corpus
    context: int = 128
    device: torch.device = CPU

    @classmethod
    def load(cls, path: str | None, max_gib: float) -> Language:
        """Find the text; it is read from the disk as it is needed, whatever ``max_gib`` says."""
        return cls(load_text(path))

    @classmethod
    def noise(cls, described: Mapping[str, Any], examples: int) -> Language:
        """Return a task of random bytes."""
        return cls(Corpus("noise", Noise(described["train_bytes"]), Noise(described["held_out_bytes"])))

    @staticmethod
    def examples_of(described: Mapping[str, Any]) -> int:
        """Return the number of windows of an epoch."""
        return EXAMPLES

    @property
    def examples(self) -> int:  # type: ignore[override]
        """Number of windows of an epoch."""
        return EXAMPLES

    def describe(self) -> dict[str, Any]:
        """Return name, sizes and checksum of the text."""
        return self.corpus.describe()

    def prepared(self, recipe: Recipe, network: Mapping[str, Any], augment: str, device: torch.device) -> Language:
        """Return the task with the network's context.

        Raises:
            ValueError: a part of the text is shorter than the context and the byte after it, or it is to be varied.
        """
        if augment != "none":
            raise InputError(f"augment is {augment}, but text is not varied; drop the option", parameter="augment")
        context = network["context"]
        for part, text in (("train", self.corpus.train), ("held-out", self.corpus.held_out)):
            if len(text) < context + 1:
                raise InputError(
                    f"data is {self.corpus.name}, whose {part} part has {max(0, len(text))} bytes; a context of "
                    f"{context} needs {context + 1} or more: give more text, or a shorter context",
                    parameter="data",
                )
        return replace(self, context=context, device=device)

    def model_arguments(self) -> dict[str, Any]:
        """Return the number of tokens."""
        return {"vocabulary": VOCABULARY}

    def order(self, generator: torch.Generator) -> Tensor:
        """Return the first bytes of the windows of an epoch ``(N,)``, drawn uniformly."""
        return self.corpus.train.random_starts(EXAMPLES, self.context + 1, generator)

    def batch(self, order: Tensor, number: int, size: int, generator: torch.Generator) -> Batch:
        """Return bytes and the bytes that follow them, both ``(B, context)`` int64."""
        starts = order[number * size : (number + 1) * size]
        return self._pair(self.corpus.train.windows(starts, self.context + 1))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy ``()`` in nats."""
        inputs, targets = batch
        return cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Return the bits per byte of evenly spaced windows of the held-out text."""
        windows = self.corpus.held_out.even_windows(MEASURED, self.context + 1)
        nats = sum(
            float(self.loss(model, self._pair(part))) * part.shape[0] for part in windows.split(EVALUATION_BATCH)
        )
        return {"bits_per_byte": nats / windows.shape[0] / math.log(2)}

    def tokens(self, examples: int) -> int:
        """Return the bytes that the network predicts in that many windows."""
        return examples * self.context

    def written(self, model: nn.Module) -> str:
        """Return a text that begins as the held-out one does and that the network goes on with."""
        assert isinstance(model, GPT)
        prompt = self.corpus.held_out.windows(torch.zeros(1, dtype=torch.int64), PROMPT)[0].to(self.device)
        written = torch.cat((prompt, generate(model, prompt, WRITTEN, temperature=TEMPERATURE)))
        return bytes(written.tolist()).decode(errors="replace")

    def _pair(self, windows: Tensor) -> Batch:
        windows = windows.to(self.device)
        return windows[:, :-1], windows[:, 1:]
