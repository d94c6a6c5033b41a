"""Finding sparse layers, replacing layers, and going back to dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.sharded import without_sync
from sparsekern.nn.surgery import carry_over, swap_, without_gradients


def test_a_copy_with_dense_layers_that_computes_the_same():
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Sequential(nn.Linear(64, 30))).double()
    seen = []
    model[0].register_forward_hook(lambda *a: seen.append(1))
    sk.sparsify_(model, 0.5, 8).eval()
    dense = sk.densify(model)
    assert type(dense[0]) is nn.Linear and type(dense[2][0]) is nn.Linear and not dense[0].training
    x = torch.randn(3, 16, dtype=torch.float64)
    torch.testing.assert_close(dense(x), model(x))
    assert len(seen) == 2, "the dense copy has the hook too"
    assert isinstance(model[0], sk.SparseLinear)
    with torch.no_grad():
        dense[0].weight.zero_()
    assert model[0].values.abs().sum() > 0


def test_a_single_layer():
    layer = sk.SparseLinear(16, 8, block_size=4, sparsity=0.5)
    assert type(sk.densify(layer)) is nn.Linear


def test_layers_are_named_as_in_the_bare_model():
    model = nn.Sequential(nn.Linear(16, 64), nn.Sequential(nn.Linear(64, 32)))
    sk.sparsify_(model, 0.5, 8)
    names = ["0", "1.0"]
    assert list(sk.sparse_layers(model)) == names
    assert list(sk.sparse_layers(torch.compile(model, backend="eager"))) == names
    model[1] = torch.compile(model[1], backend="eager")
    assert list(sk.sparse_layers(model)) == names
    model[0] = torch.compile(model[0], backend="eager")
    assert list(sk.sparse_layers(model)) == names
    assert list(sk.sparse_layers(torch.nn.DataParallel(model))) == names
    assert list(sk.sparse_layers(torch.compile(model[0]._orig_mod, backend="eager"))) == [""]


def test_a_child_called_module_keeps_its_name():
    def layer():
        return sk.SparseLinear(16, 16, block_size=4)

    model = nn.ModuleDict({"fc": layer(), "module": nn.ModuleDict({"fc": layer()})})
    assert list(sk.sparse_layers(model)) == ["fc", "module.fc"]
    model["_orig_mod"] = nn.ModuleDict({"fc": layer()})
    with pytest.raises(ValueError, match="two sparse layers named 'fc'"):
        sk.sparse_layers(model)


def test_compiled_models_and_layers_are_dense_all_through():
    x = torch.randn(3, 16)
    layer = sk.SparseLinear(16, 16, block_size=4)
    model = nn.Sequential(torch.compile(layer, backend="eager"), nn.ReLU())
    for compiled in (torch.compile(layer, backend="eager"), model, torch.compile(model, backend="eager")):
        dense = sk.densify(compiled)
        torch.testing.assert_close(dense(x), compiled(x))
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.zero_()
        assert not dense(x).any() and type(dense) in (nn.Linear, nn.Sequential)


def test_a_layer_used_twice_is_dense_in_both_places_and_still_one():
    layer = sk.SparseLinear(16, 16, block_size=4)
    dense = sk.densify(nn.Sequential(layer, nn.ReLU(), layer))
    assert type(dense[0]) is nn.Linear and dense[2] is dense[0]


def test_attributes_of_parameters_go_over():
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight.no_weight_decay, model[0].bias.lr_scale = True, 0.5
    sk.sparsify_(model, 0.5, 4)
    assert model[0].values.no_weight_decay is True and model[0].bias.lr_scale == 0.5
    dense = model[0].to_dense()
    carry_over(model[0], dense)
    assert dense.weight.no_weight_decay is True and dense.bias.lr_scale == 0.5


def test_what_is_not_taken_over_is_named_in_the_log(caplog):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].register_state_dict_post_hook(lambda module, state, prefix, metadata: None)
    model[0].register_load_state_dict_pre_hook(lambda *args: None)
    model[0].weight.register_hook(lambda gradient: gradient)
    model[0].bias.register_post_accumulate_grad_hook(lambda parameter: None)
    model[0](torch.ones(1, 8)).sum().backward()
    with caplog.at_level("WARNING", logger="sparsekern"):
        sk.sparsify_(model, 0.5, 4)
    assert caplog.messages == [
        "0: the sparse layer does not take over state_dict_hooks, load_state_dict_pre_hooks, hooks of the tensor "
        "weight, weight.grad, hooks of the tensor bias, bias.grad"
    ]
    model.state_dict()


def test_training_flag_and_hooks_are_kept_and_handles_still_remove():
    model = nn.Sequential(nn.Sequential(nn.Identity()))
    calls = []
    old = model[0][0].eval()
    handles = [
        old.register_forward_pre_hook(lambda *a: calls.append("pre")),
        old.register_forward_hook(lambda *a, **k: calls.append("post"), with_kwargs=True, always_call=True),
    ]
    new = nn.Identity()
    swap_(model, "0.0", new)
    assert model[0][0] is new and not new.training
    model(1)
    assert calls == ["pre", "post"]
    for handle in handles:
        handle.remove()
    model(1)
    assert calls == ["pre", "post"]


def test_a_model_without_ranks_needs_no_sync():
    with without_sync(nn.Linear(2, 2)):
        pass


def test_gradients_from_before_are_there_again():
    model = nn.Linear(3, 2)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.grad
    with without_gradients(model.parameters()):
        assert model.weight.grad is None
        model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is before and torch.equal(before, torch.ones(2, 3))
