import pytest
import torch

import sparsekern as sk
from sparsekern.lab import Config, checkpoint
from sparsekern.lab.build import build
from sparsekern.lab.per_layer import measure

DATA = {"train_images": 40, "image_shape": [1, 8, 8], "classes": 10}


def config(**changes):
    options = {"width": 64, "block_size": 8, "sparsity": 0.75, "epochs": 1, "batch_size": 20, "device": "cpu"}
    return Config(**options | changes).resolved(40, 1)


@pytest.fixture
def saved(tmp_path):
    """Return a checkpoint of networks whose blocks are elsewhere than those that a new network has."""

    def save(asked):
        models = {name: build(name, asked, (1, 8, 8), 10, seed=5) for name in asked.networks}
        return models, checkpoint.save(tmp_path, 1, models, {})

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
