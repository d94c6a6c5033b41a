"""Types of the state in a checkpoint of a run, tensors included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.lab.formats import Count, Graphs, Name, Number, Pair, Part, Positive, Row, Seconds, Sizes

PIXELS = 2**20
"""Most pixels of a block map in a film; those that are written have far fewer."""

Counts = Annotated[Sequence[Count], Field(min_length=2, max_length=2)]


def _plain(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dim() != 1 or not tensor.is_contiguous():
        raise InputError("it must be a tensor of one axis")
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.uint8:
        raise InputError(f"it is {tensor.dtype}, and must be torch.uint8")
    return tensor


Bytes = Annotated[Tensor, AfterValidator(_plain), AfterValidator(_bytes)]


class FilmedLayer(Part):
    """A layer of a film."""

    shape: Pair
    tile: Positive
    rows: Positive
    cols: Positive
    kernel: Pair | None
    groups: Positive
    block: Pair

    @model_validator(mode="after")
    def _small(self) -> FilmedLayer:
        if math.prod(self.shape) > PIXELS:
            raise InputError(f"a block map of {' x '.join(map(str, self.shape))} pixels is larger than {PIXELS}")
        return self


class FilmFrame(Part):
    """A frame of a film."""

    step: Count
    update: Count
    images: dict[str, Bytes]
    blocks: dict[str, Counts]


class Film(Part):
    """State of a :class:`~sparsekern.lab.history.History`."""

    every: Positive
    layers: dict[str, FilmedLayer]
    start: dict[str, Bytes]
    frames: Annotated[list[FilmFrame], Field(min_length=1)]

    @model_validator(mode="after")
    def _same_layers(self) -> Film:
        parts: list[dict[str, Any]] = [self.start]
        parts += [part for frame in self.frames for part in (frame.images, frame.blocks)]
        if any(part.keys() != self.layers.keys() for part in parts):
            raise InputError("its frames are of other layers")
        return self


class LearnerState(Part):
    """State of a :class:`~sparsekern.lab.train.Learner`."""

    epoch: Count
    batch: Count
    steps: Count
    loss_sum: Number
    seconds: Seconds
    milliseconds: list[Seconds]
    graphs: list[Graphs]
    optimizer: dict[str, Any]
    method: dict[str, Any] | None


class State(Part):
    """``state.pt`` of a checkpoint. A finished seed has ``sizes``, an unfinished one ``learners``."""

    rows: list[Row]
    finished: bool
    history: Film | None
    sizes: dict[Name, Sizes] = Field(default_factory=dict)
    written: dict[Name, str] = Field(default_factory=dict)
    learners: dict[Name, LearnerState] = Field(default_factory=dict)
