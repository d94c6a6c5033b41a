"""The choice of backend."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import cpu, eager

import sparsekern as sk
from sparsekern.ops import backends


class Picky:
    """The eager kernels under another name, which refuse blocks of 8 and count their calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def why_not(self, op, device, dtype, block):
        return "it has no kernel for blocks of 8" if block == (8, 8) else None

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            return getattr(eager, name)(*args)

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
    assert picky.calls == ["fwd", "dx", "dvalues"]


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


def test_an_unknown_name():
    with pytest.raises(ValueError, match="backend is 'cuda'; it must be one of auto, gpu, cpu, eager"):
        sk.backend("cuda")
    assert sk.ops.requested_backend() == "auto"
