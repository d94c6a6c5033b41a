"""The table of bad input for the library: what a user writes, the exception, and what its one sentence must say.

:mod:`tests.test_bad_input` evaluates each line.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.topology import Grid, Topology, from_keys

NAN, INF = float("nan"), float("inf")


def layer(**options: Any) -> sk.SparseLinear:
    return sk.SparseLinear(32, 32, **{"sparsity": 0.5, "block_size": 8, "seed": 0} | options)


def conv(**options: Any) -> sk.SparseConv2d:
    return sk.SparseConv2d(8, 8, **{"kernel_size": 3, "sparsity": 0.5, "block_size": 4, "seed": 0} | options)


def conv1d(**options: Any) -> sk.SparseConv1d:
    return sk.SparseConv1d(8, 8, **{"kernel_size": 3, "sparsity": 0.5, "block_size": 4, "seed": 0} | options)


def loose() -> Topology:
    """Return a block in one tap of a convolution."""
    return from_keys(conv().grid, torch.tensor([0]))


def model(**options: Any) -> nn.Module:
    return sk.sparsify_(plain(), **{"sparsity": 0.5, "block_size": 8} | options)


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def method(kind: Any = sk.SET, made: nn.Module | None = None, **options: Any) -> Any:
    made = model() if made is None else made
    return kind(made, torch.optim.SGD(made.parameters(), lr=0.1), **options)


def loss(made: nn.Module, value: float = 1.0) -> Tensor:
    return (made(torch.ones(4, 32)) * value).sum()


def place(made: Any, row: list[int], col: list[int]) -> Any:
    """Write places behind the layer's back."""
    made.row[: len(row)] = torch.tensor(row, dtype=torch.int32)
    made.col[: len(col)] = torch.tensor(col, dtype=torch.int32)
    return made


def ints(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def topology(row: Tensor, col: Tensor) -> Topology:
    return Topology(Grid(32, 32, (8, 8)), row, col)


def trained(kind: Any, poison: float, **options: Any) -> None:
    """Take a step whose gradients are not finite, then update."""
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.0)
    sparse = kind(made, optimizer, update_every=1, **options)
    for _ in range(3):
        sparse.backward(lambda: loss(made, poison))
        optimizer.step()
        optimizer.zero_grad()
        sparse.step()


def poisoned_values(kind: Any, poison: float) -> None:
    made = model()
    with torch.no_grad():
        made[0].values[0, 0, 0] = poison
    method(kind, made).update()


def state_of(kind: Any, **changes: Any) -> None:
    sparse = method(kind)
    sparse.load_state_dict(sparse.state_dict() | changes)


def without(entry: str) -> None:
    sparse = method()
    state = sparse.state_dict()
    del state[entry]
    sparse.load_state_dict(state)


def loads(made: nn.Module, **changes: Any) -> None:
    state = made.state_dict()
    for key, value in changes.items():
        if value is None:
            del state[key]
        else:
            state[key] = value
    made.load_state_dict(state)


def shared_module() -> nn.Module:
    inner = nn.Linear(32, 32)
    return nn.Sequential(inner, nn.ReLU(), inner)


def shared_weight() -> nn.Module:
    made = plain()
    made[2].weight = made[0].weight
    return made


def optimizer_before() -> None:
    made = plain()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    sk.sparsify_(made, 0.5, 8)
    sk.SET(made, optimizer)


def moved_away() -> None:
    made = model()
    sparse = method(sk.SET, made)
    sparse.follow(copy.deepcopy(made))
    keys = made[0].topology.keys()
    empty = next(k for k in range(16) if k not in keys.tolist())
    made[0].move_(ints(0).long(), ints(empty // 4), ints(empty % 4))
    sparse.update()


def closure_of(result: Any) -> None:
    method().backward(lambda: result)


def index_for(made: sk.SparseLinear, **changes: Any) -> Tensor:
    parts: dict[str, Any] = {"x": torch.ones(4, 32), "values": made.values, "bias": made.bias, "index": made.index}
    return sk.ops.linear(**parts | {"grid": made.grid} | changes)


def in_backend(name: str) -> Tensor:
    with sk.backend(name):
        return layer(block_size=3)(torch.ones(2, 32))


def agent(**options: Any) -> sk.AGENT:
    made = model()
    return sk.AGENT(made, torch.optim.SGD(made.parameters(), lr=0.1), method=None, **options)


CASES: list[tuple[Any, ...]] = [
    # Building layers.
    ("sk.SparseLinear(0, 8)", ValueError, "in_features is 0", "1 or more"),
    ("sk.SparseLinear(8, -2)", ValueError, "out_features is -2", "1 or more"),
    ("sk.SparseLinear(8.5, 8)", TypeError, "in_features is 8.5", "whole number"),
    ('sk.SparseLinear("8", 8)', TypeError, "in_features is '8'", "whole number"),
    ("layer(sparsity=1)", ValueError, "sparsity is 1", "[0, 1)"),
    ("layer(sparsity=90)", ValueError, "sparsity is 90", "did you mean 0.9?"),
    ("layer(sparsity=-0.1)", ValueError, "sparsity is -0.1", "[0, 1)"),
    ("layer(sparsity=NAN)", ValueError, "sparsity is nan", "[0, 1)"),
    ('layer(sparsity="0.9")', TypeError, "sparsity is '0.9'", "number"),
    ("layer(sparsity=None)", TypeError, "sparsity is None", "number"),
    ("layer(sparsity=0.99)", ValueError, "sparsity 0.99", "lower the spars"),
    ("layer(blocks=0)", ValueError, "0 blocks", "1 to 16"),
    ("layer(blocks=17)", ValueError, "17 blocks", "1 to 16", "change"),
    ("layer(blocks=2.5)", TypeError, "blocks is 2.5", "whole number"),
    ("layer(blocks=4, capacity=3)", ValueError, "capacity is 3", "4"),
    ("layer(block_size=0)", ValueError, "block_size is (0, 0)", "1 or more"),
    ("layer(block_size=8.0)", TypeError, "block_size is 8.0", "int or a pair"),
    ("layer(block_size=(8, 8, 8))", TypeError, "(8, 8, 8)", "pair of ints"),
    ('layer(block_size="8")', TypeError, "block_size is '8'", "int or a pair"),
    ("layer(init=[])", ValueError, "init is []", "balanced, random"),
    ('layer(dtype="float32")', TypeError, "dtype is 'float32'", "torch.float32"),
    ("conv(dtype=5)", TypeError, "dtype is 5", "torch.float32"),
    ("layer(topology=5)", TypeError, "topology is a int", "or None to draw"),
    ('conv(topology="x")', TypeError, "topology is a str", "or None to draw"),
    ("layer().move_([0], [0], [0])", TypeError, "slots is a list", "a tensor (k,)"),
    ("layer().move_(ints(0), None, ints(0))", TypeError, "row is None", "a tensor"),
    ("sk.SparseLinear.from_dense(None)", TypeError, "dense is None", "an nn.Linear"),
    ("sk.SparseConv2d.from_dense(nn.Linear(8, 8))", TypeError, "dense is a Linear", "an nn.Conv2d"),
    ('sk.load_(layer(), layer().state_dict() | {"row": [0]})', ValueError, "row is a list", "must be a tensor"),
    ('sk.load_(nn.Linear(2, 2), {"weight": "w", "bias": "b"})', ValueError, "bias is a str, in the model a tensor"),
    ('layer(init="normal")', ValueError, "init is 'normal'", "balanced, random"),
    ("layer(dtype=torch.int32)", TypeError, "torch.int32", "floating"),
    ('layer(device="gpu")', RuntimeError, "gpu"),
    ('layer(seed="a")', TypeError, "seed is 'a'", "whole number"),
    ("sk.SparseLinear(16, 32, topology=layer().topology)", ValueError, "for a weight (32, 32)", "layer has (32, 16)"),
    ("sk.SparseLinear(72, 8, topology=conv().topology)", ValueError, "a weight (8, 8, 3, 3)", "layer has (8, 72)"),
    ("sk.SparseConv2d(0, 8, 3)", ValueError, "in_channels is 0", "1 or more"),
    ("conv(groups=3)", ValueError, "is 8", "multiple of groups = 3"),
    ("sk.SparseConv2d(8, 8, 0)", ValueError, "kernel_size is 0", "1 or more"),
    ("sk.SparseConv2d(8, 8, 1.5)", TypeError, "kernel_size is 1.5", "pair"),
    ("conv(stride=0)", ValueError, "stride is", "1 or more"),
    ("conv(padding=-1)", ValueError, "padding is -1", "0 or more"),
    ('conv(padding="sane")', ValueError, "padding is 'sane'", "same"),
    ('conv(padding="same", stride=2)', ValueError, "'same'", "stride"),
    ('conv(padding_mode="zero")', ValueError, "'zero'", "one of zeros"),
    ("conv(tie_taps=True, blocks=10)", ValueError, "blocks is 10", "multiple of the 9 taps"),
    ("conv(tie_taps=True, topology=loose())", ValueError, "is stored in 1 of 9 taps", "it must be all or none"),
    ("sk.SparseConv2d(8, 8, (3, 3, 3))", TypeError, "kernel_size is (3, 3, 3)", "an int or a pair of ints"),
    ("conv(dilation=(1, 0))", ValueError, "dilation is (1, 0)", "1 or more"),
    ("conv1d(kernel_size=(3, 3))", TypeError, "kernel_size is (3, 3)", "an int or a tuple of one"),
    ("conv1d(kernel_size=0)", ValueError, "kernel_size is 0", "1 or more"),
    ('conv1d(padding="same", stride=2)', ValueError, "'same', which is not defined for stride"),
    ("conv1d(topology=conv(kernel_size=(1, 3)).topology)", ValueError, "the layer has (8, 8, 3)"),
    ("sk.SparseLinear.from_dense(nn.Linear(12, 8), sparsity=2)", ValueError, "sparsity is 2", "[0, 1)"),
    ("sk.SparseLinear.from_dense(nn.Linear(12, 8), blocks=7, block_size=4)", ValueError, "7 blocks", "1 to 6"),
    # What a layer is given.
    ("layer()(torch.ones(4, 31))", ValueError, "(4, 31)", "in_features = 32"),
    ("layer()(torch.tensor(1.0))", ValueError, "shape ()", "in_features = 32"),
    ("layer()(torch.ones(4, 32).int())", TypeError, "input is torch.int32", "floating"),
    ("layer()(torch.ones(4, 32).double())", TypeError, "float64", ".to()", "autocast"),
    ("layer()(torch.ones(4, 32) + 0j)", TypeError, "complex64", "real"),
    ('layer()(torch.ones(4, 32, device="meta"))', ValueError, "meta", ".to()"),
    ("layer()([[1.0] * 32])", TypeError, "input is a list", "torch.Tensor"),
    ("conv()(torch.ones(1, 8, 2, 2))", ValueError, "(1, 8, 2, 2)", "padding"),
    ("conv()(torch.ones(1, 3, 8, 8))", ValueError, "in_channels = 8"),
    ("conv()(torch.ones(8, 8))", ValueError, "(N, C, H, W)"),
    ("conv1d()(torch.ones(2, 5, 9))", ValueError, "(2, 5, 9)", "must be (N, C, L) or (C, L) with C = in_channels = 8"),
    ("conv1d()(torch.ones(9))", ValueError, "input has shape (9,); it must be"),
    ("conv1d()(torch.ones(8, 2))", ValueError, "(8, 2)", "shorter than the kernel (3,)", "padding (0, 0)"),
    ("conv1d()([1.0])", TypeError, "input is a list", "torch.Tensor"),
    ("conv1d()(torch.ones(8, 9).double())", TypeError, "input is torch.float64 but values are torch.float32"),
    ("index_for(layer(), values=torch.ones(8, 4, 4))", ValueError, "(slots"),
    ("index_for(layer(), bias=torch.ones(3))", ValueError, "bias", "(32,)"),
    ("index_for(layer(), index=layer(blocks=3).index)", ValueError, "index is for 3"),
    ("index_for(layer(), grid=Grid(32, 32, (4, 4)))", ValueError, "(slots, 4, 4)"),
    ('sk.backend("cuda")', ValueError, "backend is 'cuda'", "auto, gpu, cpu"),
    ('in_backend("cpu")', NotImplementedError, "'cpu'", "backend('auto')"),
    ('index_for(layer(), probe=Probe("grad", torch.zeros(1), ()))', ValueError, "probe kind is 'grad'", "one of"),
    ("layer().weight + 1", TypeError, "to_dense()"),
    ("torch.linalg.norm(layer().weight)", TypeError, "to_dense()"),
    # Topologies made by hand.
    (
        "sk.SparseLinear(32, 32, topology=topology(ints(1, 1), ints(2, 2)))",
        ValueError,
        "slots 0 and 1 are both at block (1, 2)",
        "once",
    ),
    ("build_index(topology(ints(1, 1), ints(2, 2)))", ValueError, "slots 0 and 1 are both at block (1, 2)", "once"),
    ("build_index(topology(ints(1, 4), ints(2, 0)))", ValueError, "slot 1 is at block (4, 0)", "4 x 4"),
    ("from_keys(Grid(8, 8, (4, 4)), torch.tensor([4]))", ValueError, "keys hold 4", "0 to 3"),
    ("from_keys(Grid(8, 8, (4, 4)), torch.tensor([1, 1]))", ValueError, "both at block (0, 1)", "once"),
    ("place(layer(), [1, 1], [1, 1]).refresh_()", ValueError, "(1, 1)"),
    ("layer().move_(ints(0), layer().row[1:2], layer().col[1:2])", ValueError, "are both at block"),
    ("layer().move_(ints(0), ints(9), ints(0))", ValueError, "row is 9", "0 to 3"),
    ("layer().move_(ints(99), ints(0), ints(0))", ValueError, "slots holds 99", "0 to 7"),
    ("layer().move_(ints(0, 0), ints(0, 1), ints(0, 1))", ValueError, "a slot twice"),
    ("layer().move_(ints(0, 1), ints(0, 1), ints(0))", ValueError, "slots, row and col have shapes (2,), (2,), (1,)"),
    ("layer().move_(ints(0), torch.tensor([0.5]), ints(0))", ValueError, "row is torch.float32", "integers"),
    ("from_mask(Grid(8, 8, (4, 4)), torch.ones(8, 8))", ValueError, "(2, 2)"),
    ("from_mask(Grid(8, 8, (4, 4)), torch.zeros(2, 2))", ValueError, "0 blocks"),
    ("by_norm(Grid(8, 8, (4, 4)), torch.full((8, 8), NAN), 2)", ValueError, "weight holds NaN"),
    ("with_capacity(layer().topology, 1)", ValueError, "capacity is 1", "8"),
    ("Grid(2 ** 16, 2 ** 16, (1, 1))", ValueError, "2**31", "larger blocks"),
    ("Grid(8, 8, (4,))", ValueError, "block_size is (4,)", "pair"),
    ("Grid(8, 8, (4, 4), kernel=(3, 3))", ValueError, "in_features is 8", "9 taps"),
    ("conv_grid(8, 9, (1, 1), (4, 4), groups=2)", ValueError, "out_channels is 9"),
    ("gather_blocks(layer().topology, torch.ones(8, 8))", ValueError, "(8"),
    ("by_norm(Grid(8, 8, (4, 4)), torch.zeros(8, 9), 1)", ValueError, "weight has shape (8, 9)", "(8, 8)"),
    ("by_norm(Grid(8, 8, (4, 4)), torch.zeros(8, 8), 5)", ValueError, "5 blocks", "1 to 4"),
    ("Grid(4, 9, (2, 2), kernel=(3, 3), groups=3)", ValueError, "out_features is 4", "multiple of the 3 groups"),
    ("allocate([Grid(8, 8, (4, 4))], 1.5)", ValueError, "sparsity is 1.5", "[0, 1)"),
    ('allocate([Grid(8, 8, (4, 4))], 0.5, "ERK")', ValueError, "'ERK'", "one of uniform, er, er-matrix, erk"),
    ("allocate([Grid(8, 8, (8, 8))] * 3, 0.5)", ValueError, "3 layer(s)"),
    ("check_multiple(conv().grid, 4)", ValueError, "blocks is 4", "9 taps"),
    ("sample_distinct(3, 4, torch.Generator())", ValueError, "4", "3"),
    # sparsify_, densify, summary.
    ("model(ignore=[3])", TypeError, "selector is 3", "it must be"),
    ("sk.sparsify_(nn.Linear(8, 8))", ValueError, "SparseLinear.from_dense"),
    ("sk.sparsify_(nn.Conv2d(8, 8, 3))", ValueError, "itself an nn.Conv2d", "SparseConv2d.from_dense"),
    ('model(capacity="2")', TypeError, "capacity is '2'", "a number"),
    ('model(init_scale="2")', TypeError, "init_scale is '2'", "a number"),
    ("sk.sparsify_([nn.Linear(8, 8)])", TypeError, "model is a list", "nn.Module"),
    ("sk.sparsify_(shared_module(), 0.5, 8)", ValueError, "0", "shared", "ignore="),
    ("sk.sparsify_(shared_weight(), 0.5, 8)", ValueError, "shared", "ignore="),
    ("sk.sparsify_(nn.Sequential(nn.MultiheadAttention(8, 2)), 0.5, 4)", ValueError, "out_proj", "ignore="),
    ("sk.sparsify_(model(), 0.5)", ValueError, "targets", "matches"),
    ("model(block_size=64, sparsity=0.9)", ValueError, "smaller blocks"),
    (
        'sk.sparsify_(nn.Sequential(nn.Linear(8, 8, device="meta")), 0.5, 4, init="norm")',
        ValueError,
        "meta device",
        "init is 'norm'",
    ),
    ("sk.summary(None)", TypeError, "model is None", "torch.nn.Module"),
    ('sk.summary(model(), optimizer="adam")', TypeError, "optimizer is a str", "torch.optim.Optimizer"),
    ("sk.summary(model(), dense=1)", TypeError, "dense is a int", "Module"),
    ('sk.save(None, "x.pt")', TypeError, "model is None", "torch.nn.Module"),
    ("sk.save(model(), None)", TypeError, "path is None", "name of a file"),
    ("sk.load_(model(), None)", TypeError, "source is None", "a state dict"),
    ('sk.load_(None, "x.pt")', TypeError, "model is None", "torch.nn.Module"),
    ("sk.recalibrate_norms(None, [])", TypeError, "model is None", "torch.nn.Module"),
    ('agent(gamma="x")', TypeError, "gamma is 'x'", "a number"),
    ("agent(batches=0.5)", TypeError, "batches is 0.5", "whole number"),
    ("method().load_state_dict(None)", TypeError, "state is None", "state_dict()"),
    ("agent().load_state_dict([])", TypeError, "state is a list", "state_dict()"),
    ('method().follow("x", layer="0")', TypeError, "target is a str", "a tensor"),
    ("sk.summary(nn.ReLU())", ValueError, "no sparse layer", "nothing to"),
    ("sk.summary(model(), torch.ones(2, 3))", ValueError, "in_features = 32"),
    ("sk.refresh_(3)", TypeError, "model is a int", "nn.Module"),
    # Checkpoints.
    ("loads(layer(), row=None, col=None)", RuntimeError, "not row, col", "together"),
    ("loads(layer(), row=ints(1))", RuntimeError, "damaged"),
    ("loads(layer(), row=ints(*8 * [0]), col=ints(*8 * [0]))", RuntimeError, "both at block (0, 0)"),
    ("layer().load_state_dict(nn.Linear(16, 32).state_dict())", RuntimeError, "(32, 16)"),
    ("layer(topology=None).load_state_dict({})", RuntimeError, "values"),
    # Training methods.
    ("sk.SET(model(), None)", TypeError, "optimizer is a NoneType", "torch.optim.Optimizer"),
    ("method(made=plain())", ValueError, "no sparse layer", "sparsify_ first"),
    ("optimizer_before()", ValueError, "'0'", "Build it after sparsify_"),
    ("sk.SET(model(), torch.optim.SGD(model().parameters()))", ValueError, "not in this optimizer"),
    ("sk.SET((made := model()), torch.optim.LBFGS(made.parameters()))", ValueError, "LBFGS", "AdamW"),
    ("method(update_every=0)", ValueError, "update_every is 0", "1 or more"),
    ("method(update_every=2.5)", TypeError, "update_every is 2.5", "whole"),
    ("method(start=-1)", ValueError, "start is -1", "0 or more"),
    ("method(start=9, stop=3)", ValueError, "stop is 3", "start = 9"),
    ("method(stop=NAN)", ValueError, "stop is nan", "number of"),
    ("method(drop_fraction=1.5)", ValueError, "drop_fraction is 1.5", "[0, 1]"),
    ("method(drop_fraction=NAN)", ValueError, "drop_fraction is nan", "[0, 1]"),
    ('method(drop_fraction="0.3")', TypeError, "drop_fraction is '0.3'", "number"),
    ("method(drop_fraction=lambda step: 2.0).update()", ValueError, "drop_fraction is 2.0"),
    ('sk.GSE(model(), 0, scope="model")', ValueError, "scope is 'model'", "layer, global"),
    ('method(scope="global")', ValueError, "scope is no option of SET", "leave it out"),
    ("method(min_age=-1)", ValueError, "min_age is -1", "0 or more"),
    ('method(grown_state="ones")', ValueError, "'ones'", "zero, mean_v"),
    ("Schedule(0, 0, None, 0.3)", ValueError, "update_every is 0"),
    ('sk.preset("sett", model(), None, steps=9)', ValueError, "preset is 'sett'", "one of set-mocanu, set-rigl"),
    ('sk.preset(["gse"], model(), None, steps=9)', ValueError, "preset is ['gse']", "one of"),
    ("closure_of(None)", ValueError, "type NoneType", "one number"),
    ("closure_of(torch.ones(3))", ValueError, "shape (3,)"),
    ("closure_of(1.0)", ValueError, "type float", "one number"),
    ("closure_of(torch.tensor(1.0))", ValueError, "loss", "requires no grad"),
    ("method().backward(torch.tensor(1.0))", TypeError, "closure is a Tensor", "lambda"),
    ("method(sk.RigL).update()", RuntimeError, "no scores", "step()"),
    ("trained(sk.SET, NAN)", ValueError, "values of '0'", "lower the"),
    ("poisoned_values(sk.SET, NAN)", ValueError, "values of '0'", "NaN"),
    ("poisoned_values(sk.SET, INF)", ValueError, "values of '0'", "inf"),
    ("method(sk.VRPGE, sparsity=0.1)", ValueError, "sparsity"),
    ("method(sk.VRPGE, sparsity=2)", ValueError, "sparsity is 2", "[0, 1)"),
    ("method().follow(torch.ones(8))", ValueError, "layer is missing"),
    ('method().follow(torch.ones(8), layer="9")', ValueError, "'9'"),
    ('method().follow(torch.ones(3), layer="0")', ValueError, "(3,)", "8 slots"),
    ('method().follow(torch.ones(8), layer="0", on_move="reset")', ValueError, "'reset'", "'zero'"),
    ("method(made=(x := model())).follow(x)", ValueError, "deep copy"),
    ("method().follow(plain())", ValueError, "none", "those of the model"),
    ("moved_away()", ValueError, "other blocks in a copy", "same checkpoint"),
    ('state_of(sk.SET, method="RigL")', ValueError, "of RigL", "this is SET"),
    ("state_of(sk.SET, version=99)", ValueError, "version 99", "reads 2"),
    ("state_of(sk.SET, start={})", ValueError, "the model has 0, 2"),
    ('without("steps")', ValueError, "lacks steps"),
    ("sk.recalibrate_norms(nn.BatchNorm1d(4), [])", ValueError, "batches is empty"),
    # Sparse-IFT.
    ("sparse_wide(nn.ReLU(), 0.5)", TypeError, "layer is a ReLU"),
    ("sparse_doped(nn.Linear(64, 64), 0.9, block_size=64)", ValueError, "one block in each takes 4096", "smaller"),
    ("sparse_factorized(nn.Linear(8, 8), 1.0)", ValueError, "sparsity is 1"),
    ("sparse_factorized(nn.Linear(8, 8), 75)", ValueError, "sparsity is 75", "did you mean 0.75?"),
    ("sparse_doped(nn.Conv1d(8, 8, 1), 0.5)", TypeError, "layer is a Conv1d", "an nn.Linear or nn.Conv2d"),
    ("sparse_parallel(nn.Linear(9, 5), 0.2)", ValueError, "sparsity 0.2 makes one branch", "needs two: 1/3 or more"),
    ("sparse_parallel(nn.Conv2d(8, 8, 3, groups=4), 0.5)", ValueError, "layer has groups = 4", "of one group"),
    # Sizes that are no whole numbers.
    ("sk.SparseLinear(torch.ones(2), 8)", TypeError, "in_features is tensor([1., 1.])", "it must be a whole number"),
    ('sk.SparseLinear(torch.tensor(3, device="meta"), 8)', TypeError, "in_features is tensor(", "it must be a whole"),
    ("sk.SparseLinear(numpy.float64(8), 8)", TypeError, "in_features is np.float64(8.0)", "it must be a whole number"),
    ("sk.SparseLinear(torch.tensor(True), 8)", TypeError, "in_features is tensor(True)", "it must be a whole number"),
    (
        "sk.SparseLinear(8, 8, block_size=numpy.array([4, 4]))",
        TypeError,
        "block_size is array",
        "an int or a pair of ints",
    ),
    ("sk.SparseLinear(8, 8, blocks=1, block_size=8, capacity=1.5)", TypeError, "capacity is 1.5", "it must be a whole"),
    ("sk.SparseConv2d(8, 8, 3, groups=1.0)", TypeError, "groups is 1.0", "it must be a whole number"),
    ("sk.SparseConv2d(8.0, 8, 3)", TypeError, "in_channels is 8.0", "it must be a whole number"),
    ("sk.SparseConv2d(8, 8, (3, 3.0))", TypeError, "kernel_size is (3, 3.0)", "it must be an int or a pair of ints"),
    ("Grid(8, 8, (4, 4.0))", TypeError, "block_size is 4.0", "it must be a whole number"),
]
"""An expression, the exception that it raises, and parts of its sentence: name, value, rule, way out."""

NAMES = {
    **vars(sk.topology),
    **vars(sk.training),
    **vars(sk.transforms),
    "Probe": sk.ops.Probe,
    "numpy": numpy,
    **globals(),
}
"""What the expressions name."""
