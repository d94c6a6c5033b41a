from __future__ import annotations

import pytest

from sparsekern.lab.contestants import Contestant


@pytest.mark.parametrize(
    ("text", "preset", "entries", "slug"),
    [
        ("static", False, ("static", None, {}), "static"),
        (
            "gse:subset_factor=2,distribution=grabo",
            False,
            ("gse", None, {"distribution": "grabo", "subset_factor": 2.0}),
            "gse-distribution-grabo-subset-factor-2.0",
        ),
        (
            "rigl: allow-dense-scores, regrow=no",
            False,
            ("rigl", None, {"regrow": False, "allow_dense_scores": True}),
            None,
        ),
        ("gse-imagenet:drop_fraction=0.1", True, ("gse", "gse-imagenet", {"drop_fraction": 0.1}), None),
    ],
)
def test_from_a_text(text, preset, entries, slug):
    contestant = Contestant.parse(text, preset=preset)
    assert tuple(contestant.entries().values()) == entries
    assert Contestant(**contestant.entries()) == contestant
    assert slug is None or contestant.slug == slug


def test_the_slug_names_the_preset():
    assert Contestant.parse("gse-imagenet:drop_fraction=0.1", preset=True).slug == "gse-imagenet-drop-fraction-0.1"


@pytest.mark.parametrize(
    ("text", "preset", "message"),
    [
        ("sett", False, "method is 'sett'; it must be one of static, set"),
        ("gsee", True, "preset is 'gsee'; it must be one of set-mocanu, set-rigl"),
        ("set:masks=3", False, "masks is 3, but method set has no such option; vrpge has it"),
        ("set:depth=3", False, "'depth' is no option of a method; set has drop_fraction"),
        ("vrpge:masks=some", False, "masks is 'some'; it must be a whole number"),
        ("vrpge:masks", False, "masks is 'true'; it must be a whole number"),
    ],
)
def test_what_is_wrong_is_named(text, preset, message):
    with pytest.raises(ValueError, match=message):
        Contestant.parse(text, preset=preset)
