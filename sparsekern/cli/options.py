"""The options that say what is trained and how, for every command that trains."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.config import PRECISIONS
from sparsekern.lab.options import NETWORK_OPTIONS, OPTIONS, STOP, Option
from sparsekern.lab.recipes import RECIPES
from sparsekern.lab.tasks import AUGMENTATIONS
from sparsekern.training import AGENT, METHODS
from sparsekern.transforms import transform


def option(text: str, default: object, *names: str) -> Any:
    """Return an option that is None unless it is given: its default is that of :class:`~sparsekern.lab.Config`."""
    return typer.Option(*names, help=text, show_default=str(default))


def given(**values: Any) -> dict[str, Any]:
    """Return the values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def expanded(command: Callable[..., None], name: str, annotations: Mapping[str, Any]) -> Callable[..., None]:
    """Give a command options in the place of one parameter; it receives those that were given as a dictionary.

    Typer reads a command's signature: that of what this returns has the options where ``command`` has ``name``.

    Args:
        command: with the parameter.
        name: of the parameter.
        annotations: of the options, by name, each with None for its default.
    """
    signature = inspect.signature(command, eval_str=True)
    everything: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        here: Sequence[inspect.Parameter] = [parameter]
        if parameter.name == name:
            kind = inspect.Parameter.KEYWORD_ONLY
            here = [inspect.Parameter(n, kind, default=None, annotation=a) for n, a in annotations.items()]
        everything += [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in here]

    @functools.wraps(command)
    def with_options(**values: Any) -> None:
        mine = given(**{option: values.pop(option) for option in annotations})
        command(**values, **{name: mine})

    with_options.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in everything}
    return with_options


MLP = Config()
"""The default recipe, whose values the help shows."""


def of_recipe(name: str) -> str:
    """Return how the help shows the default of what the recipe decides."""
    return f"the recipe's; {MLP.recipe}: {getattr(MLP, name)}"


def absolute(path: str | None) -> str | None:
    """Return a path that means the same from another folder."""
    return None if path is None else str(Path(path).expanduser().resolve())


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command :data:`RUN_OPTIONS`; it receives those that were given as one dictionary ``values``."""
    return expanded(command, "values", RUN_OPTIONS)


RUN_OPTIONS: dict[str, Any] = {
    "recipe": Annotated[
        str | None,
        option("Network and training; `sparsekern train --list` shows what there is.", MLP.recipe, "--recipe"),
    ],
    "data": Annotated[
        str | None,
        option(
            "Of gpt a text file or a folder of them. Of other recipes an .npz file (train_images, train_labels, "
            "test_images, test_labels), CIFAR (binary version) as a folder or .tar.gz, or a folder of IDX files.",
            "scikit-learn's digits; gpt: the standard library's source",
        ),
    ],
    "data_max_gib": Annotated[
        float | None,
        option("GiB that the data may ask for; large files may ask for 16 times their own size.", Config.data_max_gib),
    ],
    "width": Annotated[int | None, option("Features of the hidden layers of the mlp, or of the gpt.", MLP.width)],
    "width_multiplier": Annotated[
        float | None, option("Times the published channels of any other network.", MLP.width_multiplier)
    ],
    "augment": Annotated[
        str | None, option(f"How images are varied: {', '.join(AUGMENTATIONS)}.", "the recipe's; grey images: none")
    ],
    "epochs": Annotated[
        int | None,
        option(
            "Passes over the training set; of a text, 1600 windows each.",
            "the recipe's; mlp: 20, or 5 with more than 10 000 images",
        ),
    ],
    "batch_size": Annotated[int | None, option("Images or texts a step.", of_recipe("batch_size"))],
    "accumulate": Annotated[
        int | None, option("Parts of a batch whose gradients are computed one after the other.", Config.accumulate)
    ],
    "precision": Annotated[str | None, option(f"Autocast to this: {', '.join(PRECISIONS)}.", Config.precision)],
    "rate": Annotated[float | None, option("Learning rate at its highest.", of_recipe("rate"))],
    "update_every": Annotated[
        int | None,
        option("Steps between moves of blocks.", "about 8 moves, at most as far apart as the recipe says"),
    ],
    "seeds": Annotated[int | None, option("Number of seeds to train.", of_recipe("seeds"))],
    "device": Annotated[str | None, option("cpu, cuda or cuda:<number>.", "cuda where there is one")],
    "dense": Annotated[bool | None, option("Train the dense twin too.", "dense", "--dense/--no-dense")],
}
"""By name: entries of a :class:`~sparsekern.lab.Config` that every command takes that trains."""

Json = Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress, only the results.")]


PANEL = "Options of methods"

WRAPPERS: dict[str, Callable[..., Any]] = {"agent": AGENT, "transform": transform}
"""What takes the options of a part, whose names begin with that of the part."""


def takes_network_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of networks; it receives those that were given as one dictionary ``network``."""
    annotations = {}
    for name, entry in NETWORK_OPTIONS.items():
        defaults = {recipe.name: recipe.network[name] for recipe in RECIPES.values() if name in recipe.network}
        text = entry.text if not entry.choices else f"{entry.text.removesuffix('.')}: {', '.join(entry.choices)}."
        shown = "; ".join(f"{recipe}: {str(value).lower()}" for recipe, value in defaults.items())
        annotations[name] = Annotated[
            entry.kind | None, typer.Option(help=text, show_default=shown, rich_help_panel="Options of networks")
        ]
    return expanded(command, "network", annotations)


def takes_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command every option of the table; it receives those that were given as one dictionary ``options``."""
    return expanded(command, "options", {option.name: _annotation(option) for option in OPTIONS.values()})


def _annotation(option: Option) -> Any:
    text = f"{option.text} [{option.owners}]"
    if option.choices:
        text = f"{option.text.removesuffix('.')}: {', '.join(option.choices)}. [{option.owners}]"
    shown = typer.Option(help=text.replace("[", r"\["), show_default=_default(option), rich_help_panel=PANEL)
    return Annotated[option.kind | None, shown]


def _default(option: Option) -> str | bool:
    """Return the default that the constructors have, or False where it is no plain value."""
    if option.name == "stop":
        return f"{STOP:g}"
    if option.part in WRAPPERS:
        own = inspect.signature(WRAPPERS[option.part]).parameters.get(option.name.removeprefix(f"{option.part}_"))
        return False if own is None or own.default is None else str(own.default)
    defaults = {name: _of_constructor(option.name, name) for name in option.methods}
    plain = {name: str(value) for name, value in defaults.items() if value is not None}
    if not plain:
        return False
    first = next(iter(plain.values()))
    return "; ".join([first, *(f"{name}: {value}" for name, value in plain.items() if value != first)])


def _of_constructor(argument: str, method: str) -> object:
    for cls in METHODS[method].__mro__[:-1]:
        parameter = inspect.signature(cls).parameters.get(argument)
        if parameter is not None:
            return parameter.default
        if hasattr(cls, argument):  # such as ``pool``
            return getattr(cls, argument)
    return None


def sparsity_of(texts: Sequence[str] | None) -> float | dict[str, float] | None:
    """Return what ``--sparsity 0.9`` or ``--sparsity mlp=0.9 --sparsity attention=0.7`` says.

    Raises:
        InputError: no number, or several that name no kinds of layers.
    """
    if not texts:
        return None
    by_kind: dict[str, float] = {}
    for text in texts:
        kind, _, number = text.rpartition("=")
        try:
            by_kind[kind] = float(number)
        except ValueError:
            raise InputError(
                f"sparsity is {text!r}; it must be a number such as 0.9, or one for a kind of layers such as mlp=0.9",
                parameter="sparsity",
            ) from None
    if len(by_kind) < len(texts) or ("" in by_kind and len(texts) > 1):
        raise InputError(
            f"sparsity is given {len(texts)} times; give one number, or one for each kind of layers such as mlp=0.9",
            parameter="sparsity",
        )
    return by_kind.get("", by_kind)
