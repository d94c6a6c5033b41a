"""Measured milliseconds of a layer and its dense twin, and the peak memory of a call."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from sparsekern.nn import BlockSparse, SparseConv2d


def race(contestants: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Return the median milliseconds of each contestant by name; they take turns, so that load slows all alike.

    Args:
        contestants: functions by name.
        repeats: number of measured rounds, after two rounds of warming up.
        device: device to synchronise around each call.
    """
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):  # two rounds to warm up
        for name, run in contestants.items():
            _wait(device)
            began = time.perf_counter()
            run()
            _wait(device)
            if repeat >= 2:
                samples[name].append((time.perf_counter() - began) * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def time_layer(layer: BlockSparse, x: Tensor, repeats: int = 5) -> tuple[float, float]:
    """Return ``(sparse, dense)`` median milliseconds of forward and backward on the input ``x (..., in_features)``.

    The dense contestant is PyTorch's own layer with a weight of zeros; convolutions and their inputs are channels last.
    The gradients of the layer do not change.

    Args:
        layer: the sparse layer.
        x: an input of the layer.
        repeats: number of measured rounds.
    """
    x = x.detach().to(layer.values.dtype, copy=True)
    shape = replace(layer.grid, transposed=False).weight_shape
    weight = torch.zeros(shape, dtype=x.dtype, device=x.device)
    if isinstance(layer, SparseConv2d):
        weight = weight.contiguous(memory_format=torch.channels_last) if weight.dim() == 4 else weight
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    x.requires_grad_()
    weight.requires_grad_(layer.values.requires_grad)
    bias = [] if layer.bias is None or not layer.bias.requires_grad else [layer.bias]
    sparse_inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    dense_inputs = [x, weight, *bias] if layer.values.requires_grad else [x, *bias]

    def dense() -> Tensor:
        if isinstance(layer, SparseConv2d):
            return layer.dense_forward(x, weight)
        return F.linear(x, weight, layer.bias)

    with torch.enable_grad():
        dy = torch.ones_like(layer(x))
        medians = race(
            {
                "sparse": lambda: torch.autograd.grad(layer(x), sparse_inputs, dy),
                "dense": lambda: torch.autograd.grad(dense(), dense_inputs, dy),
            },
            repeats,
            x.device,
        )
    return medians["sparse"], medians["dense"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
