"""The options of the methods: one table, from which Config, the command line and the checks come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsekern.errors import InputError
from sparsekern.lab.models.gpt import ACTIVATIONS, POSITIONS
from sparsekern.training import METHODS
from sparsekern.training.agent.agent import ESTIMATES
from sparsekern.training.agent.agent import SCOPES as AGENT_SCOPES
from sparsekern.training.growth.gse import DISTRIBUTIONS
from sparsekern.training.growth.rigl import SCORINGS
from sparsekern.training.schedules import ANNEALS
from sparsekern.training.set import DROPS, GROWN_VALUES
from sparsekern.training.vrpge.candidates import GROUPS
from sparsekern.training.vrpge.probabilities import OPTIMIZERS
from sparsekern.training.vrpge.projection import PROJECTIONS
from sparsekern.transforms import TRANSFORMS

STOP = 0.75
"""Fraction of the training after which no block moves, so that the last grown ones have time to learn."""

Value = bool | int | float | str

ALL = tuple(METHODS)
MOVING = tuple(name for name in METHODS if name != "static")
SCORED = ("rigl", "gse")
"""Methods that read the gradient of absent blocks."""

DROPPING = ("set", *SCORED)
"""Methods that drop the weakest blocks."""


@dataclass(frozen=True)
class Option:
    """What may be said about a method, on the command line as ``--name``.

    Attributes:
        name: of the argument that takes it.
        kind: ``bool``, ``int``, ``float`` or ``str``.
        text: what it does, for the help.
        methods: names of the methods that have it.
        choices: what a text may be.
        low, high: bounds of a number that nobody else checks; the method checks the others.
        part: who takes it: ``"method"``, its constructor; ``"recipe"``, what builds network and method around it. A
            wrapper of methods or a transform of the network has a part of its own: :meth:`Config.part`.
        fraction: given as a fraction of the training, taken in steps.
    """

    name: str
    kind: type[bool] | type[int] | type[float] | type[str]
    text: str
    methods: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    part: str = "method"
    fraction: bool = False

    @property
    def owners(self) -> str:
        """Which methods have it, in words."""
        return "all methods" if self.methods == ALL else ", ".join(self.methods)

    def check(self, value: object) -> None:
        """Raise ValueError if the value is of another kind, none of the choices, or out of bounds."""
        kinds = (int, float) if self.kind is float else (self.kind,)
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        if self.choices:
            words = f"one of {', '.join(self.choices)}"
        elif self.low > -math.inf:
            words += f" from {self.low:g} to {self.high:g}" if self.high < math.inf else f" of {self.low:g} or more"
        right = type(value) in kinds and (not self.choices or value in self.choices)
        if right and isinstance(value, (int, float)):
            right = math.isfinite(value) and self.low <= value <= self.high
        if not right:
            raise InputError(f"{self.name} is {value!r}; it must be {words}", parameter=self.name)

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


_ALL = (
    Option("drop_fraction", float, "Fraction of a layer's blocks that an update moves, at the start.", MOVING),
    Option(
        "start",
        float,
        "Fraction of the training before which no block moves.",
        MOVING,
        low=0,
        high=1,
        fraction=True,
    ),
    Option(
        "stop",
        float,
        "Fraction of the training after which no block moves.",
        MOVING,
        low=0,
        high=1,
        fraction=True,
    ),
    Option("anneal", str, "Whether the fraction falls along a cosine or stays.", MOVING, ANNEALS),
    Option(
        "offset", int, "Steps that the schedule does not count: at 1 an update follows the first one.", MOVING, low=0
    ),
    Option("drop", str, "Whether positive and negative blocks are dropped apart.", ("set",), DROPS),
    Option("grown_values", str, "Values of grown blocks.", ("set",), GROWN_VALUES),
    Option("grown_state", str, "Optimizer state of a moved block.", MOVING, ("zero", "mean_v")),
    Option("keep_connected", bool, "Never drop the strongest block of a block row or column.", DROPPING),
    Option("min_age", int, "Updates during which a grown block is not dropped.", DROPPING),
    Option(
        "scope", str, "Whether layers keep their blocks or compete for them.", (*SCORED, "vrpge"), ("layer", "global")
    ),
    Option(
        "capacity",
        float,
        "Slots of a layer for each of its blocks: what is free is for a global scope.",
        SCORED,
        low=1,
        part="recipe",
    ),
    Option("score_tokens", int, "Score on this many tokens of a batch instead of all.", SCORED),
    Option("scoring", str, "How absent blocks are scored.", ("rigl",), SCORINGS),
    Option("sketches", int, "Numbers a block when screening.", ("rigl",)),
    Option("shortlist", float, "Times more places are scored exactly than are grown, when screening.", ("rigl",)),
    Option("regrow", bool, "A dropped block may win its place back at once.", ("rigl",)),
    Option("skip_step", bool, "Leave out the optimizer's step of an update.", ("rigl",)),
    Option("allow_dense_scores", bool, "Needed with 1x1 blocks: scores fill as much as a dense gradient.", ("rigl",)),
    Option("distribution", str, "By what candidates are drawn.", ("gse",), DISTRIBUTIONS),
    Option("subset_factor", float, "Candidates over the blocks of a layer (gamma).", ("gse",)),
    Option("with_replacement", bool, "Draw candidates independently, as the paper does.", ("gse",)),
    Option("pool", float, "Stored candidates over the blocks that are to remain.", ("vrpge",), low=1, part="recipe"),
    Option("masks", int, "Masks drawn a step: passes over a batch.", ("vrpge",)),
    Option("structure_every", int, "Steps between those of the probabilities.", ("vrpge",)),
    Option("group", str, "What has a probability.", ("vrpge",), GROUPS),
    Option("probability_rate", float, "Learning rate of the probabilities.", ("vrpge",)),
    Option("probability_optimizer", str, "Optimizer of the probabilities.", ("vrpge",), tuple(OPTIMIZERS)),
    Option("score_clip", float, "The largest norm of the probabilities' gradient.", ("vrpge",)),
    Option("floor", float, "The lowest probability.", ("vrpge",)),
    Option("refill", float, "Probability of a candidate that moves to a new place; 0: none moves.", ("vrpge",)),
    Option("projection", str, "How probabilities keep the budget.", ("vrpge",), PROJECTIONS),
    Option(
        "transform",
        str,
        "Spend the sparsity on capacity, at the FLOPs of the dense network (Sparse-IFT).",
        ALL,
        TRANSFORMS,
        part="transform",
    ),
    Option(
        "transform_max_gib",
        float,
        "GiB that the weights of the transform wide may take while the network builds.",
        ALL,
        part="transform",
    ),
    Option(
        "spectral",
        bool,
        "Measure at each update how well the blocks connect each layer (spectral gaps of their graphs).",
        ALL,
        part="record",
    ),
    Option("weight_step", str, "Whether weights see one mask of a step or all.", ("vrpge",), ("one", "all")),
    Option("unsampled", str, "What the optimizer does to blocks that no mask held.", ("vrpge",), ("lazy", "decay")),
    Option("agent", bool, "Correct gradients by AGENT, with a snapshot an epoch.", ALL, part="agent"),
    Option("agent_gamma", float, "Damps AGENT's correction.", ALL, part="agent"),
    Option("agent_alpha", float, "How much of AGENT's c the newest estimate is.", ALL, part="agent"),
    Option("agent_estimate", str, "From what AGENT's c is estimated.", ALL, ESTIMATES, part="agent"),
    Option("agent_scope", str, "Whether all modules share AGENT's c.", ALL, AGENT_SCOPES, part="agent"),
    Option("agent_batches", int, "Batches of AGENT's pass instead of all.", ALL, part="agent"),
    Option("agent_every", int, "Steps between AGENT's snapshots, which then take no pass.", ALL, part="agent"),
)

OPTIONS = {option.name: option for option in _ALL}
"""All options by name. A new method or wrapper adds entries here, and nowhere else."""


NETWORK_OPTIONS = {
    option.name: option
    for option in (
        Option("depth", int, "Layers of the network.", low=1, high=1000, part="network"),
        Option(
            "context",
            int,
            "Tokens that the network sees, and the length of a training text.",
            low=1,
            high=2**20,
            part="network",
        ),
        Option("activation", str, "Activation of the feed-forward.", choices=ACTIVATIONS, part="network"),
        Option("positions", str, "How the network knows the order of tokens.", choices=POSITIONS, part="network"),
        Option(
            "free_head", bool, "Give the head a weight of its own instead of the token embedding's.", part="network"
        ),
    )
}
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
            raise InputError(f"{name!r} is no option of a method; {method} has {', '.join(_names(method))}")
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
        if name.startswith(f"{whole}_") and not options.get(whole):
            raise InputError(f"{name} is {value}, but {whole} is off; turn it on, or drop the option", parameter=name)
    return {name: options[name] for name in OPTIONS if name in options}


def part_of(part: str, options: Mapping[str, Value]) -> dict[str, Any]:
    """Return those of the options that one part takes; see :class:`Option`."""
    return {name: value for name, value in options.items() if OPTIONS[name].part == part}


def in_words(name: str, value: Value) -> str:
    """Return an option in words: "drop fraction 0.1"; a switch that is on by its name, one that is off with a no."""
    words = name.replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    return f"{words} {value}"


def _names(method: str) -> list[str]:
    return [option.name for option in OPTIONS.values() if method in option.methods]
