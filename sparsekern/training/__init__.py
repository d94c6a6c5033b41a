"""Methods that move blocks while the network learns: one file a method."""

from sparsekern.training.base import Method
from sparsekern.training.followers import Followers, Move
from sparsekern.training.schedules import Schedule
from sparsekern.training.set import SET
from sparsekern.training.static import Static

METHODS: dict[str, type[Method]] = {"static": Static, "set": SET}
"""By the name that the command line uses."""

__all__ = ["METHODS", "SET", "Followers", "Method", "Move", "Schedule", "Static"]
