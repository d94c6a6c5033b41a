"""Predictions for a training that has not run: bytes, FLOPs, traffic and time of a step."""

from sparsekern.analysis.plan.machine import CPU_NETWORK, DEVICES, Device, Machine, cache_file
from sparsekern.analysis.plan.measurement import measure
from sparsekern.analysis.plan.prediction import (
    PARTS,
    STRATEGIES,
    Layout,
    Memory,
    Prediction,
    Traffic,
    Updates,
    largest,
    memory,
    predict,
    traffic,
)
from sparsekern.analysis.plan.trace import Step, Trace, repeated_blocks, trace

__all__ = [
    "CPU_NETWORK",
    "DEVICES",
    "PARTS",
    "STRATEGIES",
    "Device",
    "Layout",
    "Machine",
    "Memory",
    "Prediction",
    "Step",
    "Trace",
    "Traffic",
    "Updates",
    "cache_file",
    "largest",
    "measure",
    "memory",
    "predict",
    "repeated_blocks",
    "trace",
    "traffic",
]
