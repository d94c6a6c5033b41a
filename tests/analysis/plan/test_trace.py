"""A step without data, against numbers worked out by hand and against PyTorch's own record of a real step."""

from __future__ import annotations

import pytest
import torch
from sparsekern.kernels.contract import PADDING
from torch import nn

import sparsekern as sk
from sparsekern.analysis import training_bytes
from sparsekern.analysis.plan import Step, repeated_blocks, trace
from sparsekern.analysis.plan.machine import ATTENTION, DENSE, OPTIMIZER, OTHER, SPARSE
from sparsekern.analysis.summary import peak_above
from sparsekern.lab.models.gpt import GPT, Layer

TOKENS, FLOAT = 32, 4


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def step_of(model, shape=(TOKENS, 64), **more) -> Step:
    x = torch.empty(shape, device="meta")
    adamw = more.pop("optimizer", lambda m: torch.optim.AdamW(m.parameters(), fused=True))
    return Step(model, x, lambda m, x: m(x).square().mean(), adamw, **more)


def sparse_mlp():
    """Two layers of 8 of 32 blocks of 16 x 16: 2048 numbers each."""
    with torch.device("meta"):
        return sk.sparsify_(mlp(), 0.75, 16)


def by_group(calls):
    flops = dict.fromkeys((SPARSE, DENSE, ATTENTION, OTHER, OPTIMIZER), 0)
    for operation, count in calls.items():
        flops[operation.group] += operation.flops * count
    return flops


def test_flops_of_a_sparse_mlp():
    found = trace(step_of(sparse_mlp()))
    product = 2 * TOKENS * 2048
    assert by_group(found.forward) == {SPARSE: 2 * product, DENSE: 0, ATTENTION: 0, OTHER: 0, OPTIMIZER: 0}
    assert by_group(found.backward)[SPARSE] == 3 * product  # the input needs no gradient
    assert found.flops == 5 * product


def test_bytes_of_a_sparse_mlp():
    found = trace(step_of(sparse_mlp()))
    values, biases = 2048 * FLOAT, (128 * FLOAT, 64 * FLOAT)
    names = ["0.values", "0.bias", "2.values", "2.bias"]
    assert [(p.name, p.bytes) for p in found.parameters] == list(
        zip(names, (values, biases[0], values, biases[1]), strict=True)
    )
    assert [p.state for p in found.parameters] == [2 * p.bytes + FLOAT for p in found.parameters]  # and a step count
    assert [(p.slots, p.cells, p.block) for p in found.parameters if p.slots] == [(8, 32, 256)] * 2
    assert found.index == 2 * 4 * (6 * 8 + 4 * PADDING + 8 + 1 + 4 + 1)
    assert found.buffers == 0


def test_activations_of_a_sparse_mlp():
    found = trace(step_of(sparse_mlp()))
    hidden, out = TOKENS * 128 * FLOAT, TOKENS * 64 * FLOAT
    assert found.saved == hidden + out + FLOAT  # of the ReLU, which the second layer reads too; of the square; the loss


def test_a_layer_of_a_gpt_by_hand():
    texts, context, features = 2, 32, 64
    with torch.device("meta"):
        layer = nn.Sequential(Layer(features, 1, swiglu=False, rotary=False))
        sk.sparsify_(layer, {"*.mlp.*": 0.75, "*.attention.*": 0.5}, 16)
    step = step_of(layer, (texts, context, features))
    found = trace(Step(layer, step.inputs, lambda m, x: m(x).sum(), step.optimizer))
    tokens = texts * context
    elements = (3 + 1) * features**2 // 2 + 2 * 4 * features**2 // 4  # qkv and out; fc1 and fc2
    attention = 2 * 2 * texts * context**2 * features
    forward = by_group(found.forward)
    assert (forward[SPARSE], forward[ATTENTION]) == (2 * tokens * elements, attention)
    unit = tokens * features * FLOAT
    norms, sums = 2 * 2 * tokens * FLOAT, 2 * tokens * FLOAT  # means and deviations; largest scores and sums
    # two norms, qkv (3), attention, the sum after it, and before and after the GELU 4 each
    assert found.saved == (2 + 3 + 1 + 1 + 4 + 4) * unit + norms + sums + FLOAT


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        ("auto", None, "qkv attention"),
        ("gpu", None, "attention"),  # what a GPU runs is PyTorch's
        ("auto", torch.bfloat16, "attention"),
    ],
)
def test_attention_is_that_which_a_step_would_call(name, dtype, kind):
    with torch.device("meta"):
        step = step_of(Layer(64, 2, swiglu=False, rotary=False), (2, 32, 64), autocast=dtype)
    with sk.backend(name):
        found = trace(step)
    for calls, which, products in ((found.forward, "forward", 2), (found.backward, "backward", 5)):
        (operation,) = (op for op in calls if op.group == ATTENTION)
        assert operation.kind == f"{kind} {which} causal"
        assert operation.flops == products * 2 * 2 * 32 * 32 * 64
        assert (operation.elements, operation.intensity) == (4 * 2 * 32 * 64, 32)


@pytest.mark.parametrize("network", ["sparse", "dense"])
def test_the_peak_is_that_of_a_real_step(network):
    def build():
        torch.manual_seed(0)
        model = GPT(64, 32, depth=2, heads=2, head_features=32)
        return sk.sparsify_(model, 0.8, 16, ignore=["*.out"]) if network == "sparse" else model

    def loss(model, tokens):
        return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

    def optimizer(model):
        return torch.optim.AdamW(model.parameters(), fused=True)

    tokens = torch.randint(64, (4, 32), generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        found = trace(Step(build(), tokens, loss, optimizer))
    model = build()
    real = optimizer(model)

    def run():
        loss(model, tokens).backward()
        real.step()
        real.zero_grad()

    run()
    gradients = sum(p.gradient for p in found.parameters)
    between = sum(p.bytes + p.state for p in found.parameters) + found.index + found.buffers
    assert between == training_bytes(model, real) - gradients
    assert found.peak() == pytest.approx(peak_above(run, torch.device("cpu")), rel=0.05)


def test_a_checkpointed_layer_saves_its_input_and_runs_again():
    with torch.device("meta"):
        model = GPT(64, 32, depth=4, heads=1, head_features=32)
    tokens = torch.empty(2, 32, dtype=torch.int64, device="meta")
    step = Step(model, tokens, lambda m, x: m(x).sum(), lambda m: torch.optim.SGD(m.parameters()))
    names = repeated_blocks(model)
    assert names == ["layers.0", "layers.1", "layers.2", "layers.3"]
    whole, small = trace(step), trace(step, names)
    unit = 2 * 32 * 32 * FLOAT
    assert small.saved < 7 * unit + 10_000 < whole.saved / 8  # an input a layer, what the head keeps, and the logits
    again = sum(by_group(whole.forward).values()) - 2 * 64 * 32 * 64  # all but the head
    again -= 4 * 2 * 64 * 32 * 128  # and but for each layer's last product, whose result nothing keeps
    assert small.flops - whole.flops == again


def test_the_model_is_not_changed_and_a_shared_weight_is_counted_once():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model[1].weight = model[0].weight
    found = trace(step_of(model, (4, 16)))
    assert [p.name for p in found.parameters] == ["0.weight"]
    assert model[0].weight.is_meta and model[0].weight is model[1].weight and model[0].weight.grad is None


def test_peaks_with_a_part_of_the_gradients():
    found = trace(step_of(sparse_mlp(), (2, 64)))
    assert found.peak(0.0) < found.peak(0.5) < found.peak()
    gradients = sum(p.gradient for p in found.parameters)
    assert found.peak(accumulated=True) == max(other for _, other in found.peaks) + gradients


def test_residual_blocks_are_found_and_containers_are_not():
    from sparsekern.lab.models import resnet20, vgg16_small

    with torch.device("meta"):
        assert len(repeated_blocks(resnet20(num_classes=10, in_channels=3))) == 9
        assert repeated_blocks(vgg16_small(num_classes=10, in_channels=3)) == []
        assert repeated_blocks(mlp()) == []
