"""Types of the files of a run folder.

A run folder may come from anywhere, so every file is checked against its type once, when it is read. Nothing in a file
is executed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.lab.options import LARGEST
from sparsekern.lab.tasks import METRICS

FORMAT_VERSION = 4
"""Version of every file in a run folder. Files of other versions are refused."""

KEYS = tuple(metric.key for metric in METRICS)
"""Entries of a network's metric, by task."""

IMAGES, TEXT = "<images>", "<text>"
"""Kinds of data. Errors do not name them."""


def _number(value: Any) -> Any:
    if type(value) not in (int, float):  # pydantic takes whatever can be made one, as a tensor can
        raise InputError("input should be a valid number")
    return value


Number = Annotated[float, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Seconds = Annotated[Number, Field(ge=0)]
Name = Literal["sparse", "dense"]
Pair = Annotated[Sequence[Positive], Field(min_length=2, max_length=2)]


class Part(BaseModel):
    """A dictionary with entries of given types. Entries with other names are accepted.

    Attributes:
        one_of: names of entries of which there is one; none if it is empty.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, arbitrary_types_allowed=True)

    one_of: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="after")
    def _has_one(self) -> Part:
        if self.one_of and sum(getattr(self, name) is not None for name in self.one_of) != 1:
            raise InputError(f"it must have one of {', '.join(self.one_of)}")
        return self


class Graphs(Part):
    """Spectral measures of the layers after a step."""

    step: Count
    layers: dict[str, dict[str, Number | None]]


class Row(Part):
    """A row of ``metrics.jsonl``. Entries that a method adds are numbers."""

    __pydantic_extra__: dict[str, Number]

    one_of = KEYS
    seed: Count
    network: Name
    epoch: Positive
    step: Count
    loss: Number
    test_accuracy: Fraction | None = None
    bits_per_byte: Seconds | None = None
    ms_per_step: Seconds | None
    seconds: Seconds
    spectral: list[Graphs] = []


class Text(Part):
    """Description of a text."""

    name: str
    train_bytes: Positive
    held_out_bytes: Positive
    files: Positive
    sha256: str


class Images(Part):
    """Description of a data set of images."""

    name: str
    train_images: Positive
    test_images: Positive
    classes: Positive
    image_shape: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    sha256: str


def _kind_of_data(described: Any) -> str:
    return TEXT if isinstance(described, Mapping) and "train_bytes" in described else IMAGES


Data = Annotated[
    Annotated[Images, Tag(IMAGES)] | Annotated[Text, Tag(TEXT)],
    Discriminator(_kind_of_data),
]
"""Description of the data, as their task returns it."""


class Environment(Part):
    """Versions and hardware of a training."""

    device: str
    threads: Positive
    kernels: str
    ranks: Positive = 1


class Sizes(Part):
    """Parameters and bytes that a network stores."""

    network_sparsity: Fraction
    stored_parameters: Positive
    training_bytes: Positive


class Scores(Part):
    """A metric, or the seconds of all steps of a training, over the seeds."""

    mean: Seconds
    standard_deviation: Seconds | None = None
    by_seed: Annotated[list[Seconds], Field(min_length=1)]


class Times(Part):
    """Median and quartiles; None where there are too few epochs."""

    median: Annotated[Number, Field(gt=0)] | None
    low: Seconds | None
    high: Seconds | None
    highest: Seconds | None

    @model_validator(mode="after")
    def _all_or_none(self) -> Times:
        if (self.low is None) != (self.high is None) or (self.median is None) != (self.highest is None):
            raise InputError("low and high, and median and highest, are both numbers or both null")
        if self.median is None and self.low is not None:
            raise InputError("quartiles without a median")
        return self


class Network(Sizes):
    """The results of one network."""

    one_of = KEYS
    sparsity: Fraction
    seconds: Scores
    test_accuracy: Scores | None = None
    bits_per_byte: Scores | None = None
    ms_per_step: Times
    tokens_per_second: Annotated[Number, Field(gt=0)] | None = None
    written: str | None = None


class EqualTime(Part):
    """Metrics of the two networks after the same seconds of training; None before the first evaluation."""

    seconds: Seconds
    sparse: Number | None
    dense: Number | None


class Comparison(Part):
    """The sparse network against its dense twin."""

    one_of = tuple(metric.gap for metric in METRICS)
    accuracy_gap: Number | None = None
    accuracy_gap_standard_error: Seconds | None = None
    bits_per_byte_gap: Number | None = None
    bits_per_byte_gap_standard_error: Seconds | None = None
    at_equal_time: EqualTime
    parameters_dense_over_sparse: Annotated[Number, Field(gt=0)]
    bytes_dense_over_sparse: Annotated[Number, Field(gt=0)]
    time_sparse_over_dense: Times


class Results(Part):
    """``results.json``."""

    config: Any
    data: Data
    environment: Environment
    networks: Annotated[dict[Name, Network], Field(min_length=1)]
    comparison: Comparison | None = None

    @model_validator(mode="after")
    def _compares_two(self) -> Results:
        if self.comparison is not None and len(self.networks) < 2:
            raise InputError("there is a comparison of one network")
        keys = {key for network in self.networks.values() for key in KEYS if getattr(network, key) is not None}
        if len(keys) > 1:
            raise InputError("its networks have different metrics")
        if len({len(getattr(network, key).by_seed) for network in self.networks.values() for key in keys}) > 1:
            raise InputError("its networks are of different numbers of seeds")
        return self


class CostFile(Part):
    """``cost.json`` of a cell of a comparison."""

    cost: Annotated[dict[Literal["training_flops", "peak_bytes"], Annotated[int, Field(ge=0)]], Field(min_length=2)]


class ContestantEntries(Part):
    """A contestant of a comparison."""

    method: str | None
    preset: str | None
    options: dict[str, Any]


class PlanEntries(Part):
    """Plan of a comparison."""

    base: dict[str, Any]
    contestants: list[ContestantEntries]
    sparsities: list[Number | dict[str, Number]]
    block_sizes: list[Positive]
    dense: bool


Kind = TypeVar("Kind", bound=Part)


def checked(kind: type[Kind], value: Any, where: Path | str, way_out: str | None = None) -> Kind:
    """Return a value as the type that it must have.

    Args:
        kind: the type.
        value: content of a file.
        where: name of the file, for the error.
        way_out: advice at the end of the error. Default: none; the caller gives it.

    Raises:
        ValueError: the value is of another type; the text says which entry is wrong, and how.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False)[0]
        entry = ".".join(str(step) for step in wrong["loc"] if step not in (IMAGES, TEXT)) or "it"
        words = wrong["msg"].removeprefix("Value error, ")
        text = f"{where} is damaged: {entry}: {words[:1].lower()}{words[1:]}"
        raise InputError(text if way_out is None else f"{text}; {way_out}") from None


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
    early_loss_sum: Number
    round: Count
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
