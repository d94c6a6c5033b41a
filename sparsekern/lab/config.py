"""What a run is asked to do: one frozen record, checked once, and its form in ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT
from sparsekern.lab.formats import LARGEST
from sparsekern.lab.options import OPTIONS, Value, check_options
from sparsekern.lab.recipes import RECIPES, find
from sparsekern.lab.tasks import AUGMENTATIONS
from sparsekern.topology import check_sparsity
from sparsekern.training import METHODS, PRESETS, Method

FORMAT_VERSION = 3
"""Of every JSON file in a run folder. Older ones are read, see :data:`ADDED`."""

ADDED: dict[int, dict[str, Any]] = {
    2: {"recipe": "mlp", "width_multiplier": 1.0, "augment": "none"},
    3: {"preset": None, "options": {}},
}
"""The entries of a configuration that each format added, with what a run without them did."""

SMALL_DATA = 10_000
"""Training images up to which a data set counts as small, and gets more epochs by default."""

STOP = 0.75
"""Fraction of the training after which no block moves, so that the last grown ones have time to learn."""

METHOD = "set"
"""The method where neither it nor a preset is given."""

OF_RECIPE: Any = None
"""The default of an option that the recipe, or the preset, decides. It does so at once: no Config holds this, but for
``width``."""


@dataclass(frozen=True)
class Config:
    """The options of one run. Those that are None are chosen by :meth:`resolved`.

    Attributes:
        recipe: a name in :data:`sparsekern.lab.recipes.RECIPES`. It decides what is not given: ``block_size``,
            ``width``, ``batch_size``, ``rate`` and ``seeds``.
        data: None for scikit-learn's digits, or a path that :func:`sparsekern.lab.data.load` takes.
        data_max_gib: GiB of memory that the data may ask for. Large files may ask for 16 times their own size.
        sparsity: fraction of the hidden weights that is absent, in [0, 1).
        block_size: side of the blocks.
        method: a name in :data:`sparsekern.training.METHODS`. Default: the preset's, or SET.
        preset: a name in :data:`sparsekern.training.PRESETS`: a publication's options, where none are given.
        options: of the method, by the names of :data:`sparsekern.lab.options.OPTIONS`.
        width: features of the three hidden layers of the MLP; None for other networks.
        width_multiplier: times the published channels of other networks; 1 for the MLP.
        augment: how images are varied, a name in :data:`sparsekern.lab.tasks.AUGMENTATIONS`. Default: the
            recipe's, but ``"none"`` for grey images.
        epochs: passes over the training set. Default: the recipe's; of the MLP 20, or 5 with more than 10 000 images.
        batch_size: images a step.
        rate: the learning rate at its highest.
        update_every: steps between moves of blocks. Default: the preset's; or about eight moves, at most as far apart
            as the recipe says.
        seeds: number of runs; run ``i`` has seed ``i``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:<n>"``. Default: CUDA where there is one.
        dense: whether the dense twin is trained too.
        sparse: whether the sparse network is trained. Without it only the twin is.

    Raises:
        ValueError: a value out of range; the text names it, the rule and the way out.
    """

    recipe: str = next(iter(RECIPES))
    data: str | None = None
    data_max_gib: float = DEFAULT.gib
    sparsity: float = 0.9
    block_size: int = OF_RECIPE
    method: str = OF_RECIPE
    preset: str | None = None
    options: Mapping[str, Value] = field(default_factory=dict)
    width: int | None = OF_RECIPE
    width_multiplier: float = 1.0
    augment: str | None = None
    epochs: int | None = None
    batch_size: int = OF_RECIPE
    rate: float = OF_RECIPE
    update_every: int | None = None
    seeds: int = OF_RECIPE
    device: str | None = None
    dense: bool = True
    sparse: bool = True

    def __post_init__(self) -> None:
        for name in ("recipe", "method", "preset", "augment"):
            if not isinstance(value := getattr(self, name), (str, type(None))):
                raise InputError(f"{name} is {value!r}; it must be a name", parameter=name)
        self._ask_recipe()
        for name in ("block_size", "width", "epochs", "batch_size", "update_every", "seeds"):
            value = getattr(self, name)
            optional = name in ("epochs", "update_every", "width")
            if not (optional and value is None) and (type(value) is not int or not 1 <= value <= LARGEST):
                bounds = "1 or more" if type(value) is not int or value < 1 else f"1 to {LARGEST}"
                raise InputError(f"{name} is {value!r}; it must be a whole number of {bounds}", parameter=name)
        for name in ("sparsity", "rate", "width_multiplier", "data_max_gib"):
            if type(value := getattr(self, name)) not in (int, float):
                raise InputError(f"{name} is {value!r}; it must be a number", parameter=name)
        check_sparsity(self.sparsity)
        if self.width is not None and self.block_size > self.width:
            raise InputError(
                f"block_size is {self.block_size}, larger than the layers of width {self.width}; "
                "choose smaller blocks or a larger width",
                parameter="block_size",
            )
        for name in ("rate", "width_multiplier", "data_max_gib"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise InputError(f"{name} is {value}; it must be a number above 0", parameter=name)
        if self.augment is not None and self.augment not in AUGMENTATIONS:
            raise InputError(
                f"augment is {self.augment!r}; it must be one of {', '.join(AUGMENTATIONS)}", parameter="augment"
            )
        self._ask_method()
        if not (self.data is None or isinstance(self.data, str)):
            raise InputError(
                f"data is {self.data!r}; it must be a path, or nothing for the digits of scikit-learn", parameter="data"
            )
        for name in ("dense", "sparse"):
            if type(value := getattr(self, name)) is not bool:
                raise InputError(f"{name} is {value!r}; it must be true or false", parameter=name)
        if not self.networks:
            raise InputError("dense and sparse are false, which leaves nothing to train; drop one of them")
        if self.options and not self.sparse:
            raise InputError(
                f"{', '.join(self.options)} would change nothing: only the dense twin is trained; "
                f"drop {'it' if len(self.options) == 1 else 'them'}, or train the sparse network too"
            )
        if self.device is not None:
            _check_device(self.device)

    def _ask_recipe(self) -> None:
        """Fill in what was not given; raise ValueError if there is no such recipe, or its network has no such width."""
        recipe = find(self.recipe)
        if recipe.width is None and self.width is not None:
            raise InputError(
                f"width is {self.width}, but recipe {recipe.name} has none; give a width_multiplier", parameter="width"
            )
        if recipe.width is not None and self.width_multiplier != 1:
            raise InputError(
                f"width_multiplier is {self.width_multiplier}, but recipe {recipe.name} has none; give a width",
                parameter="width_multiplier",
            )
        for name in ("block_size", "width", "batch_size", "rate", "seeds"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(recipe, name))  # frozen from here on

    def _ask_method(self) -> None:
        """Let the preset name the method; raise ValueError if they disagree, or an option is not the method's."""
        if self.preset is not None and self.preset not in PRESETS:
            raise InputError(f"preset is {self.preset!r}; it must be one of {', '.join(PRESETS)}", parameter="preset")
        implied = METHOD if self.preset is None else _name_of(PRESETS[self.preset].method)
        if self.method is OF_RECIPE:
            object.__setattr__(self, "method", implied)
        if self.method not in METHODS:
            raise InputError(f"method is {self.method!r}; it must be one of {', '.join(METHODS)}", parameter="method")
        if self.preset is not None and self.method != implied:
            raise InputError(
                f"preset is {self.preset!r}, whose method is {implied}, but method is {self.method!r}",
                parameter="preset",
            )
        if not isinstance(self.options, dict):
            raise InputError(
                f"options is {self.options!r}; it must be a dictionary of names and values", parameter="options"
            )
        object.__setattr__(self, "options", check_options(self.method, self.options))

    def part(self, part: str) -> dict[str, Value]:
        """Return the given options that one part takes; see :class:`sparsekern.lab.options.Option`."""
        return {name: value for name, value in self.options.items() if OPTIONS[name].part == part}

    @property
    def method_title(self) -> str:
        """How blocks move, in words, such as "gse, distribution grabo"; without what is only recorded."""
        given = {name: value for name, value in self.options.items() if OPTIONS[name].part != "record"}
        return ", ".join((self.preset or self.method, *(_words(name, value) for name, value in given.items())))

    @property
    def network_title(self) -> str:
        """What is trained, in words, such as "MLP of width 1024"."""
        title = find(self.recipe).title
        if self.width is not None:
            return f"{title} of width {self.width}"
        return title if self.width_multiplier == 1 else f"{title}, {self.width_multiplier:g} times as wide"

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, in the order in which they are trained."""
        return ("sparse",) * self.sparse + ("dense",) * self.dense

    def resolved(self, images: int, channels: int) -> Config:
        """Return the configuration with nothing left open, for a training set of that many images and channels."""
        recipe = find(self.recipe)
        epochs = self.epochs or recipe.epochs or (20 if images <= SMALL_DATA else 5)
        batches = math.ceil(images / self.batch_size)
        usual = min(recipe.update_every, max(1, int(STOP * epochs * batches / 8)))
        return replace(
            self,
            epochs=epochs,
            augment=self.augment or (recipe.augmentation if channels > 1 else "none"),
            update_every=self.update_every or self._of_preset(batches) or usual,
            device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def _of_preset(self, batches: int) -> int | None:
        """Return what the preset says of ``update_every``, in an epoch of that many batches."""
        if self.preset is None:
            return None
        chosen = PRESETS[self.preset]
        return batches if chosen.once_an_epoch else chosen.options.get("update_every")

    @property
    def kept_dense(self) -> tuple[str, ...]:
        """Names of the layers that stay dense: the recipe's, but for those that the preset's publication makes sparse.

        A recipe names its first such layer first.
        """
        names = find(self.recipe).kept_dense
        dense = "ends" if self.preset is None else PRESETS[self.preset].dense
        return {"ends": names, "first": names[:1], "none": ()}[dense]

    @property
    def sparse_title(self) -> str:
        """Which layers are sparse, in words, such as "hidden layers"."""
        return {0: "all layers", 1: "all layers but the first"}.get(len(self.kept_dense), "hidden layers")

    def to_json(self) -> dict[str, Any]:
        """Return plain values that :meth:`from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Config:
        """Read what :meth:`to_json` returned.

        Raises:
            ValueError: a name too many or too few, or a value out of range.
        """
        names = {entry.name for entry in fields(cls)}
        if values.keys() != names:
            wrong = ", ".join(name if name.isidentifier() else repr(name) for name in sorted(names ^ values.keys()))
            raise InputError(f"the configuration has other entries than this version of sparsekern knows: {wrong}")
        return cls(**values)


def _words(name: str, value: Value) -> str:
    """Return an option in words: "drop fraction 0.1"; one that is on by its name alone, one that is off with a no."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value}"


def upgraded(values: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Return a configuration of an older format as one of today's; ``sparse`` and
    ``data_max_gib`` came while the format was 3 already.

    Args:
        values: what :meth:`Config.to_json` returned then.
        version: the format of the file.
    """
    missing: dict[str, Any] = {"sparse": True, "data_max_gib": DEFAULT.gib}
    for number, entries in ADDED.items():
        if number > version:
            missing |= entries
    return missing | dict(values)


def _name_of(method: type[Method]) -> str:
    return next(name for name, known in METHODS.items() if known is method)


def _check_device(name: str) -> None:
    try:
        kind = torch.device(name).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in ("cpu", "cuda"):
        raise InputError(f"device is {name!r}; it must be cpu, cuda or cuda:<number>", parameter="device")


def usable_device(name: str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: this machine, or this installation of PyTorch, does not have it.
    """
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; use cpu",
            parameter="device",
        )
    return device
