"""Whole trainings of publications: their values, what outweighs them, and what is said to differ."""

from __future__ import annotations

import json
import math

import numpy
import pytest
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.lab import Config
from sparsekern.lab.papers import FAMILIES, PAPERS, deviations, with_paper
from sparsekern.lab.recipes import find
from sparsekern.lab.report.page import command_of
from sparsekern.lab.train import Learner
from tests.lab.runs import run_of

CIFAR = {"name": "CIFAR-10", "train_images": 50_000, "image_shape": [3, 32, 32], "classes": 10}


def paper(name, **values):
    return Config(**with_paper({"paper": name, "data": "x", "device": "cpu", **values}))


def test_every_name_is_a_configuration_of_its_data_network_and_sparsity():
    assert len(PAPERS) == sum(len(list(family.papers())) for family in FAMILIES), "no name is twice"
    for name in PAPERS:
        config = paper(name)
        assert name.endswith(f"-{100 * config.sparsity:g}") and config.block_size == 1
        assert config.method == name.removeprefix("agent-").partition("-")[0] or name.startswith("sparse-ift")
        assert bool(config.options.get("agent")) == name.startswith("agent")
        assert find(config.recipe).epochs is not None, "by which updates shorten"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gse-cifar10-resnet56-98", ("resnet56-gse", 200, 128, 0.1, 1000, 0.98)),
        ("gse-cifar100-vit-90", ("simplevit-gse", 200, 128, 0.01, 1000, 0.9)),
        ("rigl-cifar10-wrn22-95", ("wrn-22-2", 250, 128, 0.1, 100, 0.95)),
        ("set-itop-cifar10-resnet34-99", ("resnet34-cifar", 250, 128, 0.1, 1500, 0.99)),
        ("agent-rigl-itop-cifar10-vgg16-99", ("vgg16", 250, 128, 0.1, 4000, 0.99)),
        ("sparse-ift-wide-cifar100-resnet18-75", ("resnet18-cifar", 200, 128, 0.1, 100, 0.75)),
        ("vrpge-cifar10-resnet32-50", ("resnet32-double", 340, 256, 0.1, 100, 0.5)),
    ],
)
def test_the_values_are_the_published_ones(name, expected):
    config = paper(name).resolved(50_000)
    found = (config.recipe, config.epochs, config.batch_size, config.rate, config.update_every, config.sparsity)
    assert found == expected


def test_a_shorter_training_has_as_many_updates():
    assert paper("gse-cifar10-resnet56-98", epochs=20).resolved(50_000).update_every == 100
    assert paper("gse-cifar10-resnet56-98", epochs=20, update_every=7).resolved(50_000).update_every == 7
    assert paper("rigl-cifar10-wrn22-95", epochs=1).resolved(50_000).update_every == 1
    assert Config(recipe="resnet56-gse", preset="gse", epochs=20).resolved(50_000).update_every == 1000


def test_what_is_given_outweighs_the_paper():
    config = paper("agent-rigl-itop-cifar10-vgg16-99", sparsity=0.9, options={"agent_gamma": 0.5})
    assert config.sparsity == 0.9 and config.preset == "rigl-itop"
    assert config.options == {"allow_dense_scores": True, "agent": True, "agent_gamma": 0.5}
    other = paper("agent-rigl-itop-cifar10-vgg16-99", method="set")
    assert (other.method, other.preset, other.options, other.block_size) == ("set", None, {"agent": True}, 1)
    assert paper("gse-cifar10-vgg16-98", preset="gse-grabo").preset == "gse-grabo"
    assert with_paper({"epochs": 3}) == {"epochs": 3}
    assert "options" in with_paper({"paper": "rigl-cifar10-wrn22-90", "data": "x"})
    assert not Config(**with_paper({"paper": "rigl-cifar10-wrn22-90", "data": "x", "sparse": False})).options


def test_what_differs_is_said():
    exact = paper("gse-cifar10-resnet56-98").resolved(50_000, "crop-flip")
    (only,) = deviations(exact, CIFAR)
    assert only == "candidates are scored on the batch of the step; theirs on ten more images a class"
    changes = {
        "block_size": 16,
        "epochs": 4,
        "method": "set",
        "sparsity": 0.9,
        "rate": 0.2,
        "augment": "none",
        "accumulate": 2,
    }
    other = paper("gse-cifar10-resnet56-98", **changes).resolved(100)
    digits = {"name": "digits", "train_images": 100, "image_shape": [1, 8, 8], "classes": 10}
    assert deviations(other, digits) == [
        "blocks of 16x16 in place of single weights",
        only,
        "epochs 4 in place of 200; schedules and updates are in proportion",
        "digits (1 x 8 x 8, 10 classes) in place of CIFAR-10",
        "set in place of gse",
        "sparsity 90 % in place of 98 %",
        "rate 0.2 in place of 0.1",
        "augment none in place of crop-flip",
        "update every 1 in place of 20",
        "accumulate 2 in place of 1",
    ]
    assert deviations(Config().resolved(100), digits) == []


def test_the_fine_tuning_of_vrpge_begins_when_its_filters_are_chosen():
    run = run_of(
        paper("vrpge-cifar10-resnet32-50", epochs=34, batch_size=500, width_multiplier=0.125), None, (3, 32, 32)
    )
    assert run.arguments["stop"] == pytest.approx(60) and run.steps == 68
    rates = [run.recipe.schedule.factor(step, run.steps) for step in range(68)]
    assert rates[:60] == pytest.approx([(1 + math.cos(math.pi * step / 60)) / 2 for step in range(60)])
    assert rates[60:] == [0.01] * 8


@pytest.mark.parametrize(
    "name",
    [
        "gse-cifar10-vit-98",
        "rigl-cifar10-wrn22-90",
        "set-itop-cifar10-vgg16-95",
        "vrpge-cifar10-resnet32-50",
        "sparse-ift-wide-cifar100-resnet18-50",
    ],
)
def test_a_training_of_each_publication_takes_a_step(name):
    small = {"batch_size": 2, "width_multiplier": 0.125, "epochs": 1}
    learner = Learner(run_of(paper(name, **small), None, (3, 32, 32)), "sparse", 0)
    assert math.isfinite(learner.step())


def test_the_command_says_what_differs_before_training_and_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
    images = numpy.random.default_rng(0).integers(256, size=(20, 32, 32, 3), dtype="uint8")
    parts = {"train_images": images, "test_images": images, "train_labels": numpy.arange(20) % 10}
    numpy.savez(tmp_path / "small.npz", **parts, test_labels=numpy.arange(20) % 10)
    out = tmp_path / "run"
    options = [
        "--data",
        tmp_path / "small.npz",
        "--epochs=1",
        "--width-multiplier=0.125",
        "--batch-size=10",
        "--out",
        out,
    ]
    arguments = ["train", "--paper=gse-cifar10-vgg16-90", *options, "--no-dense", "--device=cpu"]
    result = CliRunner().invoke(application(), [str(one) for one in arguments], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    said = [line.removeprefix("not as published: ") for line in result.stderr.splitlines() if "published: " in line]
    assert said[1:] == [
        "epochs 1 in place of 200; schedules and updates are in proportion",
        "batch size 10 in place of 128",
        "width multiplier 0.125 in place of 1.0",
    ]
    file = json.loads((out / "config.json").read_text())
    assert file["deviations"] == said and file["config"]["paper"] == "gse-cifar10-vgg16-90"
    assert CliRunner().invoke(application(), ["report", str(out)]).exit_code == 0
    page = (out / "report.html").read_text()
    assert "the training <b>gse-cifar10-vgg16-90</b>" in page and all(
        text.replace("'", "&#39;") in page for text in said
    )
    words = command_of(Config.from_json(file["config"])).split()
    assert words[:2] == ["sparsekern", "train"] and "--recipe" not in words and "--preset" not in words
    assert words[words.index("--paper") + 1] == "gse-cifar10-vgg16-90" and words[words.index("--epochs") + 1] == "1"


def test_the_list_names_them_all_by_what_a_shell_makes_of_braces():
    shown = CliRunner().invoke(application(), ["train", "--list"]).stdout
    for family in FAMILIES:
        assert family.pattern in shown and family.source in shown
    assert FAMILIES[6].pattern == "agent-rigl-cifar10-wrn22-{90,99}"
    values = json.loads(CliRunner().invoke(application(), ["train", "--list", "--json"]).stdout)
    assert values["papers"] == list(PAPERS)
