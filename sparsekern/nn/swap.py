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


_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
"""Hooks that are written for the keys of one kind of layer, and would fail or be silent on the other."""


def swap_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule ``name`` by ``new``, which takes over what :func:`carry_over` says."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    carry_over(getattr(parent, child), new)
    setattr(parent, child, new)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the training flag and the hooks of ``old``, and what others noted on its weight and bias.

    The hooks are the same dicts, so that their handles still remove. Attributes of parameters, such as a mark for no
    weight decay, go over from the dense weight to the values, or back. Hooks of state dicts and of tensors are
    lost; :func:`lost` names them.
    """
    new.train(old.training)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    for before, after in zip(_weight_and_bias(old), _weight_and_bias(new), strict=True):
        if before is not None and after is not None:
            for key, value in vars(before).items():
                after.__dict__.setdefault(key, value)


def lost(old: nn.Module) -> list[str]:
    """Return what a module has that no :func:`carry_over` keeps, in words."""
    found = [hooks.strip("_") for hooks in _STATE_HOOKS if getattr(old, hooks)]
    for name, parameter in old.named_parameters(recurse=False):
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            found.append(f"hooks of the tensor {name}")
        if parameter.grad is not None:
            found.append(f"{name}.grad")
    return found


def _weight_and_bias(module: nn.Module) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    own = module._parameters
    return own.get("values" if "values" in own else "weight"), own.get("bias")
