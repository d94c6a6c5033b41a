"""Runs as a plan needs them: steps without data, what methods do in an update, other sizes."""

from __future__ import annotations

import pytest

from sparsekern.analysis.plan import Updates
from sparsekern.errors import InputError
from sparsekern.lab import Config
from sparsekern.lab.cost import Planned


def planned(recipe="gpt-nano", devices=1, **more) -> Planned:
    image = (1, 8) if recipe == "mlp" else (3, 32)
    return Planned(Config(recipe=recipe, **more), devices, image)


def test_a_step_has_the_part_of_a_device():
    step = planned(devices=2, batch_size=32, accumulate=4, precision="bfloat16").step("sparse")
    assert [tuple(part.shape) for part in step.inputs] == [(4, 64), (4, 64)]
    assert all(part.is_meta for part in step.inputs) and step.autocast is not None and step.clip_norm == 1.0
    assert all(parameter.is_meta for parameter in step.model.parameters())


def test_images_have_their_channels_last_where_the_recipe_wants_it():
    images, labels = planned("resnet20", batch_size=8).step("dense").inputs
    assert images.stride(1) == 1 and images.shape == (8, 3, 32, 32) and labels.shape == (8,)
    assert planned("mlp", batch_size=8).step("dense").inputs[0].shape == (8, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "devices", "updates"),
    [
        ({"method": "static"}, 1, Updates()),
        ({"method": "set"}, 1, Updates(50, 0.3, ranked=True)),
        ({"method": "set", "options": {"drop_fraction": 0.1}}, 1, Updates(50, 0.1, ranked=True)),
        ({"method": "gse", "options": {"subset_factor": 2.0}}, 1, Updates(50, 0.3, ranked=True, candidates=2.0)),
        ({"method": "rigl"}, 1, Updates(50, 0.3, ranked=True, scores_all=True)),
        ({"method": "rigl"}, 2, Updates(50, 0.3, ranked=True, candidates=4 * 0.3, sketches=16)),
        ({"method": "srigl"}, 2, Updates(50, 0.3, ranked=True, sketches=16)),
        ({"method": "vrpge", "options": {"masks": 3}}, 1, Updates(50, masked=0.5, trained=0.5, forwards=2.0)),
        ({"method": "top-kast", "options": {"pool": 3}}, 1, Updates(50, 0.3 * (1 - 1 / 3), ranked=True, masked=1 / 3)),
        ({"method": "gradual"}, 1, Updates(50, ranked=True)),
    ],
)
def test_updates_of_methods(options, devices, updates):
    assert planned(devices=devices, update_every=50, **options).updates() == updates


def test_updates_are_as_far_apart_as_in_a_run_on_real_data():
    assert planned("gpt").updates().every == 100
    assert planned("gpt-nano").updates().every == int(0.75 * 8 * 100 / 8)  # eight, in 8 epochs of 1600 texts


def test_other_sizes():
    assert planned().scaled(3).config.width == 192
    assert planned("mlp", block_size=32).scaled(2).config.width == 64
    assert planned("resnet20").scaled(12).config.width_multiplier == 1.5


@pytest.mark.parametrize(("name", "value"), [("agent", True), ("transform", "wide")])
def test_what_no_plan_is_made_of(name, value):
    with pytest.raises(InputError, match=f"{name} is on, of which no plan is made; drop the option"):
        planned(options={name: value})
