"""Putting one module in the place of another."""

from __future__ import annotations

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def swap_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule ``name`` by ``new``, which takes over its training flag and hooks."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    carry_over(getattr(parent, child), new)
    setattr(parent, child, new)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the training flag and the hooks of ``old``: the same dicts, so that their handles still remove."""
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
