"""Methods that grow blocks where the gradient of the whole weight is large: RigL, GraNet and GSE."""

from sparsekern.training.growth.gradient import GradientMethod
from sparsekern.training.growth.gse import GSE
from sparsekern.training.growth.rigl import GraNet, RigL

__all__ = ["GSE", "GraNet", "GradientMethod", "RigL"]
