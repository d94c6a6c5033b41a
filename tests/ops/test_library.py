"""What every registered op must do, of both geometries: opcheck, autocast, no recompilation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sparsekern.ops import Probe
from sparsekern.ops.library import _cast, pack, wants_grad
from tests.ops.cases import F64, leaves, make
from tests.oracle import check_y

NAMES = ("", "_dx", "_dvalues", "_backward", "_block_norms", "_all_block_norms", "_sketch")
LAYERS = {"linear": "edges", "conv2d": "stride"}
OPS = [op + name for op in LAYERS for name in NAMES]


def arguments(op: str, dtype: torch.dtype = F64, **size: int):
    geometry = op.partition("_")[0]
    case = make(LAYERS[geometry], dtype=dtype, **size)
    x, values, bias = leaves(case)
    index, sizes, dy = list(case.index), pack(case.geometry), case.dy.clone().requires_grad_()
    u, v = (torch.ones(3, features, dtype=dtype) for features in (case.grid.out_features, case.grid.in_features))
    row, col, block = case.row.clamp(min=0), case.col.clamp(min=0), case.grid.block
    return {
        "": (x, values, bias, index, sizes, "auto"),
        "_dx": (dy, values, index, sizes, list(case.size), "auto"),
        "_dvalues": (dy, x, index, *block, sizes, dtype, "auto"),
        "_backward": (dy, x, values, index, sizes, "auto"),
        "_block_norms": (dy.detach(), x.detach(), row, col, *block, sizes, "auto"),
        "_all_block_norms": (dy.detach(), x.detach(), *block, sizes, "auto"),
        "_sketch": (dy.detach(), x.detach(), u, v, *block, sizes, "auto"),
    }[op.removeprefix(geometry)]


def op_of(name: str):
    return getattr(torch.ops.sparsekern, name).default


def same(found, expected) -> bool:
    """Whether an op gave the same bits, one tensor or two."""
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("name", "dtype"), [(name, (F64, torch.float32)[n % 2]) for n, name in enumerate(OPS)])
def test_opcheck(name, dtype):
    """One dtype of a geometry, the other one of the other: both are one definition."""
    assert set(opcheck(op_of(name), arguments(name, dtype)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["candidates", "norms", "all_norms", "sketch"])
def test_opcheck_with_a_probe(kind):
    grid = make("edges").grid
    row, col = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    probe = {
        "candidates": partial(Probe.candidates, grid, row, col, dtype=F64),
        "norms": partial(Probe.norms, grid, row, col, dtype=F64),
        "all_norms": partial(Probe.all_norms, grid, dtype=F64),
        "sketch": partial(Probe.sketch, grid, torch.ones(3, 11, dtype=F64), torch.ones(3, 9, dtype=F64)),
    }[kind]()
    for name in ("linear", "linear_dx"):
        args = (*arguments(name), probe.tensor, probe.kind, list(probe.args))
        assert set(opcheck(op_of(name), args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", OPS)
def test_an_op_takes_any_strides(name):
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments(name)]
    for change in (torch.Tensor.contiguous, lambda a: a.transpose(0, -1).contiguous().transpose(0, -1)):
        other = [change(a) if isinstance(a, torch.Tensor) else a for a in args]
        torch.testing.assert_close(op_of(name)(*args), op_of(name)(*other))


SIZES = {
    "linear": ([{"tokens": tokens} for tokens in (5, 3, 8, 13)], 2),
    "conv2d": ([{"images": n, "height": h} for n, h in ((2, 4), (3, 6), (5, 8), (8, 12))], 3),
}


# The forward ops are tested so through the modules, with their backwards: tests/nn/test_layers.py.
@pytest.mark.parametrize("name", [name for name in OPS if name not in LAYERS])
def test_one_graph_for_many_batch_and_image_sizes(name):
    """Sizes are SymInt: after a static and a dynamic graph no batch size compiles anew."""
    op, (sizes, graphs) = op_of(name), SIZES[name.partition("_")[0]]
    torch._dynamo.reset()  # the limit of recompilations counts those of all tests of this line
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op(*args), backend=counter, fullgraph=True)
    with torch.no_grad():
        for size in sizes:
            args = arguments(name, **size)
            assert same(compiled(*args), op(*args))
    assert counter.frame_count <= graphs


@pytest.mark.parametrize("layer", ["edges", "3x3", "pointwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_of_the_region(dtype, layer):
    case = make(layer, dtype=torch.float32)
    x, values, bias = leaves(case)
    with torch.autocast("cpu", dtype=dtype):
        y = case.op(x, values, bias)
        y.sum().backward()  # inside the region: kernels made of ATen ops must not be cast again
    assert y.dtype == dtype
    assert values.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    check_y(replace(case, x=case.x.to(dtype)), y.detach())
    if layer == "edges":
        low = x.detach().to(dtype).requires_grad_()
        expected = op_of("linear")(low, values, bias, list(case.index), pack(case.geometry), "auto")
        assert torch.equal(y, expected)
        assert torch.equal(values.grad, torch.autograd.grad(expected.sum(), values)[0])


def test_autocast_leaves_float64_and_integers():
    assert _cast(torch.ones(1, dtype=torch.float64), torch.bfloat16).dtype == torch.float64
    assert _cast(torch.ones(1, dtype=torch.int32), torch.bfloat16).dtype == torch.int32


def test_wants_grad():
    leaf = torch.ones(1, requires_grad=True)
    assert wants_grad(None, leaf)
    assert not wants_grad(None, leaf.detach())
    with torch.no_grad():
        assert not wants_grad(leaf)


@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_raises_instead_of_losing_the_tangent(trained):
    x, values, bias, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments("linear"))
    values.requires_grad_(trained)
    op = op_of("linear")
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: op(x, values, bias, *rest), (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: op(x, v, bias, *rest), (values.detach(),), (values.detach(),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        op(torch.autograd.forward_ad.make_dual(x, x), values, bias, *rest)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(op(x, values, bias, *rest), torch.func.vmap(lambda b: b + 0)(op(x, values, bias, *rest)))


def test_vmap_raises():
    x, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments("linear"))
    with pytest.raises(RuntimeError, match="sparsekern::linear"):
        torch.func.vmap(lambda x: op_of("linear")(x, *rest))(x[None])
