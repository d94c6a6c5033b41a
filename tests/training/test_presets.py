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
    """VR-PGE once, at its end; the others at every update, those of RigL's authors from the first step on."""
    layer = sk.SparseLinear(48, 48, sparsity=0.7, block_size=block, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    more = {
        "rigl": {"allow_dense_scores": True},
        "granet": {"allow_dense_scores": True, "stop": 12},
        "vrpge": {"sparsity": 0.85, "stop": 6},
    }.get(name.split("-")[0], {})
    method = preset(name, layer, optimizer, steps=5000, update_every=3, **more)
    before = layer.topology.keys().clone()
    moved = []
    for step in range(6):
        x = torch.randn(8, 48, generator=generator_for(step))
        method.backward(lambda x=x: layer(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        moved.append(method.step())
    if name in ("rigl", "set-rigl"):
        assert moved == [True, False, False, True, False, False]
    else:
        assert moved == [False, False, not name.startswith("vrpge"), False, False, True]
    assert not torch.equal(before, layer.topology.keys())


GSE = {"scope": "global", "with_replacement": True, "subset_factor": 1.0, "distribution": "uniform"}
VRPGE = {"masks": 2, "structure_every": 1, "weight_step": "one", "lazy": True, "refill": 0.0}
VALUES = {
    "set-mocanu": (sk.SET, 1.0, 390, 0.3, {"drop": "signs", "grown_values": "random"}),
    "set-rigl": (sk.SET, 0.75, 100, 0.3, {"drop": "norm", "grown_values": "zero"}),
    "rigl": (sk.RigL, 0.75, 100, 0.3, {"regrow": True, "scoring": "auto", "scope": "layer", "score_tokens": None}),
    "rigl-sparse-ift": (sk.RigL, 0.75, 100, 0.3, {"regrow": True}),
    "rigl-sparse-ift-gpt": (sk.RigL, 0.8, 500, 0.3, {"regrow": True}),
    "set-itop": (sk.SET, 1.0, 1500, 0.5, {"drop": "norm", "grown_values": "zero"}),
    "rigl-itop": (sk.RigL, 1.0, 4000, 0.5, {"regrow": True, "scope": "layer"}),
    "granet": (sk.GraNet, 110 / 160, 1000, 0.5, {"scope": "global", "compact": False}),
    "gse": (sk.GSE, 0.6, 1000, 0.2, GSE),
    "gse-grabo": (sk.GSE, 0.6, 1000, 0.2, GSE | {"distribution": "grabo"}),
    "gse-graest": (sk.GSE, 0.6, 1000, 0.2, GSE | {"distribution": "graest"}),
    "gse-imagenet": (sk.GSE, 0.6, 1000, 0.2, GSE | {"subset_factor": 2.0}),
    "vrpge": (sk.VRPGE, 300 / 340, 100, 0.3, VRPGE),
    "vrpge-code": (sk.VRPGE, 300 / 340, 100, 0.3, VRPGE | {"weight_step": "all", "lazy": False}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_its_values(name):
    kind, until, every, fraction, values = VALUES[name]
    layer = sk.SparseLinear(16, 16, sparsity=0.5, block_size=4, seed=0)
    needed = {"update_every": every} if PRESETS[name].once_an_epoch else {}
    method = preset(name, layer, torch.optim.SGD(layer.parameters()), steps=100_000, **needed)
    schedule = method.schedule
    assert type(method) is kind and (schedule.stop, schedule.update_every) == (int(until * 100_000), every)
    assert schedule.fraction(0) == fraction and PRESETS[name].source
    assert {value: getattr(method, value) for value in values} == values
    if kind is sk.VRPGE:
        assert (method.probabilities.rate, method.probabilities.clip) == (12e-3, 3.0)
        assert method.candidates[""].count == 4, "filters of a block row"


def test_options_override():
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    optimizer = torch.optim.SGD(layer.parameters())
    assert preset("gse", layer, optimizer, steps=10, scope="layer", stop=7).schedule.stop == 7
    falls = preset("set-mocanu", layer, optimizer, steps=10, update_every=2, drop_fraction=lambda step: 1 / (1 + step))
    assert falls.schedule.fraction(1) == 0.5, "anneal is for a number only"


@pytest.mark.parametrize(
    ("steps", "error", "text"),
    [
        (0, ValueError, "steps is 0; it must be 1 or more, the optimizer steps of the whole training"),
        (-5, ValueError, "steps is -5;"),
        (1e4, TypeError, "steps is 10000.0; it must be a whole number"),
        (float("nan"), TypeError, "steps is nan"),
        ("10", TypeError, "steps is '10'"),
        (None, TypeError, "steps is None"),
        (True, TypeError, "steps is True"),
    ],
)
def test_the_steps_of_the_training_are_a_whole_number(steps, error, text):
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    with pytest.raises(error, match=text):
        preset("rigl", layer, torch.optim.SGD(layer.parameters()), steps=steps)


def test_an_update_an_epoch_needs_the_steps_of_one():
    layer = sk.SparseLinear(16, 16, block_size=4, seed=0)
    optimizer = torch.optim.SGD(layer.parameters())
    with pytest.raises(ValueError, match="update_every is missing: set-mocanu updates after every epoch; give the"):
        preset("set-mocanu", layer, optimizer, steps=50)
    schedule = preset("set-mocanu", layer, optimizer, steps=50, update_every=10).schedule
    assert [step for step in range(51) if schedule.due(step)] == [10, 20, 30, 40], "not after the last epoch"
    assert schedule.fraction(40) == 0.3


def test_the_first_update_of_rigl_sees_the_first_batch_and_no_step_is_made():
    """Their code counts steps from 0, where the cosine is at its highest."""
    layer = sk.SparseLinear(16, 16, block_size=4, sparsity=0.5, seed=0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    method = preset("rigl", layer, optimizer, steps=1000)
    before, places = layer.values.detach().clone(), layer.topology.keys().clone()
    layer(torch.randn(8, 16, generator=generator_for(0))).square().mean().backward()
    optimizer.step()
    assert torch.equal(layer.values, before) and method.schedule.fraction(1) == 0.3
    assert method.step()
    moved = layer.topology.keys() != places
    assert 0 < moved.sum() <= 2 and torch.equal(layer.values[~moved], before[~moved])


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gse")])
def test_the_layers_of_gse_compete_and_have_the_authors_variance(name, caplog):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Flatten(), torch.nn.Linear(64, 64))
    sk.sparsify_(model, 0.9, 1, **PRESETS[name].layers)
    conv, linear = model[0], model[2]
    # 453 of 4528 elements in proportion to 16 + 27 and 64 + 64; a quarter more slots
    assert [(m.topology.blocks(), m.topology.slots) for m in (conv, linear)] == [(114, 143), (339, 424)]
    fan_in = torch.bincount(linear.row.clamp(min=0)[linear.topology.used()], minlength=64).double()
    squares = linear.values.detach().double().flatten().square()
    scaled = (squares[:339] * fan_in[linear.row[:339].long()]).mean()
    assert abs(float(scaled) - 1) < 5 * (4 / 5 / 339) ** 0.5, "variance 1 / fan_in; of squares of a uniform one 4/5"
    preset(name, model, torch.optim.SGD(model.parameters(), lr=0.1), steps=10_000)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
