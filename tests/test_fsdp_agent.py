"""AGENT on parameters that ``fully_shard`` shards: the numbers of one process, on two ranks bit for bit.

Four processes do all of it, in meshes of two, of three and of two by two, and write checkpoints for the test's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

import sparsekern as sk
from tests import fsdp
from tests.fsdp import assert_same
from tests.ranks import refusal

SAVED = 7
"""The step after which a checkpoint is written: c is above 0 and blocks have moved since the snapshot."""

METHODS = (None, "SET", "RigL", "GSE")
LOSSES: dict[str, Any] = {}
GRADIENTS = {"estimate": "gradients", "scope": "layer"}
STEPS = {"estimate": "gradients", "every": 4}

RANKS = 4

SAME = [
    (None, "AdamW", LOSSES, 1),
    ("SET", "SGD, momentum", LOSSES, 1),
    ("RigL", "AdamW", LOSSES, 1),
    ("GSE", "SGD, momentum", LOSSES, 2),
]
"""A method, an optimizer, options of AGENT, and backwards a step; what c is made of does not depend on shards."""

ROUNDED = [("SET", "SGD", GRADIENTS, 1), ("RigL", "SGD", STEPS, 2), (None, "SGD", STEPS, 1)]
"""Inner products are summed shard by shard."""

SPLIT, THREE = (
    [(name, "SGD, momentum", (LOSSES, GRADIENTS)[(n + turn) % 2], 1) for n, name in enumerate(METHODS)]
    for turn in (0, 1)
)

HYBRID = [(None, "SGD, momentum", GRADIENTS, 1), ("GSE", "SGD, momentum", LOSSES, 1)]

Case = tuple[str | None, str, dict[str, Any], int]


def build(case: Case, mesh: DeviceMesh | None) -> tuple[nn.Module, torch.optim.Optimizer, sk.AGENT]:
    name, optimizer, options, _ = case
    # the root's parameters stay gathered after a forward without a backward
    model = fsdp.linear() if mesh is None else fsdp.shard(fsdp.linear(), mesh, root_only=optimizer == "AdamW")
    group = {} if mesh is None or mesh.ndim > 1 else {"process_group": mesh.get_group()}
    if name is None:
        made, method = fsdp.OPTIMIZERS[optimizer](model.parameters()), None
    else:
        made, method = fsdp.build_parts(model, name, optimizer, **group)
    return model, made, sk.AGENT(model, made, method=method, gamma=0.5, **options, **group)


def train(
    case: Case,
    mesh: DeviceMesh | None = None,
    rank: int = 0,
    world: int = 1,
    steps: range = range(fsdp.STEPS),
    parts: tuple[nn.Module, torch.optim.Optimizer, sk.AGENT] | None = None,
) -> dict[str, Tensor]:
    """Train, each rank on its share of each batch, and return everything, with c and the variance."""
    model, optimizer, agent = build(case, mesh) if parts is None else parts

    def loss(x: Tensor) -> Tensor:
        return fsdp.loss_of(model, x)

    for step in steps:
        with torch.no_grad():
            model(fsdp.batch(step))  # leaves gathered parameters behind
        if step % 3 == 0 and agent.every is None:
            agent.refresh([fsdp.batch(100 + step + i, rank, world) for i in range(3)], loss)
        parts_of_batch = fsdp.batch(step, rank, world).chunk(case[3])
        for number, part in enumerate(parts_of_batch):
            if isinstance(model, FSDPModule):  # AGENT reduces all of them
                model.set_requires_gradient_sync(number + 1 == len(parts_of_batch))
            agent.backward(lambda: loss(part) / len(parts_of_batch))  # noqa: B023
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        agent.step()
    metrics = agent.metrics()
    numbers = torch.tensor([metrics["c"], metrics["corrected"], metrics["variance_ratio"]], dtype=torch.float64)
    return fsdp.everything(model, optimizer, agent.method) | {"numbers": numbers}


def refusals(rank: int, mesh: DeviceMesh) -> dict[str, str]:
    """Return what is raised on two ranks, by a name."""
    said, group = {}, mesh.get_group()

    def agent_of(model: nn.Module) -> sk.AGENT:
        return sk.AGENT(model, torch.optim.SGD(model.parameters()), process_group=group)

    model = nn.Sequential(fsdp.linear(), nn.Linear(5, 4))
    fully_shard(model[0], mesh=mesh)
    said["in part"] = refusal(lambda: agent_of(model))
    model = nn.Sequential(nn.Linear(6, 4))
    fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(p.dim() - 1))
    said["other axis"] = refusal(lambda: agent_of(model))
    model = fsdp.linear()
    agent = agent_of(model)
    fsdp.shard(model, mesh)
    said["sharded later"] = refusal(lambda: agent.backward(lambda: fsdp.loss_of(model, fsdp.batch(0))))
    model = fsdp.shard(fsdp.linear(), mesh)
    agent = agent_of(model)
    batches = [fsdp.batch(i) for i in range(1 + rank)]
    said["batches"] = refusal(lambda: agent.refresh(batches, lambda x: fsdp.loss_of(model, x)))
    said["no batches"] = refusal(lambda: agent.refresh([], lambda x: fsdp.loss_of(model, x)))
    return said


def weighted(mesh: DeviceMesh | None, rank: int = 0) -> dict[str, Tensor]:
    """Return the mean gradient of two batches, of which two ranks have 9 and 3 rows, then 4 and one that is none."""
    model, _, agent = build((None, "SGD", LOSSES, 1), mesh)
    first, second = fsdp.batch(0), fsdp.batch(1)[:4]
    batches = [(first, 12), (second, 4)]
    if mesh is not None:
        batches = [[(first[:9], 9), (second, 4)], [(first[9:], 3), (second[:1], 0)]][rank]
    agent.refresh(batches, lambda b: fsdp.loss_of(model, b[0]), size=lambda b: b[1])
    means = agent.snapshot.state_dict()["mean"]
    return {name: fsdp.full(mean) for name, mean in means.items()}


class Branch(nn.Module):
    """A layer, and a second one of one output, of which a single rank holds all, that not every batch goes through."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.whole = nn.Linear(6, 4), nn.Linear(4, 1), True

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y) if self.whole else y


def gradients_of_a_branch(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Return which parameters have a gradient after a batch that goes through the first layer alone."""
    model = Branch()
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    group = None if mesh is None else mesh.get_group()
    agent = sk.AGENT(model, torch.optim.SGD(model.parameters()), process_group=group)
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    agent.refresh([x], lambda x: model(x).square().mean())
    agent.c[""], model.whole = 0.5, False
    agent.backward(lambda: model(x).square().mean())
    return {name: torch.tensor(p.grad is not None) for name, p in model.named_parameters()}


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    pair, three, square = fsdp.meshes()
    found: dict[str, Any] = {"hybrid": {name_of(case): train(case, square, rank, 4) for case in HYBRID}}
    if rank < 3:
        found["three"] = {name_of(case): train(case, three, rank, 3) for case in THREE}
    if rank < 2:
        found["same"] = {name_of(case): train(case, pair) for case in [*SAME, *ROUNDED]}
        found["split"] = {name_of(case): train(case, pair, rank, 2) for case in SPLIT}
        found["refusals"] = refusals(rank, pair)
        found["weighted"] = weighted(pair, rank)
        found["branch"] = gradients_of_a_branch(pair)
        parts = build(SAVE, pair)
        train(SAVE, steps=range(SAVED), parts=parts)
        model, optimizer, agent = parts
        saved = {"model": model.state_dict(), "agent": agent, "values": optimizer.state_dict()}
        dcp.save(saved, checkpoint_id=folder / "saved", process_group=pair.get_group())
        found["unbroken"] = train(SAVE, steps=range(SAVED, fsdp.STEPS), parts=parts)
    torch.distributed.barrier()
    if rank < 3:
        found["resumed"] = resumed(folder, three)
    return found


SAVE = ("GSE", "SGD, momentum", LOSSES, 1)


def resumed(folder: Path, mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Go on from the checkpoint of two ranks."""
    parts = build(SAVE, mesh)
    model, optimizer, agent = parts
    fsdp.loss_of(model, fsdp.batch(0)).backward()
    optimizer.step()  # makes the state that is loaded into
    optimizer.zero_grad()
    agent.step()
    state = {"model": model.state_dict(), "agent": agent, "values": optimizer.state_dict()}
    where = {"checkpoint_id": folder / "saved", "process_group": None if mesh is None else mesh.get_group()}
    dcp.load({k: v for k, v in state.items() if k != "agent"}, **where)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["values"])
    dcp.load({"agent": agent}, **where)
    return train(SAVE, steps=range(SAVED, fsdp.STEPS), parts=parts)


def name_of(case: Case) -> str:
    return ", ".join(map(str, case))


@pytest.mark.parametrize("case", SAME, ids=name_of)
def test_two_ranks_with_the_same_data_are_one_process_bit_for_bit(ranks, case):
    expected = train(case)
    assert expected.get("updates", 4) == 4 and 0.01 < expected["numbers"][0] <= 1
    assert_same(expected, [rank["same"][name_of(case)] for rank in ranks[:2]])


@pytest.mark.parametrize("case", ROUNDED, ids=name_of)
def test_two_ranks_with_the_same_data_up_to_the_order_of_a_sum(ranks, case):
    expected = train(case)
    assert expected["numbers"][0] > 0.01
    assert_same(expected, [rank["same"][name_of(case)] for rank in ranks[:2]], 1e-6)


@pytest.mark.parametrize("case", SPLIT, ids=name_of)
def test_batches_split_over_two_ranks(ranks, case):
    assert_same(train(case), [rank["split"][name_of(case)] for rank in ranks[:2]], 1e-6)


@pytest.mark.parametrize("case", THREE, ids=name_of)
def test_batches_split_over_three_ranks(ranks, case):
    assert_same(train(case), [rank["three"][name_of(case)] for rank in ranks[:3]], 1e-6)


@pytest.mark.parametrize("case", HYBRID, ids=name_of)
def test_batches_split_over_two_copies_of_two_shards(ranks, case):
    assert_same(train(case), [rank["hybrid"][name_of(case)] for rank in ranks], 1e-6)


SAID = {
    "in part": "NotImplementedError: parameters are sharded in several ways, and AGENT takes those that fully_shard",
    "other axis": "NotImplementedError: parameters are sharded in several ways",
    "sharded later": "NotImplementedError: values of '0' are a DTensor, but not by fully_shard before",
    "batches": "InputError: ranks have other numbers of batches, and under fully_shard each pass needs all of them",
    "no batches": "InputError: batches is empty",
}


@pytest.mark.parametrize("what", SAID)
def test_what_cannot_be_corrected_is_refused(ranks, what):
    for rank in ranks[:2]:
        assert rank["refusals"][what].startswith(SAID[what])


def test_batches_of_several_sizes_count_by_their_examples(ranks):
    """Also one of none, which a rank computes because the others need it."""
    expected = weighted(None)
    assert all(mean.any() for mean in expected.values())
    assert_same(expected, [rank["weighted"] for rank in ranks[:2]], 1e-6)


def test_a_rank_without_a_part_of_a_parameter_has_its_gradient_where_the_others_do(ranks):
    """Also one that this batch did not use, whose gradient is the snapshot's mean."""
    expected = gradients_of_a_branch(None)
    assert all(expected.values())
    assert_same(expected, [rank["branch"] for rank in ranks[:2]])


def test_a_checkpoint_of_two_ranks_goes_on_with_three_and_with_one(ranks, folder):
    expected = train(SAVE)
    assert_same(expected, [rank["unbroken"] for rank in ranks[:2]])
    assert_same(expected, [rank["resumed"] for rank in ranks[:3]], 1e-6)
    assert_same(expected, [resumed(folder, None)])
