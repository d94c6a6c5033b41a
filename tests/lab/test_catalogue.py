import inspect

import pytest
import torch
from torch import nn

from sparsekern.lab import models
from sparsekern.lab.augment import AUGMENTATIONS
from sparsekern.lab.catalogue import RECIPES, find


def published(name):
    """Return the network of a recipe for ten classes, without memory."""
    recipe = RECIPES[name]
    sizes = {"image_size": (32, 32)} if recipe.needs_image_size else {}
    sizes |= {} if recipe.width is None else {"width": recipe.width}
    with torch.device("meta"):
        return recipe.model(num_classes=10, in_channels=3, **sizes)


@pytest.mark.parametrize("name", RECIPES)
def test_first_and_last_layer_stay_dense_and_nothing_else(name):
    layers = [n for n, m in published(name).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert RECIPES[name].kept_dense == (layers[0], layers[-1])


@pytest.mark.parametrize("name", RECIPES)
def test_channels_last_is_for_convolutions(name):
    assert RECIPES[name].channels_last == any(isinstance(m, nn.Conv2d) for m in published(name).modules())


def test_every_network_has_a_recipe():
    made = {recipe.model.__name__ for recipe in RECIPES.values()} | {"gpt_small"}  # reads text, recipes images
    assert made == {name for name in models.__all__ if inspect.isfunction(getattr(models, name))}


# steps of the rate, in epochs, as they are published
@pytest.mark.parametrize(
    ("name", "milestones", "warm_up", "rates"),
    [
        ("resnet20", (82, 123), 0, (0.1, 0.01, 0.001)),
        ("resnet18-cifar", (60, 120, 160), 0, (0.1, 0.02, 0.004, 0.0008)),
        ("resnet50", (30, 70, 90), 5, (0.1, 0.01, 0.001, 0.0001)),
        ("wrn-28-4", (60, 120, 160), 0, (0.1, 0.02, 0.004, 0.0008)),
        ("vgg16", (125, 188), 0, (0.1, 0.01, 0.001)),
        ("vgg16-small", (80, 120), 5, (0.1, 0.01, 0.001)),
    ],
)
def test_the_rate_falls_when_the_source_says(name, milestones, warm_up, rates):
    recipe = RECIPES[name]
    by_epoch = [recipe.rate * recipe.schedule.factor(epoch, recipe.epochs) for epoch in range(recipe.epochs)]
    assert by_epoch[:warm_up] == pytest.approx([0.1 * (e + 1) / warm_up for e in range(warm_up)])
    for begin, end, rate in zip((warm_up, *milestones), (*milestones, recipe.epochs), rates, strict=True):
        assert by_epoch[begin:end] == pytest.approx([rate] * (end - begin))


def test_the_augmentations_are_known():
    assert {recipe.augmentation for recipe in RECIPES.values()} <= set(AUGMENTATIONS)


def test_find():
    assert find("resnet20") is RECIPES["resnet20"]
    assert next(iter(RECIPES)) == "mlp"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resent20", "did you mean resnet20"),
        ("wrn-28-10", "did you mean wrn-28-4"),
        ("vgg", "did you mean vgg16"),
        ("xyzzy", "there are mlp, resnet20, .*simplevit-tiny"),
        (None, "there are mlp"),
    ],
)
def test_a_name_that_there_is_not(name, hint):
    with pytest.raises(ValueError, match=rf"recipe is {name!r}, which there is not; {hint}.* \(--list shows all\)"):
        find(name)
