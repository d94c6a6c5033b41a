"""Methods that move blocks while the network learns: one file a method."""

from sparsekern.training.base import Method
from sparsekern.training.followers import Followers, Move
from sparsekern.training.recalibrate import recalibrate_norms
from sparsekern.training.schedules import Schedule
from sparsekern.training.set import SET
from sparsekern.training.static import Static
from sparsekern.training.vrpge import VRPGE

METHODS: dict[str, type[Method]] = {"static": Static, "set": SET, "vrpge": VRPGE}
"""By the name that the command line uses."""

__all__ = ["METHODS", "SET", "VRPGE", "Followers", "Method", "Move", "Schedule", "Static", "recalibrate_norms"]
