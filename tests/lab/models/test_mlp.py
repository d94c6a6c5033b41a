import torch

from sparsekern.lab.models import mlp


def test_three_hidden_layers():
    model = mlp(3, 2, (4, 5), width=16)
    parameters = (40 * 16 + 16) + 2 * (16 * 16 + 16) + (16 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert [name for name, _ in model.named_children()][::2] == ["flatten", "relu0", "relu1", "relu2"]
    assert model(torch.ones(7, 2, 4, 5)).shape == (7, 3)


def test_it_is_three_times_a_linear_layer_and_relu():
    model = mlp(3, 1, (4, 4), width=8).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    y = x.reshape(2, 16)
    for name in ("input", "hidden1", "hidden2"):
        layer = model.get_submodule(name)
        y = (y @ layer.weight.T + layer.bias).clamp(min=0)
    output = model.get_submodule("output")
    torch.testing.assert_close(model(x), y @ output.weight.T + output.bias)
