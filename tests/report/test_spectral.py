"""The picture of spectral measures."""

from __future__ import annotations

import pytest

from sparsekern.report.spectral import TITLES, draw_spectral

pytest.importorskip("matplotlib")


def record(step, *values):
    return {"step": step, "layers": {f"layer{i}": dict.fromkeys(TITLES, v) for i, v in enumerate(values)}}


@pytest.mark.parametrize("records", [[record(1, 0.5)], [record(1, 0.5, None), record(9, -0.5, None)]])
def test_it_is_drawn(tmp_path, records):
    draw_spectral(tmp_path / "a.svg", "some training", records)
    text = (tmp_path / "a.svg").read_text()
    assert text.count("<!-- some training -->") == 1
    assert all(f"<!-- {words} -->" in text for words in TITLES.values())
    assert "<!-- layer0 -->" in text and "<!-- layer1 -->" not in text


def test_nothing_defined_is_said(tmp_path):
    draw_spectral(tmp_path / "a.svg", "some training", [record(1, None)])
    assert (tmp_path / "a.svg").read_text().count("<!-- not defined: -->") == 4
