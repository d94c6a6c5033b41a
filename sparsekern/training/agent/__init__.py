"""AGENT: gradients corrected by those of an earlier state of the network.

Lei, Xu, Zhang, He and Mallick, "Balance is Essence: Accelerating Sparse Training via Adaptive Gradient Correction",
CPAL 2024.
"""

from sparsekern.training.agent.agent import AGENT

__all__ = ["AGENT"]
