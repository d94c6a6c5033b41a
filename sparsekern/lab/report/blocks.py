"""Block maps as small images: a pixel a block, or a tile of blocks."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

EMPTY, KEPT, DROPPED, GROWN = "#f4f4f1", "#1d3f5e", "#9db8cc", "#e07b39"
"""Colours of no block, a block since the start, a block at the start only, and a block grown since."""

LEVELS = 4
"""Shades from the emptiest to the fullest pixel, and mixtures of kept and grown blocks."""

BLANK = 2
"""The shade between the panels of a kernel."""


def panels(image: numpy.ndarray, kernel: tuple[int, ...] | None, blank: int) -> numpy.ndarray:
    """Arrange the columns ``(tap, channel)`` of an image ``(H, W)`` as one panel a tap, in the shape of the kernel.

    Args:
        image: of a layer's grid. That of a linear layer or a pointwise convolution is returned as it is.
        kernel: ``(kh, kw)``, ``(kw,)``, or None for a linear layer.
        blank: value of the gaps.
    """
    import numpy

    kh, kw = taps(kernel)
    if kh * kw == 1:
        return image
    tall, wide = image.shape[0], image.shape[1] // (kh * kw)
    by_tap = image.reshape(tall, kh, kw, wide).transpose(1, 0, 2, 3)  # (kh, H, kw, columns of a tap)
    gap = panel_gap(tall, wide)
    spaced = numpy.pad(by_tap, ((0, 0), (0, gap), (0, 0), (0, gap)), constant_values=blank)
    tall, wide = kh * (tall + gap), kw * (wide + gap)
    return spaced.reshape(tall, wide)[: tall - gap, : wide - gap]


def taps(kernel: tuple[int, ...] | None) -> tuple[int, int]:
    """Return rows and columns of a kernel of one or two dimensions; 1 and 1 for a linear layer."""
    rows, cols = (1, *(kernel or (1,)))[-2:]
    return rows, cols


def panel_gap(tall: int, wide: int) -> int:
    """Return the pixels between two panels of ``tall x wide`` pixels."""
    return max(1, max(tall, wide) // 12)


def shades(
    now: numpy.ndarray, kept: numpy.ndarray, start: numpy.ndarray, fullest: int, kernel: tuple[int, ...] | None
) -> numpy.ndarray:
    """Return the index into :func:`palette` of each pixel ``(H, W)``, with a kernel's taps as panels.

    Args:
        now, kept, start: ``(H, W)`` uint8, how full each pixel is: of the present blocks, of those of them that were
            there at the start, and of the blocks at the start.
        fullest: the largest ``now`` of all images that are to be compared.
        kernel: of a convolution.
    """
    import numpy

    now, kept = now.astype(int), kept.astype(int)
    level = -(-LEVELS * now // max(1, fullest))  # 1 or more where there is anything
    share = (LEVELS * kept + now // 2) // numpy.maximum(now, 1)
    shade = BLANK + 1 + (level - 1) * (LEVELS + 1) + share
    return panels(numpy.where(now > 0, shade, start > 0).astype(numpy.uint8), kernel, BLANK)


def palette(other: str = GROWN) -> numpy.ndarray:
    """Return the colours ``(n, 3)`` uint8: empty, dropped, blank, then by level and share of kept and other blocks."""
    import numpy
    from matplotlib.colors import to_rgb

    empty, kept, dropped, grown = (255 * numpy.array(to_rgb(colour)) for colour in (EMPTY, KEPT, DROPPED, other))
    share = numpy.linspace(0, 1, LEVELS + 1)[:, None]
    full = numpy.rint(grown + share * (kept - grown))
    level = numpy.linspace(0, 1, LEVELS + 1)[1:, None, None]
    mixed = (empty + level * (full - empty)).reshape(-1, 3)
    colours: numpy.ndarray = numpy.rint(numpy.vstack([empty, dropped, [255, 255, 255], mixed]))
    return colours.astype(numpy.uint8)


def png(shade: numpy.ndarray) -> str:
    """Return an image of :func:`shades` as a ``data:`` address."""
    from PIL import Image

    image = Image.frombytes("P", shade.shape[::-1], shade.tobytes())
    image.putpalette(palette().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
