"""VR-PGE: learns which blocks to keep from the losses of forward passes.

Zhou, Zhang, Chen, Diao and Zhang, "Efficient Neural Network Training via Forward and Backward Propagation
Sparsification", NeurIPS 2021 (arXiv 2111.05685).
"""

from sparsekern.training.vrpge.vrpge import VRPGE

__all__ = ["VRPGE"]
