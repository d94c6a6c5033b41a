"""A probe changes nothing in the forward, and its gradient is what it asks of the gradient of the whole weight."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekern as sk
from sparsekern import ops
from sparsekern.ops import Probe
from sparsekern.topology import Grid, Topology, balanced, build_index, dense_block_norms, gather_blocks, generator_for

GRID = Grid(11, 9, (4, 2))  # 3 x 5 blocks, edges below and to the right
TOPOLOGY = balanced(GRID, 6, generator_for(0))
ROW = torch.tensor([0, 2, 1], dtype=torch.int32)
COL = torch.tensor([4, 0, 2], dtype=torch.int32)
U = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
V = torch.randn(3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def run(probe: Probe | None, seed: int = 0):
    """Return y and the dense gradient G of the whole weight, after a backward with random dy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 9, dtype=torch.float64, generator=generator)
    dy = torch.randn(5, 11, dtype=torch.float64, generator=generator)
    values = torch.ones(6, 4, 2, dtype=torch.float64)
    y = ops.linear(x, values, None, build_index(TOPOLOGY), GRID, probe)
    if probe is not None:
        y.backward(dy)
    return y.detach(), dy.T @ x


def sketched(g: torch.Tensor) -> torch.Tensor:
    """Block by block ``u' G v``, in the plainest way."""
    out = torch.zeros(3, 3, 5, dtype=torch.float64)
    for q in range(3):
        for o in range(11):
            for i in range(9):
                out[q, o // 4, i // 2] += U[q, o] * g[o, i] * V[q, i]
    return out


F64 = {"dtype": torch.float64}
PROBES = {
    "candidates": (
        lambda: Probe.candidates(GRID, ROW, COL, **F64),
        lambda g: gather_blocks(Topology(GRID, ROW, COL), g),
    ),
    "norms": (
        lambda: Probe.norms(GRID, ROW, COL, **F64),
        lambda g: dense_block_norms(GRID, g)[ROW.long(), COL.long()],
    ),
    "all_norms": (lambda: Probe.all_norms(GRID, **F64), lambda g: dense_block_norms(GRID, g)),
    "sketch": (lambda: Probe.sketch(GRID, U, V), sketched),
}
MARGINALS = {
    "magnitudes": lambda: Probe.magnitudes(GRID, **F64),
    "signed_sums": lambda: Probe.signed_sums(GRID, torch.tensor(7), **F64),
}


@pytest.mark.parametrize("kind", MARGINALS)
def test_marginals_add_up_over_micro_batches(kind):
    together, apart = MARGINALS[kind](), [MARGINALS[kind]() for _ in range(3)]
    for seed, probe in enumerate(apart):
        run(together, seed)
        y, _ = run(probe, seed)
        assert torch.equal(y, run(None, seed)[0])
    assert together.tensor.grad.any()
    torch.testing.assert_close(together.tensor.grad, sum(probe.tensor.grad for probe in apart))


@pytest.mark.parametrize("kind", PROBES)
def test_the_gradient_is_the_answer(kind):
    make, oracle = PROBES[kind]
    probe = make()
    y, g = run(probe)
    assert torch.equal(y, run(None)[0])
    torch.testing.assert_close(probe.tensor.grad, oracle(g))


@pytest.mark.parametrize("kind", ["candidates", "sketch"])
def test_linear_answers_add_up_over_micro_batches(kind):
    make, oracle = PROBES[kind]
    probe = make()
    total = sum(run(probe, seed)[1] for seed in (0, 1, 2))
    torch.testing.assert_close(probe.tensor.grad, oracle(total))


def test_norms_do_not_add_up():
    """Why RigL over micro-batches needs another way: the sum of norms is not the norm of the sum."""
    probe = PROBES["norms"][0]()
    total = sum(run(probe, seed)[1] for seed in (0, 1, 2))
    assert (probe.tensor.grad > PROBES["norms"][1](total) + 1e-3).all()


@pytest.mark.parametrize("make", [Probe.candidates, Probe.norms])
def test_no_places_and_free_places(make):
    probe = make(GRID, ROW[:0], COL[:0], **F64)
    run(probe)
    assert probe.tensor.grad.shape[0] == 0
    free = torch.full((1,), -1, dtype=torch.int32)
    if make == Probe.norms:
        with pytest.raises(ValueError, match=r"asks for norms of blocks \(-1, -1\)"):
            make(GRID, free, free)
        return
    padded = make(GRID, torch.cat([ROW[:1], free, ROW[1:]]), torch.cat([COL[:1], free, COL[1:]]), **F64)
    run(padded)
    plain = make(GRID, ROW, COL, **F64)
    run(plain)
    assert torch.equal(padded.tensor.grad[[0, 2, 3]], plain.tensor.grad) and not padded.tensor.grad[1].any()


def test_a_probe_takes_no_memory():
    probe = Probe.candidates(GRID, ROW, COL)
    assert probe.tensor.shape == (3, 4, 2) and probe.tensor.untyped_storage().nbytes() == 4


@pytest.mark.parametrize(("tokens", "taken"), [(0, range(7)), (7, range(7)), (9, range(7)), (3, (0, 2, 4)), (1, (0,))])
@pytest.mark.parametrize("kind", PROBES)
def test_a_probe_of_some_tokens_takes_them_evenly_spread(kind, tokens, taken):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(7, n, dtype=torch.float64, generator=generator) for n in (9, 11))
    make, oracle = PROBES[kind]
    probe = make().of_tokens(tokens)
    values = torch.ones(6, 4, 2, dtype=torch.float64, requires_grad=True)
    ops.linear(x, values, None, build_index(TOPOLOGY), GRID, probe).backward(dy)
    taken = list(taken)
    torch.testing.assert_close(probe.tensor.grad, oracle(dy[taken].T @ x[taken]))
    torch.testing.assert_close(values.grad, gather_blocks(TOPOLOGY, dy.T @ x), msg="the weight hears all tokens")


def test_a_layer_under_compile_has_two_graphs_armed_and_not():
    layer = sk.SparseLinear(9, 11, block_size=(4, 2), sparsity=0.5, dtype=torch.float64, seed=0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(5, 9, dtype=torch.float64)
    for armed in (False, True, False, True, True):
        layer.probe = Probe.all_norms(layer.grid, **F64) if armed else None
        compiled(x).sum().backward()
        if armed:
            g = torch.ones(5, 11, dtype=torch.float64).T @ x
            torch.testing.assert_close(layer.probe.tensor.grad, dense_block_norms(layer.grid, g))
    assert counter.frame_count == 2


@pytest.mark.parametrize("make", [Probe.candidates, Probe.norms])
def test_places_are_checked(make):
    """Out of range a place would wrap to another block."""
    with pytest.raises(ValueError, match=r"slot 0 is at block \(0, 5\); the grid has 3 x 5 blocks"):
        make(GRID, ROW[:1], COL[:1] + 1)
    with pytest.raises(ValueError, match="slots 0 and 1 are both at block"):
        make(GRID, ROW[[0, 0]], COL[[0, 0]])
    with pytest.raises(ValueError, match="row is torch.int64"):
        make(GRID, ROW.long(), COL)
