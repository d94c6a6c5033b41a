"""Every preset is constructed and stepped through an update."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import generator_for
from sparsekern.training.presets import PRESETS, preset


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", PRESETS)
def test_it_moves_blocks(name, block):
    """VR-PGE once, at its end; the others at every update."""
    layer = sk.SparseLinear(48, 48, sparsity=0.7, block_size=block, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    more = {"rigl": {"allow_dense_scores": True}, "vrpge": {"sparsity": 0.85, "stop": 6}}.get(name.split("-")[0], {})
    method = preset(name, layer, optimizer, steps=5000, update_every=3, **more)
    before = layer.topology.keys().clone()
    moved = []
    for step in range(6):
        x = torch.randn(8, 48, generator=generator_for(step))
        method.backward(lambda x=x: layer(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        moved.append(method.step())
    assert moved == [False, False, not name.startswith("vrpge"), False, False, True]
    assert not torch.equal(before, layer.topology.keys())


@pytest.mark.parametrize(
    ("name", "kind", "stop", "every", "fraction"),
    [
        ("set", sk.SET, None, 100, 0.3),
        ("rigl", sk.RigL, 75_000, 100, 0.3),
        ("rigl-sparse-ift", sk.RigL, 75_000, 100, 0.3),
        ("rigl-sparse-ift-gpt", sk.RigL, 80_000, 500, 0.3),
        ("gse", sk.GSE, 60_000, 1000, 0.2),
        ("gse-grabo", sk.GSE, 60_000, 1000, 0.2),
        ("gse-graest", sk.GSE, 60_000, 1000, 0.2),
        ("gse-imagenet", sk.GSE, 60_000, 1000, 0.2),
        ("vrpge", sk.VRPGE, 88_235, 100, 0.3),
        ("vrpge-code", sk.VRPGE, 88_235, 100, 0.3),
    ],
)
def test_its_values(name, kind, stop, every, fraction):
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    method = preset(name, layer, torch.optim.SGD(layer.parameters()), steps=100_000)
    schedule = method.schedule
    assert type(method) is kind and (schedule.stop, schedule.update_every) == (stop, every)
    assert schedule.fraction(0) == fraction and PRESETS[name].source


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rigl", {"regrow": True, "scoring": "auto", "scope": "layer", "score_tokens": None}),
        ("gse", {"distribution": "uniform", "subset_factor": 1.0, "with_replacement": True, "scope": "global"}),
        ("gse-grabo", {"distribution": "grabo", "subset_factor": 1.0}),
        ("gse-graest", {"distribution": "graest", "subset_factor": 1.0}),
        ("gse-imagenet", {"distribution": "uniform", "subset_factor": 2.0}),
        ("vrpge", {"masks": 2, "structure_every": 1, "weight_step": "one", "lazy": True, "refill": 0.0}),
        ("vrpge-code", {"masks": 2, "structure_every": 1, "weight_step": "all", "lazy": False, "refill": 0.0}),
    ],
)
def test_its_other_values(name, values):
    layer = sk.SparseLinear(16, 16, sparsity=0.5, block_size=4, seed=0)
    method = preset(name, layer, torch.optim.SGD(layer.parameters()), steps=1000)
    assert {value: getattr(method, value) for value in values} == values
    if name.startswith("vrpge"):
        assert (method.probabilities.rate, method.probabilities.clip) == (12e-3, 3.0)
        assert method.candidates[""].count == 4, "filters of a block row"


def test_every_preset_has_its_values_tested():
    rows = test_its_values.pytestmark[0].args[1]
    assert [row[0] for row in rows] == list(PRESETS)


def test_options_override_and_names_are_checked():
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    optimizer = torch.optim.SGD(layer.parameters())
    assert preset("gse", layer, optimizer, steps=10, scope="layer", stop=7).schedule.stop == 7
    with pytest.raises(ValueError, match="preset is 'gsee'; it must be one of set, rigl"):
        preset("gsee", layer, optimizer, steps=10)
