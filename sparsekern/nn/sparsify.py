"""Replacing the dense layers of a model by sparse ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekern.errors import InputError
from sparsekern.nn.block_scores import Scoring, check_score
from sparsekern.nn.block_sparse import BlockSparse
from sparsekern.nn.converters import class_name, converter_of, grid_of, hosts_of, is_replaceable, known_classes
from sparsekern.nn.dense_layers import (
    Choice,
    Choose,
    dense_layers,
    dense_share,
    left_dense,
    racer,
    refusals,
    tied_heads,
)
from sparsekern.nn.init import INITS, check_init
from sparsekern.nn.selectors import Selector, by_entry, flatten, matches, select
from sparsekern.nn.surgery import check_optimizer, exchange_, lost, sparse_layers, swap_
from sparsekern.topology import Grid, Topology, allocate, block_pair
from sparsekern.topology.arguments import check_kind, check_number

logger = logging.getLogger("sparsekern")


def sparsify_(
    model: nn.Module,
    sparsity: float | Mapping[str, float] = 0.9,
    block_size: int | tuple[int, int] | list[int | tuple[int, int]] | None = None,
    *,
    targets: Selector = is_replaceable,
    ignore: Selector = (),
    distribution: str = "uniform",
    init: str = "balanced",
    init_scale: float | str = 1.0,
    capacity: float | Mapping[str, float] = 1.0,
    stems: bool = False,
    seed: int = 0,
    tie_taps: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    only_if_faster: Any = None,
    choices: list[Choice] | None = None,
    score: str | None = None,
    sample: Any = None,
) -> nn.Module:
    """Replace the linear layers and convolutions of a model by sparse ones, in place.

    Build the optimizer afterwards, or pass the one in use. The new layers are :class:`SparseLinear`,
    :class:`SparseConv1d` and :class:`SparseConv2d`; :func:`register_converter` adds other classes. Depthwise
    convolutions and stems (convolutions with at most three input channels; but see ``stems``) stay dense, because
    blocks of channels do not pay there. So do heads whose weight is tied to an embedding. The log says how many of the
    parameters stay dense, and in which layers.

    With ``init="balanced"`` or ``"random"`` places *and values* are drawn for training from scratch. To start from
    trained weights use ``init="norm"``, which keeps the blocks of largest norm with their values, or ``score``, which
    keeps those of highest score:

    * ``"magnitude"``: Frobenius norm, as ``init="norm"``. ``"random"``: a random number.
    * ``"snip"`` (Lee et al. 2019, equation 5): ``|w * g|``, g being the gradient of the loss of ``sample``.
    * ``"grasp"`` (Wang et al. 2020, equation 8): ``w * (H g)``, with the Hessian H: how much the block adds to the
      norm of the gradient.
    * ``"synflow"`` (Tanaka et al. 2020, algorithm 1): ``|w| * dR / d|w|``, R being the output of the network of
      absolute weights for an input of ones; blocks go in 100 rounds.

    The products are summed over a block, which is the score of a gate on the whole of it; at 1x1 it is the published
    one. The publications rank the weights of all layers together: ``distribution="global"``. Gradients come one layer
    at a time, and none of the whole model is stored, but for one that GraSP differentiates.

    With ``only_if_faster``, a sample of the model's input, each layer is raced against the sparse layers that could
    take its place, forward and backward on what the sample gives it, on this machine and with the present number of
    threads. The fastest takes its place; a layer that is fastest stays dense. Equal layers are raced once. The sparsity
    of a layer is what it is if all chosen layers become sparse.

    A selector is a type, a name, a glob (``"blocks.*.fc1"``), a pattern (``"re:.*head"``, matched from the start of the
    name), a function ``(module, name) -> bool``, or a list of these.

    Args:
        model: changed in place. Dtype, device, training flag, frozen parameters, attributes of parameters and hooks of
            modules are kept; hooks of state dicts and of tensors are lost, and the log lists them.
        sparsity: fraction of all chosen layers together that is not stored, in [0, 1); or ``{selector: sparsity}`` with
            string selectors: the first match counts, and each entry is a group of its own.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; in a convolution no larger
            than its channels need. With ``only_if_faster``, also a list of sizes to choose from.
        targets: selector of the layers to replace.
        ignore: selector of layers to leave dense.
        distribution: how blocks are distributed over layers: ``"uniform"``, ``"er"``, ``"er-matrix"`` or ``"erk"``; see
            :func:`sparsekern.topology.allocate`. Or ``"global"``, with trained weights: the best blocks of all layers
            (with selectors of ``sparsity``, of those of one entry) stay, and the best one of each layer.
        init: ``"balanced"``, ``"random"`` or ``"norm"``.
        init_scale: factor on the initial values, whose variance at 1 is ``1 / (3 fan_in)`` as in PyTorch; ``3 ** 0.5``
            gives ``1 / fan_in``. Or ``"dense"``, for a model that draws its own weights, as GPTs do: values get the
            standard deviation of the dense layer's weight, over the square root of the fraction that is stored, and the
            bias stays what it is. Neither with ``init="norm"`` nor with a ``score``.
        capacity: slots per block, 1 or more. The additional slots are free, for methods in which layers compete for
            blocks (``scope="global"``), and take as much memory as blocks. Or ``{selector: capacity}`` with string
            selectors: the first match counts, and other layers get no free slots.
        stems: also make stems sparse, if a block has no more columns than they have input channels, as at 1x1.
        seed: seed of topologies and values, together with each layer's name; ranks with the same seed agree.
        tie_taps: store a block of channels in all taps of a convolution or in none; the number of blocks is rounded
            accordingly.
        optimizer: an optimizer in use that is to continue, changed in place: it gets the blocks instead of the weights,
            with the state of the kept blocks. Only with ``init="norm"`` or a ``score``.
        only_if_faster: a tensor, a tuple of arguments, or a dict of keyword arguments of the model, which runs once, in
            evaluation mode and without gradients. In a process group all ranks take what the first one measures.
        choices: a list to which a :class:`Choice` is added for each layer that was raced; they are logged, too.
        score: see above; None for ``init``.
        sample: for SNIP and GraSP a batch ``(inputs, classes)``, whose loss is the cross-entropy, or a function without
            arguments that returns the loss: ``lambda: loss_fn(model(x), y)``. For SynFlow a batch of inputs, which says
            their shape, or a function that returns R.

    Returns:
        The model.

    Raises:
        TypeError: ``model`` is not a :class:`torch.nn.Module`, or another argument has the wrong type.
        ValueError: a selector matches nothing; a layer cannot be sparse (its weight is shared or read by another
            module's forward, or it is a subclass of nn.Linear or of a convolution); a sparsity leaves a layer without a
            block; there is nothing to race. The model is then unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> sk.sparsify_(model, sparsity=0.75, block_size=16, ignore=["2"])[0]
        SparseLinear(in_features=64, out_features=64, bias=True, block_size=(16, 16), blocks=4/16, sparsity=0.75)
    """
    check_kind("model", model, nn.Module, "a torch.nn.Module")
    check_init(init, 1.0 if init_scale == "dense" else init_scale, (*INITS, "norm"))
    if init == "norm" and score is None and distribution == "global":
        score = "magnitude"
    check_score(score, sample, init, distribution)
    keeps = init == "norm" or score is not None
    if keeps and init_scale != 1:
        how = "init='norm'" if score is None else f"score={score!r}"
        raise InputError(
            f"init_scale is {init_scale}, but {how} keeps the trained values; leave one of them out",
            parameter="init_scale",
        )
    if optimizer is not None and not keeps:
        raise InputError(
            f"optimizer is given, but init={init!r} draws new values; pass init='norm', or build it afterwards",
            parameter="optimizer",
        )
    sizes = _sizes(block_size, only_if_faster, choices)
    stem_width = min(block_pair(size)[1] for size in sizes if size is not None) if stems and None not in sizes else None
    layers = choose_layers(model, targets, ignore, stem_width)
    if optimizer is not None:
        check_optimizer(optimizer, {name: cast(nn.Parameter, layer.weight) for name, layer in layers.items()})
    counts = [_counts(model, layers, sparsity, size, distribution) for size in sizes]
    factors = _factors(model, layers, capacity)
    placed: list[dict[str, Topology]] = [{} for _ in counts]
    if score is not None:
        groups = [[name] for name in layers]
        if distribution == "global":
            groups = [names for _, names in by_entry(model, layers, sparsity, "sparsity")]
        for places, by_name in zip(placed, counts, strict=True):
            scoring = Scoring(model, {n: grid for n, (grid, _) in by_name.items()}, score, sample, tie_taps, seed)
            places |= scoring.places([(names, sum(by_name[n][1] for n in names)) for names in groups])

    def twin_of(name: str, grid: Grid, blocks: int, topology: Topology | None) -> BlockSparse:
        blocks = blocks if topology is None else topology.slots
        unit = grid.taps if tie_taps else 1  # blocks stored together
        parts = min(max(1, round(blocks / unit)), grid.cells // unit)
        room = min(math.ceil(parts * factors[name] - 1e-9), grid.cells // unit)
        options = {"blocks": parts * unit, "capacity": room * unit, "seed": seed, "name": name}
        if topology is not None:
            options["topology"] = topology
        return _sparse_twin(layers[name], grid, keeps, init, init_scale, tie_taps, options)

    choose = None if only_if_faster is None else _racer(model, layers, only_if_faster)
    chosen: list[Choice] = []
    twins: dict[str, BlockSparse] = {}  # built before any layer is replaced, so that errors change nothing
    for name in layers:
        made = (twin_of(name, *by_name[name], places.get(name)) for by_name, places in zip(counts, placed, strict=True))
        candidates = {twin.block_size: twin for twin in made}
        if choose is None:
            (twins[name],) = candidates.values()
            continue
        choice = choose(name, list(candidates.values()))
        chosen.append(choice)
        if choice.block is not None:
            twins[name] = candidates[choice.block]
    for name, twin in twins.items():
        if optimizer is not None and isinstance(bias := layers[name].bias, nn.Parameter):
            twin.bias = bias  # the optimizer holds this parameter
        if gone := lost(layers[name]):
            logger.warning("%s: the sparse layer does not take over %s", name, ", ".join(gone))
        swap_(model, name, twin)
        logger.info("%s: %d of %d blocks", name, twin._blocks, twin.grid.cells)
    if choose is not None:
        for choice in chosen:
            logger.info("%s", choice)
        logger.info("%d of %d layers are faster sparse", len(twins), len(layers))
    if choices is not None:
        choices += chosen
    if optimizer is not None:
        exchange_(
            optimizer,
            {n: (cast(nn.Parameter, layers[n].weight), twin.values, twin.topology) for n, twin in twins.items()},
        )
    for host in hosts_of(model):
        host.settle(model)
    logger.info("%s", dense_share(model))
    return model


def _sizes(block_size: Any, only_if_faster: Any, choices: list[Choice] | None) -> list[int | tuple[int, int] | None]:
    """Return the block sizes to choose from: one without a race."""
    if only_if_faster is None:
        if choices is not None:
            raise InputError(
                "choices is given without only_if_faster, so there is nothing to choose; drop it, or give a sample",
                parameter="choices",
            )
        return [block_size]
    if not isinstance(block_size, list):
        return [block_size]
    if not block_size:
        raise InputError("block_size is an empty list; give at least one size", parameter="block_size")
    return list({block_pair(size): size for size in block_size}.values())


def _racer(model: nn.Module, layers: dict[str, nn.Module], sample: Any) -> Choose:
    """Return what chooses between a layer and its sparse twins."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise InputError(
            "only_if_faster is given, but the model is on the meta device, where nothing can be raced; load it first",
            parameter="only_if_faster",
        )
    return racer()(model, layers, sample)


def choose_layers(
    model: nn.Module, targets: Selector, ignore: Selector, stem_width: int | None = None
) -> dict[str, nn.Module]:
    """Return the layers that :func:`sparsify_` would replace, by name.

    Args:
        model, targets, ignore: as in :func:`sparsify_`.
        stem_width: as in :func:`left_dense`.

    Raises:
        ValueError: as in :func:`sparsify_`.
    """
    if (own := converter_of(model)) is not None:
        raise InputError(
            f"model is itself an {class_name(own.dense)} and cannot be replaced in place; use "
            f"{own.sparse.__name__}.from_dense",
            parameter="model",
        )
    ignored = select(model, ignore, "ignore")
    reasons = dict.fromkeys(ignored, "ignored")  # why layers stay dense
    fixed = tied_heads(model)
    for host in hosts_of(model):
        fixed = host.stays_dense(model) | fixed
    layers: dict[str, nn.Module] = {}
    for single in flatten(targets):
        # For the default, no match is an error later on.
        none = single is is_replaceable and not any(is_replaceable(module) for module in model.modules())
        found = {} if none else select(model, single, "targets")
        dense = {name: module for name, module in found.items() if converter_of(module) is not None}
        if found and not dense:
            kinds = ", ".join(sorted({type(module).__name__ for module in found.values()}))
            raise InputError(
                f"targets: {single!r} matches only {kinds}; it must match one of {known_classes()}", parameter="targets"
            )
        for name, module in dense.items():
            if (why := fixed.get(name) or left_dense(module, stem_width)) is not None:
                logger.info("%s: stays dense (%s)", name, why)
                reasons[name] = why
            elif name not in ignored:
                layers[name] = module
    if not layers:
        already = ", ".join(sparse_layers(model)) or "none"
        why = "every target is ignored" if reasons else "targets matches no layer that it takes"
        raise InputError(
            f"{why}: nothing is left to make sparse (sparse already: {already}). {dense_layers(model, reasons)}",
            parameter="targets",
        )
    refused = refusals(model, layers)
    if refused:
        text = "; ".join(f"{name}: {why}" for name, why in refused.items())
        error = f"cannot be made sparse: {text}. To leave them dense pass ignore={list(refused)}"
        if len(refused) == len(layers):
            error += f", which leaves nothing to make sparse. {dense_layers(model, reasons, besides=refused)}"
        raise InputError(error)
    return layers


def _counts(
    model: nn.Module,
    layers: dict[str, nn.Module],
    sparsity: float | Mapping[str, float],
    block_size: int | tuple[int, int] | None,
    distribution: str,
) -> dict[str, tuple[Grid, int]]:
    """Return the grid and the number of blocks of each layer."""
    grids = {name: grid_of(layer, block_size) for name, layer in layers.items()}
    counts: dict[str, tuple[Grid, int]] = {}
    for number, names in by_entry(model, layers, sparsity, "sparsity"):
        blocks = allocate([grids[n] for n in names], number, "uniform" if distribution == "global" else distribution)
        counts |= {n: (grids[n], b) for n, b in zip(names, blocks, strict=True)}
    return {name: counts[name] for name in layers}


def _factors(model: nn.Module, layers: dict[str, nn.Module], capacity: float | Mapping[str, float]) -> dict[str, float]:
    """Return the slots per block of each layer."""
    by_pattern = capacity if isinstance(capacity, Mapping) else {"*": capacity}
    rule = "a number of slots for each block, 1 or more, or {selector: number}"
    for pattern, factor in by_pattern.items():
        check_number("capacity", factor, rule, lambda slots: 1 <= slots < math.inf)
        select(model, pattern, "capacity")  # raises if nothing matches
    return {
        name: next((factor for pattern, factor in by_pattern.items() if matches(pattern, layer, name)), 1.0)
        for name, layer in layers.items()
    }


def _sparse_twin(
    layer: nn.Module,
    grid: Grid,
    keeps: bool,
    init: str,
    init_scale: float | str,
    tie_taps: bool,
    options: dict[str, Any],
) -> BlockSparse:
    converter, weight = converter_of(layer), layer.weight
    assert converter is not None and isinstance(weight, Tensor)
    options["block_size"] = grid.block
    if grid.kernel is not None:
        options["tie_taps"] = tie_taps
    new: BlockSparse
    if keeps:
        if weight.is_meta:
            raise InputError(
                f"init is 'norm', and {options['name']!r} has no weight on the meta device; load the model first",
                parameter="init",
            )
        new = converter.sparse.from_dense(layer, **options)
    else:
        as_dense = init_scale == "dense"
        scale = _scale_of(options["name"], weight, grid) if as_dense else init_scale
        options |= {"device": weight.device, "dtype": weight.dtype, "init": init, "init_scale": scale}
        new = converter.sparse(**converter.arguments(layer), **options)
        new.set_dense_class(layer)
        if as_dense and new.bias is not None and isinstance(layer.bias, Tensor):
            new.bias.data.copy_(layer.bias)
    new.values.requires_grad_(weight.requires_grad)
    if new.bias is not None and isinstance(layer.bias, Tensor):
        new.bias.requires_grad_(layer.bias.requires_grad)
    return new


@torch.no_grad()
def _scale_of(name: str, weight: Tensor, grid: Grid) -> float:
    """Return the standard deviation of a dense weight, over that of PyTorch's initial weights."""
    fan_in = weight.numel() / grid.out_features
    scale = math.nan if weight.is_meta else float(weight.double().std(correction=0)) * (3 * fan_in) ** 0.5
    if not 0 < scale < math.inf:
        raise InputError(
            f"init_scale is 'dense', and the weight of {name!r} has no values, only zeros, or numbers "
            "that are not finite; give a number",
            parameter="init_scale",
        )
    return scale
