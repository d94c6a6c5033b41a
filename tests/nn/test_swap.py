"""A new module in an old one's place."""

from __future__ import annotations

from torch import nn

from sparsekern.nn.swap import swap_


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
