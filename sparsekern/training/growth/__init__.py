"""Methods that go by gradients: RigL, SRigL, GraNet and GSE by the whole weight's, MEST by that of stored blocks."""

from sparsekern.training.growth.gradient import GradientMethod
from sparsekern.training.growth.gse import GSE
from sparsekern.training.growth.mest import MEST
from sparsekern.training.growth.rigl import GraNet, RigL
from sparsekern.training.growth.srigl import SRigL

__all__ = ["GSE", "MEST", "GraNet", "GradientMethod", "RigL", "SRigL"]
