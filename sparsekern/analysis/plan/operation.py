"""One operator call, reduced to what its time depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

SPARSE, DENSE, ATTENTION, OTHER, OPTIMIZER = "sparse products", "dense products", "attention", "other", "optimizer"

GROUPS = (SPARSE, DENSE, ATTENTION, OTHER, OPTIMIZER)
"""Kinds of operators, as a plan shows where the time goes."""


class Operation(NamedTuple):
    """An operator with the sizes that decide its time.

    Attributes:
        group: one of :data:`GROUPS`.
        kind: name of what was measured for such operators; ``""`` for a view, which moves no data.
        elements: numbers that it reads and writes at least, each once.
        intensity: multiply-adds for each of them; 0 where there are none.
        tokens: rows of the activations of a sparse product; 0 otherwise.
        flops: floating point operations of its products; 0 for others.
        bytes: of the elements.
        gathered: bytes that a sparse product reads again and again, each time a block needs them.
    """

    group: str
    kind: str
    elements: int
    intensity: float = 0.0
    tokens: int = 0
    flops: int = 0
    bytes: int = 0
    gathered: int = 0

    def scaled(self, factor: float) -> Operation:
        """Return a product of the same activations with ``factor`` times the blocks."""
        return self._replace(
            intensity=self.intensity * factor,
            flops=round(self.flops * factor),
            gathered=round(self.gathered * factor),
        )


def operation(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> list[Operation]:
    """Return what an operator call is, as a list of one; an empty one for what computes nothing on tensors."""
    name = func._overloadpacket.__name__
    namespace = func.namespace
    tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
    if not tensors or namespace in ("prim", "profiler") or name in ("empty", "empty_like", "detach"):
        return []
    flops = flop_registry.get(func._overloadpacket)
    count = 0 if flops is None else int(flops(*args, **kwargs, out_val=result))
    size = next((t.element_size() for t in tensors if t.is_floating_point()), 8)
    if namespace == "sparsekern" and name in _SPARSE:
        return [_sparse(name, args, result, count, size)]
    if name in _PRODUCTS:
        return [_PRODUCTS[name](name, args, result, count, size)]
    if name == "_unsafe_view" or any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
        return [Operation(OTHER, "", 0)]
    if name.startswith(("_fused_", "_foreach_")):
        elements, moved = _moved(tensors)
        return [Operation(OPTIMIZER, name, elements, bytes=moved)]
    if name == "embedding":  # reads as many rows as it writes
        tensors = [result, result]
    elements, moved = _moved(tensors, distinct=name != "embedding")
    return [Operation(OTHER, name, elements, bytes=moved)]


def _moved(tensors: Sequence[Tensor], distinct: bool = True) -> tuple[int, int]:
    """Return elements and bytes of tensors, those that are the same counted once."""
    chosen = list({id(t): t for t in tensors}.values()) if distinct else list(tensors)
    return sum(t.numel() for t in chosen), sum(t.numel() * t.element_size() for t in chosen)


def product(group: str, kind: str, elements: int, flops: int, size: int, **more: int) -> Operation:
    """Return a product, of which the intensity follows."""
    return Operation(group, kind, elements, flops / 2 / max(1, elements), flops=flops, bytes=elements * size, **more)


_SPARSE = {f"{op}{which}" for op in ("linear", "conv2d") for which in ("", "_backward", "_dx", "_dvalues")}


def _sparse(name: str, args: Sequence[Any], result: Any, flops: int, size: int) -> Operation:
    """Return a sparse product; dx and dvalues count as halves of the backward."""
    op, _, which = name.partition("_")
    values = {"": 1, "dx": 1, "backward": 2}
    stored = args[values[which]] if which in values else result
    x, y = {"": (args[0], result), "dx": (result, args[0])}.get(which, (args[1], args[0]))
    products = 2 if which == "backward" else 1
    bo, bi = stored.shape[1:]
    tokens = y.numel() // y.shape[1]
    elements = products * (x.numel() + y.numel() + stored.numel())
    gathered = products * stored.shape[0] * tokens * bi * size
    kind = f"sparse {op} {bo}x{bi} {which or 'forward'}"
    return product(SPARSE, kind, elements, flops, size, tokens=tokens, gathered=gathered)


def _mm(name: str, args: Sequence[Any], result: Any, flops: int, size: int) -> Operation:
    a, b = (args[1], args[2]) if name in ("addmm", "baddbmm") else (args[0], args[1])
    return product(DENSE, "mm", a.numel() + b.numel() + result.numel(), flops, size)


def _conv(name: str, args: Sequence[Any], result: Any, flops: int, size: int) -> Operation:
    backward = name.endswith("backward")
    y, x, w = (args[0], args[1], args[2]) if backward else (result, args[0], args[1])
    products = sum(args[-1][:2]) if backward else 1
    elements = products * (y.numel() + x.numel() + w.numel())
    return product(DENSE, f"conv {'backward' if backward else 'forward'}", elements, flops, size)


def _attention(name: str, args: Sequence[Any], result: Any, flops: int, size: int) -> Operation:
    backward = "backward" in name
    q, k = (args[1], args[2]) if backward else (args[0], args[1])
    causal = any(a is True for a in args)
    sizes = tuple(q.shape), tuple(k.shape), tuple((args[3] if backward else args[2]).shape)
    flops = sdpa_backward_flop_count(tuple(q.shape), *sizes) if backward else sdpa_flop_count(*sizes)
    kind = f"attention {'backward' if backward else 'forward'}{' causal' if causal else ''}"
    elements = 2 * q.numel() + 2 * k.numel()
    intensity = float(k.shape[-2])
    return Operation(ATTENTION, kind, elements, intensity, flops=flops, bytes=(1 + backward) * elements * size)


_Reader = Callable[[str, Sequence[Any], Any, int, int], Operation]

_PRODUCTS: dict[str, _Reader] = {
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm"), _mm),
    **dict.fromkeys(("convolution", "convolution_backward"), _conv),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ),
        _attention,
    ),
}
