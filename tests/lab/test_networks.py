import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern import SparseLinear, sparse_layers
from sparsekern.analysis import profile
from sparsekern.errors import InputError
from sparsekern.lab.config import Config
from sparsekern.lab.data import load
from sparsekern.lab.resolved import build, build_agent, build_method, build_places
from sparsekern.lab.train import Learner
from sparsekern.topology import allocate
from sparsekern.training import METHODS, PRESETS
from sparsekern.transforms import TRANSFORMS
from tests.lab.runs import changed, learner_of, network_of, run_of

CONFIG = Config(width=64, block_size=8, sparsity=0.75)
SHAPE = (1, 4, 5)


LAYERS = (nn.Linear, nn.Conv2d)


def test_hidden_layers_are_sparse_and_the_ends_are_the_twins():
    sparse, dense = (network_of(name, CONFIG, SHAPE, 3, seed=1) for name in ("sparse", "dense"))
    kinds = {name: type(module) for name, module in sparse.named_children()}
    assert [name for name, kind in kinds.items() if kind is SparseLinear] == ["hidden1", "hidden2"]
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    for name in ("input", "output"):
        assert isinstance(sparse.get_submodule(name), nn.Linear)
        assert torch.equal(sparse.get_submodule(name).weight, dense.get_submodule(name).weight)
    assert sparse.get_submodule("hidden1").sparsity == 0.75
    assert sparse(torch.ones(2, *SHAPE)).shape == dense(torch.ones(2, *SHAPE)).shape == (2, 3)


def test_only_the_seed_decides():
    torch.manual_seed(5)
    first = network_of("sparse", CONFIG, SHAPE, 3, seed=1).state_dict()
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(())), "the global generator was used"
    again, other = (network_of("sparse", CONFIG, SHAPE, 3, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(
        first["hidden1.row"] * 8 + first["hidden1.col"], other["hidden1.row"] * 8 + other["hidden1.col"]
    )
    assert not torch.equal(first["input.weight"], other["input.weight"])


def test_dense_layers_have_the_initial_distribution_of_torch():
    weight = network_of("dense", CONFIG, (1, 10, 10), 3, seed=0).get_submodule("input").weight
    assert 0.95 / 10 < weight.abs().max().item() <= 1 / 10


def test_a_sparsity_that_leaves_nothing():
    with pytest.raises(ValueError, match="every layer needs at least one"):
        network_of("sparse", Config(width=16, block_size=16), SHAPE, 3, seed=0)


def undefined(like, **how):
    """What torch.empty_like may return."""
    return torch.full_like(like, torch.nan if like.is_floating_point() else -1, **how)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("mlp", {"method": "vrpge"}),
        ("mlp", {"method": "top-kast"}),
        ("mlp", {"method": "gse", "options": {"agent": True, "capacity": 1.5}}),
        ("mlp", {"method": "static", "options": {"rewind": 0.0}}),
        ("resnet20", {"method": "srigl"}),
        ("resnet20", {"preset": "vrpge"}),
    ],
)
def test_places_without_values_are_those_of_the_training(recipe, options, monkeypatch):
    width = {"width": 64} if recipe == "mlp" else {}
    run = run_of(Config(recipe=recipe, **width, block_size=8, sparsity=0.75, epochs=3, update_every=2, **options))
    whole = Learner(run, "sparse", 0)
    monkeypatch.setattr("sparsekern.nn.block_sparse.draw_values", None)
    monkeypatch.setattr(torch, "empty_like", undefined)
    laid = Learner(run, "sparse", 0, build_places)
    for one, other in zip(sparse_layers(whole.model).values(), sparse_layers(laid.model).values(), strict=True):
        assert torch.equal(one.row, other.row) and torch.equal(one.col, other.col) and one.grid == other.grid
    assert repr(laid.method) == repr(whole.method) and laid.model.training == whole.model.training
    assert {n: p.shape for n, p in laid.model.named_parameters()} == {
        n: p.shape for n, p in whole.model.named_parameters()
    }


def test_a_score_and_a_transform_read_values():
    for options in ({"score": "snip"}, {"transform": "doped"}):
        run = run_of(Config(width=64, block_size=8, sparsity=0.75, options=options))
        whole, laid = build(run, "sparse", 0).state_dict(), build_places(run, "sparse", 0).state_dict()
        assert all(torch.equal(whole[name], laid[name]) for name in whole)


def test_convolutions_have_their_channels_last():
    model = network_of("dense", Config(recipe="resnet20", width_multiplier=0.5), (3, 8, 8), 10, seed=0)
    assert model.get_parameter("layer2.0.conv1.weight").is_contiguous(memory_format=torch.channels_last)
    assert model.get_parameter("layer2.0.conv1.weight").shape == (16, 8, 3, 3)


def test_the_image_size_reaches_the_network():
    model = network_of("sparse", Config(recipe="simplevit-tiny", width_multiplier=0.25), (1, 8, 12), 3, seed=0)
    assert model.get_buffer("place").shape == (2 * 3, 128)
    assert {name for name, m in model.named_modules() if isinstance(m, SparseLinear)} == {
        f"layers.{i}.{name}"
        for i in range(4)
        for name in ("attention.qkv", "attention.out", "feed_forward.fc1", "feed_forward.fc2")
    }


def test_blocks_are_shared_out_as_the_recipe_says():
    model = network_of("sparse", Config(recipe="simplevit-tiny", block_size=16), (3, 32, 32), 10, seed=0)
    layers = sparse_layers(model).values()
    grids, blocks = [layer.grid for layer in layers], [layer.topology.blocks() for layer in layers]
    assert blocks == allocate(grids, 0.9, "er") != allocate(grids, 0.9, "uniform")


def test_images_that_are_too_small():
    with pytest.raises(ValueError, match="data has images of 8 x 40; recipe vgg16 needs 32 x 32 or more: choose"):
        network_of("dense", Config(recipe="vgg16"), (3, 8, 40), 10, seed=0)


def method_of(**changes):
    run = run_of(changed(CONFIG, batch_size=100, epochs=20, **changes), None, SHAPE, 3)  # 200 steps
    model = build(run, "sparse", seed=1)
    return model, build_method(run, model, torch.optim.SGD(model.parameters(), lr=0.1), seed=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_its_name(name):
    _, method = method_of(method=name, update_every=7)
    assert type(method) is METHODS[name] and (method.seed, method.schedule.update_every) == (1, 7)
    assert (method.schedule.start, method.schedule.stop) == (0, 150)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_by_its_name(name):
    options = {"allow_dense_scores": True} if issubclass(PRESETS[name].method, sk.RigL) else {}
    more = {"update_every": 7} if name == "granet" else {}  # one of 1000 steps does not come
    model, method = method_of(method=None, preset=name, options=options, **more)
    assert type(method) is PRESETS[name].method and method.seed == 1
    if name.startswith("vrpge"):
        assert model.hidden1.sparsity < 0.75
    elif PRESETS[name].layers:  # layers of several sizes get several sparsities
        blocks = sum(m.topology.blocks() for m in method.layers.values())  # of 24 + 64 + 64 + 8 places
        assert blocks == (80 if name == "granet" else 40)
    else:
        assert model.hidden1.sparsity == 0.75
    first, last = PRESETS[name].dense in ("ends", "first"), PRESETS[name].dense == "ends"
    assert (isinstance(model.input, nn.Linear), isinstance(model.output, nn.Linear)) == (first, last)


def test_the_layers_of_a_preset():
    """GSE's have free slots, another variance, and a sparse stem at 1x1; the wish of an option counts for more."""
    _, method = method_of(method=None, preset="gse")
    assert all(layer.init_scale == 3**0.5 for layer in method.layers.values())
    assert [layer.topology.slots for layer in method.layers.values()] == [12, 15, 15, 8]  # of 9, 12, 12 and 7 blocks
    _, method = method_of(method=None, preset="gse", options={"capacity": 1.0})
    assert [layer.topology.slots for layer in method.layers.values()] == [9, 12, 12, 7]
    _, method = method_of(method="gse", options={"capacity": 1.5, "scope": "global"})
    assert [layer.topology.slots for layer in method.layers.values()] == [24, 24]
    for preset, names in (("rigl", ["conv1"]), ("gse", []), (None, ["conv1", "fc"])):
        config = Config(recipe="resnet20", preset=preset, block_size=1, sparsity=0.9)
        dense = [n for n, m in network_of("sparse", config, (3, 32, 32), 10, 0).named_modules() if type(m) in LAYERS]
        assert dense == names == list(config.kept_dense)
        assert config.sparse_title == {"rigl": "all layers but the first", "gse": "all layers"}.get(
            preset, "hidden layers"
        )


def test_options_reach_the_method():
    _, method = method_of(method="gse", options={"distribution": "grabo", "start": 0.1, "stop": 0.5, "scope": "global"})
    assert (method.distribution, method.scope) == ("grabo", "global")
    assert (method.schedule.start, method.schedule.stop) == (20, 100)


def test_options_outweigh_the_preset():
    _, method = method_of(method=None, preset="gse-imagenet", options={"drop_fraction": 0.05})
    assert (method.subset_factor, method.with_replacement) == (2.0, True)
    schedule = method.schedule
    assert (schedule.drop_fraction, schedule.stop, schedule.update_every) == (0.05, 120, 1000)


def test_a_pool_of_candidates_is_stored():
    model, method = method_of(method="vrpge", options={"pool": 3.0})
    assert model.hidden1.sparsity == 0.25 and method.budget.ratio == pytest.approx(1 / 3)
    model, method = method_of(method="vrpge", options={"pool": 8.0})  # more than there are
    assert model.hidden1.sparsity == 0 and method.budget.ratio == pytest.approx(1 / 4)
    model, method = method_of(method="vrpge", options={"pool": 1.0})
    assert model.hidden1.sparsity == 0.75 and method.budget.ratio == 1


@pytest.mark.parametrize("recipe", ["mlp", "resnet20"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_keeps_the_flops_of_the_dense_network(recipe, transform):
    """At the width asked for; the first and the last layer are dense, and wider where the network is."""
    sizes = {"width": 64} if recipe == "mlp" else {"width_multiplier": 0.5}
    config = Config(recipe=recipe, block_size=8, sparsity=0.75, options={"transform": transform}, **sizes)
    shape = SHAPE if recipe == "mlp" else (3, 8, 8)
    sparse, dense = (network_of(name, config, shape, 3, seed=1) for name in ("sparse", "dense"))
    x = torch.zeros(1, *shape)
    asked, got = (profile(model, x) for model in (dense, sparse))
    most = max(row.tokens for row in asked.layers.values()) * 64
    layers = 1 if transform == "wide" else len(asked.layers)
    assert abs(got.multiply_adds - asked.multiply_adds) <= layers * most / 2
    kept = ("input", "output") if recipe == "mlp" else ("conv1", "fc")
    assert all(type(sparse.get_submodule(name)) in (nn.Linear, nn.Conv2d) for name in kept)
    assert (sparse.get_submodule(kept[1]).weight.shape[1] > dense.get_submodule(kept[1]).weight.shape[1]) == (
        transform == "wide"
    )
    again = network_of("sparse", config, shape, 3, seed=1)
    assert all(
        torch.equal(a, b) for a, b in zip(sparse.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_candidates_of_a_transform_end_at_its_flops(transform):
    """VR-PGE stores two for each block that remains; what remains takes the FLOPs of the dense network."""
    options = {"transform": transform, "pool": 2.0}
    config = Config(width=64, block_size=8, sparsity=0.75, method="vrpge", options=options, update_every=5)
    run = run_of(config, None, SHAPE, 3)
    model = build(run, "sparse", seed=1)
    plain = network_of(
        "sparse", Config(width=64, block_size=8, sparsity=0.75, options={"transform": transform}), SHAPE, 3, 1
    )
    stored, wanted = ([n.topology.blocks() for n in sparse_layers(m).values()] for m in (model, plain))
    assert all(abs(n - 2 * m) <= 1 for n, m in zip(stored, wanted, strict=True))
    method = build_method(run, model, torch.optim.SGD(model.parameters(), lr=0.1), seed=0)
    assert method.budget.ratio * sum(stored) == pytest.approx(sum(wanted), abs=1)


@pytest.mark.parametrize("score", ["snip", "magnitude"])
def test_a_score_keeps_the_best_blocks_of_the_dense_network_on_the_first_batch(score):
    data = load()
    config = changed(CONFIG, method="static", options={"score": score}, batch_size=50, augment="crop", device="cpu")
    dense, sparse = (learner_of(network, config, data, seed=1) for network in ("dense", "sparse"))
    inputs, classes = sparse.next_batch().batch
    model = dense.model.double()
    nn.functional.cross_entropy(model(inputs.double()), classes).backward()
    layers = [model.get_submodule(name) for name in ("hidden1", "hidden2")]
    scores = [
        (layer.weight.detach() * layer.weight.grad if score == "snip" else layer.weight.detach().square())
        .unflatten(0, (8, 8))
        .unflatten(2, (8, 8))
        .sum((1, 3))
        .abs()
        .flatten()
        for layer in layers
    ]
    together = torch.cat(scores).topk(32).indices
    best = [together[together < 64], together[together >= 64] - 64]
    if score == "magnitude":  # each layer as many as the recipe gives it
        best = [part.topk(16).indices for part in scores]
    for name, layer, keys in zip(("hidden1", "hidden2"), layers, best, strict=True):
        kept = sparse.model.get_submodule(name)
        assert kept.topology.sorted_keys().tolist() == sorted(keys.tolist())
        assert torch.equal(kept.to_dense().weight[kept.to_dense().weight != 0], _at(layer, keys).float())


def _at(layer: nn.Linear, keys: torch.Tensor) -> torch.Tensor:
    """The weights of some blocks of 8 x 8, of eight columns of blocks, in the order of the matrix."""
    mask = torch.zeros(64, dtype=torch.bool).index_fill(0, keys, True).view(8, 1, 8, 1).expand(8, 8, 8, 8)
    return layer.weight.detach()[mask.reshape(64, 64)]


def test_a_score_outweighs_what_a_preset_says_of_drawn_values():
    config = Config(width=64, block_size=8, preset="gse", options={"score": "snip"}, batch_size=50, device="cpu")
    stored = [layer.topology for layer in sparse_layers(network_of("sparse", config, (1, 8, 8), 10, 0)).values()]
    assert [topology.slots >= topology.blocks() for topology in stored] == [True] * 4
    assert sum(topology.slots for topology in stored) > sum(topology.blocks() for topology in stored)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"options": {"score": "snip", "transform": "wide"}}, "score is snip, but transform draws the blocks"),
        ({"method": "gradual", "options": {"score": "snip"}}, "but method gradual begins with all blocks at this"),
        ({"method": "vrpge", "sparsity": 0.5, "options": {"score": "random"}}, "but method vrpge begins with all"),
        ({"sparsity": 0, "options": {"score": "magnitude"}}, "but method set begins with all blocks"),
        ({"recipe": "simplevit-tiny", "options": {"score": "snip"}}, "all scores by snip are 0"),
    ],
)
def test_a_score_without_effect(values, text):
    config = Config(**{"batch_size": 2, "block_size": 16, "device": "cpu", **values})
    with pytest.raises(InputError, match=text) as error:
        network_of("sparse", config, (3, 8, 8), 10, 0)
    assert error.value.parameter == "score"


def test_a_transform_that_needs_more_memory_than_allowed():
    config = Config(sparsity=0.999, options={"transform": "wide"})
    with pytest.raises(ValueError, match=r"31.6 times as wide: .* GiB, and max_gib is 8; choose a lower"):
        network_of("sparse", config, SHAPE, 3, seed=0)
    config = Config(width=64, block_size=8, sparsity=0.75, options={"transform": "wide", "transform_max_gib": 1e-6})
    with pytest.raises(InputError, match="max_gib is 1e-06") as error:
        network_of("sparse", config, SHAPE, 3, seed=0)
    assert error.value.parameter == "transform_max_gib"


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("agent_gamma", 7.0, r"gamma is 7.0; it must be a number in \[0, 1\]"),
        ("agent_alpha", 0.0, "alpha is 0.0; it must be a number in"),
        ("agent_batches", 0, "batches is 0; it must be 1 or more$"),
        ("agent_every", 5, "every is 5, but the losses of batches give one c after a pass; estimate must"),
        ("agent_scope", "layer", "scope is 'layer', but the losses"),
    ],
)
def test_an_error_of_agent_names_the_option_of_the_run(option, value, text):
    run = run_of(Config(width=64, block_size=8, options={"agent": True, option: value}), None, SHAPE, 3)
    model = build(run, "sparse", seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=text) as error:
        build_agent(run, model, optimizer, build_method(run, model, optimizer, 0))
    assert error.value.parameter == option


def test_a_transform_of_no_sparsity():
    with pytest.raises(ValueError, match="sparsity is 0, which transform turns into the dense network"):
        network_of(
            "sparse", Config(width=64, block_size=8, sparsity=0, options={"transform": "wide"}), SHAPE, 3, seed=0
        )
