"""Sparse Wide: a layer with ``sqrt(1 / (1 - s))`` times the inputs and outputs, and as many weights."""

from __future__ import annotations

import copy

from torch import nn

from sparsekern.nn.converters import grid_of
from sparsekern.transforms.init import check_init, draw_, draw_bias_, wanted_variance
from sparsekern.transforms.match import match_blocks
from sparsekern.transforms.sizes import wide_width
from sparsekern.transforms.twins import Dense, check, dense_twin, features, sparse_twin


def sparse_wide(
    layer: Dense,
    sparsity: float,
    *,
    block_size: int | tuple[int, int] | None = None,
    widen_in: bool = True,
    widen_out: bool = True,
    pool: float = 1.0,
    init: str = "variance",
    seed: int = 0,
    name: str = "",
) -> nn.Module:
    """Return a wider sparse layer that takes as many FLOPs as a dense one; a copy of that at sparsity 0.

    The layers around it must be widened too: :func:`transform` does that for a network.

    Args:
        layer: an :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: decides the width, in [0, 1). Widths are rounded to whole blocks, so the fraction that is absent in
            the end may differ; the number of blocks is such that the FLOPs do not.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; a convolution's no wider
            than its channels.
        widen_in, widen_out: whether its inputs, its outputs are widened.
        pool: blocks to store for each one that the FLOPs allow, 1 or more: candidates of a method that chooses.
        init: ``"variance"``: outputs vary as the dense layer's. ``"paper"``: Kaiming normal for the full shape.
        seed: with ``name`` it decides topology and values.
        name: the layer's name in the model.

    Raises:
        TypeError: another kind of layer.
        ValueError: a sparsity or init out of range, a grouped convolution, or no room for the blocks.
    """
    check(layer, sparsity, pool)
    check_init(init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    width = wide_width(sparsity, grid_of(layer, block_size).block)
    sizes = (width(ins) if widen_in else ins, width(outs) if widen_out else outs)
    twin = dense_twin(layer, *sizes, bias=layer.bias is not None, device="meta")
    grid = grid_of(twin, block_size, layer.weight.device)
    (blocks,) = match_blocks([grid], [1], pool * layer.weight.numel())
    wide = sparse_twin(twin, blocks, grid.block, layer=layer, seed=seed, name=name)
    draw_(wide, variance)
    draw_bias_(wide, layer)
    return wide.train(layer.training)
