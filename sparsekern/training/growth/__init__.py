"""Methods that decide by gradients: RigL, GraNet and GSE by that of the whole weight, MEST by that of stored blocks."""

from sparsekern.training.growth.gradient import GradientMethod
from sparsekern.training.growth.gse import GSE
from sparsekern.training.growth.mest import MEST
from sparsekern.training.growth.rigl import GraNet, RigL

__all__ = ["GSE", "MEST", "GraNet", "GradientMethod", "RigL"]
