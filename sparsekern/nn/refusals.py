"""Dense layers that must stay dense, and sharded ones that must be gathered: going on would be silently wrong."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

STEM_CHANNELS = 3
"""A convolution of so few input channels is a network's stem: little work, and no block of channels to leave out."""


def left_dense(module: nn.Module, stem_width: int | None = None) -> str | None:
    """Return why blocks would be no use in the layer ``module``, which then stays dense without an error; or None.

    Args:
        module: a layer.
        stem_width: block columns that a stem's input channels must fill to be made sparse; None: none is.
    """
    if not isinstance(module, nn.Conv2d):
        return None
    if module.groups > 1 and module.in_channels == module.groups:
        return "depthwise"
    if 0 < module.in_channels <= STEM_CHANNELS:  # a lazy one does not know yet
        return "stem" if stem_width is None or stem_width > module.in_channels else None
    return None


def refusal(model: nn.Module, name: str, module: nn.Linear | nn.Conv2d) -> str | None:
    """Return why the layer cannot become sparse, or None when it can."""
    kind = type(module).__name__
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight instead of calling it"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight in its fast path instead of calling it"
    if type(module) not in (nn.Linear, nn.Conv2d):
        usual = "nn.Linear" if isinstance(module, nn.Linear) else "nn.Conv2d"
        return f"it is a {kind}, which may do more than {usual} does"
    extra = sorted(key for key, _ in module.named_parameters() if key not in ("weight", "bias"))
    if extra or "weight" not in module._parameters:
        return f"its weight is computed from other tensors ({', '.join(extra) or 'parametrized'})"
    for kind, own in (("weight", module.weight), ("bias", module.bias)):
        uses = [
            f"{owner}.{key}" if owner else key
            for owner, other in model.named_modules(remove_duplicate=False)
            for key, parameter in other.named_parameters(recurse=False)
            if parameter is own
        ]
        if len(uses) > 1:
            return f"its {kind} is shared: {', '.join(uses)}"
    return None


def refuse_sharded(
    layers: Mapping[str, nn.Module], instead: str = "moving sharded blocks is not supported, use DDP"
) -> None:
    """Raise NotImplementedError if the values of a layer are spread over ranks, as ``fully_shard`` leaves them.

    Args:
        layers: sparse ones, by name.
        instead: what is not supported, and the way out.
    """
    for name, layer in layers.items():
        if hasattr(layer.values, "device_mesh"):
            raise NotImplementedError(f"values of {name!r} are a DTensor; {instead}")
