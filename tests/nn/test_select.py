"""One grammar for naming modules."""

from __future__ import annotations

import pytest
from torch import nn

from sparsekern.nn.selectors import flatten, matches, select

MODEL = nn.ModuleDict(
    {
        "stem": nn.Linear(4, 4),
        "blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)]),
        "lm_head": nn.Linear(4, 4),
    }
)
FC1 = ["blocks.0.fc1", "blocks.1.fc1"]

CASES = [
    (nn.Linear, ["stem", *FC1, "lm_head"]),
    ("stem", ["stem"]),
    ("blocks.*.fc1", FC1),
    ("*fc?", FC1),
    ("re:blocks", ["blocks", "blocks.0", "blocks.0.fc1", "blocks.0.norm", "blocks.1", "blocks.1.fc1", "blocks.1.norm"]),
    ("re:.*(head|stem)$", ["stem", "lm_head"]),
    (lambda module, name: isinstance(module, nn.LayerNorm) and "1" in name, ["blocks.1.norm"]),
    (["lm_head", [nn.LayerNorm], "stem"], ["stem", "blocks.0.norm", "blocks.1.norm", "lm_head"]),
    ([], []),
    ((), []),
]


@pytest.mark.parametrize(("selector", "names"), CASES, ids=[str(s)[:25] for s, _ in CASES])
def test_select(selector, names):
    assert list(select(MODEL, selector, "targets")) == names


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("block.0.fc1", r"ignore: 'block.0.fc1' matches no module; nearest names: blocks.0.fc1"),
        ("lm-head", "nearest names: lm_head"),
        (["stem", "re:.*stm"], "'re:.*stm' matches no module; nearest names: stem"),
        (nn.Conv2d, "ignore: Conv2d matches no module"),
        ("re:(", r"'re:\(' is not a regular expression"),
    ],
)
def test_what_matches_nothing_is_an_error(selector, text):
    with pytest.raises(ValueError, match=text):
        select(MODEL, selector, "ignore")


def test_a_model_without_children():
    with pytest.raises(ValueError, match="the model has no children"):
        select(nn.Linear(1, 1), "fc", "targets")


def test_not_a_selector():
    with pytest.raises(TypeError, match="a selector is 3; it must be a type, a name"):
        flatten([3])


def test_names_are_compared_with_case():
    assert not matches("Stem", MODEL["stem"], "stem")
