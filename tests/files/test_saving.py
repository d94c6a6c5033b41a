"""From any form of a model into any other, and nothing is changed by a state that does not fit."""

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from tests.nn.test_block_sparse import X, assert_index_is_fresh, layer


def model(seed=0, **options):
    conv = sk.SparseConv2d(4, 6, 3, groups=2, sparsity=0.5, block_size=2, seed=seed)
    return nn.Sequential(layer(seed, **options), nn.BatchNorm1d(14), nn.Linear(14, 2), conv)


IMAGES = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))


def answers(net):
    net.eval()
    return net[2](net[1](net[0](X))), net[3](IMAGES)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_sparse_into_sparse_and_into_densified(tmp_path, name):
    source = model(0)
    sk.save(source, tmp_path / name)
    target = sk.load_(model(1), tmp_path / name)
    assert all(torch.equal(a, b) for a, b in zip(answers(target), answers(source), strict=True))
    dense = sk.load_(sk.densify(model(1)), tmp_path / name)
    for key, value in sk.densify(source).state_dict().items():
        assert torch.equal(dense.state_dict()[key], value)


def test_other_blocks(tmp_path):
    sk.save(model(0, block_size=1), tmp_path / "m.pt")
    target = sk.load_(model(1, capacity=16), tmp_path / "m.pt")
    assert torch.equal(target[0].dense_weight(), model(0, block_size=1)[0].dense_weight())
    assert_index_is_fresh(target[0])


def test_dense_into_sparse():
    dense = nn.Sequential(nn.Linear(10, 14))
    target = sk.load_(nn.Sequential(layer(0)), dense.state_dict())
    kept = target[0].dense_weight() != 0
    assert torch.equal(target[0].dense_weight()[kept], dense[0].weight[kept])


def test_onto_the_meta_device(tmp_path):
    sk.save(model(0), tmp_path / "m.safetensors")
    with torch.device("meta"):
        target = model(1)
    sk.load_(target, tmp_path / "m.safetensors", assign=True)
    assert torch.equal(target[0](X), model(0)[0](X))


def test_a_layer_that_is_the_model(tmp_path):
    sk.save(layer(0), tmp_path / "m.safetensors")
    assert torch.equal(sk.load_(layer(1), tmp_path / "m.safetensors")(X), layer(0)(X))
    dense = sk.load_(nn.Linear(10, 14), tmp_path / "m.safetensors")
    assert torch.equal(dense.weight, layer(0).dense_weight())


def changed(**tensors):
    return model(0).state_dict() | tensors


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the state does not fit the model: it lacks 0.bias, 0.col, 0.row, 0.values, 1.bias and"),
        (changed(a=torch.ones(1)), "it has unknown a$"),
        (changed(**{"2.weight": torch.ones(3, 3)}), r"2.weight has shape \(3, 3\), in the model \(2, 14\)"),
        (model(0, blocks=9).state_dict(), "0: the checkpoint fills 9 blocks of"),
        (nn.Sequential(sk.SparseLinear(10, 15, block_size=(4, 3))).state_dict(), r"0: the checkpoint is for a weight"),
    ],
)
@pytest.mark.parametrize("form", [lambda m: m, sk.densify], ids=["sparse", "dense"])
def test_a_state_that_does_not_fit_changes_nothing(state, message, form):
    target = form(model(1))
    before = copy.deepcopy(target.state_dict())
    if "fills 9" in message and form is sk.densify:
        sk.load_(target, state)  # a dense layer takes any number
        return
    if message.startswith("the state") and form is sk.densify:
        message = "it lacks 0.bias, 0.weight, 1.bias"
    with pytest.raises(ValueError, match=message):
        sk.load_(target, state)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_names_that_only_one_side_has_are_allowed_on_request():
    state = changed(a=torch.ones(1))
    del state["2.bias"]
    target = model(1)
    bias = target[2].bias.clone()
    sk.load_(target, state, strict=False)
    assert torch.equal(target[2].bias, bias) and torch.equal(target[0](X), model(0)[0](X))
    assert "a" in state and "2.bias" not in state, "the caller's dict is not touched"


def test_places_that_are_no_topology_do_not_go_into_a_dense_layer():
    state = changed()
    state["0.row"] = torch.zeros(8, dtype=torch.int32)
    with pytest.raises(ValueError, match="0: slots . and . are both at"):
        sk.load_(sk.densify(model(1)), state)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_places_that_are_no_topology_are_not_written(tmp_path, name):
    """As an average over ``state_dict()`` leaves them: ``load_`` would refuse the file, and the weights be lost."""
    net = model()
    sk.save(net, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    net[0].row.copy_(net[0].row.float().mul(0.5).int())
    net[0].col.zero_()
    with pytest.raises(ValueError, match=rf"{name} is not written: layer '0' is damaged: .* an average over"):
        sk.save(net, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [name]


def test_what_cannot_be_written_is_said_before_places_are_looked_at(tmp_path):
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    on_meta = nn.Sequential(sk.SparseLinear(8, 8, block_size=4, blocks=2, device="meta"))
    with pytest.raises(ValueError, match=r"m.pt cannot be written: 0.values is on the meta device and has no data"):
        sk.save(on_meta, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"m.pt cannot be written: 1._extra_state is not a tensor, and"):
        sk.save(nn.Sequential(sk.SparseLinear(8, 8, block_size=4, blocks=2), WithExtraState(2, 2)), tmp_path / "m.pt")
    assert not list(tmp_path.iterdir())
