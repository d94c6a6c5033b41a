"""The choice of backend."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu, eager, gpu

import sparsekern as sk
from sparsekern.ops import backends
from tests.device import DEVICE, INTERPRETED
from tests.gpu_checks import corners
from tests.oracle import check_op


class Picky:
    """The eager kernels under another name, which refuse blocks of 8 and count their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def why_not(self, op, device, dtype, block):
        return "it has no kernel for blocks of 8" if block == (8, 8) else None

    def kernels(self, geometry):
        return self

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            return getattr(eager.linear, name)(*args)

        return call


@pytest.fixture
def picky(monkeypatch):
    new = Picky()
    monkeypatch.setattr(backends, "BACKENDS", {"picky": new, **backends.BACKENDS})
    return new


def test_auto_takes_the_first_that_can(picky):
    sk.SparseLinear(16, 16, block_size=4, sparsity=0)(torch.ones(1, 16))
    assert picky.calls == ["fwd"]
    sk.SparseLinear(16, 16, block_size=8, sparsity=0)(torch.ones(1, 16))
    assert picky.calls == ["fwd"]


@pytest.fixture
def said(monkeypatch, caplog):
    """What the log was told, as a list that goes on; nothing was said before."""
    backends._say_once.cache_clear()
    monkeypatch.setattr(cpu, "load", lambda: (None, "the native library was not built"))
    yield lambda: [record.getMessage() for record in caplog.records if record.name == "sparsekern"]
    backends._say_once.cache_clear()


def test_why_it_is_slower_is_said_once(said):
    for _ in range(2):
        sk.SparseLinear(64, 64, block_size=32, sparsity=0)(torch.ones(1, 64))
    assert said() == ["the slower backend runs linear, because 'cpu' cannot: the native library was not built"]


def test_nothing_is_said_of_what_no_library_would_make_faster(said):
    sk.SparseLinear(64, 64, block_size=32, sparsity=0).double()(torch.ones(1, 64).double())
    sk.SparseLinear(64, 64, block_size=8, sparsity=0)(torch.ones(1, 64))
    with sk.backend("eager"):
        sk.SparseLinear(64, 64, block_size=32, sparsity=0)(torch.ones(1, 64))
    assert said() == []


def test_the_native_kernels_are_not_asked_about_tensors_elsewhere(said):
    assert backends.resolve("auto", "linear", torch.ones(1, 64, device="meta"), (32, 32)) == "eager"
    assert said() == []


def test_auto_takes_the_native_kernels_on_a_cpu():
    x = torch.ones(1, 64)
    if (reason := cpu.why_not("linear", x.device, x.dtype, (32, 32))) is not None:
        pytest.skip(reason)
    assert backends.resolve("auto", "linear", x, (32, 32)) == "cpu"
    assert backends.resolve("auto", "linear", x, (8, 8)) == "eager"
    with pytest.raises(NotImplementedError, match="'cpu' cannot run linear: blocks are 8x8"):
        backends.resolve("cpu", "linear", x, (8, 8))


def test_supports(picky):
    cpu = torch.device("cpu")
    assert backends.supports("picky", "linear", cpu, torch.float32, (4, 4))
    assert not backends.supports("picky", "linear", cpu, torch.float32, (8, 8))


def test_an_explicit_request_never_falls_back(picky):
    layer = sk.SparseLinear(16, 16, block_size=8, sparsity=0)
    with sk.backend("picky"), pytest.raises(NotImplementedError, match="'picky' cannot run linear: it has no kernel"):
        layer(torch.ones(1, 16))
    with torch.inference_mode(), sk.backend("picky"), pytest.raises(NotImplementedError, match="blocks of 8"):
        layer(torch.ones(1, 16))


def test_the_backward_keeps_the_backend_of_its_forward(picky):
    layer = sk.SparseLinear(16, 16, block_size=4, sparsity=0)
    with sk.backend("eager"):
        y = layer(torch.ones(1, 16, requires_grad=True))
    y.sum().backward()
    assert picky.calls == []
    with sk.backend("picky"):
        y = layer(torch.ones(1, 16, requires_grad=True))
    with sk.backend("eager"):
        y.sum().backward()
    assert picky.calls == ["fwd", "backward"]


def test_a_compiled_layer_notices_the_request(picky):
    layer = sk.SparseLinear(16, 16, block_size=4, sparsity=0)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 16)
    with sk.backend("eager"):
        compiled(x)
    assert picky.calls == []
    with sk.backend("picky"):
        compiled(x)
    assert picky.calls == ["fwd"]


def test_as_a_statement_and_nested():
    before = sk.ops.requested_backend()
    try:
        sk.backend("eager")
        assert sk.ops.requested_backend() == "eager"
        with sk.backend("auto"):
            assert sk.ops.requested_backend() == "auto"
            with pytest.raises(KeyError), sk.backend("eager"):
                raise KeyError
            assert sk.ops.requested_backend() == "auto"
        assert sk.ops.requested_backend() == "eager"
    finally:
        sk.backend(before)


def test_blocks_that_overlap_end_each_with_its_own():
    before = sk.ops.requested_backend()
    first = sk.backend("eager").__enter__()
    second = sk.backend("cpu").__enter__()
    first.__exit__(None, None, None)
    assert sk.ops.requested_backend() == "cpu"
    second.__exit__(None, None, None)
    assert sk.ops.requested_backend() == before


# The gpu backend, asked for by name.


@pytest.mark.usefixtures("guarded_memory", "no_tables")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tokens", [0, 5, 37])
def test_gpu_by_name_runs_the_op_and_its_backward(tokens, dtype):
    with sk.backend("gpu"):
        check_op(corners((16, 32), tokens=tokens, dtype=dtype, dy_layout="one row expanded"), DEVICE)


@pytest.mark.usefixtures("guarded_memory", "no_tables")
def test_a_training_step_on_gpu_is_that_on_eager(generator):
    """The same to the tolerance of float32, in weight, bias and output."""
    x = torch.randn(3, 20, 40, generator=generator).to(DEVICE)
    seen = []
    for name in ("gpu", "eager"):
        torch.manual_seed(0)
        layer = sk.SparseLinear(40, 50, block_size=16, sparsity=0.5).to(DEVICE)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        with sk.backend(name):
            layer(x).square().mean().backward()
            optimizer.step()
            seen.append([layer(x).detach(), *(p.detach().clone() for p in layer.parameters())])
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU, auto takes it")
def test_auto_never_takes_the_interpreter(monkeypatch):
    def fail(*args):
        raise AssertionError("the gpu backend was called")

    monkeypatch.setattr(gpu, "kernels", fail)
    x = torch.ones(2, 16)

    assert backends.supports("gpu", "linear", x.device, x.dtype, (16, 16))
    assert backends.resolve("auto", "linear", x, (16, 16)) != "gpu"
    sk.SparseLinear(16, 16, block_size=16, sparsity=0)(x)


@pytest.mark.parametrize(
    ("block", "dtype", "reason"),
    [(16, torch.float64, "the dtype is torch.float64"), (1, torch.float32, "blocks are 1x1")],
)
def test_gpu_by_name_says_why_it_cannot(block, dtype, reason):
    layer = sk.SparseLinear(16, 16, block_size=block, sparsity=0).to(DEVICE, dtype)

    with sk.backend("gpu"), pytest.raises(NotImplementedError, match=f"backend 'gpu' cannot run linear: {reason}"):
        layer(torch.ones(2, 16, device=DEVICE, dtype=dtype))


def test_a_slower_backend_is_told_of_once(monkeypatch, caplog):
    """On a GPU, for each reason. Blocks of 24 are asked for three times, of 1 once."""
    backends._say_once.cache_clear()
    monkeypatch.setattr(gpu, "_why_not_here", lambda device: None)
    cuda = torch.device("cuda", 0)

    for block in ((24, 24), (24, 24), (1, 1), (24, 24)):
        assert backends._fastest("linear", cuda, torch.float16, block) == "eager"
    assert backends._fastest("linear", cuda, torch.float16, (16, 16)) == "gpu"

    assert [r.levelname for r in caplog.records] == ["WARNING", "WARNING"]
    assert caplog.messages[0] == (
        "the slower backend runs linear, because 'gpu' cannot: blocks are 24x24; it has sides 16, 32, 64, 128"
    )
    backends._say_once.cache_clear()
