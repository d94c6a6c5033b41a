"""sparsify_ and the selectors that it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.nn.selectors import matches, select
from sparsekern.topology import check_tied


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 8))


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def blocks(model: nn.Module) -> dict[str, int]:
    return {name: layer.topology.blocks() for name, layer in sk.sparse_layers(model).items()}


def test_every_linear_layer_by_default():
    model = mlp()
    assert sk.sparsify_(model, 0.75, 8) is model
    assert blocks(model) == {"0": 4, "2": 8, "4": 1}
    assert model[2].bias is None and model[0].bias is not None
    assert model(torch.ones(3, 16)).shape == (3, 8)


def test_device_dtype_training_flag_frozen_parameters_and_hooks_are_kept():
    model = mlp().to(torch.bfloat16).eval()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    seen = []
    model[0].register_forward_hook(lambda *a: seen.append(1))
    sk.sparsify_(model, 0.5, 8)
    assert model[0].values.dtype == torch.bfloat16 and not model[0].training
    assert not model[0].values.requires_grad and model[0].bias.requires_grad
    assert model[4].values.requires_grad and not model[4].bias.requires_grad
    model(torch.ones(1, 16, dtype=torch.bfloat16))
    assert seen == [1]


@pytest.mark.parametrize("network", [mlp, cnn])
def test_on_the_meta_device(network):
    with torch.device("meta"):
        model = sk.sparsify_(network(), 0.5, 8)
    other = sk.sparsify_(network(), 0.5, 8)
    assert all(layer.values.is_meta for layer in sk.sparse_layers(model).values())
    model.to_empty(device="cpu")
    for name, layer in sk.sparse_layers(model).items():
        assert torch.equal(layer.row, other.get_submodule(name).row), "seed and name decide, not the device"
        layer.reset_parameters()
        assert torch.equal(layer.values, other.get_submodule(name).values)


def test_targets_and_ignore():
    model = sk.sparsify_(mlp(), 0.5, 8, targets=["0", "re:[24]"], ignore="4")
    assert list(blocks(model)) == ["0", "2"]
    model = sk.sparsify_(mlp(), 0.5, 8, targets="*", ignore=lambda m, name: name == "0")
    assert list(blocks(model)) == ["2", "4"]


def test_sparsity_by_layer():
    model = sk.sparsify_(mlp(), {"2": 0.25, "*": 0.5}, 8)
    assert blocks(model) == {"0": 8, "2": 24, "4": 2}


def test_each_entry_of_sparsity_is_a_group_with_its_own_distribution():
    # ER gives blocks by R + C: layers 0 and 4 (8 x 2 and 1 x 4) share 10 blocks as 10 : 5, layer 4 holds only 4
    model = sk.sparsify_(mlp(), {"re:[04]": 0.5, "2": 0.5}, 8, distribution="er")
    assert blocks(model) == {"0": 7, "2": 16, "4": 3}


@pytest.mark.parametrize(("network", "tie_taps"), [(mlp, False), (cnn, True)])
def test_norm_keeps_values_and_biases(network, tie_taps):
    dense = network()
    model = sk.sparsify_(copy.deepcopy(dense), 0.5, 8, init="norm", tie_taps=tie_taps)
    for name, layer in sk.sparse_layers(model).items():
        twin, kept = dense.get_submodule(name), layer.dense_weight() != 0
        assert 0 < layer.topology.blocks() <= layer.grid.cells / 2 and kept.any()
        assert torch.equal(layer.dense_weight()[kept], twin.weight[kept])
        assert layer.bias is twin.bias is None or torch.equal(layer.bias, twin.bias)


def test_it_does_not_read_the_global_generator_and_layers_differ():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    state = torch.get_rng_state()
    sk.sparsify_(model, 0.5, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(model[0].values, model[1].values)
    assert model[0].name == "0" and model[1].name == "1"


@pytest.mark.parametrize("init", ["balanced", "random"])
def test_inits(init):
    model = sk.sparsify_(mlp(), 0.5, 8, init=init)
    assert blocks(model) == {"0": 8, "2": 16, "4": 2}


ERRORS = [
    (dict(targets="encoder.*"), "targets: 'encoder.*' matches no module"),
    (dict(targets=["0", "1"]), "targets: '1' matches only ReLU; it must match one of nn.Linear"),
    (dict(ignore="lm_head"), "ignore: 'lm_head' matches no module; nearest names"),
    (dict(ignore=["0", "2", "4"]), r"every target is ignored: nothing is left .*\(sparse already: none\)"),
    (dict(init="dense"), "init is 'dense'; it must be one of balanced, random, norm"),
    (dict(sparsity=1), "sparsity is 1; it is the fraction absent"),
    (dict(sparsity={"0": 0.5}), r"sparsity has no entry that matches '2'; add one, or a last entry '\*'"),
    (dict(sparsity={"*": 0.5, "5": 0.5}), "sparsity: '5' matches no module"),
    (dict(sparsity=0.99), r"sparsity 0.99 leaves 1 of 52 blocks for 3 layer\(s\)"),
    (dict(sparsity={"4": 0.9, "*": 0.5}), r"sparsity 0.9 leaves 0 of 4 blocks for 1 layer\(s\)"),
    (dict(distribution="ERK"), "distribution is 'ERK'; it must be one of uniform, er, er-matrix, erk"),
    (dict(block_size=(8, 0)), r"block_size is \(8, 0\)"),
]


@pytest.mark.parametrize(("options", "text"), ERRORS, ids=[text[:35] for _, text in ERRORS])
def test_errors_change_nothing(options, text):
    model = mlp()
    before = repr(model)
    with pytest.raises(InputError, match=text):
        sk.sparsify_(model, **({"sparsity": 0.5, "block_size": 8} | options))
    assert repr(model) == before


def test_what_is_found_wrong_in_the_last_layer_has_not_replaced_the_first():
    """NaN has no order of strength: that is found out only while the sparse layer is built."""
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model[4].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight holds NaN"):
        sk.sparsify_(model, 0.5, 8, init="norm")
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(model[0].weight, before["0.weight"])


def test_twice():
    model = sk.sparsify_(mlp(), 0.5, 8, ignore=["0", "4"])
    with pytest.raises(ValueError, match=r"nothing is left to make sparse \(sparse already: 2\)"):
        sk.sparsify_(model, 0.5, 8, ignore=["0", "4"])


# Convolutions.


def test_convolutions_are_sparse_but_for_stems_and_depthwise_ones(caplog):
    model = cnn().to(memory_format=torch.channels_last)
    with caplog.at_level("INFO", logger="sparsekern"):
        sk.sparsify_(model, 0.75, 8)
    assert blocks(model) == {"1": 18, "3": 8, "6": 4}
    assert type(model[0]) is type(model[2]) is nn.Conv2d
    assert model[1].stride == (2, 2) and model[1].padding == (1, 1) and model[1].bias is None
    assert "0: stays dense (stem)" in caplog.text and "2: stays dense (depthwise)" in caplog.text
    assert model(torch.ones(2, 3, 12, 12)).shape == (2, 10)
    assert isinstance(sk.densify(model)[1], nn.Conv2d) and type(sk.densify(model[1])) is nn.Conv2d
    torch.testing.assert_close(sk.densify(model)(torch.ones(2, 3, 12, 12)), model(torch.ones(2, 3, 12, 12)))


def test_convolutions_that_stay_dense_need_not_be_ignored_or_may_be():
    assert list(blocks(sk.sparsify_(cnn(), 0.5, 8, targets=nn.Conv2d, ignore="0"))) == ["1", "3"]
    assert list(blocks(sk.sparsify_(cnn(), 0.5, 8, targets=nn.Linear))) == ["6"]
    with pytest.raises(ValueError, match="every target is ignored"):
        sk.sparsify_(cnn(), 0.5, 8, targets=["0", "2"])


@pytest.mark.parametrize("init", ["balanced", "random", "norm"])
def test_tied_taps_are_rounded_to_whole_cells_of_channels(init):
    model = sk.sparsify_(cnn(), 0.7, 8, tie_taps=True, init=init)
    assert blocks(model)["1"] == 18  # 21.6 of 72 blocks: two of eight cells of channels, nine taps each
    check_tied(model[1].topology)
    assert model[1].tie_taps
    assert blocks(sk.sparsify_(cnn(), 0.95, 16, targets="1", tie_taps=True)) == {"1": 9}  # not none


def test_erk_spares_small_kernels_and_layers():
    """16 -> 32, 3x3: 2 + 4 + 6 / 8; 32 -> 64, 1x1: 4 + 8 + 2 / 8; the linear layer, 64 -> 10: 8 + 2."""
    model = sk.sparsify_(cnn(), 0.75, 8, distribution="erk")
    assert blocks(model) == {"1": 7, "3": 13, "6": 10}


def slots(model: nn.Module) -> dict[str, int]:
    return {name: layer.topology.slots for name, layer in sk.sparse_layers(model).items()}


def test_capacity_is_a_factor_of_the_blocks_and_never_more_than_the_grid():
    """Blocks are 4, 8 and 1 of 16, 32 and 4; a factor of 1.25 is rounded up, and one of 5 fills every grid."""
    assert slots(sk.sparsify_(mlp(), 0.75, 8, capacity=1.25)) == {"0": 5, "2": 10, "4": 2}
    assert slots(sk.sparsify_(mlp(), 0.75, 8, capacity=5)) == {"0": 16, "2": 32, "4": 4}
    model = sk.sparsify_(mlp(), 0.75, 8, capacity={"2": 2, "re:[02]": 1.5})
    assert slots(model) == {"0": 6, "2": 16, "4": 1} and blocks(model) == {"0": 4, "2": 8, "4": 1}


def test_free_slots_change_no_value():
    x = torch.randn(5, 16)
    plain, roomy = sk.sparsify_(mlp(), 0.5, 8), sk.sparsify_(mlp(), 0.5, 8, capacity=1.5)
    for name, layer in sk.sparse_layers(plain).items():
        assert torch.equal(layer.topology.sorted_keys(), roomy.get_submodule(name).topology.sorted_keys())
    roomy.load_state_dict(plain.state_dict())
    assert torch.equal(plain(x), roomy(x)) and slots(roomy) == {"0": 12, "2": 24, "4": 3}


def test_capacity_with_tied_taps_and_from_trained_weights():
    conv = nn.Sequential(nn.Conv2d(16, 16, 3))
    layer = sk.sparsify_(conv, 0.5, 8, tie_taps=True, capacity=1.3)[0]
    assert (layer.topology.blocks(), layer.topology.slots) == (18, 27), "three of the four channel blocks, in nine taps"
    layer = sk.sparsify_(mlp(), 0.5, 8, init="norm", capacity=1.5)[0]
    assert (layer.topology.blocks(), layer.topology.slots) == (8, 12)


def test_init_scale_multiplies_values_and_biases():
    plain, scaled = sk.sparsify_(mlp(), 0.5, 8), sk.sparsify_(mlp(), 0.5, 8, init_scale=3**0.5)
    for name in ("0", "2", "4"):
        a, b = plain.get_submodule(name), scaled.get_submodule(name)
        assert torch.allclose(a.values * 3**0.5, b.values, rtol=1e-6) and b.values.abs().max() > 0
        assert a.bias is None or torch.allclose(a.bias * 3**0.5, b.bias, rtol=1e-6)
    wide = sk.sparsify_(nn.Sequential(nn.Linear(1024, 1024)), 0.9, 1, init_scale=3**0.5)[0]
    fan_in = torch.bincount(wide.row, minlength=1024)[wide.row.long()]
    assert abs(float((wide.values.detach().flatten().square() * fan_in).mean()) - 1) < 0.01, "variance 1 / fan_in"
    wide.reset_parameters()
    assert abs(float((wide.values.detach().flatten().square() * fan_in).mean()) - 1) < 0.01, "and again"


def test_init_scale_dense_keeps_what_the_model_chose_for_each_layer():
    model = nn.Sequential(nn.Linear(512, 256), nn.Conv2d(64, 64, 3, groups=2), nn.Linear(256, 512, bias=False))
    for layer, std in zip(model, (0.02, 0.5, 0.001), strict=True):
        nn.init.normal_(layer.weight, std=std)
    biases = [model[0].bias.detach().clone(), nn.init.zeros_(model[1].bias)]
    sk.sparsify_(model, {"0": 0.9, "1": 0.5, "2": 0.75}, 4, init_scale="dense", capacity={"0": 1.5})
    for layer, std in zip(model, (0.02, 0.5, 0.001), strict=True):
        drawn = layer.values[layer.row >= 0].detach()
        density = drawn.numel() / layer.grid.numel
        assert abs(float(drawn.std()) * density**0.5 / std - 1) < 0.02, "as many inputs fewer, as much larger each"
        assert float(drawn.abs().max()) < 2.5 * std / density**0.5, "uniform"
        layer.reset_parameters()
        assert abs(float(layer.values.detach()[layer.row >= 0].std()) * density**0.5 / std - 1) < 0.02, "and again"
    assert model[2].bias is None
    again = nn.Sequential(nn.Linear(512, 256), nn.Conv2d(64, 64, 3, groups=2))
    again.load_state_dict({k: torch.ones_like(v) for k, v in again.state_dict().items()})
    for layer, bias in zip(again, biases, strict=True):
        nn.init.normal_(layer.weight)
        layer.bias.data.copy_(bias)
    sk.sparsify_(again, 0.5, 4, init_scale="dense")
    assert all(torch.equal(layer.bias, bias) for layer, bias in zip(again, biases, strict=True)), "not drawn anew"


@pytest.mark.parametrize("damage", [lambda w: w.zero_(), lambda w: w.fill_(float("nan")), None])
def test_init_scale_dense_needs_values(damage):
    model = mlp() if damage else mlp().to("meta")
    if damage:
        damage(model[2].weight.data)
    name = "2" if damage else "0"
    with pytest.raises(ValueError, match=f"init_scale is 'dense', and the weight of '{name}' has no values") as error:
        sk.sparsify_(model, 0.5, 8, init_scale="dense")
    assert error.value.parameter == "init_scale" and not sk.sparse_layers(model), "nothing was replaced"


def test_stems_are_sparse_where_blocks_are_no_wider_than_their_channels():
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=16))

    assert list(blocks(sk.sparsify_(network(), 0.5, 1))) == ["1"]
    assert list(blocks(sk.sparsify_(network(), 0.5, 1, stems=True))) == ["0", "1"]
    assert list(blocks(sk.sparsify_(network(), 0.5, (16, 3), stems=True))) == ["0", "1"]
    assert list(blocks(sk.sparsify_(network(), 0.5, 4, stems=True))) == ["1"], "a block would be mostly padding"
    assert list(blocks(sk.sparsify_(network(), 0.5, stems=True))) == ["1"], "the default is 16 or more"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0.5}, "capacity is 0.5; it must be a number of slots for each block, 1 or more"),
        ({"capacity": float("nan")}, "capacity is nan"),
        ({"capacity": float("inf")}, "capacity is inf"),
        ({"capacity": {"0": 0}}, "capacity is 0;"),
        ({"capacity": {"fc": 2}}, "capacity: 'fc' matches no module"),
        ({"init_scale": 0}, "init_scale is 0; it must be a number above 0"),
        ({"init_scale": float("inf")}, "init_scale is inf"),
        ({"init": "norm", "init_scale": 2}, "init_scale is 2, but init='norm'"),
        ({"init": "norm", "init_scale": "dense"}, "init_scale is dense, but init='norm'"),
    ],
)
def test_room_and_scale_out_of_range_change_nothing(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        sk.sparsify_(model, 0.5, 8, **options)
    assert not sk.sparse_layers(model)


MODEL = nn.ModuleDict(
    {
        "stem": nn.Linear(4, 4),
        "blocks": nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}) for _ in range(2)]),
        "lm_head": nn.Linear(4, 4),
    }
)
FC1 = ["blocks.0.fc1", "blocks.1.fc1"]

CASES = [
    (nn.Linear, ["stem", *FC1, "lm_head"]),
    ("stem", ["stem"]),
    ("blocks.*.fc1", FC1),
    ("*fc?", FC1),
    ("re:blocks", ["blocks", "blocks.0", "blocks.0.fc1", "blocks.0.norm", "blocks.1", "blocks.1.fc1", "blocks.1.norm"]),
    ("re:.*(head|stem)$", ["stem", "lm_head"]),
    (lambda module, name: isinstance(module, nn.LayerNorm) and "1" in name, ["blocks.1.norm"]),
    (["lm_head", [nn.LayerNorm], "stem"], ["stem", "blocks.0.norm", "blocks.1.norm", "lm_head"]),
    ([], []),
    ((), []),
]


@pytest.mark.parametrize(("selector", "names"), CASES, ids=[str(s)[:25] for s, _ in CASES])
def test_select(selector, names):
    assert list(select(MODEL, selector, "targets")) == names


@pytest.mark.parametrize(
    ("selector", "text"),
    [
        ("block.0.fc1", r"ignore: 'block.0.fc1' matches no module; nearest names: blocks.0.fc1"),
        ("lm-head", "nearest names: lm_head"),
        (["stem", "re:.*stm"], "'re:.*stm' matches no module; nearest names: stem"),
        (nn.Conv2d, "ignore: Conv2d matches no module"),
        ("re:(", r"'re:\(' is not a regular expression"),
    ],
)
def test_what_matches_nothing_is_an_error(selector, text):
    with pytest.raises(ValueError, match=text):
        select(MODEL, selector, "ignore")


def test_a_model_without_children():
    with pytest.raises(ValueError, match="the model has no children"):
        select(nn.Linear(1, 1), "fc", "targets")


def test_names_are_compared_with_case():
    assert not matches("Stem", MODEL["stem"], "stem")
