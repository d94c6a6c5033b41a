"""The picture of spectral measures."""

from __future__ import annotations

import pytest

from sparsekern.lab.report.spectral import MEANINGS, NAMED, TITLES, draw_spectral

pytest.importorskip("matplotlib")


def record(step, *values):
    return {"step": step, "layers": {f"layer{i}": dict.fromkeys(TITLES, v) for i, v in enumerate(values)}}


@pytest.mark.parametrize("records", [[record(1, 0.5)], [record(1, 0.5, None), record(9, -0.5, None)]])
def test_it_is_drawn(tmp_path, records):
    draw_spectral(tmp_path / "a.svg", "some training", records)
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<!-- some training -->") == 1
    assert all(f"<!-- {words} -->" in text for words in (*TITLES.values(), *MEANINGS.values()))
    assert "<!-- layer0 -->" in text and "<!-- layer1 -->" not in text


def test_only_what_is_defined_has_a_panel(tmp_path):
    half = {"step": 1, "layers": {"a": dict.fromkeys(TITLES) | {"ramanujan_gap": 0.5}}}
    draw_spectral(tmp_path / "a.svg", "some training", [half])
    text = (tmp_path / "a.svg").read_text()
    assert [words for words in TITLES.values() if f"<!-- {words} -->" in text] == ["Ramanujan gap"]


def test_nothing_defined_is_said(tmp_path):
    draw_spectral(tmp_path / "a.svg", "some training", [record(1, None)])
    assert "<!-- No measure is defined: fewer than three blocks" in (tmp_path / "a.svg").read_text()


def test_many_layers_are_told_by_their_shade(tmp_path):
    draw_spectral(tmp_path / "a.svg", "some training", [record(1, *[0.5] * (NAMED + 1))])
    text = (tmp_path / "a.svg").read_text()
    assert f"<!-- {NAMED + 1} layers, the first ones dark" in text and "<!-- layer3 -->" not in text
