"""Predictions for a training that has not run: bytes, FLOPs, traffic and time of a step."""

from sparsekern.analysis.plan.parallel import STRATEGIES, Layout, Memory, Traffic, Updates, memory, traffic
from sparsekern.analysis.plan.trace import Step, Trace, repeated_blocks, trace

__all__ = [
    "STRATEGIES",
    "Layout",
    "Memory",
    "Step",
    "Trace",
    "Traffic",
    "Updates",
    "memory",
    "repeated_blocks",
    "trace",
    "traffic",
]
