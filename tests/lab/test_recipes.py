import math

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.lab import models
from sparsekern.lab.recipes import RECIPES, adamw, find, parameter_groups, sgd
from sparsekern.lab.schedules import Constant, Cosine, Milestones
from sparsekern.lab.tasks import AUGMENTATIONS
from tests.lab.runs import IMAGE_RECIPES


def published(name):
    """Return the network of a recipe for ten classes, without memory."""
    recipe = RECIPES[name]
    sizes = {"image_size": (32, 32)} if recipe.needs_image_size else {}
    sizes |= {} if recipe.width is None else {"width": recipe.width}
    with torch.device("meta"):
        return recipe.model(num_classes=10, in_channels=3, **sizes)


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_first_and_last_layer_stay_dense_and_nothing_else(name):
    layers = [n for n, m in published(name).named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert RECIPES[name].kept_dense == (layers[0], layers[-1])


@pytest.mark.parametrize("name", IMAGE_RECIPES)
def test_channels_last_is_for_convolutions(name):
    assert RECIPES[name].channels_last == any(isinstance(m, nn.Conv2d) for m in published(name).modules())


def test_every_network_has_a_recipe():
    made = {recipe.model for recipe in RECIPES.values()} | {models.gpt_small}  # for the benchmarks
    assert made == {getattr(models, name) for name in models.__all__ if name.islower()}


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
    with pytest.raises(ValueError, match=rf"recipe is {name!r}, which is unknown; {hint}.* \(--list shows all\)"):
        find(name)


def factors(schedule, steps):
    return [schedule.factor(step, steps) for step in range(steps)]


def test_constant():
    assert factors(Constant(), 3) == [1, 1, 1]


def test_cosine_by_hand():
    assert factors(Cosine(), 4) == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])
    # two steps of warm-up, then a cosine of four
    expected = [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    assert factors(Cosine(warm_up=1 / 3), 6) == pytest.approx(expected)


def test_milestones_by_hand():
    assert factors(Milestones((0.5, 0.75), 0.1), 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    assert factors(Milestones((0.5,), 0.2, warm_up=0.3), 10) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1] + 5 * [0.2])


@pytest.mark.parametrize("schedule", [Cosine(warm_up=0.05), Milestones((0.3, 0.7, 0.9), 0.1, warm_up=0.05)])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_training_of_few_steps(schedule, steps):
    assert all(0 < factor <= 1 for factor in factors(schedule, steps))


def model():
    made = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 4))
    made.append(sk.SparseLinear(8, 8, block_size=1, sparsity=0.5))
    return made


def test_norms_and_biases_can_be_left_out():
    made = model()
    decay, rest = parameter_groups(made, 0.5, decay_all=False)
    assert [p is q for p, q in zip(decay["params"], (made[0].weight, made[3].weight, made[4].values), strict=True)]
    assert {id(p) for p in decay["params"]} == {id(p) for p in (made[0].weight, made[3].weight, made[4].values)}
    assert {id(p) for p in rest["params"]} == {id(p) for p in (*made[1].parameters(), made[3].bias, made[4].bias)}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.5, 0)


def test_one_group_otherwise():
    made = model()
    (group,) = parameter_groups(made, 0.5, decay_all=True)
    assert group["params"] == list(made.parameters()) and group["weight_decay"] == 0.5


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, 2.0)
    optimizer = sgd(weight_decay=0.5, momentum=0.9, nesterov=nesterov).build(layer, 0.1)
    weight, running = 2.0, 0.0
    for gradient in (3.0, -1.0):
        layer.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        total = gradient + 0.5 * weight
        running = 0.9 * running + total
        weight -= 0.1 * (total + 0.9 * running if nesterov else running)
    assert layer.weight.item() == pytest.approx(weight)


def test_adamw_takes_weights_away_in_proportion_to_the_rate():
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 2.0)
    nn.init.constant_(layer.bias, 2.0)
    optimizer = adamw(weight_decay=0.5, decay_all=False).build(layer, 0.1)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.zeros(1)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 * (1 - 0.1 * 0.5)) and layer.bias.item() == 2


def test_adamw_is_pytorchs():
    group = adamw().build(nn.Linear(1, 1), 0.1).param_groups[0]
    usual = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.1).param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        key: usual[key] for key in ("lr", "betas", "eps", "weight_decay")
    }


def test_the_floor_of_a_cosine_is_where_it_ends():
    schedule = Cosine(floor=0.1, warm_up=0.1)
    assert schedule.factor(99, 100) == pytest.approx(0.1, abs=1e-3) and schedule.factor(10, 100) == 1
    assert schedule.factor(55, 100) == pytest.approx(0.55)
