"""The table of bad input for models, checkpoints, methods and recipes; see :mod:`tests.bad_layers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import sparsekern as sk
from sparsekern.lab import Config
from sparsekern.training import Schedule
from tests.bad_input_parts import (
    INF,
    NAN,
    Case,
    case,
    closure_of,
    ints,
    layer,
    loads,
    method,
    model,
    moved_away,
    optimizer_before,
    plain,
    poisoned_values,
    shared_module,
    shared_weight,
    state_of,
    trained,
    without,
)


def agent(**options: Any) -> sk.AGENT:
    made = model()
    return sk.AGENT(made, torch.optim.SGD(made.parameters(), lr=0.1), method=None, **options)


def model_cases() -> Iterator[Case]:
    """Yield the cases of whole models, checkpoints, training methods, and the options of a recipe."""
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
    yield case(
        "a sparsity map with a gap", lambda: model(sparsity={"0": 0.5}), ValueError, "no entry that matches '2'", "'*'"
    )
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
        "init is 'norm'",
    )
    yield case("a summary of no model", lambda: sk.summary(None), TypeError, "model is None", "torch.nn.Module")
    yield case(
        "a summary with an optimizer by its name",
        lambda: sk.summary(model(), optimizer="adam"),
        TypeError,
        "optimizer is a str",
        "torch.optim.Optimizer",
    )
    yield case("a summary beside nothing", lambda: sk.summary(model(), dense=1), TypeError, "dense is a int", "Module")
    yield case("saving nothing", lambda: sk.save(None, "x.pt"), TypeError, "model is None", "torch.nn.Module")
    yield case("saving nowhere", lambda: sk.save(model(), None), TypeError, "path is None", "name of a file")
    yield case("loading nothing", lambda: sk.load_(model(), None), TypeError, "source is None", "a state dict")
    yield case("loading into nothing", lambda: sk.load_(None, "x.pt"), TypeError, "model is None", "torch.nn.Module")
    yield case(
        "statistics of nothing", lambda: sk.recalibrate_norms(None, []), TypeError, "model is None", "torch.nn.Module"
    )
    yield case("gamma as a text", lambda: agent(gamma="x"), TypeError, "gamma is 'x'", "a number")
    yield case("half a batch", lambda: agent(batches=0.5), TypeError, "batches is 0.5", "whole number")
    yield case("a state of nothing", lambda: method().load_state_dict(None), TypeError, "state is None", "state_dict()")
    yield case(
        "AGENT's state of nothing", lambda: agent().load_state_dict([]), TypeError, "state is a list", "state_dict()"
    )
    yield case("following a text", lambda: method().follow("x", layer="0"), TypeError, "target is a str", "a tensor")
    yield case("a summary of nothing", lambda: sk.summary(nn.ReLU()), ValueError, "no sparse layer", "nothing to")
    yield case(
        "a summary of a wrong input", lambda: sk.summary(model(), torch.ones(2, 3)), ValueError, "in_features = 32"
    )
    yield case("refreshing what is no model", lambda: sk.refresh_(3), TypeError, "model is a int", "nn.Module")

    # Checkpoints.
    yield case("values alone", lambda: loads(layer(), row=None, col=None), RuntimeError, "not row, col", "together")
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
    yield case("another version's state", lambda: state_of(sk.SET, version=99), ValueError, "version 99", "reads 2")
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
