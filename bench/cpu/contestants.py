"""The package and the dense layers, on one case. Other sparse libraries are in :mod:`bench.cpu.peers`.

sparsekern       the kernels alone
SparseLinear     the same through autograd
sparsekern-avx2  the kernels alone, on the path of a processor without AVX-512
F.linear         PyTorch's dense products: MKL in float32, oneDNN in bfloat16
oneDNN           PyTorch's other way to the same products; the backward has a transposed weight made in advance
nn.Linear        F.linear through autograd
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import torch
from sparsekern.kernels import cpu
from sparsekern.kernels.contract import LinearShape
from sparsekern.kernels.cpu.library import load
from torch import Tensor
from torch.nn.functional import linear

from bench.cpu.cases import LARGE, WIDE, Case
from bench.cpu.scene import Scene
from bench.gpu.contestants import DENSE, OURS, Contestant, cublas, joined, named
from bench.gpu.peers import NotSupported
from bench.gpu.scene import Answer

Maker = Callable[[Scene, str], Contestant]


def sparsekern(scene: Scene, op: str) -> Contestant:
    """Return the native kernels."""
    x, dy, values, index, grid = scene.x, scene.dy, scene.values, scene.index, scene.grid
    sizes = LinearShape(grid.in_features, grid.out_features)
    if (reason := cpu.why_not("linear", x.device, x.dtype, grid.block)) is not None:
        raise NotSupported(reason)
    return joined(
        "sparsekern",
        OURS,
        scene,
        op,
        fwd=lambda: cpu.products.fwd(x, values, None, index, sizes),
        dx=lambda: cpu.products.dx(dy, values, index, sizes),
        dvalues=lambda: cpu.products.dvalues(dy, x, index, grid.block, sizes, x.dtype),
        backward=lambda: cpu.products.backward(dy, x, values, index, sizes),
    )


def sparsekern_avx2(scene: Scene, op: str) -> Contestant:
    """Return the native kernels on the AVX2 path; the path that was live is live again after each call."""
    library, path = load()
    if library is None or path == "avx2":
        raise NotSupported(f"the path is {path}" if library is not None else path)
    if not library.sk_use(b"avx2"):
        raise NotSupported("this processor has no AVX2")
    asked = os.environ.get("SPARSEKERN_CPU", "").encode()
    library.sk_use(asked)
    contestant = sparsekern(scene, op)

    def run() -> object:
        library.sk_use(b"avx2")
        try:
            return contestant.run()
        finally:
            library.sk_use(asked)

    return dataclasses.replace(contestant, name="sparsekern-avx2", run=run)


def sparse_linear(scene: Scene, op: str) -> Contestant:
    """Return the layer: forward through its module, gradients through autograd."""
    layer, x = scene.layer, scene.x.detach().requires_grad_()

    def step() -> tuple[Tensor, ...]:
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.values), scene.dy)

    runs: dict[str, Callable[[], object]] = {"fwd": torch.no_grad()(lambda: layer(x)), "step": step}
    if op not in runs:
        raise NotSupported("autograd gives gradients after a forward only")
    return Contestant("SparseLinear", OURS, runs[op], lambda result: named(op, result))


def f_linear(scene: Scene, op: str) -> Contestant:
    """Return the dense products that ``F.linear`` and its backward are made of."""
    x, dy, weight = scene.x, scene.dy, scene.weight
    return _dense(
        joined(
            "F.linear",
            DENSE,
            scene,
            op,
            fwd=lambda: linear(x, weight),
            dx=lambda: dy @ weight,
            dvalues=lambda: dy.T @ x,
        ),
        scene,
    )


def onednn(scene: Scene, op: str) -> Contestant:
    """Return oneDNN's dense products. No module of PyTorch trains by them: a bound of what a dense layer can do."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        raise NotSupported("this PyTorch was built without oneDNN")
    turned = scene.weight.T.contiguous()

    def product(a: Tensor, b: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")  # type: ignore[no-any-return]

    return _dense(
        joined(
            "oneDNN",
            DENSE,
            scene,
            op,
            fwd=lambda: product(scene.x, scene.weight),
            dx=lambda: product(scene.dy, turned),
            dvalues=lambda: product(scene.dy.T, scene.x.T),
        ),
        scene,
    )


def nn_linear(scene: Scene, op: str) -> Contestant:
    """Return the dense layer through autograd."""
    if op != "step":
        raise NotSupported("autograd gives gradients after a forward only")
    return dataclasses.replace(cublas(scene, op), name="nn.Linear")


def _dense(contestant: Contestant, scene: Scene) -> Contestant:
    """Return the contestant with the stored blocks cut out of its dense gradient, which is not timed."""

    def answer(result: object) -> Answer:
        found = contestant.answer(result)
        return {name: scene.blocks_of(t) if name == "dvalues" else t for name, t in found.items()}

    return dataclasses.replace(contestant, answer=answer)


def makers(case: Case) -> dict[str, Maker]:
    """Return who of these takes part in a case."""
    found: dict[str, Maker] = {"sparsekern": sparsekern, "F.linear": f_linear, "oneDNN": onednn}
    if case.op != "dvalues":
        found["SparseLinear"] = sparse_linear
    if case.op == "step" and case.shape != LARGE:  # there it is F.linear and nothing else, at half a second a call
        found["nn.Linear"] = nn_linear
    if case.op == "step" and case.shape == WIDE and case.dtype == "fp32" and case.threads == 1:
        found["sparsekern-avx2"] = sparsekern_avx2
    return found
