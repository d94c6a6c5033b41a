import pytest
import torch

from sparsekern.training.closures import backpropagate, loss_of


@pytest.mark.parametrize(
    ("closure", "text"),
    [
        (lambda: torch.ones(3), r"a loss of shape \(3,\)"),
        (lambda: 1.0, "a loss of type float"),
        (lambda: None, "NoneType"),
    ],
)
def test_a_closure_without_a_loss(closure, text):
    with pytest.raises(ValueError, match=text + ".*it must return a tensor of one number"):
        loss_of(closure)


def test_no_closure():
    with pytest.raises(TypeError, match="closure is a Tensor; it must be a function that computes the loss"):
        loss_of(torch.ones(()))


def test_a_loss_without_a_graph():
    with pytest.raises(ValueError, match="a loss that requires no grad; compute it from the model's output"):
        loss_of(lambda: torch.ones(()))
    with torch.no_grad():
        assert loss_of(lambda: torch.ones(())) == 1


def test_gradients_are_scaled_and_added_and_the_loss_is_not():
    x = torch.tensor(3.0, requires_grad=True)
    loss = backpropagate(x * x, torch.amp.GradScaler("cpu", init_scale=8.0))
    assert loss == 9 and not loss.requires_grad and x.grad == 48
    backpropagate(x * x, None)
    assert x.grad == 54
