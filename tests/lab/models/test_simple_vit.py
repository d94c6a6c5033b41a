import math

import pytest
import torch

from sparsekern.lab.models import SimpleViT, simplevit_tiny
from sparsekern.lab.models.simple_vit import Attention, positions

TINY = {"patch": 2, "depth": 1, "features": 8, "heads": 2, "head_features": 4, "hidden": 12}


def test_parameters():
    layer = 2 * 1024 + (512 * 1152 + 1152) + (384 * 512 + 512) + (512 * 256 + 256) + (256 * 512 + 512)
    total = (48 * 512 + 512) + 4 * layer + 1024 + (512 * 10 + 10)
    with torch.device("meta"):
        assert sum(p.numel() for p in simplevit_tiny(10).parameters()) == total == 4_243_466


def test_positions_by_hand():
    place = positions(2, 3, 8)  # waves 1 and 1/10000; features: sin x, cos x, sin y, cos y
    assert place.shape == (6, 8)
    assert place[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    y, x = 1, 2
    expected = [f(c * w) for c, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for w in (1, 1e-4)]
    assert place[5].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("features", [4, 6, 0])
def test_features_that_no_position_fits(features):
    with pytest.raises(ValueError, match=f"features is {features}; it must be a multiple of 4, and 8 or more"):
        positions(2, 2, features)


def test_attention_is_its_formula():
    layer = Attention(8, heads=2, head_features=3).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    centred = x - x.mean(2, keepdim=True)
    normed = centred / (centred.square().mean(2, keepdim=True) + layer.norm.eps).sqrt()
    q, k, v = (normed @ layer.qkv.weight.T + layer.qkv.bias).split(6, dim=2)
    heads = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / 3**0.5).softmax(2)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(x), torch.cat(heads, 2) @ layer.out.weight.T + layer.out.bias)


def test_a_patch_is_a_square_of_the_image():
    model = SimpleViT(3, 2, (4, 6), **TINY)
    seen = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    image = torch.arange(48.0).reshape(1, 2, 4, 6)
    assert model(image).shape == (1, 3)
    assert seen[0].shape == (1, 6, 8)
    patch = image[0, :, 2:4, 4:6]  # the last one: row 1, column 2
    assert torch.equal(seen[0][0, 5], patch.permute(1, 2, 0).reshape(-1))


def test_the_place_of_a_patch_matters():
    torch.manual_seed(0)
    model = SimpleViT(3, 1, (4, 4), **TINY)
    torch.nn.init.ones_(model.layers[0].feed_forward.fc1.bias)
    torch.nn.init.normal_(model.head.weight)
    image = torch.randn(1, 1, 4, 4)
    assert not torch.allclose(model(image), model(image.roll(2, 3)))


def test_other_channels_and_widths():
    model = simplevit_tiny(5, in_channels=1, image_size=(8, 12), width_multiplier=0.5)
    assert model(torch.ones(2, 1, 8, 12)).shape == (2, 5)
    assert model.layers[0].attention.heads == 3 and model.layers[0].attention.qkv.weight.shape == (3 * 3 * 64, 256)
    assert "place" not in model.state_dict()


def test_initial_values():
    torch.manual_seed(0)
    model = simplevit_tiny(10)
    assert not model.head.weight.any() and not model.embed.bias.any()
    assert model.embed.weight.std().item() == pytest.approx(48**-0.5, rel=0.05)
    weight = model.layers[0].feed_forward.fc1.weight
    assert 0.99 * (6 / 768) ** 0.5 < weight.abs().max().item() <= (6 / 768) ** 0.5


def test_an_image_that_is_no_whole_number_of_patches():
    with pytest.raises(ValueError, match=r"image_size is \(32, 30\); both sides must be multiples of the patch, 4"):
        simplevit_tiny(10, image_size=(32, 30))
