"""Both exporters of PyTorch write a model that onnxruntime runs, with the same results."""

from __future__ import annotations

import io

import numpy
import pytest
import torch
from torch import nn

import sparsekern as sk

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def linear(block) -> nn.Module:
    return sk.sparsify_(nn.Sequential(nn.Linear(20, 24), nn.ReLU(), nn.Linear(24, 9, bias=False)), 0.6, block, seed=1)


def convolutions(block) -> nn.Module:
    layers = [
        nn.Conv2d(4, 12, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, (2, 3), padding="same", groups=2),
        nn.Conv2d(12, 8, 1),
        nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"),
        nn.Flatten(2),
        nn.Conv1d(6, 8, 3, dilation=2, padding=1),
    ]
    return sk.sparsify_(nn.Sequential(*layers), 0.5, block, seed=1, capacity=1.3)


MODELS = {"linear": (linear, (3, 20)), "convolutions": (convolutions, (2, 4, 8, 10))}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("exporter", ["legacy", "new"])
@pytest.mark.parametrize("block", [4, 1], ids=["blocks", "unstructured"])
@pytest.mark.parametrize("name", list(MODELS))
def test_the_file_runs(name, block, exporter):
    make, shape = MODELS[name]
    model, x = make(block).eval(), torch.randn(shape)
    file = io.BytesIO()
    if exporter == "legacy":
        torch.onnx.export(model, (x,), file, dynamo=False)
    else:
        file.write(torch.onnx.export(model, (x,), dynamo=True, verbose=False).model_proto.SerializeToString())
    domains = {node.domain for node in onnx.load_from_string(file.getvalue()).graph.node}
    assert domains <= {"", "ai.onnx"}
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert numpy.abs(y - model(x).detach().numpy()).max() < 1e-4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_that_is_no_export_keeps_the_sparse_op():
    model = linear(4)
    traced = torch.jit.trace(model, torch.randn(3, 20))
    assert "sparsekern::linear" in str(traced.inlined_graph)
