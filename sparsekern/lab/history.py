"""A film of the blocks of a network while it trained: small images, bounded in number and size.

It is part of a checkpoint's state, so a run that was killed and resumed has the same film as one that was not.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.errors import InputError
from sparsekern.topology import Grid
from sparsekern.training import Method

LAYERS = 6
"""Layers that are filmed at most: those with most places, whose pictures show most."""

PIXELS = 2**14
"""Of one image, at most (but one a tap and group): a grid with more places is shown in tiles of several blocks."""

FRAMES = 24
"""Images of one layer, at most. When there are more, every other one goes, and from then on every other is taken."""


@dataclass(frozen=True)
class View:
    """How a grid of blocks becomes an image: ``tile x tile`` blocks a pixel, cut inside each group and tap."""

    grid: Grid
    tile: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the image."""
        grid = self.grid
        return grid.groups * -(-grid.group_rows // self.tile), grid.taps * -(-grid.tap_cols // self.tile)

    def share(self, keys: Tensor) -> Tensor:
        """Return how much of each pixel the blocks at ``keys (n,)`` fill: ``(H, W)`` uint8, 0 none and 255 all.

        A pixel in which there is any block is never 0.
        """
        grid, (height, width) = self.grid, self.shape
        row = self._pixels(torch.arange(grid.rows), grid.group_rows)
        col = self._pixels(torch.arange(grid.cols), grid.tap_cols)
        keys = keys.long()
        at = row[keys // grid.cols] * width + col[keys % grid.cols]
        count = torch.bincount(at, minlength=height * width).view(height, width)
        places = torch.bincount(row, minlength=height)[:, None] * torch.bincount(col, minlength=width)
        return torch.div(255 * count + places - 1, places, rounding_mode="floor").to(torch.uint8)

    def _pixels(self, line: Tensor, part: int) -> Tensor:
        """Return the pixel of each block row, or column, of which each group, or tap, has ``part``."""
        return line // part * -(-part // self.tile) + line % part // self.tile


def view_of(grid: Grid) -> View:
    """Return the finest view of a grid that has no more than :data:`PIXELS` pixels."""
    tile, last = 1, max(grid.group_rows, grid.tap_cols)
    while tile < last and (shape := View(grid, tile).shape)[0] * shape[1] > PIXELS:
        tile += 1
    return View(grid, tile)


class History:
    """Films the sparse layers that a method moves: a frame before the first update and one after each, thinned out.

    Args:
        method: moves the blocks of the model that is filmed.
        state: of an earlier :meth:`state_dict`, to go on from; None to begin here.

    Raises:
        ValueError: the state is of other layers.
    """

    def __init__(self, method: Method, state: dict[str, Any] | None = None) -> None:
        layers = method.layers
        largest = sorted(layers, key=lambda name: -layers[name].grid.cells)[:LAYERS]
        self._layers = {name: layer for name, layer in layers.items() if name in largest}
        self._views = {name: view_of(layer.grid) for name, layer in self._layers.items()}
        self._method = method
        self._start: dict[str, Tensor] = dict(method.first_keys)
        self._frames: list[dict[str, Any]] = [] if state is None else list(state["frames"])
        self._every = 1 if state is None else state["every"]
        self._updates = method.updates
        if state is not None and {name: tuple(about["shape"]) for name, about in state["layers"].items()} != {
            name: view.shape for name, view in self._views.items()
        }:
            raise InputError("the block maps are of other layers than those of the run")
        if state is None:
            self._frames.append(self._frame())

    def step(self) -> None:
        """Take a frame if the method has just updated the topology. Call it after every step of the method."""
        if self._method.updates == self._updates:
            return
        self._updates = self._method.updates
        if self._frames[-1]["update"] % self._every:  # it was there as the newest one only
            self._frames.pop()
        self._frames.append(self._frame())
        if len(self._frames) > FRAMES:
            self._every *= 2
            newest = self._frames[-1]
            self._frames = [f for f in self._frames if f["update"] % self._every == 0 or f is newest]

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors from which :func:`film` reads, and a resumed run goes on."""
        layers = {
            name: {"shape": view.shape, "tile": view.tile, "rows": view.grid.rows, "cols": view.grid.cols}
            | {"kernel": view.grid.kernel, "groups": view.grid.groups, "block": view.grid.block}
            for name, view in self._views.items()
        }
        start = {name: _packed(view.share(self._start[name])) for name, view in self._views.items()}
        return {"every": self._every, "layers": layers, "start": start, "frames": list(self._frames)}

    def _frame(self) -> dict[str, Any]:
        images, blocks = {}, {}
        for name, view in self._views.items():
            now = self._layers[name].topology.sorted_keys().cpu()
            kept = now[torch.isin(now, self._start[name])]
            images[name] = _packed(torch.stack([view.share(now), view.share(kept)]))
            blocks[name] = (now.shape[0], kept.shape[0])
        return {"step": self._method.steps, "update": self._updates, "images": images, "blocks": blocks}


@dataclass(frozen=True)
class Frame:
    """One image of a layer, after so many steps and updates: ``now`` and ``kept`` are ``(H, W)`` uint8.

    They say how much of each pixel is filled, by all blocks and by those at places of the first topology. ``blocks``
    is the number of both.
    """

    step: int
    update: int
    blocks: tuple[int, int]
    now: Tensor
    kept: Tensor


def film(state: dict[str, Any], layer: str) -> tuple[Tensor, list[Frame]]:
    """Return the film of a layer from :meth:`History.state_dict`: the image ``(H, W)`` of the start, and the frames.

    Raises:
        ValueError: an image is not one of the shape that the state tells.
    """
    shape = tuple(state["layers"][layer]["shape"])
    frames = [
        Frame(frame["step"], frame["update"], frame["blocks"][layer], *_unpacked(frame["images"][layer], (2, *shape)))
        for frame in state["frames"]
    ]
    return _unpacked(state["start"][layer], shape), frames


def _packed(images: Tensor) -> Tensor:
    """Return the images deflated, as a tensor: the reader of checkpoints lets those pass."""
    return torch.frombuffer(bytearray(zlib.compress(images.numpy().tobytes(), 9)), dtype=torch.uint8)


def _unpacked(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = math.prod(shape)
    reader = zlib.decompressobj()
    try:
        pixels = reader.decompress(packed.numpy().tobytes(), size + 1)  # however large it says that it is
    except zlib.error as error:
        raise InputError(f"a block map is damaged: {error}") from None
    if len(pixels) != size:
        raise InputError(f"a block map is damaged: it has not the {size} pixels of its shape")
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape)
