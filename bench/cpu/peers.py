"""Other libraries that multiply by stored elements or blocks. What they need prepared is not timed.

torch-csr, torch-bsr   PyTorch's compressed rows, of elements and of blocks. Each is given what it is fastest with: x
                       and dy transposed in advance (their results come out transposed), a transposed copy of the
                       weight for dx. dvalues is ``torch.sparse.sampled_addmm``, which knows elements only. Nothing
                       joins the three for autograd; a step is the three after each other
scipy-csr, scipy-bsr   the forward on one thread, x transposed in advance; it has no product for dvalues
SparseLab              its layer of single weights, through autograd, on one thread where it brings an OpenMP runtime
SparseProp             its layer of single weights, through autograd; ``pip install sparseprop`` compiles it
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cpu.cases import Case
from bench.cpu.contestants import Maker
from bench.cpu.scene import Scene
from bench.gpu.contestants import SPARSE, Contestant, joined, named
from bench.gpu.peers import NotSupported
from bench.gpu.scene import Answer
from sparsekern.lab.bench.run import SPARSELAB, absent, sparselab_layer, why_one_thread

SPARSEPROP = "SparseProp"

FLOAT32_ONLY = "it multiplies float32 and float64 on a CPU, nothing shorter"


def torch_compressed(blocks: bool, scene: Scene, op: str) -> Contestant:
    """Return ``torch.sparse``'s compressed rows, of blocks or of elements."""
    if scene.dtype != torch.float32:
        raise NotSupported(FLOAT32_ONLY)
    if blocks and scene.grid.block == (1, 1):
        raise NotSupported("blocks of 1x1 are torch-csr")
    x, dy = scene.x.T.contiguous(), scene.dy.T.contiguous()
    elements = stored_elements(scene)
    if blocks:
        weight, turned = (m.to_sparse_bsr(scene.grid.block) for m in (scene.weight, scene.weight.T.contiguous()))
    else:
        weight, turned = elements, elements.to_dense().T.contiguous().to_sparse_csr()

    def dvalues() -> Tensor:
        gradient: Tensor = torch.sparse.sampled_addmm(elements, dy, scene.x, beta=0.0)
        return gradient.values()

    contestant = joined(
        "torch-bsr" if blocks else "torch-csr", SPARSE, scene, op, lambda: weight @ x, lambda: turned @ dy, dvalues
    )

    def answer(result: object) -> Answer:
        found = contestant.answer(result)
        for name in found:
            if name != "dvalues":
                found[name] = found[name].T
                continue
            at = elements.crow_indices().diff().long()
            gradient = torch.zeros_like(scene.weight)
            rows = torch.arange(len(at)).repeat_interleave(at)
            gradient[rows, elements.col_indices().long()] = found[name]
            found[name] = scene.blocks_of(gradient)
        return found

    return Contestant(contestant.name, SPARSE, contestant.run, answer)


def stored_elements(scene: Scene) -> Tensor:
    """Return the weight as compressed rows of elements; a stored zero counts as stored."""
    grid, (bo, bi) = scene.grid, scene.grid.block
    stored = torch.zeros(grid.rows, bo, grid.cols, bi, dtype=torch.bool)
    stored[scene.row.long(), :, scene.col.long(), :] = True
    pattern = stored.view(grid.out_features, grid.in_features).to_sparse_csr()
    crow, col = pattern.crow_indices().int(), pattern.col_indices().int()
    values = scene.weight[stored.view(grid.out_features, grid.in_features)]
    return torch.sparse_csr_tensor(crow, col, values, tuple(scene.weight.shape), check_invariants=False)


def scipy(form: str, scene: Scene, op: str) -> Contestant:
    """Return scipy's compressed rows, of elements (``csr``) or of blocks (``bsr``)."""
    if importlib.util.find_spec("scipy") is None:
        raise NotSupported("scipy is not installed; pip install -e '.[bench]'")
    if scene.dtype != torch.float32:
        raise NotSupported(FLOAT32_ONLY)
    if form == "bsr" and scene.grid.block == (1, 1):
        raise NotSupported("blocks of 1x1 are scipy-csr")
    import scipy.sparse

    dense, x = scene.weight.numpy(), scene.x.T.contiguous().numpy()
    if form == "csr":
        weight = scipy.sparse.csr_matrix(dense)
    else:
        weight = scipy.sparse.bsr_matrix(dense, blocksize=scene.grid.block)

    def answer(result: object) -> Answer:
        return {"y": torch.from_numpy(result).T}

    if op != "fwd":
        raise NotSupported("it has no product for dvalues")
    return Contestant(f"scipy-{form}", SPARSE, lambda: weight @ x, answer)


def sparselab(scene: Scene, op: str) -> Contestant:
    """Return SparseLab's linear layer: forward through its module, gradients through autograd."""
    if (missing := absent()) is not None:
        raise NotSupported(missing)
    if torch.get_num_threads() > 1 and (why := why_one_thread()) is not None:
        raise NotSupported(why)
    layer, (rows, cols, slots) = sparselab_layer(scene.weight, None)
    x = scene.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer.forward(x)
        return y.detach(), *torch.autograd.grad(y, (x, *layer.parameters), scene.dy)

    def answer(result: object) -> Answer:
        found = named(op, result)
        if "dvalues" in found:
            gradient = torch.zeros_like(scene.weight)
            gradient[rows, cols] = found["dvalues"][slots]
            found["dvalues"] = scene.blocks_of(gradient)
        return found

    runs: dict[str, Callable[[], object]] = {"fwd": torch.no_grad()(lambda: layer.forward(x)), "step": step}
    return Contestant(SPARSELAB, SPARSE, runs[op], answer)


def sparseprop(scene: Scene, op: str) -> Contestant:
    """Return SparseProp's linear layer: forward through its module, gradients through autograd."""
    if importlib.util.find_spec("sparseprop") is None:
        raise NotSupported(f"{SPARSEPROP} is not installed; pip install sparseprop, which takes a C++ compiler")
    from sparseprop.modules import SparseLinear as Layer

    layer, x = Layer(scene.weight), scene.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.W_val), scene.dy)

    def answer(result: object) -> Answer:
        found = named(op, result)
        if "dvalues" in found:
            starts, cols = (numbers.long() for numbers in layer.W_idx)
            gradient = torch.zeros_like(scene.weight)
            gradient[torch.arange(len(gradient)).repeat_interleave(starts.diff()), cols] = found["dvalues"]
            found["dvalues"] = scene.blocks_of(gradient)
        return found

    runs: dict[str, Callable[[], object]] = {"fwd": torch.no_grad()(lambda: layer(x)), "step": step}
    return Contestant(SPARSEPROP, SPARSE, runs[op], answer)


def makers(case: Case) -> dict[str, Maker]:
    """Return who of these takes part in a case."""
    warnings.filterwarnings("ignore", message=".*Sparse (CSR|BSR) tensor support is in beta.*")
    made: dict[str, Callable[[Scene, str], Contestant]] = {
        "torch-csr": functools.partial(torch_compressed, False),
        "torch-bsr": functools.partial(torch_compressed, True),
    }
    if case.op == "fwd" and case.threads == 1:
        made |= {f"scipy-{form}": functools.partial(scipy, form) for form in ("csr", "bsr")}
    if case.op != "dvalues" and case.block == 1 and case.dtype == "fp32":
        made |= {SPARSELAB: sparselab, SPARSEPROP: sparseprop}
    return made
