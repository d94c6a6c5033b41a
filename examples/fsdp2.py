"""An own loop under FSDP2: blocks move while values, gradients and optimizer state are sharded over the ranks.

torchrun --nproc-per-node 2 examples/fsdp2.py --steps 300 --folder runs/fsdp2

Started again, with the same or another number of ranks, it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparsekern as sk

BATCH, SAVE_EVERY = 96, 50


def network(mesh: DeviceMesh, width: int) -> nn.Module:
    """Return a sparse network whose layers are sharded by blocks, the same on all ranks."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*layers, nn.Linear(width, 8))
    sk.sparsify_(model, sparsity=0.9, block_size=8, ignore=["2"])
    for layer in layers:
        fully_shard(layer, mesh=mesh)  # gathered for its own forward and backward only
    fully_shard(model, mesh=mesh)
    return model.to(mesh.device_type)


def batch(step: int, width: int, mesh: DeviceMesh) -> tuple[Tensor, Tensor]:
    """Return this rank's part of the batch of a step, which does not depend on the number of ranks."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, width, generator=draw)
    y = x.view(BATCH, 8, -1).sum(2).argmax(1)
    rank, ranks = mesh.get_local_rank(), mesh.size()
    return x[rank::ranks].to(mesh.device_type), y[rank::ranks].to(mesh.device_type)


def main(steps: int = 300, width: int = 256, folder: str = "runs/fsdp2") -> tuple[float, int]:
    """Train on this rank; return the last loss over all ranks, and the step at which this call began."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = network(mesh, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after fully_shard
    sparse = sk.GSE(model, optimizer, update_every=10, stop=0.75 * steps, seed=0)  # last, and alike on all ranks

    def save(step: int) -> None:
        weights, state = get_state_dict(model, optimizer)
        where = Path(folder) / f"step-{step}"
        dcp.save({"model": weights, "optimizer": state, "method": sparse}, checkpoint_id=where)

    def load(where: Path) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=where)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)  # renews the index
        dcp.load({"method": sparse}, checkpoint_id=where)

    saved = sorted(Path(folder).glob("step-*/.metadata"), key=lambda path: int(path.parent.name[5:]))
    if saved:
        load(saved[-1].parent)
    first = sparse.steps
    loss = torch.zeros((), device=device)
    for step in range(first, steps):
        x, y = batch(step, width, mesh)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sparse.step()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save(step + 1)
    mean = loss.detach()
    dist.all_reduce(mean)
    mean /= mesh.size()
    if dist.get_rank() == 0:
        held = sum(p.to_local().numel() for p in model.parameters())
        explored = sparse.metrics()["itop/global"]
        print(
            f"loss {mean:.3f} after {steps} steps; rank 0 holds {held} numbers; {explored:.0%} of all places were used"
        )
    return mean.item(), first


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--folder", default="runs/fsdp2")
    dist.init_process_group()
    main(**vars(parser.parse_args()))
    dist.destroy_process_group()
