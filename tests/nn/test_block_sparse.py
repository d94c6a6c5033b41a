"""Blocks and places stay together: moves, loading, meta device, copies; and what stands for the weight."""

from __future__ import annotations

import copy
import io
import operator
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import sparsekern as sk
from sparsekern.topology import Grid, build_index, from_mask

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))


def layer(seed: int = 0, **options) -> sk.SparseLinear:
    options = {"sparsity": 0.5, "block_size": (4, 3), "seed": seed} | options
    return sk.SparseLinear(10, 14, **options)


def ints(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def assert_index_is_fresh(module: sk.SparseLinear) -> None:
    for mine, fresh in zip(module.index, build_index(module.topology), strict=True):
        assert torch.equal(mine, fresh)


class TestMove:
    def test_values_gradient_and_index_follow_and_addresses_stay(self):
        module = layer(capacity=9)
        module(X).sum().backward()
        addresses = [t.data_ptr() for t in (module.values, module.row, module.col, *module.index)]
        before = module.values.detach().clone(), module.values.grad.clone()
        absent = next(
            (r, c)
            for r in range(4)
            for c in range(4)
            if (r, c) not in zip(module.row.tolist(), module.col.tolist(), strict=True)
        )
        module.move_(torch.tensor([2, 8]), ints(absent[0], -1), ints(absent[1], -1))
        assert (int(module.row[2]), int(module.col[2])) == absent
        assert (module.values[[2, 8]] == 0).all() and (module.values.grad[[2, 8]] == 0).all()
        others = [0, 1, 3, 4, 5, 6, 7]
        assert torch.equal(module.values[others], before[0][others])
        assert torch.equal(module.values.grad[others], before[1][others])
        assert addresses == [t.data_ptr() for t in (module.values, module.row, module.col, *module.index)]
        assert_index_is_fresh(module)

    def test_a_place_that_is_taken_changes_nothing(self):
        module = layer()
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match="slots 0 and 1 are both at block"):
            module.move_(torch.tensor([1]), module.row[:1], module.col[:1])
        assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
        assert_index_is_fresh(module)

    def test_freeing_all_slots_leaves_the_bias(self):
        module = layer()
        slots = torch.arange(module.values.shape[0])
        module.move_(slots, torch.full_like(module.row, -1), torch.full_like(module.row, -1))
        assert torch.equal(module(X), module.bias.expand(5, 14))
        assert module.sparsity == 1


class TestMeta:
    def test_built_on_meta_emptied_loaded_it_trains(self):
        source = nn.Sequential(layer(0), nn.ReLU(), nn.Linear(14, 2))
        with torch.device("meta"):
            model = nn.Sequential(layer(1), nn.ReLU(), nn.Linear(14, 2))
        assert model[0].row.is_meta and "slots=8" in repr(model)
        model.to_empty(device="cpu")
        model.load_state_dict(source.state_dict())
        assert torch.equal(model(X), source(X))
        optimizer = torch.optim.AdamW(model.parameters())
        method = sk.SET(model, optimizer, update_every=1)
        for _ in range(3):
            model(X).square().sum().backward()
            optimizer.step()
            assert method.step()

    def test_to_empty_draws_the_topology_of_the_seed(self):
        with torch.device("meta"):
            module = layer(3)
        module.to_empty(device="cpu")
        assert torch.equal(module.row, layer(3).row) and torch.equal(module.col, layer(3).col)
        module.reset_parameters()
        assert torch.equal(module(X), layer(3)(X))

    def test_a_given_topology_cannot_be_drawn_again_and_starts_free(self):
        topology = from_mask(Grid(14, 10, (4, 3)), torch.eye(4))
        source = sk.SparseLinear(10, 14, topology=topology)
        module = copy.deepcopy(source).to("meta").to_empty(device="cpu")
        assert module.sparsity == 1
        module.load_state_dict(source.state_dict())
        assert torch.equal(module(X), source(X))

    def test_a_given_topology_that_is_lost_is_noticed(self):
        dense = nn.Linear(10, 14)
        module = sk.SparseLinear.from_dense(dense, sparsity=0.5, block_size=(4, 3)).to("meta").to_empty(device="cpu")
        with pytest.raises(RuntimeError, match="a layer without a block; load a checkpoint that holds row and col"):
            module.load_state_dict(dense.state_dict())
        with pytest.raises(ValueError, match="built with a given topology, which is lost; load a checkpoint"):
            module.reset_parameters()

    def test_a_layer_without_blocks_is_not_a_lost_one(self):
        module = sk.SparseLinear.from_dense(nn.Linear(10, 14), sparsity=0.5, block_size=(4, 3))
        free = torch.full_like(module.row, -1)
        module.move_(torch.arange(8), free, free)
        module.reset_parameters()
        again = sk.SparseLinear(10, 14, topology=module.topology)
        assert again.sparsity == 1 and torch.equal(again(X), again.bias.expand(5, 14))

    def test_a_lost_topology_comes_back_with_a_checkpoint(self):
        source = sk.SparseLinear.from_dense(nn.Linear(10, 14), sparsity=0.5, block_size=(4, 3))
        module = copy.deepcopy(source).to("meta").to_empty(device="cpu")
        module.load_state_dict(source.state_dict())
        module.reset_parameters()
        assert module.sparsity == source.sparsity

    def test_to_empty_on_a_real_device_then_reset(self):
        module = layer(3)
        with torch.no_grad():
            for tensor in (module.row, module.col):
                tensor.fill_(-303382992)  # what fresh memory may hold
        module.reset_parameters()
        assert torch.equal(module(X), layer(3)(X))

    def test_assigning_a_checkpoint_to_meta(self):
        source = layer(0)
        module = layer(1).to("meta")
        module.load_state_dict(source.state_dict(), assign=True)
        assert torch.equal(module(X), source(X))

    def test_a_dense_checkpoint_has_no_place_on_meta(self):
        with pytest.raises(RuntimeError, match=r"cannot be loaded on the meta device; call to_empty\("):
            layer().to("meta").load_state_dict(nn.Linear(10, 14).state_dict(), assign=True)


class TestCopies:
    def test_deepcopy_pickle_and_torch_save(self):
        module = layer()
        saved = io.BytesIO()
        torch.save(module, saved)
        saved.seek(0)
        for twin in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(saved, weights_only=False),
        ):
            assert torch.equal(twin(X), module(X))
            assert not {t.data_ptr() for t in twin.index} & {t.data_ptr() for t in module.index}
            twin.move_(torch.tensor([0]), ints(-1), ints(-1))
            assert twin.row[0] == -1 and module.row[0] != -1

    @pytest.mark.parametrize("block", [(4, 3), (1, 1)])
    def test_to_another_dtype(self, block):
        module = layer(block_size=block)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            module = module.to(dtype)
            assert module.row.dtype == torch.int32 and module.row_ptr.dtype == torch.int32
            assert module(X.to(dtype)).dtype == dtype


def test_refresh_after_a_write_behind_its_back():
    module, other = layer(0), layer(1)
    module.row.copy_(other.row)
    module.col.copy_(other.col)
    sk.refresh_(module)
    assert_index_is_fresh(module)
    module.row[0] = 99
    with pytest.raises(ValueError, match="slot 0 is at block"):
        sk.refresh_(module)
    sk.refresh_(layer().to("meta"))


def test_seed_and_name_decide_everything():
    def same(a, b):
        return all(torch.equal(a.state_dict()[k], b.state_dict()[k]) for k in a.state_dict())

    assert same(layer(0), layer(0)) and not same(layer(0), layer(1)) and not same(layer(0), layer(0, name="a"))
    torch.manual_seed(5)
    first = layer(seed=None)
    assert not same(first, layer(seed=None))
    torch.manual_seed(5)
    assert same(first, layer(seed=None)), "without a seed torch's own seed decides, as for nn.Linear"
    state = torch.get_rng_state()
    first.reset_parameters()
    layer(0)
    assert torch.equal(state, torch.get_rng_state()), "with a seed the global generator is not read"


def test_a_default_device_does_not_change_the_draw():
    with torch.device("meta"):
        module = layer(2)
        assert layer(seed=None).row.is_meta
    assert torch.equal(module.to_empty(device="cpu").row, layer(2).row)


@pytest.mark.parametrize("options", [{}, {"init": "random"}, {"sparsity": 0.1}, {"block_size": 1}], ids=str)
def test_random_choices_are_made_on_the_cpu_whatever_the_default_device(options):
    """A default device of "cuda" meets a CPU generator there; "meta" stands for it where there is none."""
    expected = layer(**options)
    module = copy.deepcopy(expected)
    method = sk.SET(module, torch.optim.SGD(module.parameters()))
    with torch.device("meta"):
        drawn = module._draw()
        module.reset_parameters()
        assert method.update()
    assert torch.equal(drawn.row, expected.row)


class Halved(nn.Module):
    def forward(self, values):
        return values / 2

    def right_inverse(self, values):
        return 2 * values


class TestParametrized:
    def test_computes_trains_and_is_taken_back(self):
        made = layer()
        x, kept = torch.randn(3, made.in_features), made.values.detach().clone()
        before = made(x)
        parametrize.register_parametrization(made, "values", Halved())
        assert torch.equal(made(x), before)
        assert [name for name, _ in made.named_parameters()] == ["bias", "parametrizations.values.original"]
        made(x).sum().backward()
        dense = nn.functional.linear(x, made.dense_weight(), made.bias)
        torch.testing.assert_close(made(x), dense)
        original = made.parametrizations["values"].original
        assert original.grad.shape == kept.shape and original.grad.abs().sum() > 0
        parametrize.remove_parametrizations(made, "values")
        assert type(made) is sk.SparseLinear and torch.equal(made.values, kept) and torch.equal(made(x), before)

    def test_weight_norm(self):
        made = layer()
        x = torch.randn(3, made.in_features)
        before = made(x)
        torch.nn.utils.parametrizations.weight_norm(made, "values")
        torch.testing.assert_close(made(x), before)

    def test_what_would_write_into_computed_values_is_one_sentence(self):
        made = layer()
        state = made.state_dict()
        parametrize.register_parametrization(made, "values", Halved())
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        slot = torch.tensor([0])
        for call in (
            lambda: made.move_(slot, -torch.ones_like(slot), -torch.ones_like(slot)),
            lambda: sk.SET(made, optimizer),
            lambda: made.load_state_dict(state),
        ):
            with pytest.raises((ValueError, RuntimeError), match="are parametrized, so blocks cannot move"):
                call()


WEIGHT = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5, dtype=torch.bfloat16).weight


def test_it_answers_what_libraries_ask():
    assert WEIGHT.shape == (8, 12) and WEIGHT.size() == (8, 12) and WEIGHT.size(1) == 12 and WEIGHT.size(-1) == 12
    assert WEIGHT.dim() == WEIGHT.ndim == 2 and WEIGHT.numel() == 96
    assert WEIGHT.dtype == torch.bfloat16 and WEIGHT.device == torch.device("cpu") and WEIGHT.requires_grad
    assert repr(WEIGHT) == "WeightInfo(shape=(8, 12), dtype=torch.bfloat16, device='cpu')"
    assert WEIGHT is not None
    assert copy.deepcopy(WEIGHT).shape == (8, 12)


def test_it_follows_the_values():
    layer = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5)
    layer.values.requires_grad_(False)
    assert not layer.weight.requires_grad
    assert layer.half().weight.dtype == torch.float16


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: torch.nn.functional.linear(torch.ones(2, 12), w),
        lambda w: torch.relu(w),
        lambda w: torch.ones(2, 8) @ w,
        lambda w: w @ torch.ones(12),
        lambda w: w * 2,
        lambda w: 2 * w,
        lambda w: w + 1,
        lambda w: -w,
        lambda w: w[0],
        lambda w: operator.setitem(w, 0, 1),
        lambda w: list(w),
        lambda w: len(w),
        lambda w: w > 0,
        lambda w: bool(w),
        lambda w: float(w),
    ],
)
def test_a_computation_raises_and_names_the_way_out(compute):
    with pytest.raises(TypeError, match=r"cannot compute .* on the weight of a sparse layer.*layer\.to_dense\(\)"):
        compute(WEIGHT)


@pytest.mark.parametrize("name", ["data", "grad", "detach", "norm", "T", "copy_"])
def test_an_unknown_attribute_names_the_way_out(name):
    assert not hasattr(WEIGHT, name)
    with pytest.raises(AttributeError, match=rf"no '{name}': .*layer\.values.*layer\.to_dense\(\)"):
        getattr(WEIGHT, name)


def test_initialising_the_weight_raises():
    with pytest.raises((TypeError, AttributeError), match=r"to_dense\(\)"):
        torch.nn.init.xavier_uniform_(WEIGHT)


def test_assigning_a_weight_raises():
    layer = sk.SparseLinear(12, 8, block_size=4, sparsity=0.5)
    for value in (torch.nn.Parameter(torch.ones(8, 12)), torch.ones(8, 12)):
        with pytest.raises((AttributeError, KeyError, TypeError)):
            layer.weight = value
    assert "weight" not in dict(layer.named_parameters())


def test_the_weight_of_a_convolution_has_four_axes():
    weight = sk.SparseConv2d(6, 8, (3, 2), groups=2, block_size=4, sparsity=0.5).weight
    assert weight.shape == (8, 3, 3, 2) and weight.dim() == weight.ndim == 4 and weight.numel() == 144
    with pytest.raises(TypeError, match=r"to_dense\(\)"):
        torch.nn.functional.conv2d(torch.ones(1, 6, 4, 4), weight)
