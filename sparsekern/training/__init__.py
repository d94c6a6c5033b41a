"""Training methods: they move the blocks of sparse layers while a network trains."""

from sparsekern.nn.norm import recalibrate_norms
from sparsekern.topology import Move
from sparsekern.training.agent import AGENT
from sparsekern.training.attachment import NetworkSampler
from sparsekern.training.base import Method
from sparsekern.training.dsr import DSR
from sparsekern.training.followers import Followers, compact_
from sparsekern.training.growth import GSE, MEST, GradientMethod, GraNet, RigL, SRigL
from sparsekern.training.lottery import Lottery
from sparsekern.training.magnitude import SET, Gradual, Static
from sparsekern.training.presets import PRESETS, Preset, preset
from sparsekern.training.schedules import Schedule
from sparsekern.training.topkast import TopKAST
from sparsekern.training.vrpge import VRPGE

METHODS: dict[str, type[Method]] = {
    "static": Static,
    "set": SET,
    "rigl": RigL,
    "gse": GSE,
    "vrpge": VRPGE,
    "gradual": Gradual,
    "granet": GraNet,
    "mest": MEST,
    "srigl": SRigL,
    "dsr": DSR,
    "top-kast": TopKAST,
}
"""The methods by their names on the command line."""

__all__ = [
    "AGENT",
    "DSR",
    "GSE",
    "MEST",
    "METHODS",
    "PRESETS",
    "SET",
    "VRPGE",
    "Followers",
    "GraNet",
    "GradientMethod",
    "Gradual",
    "Lottery",
    "Method",
    "Move",
    "NetworkSampler",
    "Preset",
    "RigL",
    "SRigL",
    "Schedule",
    "Static",
    "TopKAST",
    "compact_",
    "preset",
    "recalibrate_norms",
]
