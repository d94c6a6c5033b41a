"""Making the layers of a model sparse."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from sparsekern.nn.densify import sparse_layers
from sparsekern.nn.linear import SparseLinear, linear_grid
from sparsekern.nn.refusals import refusal
from sparsekern.nn.select import Selector, flatten, matches, select
from sparsekern.nn.swap import swap_
from sparsekern.topology import Grid, allocate

logger = logging.getLogger("sparsekern")


def sparsify_(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.9,
    block_size: int | tuple[int, int] | None = None,
    *,
    targets: Selector = nn.Linear,
    ignore: Selector = (),
    distribution: str = "uniform",
    init: str = "balanced",
    seed: int = 0,
) -> nn.Module:
    """Replace the linear layers of a model by :class:`SparseLinear`, in place; build the optimizer afterwards.

    With ``init="balanced"`` or ``"random"`` places *and values* are drawn anew, as for training from scratch. To start
    from trained weights use ``init="norm"``: it keeps the blocks of largest norm, with their values.

    A selector is a type, a name, a glob (``"blocks.*.fc1"``), a pattern (``"re:.*head"``, matched from the start of the
    name), a function ``(module, name) -> bool``, or a list of these.

    Args:
        model: changed in place. Dtype, device, training flag, frozen parameters and hooks are kept.
        sparsity: fraction absent, in [0, 1), of all chosen layers together; or ``{selector: sparsity}`` with string
            selectors, where the first match counts and each entry is a group of its own.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA.
        targets: which layers.
        ignore: which of them to leave dense.
        distribution: how the blocks are shared out: ``"uniform"``, ``"er"`` or ``"erk"``;
            :func:`sparsekern.topology.allocate`.
        init: ``"balanced"``, ``"random"`` or ``"norm"``.
        seed: with the layer's name it decides topology and values, so that all ranks agree.

    Returns:
        The model.

    Raises:
        ValueError: a selector matches nothing; a layer cannot be sparse (shared weight, child of an attention module,
            a subclass of nn.Linear); a sparsity that leaves a layer without a block. Nothing has changed then.
    """
    if init not in ("balanced", "random", "norm"):
        raise ValueError(f"init is {init!r}; it must be one of balanced, random, norm")
    layers = _chosen(model, targets, ignore)
    counts = _counts(model, layers, sparsity, block_size, distribution)
    for name, (grid, blocks) in counts.items():
        swap_(model, name, _sparse_twin(layers[name], grid, blocks, init, seed, name))
        logger.info("%s: %d of %d blocks", name, blocks, grid.cells)
    return model


def _chosen(model: nn.Module, targets: Selector, ignore: Selector) -> dict[str, nn.Linear]:
    if isinstance(model, nn.Linear):
        raise ValueError("model is itself an nn.Linear and cannot be replaced in place; use SparseLinear.from_dense")
    ignored = select(model, ignore, "ignore")
    layers: dict[str, nn.Linear] = {}
    for single in flatten(targets):
        found = select(model, single, "targets")
        linears = {name: m for name, m in found.items() if isinstance(m, nn.Linear)}
        if not linears:
            kinds = ", ".join(sorted({type(m).__name__ for m in found.values()}))
            raise ValueError(f"targets: {single!r} matches only {kinds}; it must match an nn.Linear")
        layers |= {name: m for name, m in linears.items() if name not in ignored}
    if not layers:
        already = ", ".join(sparse_layers(model)) or "none"
        raise ValueError(f"every target is ignored: nothing is left to make sparse (sparse already: {already})")
    refused = {name: why for name, m in layers.items() if (why := refusal(model, name, m)) is not None}
    if refused:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise ValueError(f"cannot be made sparse: {reasons}. To leave them dense pass ignore={list(refused)}")
    return layers


def _counts(
    model: nn.Module,
    layers: dict[str, nn.Linear],
    sparsity: float | Mapping[str, float],
    block_size: int | tuple[int, int] | None,
    distribution: str,
) -> dict[str, tuple[Grid, int]]:
    """Return the grid and the number of blocks of each layer, without having changed anything."""
    grids = {
        name: linear_grid(layer.out_features, layer.in_features, block_size, layer.weight.device)
        for name, layer in layers.items()
    }
    groups: dict[str, list[str]] = {}
    by_pattern = sparsity if isinstance(sparsity, Mapping) else {"*": sparsity}
    for pattern in by_pattern:
        select(model, pattern, "sparsity")  # names the nearest names when nothing matches
    for name, layer in layers.items():
        first = next((p for p in by_pattern if matches(p, layer, name)), None)
        if first is None:
            raise ValueError(f"sparsity names no value for {name!r}; add it, or a last entry '*': <value>")
        groups.setdefault(first, []).append(name)
    counts: dict[str, tuple[Grid, int]] = {}
    for pattern, names in groups.items():
        blocks = allocate([grids[n] for n in names], by_pattern[pattern], distribution)
        counts |= {n: (grids[n], b) for n, b in zip(names, blocks, strict=True)}
    return {name: counts[name] for name in layers}


def _sparse_twin(layer: nn.Linear, grid: Grid, blocks: int, init: str, seed: int, name: str) -> SparseLinear:
    if init == "norm":
        if layer.weight.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no weight; init='norm' needs one")
        new = SparseLinear.from_dense(layer, block_size=grid.block, blocks=blocks, seed=seed, name=name)
    else:
        new = SparseLinear(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.weight.device,
            layer.weight.dtype,
            block_size=grid.block,
            blocks=blocks,
            init=init,
            seed=seed,
            name=name,
        )
    new.values.requires_grad_(layer.weight.requires_grad)
    if new.bias is not None and layer.bias is not None:
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new
