import base64
import io

import numpy
import pytest
from PIL import Image

from sparsekern.lab.report.charts import (
    BLANK,
    DROPPED,
    EMPTY,
    GROWN,
    KEPT,
    LEVELS,
    palette,
    panel_gap,
    panels,
    png,
    shades,
)

FULL = BLANK + 1 + (LEVELS - 1) * (LEVELS + 1)
"""Shade of a full pixel of grown blocks alone; LEVELS more is one of kept blocks alone."""


def image(*rows):
    return numpy.array(rows, dtype=numpy.uint8)


def rgb(colour):
    return tuple(bytes.fromhex(colour[1:]))


def test_panels_have_the_shape_of_the_kernel():
    rows = image([1, 2, 3, 4], [5, 6, 7, 8])  # taps (0,0), (0,1), (1,0), (1,1) of one column each
    assert panel_gap(2, 1) == 1 and panel_gap(24, 12) == 2
    assert panels(rows, (2, 2), 9).tolist() == [[1, 9, 2], [5, 9, 6], [9, 9, 9], [3, 9, 4], [7, 9, 8]]


@pytest.mark.parametrize("kernel", [None, (1, 1)])
def test_a_single_panel_is_the_image(kernel):
    rows = image([1, 2], [3, 4])
    assert panels(rows, kernel, 9) is rows


def test_the_shades_of_single_blocks():
    now, kept, start = image([255, 255, 0, 0]), image([255, 0, 0, 0]), image([255, 0, 255, 0])
    assert shades(now, kept, start, 255, None).tolist() == [[FULL + LEVELS, FULL, 1, 0]]
    colours = [tuple(colour) for colour in palette().tolist()]
    assert [colours[i] for i in (FULL + LEVELS, FULL, 1, 0, BLANK)] == [
        *map(rgb, (KEPT, GROWN, DROPPED, EMPTY)),
        (255, 255, 255),
    ]


def test_the_shades_of_tiles():
    now = image([1, 64, 100, 128])  # the fullest is 128
    kept = image([1, 0, 50, 128])
    nothing = numpy.zeros_like(now)
    level, share = [1, 2, 4, 4], [4, 0, 2, 4]
    wanted = [BLANK + 1 + (a - 1) * (LEVELS + 1) + b for a, b in zip(level, share, strict=True)]
    assert shades(now, kept, nothing, 128, None).tolist() == [wanted]
    lightness = [sum(colour) for colour in palette().tolist()[BLANK + 1 + LEVELS :: LEVELS + 1]]
    assert lightness == sorted(lightness, reverse=True), "fuller is darker"


def test_the_taps_of_a_kernel_are_apart():
    shown = shades(*[image([255, 0])] * 3, 255, (1, 2))
    assert shown.tolist() == [[FULL + LEVELS, BLANK, 0]]


def test_a_png_has_the_colours():
    shade = image([0, 1, 2], [FULL, FULL + LEVELS, 3])
    address = png(shade)
    assert address.startswith("data:image/png;base64,")
    read = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
    colours = [tuple(colour) for colour in palette().tolist()]
    assert read.size == (3, 2)
    assert [read.getpixel((x, y)) for y in (0, 1) for x in (0, 1, 2)] == [colours[i] for i in shade.flatten()]
