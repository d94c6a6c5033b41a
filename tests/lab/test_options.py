"""Methods declare their options; wrong ones say who has them."""

from __future__ import annotations

import inspect

import pytest

from sparsekern.lab.config import RUN_OPTIONS
from sparsekern.lab.options import NETWORK_OPTIONS, OPTIONS, check_options, declared
from sparsekern.training import AGENT, METHODS, SET


class Declared:
    """A class.

    Args:
        model: not for text.
        count, rate: of :class:`~some.Thing`, ``1`` or
            more.
        plain: without a kind.
        word: a text.

    Raises:
        ValueError: never.
    """

    def __init__(self, model: list[int], plain, count: int = 3, *, rate: float | None = None, word: str = "a") -> None:
        pass


def test_what_a_constructor_declares():
    found = {option.name: option for option in declared(Declared)}
    assert {name: (o.kind, o.text, o.default, o.optional) for name, o in found.items()} == {
        "count": (int, "Of Thing, 1 or more.", "3", False),
        "rate": (float, "Of Thing, 1 or more.", "", True),
        "word": (str, "A text.", "a", False),
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_options_of_a_method_are_the_arguments_of_its_constructor(method):
    listed = {name for name, option in OPTIONS.items() if option.part == "method" and method in option.methods}
    taken = {name for cls in METHODS[method].__mro__[:-1] for name in inspect.signature(cls).parameters}
    assert listed <= taken and not listed & {"seed", "update_every", *METHODS[method].unused_options}
    assert {"start", "stop", "offset"} <= listed, "those of the base class"


def test_defaults_and_owners():
    assert (OPTIONS["scope"].default, OPTIONS["scope"].methods) == (
        "layer; vrpge: global; granet: global",
        ("rigl", "gse", "vrpge", "gradual", "granet"),
    )
    assert OPTIONS["stop"].owners == "all methods" and OPTIONS["drop"].methods == ("set",)
    assert (OPTIONS["score_tokens"].default, OPTIONS["score_tokens"].optional) == ("", True)
    assert inspect.signature(SET).parameters["drop"].default == OPTIONS["drop"].default


def test_every_option_says_what_it_does():
    for name, option in (RUN_OPTIONS | NETWORK_OPTIONS | OPTIONS).items():
        assert name == option.name and option.text.endswith(".") and "`" not in option.text, name


def test_options_come_in_the_order_of_the_table():
    given = {"subset_factor": 2, "distribution": "grabo", "drop_fraction": 0.2}
    assert list(check_options("gse", given).items()) == [
        ("drop_fraction", 0.2),
        ("distribution", "grabo"),
        ("subset_factor", 2),
    ]


@pytest.mark.parametrize(
    ("method", "name", "value", "message"),
    [
        (
            "set",
            "masks",
            3,
            "masks is 3, but method set has no such option; vrpge has it: choose that, or drop the option",
        ),
        (
            "vrpge",
            "min_age",
            3,
            "min_age is 3, but method vrpge has no such option; set, rigl, gse, ",
        ),
        (
            "set",
            "mask",
            3,
            "'mask' is no option of a method; set has start, stop, offset, drop_fraction, anneal, ",
        ),
        ("static", "mask", 3, "'mask' is no option of a method; static has "),
        ("set", "transform", "wider", "transform is 'wider'; it must be one of wide, parallel, factorized, doped"),
        ("vrpge", "masks", 2.5, "masks is 2.5; it must be a whole number"),
        ("vrpge", "masks", True, "masks is True; it must be a whole number"),
        ("vrpge", "pool", 0.5, "pool is 0.5; it must be a number of 1 or more"),
        ("set", "stop", 1.5, "stop is 1.5; it must be a number from 0 to 1"),
        ("set", "drop_fraction", float("nan"), "drop_fraction is nan; it must be a number"),
        ("rigl", "regrow", 1, "regrow is 1; it must be true or false"),
    ],
)
def test_a_wrong_option_is_named_with_its_rule(method, name, value, message):
    with pytest.raises(ValueError) as error:
        check_options(method, {name: value})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("masks", "3", 3),
        ("stop", "1", 1.0),
        ("regrow", "yes", True),
        ("regrow", "false", False),
        ("scope", "layer", "layer"),
    ],
)
def test_a_text_is_read(name, text, value):
    read = OPTIONS[name].parse(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("masks", "3.5", "masks is '3.5'; it must be a whole number"),
        ("regrow", "maybe", "regrow is 'maybe'; it must be true or false"),
        ("transform", "all", "transform is 'all'; it must be one of wide, "),
    ],
)
def test_a_text_that_says_nothing(name, text, message):
    with pytest.raises(ValueError, match=message):
        OPTIONS[name].parse(text)


def test_options_of_agent_are_those_of_its_constructor_and_need_it():
    listed = {name.removeprefix("agent_") for name, option in OPTIONS.items() if option.part == "agent"} - {"agent"}
    assert listed == inspect.signature(AGENT).parameters.keys() - {"model", "optimizer", "method", "process_group"}
    assert check_options("set", {"agent_gamma": 0.5, "agent": True}) == {"agent": True, "agent_gamma": 0.5}
    for options in ({"agent_gamma": 0.5}, {"agent_gamma": 0.5, "agent": False}):
        with pytest.raises(ValueError, match="agent_gamma is 0.5, but agent is off; turn it on, or drop the option"):
            check_options("set", options)
