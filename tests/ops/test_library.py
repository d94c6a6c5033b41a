"""What every registered op must do: opcheck, autocast, no recompilation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from sparsekern.ops.library import _cast, wants_grad
from sparsekern.topology import Grid, balanced, build_index, generator_for, with_capacity

GRID = Grid(11, 9, (4, 2))


def arguments(dtype: torch.dtype = torch.float64):
    topology = with_capacity(balanced(GRID, 7, generator_for(1)), 9)
    make = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=make).requires_grad_()

    x, dy, values, bias = draw(5, 9), draw(5, 11), draw(9, 4, 2), draw(11)
    index = list(build_index(topology))
    u, v = draw(3, 11).detach(), draw(3, 9).detach()
    row, col = topology.row[:7], topology.col[:7]
    return {
        "linear": (x, values, bias, index, [9, 11], "auto"),
        "linear_dx": (dy, values, index, [9, 11], [], "auto"),
        "linear_dvalues": (dy, x, index, 4, 2, [9, 11], dtype, "auto"),
        "linear_backward": (dy, x, values, index, [9, 11], "auto"),
        "linear_block_norms": (dy.detach(), x.detach(), row, col, 4, 2, [9, 11], "auto"),
        "linear_all_block_norms": (dy.detach(), x.detach(), 4, 2, [9, 11], "auto"),
        "linear_sketch": (dy.detach(), x.detach(), u, v, 4, 2, [9, 11], "auto"),
    }


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(name, dtype):
    results = opcheck(getattr(torch.ops.sparsekern, name).default, arguments(dtype)[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["candidates", "norms", "all_norms", "sketch"])
def test_opcheck_with_a_probe(kind):
    from sparsekern.ops import Probe

    row, col = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([1, 4], dtype=torch.int32)
    u, v = torch.ones(3, 11, dtype=torch.float64), torch.ones(3, 9, dtype=torch.float64)
    probe = {
        "candidates": lambda: Probe.candidates(GRID, row, col, dtype=torch.float64),
        "norms": lambda: Probe.norms(GRID, row, col, dtype=torch.float64),
        "all_norms": lambda: Probe.all_norms(GRID, dtype=torch.float64),
        "sketch": lambda: Probe.sketch(GRID, u, v),
    }[kind]()
    args = [*arguments()["linear"], probe.tensor, probe.kind, list(probe.args)]
    assert set(opcheck(torch.ops.sparsekern.linear.default, tuple(args)).values()) == {"SUCCESS"}
    through_dx = (*arguments()["linear_dx"], probe.tensor, probe.kind, list(probe.args))
    assert set(opcheck(torch.ops.sparsekern.linear_dx.default, through_dx).values()) == {"SUCCESS"}


# The forward op is tested so through the module, with its backward: tests/nn/test_linear.py.
@pytest.mark.parametrize("name", [name for name in arguments() if name != "linear"])
def test_one_graph_for_many_batch_sizes(name):
    """Sizes are SymInt: after a static and a dynamic graph no batch size compiles anew."""
    op = getattr(torch.ops.sparsekern, name).default
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op(*args), backend=counter, fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 3, 8, 13):
            args = list(arguments()[name])
            args[0] = args[0].detach()[:1].expand(tokens, -1).contiguous()
            if name != "linear_dx":
                args[1] = args[1].detach()[:1].expand(tokens, -1).contiguous()
            torch.testing.assert_close(compiled(*args), op(*args), rtol=0, atol=0)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_of_the_region(dtype):
    x, values, bias, *rest = arguments(torch.float32)["linear"]
    with torch.autocast("cpu", dtype=dtype):
        y = torch.ops.sparsekern.linear.default(x, values, bias, *rest)
        y.sum().backward()  # inside the region: kernels made of ATen ops must not be cast again
    assert y.dtype == dtype
    assert values.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    low = x.detach().to(dtype).requires_grad_()
    expected = torch.ops.sparsekern.linear.default(low, values, bias, *rest)
    assert torch.equal(y, expected)
    (dvalues,) = torch.autograd.grad(expected.sum(), values)
    assert torch.equal(values.grad, dvalues)


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
    x, values, bias, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments()["linear"])
    values.requires_grad_(trained)
    op = torch.ops.sparsekern.linear.default
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: op(x, values, bias, *rest), (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: op(x, v, bias, *rest), (values.detach(),), (values.detach(),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode"):
        op(torch.autograd.forward_ad.make_dual(x, x), values, bias, *rest)
    with torch.autograd.forward_ad.dual_level():
        assert torch.equal(op(x, values, bias, *rest), torch.func.vmap(lambda b: b + 0)(op(x, values, bias, *rest)))


def test_vmap_raises():
    x, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments()["linear"])
    with pytest.raises(RuntimeError, match="sparsekern::linear"):
        torch.func.vmap(lambda x: torch.ops.sparsekern.linear.default(x, *rest))(x[None])
