import pytest
import torch
from torch.nn.functional import pad

from sparsekern.lab.tasks import MARGIN, augmented


def images(n=6):
    return torch.arange(1.0, n * 2 * 5 * 7 + 1).reshape(n, 2, 5, 7)


def candidates(image, augmentation):
    """Return every image that may come out of one, with what was drawn for it."""
    wide = pad(image, (MARGIN,) * 4)
    for down in range(2 * MARGIN + 1):
        for right in range(2 * MARGIN + 1):
            crop = wide[:, down : down + 5, right : right + 7]
            yield (down, right, False), crop
            if augmentation == "crop-flip":
                yield (down, right, True), crop.flip(2)


@pytest.mark.parametrize("augmentation", ["crop", "crop-flip"])
def test_every_image_is_one_of_its_crops(augmentation, generator):
    x = images(200)
    y = augmented(x, augmentation, generator)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    drawn = []
    for image, out in zip(x, y, strict=True):
        (found,) = {what for what, crop in candidates(image, augmentation) if torch.equal(crop, out)}
        drawn.append(found)
    downs, rights, mirrored = zip(*drawn, strict=True)
    assert set(downs) == set(rights) == set(range(9)), "200 draws miss one of nine with a probability of 1e-9"
    assert any(down != right for down, right in zip(downs, rights, strict=True))
    assert set(mirrored) == ({False, True} if augmentation == "crop-flip" else {False})
    assert torch.equal(x, images(200)), "the images themselves were changed"


def test_the_generator_alone_decides():
    x = images()
    torch.manual_seed(0)
    first = augmented(x, "crop-flip", torch.Generator().manual_seed(7))
    torch.manual_seed(1)
    assert torch.equal(first, augmented(x, "crop-flip", torch.Generator().manual_seed(7)))
    assert not torch.equal(first, augmented(x, "crop-flip", torch.Generator().manual_seed(8)))


def test_none_is_nothing(generator):
    x, state = images(), generator.get_state()
    assert augmented(x, "none", generator) is x
    assert torch.equal(generator.get_state(), state)
