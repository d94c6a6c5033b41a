"""The options of methods and networks, from which a configuration, the command line and the checks come.

A method declares its options itself: they are the keyword arguments of its constructor, with their defaults and their
text in its docstring.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsekern.errors import InputError
from sparsekern.lab.models.gpt import ACTIVATIONS, POSITIONS
from sparsekern.nn.block_scores import SCORES
from sparsekern.training import AGENT, METHODS, VRPGE, Gradual, GraNet
from sparsekern.transforms import TRANSFORMS, transform

STOP = 0.75
"""Fraction of the training after which no block moves, so that the last grown ones have time to learn."""

LARGEST = 2**31 - 1
"""Largest count that is accepted."""

Value = bool | int | float | str

ALL = tuple(METHODS)

SET_BY_RUN = {"seed", "update_every", "sparsity", "final_sparsity", "costs", "check_ranks"}
"""Arguments of a method that are no options of it: a run sets them, or they name layers."""

KINDS: dict[str, type[Any]] = {"bool": bool, "int": int, "float": float, "str": str, "Group": str, "list[str]": list}
"""Kinds of values that can be given as text, by their annotations."""

ENTRY = re.compile(r"^    (\w+(?:, \w+)*): (.+(?:\n {8}.+)*)", re.MULTILINE)
"""An argument in a docstring and what is said of it."""

MARKUP = re.compile(r":\w+:`~?(?:\w+\.)*(\w+)`|`+")


@dataclass(frozen=True)
class Option:
    """What may be said about a run, on the command line as ``--name``.

    Attributes:
        name: of the argument that takes it.
        kind: ``bool``, ``int``, ``float``, ``str``, or ``list`` for texts.
        text: what it does, for the help.
        default: what it is if it is not given, for the help; empty if the text says it.
        methods: names of the methods that have it.
        choices: what a text may be.
        low, high: bounds of a number that nobody else checks; a method checks its own.
        above: whether ``low`` itself is out of bounds.
        optional: whether None is a value too.
        part: who takes it: ``"method"``, its constructor; ``"recipe"``, what builds network and method around it. A
            wrapper of methods or a transform of the network has a part of its own, with which its options begin.
    """

    name: str
    kind: type[Any]
    text: str
    default: str = ""
    methods: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    optional: bool = False
    part: str = "method"

    @property
    def owners(self) -> str:
        """Which methods have it, in words."""
        return "all methods" if self.methods == ALL else ", ".join(self.methods)

    def check(self, value: object) -> None:
        """Raise ValueError if the value is of another kind, none of the choices, or out of bounds."""
        if value is None and self.optional:
            return
        right = type(value) in ((int, float) if self.kind is float else (self.kind,))
        right = right and (not self.choices or value in self.choices)
        if right and isinstance(value, (int, float)):
            right = math.isfinite(value) and self.low <= value <= self.high and not (self.above and value == self.low)
        if not right:
            raise InputError(f"{self.name} is {value!r}; it must be {self._rule(value)}", parameter=self.name)

    def _rule(self, value: object) -> str:
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        if self.low == -math.inf:
            return words
        if self.high < LARGEST or (type(value) is int and value > self.high):
            return f"{words} from {self.low:g} to {self.high:.12g}"
        return f"{words} above {self.low:g}" if self.above else f"{words} of {self.low:g} or more"

    def parse(self, text: str) -> Value:
        """Return what a text such as ``"0.3"`` or ``"yes"`` says.

        Raises:
            ValueError: it is of another kind.
        """
        value: Value = text
        if self.kind is bool:
            value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text, text)
        elif self.kind is not str:
            try:
                value = self.kind(text)
            except ValueError:
                value = text
        self.check(value)
        return value


def declared(owner: Callable[..., Any]) -> Iterator[Option]:
    """Yield the options that a function or a class declares: what its signature and its docstring say of arguments.

    Arguments that cannot be given as text are left out.
    """
    about = {
        name: " ".join(MARKUP.sub(r"\1", words).split())
        for names, words in ENTRY.findall(inspect.cleandoc(owner.__doc__ or ""))
        for name in names.split(", ")
    }
    for name, parameter in inspect.signature(owner).parameters.items():
        kinds = str(parameter.annotation).split(" | ")
        kind = next((KINDS[word] for word in kinds if word in KINDS), None)
        if kind is not None:
            text = about.get(name, "")
            default = "" if parameter.default in (None, parameter.empty) else str(parameter.default)
            yield Option(name, kind, text[:1].upper() + text[1:], default, optional="None" in kinds)


def _of_methods() -> dict[str, Option]:
    """Return what the constructors of the methods declare, with the methods that have it and its defaults."""
    found: dict[str, Option] = {}
    for method, cls in METHODS.items():
        constructors = (base for base in reversed(cls.__mro__) if "__init__" in vars(base))
        own = {option.name: option for base in constructors for option in declared(base)}
        for name, option in own.items():
            if name not in {*SET_BY_RUN, *cls.unused_options}:
                before = found.setdefault(name, replace(option, default=""))
                defaults = [before.default] if before.default else []
                if option.default not in ("", before.default.partition(";")[0]):
                    defaults.append(f"{method}: {option.default}" if defaults else option.default)
                found[name] = replace(before, methods=(*before.methods, method), default="; ".join(defaults))
    return found


def _of_part(part: str, owner: Callable[..., Any], names: Sequence[str] = ()) -> dict[str, Option]:
    """Return what a wrapper of methods declares, or those ``names`` of it, with the name of the part before them."""
    named = {option.name: option for option in declared(owner) if option.name in names or not names}
    return {
        f"{part}_{name}": replace(option, name=f"{part}_{name}", methods=ALL, part=part)
        for name, option in named.items()
    }


GAIN = ("rigl", "gse", "mest", "dsr")
"""Methods in which layers may gain blocks."""

_OTHERS = (
    Option("start", float, "Fraction of the training before which no block moves.", "0", ALL, low=0, high=1),
    Option("stop", float, "Fraction of the training after which no block moves.", f"{STOP}", ALL, low=0, high=1),
    Option(
        "capacity",
        float,
        "Slots for each block; free ones let layers gain some.",
        "",
        GAIN,
        low=1,
        part="recipe",
    ),
    Option(
        "pool",
        float,
        "Stored blocks for each one that is to remain.",
        f"{VRPGE.pool}",
        ("vrpge", "top-kast"),
        low=1,
        part="recipe",
    ),
    Option(
        "initial_sparsity",
        float,
        "Sparsity of the layers in the beginning.",
        f"{Gradual.initial_sparsity:g}; granet: {GraNet.initial_sparsity:g}",
        ("gradual", "granet"),
        low=0,
        high=1,
        part="recipe",
    ),
    Option(
        "score",
        str,
        "Start from the blocks of a dense network that have the highest score, on the first batch. Those of snip, "
        "grasp and synflow compete over all layers. Without it, blocks are drawn.",
        "",
        ALL,
        SCORES,
        part="recipe",
    ),
    Option(
        "rewind",
        float,
        "Train lottery tickets: rounds that get sparser, all but the first from this fraction of the training on.",
        "",
        ("static",),
        low=0,
        high=1,
        part="rewind",
    ),
    Option("rewind_rounds", int, "Rounds, the last one at the sparsity.", "3", ("static",), low=2, part="rewind"),
    Option("rewind_from", float, "Sparsity of the first round.", "0", ("static",), low=0, high=1, part="rewind"),
    Option(
        "rewind_scope",
        str,
        "Among what the weakest blocks go: all layers, or each layer.",
        "global",
        ("static",),
        ("global", "layer"),
        part="rewind",
    ),
    Option("transform", str, "Spend the sparsity on capacity (Sparse-IFT).", "", ALL, TRANSFORMS, part="transform"),
    Option("spectral", bool, "Measure at each update how well blocks connect a layer.", "", ALL, part="record"),
    Option("agent", bool, "Correct gradients by AGENT, with a snapshot an epoch.", "", ALL, part="agent"),
)
"""Those that no constructor declares, or that a run takes in another unit."""

OPTIONS = {
    **_of_methods(),
    **{option.name: option for option in _OTHERS},
    **_of_part("transform", transform, ["max_gib"]),
    **_of_part("agent", AGENT),
}
"""All options of methods by name."""


_NETWORKS = (
    Option("depth", int, "Layers of the network.", low=1, high=1000),
    Option("context", int, "Tokens that the network sees, and the length of a training text.", low=1, high=2**20),
    Option("activation", str, "Activation of the feed-forward.", choices=ACTIVATIONS),
    Option("positions", str, "How the network knows the order of tokens.", choices=POSITIONS),
    Option("free_head", bool, "Give the head a weight of its own instead of the token embedding's."),
)

NETWORK_OPTIONS = {option.name: option for option in _NETWORKS}
"""Options of networks by name; :attr:`sparsekern.lab.recipes.Recipe.network` says which a recipe has."""


def check_options(method: str, options: Mapping[str, Any]) -> dict[str, Value]:
    """Return the options in the order of the table.

    Args:
        method: a name in :data:`sparsekern.training.METHODS`.
        options: by name.

    Raises:
        ValueError: there is no such option, the method does not have it, or its value is of another kind.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            names = [known for known, option in OPTIONS.items() if method in option.methods]
            raise InputError(f"{name!r} is no option of a method; {method} has {', '.join(names)}")
        option = OPTIONS[name]
        if method not in option.methods:
            raise InputError(
                f"{name} is {value}, but method {method} has no such option; {option.owners} "
                f"{'has' if len(option.methods) == 1 else 'have'} it: choose that, or drop the option",
                parameter=name,
            )
        option.check(value)
    for name, value in options.items():
        whole = OPTIONS[name].part  # what the option is of; it is an option too
        if name.startswith(f"{whole}_") and options.get(whole, False) is False:
            raise InputError(f"{name} is {value}, but {whole} is off; turn it on, or drop the option", parameter=name)
    return {name: options[name] for name in OPTIONS if name in options}


def part_of(part: str, options: Mapping[str, Value]) -> dict[str, Any]:
    """Return those of the options that one part takes, as it calls them; what turns it on is its ``"name"``."""
    own = {name: value for name, value in options.items() if OPTIONS[name].part == part}
    return {"name" if name == part else name.removeprefix(f"{part}_"): value for name, value in own.items()}


def in_words(name: str, value: Value) -> str:
    """Return an option in words: "drop fraction 0.1"; a switch that is on by its name, one that is off with a no."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value}"


def percent(sparsity: float | Mapping[str, float]) -> str:
    """Return a sparsity such as "90 %", or "mlp 90 %, attention 70 %" where kinds of layers have one each."""
    if isinstance(sparsity, Mapping):
        return ", ".join(f"{kind} {100 * number:.4g} %" for kind, number in sparsity.items())
    return f"{100 * sparsity:.4g} %"
