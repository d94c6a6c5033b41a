"""The table of bad input for layers and topologies: what a user does wrong, the exception, what it must say."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import sparsekern as sk
from sparsekern.ops import Probe
from sparsekern.topology import (
    Grid,
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
from tests.bad_input_parts import (
    NAN,
    Case,
    case,
    conv,
    in_backend,
    index_for,
    ints,
    layer,
    place,
    topology,
)


def layer_cases() -> Iterator[Case]:
    """Yield the cases of layers, what they are given, and topologies made by hand."""
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
    yield case("an init that is no name", lambda: layer(init=[]), ValueError, "init is []", "balanced, random")
    yield case("a dtype by its name", lambda: layer(dtype="float32"), TypeError, "dtype is 'float32'", "torch.float32")
    yield case("a convolution's dtype", lambda: conv(dtype=5), TypeError, "dtype is 5", "torch.float32")
    yield case("a topology that is none", lambda: layer(topology=5), TypeError, "topology is a int", "or None to draw")
    yield case(
        "a convolution's topology", lambda: conv(topology="x"), TypeError, "topology is a str", "or None to draw"
    )
    yield case("a move in lists", lambda: layer().move_([0], [0], [0]), TypeError, "slots is a list", "a tensor (k,)")
    yield case("a move to nowhere", lambda: layer().move_(ints(0), None, ints(0)), TypeError, "row is None", "a tensor")
    yield case(
        "from no dense layer", lambda: sk.SparseLinear.from_dense(None), TypeError, "dense is None", "an nn.Linear"
    )
    yield case(
        "a convolution from a linear layer",
        lambda: sk.SparseConv2d.from_dense(torch.nn.Linear(8, 8)),
        TypeError,
        "dense is a Linear",
        "an nn.Conv2d",
    )
    yield case(
        "a state that holds no tensors",
        lambda: sk.load_(layer(), layer().state_dict() | {"row": [0]}),
        ValueError,
        "row is a list",
        "must be a tensor",
    )
    yield case(
        "a dense state that holds no tensors",
        lambda: sk.load_(torch.nn.Linear(2, 2), {"weight": "w", "bias": "b"}),
        ValueError,
        "bias is a str, in the model a tensor",
    )
    yield case("unknown init", lambda: layer(init="normal"), ValueError, "init is 'normal'", "balanced, random")
    yield case("values that cannot train", lambda: layer(dtype=torch.int32), TypeError, "torch.int32", "floating")
    yield case("an unknown device", lambda: layer(device="gpu"), RuntimeError, "gpu")
    yield case("seed as a string", lambda: layer(seed="a"), TypeError, "seed is 'a'", "whole number")
    yield case(
        "another layer's topology",
        lambda: sk.SparseLinear(16, 32, topology=layer().topology),
        ValueError,
        "topology is for a weight (32, 32)",
        "the layer has (32, 16)",
    )
    yield case(
        "a conv's topology in a linear layer",
        lambda: sk.SparseLinear(72, 8, topology=conv().topology),
        ValueError,
        "topology is for a weight (8, 8, 3, 3)",
        "the layer has (8, 72)",
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
