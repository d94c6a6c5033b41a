"""What the three layers share as drop-ins for PyTorch's: arguments, outputs, checkpoints, compilers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sparsekern as sk


class Kind(NamedTuple):
    sparse: type[nn.Module]
    dense: type[nn.Module]
    sizes: dict[str, Any]
    settings: list[dict[str, Any]]
    input: tuple[int, ...]

    def layer(self, **options: Any) -> nn.Module:
        usual = {"block_size": (4, 2), "sparsity": 0.5, "seed": 0, "dtype": torch.float64}
        return self.sparse(**{**self.sizes, **usual, **options})

    def single(self, **options: Any) -> nn.Module:
        """Return a layer of float32 with the first settings that convolutions need."""
        return self.layer(**{"dtype": torch.float32, **self.settings[0], **options})

    def x(self, batch: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(batch, *self.input, dtype=dtype)


MODES = ("reflect", "replicate", "circular")
CHANNELS = {"in_channels": 6, "out_channels": 12}
KINDS = {
    "linear": Kind(sk.SparseLinear, nn.Linear, {"in_features": 45, "out_features": 70}, [{}, {"bias": False}], (7, 45)),
    "conv1d": Kind(
        sk.SparseConv1d,
        nn.Conv1d,
        CHANNELS,
        [
            dict(kernel_size=3),
            dict(kernel_size=(3,), padding=1, stride=2),
            dict(kernel_size=5, padding=(2,), stride=3, dilation=2, bias=False),
            dict(kernel_size=2, padding="same"),
            dict(kernel_size=4, padding="same", dilation=3),
            dict(kernel_size=3, padding="valid"),
            dict(kernel_size=1),
            dict(kernel_size=1, stride=2),
            dict(kernel_size=3, padding=1, groups=2),
            dict(kernel_size=3, padding=1, groups=6),
            *(dict(kernel_size=3, padding=2, padding_mode=mode) for mode in MODES),
            dict(kernel_size=2, padding="same", padding_mode="reflect"),
        ],
        (6, 17),
    ),
    "conv2d": Kind(
        sk.SparseConv2d,
        nn.Conv2d,
        CHANNELS,
        [
            dict(kernel_size=3),
            dict(kernel_size=3, padding=1, stride=2),
            dict(kernel_size=(1, 3), padding=(0, 2), dilation=(1, 2)),
            dict(kernel_size=(5, 3), padding=(2, 0), stride=(3, 1), bias=False),
            dict(kernel_size=2, padding="same"),
            dict(kernel_size=(4, 3), padding="same", dilation=(1, 3)),
            dict(kernel_size=3, padding="valid"),
            dict(kernel_size=1),
            dict(kernel_size=1, stride=2),
            dict(kernel_size=3, padding=1, groups=2),
            dict(kernel_size=3, padding=1, groups=6),
            dict(kernel_size=7, padding=3),
            *(dict(kernel_size=3, padding=(1, 2), padding_mode=mode) for mode in MODES),
            dict(kernel_size=2, padding="same", padding_mode="reflect"),
        ],
        (6, 8, 9),
    ),
}
each = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
EACH_SETTING = [
    pytest.param(kind, settings, id=f"{name} {settings}") for name, kind in KINDS.items() for settings in kind.settings
]


@each
def test_the_arguments_are_those_of_pytorchs_layer_in_order(kind: Kind):
    ours, theirs = (list(inspect.signature(c).parameters) for c in (kind.sparse, kind.dense))
    assert ours[: len(theirs)] == theirs


def assert_computes_like_its_dense_layer(module, x: torch.Tensor) -> nn.Module:
    """Check outputs and all gradients of a float64 layer; return its dense layer."""
    dense = module.to_dense()
    x, z = (x.detach().clone().requires_grad_() for _ in range(2))
    y, expected = module(x), dense(z)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module.dense_forward(z, dense.weight), expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)
    if module.bias is not None:
        torch.testing.assert_close(module.bias.grad, dense.bias.grad)
    kept = module.dense_weight() != 0
    grads = copy.deepcopy(module)
    grads.values.data.copy_(module.values.grad)
    torch.testing.assert_close(grads.dense_weight()[kept], dense.weight.grad[kept])
    return dense


@pytest.mark.parametrize(("kind", "settings"), EACH_SETTING)
def test_it_computes_what_its_dense_twin_computes(kind: Kind, settings: dict[str, Any]):
    module, x = kind.layer(**settings), kind.x(dtype=torch.float64)
    dense = assert_computes_like_its_dense_layer(module, x)
    assert type(dense) is kind.dense and repr(dense) == repr(kind.dense(**kind.sizes, **settings))
    assert module.weight.shape == dense.weight.shape and module.weight.dim() == dense.weight.dim()
    torch.testing.assert_close(module(x[0]), module(x)[0])  # without a batch
    if x.dim() == 4:
        module.zero_grad()
        assert_computes_like_its_dense_layer(module, x.contiguous(memory_format=torch.channels_last))
        assert module(x).is_contiguous(memory_format=torch.channels_last)


@each
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_from_dense_keeps_the_strongest_blocks(kind: Kind, bias: bool, groups: int):
    options = {} if kind.dense is nn.Linear else {"kernel_size": 3, "groups": groups}
    dense = kind.dense(**kind.sizes, bias=bias, **options)
    module = kind.sparse.from_dense(dense, sparsity=0.5, block_size=4)
    out, into, *taps = dense.weight.shape
    groups = groups if taps else 1
    cells = torch.zeros(groups, -(-out // groups // 4) * 4, -(-into // 4) * 4, *taps)  # whole blocks
    cells[:, : out // groups, :into] = dense.weight.detach().view(groups, -1, into, *taps)
    norms = cells.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).norm(dim=(2, 4), keepdim=True)
    kept = norms >= norms.flatten().topk(module.topology.blocks()).values[-1]
    mask = kept.expand(-1, -1, 4, -1, 4, *taps).flatten(1, 2).flatten(2, 3)[:, : out // groups, :into]
    assert module.topology.blocks() == (kept.numel() + 1) // 2
    assert torch.equal(module.dense_weight(), dense.weight * mask.reshape(dense.weight.shape))
    assert (module.bias is None) == (not bias)
    if bias:
        assert torch.equal(module.bias, dense.bias) and module.bias is not dense.bias


@each
@pytest.mark.parametrize("last", [{}, {"padding_mode": "circular"}], ids=str)
def test_a_full_layer_is_the_dense_layer_both_ways(kind: Kind, last: dict[str, Any]):
    options = {"kernel_size": 2, "padding": "same", **last} if kind.dense is not nn.Linear else {}
    dense = kind.dense(**kind.sizes, **options).to(torch.bfloat16).eval()
    back = kind.sparse.from_dense(dense, sparsity=0, block_size=4).eval().to_dense()
    assert torch.equal(back.weight, dense.weight) and torch.equal(back.bias, dense.bias)
    assert back.weight.dtype == torch.bfloat16 and not back.training and repr(back) == repr(dense)
    assert type(back) is kind.dense


@each
def test_checkpoints_dense_and_sparse(kind: Kind):
    module, other = kind.single(), kind.single(init="random")
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.dense_weight(), other.dense_weight())
    dense = kind.dense(**kind.sizes, **kind.settings[0])
    module.load_state_dict(dense.state_dict())
    assert torch.equal(module.dense_weight(), dense.weight * (other.dense_weight() != 0))
    with pytest.raises(RuntimeError, match=r"weight has shape \(12,\); it must be that of the layer, \("):
        module.load_state_dict({"weight": torch.zeros(12), "bias": torch.zeros_like(dense.bias)})


@each
def test_it_survives_deepcopy_to_empty_and_half(kind: Kind):
    module, x = kind.single(), kind.x()
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    empty = kind.single(device="meta").to_empty(device="cpu")
    assert torch.equal(empty.row, module.row) and torch.equal(empty.col, module.col)
    assert copy.deepcopy(module).half()(x.half()).dtype == torch.float16


@each
def test_compile_fullgraph_with_backward_moves_and_batch_sizes(kind: Kind):
    """One graph for all batch sizes, and none of it is compiled anew when blocks move."""
    torch._dynamo.reset()
    module, counter = kind.single(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW(module.parameters())
    method = sk.SET(module, optimizer, update_every=1)
    for batch in (2, 3, 5, 4):
        x = kind.x(batch)
        y = compiled(x)
        torch.testing.assert_close(y, module(x))
        y.square().sum().backward()
        grad = module.values.grad.clone()
        module.values.grad = None
        module(x).square().sum().backward()
        torch.testing.assert_close(module.values.grad, grad)
        optimizer.step()
        optimizer.zero_grad()
        assert method.step()
    assert counter.frame_count <= 2


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_grad_scaler(kind: Kind, dtype: torch.dtype):
    module = kind.single()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    before = module.values.detach().clone()
    with torch.autocast("cpu", dtype=dtype):
        y = module(kind.x())
    assert y.dtype == dtype and module.values.dtype == torch.float32
    scaler.scale(y.float().square().mean()).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert module.values.grad.dtype == torch.float32 and not torch.equal(before, module.values)


@each
def test_export_is_a_snapshot_that_runs(kind: Kind):
    module, x = kind.single().eval(), kind.x()
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


CONV_REST = "block_size=(4, 2), blocks=12/24, sparsity=0.5)"
REPRS: list[tuple[Callable[[], nn.Module], str]] = [
    (
        lambda: sk.SparseLinear(12, 8, False, sparsity=0.5, block_size=4),
        "SparseLinear(in_features=12, out_features=8, bias=False, block_size=(4, 4), blocks=3/6, sparsity=0.5)",
    ),
    (
        lambda: KINDS["conv1d"].layer(kernel_size=3, padding=1, groups=2),
        "SparseConv1d(6, 12, kernel_size=(3,), stride=(1,), padding=(1,), groups=2, bias=True, " + CONV_REST,
    ),
    (
        lambda: KINDS["conv2d"].layer(kernel_size=3),
        "SparseConv2d(6, 12, kernel_size=(3, 3), stride=(1, 1), bias=True, block_size=(4, 2), blocks=41/81, "
        "sparsity=0.4938)",
    ),
    (
        lambda: KINDS["conv2d"].layer(
            kernel_size=2, padding="same", dilation=2, groups=3, padding_mode="reflect", tie_taps=True, device="meta"
        ),
        "SparseConv2d(6, 12, kernel_size=(2, 2), stride=(1, 1), padding=same, dilation=(2, 2), groups=3, "
        "padding_mode=reflect, bias=True, block_size=(4, 2), tie_taps=True, slots=8)",
    ),
]


@pytest.mark.parametrize(("make", "text"), REPRS, ids=[text[:13] for _, text in REPRS])
def test_repr(make: Callable[[], nn.Module], text: str):
    assert repr(make()) == text
