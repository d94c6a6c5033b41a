"""FLOPs and memory of a training against counts by hand."""

from __future__ import annotations

import pytest
import torch

import sparsekern as sk
from sparsekern.lab import checkpoint
from sparsekern.lab.config import Config
from sparsekern.lab.cost import measure, training_cost
from sparsekern.lab.data import load
from tests.lab.runs import changed, learner_of, network_of, run_of

CONFIG = Config(width=32, block_size=8, sparsity=0.5, epochs=3, batch_size=500, update_every=2, seeds=1, device="cpu")
IMAGES, STEPS = 1438, 9
ENDS = 64 * 32 * 4 + 32 * 10 * 6
"""FLOPs of an image in the dense layers at both ends: the first has no gradient of its input."""

HIDDEN = 2 * 32 * 32
"""Elements of the hidden layers."""


@pytest.fixture(scope="module")
def data():
    return load()


def cost(data, network="sparse", **changes):
    return training_cost(run_of(changed(CONFIG, **changes), data), network)


def images(epochs=3):
    return epochs * IMAGES


def test_a_score_is_computed_once(data, monkeypatch):
    """For all copies whose steps are counted, which have as many blocks as it chose, and slots for more."""
    made, sparsify = [], sk.sparsify_

    def sparsified(*args, **options):
        model = sparsify(*args, **options)
        topologies = [layer.topology for layer in sk.sparse_layers(model).values()]
        made.append(("score" in options, [(t.blocks(), t.slots) for t in topologies]))
        return model

    monkeypatch.setattr(sk, "sparsify_", sparsified)
    asked = {"method": "gse", "options": {"score": "snip", "scope": "global", "capacity": 1.25}}
    assert cost(data, update_every=100, **asked)["training_flops"] == (ENDS + 3 * HIDDEN) * images()
    assert [scored for scored, _ in made] == [True] + [False] * (len(made) - 1) and len(made) > 3
    sizes = made[0][1]
    assert all(copy == sizes for _, copy in made) and sizes[0] != sizes[1] and sizes[0][0] < sizes[0][1]


def test_the_dense_twin(data):
    whole = cost(data, "dense")
    assert whole["training_flops"] == (ENDS + 6 * HIDDEN) * images()
    parameters = 64 * 32 + 32 + HIDDEN + 2 * 32 + 32 * 10 + 10
    assert whole["peak_bytes"] > 16 * parameters  # weights, gradients, two moments


def test_stored_elements_count(data):
    static = cost(data, method="static")
    assert static["training_flops"] == (ENDS + 3 * HIDDEN) * images()
    assert cost(data, method="set")["training_flops"] == static["training_flops"]


def test_scores_count_once_an_update(data):
    # updates after steps 2, 4 (stop at 6 of 9), each on a batch, score every element at 2 FLOPs
    extra = cost(data, method="rigl")["training_flops"] - cost(data, method="static")["training_flops"]
    assert extra == pytest.approx(2 * 2 * HIDDEN * IMAGES / 3, abs=1)


def test_blocks_that_go_count_until_then(data):
    # updates after steps 2 and 4 of 9: all blocks, 1/8 of the way from half of them, half of them
    by_hand = ENDS + HIDDEN * (2 * 6 + 2 * (3 + 3 / 8) + 5 * 3) / STEPS
    assert cost(data, method="gradual")["training_flops"] == pytest.approx(by_hand * images(), rel=1e-6)


def test_granet_scores_all_places_besides(data):
    gradual, granet = (cost(data, method=method)["training_flops"] for method in ("gradual", "granet"))
    half = cost(data, method="gradual", options={"initial_sparsity": 0.5})["training_flops"]
    assert granet == pytest.approx(half + 2 * 2 * HIDDEN * IMAGES / 3, rel=1e-6) and granet != gradual


def test_what_a_soft_bound_has_grown_counts(data):
    # 8 blocks of 16 and a quarter more in the 6 steps before stop, 8 in the other 3
    options = {"soft_bound": True, "capacity": 1.5, "drop_fraction": 0.25}
    by_hand = ENDS + 6 * HIDDEN * (6 * 10 / 16 + 3 * 8 / 16) / STEPS
    assert cost(data, method="mest", options=options)["training_flops"] == pytest.approx(by_hand * images(), rel=1e-6)
    assert cost(data, method="mest")["training_flops"] == cost(data, method="static")["training_flops"]


def test_masks_are_passes_until_they_end(data):
    # 6 of 9 steps: forward under two masks, backward under one; then as static
    vrpge = cost(data, method="vrpge")["training_flops"]
    ends, forward = ENDS + 64 * 32 * 2 + 32 * 10 * 2, HIDDEN  # FLOPs of an image: 2 for each stored element
    by_hand = ((ends + 4 * forward) * 6 + (ENDS + 3 * forward) * 3) / STEPS * images()
    assert vrpge == pytest.approx(by_hand, rel=0.05)
    rare = cost(data, method="vrpge", options={"structure_every": 5})["training_flops"]
    assert rare < vrpge
    assert cost(data, method="vrpge", options={"masks": 4})["peak_bytes"] > 0


def test_forward_sets_compute_a_part_of_what_is_trained(data):
    # 6 of 9 steps: forward and the input's gradient of half of the elements, gradients of all; then as static
    by_hand = ((ENDS + (2 + 2) * HIDDEN / 2 + 2 * HIDDEN) * 6 + (ENDS + 3 * HIDDEN) * 3) / STEPS * images()
    assert cost(data, method="top-kast")["training_flops"] == pytest.approx(by_hand, rel=1e-6)


def test_a_dense_score_shows_in_the_peak(data):
    changes = {"block_size": 1, "sparsity": 0.95, "width": 128, "batch_size": 16}
    dense_scores = cost(data, method="rigl", options={"allow_dense_scores": True}, **changes)["peak_bytes"]
    assert dense_scores >= cost(data, method="static", **changes)["peak_bytes"] + 4 * 128 * 128


@pytest.mark.parametrize("options", [{}, {"agent_batches": 2}, {"agent_estimate": "gradients", "agent_every": 3}])
def test_agent_costs_what_it_says_in_a_training(data, options):
    options = {"agent": True, **options}
    plain, whole = cost(data), cost(data, options=options)
    learner = learner_of("sparse", changed(CONFIG, options=options), data)
    for _ in range(3):
        for _ in range(3):
            learner.step()
        learner.finish_epoch()
    assert learner.agent.metrics()["c"] > 0
    extra = learner.agent.metrics()["extra_flops"] * IMAGES / (3 * 500)  # it takes the last batch for a whole one
    assert whole["training_flops"] - plain["training_flops"] == pytest.approx(extra, abs=1)
    values = sum(p.numel() for p in learner.model.parameters()) * 4
    assert whole["peak_bytes"] >= plain["peak_bytes"] + 2 * values


def test_agent_waits_for_the_choice_of_vrpge(data):
    def extra(**options):
        both = (cost(data, method="vrpge", options={**options, **more}) for more in ({"agent": True}, {}))
        return next(both)["training_flops"] - next(both)["training_flops"]

    step = (ENDS + 3 * HIDDEN) * IMAGES / 3
    assert extra() == pytest.approx(3 * step, rel=1e-6)  # the choice is made at step 6 of 9: one snapshot, c = 0


DATA = {"train_images": 40, "image_shape": [1, 8, 8], "classes": 10}


def config(**changes):
    options = {"width": 64, "block_size": 8, "sparsity": 0.75, "epochs": 1, "batch_size": 20, "device": "cpu"}
    return Config(**options | changes)


@pytest.fixture
def saved(tmp_path):
    """Return a checkpoint of networks whose blocks are elsewhere than those that a new network has."""

    def save(asked):
        models = {name: network_of(name, asked, (1, 8, 8), 10, seed=5) for name in asked.networks}
        return models, checkpoint.save(tmp_path, 1, {name: model.state_dict() for name, model in models.items()}, {})

    return save


def test_the_account_is_that_of_the_checkpoint(saved):
    models, newest = saved(config())
    account, sizes = measure(config(), DATA, newest, timed=False)
    rows = {row.name: row for row in account.rows}
    assert list(rows) == ["input", "hidden1", "hidden2", "output"]
    layer = sk.sparse_layers(models["sparse"])["hidden1"]
    row = rows["hidden1"]
    assert (row.blocks, row.cells, row.sparsity) == (layer.topology.blocks(), 64, layer.sparsity)
    values = 4 * layer.values.numel()
    assert (row.values_bytes, row.gradient_bytes) == (values, values) and row.state_bytes >= 2 * values  # AdamW's
    assert sizes["dense"]["stored_parameters"] == sum(p.numel() for p in models["dense"].parameters())
    assert list(sizes) == ["sparse", "dense"] and account.milliseconds == {}


def test_the_account_of_blocks_that_a_score_chose(saved):
    asked = config(method="static", options={"score": "grasp"}, dense=False)
    models, newest = saved(asked)
    account, _ = measure(asked, DATA | {"train_images": 30}, newest, timed=False)
    layers = sk.sparse_layers(models["sparse"])
    assert [row.blocks for row in account.rows if row.block] == [layer.topology.blocks() for layer in layers.values()]
    assert layers["hidden1"].topology.blocks() != layers["hidden2"].topology.blocks()


def test_the_layers_are_timed_on_request(saved):
    _, newest = saved(config(dense=False))
    account, sizes = measure(config(dense=False), DATA, newest, timed=True)
    assert account.milliseconds.keys() == {"hidden1", "hidden2"} and list(sizes) == ["sparse"]


def test_a_run_without_a_sparse_network(saved):
    _, newest = saved(config(sparse=False))
    account, sizes = measure(config(sparse=False), DATA, newest, timed=True)
    assert list(sizes) == ["dense"] and account.milliseconds == {}
    assert {row.kind for row in account.rows} == {"Linear"}


def test_a_checkpoint_that_does_not_fit(saved):
    _, newest = saved(config())
    with pytest.raises(ValueError, match="sparse.safetensors"):
        measure(config(width=128), DATA, newest, timed=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_here(saved):
    _, newest = saved(config())
    with pytest.raises(ValueError, match="device is 'cuda'"):
        measure(config(device="cuda"), DATA, newest, timed=False)
