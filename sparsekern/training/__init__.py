"""Methods that move blocks while the network learns: a file or a folder each."""

from sparsekern.training.agent import AGENT
from sparsekern.training.base import Method
from sparsekern.training.followers import Followers, Move
from sparsekern.training.growth import GSE, GradientMethod, RigL
from sparsekern.training.presets import PRESETS, Preset, preset
from sparsekern.training.recalibrate import recalibrate_norms
from sparsekern.training.schedules import Schedule
from sparsekern.training.set import SET
from sparsekern.training.static import Static
from sparsekern.training.vrpge import VRPGE

METHODS: dict[str, type[Method]] = {"static": Static, "set": SET, "rigl": RigL, "gse": GSE, "vrpge": VRPGE}
"""By the name that the command line uses."""

__all__ = [
    "AGENT",
    "GSE",
    "METHODS",
    "PRESETS",
    "SET",
    "VRPGE",
    "Followers",
    "GradientMethod",
    "Method",
    "Move",
    "Preset",
    "RigL",
    "Schedule",
    "Static",
    "preset",
    "recalibrate_norms",
]
