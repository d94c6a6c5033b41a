"""Sparse Wide: ``sqrt(1 / (1 - s))`` times the inputs and outputs, and as many stored weights as the dense layer."""

from __future__ import annotations

import copy

from torch import nn

from sparsekern.nn.converters import grid_of
from sparsekern.transforms.sizes import wide_width
from sparsekern.transforms.twins import (
    Dense,
    check,
    dense_twin,
    draw_,
    draw_bias_,
    features,
    sparse_twins,
    wanted_variance,
)


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
    """Return a wider sparse layer with the FLOPs of a dense layer, or a copy of that at sparsity 0.

    The layers around it must be widened too; :func:`transform` does so for a whole network.

    Args:
        layer: a :class:`torch.nn.Linear` or :class:`torch.nn.Conv2d`; not changed.
        sparsity: determines the width, in [0, 1). Since widths are rounded to whole blocks, the resulting sparsity may
            differ; the FLOPs do not.
        block_size: side of the blocks, or ``(out, in)``. Default: 32 on a CPU, 64 on CUDA; in a convolution no larger
            than its channels need.
        widen_in, widen_out: whether to widen the inputs and the outputs.
        pool: stored blocks per block that the FLOPs allow, 1 or more: the candidates of a method that chooses blocks.
        init: ``"variance"``: the output has the variance of the dense layer's. ``"paper"``: Kaiming normal for the full
            shape.
        seed: seed of the topology and the values, together with ``name``.
        name: the layer's name in the model.

    Raises:
        TypeError: the layer is of another class.
        ValueError: an option is out of range, the layer is a grouped convolution, or the blocks do not fit.
    """
    check(layer, sparsity, pool, init)
    if sparsity == 0:
        return copy.deepcopy(layer)
    variance = wanted_variance(layer, init)
    ins, outs = features(layer)
    width = wide_width(sparsity, grid_of(layer, block_size).block)
    sizes = (width(ins) if widen_in else ins, width(outs) if widen_out else outs)
    twin = dense_twin(layer, *sizes, bias=layer.bias is not None, device="meta")
    (wide,) = sparse_twins(layer, {"": twin}, pool * layer.weight.numel(), block_size, seed, name)
    draw_(wide, variance)
    draw_bias_(wide, layer)
    return wide.train(layer.training)
