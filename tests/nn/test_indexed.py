"""A layer never computes with an index of other places than its own, nor with places that are no topology."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsekern as sk
from sparsekern.topology import Topology, build_index, to_dense

X = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
OVERWROTE = "other code overwrote row and col"
INVALID = "which are not a topology now"


def layer(block: int = 4, seed: int = 0, **options) -> sk.SparseLinear:
    return sk.SparseLinear(40, 48, sparsity=0.7, block_size=block, seed=seed, **options)


def exact(module: sk.SparseLinear, x: torch.Tensor = X) -> torch.Tensor:
    """What the layer should compute, from values, row and col alone."""
    weight = to_dense(module.topology, module.values.detach().double())
    return x.double() @ weight.T + module.bias.detach().double()


def assert_right(module: nn.Module, layer: sk.SparseLinear | None = None) -> None:
    layer = module if layer is None else layer
    torch.testing.assert_close(module(X).double(), exact(layer), rtol=1e-5, atol=1e-5)
    for mine, fresh in zip(layer.index, build_index(layer.topology), strict=True):
        assert torch.equal(mine, fresh)


def noise(tensor: torch.Tensor) -> torch.Tensor:
    return torch.randint_like(tensor, -(2**31), 2**31 - 1)


def swap(a: nn.Module, b: nn.Module) -> None:
    for x, y in zip(a.buffers(), b.buffers(), strict=True):
        kept = x.data.clone()
        x.data.copy_(y.data)
        y.data.copy_(kept)


@pytest.fixture(params=[1, 4], ids=["1x1", "4x4"])
def block(request) -> int:
    return request.param


class TestOtherTensors:
    """Other code puts tensors in the place of the layer's."""

    def test_buffers_materialised_one_by_one_as_transformers_does(self, block):
        source = layer(block)
        with torch.device("meta"):
            module = layer(block, seed=1)
        for name, tensor in source.state_dict(keep_vars=True).items():
            setattr(
                module, name, nn.Parameter(tensor.detach().clone()) if name in ("values", "bias") else tensor.clone()
            )
        for name in module._derived():
            setattr(module, name, noise(getattr(source, name)))
        assert_right(module)
        assert torch.equal(module(X), source(X))

    def test_compiled_before_its_first_forward(self, block):
        torch._dynamo.reset()
        source, module = layer(block), layer(block, seed=1)
        for name in ("row", "col"):
            module._buffers[name] = getattr(source, name).clone()
        torch.compile(module, backend="aot_eager")(X)
        assert_right(module)

    def test_to_empty_on_a_real_device_raises_until_something_is_loaded(self, block):
        source, module = layer(block), layer(block, seed=1)
        module.to_empty(device="cpu")
        for tensor in module.buffers():
            tensor.copy_(noise(tensor))
        with pytest.raises(ValueError, match=f"{OVERWROTE} of a sparse layer, {INVALID}: slot .* is at"):
            module(X)
        module.load_state_dict(source.state_dict())
        assert_right(module)

    def test_places_that_are_views_with_strides(self, block):
        source, module = layer(block), layer(block, seed=1)
        state = source.state_dict()
        both = torch.stack([state["row"], state["col"]], 1)
        state["row"], state["col"] = both[:, 0], both[:, 1]
        module.load_state_dict(state, assign=True)
        assert module.row.is_contiguous() and module.col.is_contiguous()
        assert_right(module)
        module._buffers["row"], module._buffers["col"] = both[:, 0], both[:, 1]
        assert_right(module)

    def test_places_of_another_dtype_are_refused(self, block):
        module = layer(block)
        state = module.state_dict()
        state["row"] = state["row"].long()
        with pytest.raises(RuntimeError, match="row is torch.int64"):
            module.load_state_dict(state, assign=True)
        module.row = module.row.long()
        with pytest.raises(ValueError, match="row is torch.int64 of shape .*; it must be int32"):
            module(X)

    def test_functional_call_with_other_places_and_back(self, block):
        module, other = layer(block), layer(block, seed=1)
        expected = module(X)
        assert torch.equal(torch.func.functional_call(module, other.state_dict(), (X,)), other(X))
        assert torch.equal(module(X), expected)
        detached = {name: tensor.detach() for name, tensor in module.named_buffers()}
        source = module._source
        assert torch.equal(torch.func.functional_call(module, detached, (X,)), expected)
        assert module._source is source

    def test_made_under_inference_mode(self, block):
        with torch.inference_mode():
            module = layer(block)
            assert_right(module)
            module.row[0] = 2**30
            with pytest.raises(ValueError, match=OVERWROTE):
                module(X)


class TestWrites:
    """Other code writes into the layer's tensors."""

    @pytest.mark.parametrize("place", [10**9, -5, 12])
    def test_a_place_outside_of_the_grid(self, block, place):
        module = layer(block)
        module.col[0] = place if block > 1 or place != 12 else 40
        with pytest.raises(ValueError, match=f"{OVERWROTE} of a sparse layer, {INVALID}: slot 0 is at"):
            module(X)

    def test_a_place_twice(self, block):
        module = layer(block, name="fc")
        module.row[1], module.col[1] = module.row[0].clone(), module.col[0].clone()
        with pytest.raises(ValueError, match=f"{OVERWROTE} of layer 'fc', {INVALID}: slots 0 and 1 are"):
            module(X)

    def test_another_topology_needs_refresh(self, block):
        module, other = layer(block), layer(block, seed=1)
        for name, tensor in module.state_dict().items():  # as a bare torch.distributed.checkpoint.load does
            tensor.copy_(other.state_dict()[name])
        for _ in range(2):
            with pytest.raises(ValueError, match=r"if they were loaded or copied, call sparsekern.refresh_"):
                module(X)
        sk.refresh_(module)
        assert_right(module)
        assert torch.equal(module(X), other(X))

    def test_equal_numbers_do_not_matter(self, block):
        module = layer(block)
        for name, tensor in module.state_dict().items():
            tensor.copy_(module.state_dict()[name].clone())
        assert_right(module)

    def test_places_and_index_of_another_model_together(self, block):
        """DistributedDataParallel gives each rank the buffers of the first."""
        module, other = layer(block), layer(block, seed=1)
        with torch.no_grad():
            for mine, first in zip(
                [*module.parameters(), *module.buffers()], [*other.parameters(), *other.buffers()], strict=True
            ):
                mine.copy_(first)
        assert_right(module)
        assert torch.equal(module(X), other(X))

    @pytest.mark.parametrize("name", ["row_ptr", "row_slot", "col_ptr", "col_slot"])
    def test_an_index_of_noise_is_rebuilt(self, block, name):
        module = layer(block)
        getattr(module, name).copy_(noise(getattr(module, name)))
        x = X.clone().requires_grad_()
        y = module(x)
        y.backward(torch.ones_like(y))
        assert_right(module)
        torch.testing.assert_close(x.grad, to_dense(module.topology, module.values.detach()).sum(0).expand_as(x))

    def test_a_move_does_not_take_over_what_others_wrote(self, block):
        module, other = layer(block), layer(block, seed=1)
        module.row.copy_(other.row)
        module.col.copy_(other.col)
        free = torch.tensor([-1], dtype=torch.int32)
        for checked in (False, True):
            with pytest.raises(ValueError, match=OVERWROTE):
                module.move_(torch.tensor([0]), free, free, checked=checked)
        assert torch.equal(module.row, other.row)

    def test_a_state_without_the_layer_does_not_take_over_what_others_wrote(self):
        module = layer()
        module.col[0] = 10**9
        module.load_state_dict({}, strict=False)
        with pytest.raises(ValueError, match=OVERWROTE):
            module(X)

    def test_a_lent_index_is_of_the_places_too(self):
        module = layer()
        with sk.nn.lend_index(module, build_index(module.topology)):
            module.col[0] = 10**9
            with pytest.raises(ValueError, match=OVERWROTE):
                module(X)


class TestAverages:
    """Integers that were averaged are rounded towards zero: 11 becomes 10, though nothing moved."""

    def model(self, block: int) -> nn.Module:
        return nn.Sequential(sk.SparseLinear(40, 48, sparsity=0.7, block_size=block, seed=0))

    def test_averaged_buffers_never_compute(self, block):
        model = self.model(block)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9992), use_buffers=True)
        for _ in range(3):
            average.update_parameters(model)
        changed = not torch.equal(average.module[0].row, model[0].row)
        assert changed or not torch.equal(average.module[0].col, model[0].col)
        with pytest.raises(ValueError, match=rf"{OVERWROTE}.*average parameters only \(use_buffers=False\)"):
            average(X)

    def test_an_average_over_the_state_never_computes_and_is_never_saved(self, block, tmp_path):
        pytest.importorskip("safetensors")
        model = self.model(block)
        average = copy.deepcopy(model)
        for _ in range(3):
            for mine, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mine.copy_(0.9992 * mine + (1.0 - 0.9992) * new)  # as timm's ModelEmaV2
        assert any(not torch.equal(mine, new) for mine, new in zip(average.buffers(), model.buffers(), strict=True))
        for twin in (average, copy.deepcopy(average), average.to(torch.float32)):
            with pytest.raises(ValueError, match=rf"{OVERWROTE}.*average parameters only \(use_buffers=False\)"):
                twin(X)
        for name in ("m.safetensors", "m.pt"):
            with pytest.raises(ValueError, match=f"{OVERWROTE}|other code than move_ and load_ has changed"):
                sk.save(average, tmp_path / name)
        assert not list(tmp_path.iterdir())
        sk.load_(average, model.state_dict())
        assert_right(average, average[0])

    def test_the_average_of_parameters_computes(self, block):
        model = self.model(block)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9992))
        for _ in range(3):
            average.update_parameters(model)
            assert_right(average, average.module[0])

    def test_with_moves_too(self, block):
        model = self.model(block)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        method = sk.SET(model, torch.optim.SGD(model.parameters()))
        method.follow(average)
        for _ in range(3):
            assert method.update()
            average.update_parameters(model)
            assert_right(average, average.module[0])

    def test_an_average_that_is_swapped_in_through_data(self, block):
        """Lightning's WeightAveraging does so for a validation; ``.data`` counts no version."""
        model = self.model(block)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9992), use_buffers=True)
        for _ in range(3):
            average.update_parameters(model)
        compiled = torch.compile(model, backend="aot_eager")
        for computes in (model, compiled):
            expected = computes(X)
            model.eval()
            assert torch.equal(computes(X), expected), "a switch alone changes nothing"
            model.train()
            computes(X)
            model.eval()
            swap(model, average.module)
            with pytest.raises(ValueError, match=rf"{OVERWROTE}.*average parameters only"):
                computes(X)
            swap(model, average.module)
            assert torch.equal(computes(X), expected)
            model.train()


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
    def test_type_converts_no_coordinates(self, block, dtype):
        for module in (layer(block), sk.SparseConv2d(8, 8, 3, sparsity=0.6, block_size=block, seed=0)):
            twin = copy.deepcopy(module).type(dtype)
            assert {tensor.dtype for tensor in twin.buffers()} == {torch.int32}
            assert twin.values.dtype == dtype
            x = X if isinstance(module, sk.SparseLinear) else X.view(1, 8, 5, 5)
            assert torch.equal(twin(x.to(dtype)), module.to(dtype)(x.to(dtype)))

    def test_other_integers(self, block):
        module = layer(block)
        expected = module(X)
        module._apply(lambda tensor: tensor if tensor.is_floating_point() else tensor.long())
        assert module.row.dtype == torch.int32
        assert torch.equal(module(X), expected)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def fresh(self):
        torch._dynamo.reset()
        yield
        torch.compiler.set_stance("default")

    def compiled(self, model: nn.Module):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(X).sum().backward()
        torch.compiler.set_stance("fail_on_recompile")
        return compiled

    def test_moves_loads_and_copies_recompile_nothing(self, block):
        model = nn.Sequential(layer(block))
        method = sk.SET(model, torch.optim.SGD(model.parameters(), lr=0.1))
        compiled = self.compiled(model)
        for _ in range(3):
            assert method.update()
            torch.testing.assert_close(compiled(X).double(), exact(model[0]), rtol=1e-5, atol=1e-5)
        other = nn.Sequential(layer(block, seed=1))
        model.load_state_dict(other.state_dict())
        assert torch.equal(compiled(X), other(X))
        for tensor in model.buffers():
            tensor.copy_(tensor.clone())
        assert torch.equal(compiled(X), other(X))

    def test_what_others_wrote_is_noticed(self, block):
        model, other = nn.Sequential(layer(block)), layer(block, seed=1)
        compiled = self.compiled(model)
        for name in ("row", "col"):
            getattr(model[0], name).copy_(getattr(other, name))
        with pytest.raises(ValueError, match=OVERWROTE):
            compiled(X)
        sk.refresh_(model)
        torch.testing.assert_close(compiled(X).double(), exact(model[0]), rtol=1e-5, atol=1e-5)

    def test_a_copy_of_a_layer_that_moved(self, block):
        module = layer(block)
        sk.SET(module, torch.optim.SGD(module.parameters())).update()
        twin = copy.deepcopy(module)
        assert torch.equal(torch.compile(twin, backend="aot_eager", fullgraph=True)(X), module(X))


def test_a_pickled_layer_computes():
    module = layer()
    sk.SET(module, torch.optim.SGD(module.parameters())).update()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(X), module(X))


def test_nothing_keeps_a_layer_alive():
    """Sources hang on tensors, and a tensor that held its layer would be freed late."""
    import gc
    import weakref

    gc.disable()
    try:
        module = layer()
        module(X)
        alive = weakref.ref(module.row_ptr)
        del module
        assert alive() is None
    finally:
        gc.enable()


def test_drawn_places_are_validated_once_at_most(monkeypatch):
    checked = []
    validate = Topology.validate
    monkeypatch.setattr(Topology, "validate", lambda topology: checked.append(topology) or validate(topology))
    sk.SparseLinear(64, 64, sparsity=0.5, block_size=16)
    assert len(checked) == 1
    empty = sk.SparseLinear(64, 64, sparsity=0.5, block_size=16, seed=0, device="meta").to_empty(device="cpu")
    assert len(checked) == 1, "to_empty() draws them"
    whole = sk.SparseLinear(64, 64, sparsity=0.5, block_size=16, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(empty.index, whole.index, strict=True))
