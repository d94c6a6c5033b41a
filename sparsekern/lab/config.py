"""Configuration of a run: the options as they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fractions import Fraction
from typing import Any

import torch

from sparsekern.errors import InputError
from sparsekern.files.size_limits import DEFAULT
from sparsekern.lab.options import (
    LARGEST,
    NETWORK_OPTIONS,
    OPTIONS,
    STOP,
    Value,
    check_options,
    declared,
    in_words,
)
from sparsekern.lab.papers import find_paper
from sparsekern.lab.recipes import RECIPES, find
from sparsekern.lab.tasks import AUGMENTATIONS, Task
from sparsekern.topology import check_sparsity
from sparsekern.training import METHODS, PRESETS, Lottery, Preset

SMALL_DATA = 10_000
"""Training examples up to which a data set counts as small and is trained on for more epochs by default."""

METHOD = "set"
"""The method if neither it nor a preset is given."""

TITLED = ("depth", "context")
"""Options of a network that its title names."""

OF_RECIPE: Any = None
"""Default of an option that the recipe or the preset decides as soon as the configuration is made."""


@dataclass(frozen=True)
class Config:
    """The options of one run. The command shows what is said of them here.

    Those that are None are decided when the data are known, by :func:`sparsekern.lab.resolved.resolve`.

    Attributes:
        recipe: network and training; ``sparsekern train --list`` shows what there is. It decides what is not given.
        data: of a GPT a text file or a folder of them. Of other recipes an .npz file (train_images, train_labels,
            test_images, test_labels), CIFAR (binary version) as a folder or .tar.gz, or a folder of IDX files or of
            these arrays as .npy files, which stay on the disk. Default: the digits of scikit-learn; of a GPT the source
            of the standard library.
        data_max_gib: GiB of memory that the data may ask for. Large files may ask for 16 times their own size.
        sparsity: fraction of the sparse layers' weights that is absent, in [0, 1); or one for each kind of layers of
            the recipe, others staying dense.
        block_size: side of the blocks.
        method: how blocks move. Default: the preset's, or set.
        preset: a publication's method and options, which count where no others are given.
        paper: a publication's whole training, such as gse-cifar10-resnet56-98; ``--list`` shows all. It decides what is
            not given, and what differs from it is said.
        options: options of the method, by the names of :data:`sparsekern.lab.options.OPTIONS`.
        width: features of the hidden layers of the MLP, or of the GPT; None for other networks.
        width_multiplier: factor of the published channels of other networks; 1 for the MLP.
        augment: how images are varied. Default: the recipe's; of grey images none.
        epochs: passes over the training set; of a text, 1600 windows each. Default: the recipe's; of the MLP 20, or 5
            with more than 10 000 images.
        batch_size: images or texts a step.
        rate: learning rate at its highest.
        update_every: steps between updates of the topology. Default: the preset's; or about eight updates, at most as
            far apart as the recipe says.
        seeds: number of runs; run ``i`` has seed ``i``.
        network: options of the network, by the names of :data:`sparsekern.lab.options.NETWORK_OPTIONS`.
        accumulate: parts of a batch whose gradients are computed one after the other.
        precision: of the products, by autocast.
        device: where to train: cpu, cuda or cuda:<number>. Default: CUDA where there is one.
        dense: train the dense twin too.
        sparse: train the sparse network. Without it only the twin is trained.

    Raises:
        ValueError: a value out of range, or options that contradict each other.
    """

    recipe: str = next(iter(RECIPES))
    data: str | None = None
    data_max_gib: float = DEFAULT.gib
    sparsity: float | Mapping[str, float] = OF_RECIPE
    block_size: int = OF_RECIPE
    method: str = OF_RECIPE
    preset: str | None = None
    paper: str | None = None
    options: Mapping[str, Value] = field(default_factory=dict)
    width: int | None = OF_RECIPE
    width_multiplier: float = 1.0
    augment: str | None = None
    epochs: int | None = None
    batch_size: int = OF_RECIPE
    rate: float = OF_RECIPE
    update_every: int | None = None
    seeds: int = OF_RECIPE
    network: Mapping[str, Value] = field(default_factory=dict)
    accumulate: int = 1
    precision: str = "float32"
    device: str | None = None
    dense: bool = True
    sparse: bool = True

    def __post_init__(self) -> None:
        RUN_OPTIONS["recipe"].check(self.recipe)
        if self.paper is not None:
            find_paper(self.paper)
        for name in FROM_RECIPE:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(find(self.recipe), name))  # frozen from here on
        self._ask_method()
        for name, option in RUN_OPTIONS.items():
            if name != "sparsity":
                option.check(getattr(self, name))
        self._check_sparsity()
        self._check_network()
        if self.accumulate > self.batch_size:
            raise InputError(
                f"accumulate is {self.accumulate}, more than the {self.batch_size} examples of a batch; "
                "choose a smaller number or a larger batch_size",
                parameter="accumulate",
            )
        if self.width is not None and self.block_size > self.width:
            raise InputError(
                f"block_size is {self.block_size}, larger than the layers of width {self.width}; "
                "choose smaller blocks or a larger width",
                parameter="block_size",
            )
        if not self.networks:
            raise InputError("dense and sparse are false, which leaves nothing to train; drop one of them")
        if self.options and not self.sparse:
            raise InputError(
                f"{', '.join(self.options)} would change nothing: only the dense twin is trained; "
                f"drop {'it' if len(self.options) == 1 else 'them'}, or train the sparse network too"
            )
        if self.device is not None:
            check_device(self.device)

    def _check(self, name: str, right: bool, rule: str) -> None:
        if not right:
            raise InputError(f"{name} is {getattr(self, name)!r}; it must be {rule}", parameter=name)

    def _check_sparsity(self) -> None:
        kinds = find(self.recipe).kinds
        numbers = self.sparsity
        if not isinstance(numbers, Mapping):
            numbers = {"": numbers}
        elif not numbers or not numbers.keys() <= kinds.keys():
            known = f"has {', '.join(kinds)}" if kinds else "has none: give one number"
            raise InputError(
                f"sparsity is given for {', '.join(map(str, numbers)) or 'no kind of layers'}; recipe {self.recipe} "
                f"{known}",
                parameter="sparsity",
            )
        for number in numbers.values():
            self._check("sparsity", type(number) in (int, float), "a number")
            check_sparsity(number)

    def _ask_method(self) -> None:
        """Take the method from the preset; raise ValueError if they disagree, or an option is not the method's."""
        RUN_OPTIONS["preset"].check(self.preset)
        implied = "static" if isinstance(self.options, Mapping) and "rewind" in self.options else METHOD
        if self.publication is not None:
            implied = next(name for name, known in METHODS.items() if known is self.publication.method)
        if self.method is OF_RECIPE:
            object.__setattr__(self, "method", implied)
        RUN_OPTIONS["method"].check(self.method)
        if self.publication is not None and self.method != implied:
            raise InputError(
                f"preset is {self.preset!r}, whose method is {implied}, but method is {self.method!r}",
                parameter="preset",
            )
        self._check("options", isinstance(self.options, dict), "a dictionary of names and values")
        object.__setattr__(self, "options", check_options(self.method, self.options))

    def _check_network(self) -> None:
        """Raise ValueError if the recipe's network has no such width or option."""
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
        if self.width is not None and self.width % recipe.width_step:
            raise InputError(
                f"width is {self.width}; for recipe {recipe.name} it must be a multiple of {recipe.width_step}",
                parameter="width",
            )
        self._check("network", isinstance(self.network, dict), "a dictionary of names and values")
        for name, value in self.network.items():
            if name not in recipe.network:
                has = f"has {', '.join(recipe.network)}" if recipe.network else "has no such options"
                raise InputError(f"{name} is {value}, but recipe {recipe.name} {has}; drop it", parameter=name)
            NETWORK_OPTIONS[name].check(value)
        if isinstance(self.sparsity, Mapping) and "head" in self.sparsity and not self.network.get("free_head"):
            raise InputError(
                "sparsity is given for the head, whose weight is the token embedding's; give it its own by free_head",
                parameter="sparsity",
            )

    @property
    def method_title(self) -> str:
        """How blocks move, such as "gse, distribution grabo"; without options that only record something."""
        given = [in_words(name, value) for name, value in self.options.items() if OPTIONS[name].part != "record"]
        return ", ".join((self.preset or self.method, *given))

    @property
    def network_title(self) -> str:
        """What is trained, in words, such as "MLP of width 1024"."""
        recipe = find(self.recipe)
        title = recipe.title
        if self.width is not None:
            own = [
                in_words(name, value) for name, value in {**recipe.network, **self.network}.items() if name in TITLED
            ]
            return ", ".join((f"{title} of width {self.width}", *own))
        return title if self.width_multiplier == 1 else f"{title}, {self.width_multiplier:g} times as wide"

    @property
    def sparsity_slug(self) -> str:
        """The sparsity for the name of a folder, such as "0.9" or "mlp0.9-attention0.7"."""
        if isinstance(self.sparsity, Mapping):
            return "-".join(f"{kind}{s:g}" for kind, s in self.sparsity.items())
        return f"{self.sparsity:g}"

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks, in the order in which they are trained."""
        return ("sparse",) * self.sparse + ("dense",) * self.dense

    @property
    def rounds(self) -> int:
        """Number of trainings of the sparse network."""
        return int(self.options.get("rewind_rounds", Lottery.usual_rounds)) if "rewind" in self.options else 1

    def rewound(self, unit: int = 1) -> int:
        """Return how far all rounds but the first begin, in whole parts of an epoch that has ``unit`` of them."""
        return math.floor(Fraction(str(self.options.get("rewind", 0))) * (self.epochs or 0) * unit)

    def epochs_of(self, network: str) -> int:
        """Return the epochs of a network in all rounds, none of them open."""
        epochs = self.epochs or 0
        return epochs if network == "dense" else epochs + (self.rounds - 1) * (epochs - self.rewound())

    @property
    def publication(self) -> Preset | None:
        """What the preset says, or None without one."""
        return None if self.preset is None else PRESETS[self.preset]

    @property
    def kept_dense(self) -> tuple[str, ...]:
        """Names of the layers that stay dense: the recipe's, but for those that the preset's publication makes sparse.

        A recipe names its first such layer first.
        """
        names = find(self.recipe).kept_dense
        dense = "ends" if self.publication is None else self.publication.dense
        return {"ends": names, "first": names[:1], "none": ()}[dense]

    @property
    def sparse_title(self) -> str:
        """Which layers are sparse, in words, such as "hidden layers"."""
        return {0: "all layers", 1: "all layers but the first"}.get(len(self.kept_dense), "hidden layers")

    def resolved(self, examples: int, augmentation: str = "none") -> Config:
        """Return the configuration with nothing left open.

        Args:
            examples: size of the training set.
            augmentation: how the task varies these data by default.
        """
        recipe = find(self.recipe)
        epochs = self.epochs or recipe.epochs or (20 if examples <= SMALL_DATA else 5)
        batches = math.ceil(examples / self.batch_size)
        update_every = min(recipe.update_every, max(1, int(STOP * epochs * batches / 8)))
        if (chosen := self.publication) is not None:
            if chosen.once_an_epoch:
                update_every = batches
            elif (published := chosen.options.get("update_every")) is not None:
                whole = None if self.paper is None else recipe.epochs
                update_every = published if whole is None else max(1, round(published * epochs / whole))
        return replace(
            self,
            epochs=epochs,
            augment=self.augment or augmentation,
            update_every=self.update_every or update_every,
            device=self.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        )

    def load(self) -> Task:
        """Load the data; see :meth:`sparsekern.lab.tasks.Task.load`."""
        return find(self.recipe).task.load(self.data, self.data_max_gib)

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


def check_device(name: object) -> None:
    """Raise ValueError unless it is the name of a device on which the lab computes."""
    try:
        right = torch.device(name).type in ("cpu", "cuda")  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        right = False
    if not right:
        raise InputError(f"device is {name!r}; it must be cpu, cuda or cuda:<number>", parameter="device")


FROM_RECIPE = ("block_size", "width", "batch_size", "rate", "seeds", "sparsity")
"""What a recipe decides unless it is given."""

_COUNT: dict[str, Any] = {"low": 1, "high": LARGEST}
_POSITIVE: dict[str, Any] = {"low": 0, "above": True}
_RULES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("block_size", "width", "epochs", "batch_size", "update_every", "seeds", "accumulate"), _COUNT),
    **dict.fromkeys(("rate", "width_multiplier", "data_max_gib"), _POSITIVE),
    "method": {"choices": tuple(METHODS)},
    "preset": {"choices": tuple(PRESETS)},
    "augment": {"choices": AUGMENTATIONS},
    "precision": {"choices": ("float32", "bfloat16")},
}

RUN_OPTIONS = {option.name: replace(option, **_RULES.get(option.name, {})) for option in declared(Config)}
"""The options of a run by name, but for those of its method and network."""
