"""The ops of both geometries through autograd: derivatives of any order, and no more of them than asked for."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape
from torch.nn import functional as F

import sparsekern as sk
from sparsekern import ops
from sparsekern.ops import Probe
from sparsekern.ops.library import channels_last, pack, unpack
from sparsekern.topology import Topology, conv_grid, rebuild_
from tests.kernels.calls import is_real
from tests.ops.cases import ALL, F64, leaves, make
from tests.oracle import check_op
from tests.oracle_conv2d import conv_case, conv_weight, dense_conv2d, dense_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")
both = pytest.mark.parametrize("name", ["edges", "3x3"])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("error")
def test_gradcheck_and_gradgradcheck(name):
    case = make(name)
    real = is_real(case)

    def f(x, values, bias):
        # phantom elements are no parameters: a finite difference in one must not count
        return case.op(x, values * real, bias)

    assert torch.autograd.gradcheck(f, leaves(case))
    assert torch.autograd.gradgradcheck(f, leaves(case))


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_random_convolutions(start):
    for seed in range(start, start + 10):
        check_op(conv_case(seed))


@both
@pytest.mark.parametrize("wanted", ["x", "values", "bias", "probe", "x values", "values bias", ""])
def test_only_the_gradients_asked_for_are_computed(wanted, name, monkeypatch):
    case = make(name)
    x, values, bias = leaves(case)
    calls, module = [], eager.kernels(case.geometry)
    for kernel in ("dx", "dvalues", "backward", "all_block_norms"):
        real = getattr(module, kernel)
        monkeypatch.setattr(module, kernel, lambda *a, kernel=kernel, real=real: (calls.append(kernel), real(*a))[1])
    probe = Probe.all_norms(case.grid)
    named = {"x": x, "values": values, "bias": bias, "probe": probe.tensor}
    for argument, tensor in named.items():
        tensor.requires_grad_(argument in wanted.split())
    y = case.op(x, values, bias, probe)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    kernels = {"x": "dx", "values": "dvalues", "probe": "all_block_norms"}
    expected = [kernels[argument] for argument in wanted.split() if argument in kernels]
    assert calls == ["backward"] * (wanted == "x values") + expected  # which makes two calls of it
    assert all((tensor.grad is not None) == (argument in wanted.split()) for argument, tensor in named.items())


@both
def test_a_backward_computes_both_gradients_at_once_unless_it_is_differentiated_itself(name, monkeypatch):
    case = make(name)
    x, values, _ = leaves(case)
    calls, module = [], eager.kernels(case.geometry)
    monkeypatch.setattr(module, "backward", lambda *a, real=module.backward: (calls.append(a), real(*a))[1])

    def gradients(**how):
        return torch.autograd.grad(case.op(x, values, None).sum(), (x, values), **how)

    at_once = gradients()
    assert len(calls) == 1
    one_by_one = gradients(create_graph=True)
    assert len(calls) == 1
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))
    assert all(grad.requires_grad for grad in one_by_one)


@both
def test_an_update_between_forward_and_backward_is_noticed(name):
    case = make(name)
    x, values, bias = leaves(case)
    index, shape = case.index, (case.geometry,) if name == "3x3" else ()
    y = getattr(ops, case.geometry.op)(x, values, bias, index, case.grid, *shape)
    rebuild_(index, Topology(case.grid, case.row, case.col))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Strides and leading dimensions.


@pytest.mark.parametrize("shape", [(9,), (0, 9), (2, 3, 9), (2, 0, 9)], ids=str)
def test_leading_dimensions(shape):
    case = make("edges")
    _, values, bias = leaves(case)
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    y = case.op(x, values, bias)
    expected = F.linear(x, case.weight, bias)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_gradients_arrive_expanded_and_transposed():
    case = make("edges")
    x, values, bias = leaves(case)
    for dy in (torch.ones((), dtype=F64).expand(5, 11), torch.randn(11, 5, dtype=F64).T, torch.randn(5, 22)[:, ::2]):
        dx, dbias = torch.autograd.grad(case.op(x, values, bias), (x, bias), dy.to(F64))
        torch.testing.assert_close(dx, dy.to(F64) @ case.weight)
        torch.testing.assert_close(dbias, dy.to(F64).sum(0))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "expanded", "a part", "unbatched"])
@pytest.mark.parametrize("name", ["3x3", "pointwise"])
def test_images_and_their_gradients_of_any_strides(name, layout):
    case = make(name)
    x, values, bias = leaves(case)
    dy = case.dy
    if layout == "contiguous":
        x, dy = x.detach().contiguous(), dy.contiguous()
    elif layout == "expanded":
        x, dy = x.detach()[:, :, :1].expand(-1, -1, 3, -1), torch.ones((), dtype=F64).expand(dy.shape)
    elif layout == "a part":
        x, dy = torch.randn(2, 4, 3, 10, dtype=F64)[..., ::2], torch.randn(5, *dy.shape[1:], dtype=F64)[1:3]
    elif layout == "unbatched":
        x, dy = x.detach()[0], dy[0]
    x = x.detach().requires_grad_()
    weight = conv_weight(values.detach(), case.row, case.col, case.shape)

    y = case.op(x, values, bias)
    y.backward(dy)

    batched, dy = (x, dy) if x.dim() == 4 else (x[None], dy[None])
    dx, _ = dense_gradients(dy, batched.detach(), weight, case.shape)
    expected = dense_conv2d(batched, weight, bias, case.shape)
    torch.testing.assert_close(y, expected if x.dim() == 4 else expected[0])
    torch.testing.assert_close(x.grad, dx if x.dim() == 4 else dx[0])
    torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)))
    assert (y if y.dim() == 4 else y[None]).permute(0, 2, 3, 1).is_contiguous()


def test_what_is_channels_last_reaches_the_kernel_without_a_copy(monkeypatch):
    case = make("3x3")
    seen = []
    fwd = eager.conv2d.fwd
    monkeypatch.setattr(eager.conv2d, "fwd", lambda x, *a: (seen.append(x.data_ptr()), fwd(x, *a))[1])
    case.op(case.x, case.values, case.bias)
    assert seen == [case.x.data_ptr()]


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 1, 4, 1)])
def test_channels_last_is_what_kernels_may_assume(size):
    native = torch.randn(size).contiguous(memory_format=torch.channels_last)
    for x in (torch.randn(size), native, torch.randn(()).expand(size), torch.randn(*size, 2)[..., 0]):
        assert channels_last(x).permute(0, 2, 3, 1).is_contiguous()
        assert torch.equal(channels_last(x), x)
    x = torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert channels_last(x) is x


def test_the_low_precision_bias_gradient_is_summed_as_torch_does():
    case = make("edges", dtype=torch.bfloat16, tokens=300)
    x, values, bias = leaves(case)
    dy = torch.randn(300, 11).bfloat16()
    (dbias,) = torch.autograd.grad(case.op(x, values, bias), bias, dy)
    assert dbias.dtype == torch.bfloat16
    assert torch.equal(dbias, dy.sum(0))


# Which op, which backend, which geometry.


def test_a_pointwise_convolution_is_the_linear_op_on_a_view(monkeypatch):
    """So that every backend that has a linear kernel has this one."""
    case = make("pointwise", block=(16, 16), dtype=torch.float32, blocks=1)
    calls = []
    fwd = eager.linear.fwd
    monkeypatch.setattr(eager.linear, "fwd", lambda x, *a: (calls.append((x.shape, x.data_ptr())), fwd(x, *a))[1])
    with sk.backend("eager"):
        case.op(case.x, case.values, case.bias)
    assert calls == [((2 * 3 * 5, 4), case.x.data_ptr())]


def test_an_explicit_backend_that_has_no_convolution_raises():
    case = make("3x3", dtype=torch.float32)
    with sk.backend("cpu"), pytest.raises(NotImplementedError, match="'cpu' cannot run conv2d"):
        case.op(case.x, case.values, case.bias)  # blocks of 2 x 3


def test_meta_tensors_give_the_shape():
    shape, grid = ConvShape(4, 6, (3, 3), (2, 2), (1, 1, 1, 1)), conv_grid(4, 6, (3, 3), (2, 2))
    case = conv_case(0, block=(2, 2), kernel=(3, 3), groups=1, group_out=6, group_in=4, free=0, blocks=5)
    index = type(case.index)(*(t.to("meta") for t in case.index))
    y = ops.conv2d(torch.ones(3, 4, 8, 9, device="meta"), torch.ones(5, 2, 2, device="meta"), None, index, grid, shape)
    assert y.shape == (3, 6, 4, 5)
    assert y.permute(0, 2, 3, 1).is_contiguous()


def test_a_geometry_comes_back():
    shape = ConvShape(6, 10, (3, 5), (2, 1), (1, 2, 3, 4), (7, 8), 2)
    assert pack(shape) == [6, 10, 3, 5, 2, 1, 1, 2, 3, 4, 7, 8, 2]
    assert unpack(pack(shape)) == shape
