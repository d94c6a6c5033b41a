"""Published trainings, for ``--paper``: values of a configuration, and how a run differs from the publication.

A name such as ``gse-cifar10-resnet56-98`` is method, data, network, and sparsity in per cent. A :class:`Family` says
which of them go together: the network with its schedule is a recipe, the method with its options a preset. The data
are those that the user gives.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from sparsekern.errors import InputError
from sparsekern.lab.options import OPTIONS, in_words, percent
from sparsekern.lab.recipes import find

if TYPE_CHECKING:
    from sparsekern.lab.config import Config


@dataclass(frozen=True)
class PublishedData:
    """Data of publications.

    Attributes:
        title: their name.
        shape: channels, height and width of an image.
        classes: of the images.
    """

    title: str
    shape: tuple[int, int, int]
    classes: int


DATA = {
    "cifar10": PublishedData("CIFAR-10", (3, 32, 32), 10),
    "cifar100": PublishedData("CIFAR-100", (3, 32, 32), 100),
    "imagenet": PublishedData("ImageNet", (3, 224, 224), 1000),
}


@dataclass(frozen=True)
class Family:
    """Trainings of a publication that differ in method, data, network and sparsity.

    Attributes:
        source: the publication.
        methods: values of a configuration by the first part of a name.
        data: names in :data:`DATA`.
        networks: recipes by the third part of a name.
        sparsities: in per cent.
        deviations: what is done differently here, besides what ``docs/methods.md`` says of the method.
    """

    source: str
    methods: Mapping[str, Mapping[str, Any]]
    data: tuple[str, ...]
    networks: Mapping[str, str]
    sparsities: tuple[int, ...]
    deviations: tuple[str, ...] = ()

    @property
    def pattern(self) -> str:
        """The names, with what to choose from in braces."""
        parts = (self.methods, self.data, self.networks, [str(number) for number in self.sparsities])
        return "-".join(next(iter(part)) if len(part) == 1 else f"{{{','.join(part)}}}" for part in parts)

    def papers(self) -> Iterator[Paper]:
        """Yield the trainings."""
        for method, data, network, number in product(self.methods, self.data, self.networks, self.sparsities):
            values = {"recipe": self.networks[network], "sparsity": number / 100, "block_size": 1}
            yield Paper(f"{method}-{data}-{network}-{number}", self, DATA[data], values | dict(self.methods[method]))


@dataclass(frozen=True)
class Paper:
    """A training of a publication.

    Attributes:
        name: for ``--paper``.
        family: the family that it belongs to.
        data: the data that it trains on.
        values: of a :class:`~sparsekern.lab.Config`.
    """

    name: str
    family: Family
    data: PublishedData
    values: Mapping[str, Any]


_DENSE = {"options": {"allow_dense_scores": True}}  # single weights have as many scores as a dense weight
_AGENT = {"agent": True}
_DRAWN = "values of sparse layers begin with PyTorch's variance, 1 / (3 fan_in); theirs with Kaiming He's"
_OF_VGG = f"of vgg16, {_DRAWN}"
_CROPS = "no random resized crops: images come in one size"

FAMILIES = (
    Family(
        "Heddes 2024 (GSE)",
        {name: {"preset": name} for name in ("gse", "gse-grabo", "gse-graest")},
        ("cifar10", "cifar100"),
        {"resnet56": "resnet56-gse", "vgg16": "vgg16-small", "vit": "simplevit-gse"},
        (90, 95, 98),
        ("candidates are scored on the batch of the step; theirs on ten more images a class",),
    ),
    Family(
        "Heddes 2024 (GSE)",
        {"gse": {"preset": "gse-imagenet"}},
        ("imagenet",),
        {"resnet50": "resnet50"},
        (90,),
        ("rate, batch and update interval are Evci's (RigL) and CIFAR's: theirs are not published", _CROPS),
    ),
    Family(
        "Evci 2020 (RigL)",
        {"rigl": {"preset": "rigl"} | _DENSE, "set": {"preset": "set-rigl"}},
        ("cifar10",),
        {"wrn22": "wrn-22-2"},
        (50, 80, 90, 95),
    ),
    Family(
        "Evci 2020 (RigL)",
        {"rigl": {"preset": "rigl"} | _DENSE, "set": {"preset": "set-rigl"}},
        ("imagenet",),
        {"resnet50": "resnet50"},
        (80, 90, 95),
        ("256 images a step at a rate of 0.1, theirs 4096 at 1.6", _CROPS, _DRAWN),
    ),
    Family(
        "Liu 2021 (ITOP)",
        {"set-itop": {"preset": "set-itop"}, "rigl-itop": {"preset": "rigl-itop"} | _DENSE},
        ("cifar10", "cifar100"),
        {"vgg16": "vgg16", "resnet34": "resnet34-cifar"},
        (95, 99),
        (_OF_VGG,),
    ),
    Family(
        "Lei 2024 (AGENT), around ITOP",
        {
            "agent-set-itop": {"preset": "set-itop", "options": _AGENT},
            "agent-rigl-itop": {"preset": "rigl-itop", "options": _DENSE["options"] | _AGENT},
        },
        ("cifar10",),
        {"vgg16": "vgg16", "resnet34": "resnet34-cifar"},
        (99,),
        (_OF_VGG,),
    ),
    Family(
        "Lei 2024 (AGENT), around RigL",
        {"agent-rigl": {"preset": "rigl", "options": _DENSE["options"] | _AGENT}},
        ("cifar10",),
        {"wrn22": "wrn-22-2"},
        (90, 99),
        ("all training images are used; theirs without the tenth kept for validation",),
    ),
    Family(
        "Zhou 2021 (VR-PGE)",
        {"vrpge": {"preset": "vrpge"}, "vrpge-code": {"preset": "vrpge-code"}},
        ("cifar10", "cifar100"),
        {"resnet32": "resnet32-double"},
        (50,),
        (
            "the stem stays dense; theirs learns its filters, too",
            "fine-tuning goes on in batches of 256, theirs are of 128",
            "rates of weights and probabilities fall step by step, theirs epoch by epoch",
        ),
    ),
    Family(
        "Thangarasa 2024 (Sparse-IFT)",
        {
            f"sparse-ift-{name}": {
                "preset": "rigl-sparse-ift",
                "options": _DENSE["options"] | {"transform": name},
            }
            for name in ("wide", "parallel", "factorized", "doped")
        },
        ("cifar100",),
        {"resnet18": "resnet18-cifar"},
        (50, 75, 90),
        ("FLOPs are those of the dense network exactly; theirs up to 2 % off",),
    ),
    Family(
        "Thangarasa 2024 (Sparse-IFT)",
        {
            f"sparse-ift-{name}": {
                "preset": "rigl-sparse-ift",
                "options": _DENSE["options"] | {"transform": name},
            }
            for name in ("wide", "parallel")
        },
        ("imagenet",),
        {"resnet18": "resnet18"},
        (50, 75, 90),
        (_CROPS, "in float32, theirs in mixed precision"),
    ),
)

PAPERS = {paper.name: paper for family in FAMILIES for paper in family.papers()}
"""All trainings by name."""


def find_paper(name: object) -> Paper:
    """Return a training by its name.

    Raises:
        ValueError: there is none; the text names the nearest.
    """
    if isinstance(name, str) and name in PAPERS:
        return PAPERS[name]
    near = difflib.get_close_matches(str(name), PAPERS, n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise InputError(f"paper is {name!r}, which is unknown; {hint}--list shows all", parameter="paper")


def with_paper(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration that were given, completed by those of the paper that they name.

    Args:
        values: of :class:`~sparsekern.lab.Config`. They take precedence over the paper's; a method or preset among them
            replaces the paper's preset and its options.

    Raises:
        ValueError: there is no such paper, another recipe than the paper's is given, or data are missing.
    """
    if "paper" not in values:
        return dict(values)
    paper = find_paper(values["paper"])
    published = dict(paper.values)
    if values.get("recipe", published["recipe"]) != published["recipe"]:
        raise InputError(
            f"recipe is {values['recipe']}, but paper {paper.name} trains {published['recipe']}; drop one of them",
            parameter="recipe",
        )
    if "data" not in values:
        raise InputError(
            f"data is missing: paper {paper.name} trains on {paper.data.title}; give it, or other images",
            parameter="data",
        )
    options = published.pop("options", {})
    if values.get("sparse") is False:
        options = {}
    if "method" in values or "preset" in values:
        published.pop("preset")
        options = {name: value for name, value in options.items() if OPTIONS[name].part != "method"}
    options = {**options, **values.get("options", {})}
    return {**published, **values, **({"options": options} if options else {})}


def deviations(config: Config, described: Mapping[str, Any]) -> list[str]:
    """Return the differences between a run and its paper, as texts; none without a paper.

    Args:
        config: of the run, nothing left open.
        described: its data, as in ``config.json``.
    """
    if config.paper is None:
        return []
    paper, recipe = find_paper(config.paper), find(config.recipe)
    shown = type(config)(**paper.values)
    published = shown.resolved(described["train_images"], recipe.augmentation)
    found = [*paper.family.deviations]
    if config.block_size != 1:
        found.insert(0, f"blocks of {config.block_size}x{config.block_size} in place of single weights")
    if config.epochs != published.epochs:
        found.append(f"epochs {config.epochs} in place of {published.epochs}; schedules and updates are in proportion")
        published = replace(shown, epochs=config.epochs, paper=config.paper).resolved(
            described["train_images"], recipe.augmentation
        )
    if tuple(described["image_shape"]) != paper.data.shape or described["classes"] != paper.data.classes:
        size = " x ".join(str(number) for number in described["image_shape"])
        found.append(f"{described['name']} ({size}, {described['classes']} classes) in place of {paper.data.title}")
    if config.method_title != published.method_title:
        found.append(f"{config.method_title} in place of {published.method_title}")
    if config.sparsity != published.sparsity:
        found.append(f"sparsity {percent(config.sparsity)} in place of {percent(published.sparsity)}")
    for name in ("batch_size", "rate", "width_multiplier", "augment", "update_every", "precision", "accumulate"):
        mine, theirs = getattr(config, name), getattr(published, name)
        if mine != theirs:
            found.append(f"{in_words(name, mine)} in place of {theirs}")
    return found
