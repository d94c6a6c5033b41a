"""Methods on values that ``fully_shard`` shards by slots: the numbers of one process, on two ranks bit for bit.

On two ranks the mean of two equal gradients is exact; on three it is rounded. Four processes do all of it, in meshes of
two, of three and of two by two: starting one takes longer than any of these trainings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.tensor import Shard, distribute_tensor

import sparsekern as sk
from tests import fsdp
from tests.ranks import refusal

RANKS = 4
TIED = ("SET", "Gradual", "MEST", "TopKAST", "VRPGE", "VRPGE, refill")
IN_CONV = ("SET", "Gradual", "MEST", "DSR", "SRigL", "TopKAST", "GSE", "GSE, global", "GraEst", "VRPGE, refill")
IN_LINEAR = [name for name in fsdp.METHODS if name not in IN_CONV]

LINEAR = [
    (name, fsdp.linear, ("AdamW", "AdamW, loop", "SGD", "SGD, momentum")[number % 4], fsdp.plain, {})
    for number, name in enumerate(IN_LINEAR)
]
CONV = [
    (name, fsdp.conv if name in TIED else fsdp.untied, "SGD", fsdp.plain, {}) for name in (*IN_CONV, "RigL", "VRPGE")
]
PASSES = [
    *((name, fsdp.linear, "SGD, momentum", fsdp.accumulated, {}) for name in ("SET", "RigL", "GSE")),
    ("GSE", fsdp.linear, "SGD, momentum", fsdp.twice, {}),
    ("RigL", fsdp.linear, "SGD, momentum", fsdp.twice_in_place, {}),
    ("GSE", fsdp.checkpointed, "AdamW", fsdp.plain, {}),
    ("GSE", fsdp.linear, "AdamW", fsdp.plain, {"compiled": "2"}),  # one process runs eagerly
]
TRAP = [
    (name, fsdp.linear, "AdamW", fsdp.evaluated, options)
    for name, options in (
        *(("SET", options) for options in ({}, {"root_only": True})),
        *((name, {"reshard_after_forward": False}) for name in ("SET", "RigL", "VRPGE")),
    )
]
EXACT = [*LINEAR, *CONV, *PASSES, *TRAP]
ROUNDED = [
    ("SET", fsdp.linear, "AdamW, fused", fsdp.plain, {}),  # PyTorch rounds the last elements of a tensor in another way
    *((name, fsdp.linear, "AdamW", fsdp.clipped, {}) for name in ("MEST", "GSE")),  # MEST ranks by gradients
]
SPLIT = [(name, fsdp.linear, "AdamW", fsdp.plain, {}) for name in IN_CONV if name != "GraEst"]
THREE = [
    *((name, fsdp.linear, "AdamW", fsdp.plain, {}) for name in IN_LINEAR),
    ("SET", fsdp.small, "AdamW", fsdp.plain, {}),
    ("GSE", fsdp.small, "SGD", fsdp.twice_in_place, {}),
]
HYBRID = [(name, fsdp.linear, "AdamW", fsdp.plain, {}) for name in ("SET", "RigL", "GSE", "VRPGE")]
ALIKE = [
    ("GraEst", fsdp.linear, "AdamW", fsdp.plain, {}),
    ("SET", fsdp.linear, "Adafactor", fsdp.plain, {}),
]
"""A method, a network, an optimizer, the passes of a step, and options of :func:`tests.fsdp.shard`.

Half of the methods train in the linear network bit for bit, and on parts of a batch on three ranks; the others in the
convolutions bit for bit, and on parts of a batch on two.
"""


def name_of(case: tuple[Any, ...]) -> str:
    method, model, optimizer, backward, options = case
    return ", ".join([method, model.__name__, optimizer, backward.__name__, *map(str, options.items())])


def trained(
    case: tuple[Any, ...], mesh: DeviceMesh | None, rank: int = 0, world: int = 1, **more: Any
) -> dict[str, Tensor]:
    method, model, optimizer, backward, options = case
    made = model() if mesh is None else fsdp.shard(model(), mesh, **options)
    return fsdp.train(made, method, optimizer, rank=rank, world=world, backward=backward, **more)


def build_set(model: nn.Module, group: dist.ProcessGroup, **options: Any) -> tuple[torch.optim.Optimizer, sk.Method]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer, sk.SET(model, optimizer, process_group=group, **options)


def refusals(rank: int, mesh: DeviceMesh) -> dict[str, str]:
    """Return what is raised on two ranks, by a name."""
    group, said = mesh.get_group(), {}

    model = fsdp.shard(fsdp.linear(), mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() == 3 else None)
    said["other axis"] = refusal(lambda: build_set(model, group))

    model = FullyShardedDataParallel(fsdp.linear(), group, use_orig_params=True, device_id=torch.device("cpu"))
    said["older form"] = refusal(lambda: build_set(model, group))

    model = fsdp.linear()
    model[0].values = nn.Parameter(distribute_tensor(model[0].values.detach(), mesh, [Shard(0)]))
    said["by hand"] = refusal(lambda: build_set(model, group))

    model = fsdp.linear()
    optimizer, method = build_set(model, group)
    fsdp.shard(model, mesh)
    said["sharded later"] = refusal(method.step)

    model = fsdp.linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fsdp.shard(model, mesh)
    said["older optimizer"] = refusal(lambda: sk.SET(model, optimizer, process_group=group))

    model = fsdp.shard(fsdp.linear(), mesh)
    said["seed"] = refusal(lambda: build_set(model, group, seed=rank))

    model = fsdp.linear()
    if rank:  # the model of another seed
        model[2] = sk.SparseLinear(36, 20, blocks=25, capacity=26, block_size=(2, 4), seed=9, name="2")
    model = fsdp.shard(model, mesh)
    said["places"] = refusal(lambda: build_set(model, group))

    model = fsdp.shard(fsdp.linear(), mesh)
    optimizer, method = build_set(model, group)
    if rank:  # a checkpoint of another run: its places, and its shard of the values
        other = sk.SparseLinear(36, 20, blocks=25, capacity=26, block_size=(2, 4), seed=9, name="2")
        model[2].row.copy_(other.row)
        model[2].col.copy_(other.col)
        model[2].refresh_()
    fsdp.loss_of(model, fsdp.batch(0)).backward()
    before = model[2].values.to_local().clone()
    said["checkpoint"] = refusal(optimizer.step)
    assert torch.equal(model[2].values.to_local(), before) and method.steps == 0

    model = fsdp.shard(fsdp.linear(), mesh)
    optimizer, method = build_set(model, group)
    method.load_state_dict(method.state_dict() | {"steps": 3 * rank})
    fsdp.loss_of(model, fsdp.batch(0)).backward()
    said["steps"] = refusal(optimizer.step)
    return said


def low_precision(mesh: DeviceMesh, one: DeviceMesh) -> list[str]:
    """Check that two ranks train as one does, with parameters gathered in bfloat16; return the methods."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    names = ["SET", "RigL", "GSE"]
    for name in names:
        case = name, fsdp.linear, "AdamW", fsdp.accumulated, {"mp_policy": policy}
        alone, found = (trained(case, m, process_group=m.get_group()) for m in (one, mesh))
        for key, value in alone.items():
            assert value.dtype != torch.bfloat16 and torch.equal(found[key], value), (name, key)
    return names


def followers(mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """Train with tensors and a copy of the model that follow, and return their contents; mesh None: one process."""
    model, copy = (fsdp.linear() if mesh is None else fsdp.shard(fsdp.linear(), mesh) for _ in range(2))
    group, slots = None if mesh is None else mesh.get_group(), model[0].values.shape[0]
    whole, like, told = torch.ones(slots, 2), torch.ones_like(model[0].values, requires_grad=False), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = sk.SET(model, optimizer, update_every=3, grown_state="mean_v", process_group=group)
    method.follow(copy)
    for tensor, on_move in ((whole, "zero"), (like, "zero"), (whole, lambda tensor, slots: told.append(slots.clone()))):
        method.follow(tensor, layer="0", on_move=on_move)
    with torch.no_grad():
        copy(fsdp.batch(0))  # leaves gathered parameters behind
    found = fsdp.train(model, "SET", parts=(optimizer, method))
    found |= {f"copy {name}": fsdp.full(tensor) for name, tensor in copy.state_dict().items()}
    return found | {"whole": whole, "like": fsdp.full(like), "told": torch.cat(told)}


def run_rank(rank: int, folder: Path) -> dict[str, Any]:
    pair, three, square = fsdp.meshes()
    ones = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("each", "alone"))
    found: dict[str, Any] = {"hybrid": {name_of(case): trained(case, square) for case in HYBRID}}
    if rank < 3:
        group = {"process_group": three.get_group()}
        found["three"] = {name_of(case): trained(case, three, rank, 3, **group) for case in THREE}
    if rank < 2:
        group = {"process_group": pair.get_group()}
        found["same"] = {name_of(case): trained(case, pair, **group) for case in [*EXACT, *ROUNDED]}
        found["split"] = {name_of(case): trained(case, pair, rank, 2, **group) for case in [*SPLIT, *ALIKE]}
        found["refusals"] = refusals(rank, pair)
        found["followers"] = followers(pair)
        found["meta"] = fsdp.train(fsdp.from_meta(pair), "SET", **group)
        found["low precision"] = low_precision(pair, ones["alone"])
    return found


def assert_same(case: tuple[Any, ...], ranks: list[dict[str, Tensor]], within: float | None) -> None:
    expected = trained(case, None)
    assert expected["updates"] == 4
    fsdp.assert_same(expected, ranks, within)


@pytest.mark.parametrize("case", EXACT, ids=name_of)
def test_two_ranks_with_the_same_data_are_one_process_bit_for_bit(ranks, case):
    assert_same(case, [rank["same"][name_of(case)] for rank in ranks[:2]], None)


@pytest.mark.parametrize("case", ROUNDED, ids=name_of)
def test_two_ranks_with_the_same_data_up_to_the_order_of_a_sum(ranks, case):
    assert_same(case, [rank["same"][name_of(case)] for rank in ranks[:2]], 1e-6)


@pytest.mark.parametrize("case", SPLIT, ids=name_of)
def test_a_batch_split_over_two_ranks(ranks, case):
    assert_same(case, [rank["split"][name_of(case)] for rank in ranks[:2]], 1e-6)


@pytest.mark.parametrize("case", ALIKE, ids=name_of)
def test_ranks_are_alike_where_one_process_differs(ranks, case):
    """Parts of a batch have other random signs; and PyTorch's Adafactor takes norms of a shard for those of all."""
    first, second = (rank["split"][name_of(case)] for rank in ranks[:2])
    assert first["updates"] == 4 and all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("case", THREE, ids=name_of)
def test_a_batch_split_over_three_ranks_with_uneven_and_empty_shards(ranks, case):
    assert_same(case, [rank["three"][name_of(case)] for rank in ranks[:3]], 1e-6)


@pytest.mark.parametrize("case", HYBRID, ids=name_of)
def test_two_copies_of_two_shards_bit_for_bit(ranks, case):
    assert_same(case, [rank["hybrid"][name_of(case)] for rank in ranks], None)


SAID = {
    "other axis": "NotImplementedError: values of '0' are sharded as S(1), and blocks move only where values are",
    "older form": "NotImplementedError: the model is in FullyShardedDataParallel, which flattens parameters",
    "by hand": "NotImplementedError: values of '0' are a DTensor, but not by fully_shard before the method was built",
    "sharded later": "NotImplementedError: values of '0' are a DTensor, but not by fully_shard before the method was",
    "older optimizer": "InputError: values of '0' are not in this optimizer. Build it after sparsify_ (and fully",
    "seed": "InputError: ranks differ in seed (0 on rank 0, 1 on rank 1)",
    "places": "InputError: ranks differ in the blocks of '2' (rank 1 from rank 0)",
    "checkpoint": "InputError: ranks differ in the blocks of '2' (rank 1 from rank 0)",
    "steps": "InputError: ranks differ in the steps made (0 on rank 0, 3 on rank 1)",
}


@pytest.mark.parametrize("what", SAID)
def test_what_cannot_train_is_refused_before_the_first_step(ranks, what):
    for rank in ranks[:2]:
        assert rank["refusals"][what].startswith(SAID[what])


def test_followers_sharded_or_not_and_a_sharded_copy(ranks):
    """The mean of a second moment over shards is a sum in another order."""
    expected = followers(None)
    assert expected["told"].numel() and not expected["whole"].all() and not expected["like"].all()
    fsdp.assert_same(expected, [rank["followers"] for rank in ranks[:2]], 1e-6)


def test_a_model_built_on_the_meta_device(ranks):
    fsdp.assert_same(fsdp.train(fsdp.linear(), "SET"), [rank["meta"] for rank in ranks[:2]])


def test_parameters_gathered_in_low_precision(ranks):
    """Two ranks are compared with one on the ranks."""
    assert all(rank["low precision"] == ["SET", "RigL", "GSE"] for rank in ranks[:2])
