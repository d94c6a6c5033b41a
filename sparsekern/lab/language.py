"""Language modelling: a decoder learns to expect the next byte of a text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsekern.errors import InputError
from sparsekern.lab.metric import BITS_PER_BYTE
from sparsekern.lab.models import GPT
from sparsekern.lab.models.gpt import generate
from sparsekern.lab.tasks import Batch, Task
from sparsekern.lab.text import VOCABULARY, Corpus, Noise, load_text

if TYPE_CHECKING:
    from sparsekern.lab.recipes import Recipe

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

    def augmentation(self, recipe: Recipe) -> str:
        """Return that text is not varied."""
        return "none"

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

    def sample(self) -> Tensor:
        """Return a text ``(1, context)``, int64."""
        return torch.zeros(1, self.context, dtype=torch.int64)

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
