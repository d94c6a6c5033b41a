"""Sparse-IFT for a whole network with the FLOPs of the dense one, including stem, head and attention."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis import Profile, profile
from sparsekern.errors import InputError
from sparsekern.nn import BlockSparse, Selector, sparse_layers, sparsify_
from sparsekern.nn.converters import grid_of
from sparsekern.nn.linear import default_block_size
from sparsekern.nn.sparsify import choose_layers
from sparsekern.nn.surgery import swap_
from sparsekern.topology import check_sparsity, gather_blocks, generator_for
from sparsekern.topology.arguments import check_choice, check_number
from sparsekern.transforms.layers import sparse_doped, sparse_factorized, sparse_parallel
from sparsekern.transforms.twins import (
    INITS,
    Dense,
    Width,
    check,
    draw_,
    draw_bias_,
    has_twin,
    match_blocks,
    output_variance,
    wide_width,
)

logger = logging.getLogger("sparsekern")

IN_PLACE: Mapping[str, Callable[..., nn.Module]] = {
    "parallel": sparse_parallel,
    "factorized": sparse_factorized,
    "doped": sparse_doped,
}
"""Transforms that keep the inputs and outputs of a layer, so that it can be replaced in any network."""

TRANSFORMS = ("wide", *IN_PLACE)

Build = Callable[[Width], nn.Module]


def transform(
    model: nn.Module | Build,
    name: str,
    sparsity: float,
    sample_input: Tensor,
    *,
    block_size: int | tuple[int, int] | None = None,
    targets: Selector = has_twin,
    ignore: Selector | None = None,
    distribution: str = "uniform",
    match: str = "network",
    activation: Callable[[], nn.Module] = nn.ReLU,
    pool: float = 1.0,
    init: str = "variance",
    seed: int = 0,
    max_gib: float = 8.0,
) -> nn.Module:
    """Return a sparse network with the FLOPs of a dense one, by a Sparse-IFT transform.

    Source: Thangarasa et al., "Sparse-IFT: Sparse Iso-FLOP Transformations for Maximizing Training Efficiency", ICML
    2024. Train the result like the dense network; any training method may move its blocks.

    ``"wide"`` has to build a wider network, so pass a function of the :class:`Width`, such as
    ``lambda width: MyNetwork(hidden=width(512))``. The wider network is dense while it is built.

    Args:
        model: a function that builds the dense network for a width, or (except for ``"wide"``) a network, which is not
            changed.
        name: ``"wide"``, ``"parallel"``, ``"factorized"`` or ``"doped"``.
        sparsity: the only hyper-parameter, in [0, 1). 0 returns the dense network.
        sample_input: an input of the network, whose shape determines the FLOPs.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; in a convolution no larger
            than its channels need.
        targets: selector of the layers to transform; see :func:`sparsekern.sparsify_`.
        ignore: selector of layers to leave dense. Default: the first and the last layer that run.
        distribution: how the blocks of ``"wide"`` are distributed: ``"uniform"``, ``"er"`` or ``"erk"``.
        match: what has the FLOPs of the dense network in ``"wide"`` (the other transforms keep those of each layer).
            ``"network"``: all products together; the sparse layers make up for what is widened and stays dense (stem,
            head, attention). ``"layers"``: the sparse layers alone.
        activation: function that returns the nonlinearity inside ``"parallel"`` and ``"factorized"``.
        pool: stored blocks per block that the FLOPs allow, 1 or more: the candidates of a method that chooses among
            them (VR-PGE), which then takes the FLOPs of the dense network.
        init: ``"variance"``: the output of each layer has the variance of its dense twin's. ``"paper"``: as in the
            paper's code; for ``"wide"``, the initial values of the wide network, masked.
        seed: seed of the initial values and topologies.
        max_gib: memory in GiB that the weights of the ``"wide"`` network may take while it is built; they grow as
            ``1 / (1 - s)``.

    Raises:
        ValueError: an option is out of range; ``"wide"`` is given a network; the network that the function builds does
            not follow the width; or what stays dense takes all FLOPs.
    """
    check_sparsity(sparsity)
    check_choice("init", init, INITS)
    check_choice("name", name, TRANSFORMS)
    check_choice("match", match, ("network", "layers"))
    if isinstance(model, nn.Module):
        if name == "wide" and sparsity > 0:
            raise InputError(
                f"model is a {type(model).__name__} that is built already, and cannot be widened: its residual sums, "
                "norms and reshapes have fixed widths. Give a function that builds it, such as "
                f"lambda width: {type(model).__name__}(hidden=width(512)), or use parallel, factorized or doped",
                parameter="model",
            )
        dense = copy.deepcopy(model)
    else:
        dense = _built(model, Width(), seed)
    if sparsity == 0:
        return dense
    twins = profile(dense, sample_input)
    chosen = _chosen(dense, twins, targets, ignore)
    if name == "wide":
        assert not isinstance(model, nn.Module)
        first = next(iter(chosen.values()))
        check(first, sparsity, pool, init)
        width = wide_width(sparsity, default_block_size(first.weight.device) if block_size is None else block_size)
        _check_room(dense, chosen, sparsity, width, max_gib)
        wide = _built(model, width, seed)
        work = _wide_work(dense, wide, twins, sample_input, chosen, match)
        counts = _counts(wide, chosen, work, block_size, distribution, pool)
        return _sparse(wide, dense, chosen, counts, block_size, init, seed)
    if distribution != "uniform":
        raise InputError(
            f"distribution is {distribution!r}; {name} keeps the FLOPs of every layer: it must be uniform",
            parameter="distribution",
        )
    options: dict[str, Any] = {"block_size": block_size, "pool": pool, "init": init, "seed": seed}
    options |= {} if name == "doped" else {"activation": activation}
    for layer_name, layer in chosen.items():
        swap_(dense, layer_name, IN_PLACE[name](layer, sparsity, name=layer_name, **options))
    return dense


def _built(build: Build, width: Width, seed: int) -> nn.Module:
    """Build the network from the seed, without changing the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(seed, "transform").initial_seed())
        return build(width)


def _check_room(dense: nn.Module, chosen: dict[str, Dense], sparsity: float, width: Width, max_gib: float) -> None:
    """Raise ValueError if the wide network, dense while it is built, is too large; other layers grow one way only."""
    check_number("max_gib", max_gib, "a number above 0", lambda gib: gib > 0)
    wider = {id(layer.weight): width.multiplier**2 for layer in chosen.values()}
    gib = sum(p.nbytes * wider.get(id(p), width.multiplier) for p in dense.parameters()) / 2**30
    if gib > max_gib:
        raise InputError(
            f"sparsity is {sparsity:g}, which makes the network {width.multiplier:.3g} times as wide: dense, as it is "
            f"while it is built, its weights take {gib:.3g} GiB, and max_gib is {max_gib:g}; choose a lower sparsity, "
            "a smaller network, or a larger max_gib",
            parameter="max_gib",
        )


def _chosen(dense: nn.Module, twins: Profile, targets: Selector, ignore: Selector | None) -> dict[str, Dense]:
    if ignore is None:
        ran = list(twins.layers)
        ignore = list(dict.fromkeys((ran[0], ran[-1]))) if ran else ()
    chosen = {}
    for name, layer in choose_layers(dense, targets, ignore).items():
        if not has_twin(layer):
            raise InputError(
                f"targets match {name!r}, a {type(layer).__name__}; Sparse-IFT takes nn.Linear and nn.Conv2d",
                parameter="targets",
            )
        chosen[name] = layer
    return chosen


def _wide_work(
    dense: nn.Module, wide: nn.Module, twins: Profile, sample_input: Tensor, chosen: dict[str, Dense], match: str
) -> tuple[int, dict[str, int]]:
    """Return the multiply-adds of all sparse layers together, and the tokens of each."""
    widened = profile(wide, sample_input)
    if list(widened.layers) != list(twins.layers):
        odd = sorted(widened.layers.keys() ^ twins.layers.keys())
        raise InputError(
            f"model builds another network at another width: {', '.join(odd) or 'its layers'} differ", parameter="model"
        )
    if not any(widened.layers[n].elements > twins.layers[n].elements for n in chosen):
        raise InputError(
            "model builds no wider layer at a larger width: it must pass width(...) to the network", parameter="model"
        )
    tokens = {name: widened.layers[name].tokens for name in chosen}
    if match == "layers":
        return sum(twins.layers[name].multiply_adds for name in chosen), tokens
    rest = widened.multiply_adds - sum(widened.layers[name].multiply_adds for name in chosen)
    if rest >= twins.multiply_adds:
        raise InputError(
            f"what stays dense in the wider network takes {rest} multiply-adds, the whole dense network "
            f"{twins.multiply_adds}: choose a lower sparsity, fewer layers to ignore, or match='layers'"
        )
    return twins.multiply_adds - rest, tokens


def _counts(
    wide: nn.Module,
    chosen: dict[str, Dense],
    work: tuple[int, dict[str, int]],
    block_size: int | tuple[int, int] | None,
    distribution: str,
    pool: float,
) -> dict[str, tuple[int, int]]:
    """Return the number of blocks and of cells of each layer."""
    grids = [grid_of(wide.get_submodule(name), block_size) for name in chosen]
    total, tokens = work
    blocks = match_blocks(grids, [tokens[name] for name in chosen], pool * total, distribution)
    return {name: (n, grid.cells) for name, n, grid in zip(chosen, blocks, grids, strict=True)}


def _sparse(
    wide: nn.Module,
    dense: nn.Module,
    chosen: dict[str, Dense],
    counts: dict[str, tuple[int, int]],
    block_size: int | tuple[int, int] | None,
    init: str,
    seed: int,
) -> nn.Module:
    """Make the chosen layers of the wide network sparse and draw their values."""
    own = {name: wide.get_submodule(name) for name in chosen}
    absent = {name: 1 - blocks / cells for name, (blocks, cells) in counts.items()}  # rounded to that many blocks again
    ran_dense = [n for n, m in wide.named_modules() if has_twin(m, n) and n not in chosen]
    sparsify_(wide, absent, block_size, targets=list(chosen), seed=seed)
    for name, layer in sparse_layers(wide).items():
        twin = chosen[name]
        assert layer.topology.blocks() == counts[name][0]
        if init == "paper":
            _take_own(layer, own[name])
        else:
            draw_(layer, output_variance(twin))
            draw_bias_(layer, twin)
        logger.info("%s: %d of %d blocks", name, *counts[name])
    if init == "variance":
        for name in ran_dense:
            _rescale(wide.get_submodule(name), dense.get_submodule(name))  # type: ignore[arg-type]
    return wide


@torch.no_grad()
def _take_own(layer: BlockSparse, own: nn.Module) -> None:
    assert isinstance(own, (nn.Linear, nn.Conv2d))
    layer.values.copy_(gather_blocks(layer.topology, own.weight))
    if layer.bias is not None and own.bias is not None:
        layer.bias.copy_(own.bias)


@torch.no_grad()
def _rescale(layer: Dense, twin: Dense) -> None:
    """Give the output of a wider dense layer the variance of its twin's; a layer of zeros is left unchanged."""
    now, wanted = output_variance(layer), output_variance(twin)
    if now > 0:
        layer.weight.mul_((wanted / now) ** 0.5)
