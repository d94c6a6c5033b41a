import json

import pytest
import torch

from sparsekern.errors import InputError
from sparsekern.lab.config import Config
from sparsekern.lab.resolved import usable_device
from tests.lab.runs import run_of


def test_the_default_is_what_the_readme_promises():
    config = Config()
    assert (config.width, config.block_size, config.sparsity, config.method) == (2048, 16, 0.9, "set")
    assert (config.recipe, config.batch_size, config.rate, config.seeds) == ("mlp", 64, 1e-3, 5)
    assert config.networks == ("sparse", "dense")
    assert Config(dense=False).networks == ("sparse",)
    assert Config(sparse=False).networks == ("dense",)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("block_size", 0, "1 or more"),
        ("width", -5, "1 or more"),
        ("width", 1.5, "whole number"),
        ("epochs", 0, "1 or more"),
        ("batch_size", True, "whole number"),
        ("update_every", 0, "1 or more"),
        ("seeds", 0, "1 or more"),
        ("width_multiplier", True, "a number"),
        ("augment", "flip", "one of none, crop, crop-flip"),
        ("sparsity", 1.0, r"\[0, 1\)"),
        ("sparsity", float("nan"), r"\[0, 1\)"),
        ("sparsity", "0.9", "a number"),
        ("rate", 0.0, "above 0"),
        ("rate", float("inf"), "above 0"),
        ("rate", float("nan"), "above 0"),
        ("method", "sett", "one of static, set"),
        ("preset", "gsee", "one of set-mocanu, set-rigl"),
        ("options", [], "a dictionary"),
        ("data", 3, "a text"),
        ("dense", 1, "true or false"),
        ("sparse", "yes", "true or false"),
        ("device", "tpu", "cpu, cuda"),
        ("device", "meta", "cpu, cuda"),
        ("device", 3.5, "a text"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(name, value, rule):
    with pytest.raises(InputError, match=rf"{name} is .*{rule}") as error:
        Config(**{name: value})
    assert error.value.parameter == name


@pytest.mark.parametrize(
    ("images", "epochs", "update_every"), [(1438, 20, 43), (10_001, 5, 73), (60_000, 5, 100), (10, 20, 1)]
)
def test_open_values_follow_the_size_of_the_data(images, epochs, update_every):
    resolved = Config().resolved(images)
    assert (resolved.epochs, resolved.update_every) == (epochs, update_every)
    assert resolved.device in ("cpu", "cuda") and resolved.augment == "none"


@pytest.mark.parametrize(
    ("channels", "augment", "resolved"),
    [(3, None, "crop-flip"), (1, None, "none"), (3, "none", "none"), (1, "crop", "crop")],
)
def test_grey_images_are_not_varied_unless_asked(channels, augment, resolved):
    run = run_of(Config(recipe="resnet20", augment=augment), shape=(channels, 8, 8))
    assert run.config.augment == run.task.augment == resolved


def test_the_recipe_decides_what_is_not_given():
    config = Config(recipe="vgg16-small", rate=0.05)
    assert (config.batch_size, config.rate, config.seeds, config.width) == (128, 0.05, 1, None)
    resolved = config.resolved(50_000)
    assert (resolved.epochs, resolved.update_every) == (200, 1000)
    assert Config(recipe="vgg16-small", epochs=2, update_every=7).resolved(50_000).update_every == 7
    assert Config(recipe="vgg16-small", epochs=2).resolved(50_000).update_every == 73  # eight moves


def test_the_title_of_the_network():
    assert Config(width=64).network_title == "MLP of width 64"
    assert Config(recipe="resnet20").network_title == "ResNet-20"
    assert Config(recipe="resnet20", width_multiplier=1.5).network_title == "ResNet-20, 1.5 times as wide"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "resnet-20"}, "recipe is 'resnet-20', which is unknown; did you mean resnet20"),
        *(
            ({"recipe": "resnet20", "width_multiplier": value}, "width_multiplier is .*; it must be a number above 0")
            for value in (0.0, -1.0, float("nan"))
        ),
        ({"recipe": "resnet20", "width": 64}, "width is 64, but recipe resnet20 has none; give a width_multiplier"),
        ({"width_multiplier": 2.0}, "width_multiplier is 2.0, but recipe mlp has none; give a width"),
        ({"block_size": 65, "width": 64}, "block_size is 65, larger than the layers of width 64; choose smaller block"),
        ({"sparsity": 90}, r"sparsity is 90; it is the fraction absent .* \(did you mean 0.9\?\)"),
        ({"dense": False, "sparse": False}, "dense and sparse are false, which leaves nothing to train"),
        (
            {"sparse": False, "options": {"agent": True}},
            "^agent would change nothing: only the dense twin is trained; drop it, or",
        ),
        (
            {"sparse": False, "options": {"agent": True, "spectral": True}},
            "^(agent, spectral|spectral, agent) would change nothing: .* drop them, or",
        ),
        ({"preset": "gse", "method": "set"}, "preset is 'gse', whose method is gse, but method is 'set'"),
        ({"options": {"masks": 3}}, "masks is 3, but method set has no such option; vrpge has it"),
    ],
)
def test_options_that_contradict_each_other(values, message):
    with pytest.raises(InputError, match=message):
        Config(**values)


def test_given_values_stay():
    config = Config(epochs=3, update_every=7, augment="crop", device="cpu")
    assert config.resolved(1438) == config


def test_json_and_back():
    for config in (
        Config(data="x.npz", sparsity=0.5, epochs=2),
        Config(recipe="resnet56", width_multiplier=2),
        Config(preset="gse-grabo", options={"subset_factor": 2.0, "drop_fraction": 0.1}),
    ):
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("change", [{"depth": 3}, {"width": ...}])
def test_json_of_another_version_is_refused(change):
    values = {k: v for k, v in (Config().to_json() | change).items() if v is not ...}
    with pytest.raises(ValueError, match=f"other entries .*{next(iter(change))}"):
        Config.from_json(values)


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable_device("cuda") == torch.device("cuda")
    assert usable_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device is 'cuda:1', but PyTorch sees 1"):
        usable_device("cuda:1")


def test_the_preset_names_the_method():
    config = Config(preset="gse-imagenet")
    assert config.method == "gse" and Config(preset="rigl", method="rigl").method == "rigl"
    assert config.resolved(50_000).update_every == 1000
    assert Config(preset="gse", update_every=7).resolved(50_000).update_every == 7
    assert Config(preset="set-mocanu", batch_size=64).resolved(1000).update_every == 16, "an epoch"


def test_options_by_who_takes_them():
    config = Config(method="vrpge", options={"pool": 3, "masks": 4})
    run = run_of(config)
    assert run.arguments["masks"] == 4 and run.pool == 3.0 and "pool" not in run.arguments
    assert list(config.options) == ["masks", "pool"]


def test_the_title_of_the_method():
    assert Config().method_title == "set"
    assert Config(preset="gse-grabo", options={"scope": "layer"}).method_title == "gse-grabo, scope layer"
    assert Config(method="rigl", options={"regrow": True}).method_title == "rigl, regrow"
    assert Config(options={"drop_fraction": 0.1, "agent": False}).method_title == "set, drop fraction 0.1, no agent"
    assert Config(options={"spectral": True, "agent": True}).method_title == "set, agent", "a record changes no method"
