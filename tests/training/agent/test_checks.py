"""What AGENT does not accept."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import sparsekern as sk
from tests.training.agent.models import make, sgd


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gamma": 1.1}, r"gamma is 1.1; it must be in \[0, 1\]"),
        ({"alpha": 0}, r"alpha is 0; it must be in \(0, 1\]"),
        ({"estimate": "guess"}, "estimate is 'guess'; it must be one of losses, gradients"),
        ({"scope": "head"}, "scope is 'head'; it must be one of global, layer"),
        ({"batches": 0}, "batches is 0; it must be 1 or more"),
        ({"every": 0, "estimate": "gradients"}, "every is 0; it must be 1 or more"),
        ({"every": 5}, "every is 5, but the losses of batches give one c after a pass; estimate must be gradients"),
        ({"scope": "layer"}, "scope is 'layer', but the losses"),
    ],
)
def test_numbers_out_of_range(options, text):
    model = make()
    with pytest.raises(ValueError, match=text):
        sk.AGENT(model, sgd(model), **options)


def test_parts_that_do_not_belong_together():
    model, other = make(), make()
    optimizer = sgd(model)
    with pytest.raises(TypeError, match=r"optimizer is a list; it must be a torch.optim.Optimizer"):
        sk.AGENT(model, [])
    with pytest.raises(TypeError, match=r"method is a str; it must be a sparsekern.Method"):
        sk.AGENT(model, optimizer, method="set")
    with pytest.raises(ValueError, match="method is of another model or optimizer"):
        sk.AGENT(model, sgd(model), method=sk.SET(model, optimizer))
    with pytest.raises(ValueError, match="method is of another model or optimizer"):
        sk.AGENT(other, optimizer, method=sk.SET(model, optimizer))


def test_a_static_graph_of_ranks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(make(), static_graph=True)
        with pytest.raises(NotImplementedError, match=r"static_graph=True.*leave static_graph out"):
            sk.AGENT(model, sgd(model))
        sk.AGENT(model, sgd(model), gamma=0.0)
        sk.AGENT(DistributedDataParallel(make()), sgd(model))
    finally:
        dist.destroy_process_group()
