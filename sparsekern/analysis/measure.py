"""Measured milliseconds of a layer and its dense twin, and the peak memory of a call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparsekern.analysis.layer_race import Contestant, LayerInput, race_steps, sparse_contestant, trained
from sparsekern.nn import BlockSparse


def time_layer(layer: BlockSparse, given: Tensor | LayerInput, repeats: int = 5) -> tuple[float, float]:
    """Return ``(sparse, dense)`` median milliseconds of forward and backward on an input ``(..., in_features)``.

    The dense contestant is PyTorch's own layer with a weight of zeros, channels last in a convolution. The gradients of
    the layer do not change.

    Args:
        layer: the sparse layer.
        given: an input of the layer.
        repeats: number of measured rounds.
    """
    given = LayerInput(given) if isinstance(given, Tensor) else given
    if given.autocast is None:
        given = replace(given, x=given.x.to(layer.values.dtype))
    shape = replace(layer.grid, transposed=False).weight_shape
    weight = torch.zeros(shape, dtype=layer.values.dtype, device=layer.values.device)
    if weight.dim() == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    weight.requires_grad_(layer.values.requires_grad)
    sparse = sparse_contestant(layer)
    dense = Contestant(lambda x: layer.dense_forward(x, weight), trained(weight, layer.bias))
    timings = race_steps({"sparse": sparse, "dense": dense}, given, repeats)
    return timings["sparse"].median, timings["dense"].median


def peak_above(run: Callable[[], object], device: torch.device) -> int:
    """Run once and return the peak of the bytes held by PyTorch's allocators, above those held before.

    Memory that native kernels allocate themselves is not counted.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch 2.13 writes lines to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(max(accumulate((event.nbytes() for event in events), initial=0)))
