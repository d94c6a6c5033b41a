"""Operators, and the seconds that they take on a machine that was measured, or on a device with published peaks.

An operator call is reduced to what its time depends on (:class:`Operation`).

A measurement is a set of curves. A product takes ``elements * curve(intensity)`` seconds: its curve gives the seconds
for each element that is read or written, by the number of multiply-adds for each element. Any other operator takes
``bytes * curve(bytes)``. Between two points a curve is a straight line on logarithmic axes, and beyond its ends it is
constant. Each call takes a constant time in addition: Python, autograd and the dispatcher. In a step, inputs are less
often in the caches than where an operator is measured alone, so curves are scaled to the step of a whole network.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from sparsekern.errors import InputError
from sparsekern.kernels.gpu.roofline import device as architecture

SPARSE, DENSE, ATTENTION, OTHER, OPTIMIZER = "sparse products", "dense products", "attention", "other", "optimizer"

GROUPS = (SPARSE, DENSE, ATTENTION, OTHER, OPTIMIZER)
"""Kinds of operators, as a plan shows where the time goes."""


class Operation(NamedTuple):
    """An operator with the sizes that decide its time.

    Attributes:
        group: one of :data:`GROUPS`.
        kind: name of what was measured for such operators; ``""`` for a view, which moves no data.
        elements: elements that it reads and writes, each counted once.
        intensity: multiply-adds for each of these elements; 0 where there are none.
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
    """Return the operation of an operator call, in a list that is empty if the call computes nothing on tensors."""
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
    kind = f"attention {'backward' if backward else 'forward'}{' causal' if causal else ''}"
    elements = 2 * q.numel() + 2 * k.numel()
    intensity = float(k.shape[-2])
    return Operation(ATTENTION, kind, elements, intensity, flops=flops, bytes=(1 + backward) * elements * size)


def _qkv_attention(name: str, args: Sequence[Any], result: Any, flops: int, size: int) -> Operation:
    backward = name.endswith("backward")
    batch, tokens, width = args[backward].shape
    kind = f"qkv attention {'backward' if backward else 'forward'}{' causal' if args[-1] else ''}"
    elements = batch * tokens * width // 3 * 4  # queries, keys, values and y
    return Operation(ATTENTION, kind, elements, float(tokens), flops=flops, bytes=(1 + backward) * elements * size)


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
    **dict.fromkeys(("qkv_attention", "qkv_attention_backward"), _qkv_attention),
}


Points = list[tuple[float, float]]

FORMAT = 2
"""Version of the file of a measurement."""

FAMILIES = {
    "add": ("add_", "mul", "mul_", "div", "sub", "pow", "neg", "rsqrt", "constant_pad_nd", "cat", "slice_backward"),
    "relu": ("relu_", "clamp", "clamp_min"),
    "clone": ("_to_copy", "stack", "copy_"),
    "sum": ("mean", "linalg_vector_norm", "nll_loss_forward"),
    "zeros": ("fill_", "zero_", "ones_like", "zeros_like", "new_zeros", "nll_loss_backward", "ones"),
    "_log_softmax": ("_softmax",),
    "_log_softmax_backward_data": ("_softmax_backward_data",),
    "silu": ("sigmoid", "tanh", "exp"),
    "gelu": ("erf",),
    "native_batch_norm": ("cudnn_batch_norm",),
}
"""Operators that take as long as one that was measured, by its name. What is in no family takes as long as ``add``."""

FAMILY = {name: measured for measured, names in FAMILIES.items() for name in names}


class Clocked(Protocol):
    """Anything that says how long an operation takes."""

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one call."""


@dataclass(frozen=True)
class Machine:
    """A machine that was measured.

    Attributes:
        about: processor, threads, versions of PyTorch and of this package, and the date.
        call: seconds that a call takes in addition to its work.
        sparse_call: the same of a sparse product.
        curves: points of each curve by its name, which ends with ``@tokens`` where the number of tokens matters too.
    """

    about: Mapping[str, Any]
    call: float
    sparse_call: float
    curves: Mapping[str, Points] = field(repr=False)

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one call."""
        if not operation.kind:
            return self.call
        if operation.group == SPARSE:
            return self.sparse_call + operation.elements * self._at_tokens(operation)
        if operation.group in (DENSE, ATTENTION):
            without_native = operation.kind.removeprefix("qkv ")
            kinds = operation.kind, without_native, without_native.removesuffix(" causal")
            kind = next(kind for kind in kinds if kind in self.curves)
            return self.call + operation.elements * value(self.curves[kind], operation.intensity)
        usual = operation.group == OPTIMIZER and operation.kind not in self.curves
        kind = "_fused_adamw_" if usual else FAMILY.get(operation.kind, operation.kind)
        points = self.curves.get(kind, self.curves["add"])
        return self.call + operation.bytes * value(points, operation.bytes)

    def nearest_block(self, operation: Operation) -> str:
        """Return the curve of a sparse product: its own, or that of the measured block of the nearest size."""
        measured = self._sparse
        op, block, which = parts_of(operation.kind)
        which = which if which in ("forward", "backward") else "forward" if which == "dx" else "backward"
        own = [name for name in measured if parts_of(name)[0] == op and parts_of(name)[2] == which]
        return min(own, key=lambda name: abs(math.log(area(parts_of(name)[1]) / area(block))))

    def _at_tokens(self, operation: Operation) -> float:
        by_tokens = self._sparse[self.nearest_block(operation)]
        return value([(tokens, value(points, operation.intensity)) for tokens, points in by_tokens], operation.tokens)

    @cached_property
    def _sparse(self) -> dict[str, list[tuple[float, Points]]]:
        """Curves of sparse products by their name without the tokens, which come first in each pair."""
        found: dict[str, list[tuple[float, Points]]] = {}
        for name, points in self.curves.items():
            kind, _, tokens = name.partition("@")
            if tokens:
                found.setdefault(kind, []).append((float(tokens), points))
        return {kind: sorted(pairs) for kind, pairs in found.items()}

    def save(self, path: Path) -> None:
        """Write the measurement to a file of its own."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        aside.write_text(json.dumps({"format": FORMAT} | asdict(self)))
        aside.replace(path)

    @classmethod
    def load(cls, path: Path) -> Machine | None:
        """Return what :meth:`save` wrote; None if there is no such file.

        Raises:
            ValueError: the file is damaged, or of another version.
        """
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text())
            if content.pop("format") != FORMAT:
                raise KeyError
            curves = {name: [(float(x), float(y)) for x, y in points] for name, points in content["curves"].items()}
            return cls(**content | {"curves": curves})
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} is no measurement of this version; run sparsekern plan --measure") from None


def parts_of(kind: str) -> tuple[str, str, str]:
    """Return op, block and product of a sparse kind: ``("linear", "16x16", "forward")``."""
    _, op, block, which = kind.split(" ")
    return op, block, which


def area(block: str) -> int:
    """Return the elements of a block such as ``"16x16"``."""
    return math.prod(int(side) for side in block.split("x"))


def value(points: Iterable[tuple[float, float]], x: float) -> float:
    """Return the height of a curve at x: a line on logarithmic axes between its points, constant beyond its ends."""
    ordered = sorted(points)
    place = bisect.bisect(ordered, (x, math.inf))
    if place == 0 or place == len(ordered):
        return ordered[min(place, len(ordered) - 1)][1]
    (x0, y0), (x1, y1) = ordered[place - 1 : place + 1]
    share = math.log(x / x0) / math.log(x1 / x0)
    return math.exp((1 - share) * math.log(y0) + share * math.log(y1))


def cache_file(processor: str, threads: int, torch: str, sparsekern: str) -> Path:
    """Return where a measurement is kept: in the user's cache folder by the platform's convention."""
    if sys.platform == "darwin":
        folder = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        folder = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = f"{processor} {threads} threads torch {torch} sparsekern {sparsekern}"
    return folder / "sparsekern" / f"machine {re.sub(r'[^A-Za-z0-9.+ _-]+', '_', key)}.json".replace(" ", "-")


@dataclass(frozen=True)
class Device:
    """A device by its published peaks, which no program reaches: times are lower bounds.

    Attributes:
        name: of the device.
        arch: whose rates of the tensor cores and of the L2 cache are in ``kernels/gpu/configs/devices.json``.
        gigabytes: of its memory.
        memory_tb_s: rate of its memory, in terabytes a second.
        link_gb_s: rate at which it sends to others in its machine, in gigabytes a second.
        tflops: rates of the tensor cores where they are not those of the architecture's entry.
        network_gb_s: rate at which it sends to other machines, in gigabytes a second: an assumption, 400 Gbit/s for
            devices of data centres and 100 Gbit/s for others.
        launch: seconds between the starts of two kernels: an estimate.
        dtype: ``"half"``, ``"tf32"`` or ``"ieee"``: how products are computed; PyTorch computes float32 by ``"ieee"``.
    """

    name: str
    arch: str
    gigabytes: float
    memory_tb_s: float
    link_gb_s: float
    tflops: Mapping[str, float] = field(default_factory=dict)
    network_gb_s: float = 50.0
    launch: float = 5e-6
    dtype: str = "half"

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one call: the slowest of computing, memory, gathering from L2, and starting it."""
        if not operation.kind:
            return 0.0
        constants = architecture(self.arch)
        peak = (constants["tflops"] | dict(self.tflops))[self.dtype]
        compute = operation.flops / (peak * 1e12)
        moving = operation.bytes / (self.memory_tb_s * 1e12)
        gathering = operation.gathered / (constants["l2_tb_s"] * 1e12)
        return float(max(compute, moving, gathering, self.launch))

    def sends(self, devices: int) -> float:
        """Return the bytes a second that each of ``devices`` devices sends; more than eight are in several machines."""
        return 1e9 * (self.link_gb_s if devices <= 8 else min(self.link_gb_s, self.network_gb_s))


_RTX_4090 = {"half": 165.2, "tf32": 82.6, "ieee": 82.6}  # NVIDIA's Ada whitepaper, float32 accumulation, dense

DEVICES = {
    device.name: device
    for device in (
        Device("a100", "sm_80", 80, 2.039, 300),
        Device("h100", "sm_90", 80, 3.35, 450),
        Device("h200", "sm_90", 141, 4.8, 450),
        Device("b200", "sm_100", 180, 8.0, 900),
        Device("l40s", "sm_89", 48, 0.864, 32),
        Device("rtx4090", "sm_89", 24, 1.008, 32, _RTX_4090, network_gb_s=12.5),
        Device("rtx5090", "sm_120", 32, 1.792, 64, network_gb_s=12.5),
    )
}
"""Devices by name: the SXM forms of A100 to B200. Memory, its rate and links are NVIDIA's data sheets."""

CPU_NETWORK = 1.25e9
"""Bytes a second that a CPU sends to others: Ethernet of 10 Gbit/s, an assumption."""
