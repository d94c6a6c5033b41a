"""Networks, batches and trainings for the tests of FSDP2: the same calls on one process and on the ranks of a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

import sparsekern as sk
from sparsekern.nn import BlockSparse

STEPS, BATCH = 12, 12

METHODS: dict[str, tuple[type[sk.Method], dict[str, Any]]] = {
    "Static": (sk.Static, {}),
    "SET": (sk.SET, {}),
    "SET, signs": (sk.SET, {"drop": "signs", "grown_values": "random", "min_age": 1, "keep_connected": True}),
    "Gradual": (sk.Gradual, {"final_sparsity": 0.9, "stop": 13, "scope": "global"}),
    "RigL": (sk.RigL, {"scoring": "screen"}),  # what it does on several ranks anyway
    "MEST": (sk.MEST, {"soft_bound": True, "stop": 13}),
    "SRigL": (sk.SRigL, {"scoring": "screen"}),
    "DSR": (sk.DSR, {"threshold": 0.05}),
    "TopKAST": (sk.TopKAST, {"stop": 10, "regularization": 0.1}),
    "GraNet": (sk.GraNet, {"scoring": "screen", "stop": 13}),
    "GSE": (sk.GSE, {}),
    "GSE, sketches": (sk.GSE, {"score_sketches": 2}),
    "GSE, global": (sk.GSE, {"scope": "global"}),
    "GraBo": (sk.GSE, {"distribution": "grabo"}),
    "GraEst": (sk.GSE, {"distribution": "graest"}),
    "VRPGE": (sk.VRPGE, {"stop": 10}),
    "VRPGE, refill": (sk.VRPGE, {"refill": 0.3, "floor": 0.05, "weight_step": "all", "unsampled": "decay"}),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "AdamW, loop": partial(torch.optim.AdamW, lr=0.01, foreach=False),
    "AdamW, fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "SGD, momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=False),
    "Adafactor": partial(torch.optim.Adafactor, lr=0.01),
}


class Checkpointed(nn.Module):
    """Layers whose activations are computed again in the backward."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)


def linear(device: str | None = None) -> nn.Module:
    """Three layers of 27, 25 and 6 blocks: uneven shards on 2 ranks and on 3."""
    torch.manual_seed(0)
    sizes, parts = ((12, 36), (36, 20), (20, 5)), []
    for i, (n, m) in enumerate(sizes):
        blocks, options = (27, 25, 6)[i], {"block_size": (2, 4), "seed": i, "name": str(2 * i), "device": device}
        parts += [sk.SparseLinear(n, m, blocks=blocks, capacity=blocks + i, **options)]
        parts += [nn.ReLU()] if i < 2 else []
    return nn.Sequential(*parts)


def conv() -> nn.Module:
    """A convolution with tied taps, one in two groups, and a linear layer; blocks that do not divide it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)),
        sk.SparseConv2d(3, 8, 3, padding=1, blocks=9, block_size=(4, 2), tie_taps=True, seed=0, name="1"),
        nn.ReLU(),
        sk.SparseConv2d(8, 12, 3, padding=1, groups=2, blocks=29, block_size=(4, 3), seed=1, name="3"),
        nn.Flatten(),
        sk.SparseLinear(48, 5, sparsity=0.5, block_size=(2, 4), seed=2, name="5"),
    )


def untied() -> nn.Module:
    """The convolutions without tied taps, which growth by gradients refuses."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)),
        sk.SparseConv2d(3, 12, 3, padding=1, groups=3, blocks=13, block_size=(2, 1), seed=1, name="1"),
        nn.ReLU(),
        nn.Flatten(),
        sk.SparseLinear(48, 5, sparsity=0.5, block_size=(2, 4), seed=2, name="4"),
    )


def small() -> nn.Module:
    """Two blocks in a layer: on three ranks a shard is empty."""
    torch.manual_seed(0)
    return nn.Sequential(
        sk.SparseLinear(12, 12, blocks=2, block_size=4, seed=0, name="0"),
        sk.SparseLinear(12, 12, blocks=5, block_size=4, seed=1, name="1"),
    )


def checkpointed() -> nn.Module:
    return nn.Sequential(Checkpointed(*linear()[:3]), *linear()[3:])


def shard(
    model: nn.Module, mesh: DeviceMesh, *, root_only: bool = False, compiled: str = "", **options: Any
) -> nn.Module:
    """Shard each sparse layer, and what is left with the root; compile the layer of this name."""
    if compiled:
        model.get_submodule(compiled).compile(fullgraph=True, backend="aot_eager")
    for module in () if root_only else list(model.modules()):
        if isinstance(module, BlockSparse):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def from_meta(mesh: DeviceMesh) -> nn.Module:
    """Return the linear network, sharded before its values are drawn, a layer at a time."""
    model = shard(linear("meta"), mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, BlockSparse):
            module.reset_parameters()
    return model


def meshes() -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """Return meshes of two ranks, of three, and of two copies on two ranks each; all four ranks call it."""
    names = ("copies", "shards")
    pair, three = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2])
    return pair, three, DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=names)


def batch(step: int, rank: int = 0, world: int = 1) -> Tensor:
    return torch.randn(BATCH, 12, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "device_mesh") else tensor.clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer, method: Any = None) -> dict[str, Tensor]:
    """Return parameters, places and optimizer state by name, whole; and the number of updates."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    found = {name: full(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor):
                found[f"{name}: {key}"] = full(state)
    return found | ({} if method is None else {"updates": torch.tensor(method.updates)})


def assert_same(expected: dict[str, Tensor], ranks: list[dict[str, Tensor]], within: float | None = None) -> None:
    """Each rank found what is expected: bit for bit, or where numbers are rounded, within this distance."""
    for found in ranks:
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if within is None or not value.is_floating_point():
                assert torch.equal(found[key], value), key
            else:  # AGENT's variance is a quotient of sums of squares
                rtol = 1e-3 if key == "numbers" else 0
                torch.testing.assert_close(found[key], value, rtol=rtol, atol=within, msg=key)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor) -> None:
    method.backward(lambda: loss_of(model, x))


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor) -> None:
    """Two micro-batches, the first of which is not reduced over ranks."""
    for number, part in enumerate(x.chunk(2)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == 1)
        (loss_of(model, part) / 2).backward()


def twice(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor, none: bool = True) -> None:
    """A backward whose gradients are cleared, and two whose gradients count: answers must be theirs alone."""
    (1e3 * loss_of(model, x.flip(0, 1))).backward()
    optimizer.zero_grad(set_to_none=none)
    for part in x.chunk(2):
        loss_of(model, part).backward()


def twice_in_place(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor) -> None:
    twice(model, optimizer, method, x, none=False)


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor) -> None:
    loss_of(model, x).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)


def evaluated(model: nn.Module, optimizer: torch.optim.Optimizer, method: sk.Method, x: Tensor) -> None:
    """A backward; the evaluation after the optimizer's step is in :func:`train`."""
    method.backward(lambda: loss_of(model, x))


def train(
    model: nn.Module,
    name: str,
    optimizer: str = "AdamW",
    *,
    rank: int = 0,
    world: int = 1,
    backward: Callable[..., None] = plain,
    steps: range = range(STEPS),
    parts: tuple[torch.optim.Optimizer, sk.Method] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """Train with a method, and return everything; each rank takes its share of each batch."""
    made, method = build_parts(model, name, optimizer, **options) if parts is None else parts
    for step in steps:
        backward(model, made, method, batch(step, rank, world))
        made.step()
        made.zero_grad()
        if backward is evaluated:  # leaves gathered parameters behind
            model.eval()
            with torch.no_grad():
                model(batch(step))
            model.train()
        method.step()
    return everything(model, made, method)


def build_parts(
    model: nn.Module, name: str, optimizer: str = "AdamW", **options: Any
) -> tuple[torch.optim.Optimizer, sk.Method]:
    kind, given = METHODS[name]
    made = OPTIMIZERS[optimizer](model.parameters())
    return made, kind(model, made, update_every=3, seed=1, **(given | options))
