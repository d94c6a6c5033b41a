"""The table of options is that of the constructors; wrong options say who has them."""

from __future__ import annotations

import inspect

import pytest

from sparsekern.lab.options import OPTIONS, check_options
from sparsekern.training import AGENT, METHODS

NOT_OPTIONS = {
    *("self", "model", "optimizer", "options", "process_group", "check_ranks", "seed", "update_every"),
    *("sparsity", "costs"),  # the first is the run's own, the second names layers
}
WITHOUT_EFFECT = {("vrpge", "keep_connected"), ("vrpge", "min_age"), ("set", "scope"), ("static", "scope")} | {
    ("static", name) for name, option in OPTIONS.items() if "set" in option.methods
}


def arguments(method):
    """The arguments of a constructor and of those that it hands the rest to."""
    return {
        name: parameter
        for cls in reversed(METHODS[method].__mro__[:-1])
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is not parameter.VAR_POSITIONAL
        and parameter.kind is not parameter.VAR_KEYWORD
        and name not in NOT_OPTIONS
        and (method, name) not in WITHOUT_EFFECT
    }


@pytest.mark.parametrize("method", METHODS)
def test_the_table_has_the_arguments_of_the_constructor(method):
    listed = {name for name, option in OPTIONS.items() if option.part == "method" and method in option.methods}
    assert listed == arguments(method).keys()


@pytest.mark.parametrize("method", METHODS)
def test_kinds_are_those_of_the_constructor(method):
    for name, parameter in arguments(method).items():
        option = OPTIONS[name]
        assert option.fraction or option.kind.__name__ in parameter.annotation or parameter.annotation == "Group"


def test_every_option_says_what_it_does():
    for name, option in OPTIONS.items():
        assert (
            name == option.name and option.text.endswith(".") and option.methods and set(option.methods) <= set(METHODS)
        )


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
        ("vrpge", "min_age", 3, "min_age is 3, but method vrpge has no such option; set, rigl, gse have it"),
        (
            "set",
            "mask",
            3,
            "'mask' is no option of a method; set has drop_fraction, start, stop, anneal, offset, drop, ",
        ),
        ("static", "mask", 3, "'mask' is no option of a method; static has "),
        ("gse", "distribution", "graboo", "distribution is 'graboo'; it must be one of uniform, grabo, graest"),
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
        ("scope", "all", "scope is 'all'; it must be one of layer, global"),
    ],
)
def test_a_text_that_says_nothing(name, text, message):
    with pytest.raises(ValueError, match=message):
        OPTIONS[name].parse(text)


def test_options_of_agent_are_those_of_its_constructor_and_need_it():
    listed = {name.removeprefix("agent_") for name, option in OPTIONS.items() if option.part == "agent"} - {"agent"}
    taken = inspect.signature(AGENT).parameters
    assert listed == taken.keys() - {"model", "optimizer", "method", "process_group"}
    for name in listed:
        assert OPTIONS[f"agent_{name}"].kind.__name__ in taken[name].annotation
    assert check_options("set", {"agent_gamma": 0.5, "agent": True}) == {"agent": True, "agent_gamma": 0.5}
    for options in ({"agent_gamma": 0.5}, {"agent_gamma": 0.5, "agent": False}):
        with pytest.raises(ValueError, match="agent_gamma is 0.5, but agent is off; turn it on, or drop the option"):
            check_options("set", options)
