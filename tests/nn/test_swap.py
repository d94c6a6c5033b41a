"""A new module in an old one's place."""

from __future__ import annotations

import torch
from torch import nn

import sparsekern as sk
from sparsekern.nn.surgery import carry_over, swap_


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
