"""Layers whose values FSDP2 has sharded over two ranks, in blocks that do not divide the layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekern as sk
from sparsekern.nn.sharded import is_sharded, sharded_as, whole

X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def make(seed: int) -> nn.Module:
    return nn.Sequential(sk.SparseLinear(10, 14, sparsity=0.5, block_size=(4, 3), seed=seed))


def test_plain_tensors_stay_as_they_are():
    tensor = torch.ones(2)
    assert not is_sharded(tensor)
    assert whole(tensor).data_ptr() == tensor.data_ptr()
    assert sharded_as(torch.zeros(2), tensor) is tensor


def check_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    plain, other, model = make(0), make(1), make(0)
    fully_shard(model, mesh=mesh)
    layer = model[0]

    def assert_computes_as(expected: nn.Module) -> None:
        assert torch.equal(model(X), expected(X))
        model.reshard()
        assert is_sharded(layer.values)

    assert_computes_as(plain)

    # A move raises before anything has changed.
    before, free = [t.clone() for t in layer.buffers()], torch.tensor([-1])
    for checked in (False, True):
        with pytest.raises(NotImplementedError, match="values of a sparse layer are a DTensor; blocks"):
            layer.move_(torch.tensor([0]), free, free, checked=checked)
    assert all(torch.equal(old, new) for old, new in zip(before, layer.buffers(), strict=True))

    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    layer.reset_parameters()
    assert_computes_as(plain)

    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, other.state_dict(), options=options)
    assert_computes_as(other)
    model.load_state_dict(get_model_state_dict(model))  # of DTensors
    assert_computes_as(other)
    model.load_state_dict(plain.state_dict())  # of whole tensors
    assert_computes_as(plain)

    coarse = sk.SparseLinear(10, 14, blocks=1, block_size=(8, 6), seed=2)  # blocks of another size are cut anew
    layer.load_state_dict(coarse.state_dict())
    torch.testing.assert_close(model(X), coarse(X))
    model.reshard()

    dense = nn.Linear(10, 14)
    nn.init.constant_(dense.weight, 1.5)
    nn.init.zeros_(dense.bias)
    layer.load_state_dict(dense.state_dict())
    twin = layer.to_dense()
    assert not is_sharded(twin.weight) and set(twin.weight.unique().tolist()) <= {0.0, 1.5}
    torch.testing.assert_close(twin(X), model(X))
    dist.destroy_process_group()


def test_two_ranks(tmp_path: Path):
    mp.spawn(check_rank, (str(tmp_path),), nprocs=2)
