"""The request of ``sparsekern bench``: what is raced, read from the texts of the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.layer_race import LayerInput, kind_of, layer_inputs
from sparsekern.errors import InputError
from sparsekern.lab.config import Config, check_device
from sparsekern.lab.recipes import RECIPES, find
from sparsekern.lab.resolved import build, resolve, usable_device
from sparsekern.nn import is_replaceable, left_dense
from sparsekern.topology import check_sparsity
from sparsekern.topology.arguments import check_choice

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What is raced: the values of the texts that :func:`read_request` took, each tuple with each."""

    linear: tuple[Sizes, ...]
    tokens: int
    conv: tuple[Sizes, ...]
    stride: int
    image: Sizes | None
    model: str | None
    input: Sizes | None
    sparsity: tuple[float, ...]
    block: tuple[Sizes, ...]
    dtype: tuple[str, ...]
    threads: tuple[int, ...]
    device: torch.device
    peers: bool
    seconds: float


def read_request(
    *,
    linear: list[str] | None = None,
    tokens: int = 512,
    conv: list[str] | None = None,
    stride: int = 1,
    image: str | None = None,
    model: str | None = None,
    input: str | None = None,
    sparsity: str = "0.5,0.75,0.9,0.95",
    block: str = "1,16,32",
    dtype: str = "float32",
    threads: str | None = None,
    device: str = "cpu",
    peers: bool = False,
    seconds: float = 0.7,
) -> Request:
    """Return the request that texts describe. The command shows what is said of them here.

    Args:
        linear: a linear layer, INxOUT. Repeat it for more. Default: 1024x4096, if nothing else is named.
        tokens: rows of the input of linear layers.
        conv: a convolution, INxOUTxKERNEL, such as 64x128x3, with padding that keeps the image's size at stride 1.
            Repeat it for more.
        stride: of the convolutions.
        image: input of convolutions or of a recipe, BATCHxHEIGHTxWIDTH. Default: 32x32x32.
        model: every layer of a model: a recipe of `sparsekern train --list`, or module:function, which is called
            without arguments and returns the model, or the model and a sample of its input.
        input: shape of the model's input, such as 8x3x224x224, if no sample is returned.
        sparsity: fractions absent, with commas between them.
        block: sides of the blocks, or OUTxIN such as 32x16, with commas between them.
        dtype: of the layers: float32, bfloat16, float16 or float64, or several with commas between them.
        threads: numbers of threads, with commas between them. Default: PyTorch's.
        device: where to race: cpu, cuda or cuda:<number>.
        peers: race other libraries, too: SparseLab, where it is installed.
        seconds: time of a race after which five rounds are enough.

    Raises:
        ValueError: one of them is no such text, or asks for what this machine has not.
    """
    for name, number in (("tokens", tokens), ("stride", stride)):
        if number < 1:
            raise InputError(f"{name} is {number}; it must be 1 or more", parameter=name)
    if not 0 < seconds < float("inf"):
        raise InputError(f"seconds is {seconds:g}; it must be a number above 0", parameter="seconds")
    if input is not None and model is None:
        raise InputError("input is given without a model; add --model, or drop it", parameter="input")
    if image is not None and not conv and model is None:
        raise InputError("image is given without a convolution or recipe; add --conv, or drop it", parameter="image")
    if not linear and not conv and model is None:
        linear = ["1024x4096"]
    check_device(device)
    found = usable_device(device)
    return Request(
        linear=tuple(sizes("linear", text, (2,), "INxOUT such as 1024x4096") for text in linear or ()),
        tokens=tokens,
        conv=tuple(sizes("conv", text, (3,), "INxOUTxKERNEL such as 64x128x3") for text in conv or ()),
        stride=stride,
        image=None if image is None else sizes("image", image, (3,), "BATCHxHEIGHTxWIDTH such as 32x32x32"),
        model=model,
        input=None if input is None else sizes("input", input, (), "a shape such as 8x3x224x224"),
        sparsity=tuple(sorted(_sparsity(text) for text in _parts("sparsity", sparsity))),
        block=tuple(_block(text) for text in _parts("block", block)),
        dtype=tuple(_dtype(text) for text in _parts("dtype", dtype)),
        threads=_threads(threads, found),
        device=found,
        peers=peers,
        seconds=seconds,
    )


def usable_cores() -> int:
    """Return how many cores this process may use, which in a container is less than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parts(name: str, text: str) -> list[str]:
    """Return the different entries of a list with commas, in their order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(f"{name} is {text!r}; it must be a value, or several with commas between them", parameter=name)
    return list(dict.fromkeys(parts))


def sizes(name: str, text: str, counts: tuple[int, ...], form: str) -> Sizes:
    """Return the numbers of a text such as "64x128x3".

    Raises:
        ValueError: they are not, or as many as none of ``counts``, if that is not empty. The text says the form.
    """
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (counts and len(parts) not in counts):
        raise InputError(f"{name} is {text!r}; it must be {form}", parameter=name)
    return tuple(map(int, parts))


def _block(text: str) -> Sizes:
    sides = sizes("block", text, (), "sides of blocks such as 1,16,32, or OUTxIN such as 32x16")
    if len(sides) > 2:
        raise InputError(f"block is {text!r}; it must be one side, or OUTxIN such as 32x16", parameter="block")
    return (sides[0], sides[-1])


def _sparsity(text: str) -> float:
    try:
        sparsity = float(text)
    except ValueError:
        raise InputError(
            f"sparsity is {text!r}; it must be a fraction such as 0.9, or several such as 0.5,0.9", parameter="sparsity"
        ) from None
    check_sparsity(sparsity)
    return sparsity


def _dtype(text: str) -> str:
    check_choice("dtype", text, DTYPES)
    return text


def _threads(text: str | None, device: torch.device) -> tuple[int, ...]:
    if text is None:
        return (torch.get_num_threads(),)
    if device.type != "cpu":
        raise InputError(f"threads is {text!r}, but {device} is raced, which has none; drop it", parameter="threads")
    found, cores = [], usable_cores()
    for part in _parts("threads", text):
        if not part.isdecimal() or not 1 <= int(part) <= cores:
            raise InputError(
                f"threads is {part!r}; it must be a number from 1 to {cores}, the cores that there are",
                parameter="threads",
            )
        found.append(int(part))
    return tuple(found)


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
    batch, _ = run.task.example(images)
    return build(run, "dense", 0).to(request.device), batch.to(request.device)
