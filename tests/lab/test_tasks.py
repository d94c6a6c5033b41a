from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from sparsekern.lab.config import Config
from sparsekern.lab.recipes import RECIPES
from sparsekern.lab.resolved import resolve
from sparsekern.lab.results import best_step
from sparsekern.lab.tasks import MARGIN, Metric, Task, augmented
from sparsekern.lab.train import Learner


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


class Copying(Task):
    """Repeat the input. Another kind of task than images: no classes, and less of its metric is better."""

    metric = Metric("test_error", "error_gap", "error", "", 1, "", higher_is_better=False, examples="test_images")
    examples = 8

    def describe(self):
        return {"name": "copying"}

    def prepared(self, recipe, network, augment, device):
        return self

    def model_arguments(self):
        return {"size": 16}

    def order(self, generator):
        return torch.randn(8, 16, generator=generator)

    def batch(self, order, number, size, generator):
        inputs = order[number * size : (number + 1) * size]
        return inputs, inputs

    def loss(self, model, batch):
        return (model(batch[0]) - batch[1]).square().mean()

    def evaluate(self, model):
        return {"test_error": float(self.loss(model, (torch.eye(16), torch.eye(16))))}

    @staticmethod
    def examples_of(described):
        return 8

    @classmethod
    def load(cls, path, max_gib):
        return cls()

    @classmethod
    def noise(cls, described, examples):
        return cls()


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_another_kind_of_task_needs_no_other_loop(monkeypatch, network):
    def model(size, width):
        return nn.Sequential(nn.Linear(size, width), nn.Linear(width, size))

    recipe = replace(RECIPES["mlp"], name="copying", model=model, kept_dense=("1",), task=Copying, width=16)
    monkeypatch.setitem(RECIPES, "copying", replace(recipe, needs_image_size=False, block_size=8, batch_size=4))
    run = resolve(Config(recipe="copying", sparsity=0.5, epochs=2, device="cpu", update_every=2), Copying())
    assert (run.batches, run.steps) == (2, 4)
    learner = Learner(run, network, seed=0)
    before = learner.evaluate()["test_error"]
    for _ in range(2):
        learner.step(), learner.step()
        row = learner.finish_epoch()
    assert row["test_error"] < before and "test_accuracy" not in row
    assert best_step([row], [network], Copying.metric) == 4
