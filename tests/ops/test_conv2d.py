"""The convolution through autograd: derivatives of any order, any strides, one graph, probes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sparsekern.kernels import eager
from sparsekern.kernels.contract import ConvShape
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import sparsekern as sk
from sparsekern import ops
from sparsekern.ops import Probe
from sparsekern.ops.geometry import pack
from sparsekern.topology import Topology, conv_grid
from tests.oracle import check_op, check_y, gradient_blocks
from tests.oracle_conv2d import ConvCase, conv_case, conv_weight, dense_conv2d, dense_gradients

pytestmark = pytest.mark.usefixtures("poisoned_memory")

F64 = torch.float64
GIVEN = {
    "3x3": {"kernel": (3, 3), "padding": (1, 1, 1, 1)},
    "stride": {"kernel": (2, 3), "stride": (2, 1), "padding": (1, 0, 1, 2)},
    "groups": {"kernel": (1, 3), "groups": 2, "dilation": (1, 2)},
    "pointwise": {"kernel": (1, 1)},
}


def small_case(**given: object) -> ConvCase:
    settings = {"block": (2, 3), "stride": (1, 1), "padding": (0, 0, 0, 0), "groups": 1, "dilation": (1, 1)}
    settings |= {"group_out": 3, "group_in": 4, "height": 3, "width": 5, "images": 2, "blocks": 3, "free": 1}
    settings |= {"dtype": F64, "bias": True}
    return conv_case(0, **{**settings, **given})


def inputs(case: ConvCase) -> tuple[torch.Tensor, ...]:
    """Return x, values and bias as leaves; what is free or phantom is zero."""
    real = Topology(case.grid, case.row, case.col).real()
    values = case.values if real is None else case.values.masked_fill(~real, 0)
    assert case.bias is not None
    return tuple(t.detach().clone().requires_grad_() for t in (case.x, values, case.bias))


def run(case: ConvCase, x, values, bias, probe: Probe | None = None):
    return ops.conv2d(x, values, bias, case.index, case.grid, case.shape, probe)


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_gradcheck_and_gradgradcheck(given):
    case = small_case(**given)
    real = Topology(case.grid, case.row, case.col).real()

    def f(x, values, bias):
        # phantom elements are no parameters: a finite difference in one must not count
        return run(case, x, values if real is None else values * real, bias)

    assert torch.autograd.gradcheck(f, inputs(case))
    assert torch.autograd.gradgradcheck(f, inputs(case))


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_random_configurations(start):
    for seed in range(start, start + 10):
        check_op(conv_case(seed))


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "expanded", "a part", "unbatched"])
@pytest.mark.parametrize("given", [GIVEN["3x3"], GIVEN["pointwise"]], ids=["3x3", "pointwise"])
def test_inputs_and_gradients_of_any_strides(given, layout):
    case = small_case(**given)
    x, values, bias = inputs(case)
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

    y = run(case, x, values, bias)
    y.backward(dy)

    batched, dy = (x, dy) if x.dim() == 4 else (x[None], dy[None])
    dx, _ = dense_gradients(dy, batched.detach(), weight, case.shape)
    expected = dense_conv2d(batched, weight, bias, case.shape)
    torch.testing.assert_close(y, expected if x.dim() == 4 else expected[0])
    torch.testing.assert_close(x.grad, dx if x.dim() == 4 else dx[0])
    torch.testing.assert_close(bias.grad, dy.sum((0, 2, 3)))
    assert (y if y.dim() == 4 else y[None]).permute(0, 2, 3, 1).is_contiguous()


def test_what_is_channels_last_reaches_the_kernel_without_a_copy(monkeypatch):
    case = small_case(**GIVEN["3x3"])
    seen = []
    fwd = eager.conv2d.fwd
    monkeypatch.setattr(eager.conv2d, "fwd", lambda x, *a: (seen.append(x.data_ptr()), fwd(x, *a))[1])
    run(case, case.x, case.values, case.bias)
    assert seen == [case.x.data_ptr()]


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "probe", "x values", ""])
def test_only_the_gradients_asked_for_are_computed(wanted, monkeypatch):
    case = small_case(**GIVEN["3x3"])
    x, values, bias = inputs(case)
    calls = []
    for name in ("dx", "dvalues", "backward", "all_block_norms"):
        real = getattr(eager.conv2d, name)
        monkeypatch.setattr(eager.conv2d, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    probe = Probe.all_norms(case.grid)
    named = {"x": x, "values": values, "bias": bias, "probe": probe.tensor}
    for name, tensor in named.items():
        tensor.requires_grad_(name in wanted.split())
    y = run(case, x, values, bias, probe)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    kernels = {"x": "dx", "values": "dvalues", "probe": "all_block_norms"}
    expected = [kernels[name] for name in wanted.split() if name in kernels]
    assert calls == ["backward"] * (wanted == "x values") + expected  # which makes two calls of it
    assert all((tensor.grad is not None) == (name in wanted.split()) for name, tensor in named.items())


def test_a_pointwise_convolution_is_the_linear_op_on_a_view(monkeypatch):
    """So that every backend that has a linear kernel has this one."""
    case = small_case(**GIVEN["pointwise"], block=(16, 16), dtype=torch.float32, blocks=1)
    calls = []
    fwd = eager.linear.fwd
    monkeypatch.setattr(eager.linear, "fwd", lambda x, *a: (calls.append((x.shape, x.data_ptr())), fwd(x, *a))[1])
    with sk.backend("eager"):
        run(case, case.x, case.values, case.bias)
    assert calls == [((2 * 3 * 5, 4), case.x.data_ptr())]


@pytest.mark.parametrize("kind", ["candidates", "norms", "all_norms", "sketch"])
@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_the_gradient_of_a_probe_is_the_answer(given, kind):
    case = small_case(**given)
    grid, generator = case.grid, torch.Generator().manual_seed(3)
    row, col = torch.tensor([grid.rows - 1, 0]).int(), torch.tensor([0, grid.cols - 1]).int()
    u = torch.randn(3, grid.out_features, dtype=F64, generator=generator)
    v = torch.randn(3, grid.in_features, dtype=F64, generator=generator)
    probe = {
        "candidates": lambda: Probe.candidates(grid, row, col, dtype=F64),
        "norms": lambda: Probe.norms(grid, row, col, dtype=F64),
        "all_norms": lambda: Probe.all_norms(grid, dtype=F64),
        "sketch": lambda: Probe.sketch(grid, u, v),
    }[kind]()

    y = run(case, case.x, case.values, case.bias, probe)
    y.backward(case.dy)

    assert torch.equal(y.detach(), run(case, case.x, case.values, case.bias))
    blocks = gradient_blocks(case.dy, case.x, case)
    at = row.long() * grid.cols + col.long()
    if kind == "sketch":
        _, g = dense_gradients(case.dy, case.x, torch.zeros_like(case.weight), case.shape)
        by_tap = v.view(3, 1, *case.shape.kernel, -1).permute(0, 1, 4, 2, 3)
        scaled = g * u.view(3, -1, 1, 1, 1) * by_tap
        expected = scaled.sum((1, 2, 3, 4))
        torch.testing.assert_close(probe.tensor.grad.sum((1, 2)), expected)
    else:
        answers = {"candidates": blocks[at], "norms": blocks[at].norm(dim=(1, 2))}
        answers["all_norms"] = blocks.norm(dim=(1, 2)).view(grid.rows, grid.cols)
        torch.testing.assert_close(probe.tensor.grad, answers[kind])


def arguments(dtype: torch.dtype = F64, images: int = 2, height: int = 4):
    case = small_case(**GIVEN["stride"], dtype=dtype, images=images, height=height)
    x, values, bias = inputs(case)
    index, sizes, dy = list(case.index), pack(case.shape), case.dy.clone().requires_grad_()
    u, v = torch.ones(3, 3, dtype=dtype), torch.ones(3, case.grid.in_features, dtype=dtype)
    row, col = case.row.clamp(min=0), case.col.clamp(min=0)
    return {
        "conv2d": (x, values, bias, index, sizes, "auto"),
        "conv2d_dx": (dy, values, index, sizes, list(case.size), "auto"),
        "conv2d_dvalues": (dy, x, index, 2, 3, sizes, dtype, "auto"),
        "conv2d_backward": (dy, x, values, index, sizes, "auto"),
        "conv2d_block_norms": (dy.detach(), x.detach(), row, col, 2, 3, sizes, "auto"),
        "conv2d_all_block_norms": (dy.detach(), x.detach(), 2, 3, sizes, "auto"),
        "conv2d_sketch": (dy.detach(), x.detach(), u, v, 2, 3, sizes, "auto"),
    }


def same(found, expected) -> bool:
    """Whether an op gave the same bits, one tensor or two."""
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else zip(found, expected, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", arguments())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_opcheck(name, dtype):
    results = opcheck(getattr(torch.ops.sparsekern, name).default, arguments(dtype)[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", arguments())
def test_an_op_takes_any_strides(name):
    op = getattr(torch.ops.sparsekern, name).default
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments()[name]]
    other = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in args]
    assert same(op(*args), op(*other))


@pytest.mark.parametrize("name", [name for name in arguments() if name != "conv2d"])
def test_one_graph_for_many_batch_and_image_sizes(name):
    op = getattr(torch.ops.sparsekern, name).default
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: op(*args), backend=counter, fullgraph=True)
    with torch.no_grad():
        for images, height in ((2, 4), (3, 6), (5, 8), (8, 12)):
            args = arguments(images=images, height=height)[name]
            assert same(compiled(*args), op(*args))
    assert counter.frame_count <= 3


@pytest.mark.parametrize("given", [GIVEN["3x3"], GIVEN["pointwise"]], ids=["3x3", "pointwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_takes_the_dtype_of_the_region(dtype, given):
    case = small_case(**given, dtype=torch.float32)
    x, values, bias = inputs(case)
    with torch.autocast("cpu", dtype=dtype):
        y = run(case, x, values, bias)
        y.sum().backward()  # inside the region: kernels made of ATen ops must not be cast again
    assert y.dtype == dtype
    assert values.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    check_y(replace(case, x=case.x.to(dtype)), y.detach())


def test_an_explicit_backend_that_has_no_convolution_raises():
    case = small_case(**GIVEN["3x3"], dtype=torch.float32)
    with sk.backend("cpu"), pytest.raises(NotImplementedError, match="'cpu' cannot run conv2d"):
        run(case, case.x, case.values, case.bias)  # blocks of 2 x 3


def test_meta_tensors_give_the_shape():
    shape, grid = ConvShape(4, 6, (3, 3), (2, 2), (1, 1, 1, 1)), conv_grid(4, 6, (3, 3), (2, 2))
    case = conv_case(0, block=(2, 2), kernel=(3, 3), groups=1, group_out=6, group_in=4, free=0, blocks=5)
    index = type(case.index)(*(t.to("meta") for t in case.index))
    y = ops.conv2d(torch.ones(3, 4, 8, 9, device="meta"), torch.ones(5, 2, 2, device="meta"), None, index, grid, shape)
    assert y.shape == (3, 6, 4, 5)
    assert y.permute(0, 2, 3, 1).is_contiguous()
