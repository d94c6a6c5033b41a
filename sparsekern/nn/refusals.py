"""Dense layers that must stay dense, and sharded ones that must be gathered: going on would be silently wrong."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sparsekern.nn.converters import CONVERTERS, class_name, converter_of
from sparsekern.nn.weight_reads import readers

STEM_CHANNELS = 3
"""A convolution of so few input channels is a network's stem: little work, and no block of channels to leave out."""


def left_dense(module: nn.Module, stem_width: int | None = None) -> str | None:
    """Return why blocks would be no use in the layer ``module``, which then stays dense without an error; or None.

    Args:
        module: a layer.
        stem_width: block columns that a stem's input channels must fill to be made sparse; None: none is.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None
    if module.groups > 1 and module.in_channels == module.groups:
        return "depthwise"
    if 0 < module.in_channels <= STEM_CHANNELS:  # a lazy one does not know yet
        return "stem" if stem_width is None or stem_width > module.in_channels else None
    return None


def refusals(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return why layers of a model cannot become sparse, by name; those that can are not in it.

    Args:
        model: whose layers they are.
        layers: of classes that have a converter, by name.
    """
    read = readers(model)
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    found = {}
    for name, module in layers.items():
        why = f"{read[name]} reads its weight instead of calling it" if name in read else _own_reason(module, uses)
        if why is not None:
            found[name] = why
    return found


def _own_reason(module: nn.Module, uses: dict[int, list[str]]) -> str | None:
    converter = converter_of(module)
    assert converter is not None
    if type(module) not in CONVERTERS:
        return f"it is a {type(module).__name__}, which may do more than {class_name(converter.dense)} does"
    if "forward" in vars(module):
        return "its forward is replaced on the instance, as accelerate's hooks do, and would be lost"
    extra = sorted(key for key, _ in module.named_parameters() if key not in ("weight", "bias"))
    if extra or "weight" not in module._parameters:
        return f"its weight is computed from other tensors ({', '.join(extra) or 'parametrized'})"
    if buffers := [key for key, _ in module.named_buffers()]:
        return f"it has buffers of its own, which would be lost ({', '.join(buffers)})"
    for kind in ("weight", "bias"):
        own = getattr(module, kind)
        if isinstance(own, Tensor) and len(shared := uses[id(own)]) > 1:
            return f"its {kind} is shared: {', '.join(shared)}"
    return None


GATHER = "gather them first, by get_model_state_dict with full_state_dict=True"
"""What to do before a function that takes whole tensors."""


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
