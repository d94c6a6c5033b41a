"""What extra passes cost: FLOPs and seconds."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


class ExtraCost:
    """Adds up seconds and FLOPs of passes that a plain training does not make.

    FLOPs are counted in the first pass of a kind, and taken for the same in the others until :meth:`recount`: counting
    slows a pass down. Seconds are the host's: on a GPU, what it waits for.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.seconds = 0.0
        self._of_pass: dict[str, int] = {}

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the seconds between begin and end."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began

    @contextmanager
    def counted(self, kind: str) -> Iterator[None]:
        """Add the FLOPs of a pass of this kind."""
        if kind in self._of_pass:
            yield
        else:
            # A compiled graph can neither be counted nor, with fullgraph=True, be run while somebody counts.
            with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
                warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)  # the counter's own hooks
                with FlopCounterMode(display=False) as counter:
                    yield
            self._of_pass[kind] = counter.get_total_flops()
        self.flops += self._of_pass[kind]

    def recount(self) -> None:
        """Count the next pass of every kind: topology or batches may be others."""
        self._of_pass.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs; in a tuple what has other names in the course of a run."""
        return {"flops": self.flops, "seconds": self.seconds, "of_pass": (dict(self._of_pass),)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken."""
        self.flops, self.seconds, self._of_pass = state["flops"], state["seconds"], dict(state["of_pass"][0])
