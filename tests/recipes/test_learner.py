import copy

import pytest
import torch

from sparsekern.recipes.config import Config
from sparsekern.recipes.data import load
from sparsekern.recipes.learner import WARM_UP, Learner

CONFIG = Config(width=32, block_size=8, sparsity=0.5, epochs=3, batch_size=500, update_every=2, device="cpu")


@pytest.fixture(scope="module")
def data():
    return load()


def run(learner, steps):
    losses = []
    for _ in range(steps):
        losses.append(learner.step())
        if learner.batch == learner.batches:
            learner.finish_epoch()
    return losses


def test_an_epoch_takes_every_image_once_in_the_same_order_for_both(data):
    sparse, dense = (Learner(name, CONFIG, data, seed=3) for name in ("sparse", "dense"))
    assert sparse.batches == 3
    seen = {}
    for learner in (sparse, dense):
        seen[learner.network] = []
        for batch in range(learner.batches):
            learner.batch = batch
            seen[learner.network].append(learner._next_batch()[0])
    assert all(torch.equal(s, d) for s, d in zip(seen["sparse"], seen["dense"], strict=True))
    assert [len(part) for part in seen["sparse"]] == [500, 500, 438]
    rows = torch.cat(seen["sparse"]).sort(0).values
    assert torch.equal(rows, data.train_images.sort(0).values)
    sparse.epoch, sparse.batch = 1, 0
    assert not torch.equal(sparse._next_batch()[0], seen["sparse"][0])


def test_the_row_of_an_epoch(data):
    learner = Learner("sparse", CONFIG, data, seed=0)
    losses = [learner.step() for _ in range(3)]
    row = learner.finish_epoch()
    assert (row["seed"], row["network"], row["epoch"], row["step"]) == (0, "sparse", 1, 3)
    assert row["loss"] == pytest.approx((500 * losses[0] + 500 * losses[1] + 438 * losses[2]) / 1438)
    assert 0 < row["test_accuracy"] < 1
    assert row["ms_per_step"] is None, "the first steps are not timed"
    assert row["sparsity/hidden1"] == 0.5 and row["updates"] == 1
    assert learner.model.training
    run(learner, WARM_UP)
    assert learner.finish_epoch()["ms_per_step"] > 0


def test_the_accuracy_counts_the_test_images(data):
    learner = Learner("dense", CONFIG, data, seed=0)
    run(learner, 3)
    right = learner.model(data.test_images).argmax(1) == data.test_labels
    assert learner._accuracy() == pytest.approx(right.float().mean().item())


def test_a_dense_row_has_no_numbers_of_a_method(data):
    learner = Learner("dense", CONFIG, data, seed=0)
    learner.step()
    assert not [key for key in learner.finish_epoch() if "/" in key]


def test_no_block_moves_in_the_last_quarter(data):
    learner = Learner("sparse", CONFIG, data, seed=0)
    run(learner, 9)  # 9 steps in all: stop at 6, updates after 2 and 4
    assert learner.method.updates == 2


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_goes_on_bit_for_bit(data, network):
    learner = Learner(network, CONFIG, data, seed=0)
    run(learner, 4)
    model, state = copy.deepcopy(learner.model.state_dict()), copy.deepcopy(learner.state_dict())
    losses = run(learner, 4)
    other = Learner(network, CONFIG, data, seed=0)
    other.model.load_state_dict(model)
    other.load_state_dict(state)
    assert run(other, 4) == losses
    assert all(
        torch.equal(a, b)
        for a, b in zip(learner.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    )


def test_sizes(data):
    learner = Learner("dense", CONFIG, data, seed=0)
    learner.step()
    parameters = 64 * 32 + 32 + 2 * (32 * 32 + 32) + 32 * 10 + 10
    sizes = learner.sizes()
    assert sizes["stored_parameters"] == parameters
    assert 16 * parameters <= sizes["training_bytes"] < 16 * parameters + 100


def test_a_loss_that_is_not_finite(data):
    learner = Learner("dense", Config(**{**CONFIG.to_json(), "rate": 1e30}), data, seed=0)
    with pytest.raises(ValueError, match=r"loss of the dense network is nan after \d+ steps; choose a lower rate"):
        run(learner, 5)
