"""The layers that ``sparsekern bench`` races: of given sizes, or those of a model on a sample of its input."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.layer_race import LayerInput, kind_of, layer_inputs
from sparsekern.errors import InputError
from sparsekern.lab.bench.request import Request
from sparsekern.lab.config import Config
from sparsekern.lab.networks import build
from sparsekern.lab.recipes import RECIPES, find
from sparsekern.lab.resolved import resolve
from sparsekern.nn import is_replaceable, left_dense

IMAGE = (32, 32, 32)
"""Batch, height and width of the input of convolutions, unless another is given."""

NOISE = {"classes": 10, "train_bytes": 2**20, "held_out_bytes": 2**20}
"""Data of a recipe, beside images: only its sizes count."""


@dataclass(frozen=True)
class Subject:
    """A dense layer that is raced against sparse ones.

    Attributes:
        title: what the tables call it.
        layer: the layer.
        given: its input.
        count: number of equal layers in the model.
    """

    title: str
    layer: nn.Module
    given: LayerInput
    count: int = 1

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of a dense forward pass."""
        assert isinstance(self.layer.weight, Tensor)
        return self.given.tokens * self.layer.weight.numel()


def subjects(request: Request) -> list[Subject]:
    """Return the layers of a request, in float32.

    Raises:
        ValueError: the model cannot be made, or has no layer that could be sparse.
    """
    torch.manual_seed(0)
    found = [*_of_sizes(request)]
    if request.model is not None:
        found += _of_model(*_model(request))
    return found


def _of_sizes(request: Request) -> Iterator[Subject]:
    device = request.device
    for inputs, outputs in request.linear:
        x = torch.randn(request.tokens, inputs, device=device)
        title = f"linear {inputs} -> {outputs}, {request.tokens} tokens"
        yield Subject(title, nn.Linear(inputs, outputs, device=device), LayerInput(x, tokens=request.tokens))
    images, height, width = request.image or IMAGE
    for channels, outputs, kernel in request.conv:
        layer = nn.Conv2d(channels, outputs, kernel, request.stride, kernel // 2, device=device)
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = torch.randn(images, channels, height, width, device=device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            tokens = layer(x)[:, 0].numel()
        stride = "" if request.stride == 1 else f", stride {request.stride}"
        title = f"conv {channels} -> {outputs}, {kernel}x{kernel}{stride}, {images} images of {height}x{width}"
        yield Subject(title, layer, LayerInput(x, tokens=tokens))


def _of_model(model: nn.Module, sample: Any) -> list[Subject]:
    layers = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if is_replaceable(module) and left_dense(module) is None
    }
    found: dict[Any, Subject] = {}
    for name, given in layer_inputs(model, layers, sample).items():
        kind = kind_of(layers[name], given)
        known = found.get(kind)
        found[kind] = Subject(name, layers[name], given) if known is None else replace(known, count=known.count + 1)
    if not found:
        raise InputError("model has no layer that could be sparse, or the sample reaches none", parameter="model")
    return [replace(one, title=one.title + f" (x{one.count})" * (one.count > 1)) for one in found.values()]


def _model(request: Request) -> tuple[nn.Module, Any]:
    """Return a model on the device of the request, and a sample of its input."""
    name = str(request.model)
    if ":" not in name:
        return _recipe(request, name)
    made = _call(name)
    model, sample = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {name!r}, which returns an object of class {type(model).__name__}; it must return a "
            "torch.nn.Module, or one and a sample of its input",
            parameter="model",
        )
    if request.input is not None:
        sample = torch.randn(request.input)
    if sample is None:
        raise InputError(
            f"model is {name!r}, which returns no sample of its input; give --input such as 8x3x224x224",
            parameter="input",
        )
    move = torch.utils._pytree.tree_map_only
    return model.to(request.device), move(Tensor, lambda tensor: tensor.to(request.device), sample)


def _call(name: str) -> Any:
    """Return what ``module:function`` returns; modules of the current folder are found."""
    module_name, _, function_name = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
        return function()
    except Exception as error:  # code of the user
        raise InputError(
            f"model is {name!r}, which fails with {type(error).__name__}: {' '.join(str(error).split())}; it must be "
            "module:function, called without arguments",
            parameter="model",
        ) from error


def _recipe(request: Request, name: str) -> tuple[nn.Module, Any]:
    """Return the dense network of a recipe, and a batch of noise."""
    if name not in RECIPES:
        raise InputError(
            f"model is {name!r}; it must be module:function, or one of the recipes {', '.join(RECIPES)}",
            parameter="model",
        )
    if request.input is not None:
        raise InputError("input is given, but a recipe has its own; drop it, or give --image", parameter="input")
    recipe = find(name)
    images, height, width = request.image or (recipe.batch_size, *IMAGE[1:])
    described = NOISE | {"train_images": images, "image_shape": (3, height, width)}
    run = resolve(
        Config(recipe=name, batch_size=images, device=str(request.device)), recipe.task.noise(described, images)
    )
    generator = torch.Generator().manual_seed(0)
    batch, _ = run.task.batch(run.task.order(generator), 0, images, generator)
    return build(run, "dense", 0).to(request.device), batch.to(request.device)
