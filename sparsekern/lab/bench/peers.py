"""Other libraries in the race, and the OpenMP runtimes that they bring into the process.

SparseLab (``pip install sparselab``) has a linear layer of single weights in float32, for a CPU. Its wheel brings an
OpenMP runtime of its own. Two runtimes keep two pools of threads, which then compete for the cores: with a second
runtime, a peer is raced on one thread.
"""

from __future__ import annotations

import re
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.layer_race import Contestant, LayerInput

RUNTIME = re.compile(r"/\S*lib(?:gomp|omp|iomp5)\S*")
"""A file of an OpenMP runtime: that of GCC, of LLVM or of Intel."""

SPARSELAB = "SparseLab"


def openmp_runtimes() -> set[str] | None:
    """Return the files of the OpenMP runtimes in this process; None if the system does not say."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    return set(RUNTIME.findall(maps))


def why_one_thread() -> str | None:
    """Return in a sentence why SparseLab is raced on one thread only, or None; loads it."""
    import_module("sparselab")
    runtimes = openmp_runtimes()
    if runtimes is None:
        return f"{SPARSELAB} may bring a second OpenMP runtime, which this system does not show: one thread only"
    if len(runtimes) > 1:
        return f"{SPARSELAB} brings a second OpenMP runtime into the process: it is raced on one thread only"
    return None


def absent() -> str | None:
    """Return in a sentence that SparseLab is not installed, or None."""
    if find_spec("sparselab") is None:
        return f"{SPARSELAB} is not installed and takes no part: pip install sparselab"
    return None


class SparseLabLayer:
    """A layer of SparseLab with a given weight.

    Args:
        weight: ``(out, in)`` float32 on the CPU; what is zero is not stored.
        bias: ``(out,)`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        sparselab: Any = import_module("sparselab")
        outputs, inputs = weight.shape
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
            self.module = sparselab.SparseLinear(inputs, outputs, bias=bias is not None, sparsity=0.0)
            csr = sparselab.layout.from_dense(weight.detach())
        self.module._csr = csr
        self.module._values = nn.Parameter(torch.from_numpy(csr.values))
        if bias is not None:
            self.module.bias = nn.Parameter(bias.detach().clone())
        counts = torch.tensor(csr.row_nnz, dtype=torch.int64)
        self.rows = torch.arange(outputs).repeat_interleave(counts)
        firsts = torch.tensor(csr.row_start, dtype=torch.int64)[:outputs]
        within = torch.arange(len(self.rows)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.slots = firsts.repeat_interleave(counts) + within
        """Slot of each stored weight; the slots between are padding."""
        self.cols = torch.tensor(csr.col_indices, dtype=torch.int64)[self.slots]
        self.weight, self.bias = weight.detach(), bias

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The values ``(slots,)`` and the bias."""
        bias = self.module.bias
        return (self.module._values,) if bias is None else (self.module._values, bias)

    def contestant(self) -> Contestant:
        """Return the layer as a contestant."""

        def exact(x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
            weight = self.weight.double().requires_grad_()
            bias = None if self.bias is None else self.bias.detach().double().requires_grad_()
            trained = (weight,) if bias is None else (weight, bias)
            dense = Contestant(lambda x: torch.nn.functional.linear(x, weight, bias), trained)
            y, dx, dweight, *dbias = dense.step_call(LayerInput(x), dy)()
            dvalues = dweight.new_zeros(len(self.module._values))
            dvalues[self.slots] = dweight[self.rows, self.cols]
            return y, dx, dvalues, *dbias

        return Contestant(self.module, self.parameters, exact)
