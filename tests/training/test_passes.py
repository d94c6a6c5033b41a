"""What several passes over one batch have in common."""

from __future__ import annotations

import torch
from torch import nn

from sparsekern.training.passes import RandomState, backpropagate, loss_of, scale_of


def test_dropout_draws_the_same_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    x = torch.randn(4, 8)
    randomness = RandomState(model)
    first = model(x)
    after = torch.get_rng_state()
    assert not torch.equal(model(x), first)
    randomness.restore()
    assert torch.equal(model(x), first)
    assert torch.equal(torch.get_rng_state(), after)


def test_a_scale():
    cpu = torch.device("cpu")
    assert scale_of(None, cpu) == 1
    assert scale_of(torch.amp.GradScaler("cpu", init_scale=8.0), cpu) == 8


def test_without_gradients_a_loss_needs_no_graph():
    with torch.no_grad():
        assert loss_of(lambda: torch.ones(())) == 1


def test_gradients_are_scaled_and_added_and_the_loss_is_not():
    x = torch.tensor(3.0, requires_grad=True)
    loss = backpropagate(x * x, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert loss == 9 and not loss.requires_grad and x.grad == 48
    backpropagate(x * x, None)
    assert x.grad == 54
