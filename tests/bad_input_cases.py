"""The table of bad input: what a user does wrong, the exact exception, and what its sentence must say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.ops import Probe
from sparsekern.recipes import Config
from sparsekern.topology import (
    Grid,
    Topology,
    allocate,
    build_index,
    by_norm,
    check_multiple,
    conv_grid,
    from_keys,
    from_mask,
    gather_blocks,
    sample_distinct,
    with_capacity,
)
from sparsekern.training import Schedule

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """``call`` must raise exactly ``error``, in one sentence that holds all of ``says``: name, value, rule, way out."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    says: tuple[str, ...]


def layer(**options: Any) -> sk.SparseLinear:
    return sk.SparseLinear(32, 32, **{"sparsity": 0.5, "block_size": 8, "seed": 0} | options)


def conv(**options: Any) -> sk.SparseConv2d:
    return sk.SparseConv2d(8, 8, 3, **{"sparsity": 0.5, "block_size": 4, "seed": 0} | options)


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


def cases() -> Iterator[Case]:
    """Yield all cases of the library."""

    def case(name: str, call: Callable[[], Any], error: type[Exception], *says: str) -> Case:
        return Case(name, call, error, says)

    # Building layers.
    yield case("no inputs", lambda: sk.SparseLinear(0, 8), ValueError, "in_features is 0", "1 or more")
    yield case("negative outputs", lambda: sk.SparseLinear(8, -2), ValueError, "out_features is -2", "1 or more")
    yield case("features as a float", lambda: sk.SparseLinear(8.5, 8), TypeError, "in_features is 8.5", "whole number")
    yield case("features as a string", lambda: sk.SparseLinear("8", 8), TypeError, "in_features is '8'", "whole number")
    yield case("sparsity of one", lambda: layer(sparsity=1), ValueError, "sparsity is 1", "[0, 1)")
    yield case("sparsity in percent", lambda: layer(sparsity=90), ValueError, "sparsity is 90", "did you mean 0.9?")
    yield case("negative sparsity", lambda: layer(sparsity=-0.1), ValueError, "sparsity is -0.1", "[0, 1)")
    yield case("sparsity that is NaN", lambda: layer(sparsity=NAN), ValueError, "sparsity is nan", "[0, 1)")
    yield case("sparsity as a string", lambda: layer(sparsity="0.9"), TypeError, "sparsity is '0.9'", "number")
    yield case("no sparsity", lambda: layer(sparsity=None), TypeError, "sparsity is None", "number")
    yield case("a layer without a block", lambda: layer(sparsity=0.99), ValueError, "sparsity 0.99", "lower the spars")
    yield case("no blocks", lambda: layer(blocks=0), ValueError, "0 blocks", "1 to 16")
    yield case("too many blocks", lambda: layer(blocks=17), ValueError, "17 blocks", "1 to 16", "change")
    yield case("half a block", lambda: layer(blocks=2.5), TypeError, "blocks is 2.5", "whole number")
    yield case("capacity below the blocks", lambda: layer(blocks=4, capacity=3), ValueError, "capacity is 3", "4")
    yield case("block of size 0", lambda: layer(block_size=0), ValueError, "block_size is (0, 0)", "1 or more")
    yield case("block size as a float", lambda: layer(block_size=8.0), TypeError, "block_size is 8.0", "int or a pair")
    yield case("three block sides", lambda: layer(block_size=(8, 8, 8)), TypeError, "(8, 8, 8)", "pair of ints")
    yield case("block size as a string", lambda: layer(block_size="8"), TypeError, "block_size is '8'", "int or a pair")
    yield case("unknown init", lambda: layer(init="normal"), ValueError, "init is 'normal'", "balanced, random")
    yield case("values that cannot train", lambda: layer(dtype=torch.int32), TypeError, "torch.int32", "floating")
    yield case("an unknown device", lambda: layer(device="gpu"), RuntimeError, "gpu")
    yield case("seed as a string", lambda: layer(seed="a"), TypeError, "seed is 'a'", "whole number")
    yield case(
        "another layer's topology",
        lambda: sk.SparseLinear(16, 32, topology=layer().topology),
        ValueError,
        "topology is for 32 x 32",
        "the layer is 32 x 16",
    )
    yield case(
        "a conv's topology in a linear layer",
        lambda: sk.SparseLinear(72, 8, topology=conv().topology),
        ValueError,
        "topology",
        "convolution",
    )
    yield case("no channels", lambda: sk.SparseConv2d(0, 8, 3), ValueError, "in_channels is 0", "1 or more")
    yield case("groups that do not divide", lambda: conv(groups=3), ValueError, "is 8", "multiple of groups = 3")
    yield case("a kernel of 0", lambda: sk.SparseConv2d(8, 8, 0), ValueError, "kernel_size is 0", "1 or more")
    yield case("a kernel as a float", lambda: sk.SparseConv2d(8, 8, 1.5), TypeError, "kernel_size is 1.5", "pair")
    yield case("a stride of 0", lambda: conv(stride=0), ValueError, "stride is", "1 or more")
    yield case("negative padding", lambda: conv(padding=-1), ValueError, "padding is -1", "0 or more")
    yield case("an unknown padding", lambda: conv(padding="sane"), ValueError, "padding is 'sane'", "same")
    yield case("same padding with a stride", lambda: conv(padding="same", stride=2), ValueError, "'same'", "stride")
    yield case("an unknown padding mode", lambda: conv(padding_mode="zero"), ValueError, "'zero'", "one of zeros")
    yield case(
        "blocks that do not fill the taps",
        lambda: conv(tie_taps=True, blocks=10),
        ValueError,
        "blocks is 10",
        "multiple of the 9 taps",
    )

    # What a layer is given.
    yield case("a wrong width", lambda: layer()(torch.ones(4, 31)), ValueError, "(4, 31)", "in_features = 32")
    yield case("a number", lambda: layer()(torch.tensor(1.0)), ValueError, "shape ()", "in_features = 32")
    yield case("integers", lambda: layer()(torch.ones(4, 32).int()), TypeError, "input is torch.int32", "floating")
    yield case("another dtype", lambda: layer()(torch.ones(4, 32).double()), TypeError, "float64", ".to()", "autocast")
    yield case("complex numbers", lambda: layer()(torch.ones(4, 32) + 0j), TypeError, "complex64", "real")
    yield case("another device", lambda: layer()(torch.ones(4, 32, device="meta")), ValueError, "meta", ".to()")
    yield case("an array", lambda: layer()([[1.0] * 32]), TypeError, "input is a list", "torch.Tensor")
    yield case("an image too small", lambda: conv()(torch.ones(1, 8, 2, 2)), ValueError, "(1, 8, 2, 2)", "padding")
    yield case("an image of other channels", lambda: conv()(torch.ones(1, 3, 8, 8)), ValueError, "in_channels = 8")
    yield case("an image without channels", lambda: conv()(torch.ones(8, 8)), ValueError, "(N, C, H, W)")
    yield case("values of another shape", lambda: index_for(layer(), values=torch.ones(8, 4, 4)), ValueError, "(slots")
    yield case("a bias of another shape", lambda: index_for(layer(), bias=torch.ones(3)), ValueError, "bias", "(32,)")
    yield case("another index", lambda: index_for(layer(), index=layer(blocks=3).index), ValueError, "index is for 3")
    yield case("another grid", lambda: index_for(layer(), grid=Grid(32, 32, (4, 4))), ValueError, "(slots, 4, 4)")
    yield case("an unknown backend", lambda: sk.backend("cuda"), ValueError, "backend is 'cuda'", "auto, gpu, cpu")
    yield case("a backend that cannot", lambda: in_backend("cpu"), NotImplementedError, "'cpu'", "backend('auto')")
    yield case(
        "an unknown probe",
        lambda: index_for(layer(), probe=Probe("grad", torch.zeros(1), ())),
        ValueError,
        "probe kind is 'grad'",
        "one of",
    )
    yield case("computing with the weight", lambda: layer().weight + 1, TypeError, "to_dense()")
    yield case("the weight's norm", lambda: torch.linalg.norm(layer().weight), TypeError, "to_dense()")

    # Topologies made by hand.
    yield case("a place twice", lambda: topology(ints(1, 1), ints(2, 2)).validate(), ValueError, "(1, 2)", "once")
    yield case(
        "a place twice in a layer",
        lambda: sk.SparseLinear(32, 32, topology=topology(ints(1, 1), ints(2, 2))),
        ValueError,
        "slots 0 and 1 are both at block (1, 2)",
        "once",
    )
    yield case(
        "a place twice in an index",
        lambda: build_index(topology(ints(1, 1), ints(2, 2))),
        ValueError,
        "slots 0 and 1 are both at block (1, 2)",
        "once",
    )
    yield case(
        "a place outside an index",
        lambda: build_index(topology(ints(1, 4), ints(2, 0))),
        ValueError,
        "slot 1 is at block (4, 0)",
        "4 x 4",
    )
    yield case("a place outside", lambda: topology(ints(4), ints(0)).validate(), ValueError, "(4, 0)", "4 x 4")
    yield case("half a free slot", lambda: topology(ints(-1), ints(0)).validate(), ValueError, "row = col = -1")
    yield case("places in int64", lambda: topology(ints(1).long(), ints(1)).validate(), ValueError, "int64", "int32")
    yield case("rows without columns", lambda: topology(ints(1, 2), ints(1)).validate(), ValueError, "2 slots", "agree")
    yield case("no slots", lambda: topology(ints(), ints()).validate(), ValueError, "no slots", "at least one")
    yield case(
        "keys outside",
        lambda: from_keys(Grid(8, 8, (4, 4)), torch.tensor([4])),
        ValueError,
        "key 4",
        "0 to 3",
    )
    yield case(
        "a key twice",
        lambda: from_keys(Grid(8, 8, (4, 4)), torch.tensor([1, 1])),
        ValueError,
        "both at block (0, 1)",
        "once",
    )
    yield case("a place twice in a buffer", lambda: place(layer(), [1, 1], [1, 1]).refresh_(), ValueError, "(1, 1)")
    yield case(
        "moving to a taken place",
        lambda: layer().move_(ints(0), layer().row[1:2], layer().col[1:2]),
        ValueError,
        "are both at block",
    )
    yield case("moving outside", lambda: layer().move_(ints(0), ints(9), ints(0)), ValueError, "row is 9", "0 to 3")
    yield case("moving no slot", lambda: layer().move_(ints(99), ints(0), ints(0)), ValueError, "slots to move", "99")
    yield case(
        "moving a slot twice", lambda: layer().move_(ints(0, 0), ints(0, 1), ints(0, 1)), ValueError, "named twice"
    )
    yield case(
        "moving without columns",
        lambda: layer().move_(ints(0, 1), ints(0, 1), ints(0)),
        ValueError,
        "slots, row and col have shapes (2,), (2,), (1,)",
    )
    yield case(
        "moving to half a place",
        lambda: layer().move_(ints(0), torch.tensor([0.5]), ints(0)),
        ValueError,
        "row is torch.float32",
        "integers",
    )
    yield case("a mask of elements", lambda: from_mask(Grid(8, 8, (4, 4)), torch.ones(8, 8)), ValueError, "(2, 2)")
    yield case("an empty mask", lambda: from_mask(Grid(8, 8, (4, 4)), torch.zeros(2, 2)), ValueError, "0 blocks")
    yield case(
        "NaN in a weight to prune",
        lambda: by_norm(Grid(8, 8, (4, 4)), torch.full((8, 8), NAN), 2),
        ValueError,
        "weight holds NaN",
    )
    yield case("a shrinking capacity", lambda: with_capacity(layer().topology, 1), ValueError, "capacity is 1", "8")
    yield case("a grid of 2**31 cells", lambda: Grid(2**16, 2**16, (1, 1)), ValueError, "2**31", "larger blocks")
    yield case("a block of one side", lambda: Grid(8, 8, (4,)), ValueError, "block_size is (4,)", "pair")
    yield case("part of a tap", lambda: Grid(8, 8, (4, 4), kernel=(3, 3)), ValueError, "in_features is 8", "9 taps")
    yield case("part of a group", lambda: conv_grid(8, 9, (1, 1), (4, 4), groups=2), ValueError, "out_channels is 9")
    yield case("a weight of another shape", lambda: gather_blocks(layer().topology, torch.ones(8, 8)), ValueError, "(8")
    yield case(
        "an unknown distribution", lambda: allocate([Grid(8, 8, (4, 4))], 0.5, "ERK"), ValueError, "'ERK'", "erk"
    )
    yield case("fewer blocks than layers", lambda: allocate([Grid(8, 8, (8, 8))] * 3, 0.5), ValueError, "3 layer(s)")
    yield case("tied blocks", lambda: check_multiple(conv().grid, 4), ValueError, "blocks is 4", "9 taps")
    yield case("more draws than there are", lambda: sample_distinct(3, 4, torch.Generator()), ValueError, "4", "3")

    # sparsify_, densify, summary.
    yield case("a selector without a match", lambda: model(ignore=["hed"]), ValueError, "ignore", "'hed'", "no module")
    yield case("a target without a match", lambda: model(targets="fc"), ValueError, "targets", "'fc'", "nearest names")
    yield case("a wrong pattern", lambda: model(ignore="re:("), ValueError, "'re:('", "regular expression")
    yield case("a selector that is a number", lambda: model(ignore=[3]), TypeError, "selector is 3", "it must be")
    yield case(
        "everything ignored", lambda: model(ignore="*"), ValueError, "every target is ignored", "nothing is left"
    )
    yield case("a target that is no layer", lambda: model(targets="1"), ValueError, "'1'", "ReLU", "nn.Linear")
    yield case("a layer of its own", lambda: sk.sparsify_(nn.Linear(8, 8)), ValueError, "SparseLinear.from_dense")
    yield case("not a model", lambda: sk.sparsify_([nn.Linear(8, 8)]), TypeError, "model is a list", "nn.Module")
    yield case(
        "a layer used twice", lambda: sk.sparsify_(shared_module(), 0.5, 8), ValueError, "0", "shared", "ignore="
    )
    yield case("a weight used twice", lambda: sk.sparsify_(shared_weight(), 0.5, 8), ValueError, "shared", "ignore=")
    yield case(
        "an attention module",
        lambda: sk.sparsify_(nn.Sequential(nn.MultiheadAttention(8, 2)), 0.5, 4),
        ValueError,
        "out_proj",
        "ignore=",
    )
    yield case("sparse twice", lambda: sk.sparsify_(model(), 0.5), ValueError, "targets", "matches")
    yield case(
        "an init of sparsify_", lambda: model(init="zeros"), ValueError, "init is 'zeros'", "balanced, random, norm"
    )
    yield case("a sparsity map with a gap", lambda: model(sparsity={"0": 0.5}), ValueError, "no value for '2'", "'*'")
    yield case("a sparsity map without a match", lambda: model(sparsity={"9": 0.5}), ValueError, "sparsity", "'9'")
    yield case("blocks larger than the layer", lambda: model(block_size=64, sparsity=0.9), ValueError, "smaller blocks")
    yield case(
        "a distribution of sparsify_", lambda: model(distribution="even"), ValueError, "'even'", "one of uniform"
    )
    yield case(
        "pruning on the meta device",
        lambda: sk.sparsify_(nn.Sequential(nn.Linear(8, 8, device="meta")), 0.5, 4, init="norm"),
        ValueError,
        "meta device",
        "init='norm'",
    )
    yield case("a summary of nothing", lambda: sk.summary(nn.ReLU()), ValueError, "no sparse layer", "nothing to")
    yield case(
        "a summary of a wrong input", lambda: sk.summary(model(), torch.ones(2, 3)), ValueError, "in_features = 32"
    )
    yield case("refreshing what is no model", lambda: sk.refresh_(3), TypeError, "model is a int", "nn.Module")

    # Checkpoints.
    yield case("values alone", lambda: loads(layer(), row=None, col=None), RuntimeError, "not row, col", "places")
    yield case("fewer places", lambda: loads(layer(), row=ints(1)), RuntimeError, "damaged")
    yield case(
        "a place twice in a checkpoint",
        lambda: loads(layer(), row=torch.zeros(8, dtype=torch.int32), col=torch.zeros(8, dtype=torch.int32)),
        RuntimeError,
        "both at block (0, 0)",
    )
    yield case(
        "a dense weight of another shape",
        lambda: layer().load_state_dict(nn.Linear(16, 32).state_dict()),
        RuntimeError,
        "(32, 16)",
    )
    yield case("a lost topology", lambda: layer(topology=None).load_state_dict({}), RuntimeError, "values")

    # Training methods.
    yield case(
        "no optimizer", lambda: sk.SET(model(), None), TypeError, "optimizer is a NoneType", "torch.optim.Optimizer"
    )
    yield case("no sparse layer", lambda: method(made=plain()), ValueError, "no sparse layer", "sparsify_ first")
    yield case("an optimizer built before sparsify_", optimizer_before, ValueError, "'0'", "Build it after sparsify_")
    yield case(
        "another model's optimizer",
        lambda: sk.SET(model(), torch.optim.SGD(model().parameters())),
        ValueError,
        "not in this optimizer",
    )
    yield case(
        "LBFGS", lambda: sk.SET(made := model(), torch.optim.LBFGS(made.parameters())), ValueError, "LBFGS", "AdamW"
    )
    yield case("update_every of 0", lambda: method(update_every=0), ValueError, "update_every is 0", "1 or more")
    yield case("update_every as a float", lambda: method(update_every=2.5), TypeError, "update_every is 2.5", "whole")
    yield case("a start before the first step", lambda: method(start=-1), ValueError, "start is -1", "0 or more")
    yield case("a stop before the start", lambda: method(start=9, stop=3), ValueError, "stop is 3", "start = 9")
    yield case("a stop that is NaN", lambda: method(stop=NAN), ValueError, "stop is nan", "number of")
    yield case(
        "dropping more than all", lambda: method(drop_fraction=1.5), ValueError, "drop_fraction is 1.5", "[0, 1]"
    )
    yield case("dropping NaN", lambda: method(drop_fraction=NAN), ValueError, "drop_fraction is nan", "[0, 1]")
    yield case("dropping a string", lambda: method(drop_fraction="0.3"), TypeError, "drop_fraction is '0.3'", "number")
    yield case(
        "a function that drops too much",
        lambda: method(drop_fraction=lambda step: 2.0).update(),
        ValueError,
        "drop_fraction is 2.0",
    )
    yield case("a scope that is not one", lambda: method(scope="model"), ValueError, "scope is 'model'", "'layer'")
    yield case("global SET", lambda: method(scope="global"), ValueError, "scope is 'global'", "SET")
    yield case("a negative age", lambda: method(min_age=-1), ValueError, "min_age is -1", "0 or more")
    yield case("an unknown grown_state", lambda: method(grown_state="ones"), ValueError, "'ones'", "zero, mean_v")
    yield case("a schedule of 0", lambda: Schedule(0, 0, None, 0.3), ValueError, "update_every is 0")
    yield case(
        "an unknown preset", lambda: sk.preset("sett", model(), None, steps=9), ValueError, "preset is 'sett'", "one of"
    )
    yield case("a closure that returns nothing", lambda: closure_of(None), ValueError, "type NoneType", "one number")
    yield case("a closure that returns a vector", lambda: closure_of(torch.ones(3)), ValueError, "shape (3,)")
    yield case("a closure that returns a number", lambda: closure_of(1.0), ValueError, "type float", "one number")
    yield case("a loss without a graph", lambda: closure_of(torch.tensor(1.0)), ValueError, "loss", "requires no grad")
    yield case(
        "no closure at all", lambda: method().backward(torch.tensor(1.0)), TypeError, "closure is a Tensor", "lambda"
    )
    yield case("updating without scores", lambda: method(sk.RigL).update(), RuntimeError, "no scores", "step()")
    yield case("gradients that are NaN, SET", lambda: trained(sk.SET, NAN), ValueError, "values of '0'", "lower the")
    yield case("values that are NaN, SET", lambda: poisoned_values(sk.SET, NAN), ValueError, "values of '0'", "NaN")
    yield case("values that are inf, SET", lambda: poisoned_values(sk.SET, INF), ValueError, "values of '0'", "inf")
    yield case("VR-PGE without candidates", lambda: method(sk.VRPGE, sparsity=0.1), ValueError, "sparsity")
    yield case("VR-PGE's sparsity", lambda: method(sk.VRPGE, sparsity=2), ValueError, "sparsity is 2", "[0, 1)")
    yield case("a follower of no layer", lambda: method().follow(torch.ones(8)), ValueError, "layer is missing")
    yield case("a follower of an unknown layer", lambda: method().follow(torch.ones(8), layer="9"), ValueError, "'9'")
    yield case(
        "a follower of other slots", lambda: method().follow(torch.ones(3), layer="0"), ValueError, "(3,)", "8 slots"
    )
    yield case(
        "an unknown on_move",
        lambda: method().follow(torch.ones(8), layer="0", on_move="reset"),
        ValueError,
        "'reset'",
        "'zero'",
    )
    yield case("the model as its own copy", lambda: method(made=(x := model())).follow(x), ValueError, "deep copy")
    yield case(
        "a copy that is another model", lambda: method().follow(plain()), ValueError, "none", "those of the model"
    )
    yield case("a copy left behind", moved_away, ValueError, "other blocks in a copy", "same checkpoint")
    yield case("another method's state", lambda: state_of(sk.SET, method="RigL"), ValueError, "of RigL", "this is SET")
    yield case("another version's state", lambda: state_of(sk.SET, version=99), ValueError, "version 99", "reads 1")
    yield case("other layers' state", lambda: state_of(sk.SET, start={}), ValueError, "the model has 0, 2")
    yield case("part of a state", lambda: without("steps"), ValueError, "lacks steps")
    yield case("no batches", lambda: sk.recalibrate_norms(nn.BatchNorm1d(4), []), ValueError, "batches is empty")

    # The options of a recipe.
    for option, value, rule in (
        ("recipe", "resnet", "did you mean"),
        ("sparsity", 1.0, "[0, 1)"),
        ("sparsity", "x", "must be a number"),
        ("block_size", 0, "whole number of 1 or more"),
        ("block_size", 4096, "smaller blocks or a larger width"),
        ("method", "SET", "one of static, set"),
        ("width", -1, "whole number of 1 or more"),
        ("width_multiplier", 2.0, "give a width"),
        ("augment", "flop", "one of"),
        ("epochs", 0, "whole number of 1 or more"),
        ("epochs", 1.5, "whole number of 1 or more"),
        ("batch_size", True, "whole number of 1 or more"),
        ("rate", 0.0, "above 0"),
        ("rate", INF, "above 0"),
        ("rate", NAN, "above 0"),
        ("update_every", 0, "whole number of 1 or more"),
        ("seeds", 0, "whole number of 1 or more"),
        ("device", "gpu", "cpu, cuda"),
        ("dense", 1, "true or false"),
        ("data", 3, "a path"),
    ):
        yield case(
            f"{option}={value!r}",
            lambda option=option, value=value: Config(**{option: value}),  # type: ignore[misc]
            ValueError,
            option,
            f"{value:g}" if isinstance(value, float) and value == INF else str(value),
            rule,
        )
