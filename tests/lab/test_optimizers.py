import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.lab.optimizers import SGD, AdamW, parameter_groups


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
    optimizer = SGD(weight_decay=0.5, momentum=0.9, nesterov=nesterov).build(layer, 0.1)
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
    optimizer = AdamW(weight_decay=0.5, decay_all=False).build(layer, 0.1)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.zeros(1)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(2 * (1 - 0.1 * 0.5)) and layer.bias.item() == 2


def test_adamw_is_pytorchs():
    group = AdamW().build(nn.Linear(1, 1), 0.1).param_groups[0]
    usual = torch.optim.AdamW(nn.Linear(1, 1).parameters(), lr=0.1).param_groups[0]
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        key: usual[key] for key in ("lr", "betas", "eps", "weight_decay")
    }
