"""The shipped training recipes: data, networks, the loop, checkpoints, results. ``sparsekern train`` is their shell."""

from sparsekern.lab.config import Config
from sparsekern.lab.run import Interrupted, Logged, Observer, resume, start

__all__ = ["Config", "Interrupted", "Logged", "Observer", "resume", "start"]
