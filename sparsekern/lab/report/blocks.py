"""Block maps as small images: a pixel a place, or a tile of places."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

EMPTY, KEPT, DROPPED, GROWN = "#f4f4f1", "#1d3f5e", "#9db8cc", "#e07b39"
"""No block; there from the start; there at the start only; grown since."""

LEVELS = 4
"""Shades from nearly empty to the fullest pixel, and mixtures of kept and grown blocks."""

BLANK = 2
"""Of :func:`shades`: between the panels of a kernel."""


def panels(image: numpy.ndarray, kernel: tuple[int, ...] | None, blank: int) -> numpy.ndarray:
    """Arrange the columns ``(tap, channel)`` of an image ``(H, W)`` as one panel a tap, in the shape of the kernel.

    Args:
        image: of a layer's grid; that of a linear layer, and of a pointwise convolution, stays as it is.
        kernel: ``(kh, kw)``, ``(kw,)``, or None.
        blank: the value of the gaps.
    """
    import numpy

    kh, kw = (1, *(kernel or (1,)))[-2:]
    if kh * kw == 1:
        return image
    tall, wide = image.shape[0], image.shape[1] // (kh * kw)
    by_tap = image.reshape(tall, kh, kw, wide).transpose(1, 0, 2, 3)  # (kh, H, kw, columns of a tap)
    gap = panel_gap(tall, wide)
    spaced = numpy.pad(by_tap, ((0, 0), (0, gap), (0, 0), (0, gap)), constant_values=blank)
    tall, wide = kh * (tall + gap), kw * (wide + gap)
    return spaced.reshape(tall, wide)[: tall - gap, : wide - gap]


def panel_gap(tall: int, wide: int) -> int:
    """Return the pixels between two panels of ``tall x wide`` pixels."""
    return max(1, max(tall, wide) // 12)


def shades(
    now: numpy.ndarray, kept: numpy.ndarray, start: numpy.ndarray, fullest: int, kernel: tuple[int, ...] | None
) -> numpy.ndarray:
    """Return the number in :func:`palette` of each pixel ``(H, W)``, the taps of a kernel as panels.

    Args:
        now, kept, start: ``(H, W)`` uint8, how full each pixel is: with the blocks there are, with those of them that
            were there at the start, and at the start.
        fullest: the largest ``now`` of all images that are to be compared.
        kernel: ``(kh, kw)`` of a convolution.
    """
    import numpy

    now, kept = now.astype(int), kept.astype(int)
    level = -(-LEVELS * now // max(1, fullest))  # 1 or more where there is anything
    share = (LEVELS * kept + now // 2) // numpy.maximum(now, 1)
    shade = BLANK + 1 + (level - 1) * (LEVELS + 1) + share
    return panels(numpy.where(now > 0, shade, start > 0).astype(numpy.uint8), kernel, BLANK)


def palette() -> list[tuple[int, int, int]]:
    """Return the colours: no block, no longer a block, blank, then by level and share of kept blocks."""
    empty, kept, dropped, grown = (_rgb(colour) for colour in (EMPTY, KEPT, DROPPED, GROWN))
    colours = [empty, dropped, (255, 255, 255)]
    for level in range(1, LEVELS + 1):
        for share in range(LEVELS + 1):
            colours.append(_mixed(empty, _mixed(grown, kept, share / LEVELS), level / LEVELS))
    return colours


def png(shade: numpy.ndarray) -> str:
    """Return an image of :func:`shades` as a ``data:`` address."""
    from PIL import Image

    image = Image.frombytes("P", shade.shape[::-1], shade.tobytes())
    image.putpalette([part for colour in palette() for part in colour])
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _mixed(one: Sequence[int], other: Sequence[int], share: float) -> tuple[int, int, int]:
    """Return a colour of which a share is the other one."""
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(one, other, strict=True))
    return red, green, blue
