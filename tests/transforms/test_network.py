"""Whole networks: iso-FLOP, what stays dense, initial variances, and every refusal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.analysis import profile
from sparsekern.lab.models import mlp, resnet18_cifar, resnet20, simplevit_tiny, vgg16_small
from sparsekern.transforms import SparseFactorized, Width, transform
from sparsekern.transforms.network import TRANSFORMS

IMAGE = torch.empty(2, 3, 32, 32)


def cost_of_a_block(model, x):
    """Return the multiply-adds of the most expensive block."""
    layers = sk.sparse_layers(model)
    return max(
        row.tokens * layers[name].values[0].numel() for name, row in profile(model, x).layers.items() if name in layers
    )


NETWORKS = {
    "resnet": lambda width: resnet20(10, 3, width),
    "vgg": lambda width: vgg16_small(10, 3, width),
    "vit": lambda width: simplevit_tiny(10, 3, (32, 32), width),
    "mlp": lambda width: mlp(10, 3, (8, 8), width(512)),
}


@pytest.mark.parametrize(
    ("network", "sparsity"),
    [("resnet", 0.5), ("resnet", 0.75), ("resnet", 0.9), ("mlp", 0.5), ("mlp", 0.9), ("vgg", 0.75), ("vit", 0.5)],
)
def test_wide_networks_take_the_flops_of_the_dense_one(network, sparsity):
    """To half a block of one layer, with wider stem, head and attention charged."""
    x = torch.empty(2, 3, 8, 8) if network == "mlp" else IMAGE
    build = NETWORKS[network]
    model = transform(build, "wide", sparsity, x, block_size=16)
    asked, got = profile(build(Width()), x).multiply_adds, profile(model, x).multiply_adds
    assert abs(got - asked) <= cost_of_a_block(model, x) / 2
    dense = {name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    ran = list(profile(model, x).layers)
    assert dense == {ran[0], ran[-1]}


@pytest.mark.parametrize("name", ["parallel", "factorized", "doped"])
def test_the_others_keep_the_flops_of_every_layer(name):
    """In place, so that a network that is built already will do, with any residual graph."""
    dense = resnet20(10)
    model = transform(dense, name, 0.75, IMAGE, block_size=16)
    asked, got = profile(dense, IMAGE), profile(model, IMAGE)
    for layer_name in [n for n in asked.layers if n not in ("conv1", "fc")]:
        parts = sum(row.multiply_adds for part, row in got.layers.items() if part.startswith(f"{layer_name}."))
        whole = asked.layers[layer_name]
        assert abs(parts - whole.multiply_adds) <= 128 * whole.tokens
    assert {n for n in ("conv1", "fc") if type(model.get_submodule(n)) in (nn.Conv2d, nn.Linear)} == {"conv1", "fc"}
    assert isinstance(dense.layer1[0].conv1, nn.Conv2d)  # the given network is not changed
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_no_sparsity_gives_the_dense_network_back(name):
    state = torch.get_rng_state()
    found = transform(NETWORKS["resnet"], name, 0, IMAGE)
    assert torch.equal(state, torch.get_rng_state())
    again = transform(NETWORKS["resnet"], name, 0, IMAGE)
    assert not sk.sparse_layers(found)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found(x), again(x))
    given = resnet20(10)
    assert torch.equal(transform(given, name, 0, IMAGE).eval()(x), given.eval()(x))


def test_the_width_of_resnet18():
    """0.75 doubles it: 555 M multiply-adds as before, and as many blocks as the dense layers have, but for the stem."""
    model = transform(lambda width: resnet18_cifar(100, 3, width), "wide", 0.75, IMAGE[:1], block_size=32)
    assert model.conv1.out_channels == 128 and model.fc.in_features == 1024
    assert abs(profile(model, IMAGE[:1]).multiply_adds - 555_468_800) <= 32 * 32 * 1024 / 2
    stored, cells = (
        sum(f(one) for one in sk.sparse_layers(model).values())
        for f in (lambda o: o.topology.blocks(), lambda o: o.grid.cells)
    )
    assert 1 - stored / cells == pytest.approx(0.7510, abs=1e-3)


def test_layers_may_be_matched_alone():
    """Then the stem and the head come on top."""
    build = NETWORKS["mlp"]
    x = torch.empty(1, 3, 8, 8)
    model = transform(build, "wide", 0.75, x, block_size=16, match="layers")
    layers = sk.sparse_layers(model)
    assert sum(one.topology.elements() for one in layers.values()) == 2 * 512 * 512
    assert profile(model, x).multiply_adds == 2 * 512 * 512 + 192 * 1024 + 1024 * 10


def test_blocks_are_shared_out_by_a_distribution():
    x = torch.empty(1, 3, 8, 8)

    def build(width):
        small, large = width(64), width(512)
        return nn.Sequential(
            nn.Flatten(), nn.Linear(192, small), nn.Linear(small, large), nn.Linear(large, large), nn.Linear(large, 5)
        )

    found = {}
    for distribution in ("uniform", "er"):
        model = transform(build, "wide", 0.75, x, block_size=16, distribution=distribution)
        found[distribution] = [one.sparsity for one in sk.sparse_layers(model).values()]
    assert found["uniform"][0] == pytest.approx(found["uniform"][1], abs=0.01)
    assert found["er"][0] < found["uniform"][0] and found["er"][1] > found["uniform"][1]


@pytest.mark.parametrize("network", ["resnet", "vgg"])
def test_each_layer_varies_as_its_twin(network):
    """Inputs of mean square 1; the paper's own values are the wide network's, masked: less by what is absent."""
    build = NETWORKS[network]
    dense = transform(build, "wide", 0, IMAGE)
    model = transform(build, "wide", 0.75, IMAGE, block_size=16)
    paper = transform(build, "wide", 0.75, IMAGE, block_size=16, init="paper")
    for name in sk.sparse_layers(model):
        weight = dense.get_submodule(name).weight.detach()
        twin = float(weight[0].numel() * weight.square().mean())
        drawn, masked = (
            float(m.get_submodule(name).dense_weight().flatten(1).square().sum(1).mean()) for m in (model, paper)
        )
        assert drawn == pytest.approx(twin, rel=0.1) and masked < 0.7 * twin
    first = next(iter(profile(model, IMAGE).layers))
    stems = [m.get_submodule(first).weight.detach() for m in (dense, model)]
    variances = [float(w[0].numel() * w.square().mean()) for w in stems]
    assert variances[1] == pytest.approx(variances[0], rel=1e-4)  # the wider stem, too


def test_the_seed_decides_all():
    first, again, other = (transform(NETWORKS["vgg"], "wide", 0.75, IMAGE, block_size=16, seed=s) for s in (0, 0, 1))
    pairs = list(zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.fc.weight, other.fc.weight)


@pytest.mark.parametrize("method", ["SET", "RigL", "GSE"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_blocks_move_in_all_of_them(name, method):
    model = transform(lambda width: mlp(10, 1, (8, 8), width(64)), name, 0.75, torch.empty(4, 1, 8, 8), block_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = getattr(sk, method)(model, optimizer, update_every=1)
    blocks = {n: layer.topology.blocks() for n, layer in sk.sparse_layers(model).items()}
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    moved = False
    for _ in range(3):
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        moved |= sparse.step()
    assert moved and blocks == {n: layer.topology.blocks() for n, layer in sk.sparse_layers(model).items()}


def test_any_config_that_takes_a_width():
    """As for a model of another library: the function passes the width on, whole heads here."""

    def build(width):
        hidden = width(64)
        return nn.Sequential(
            nn.Embedding(50, hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.Linear(4 * hidden, hidden),
            nn.Linear(hidden, 50),
        )

    model = transform(build, "wide", 0.5, torch.zeros(2, 7, dtype=torch.int64), block_size=16, ignore=["3"])
    assert model[0].embedding_dim == 96 and list(sk.sparse_layers(model)) == ["1", "2"]  # 90.5
    asked = profile(build(Width()), torch.zeros(2, 7, dtype=torch.int64)).multiply_adds
    assert abs(profile(model, torch.zeros(2, 7, dtype=torch.int64)).multiply_adds - asked) <= 14 * 128


def test_a_network_that_is_built_cannot_be_widened():
    with pytest.raises(ValueError, match="model is a ResNet that is built already, and cannot be widened"):
        transform(resnet20(10), "wide", 0.5, IMAGE)


def test_functions_that_do_not_follow_the_width():
    with pytest.raises(ValueError, match=r"model builds no wider layer at a larger width: it must pass width\(...\)"):
        transform(lambda width: resnet20(10), "wide", 0.5, IMAGE)

    def deeper(width):
        return nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(width(1))))

    with pytest.raises(ValueError, match="model builds another network at another width: 2, 3, 4, 5, 6, 7, 8 differ"):
        transform(deeper, "wide", 0.5, torch.empty(1, 3, 2, 2), block_size=8, ignore=())


def test_what_stays_dense_may_be_too_much():
    with pytest.raises(ValueError, match="what stays dense .* or match='layers'"):
        transform(lambda width: mlp(10, 3, (32, 32), width(256)), "wide", 0.5, IMAGE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "deep"}, "name is 'deep'; it must be one of wide, parallel, factorized, doped"),
        ({"match": "layer"}, "match is 'layer'; it must be one of network, layers"),
        ({"sparsity": 75}, "sparsity is 75"),
        ({"init": "mup"}, "init is 'mup'"),
        ({"name": "doped", "distribution": "er"}, "distribution is 'er'; doped keeps the FLOPs of every layer"),
        ({"distribution": "ER"}, "distribution is 'ER'; it must be one of uniform, er, er-matrix, erk"),
        ({"ignore": ["conv2"]}, "ignore: 'conv2' matches no module"),
    ],
)
def test_options_out_of_range(options, message):
    arguments = {"name": "wide", "sparsity": 0.5, "sample_input": IMAGE} | options
    with pytest.raises(ValueError, match=message):
        transform(NETWORKS["resnet"], **arguments)


def test_the_activation_is_passed_on():
    model = transform(resnet20(10), "factorized", 0.5, IMAGE, block_size=16, activation=nn.SiLU)
    assert all(type(m.activation) is nn.SiLU for m in model.modules() if isinstance(m, SparseFactorized))


def test_a_network_that_is_too_large_while_it_is_dense():
    def build(width):
        hidden = width(64)
        return nn.Sequential(
            nn.Linear(8, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 4)
        )

    # at 0.75 twice as wide: the middle 4 * 64 * 64, everything else twice 8 * 64 + 64 + 64 + 4 * 64 + 4
    gib = 4 * (4 * 4096 + 2 * (512 + 64 + 64 + 256 + 4)) / 2**30
    transform(build, "wide", 0.75, torch.zeros(1, 8), block_size=8, max_gib=gib)
    with pytest.raises(ValueError, match=r"sparsity is 0.75, which makes the network 2 times as wide.*max_gib"):
        transform(build, "wide", 0.75, torch.zeros(1, 8), block_size=8, max_gib=gib * 0.999)
    with pytest.raises(ValueError, match="max_gib is 0; it must be a number above 0"):
        transform(build, "wide", 0.75, torch.zeros(1, 8), block_size=8, max_gib=0)


def test_convolutions_of_one_dimension_are_left_dense_or_refused_by_name():
    model = nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    x = torch.randn(2, 8, 8)
    sparse = transform(model, "doped", sparsity=0.5, sample_input=x, block_size=8, ignore="4")
    assert type(sparse[0]) is nn.Conv1d and type(sparse[2]) is not nn.Linear and sparse(x).shape == (2, 64)
    with pytest.raises(ValueError, match="targets match '0', a Conv1d; Sparse-IFT takes nn.Linear and nn.Conv2d"):
        transform(model, "doped", sparsity=0.5, sample_input=x, block_size=8, targets=nn.Conv1d, ignore=())
