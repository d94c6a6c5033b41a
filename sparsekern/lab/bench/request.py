"""The request of ``sparsekern bench``: what is raced, read from the texts of the command line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch

from sparsekern.errors import InputError
from sparsekern.lab.resolved import usable_device
from sparsekern.topology import check_sparsity

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """What is raced.

    Attributes:
        linear: ``(in, out)`` of each linear layer.
        tokens: rows of their input.
        conv: ``(in, out, kernel)`` of each convolution, with padding that keeps the image's size at stride 1.
        stride: of the convolutions.
        image: ``(batch, height, width)`` of their input, or None for the default.
        model: ``module:function``, or the name of a recipe; None without a model.
        input: shape of the model's input, or None.
        sparsity, block, dtype, threads: each is raced with each.
        device: device of the race.
        peers: whether other libraries take part.
        seconds: time of a race after which five rounds are enough.
    """

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
    linear: list[str],
    tokens: int,
    conv: list[str],
    stride: int,
    image: str | None,
    model: str | None,
    input: str | None,
    sparsity: str,
    block: str,
    dtype: str,
    threads: str | None,
    device: str,
    peers: bool,
    seconds: float,
) -> Request:
    """Return the request that texts such as "1024x4096" and "0.5,0.9" describe.

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
    found = _device(device)
    return Request(
        linear=tuple(_sizes("linear", text, 2, "INxOUT such as 1024x4096") for text in linear),
        tokens=tokens,
        conv=tuple(_sizes("conv", text, 3, "INxOUTxKERNEL such as 64x128x3") for text in conv),
        stride=stride,
        image=None if image is None else _sizes("image", image, 3, "BATCHxHEIGHTxWIDTH such as 32x32x32"),
        model=model,
        input=None if input is None else _sizes("input", input, None, "a shape such as 8x3x224x224"),
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


def _sizes(name: str, text: str, count: int | None, form: str) -> Sizes:
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or (count is not None and len(parts) != count):
        raise InputError(f"{name} is {text!r}; it must be {form}", parameter=name)
    return tuple(map(int, parts))


def _block(text: str) -> Sizes:
    sizes = _sizes("block", text, None, "sides of blocks such as 1,16,32, or OUTxIN such as 32x16")
    if len(sizes) > 2:
        raise InputError(f"block is {text!r}; it must be one side, or OUTxIN such as 32x16", parameter="block")
    return (sizes[0], sizes[-1])


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
    if text not in DTYPES:
        raise InputError(f"dtype is {text!r}; it must be one of {', '.join(DTYPES)}", parameter="dtype")
    return text


def _device(name: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"device is {name!r}; it must be cpu, cuda or cuda:<number>", parameter="device")
    return usable_device(name)


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
