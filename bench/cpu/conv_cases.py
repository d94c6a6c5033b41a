"""Which convolutions are raced on a CPU: the cases of the full run and those of ``--quick``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sparsekern.kernels.contract import ConvShape

OPS = ("fwd", "step")


class Shape(NamedTuple):
    """A convolution of 32 images with padding that keeps their size at stride 1."""

    in_channels: int
    side: int
    out_channels: int
    kernel: int = 3
    stride: int = 1
    images: int = 32


STAGES = (Shape(64, 32, 64), Shape(128, 16, 128), Shape(256, 8, 256), Shape(512, 4, 512))
"""The convolutions of a ResNet-18 for images of 32 x 32."""
STRIDED, POINTWISE = Shape(64, 32, 128, stride=2), Shape(256, 8, 256, kernel=1)

SHAPES = (*STAGES, STRIDED, POINTWISE)
SPARSITIES = (0.5, 0.75, 0.9, 0.95)


class ConvCase(NamedTuple):
    """What is measured."""

    op: str
    dtype: str
    images: int
    in_channels: int
    side: int
    out_channels: int
    kernel: int
    stride: int
    block: int
    sparsity: float
    threads: int = 1

    @property
    def key(self) -> str:
        """The name in the results."""
        return f"{self.op} {self.dtype} {self.shape_title} b{self.block} s{self.sparsity:g} t{self.threads}"

    @property
    def shape(self) -> Shape:
        """The convolution."""
        return Shape(self.in_channels, self.side, self.out_channels, self.kernel, self.stride, self.images)

    @property
    def shape_title(self) -> str:
        """The convolution in words, such as "32x64x32x32->128 k3 s2"."""
        return shape_title(self.shape)

    @property
    def conv_shape(self) -> ConvShape:
        """The convolution as kernels see it."""
        sides, steps, around = (self.kernel,) * 2, (self.stride,) * 2, (self.kernel // 2,) * 4
        return ConvShape(self.in_channels, self.out_channels, sides, steps, around)  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """Pixels of y."""
        return self.images * (-(-self.side // self.stride)) ** 2

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.kernel**2 * self.in_channels

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.out_channels

    @property
    def layer(self) -> str:
        """The contestant that is the package through autograd."""
        return "SparseConv2d"

    @property
    def usual(self) -> tuple[str, str]:
        """The ratio's name in the results, and the dense contestant that it is against."""
        return "channels_last", "channels_last"

    @property
    def scene(self) -> ConvCase:
        """The same case, but for what its numbers do not depend on."""
        return self._replace(op="step", threads=1)


def shape_title(shape: Shape) -> str:
    """Return a convolution in words: images x channels x rows x columns -> channels, kernel, stride."""
    rows = f"{shape.images}x{shape.in_channels}x{shape.side}x{shape.side}->{shape.out_channels}"
    return f"{rows} k{shape.kernel}" + (f" s{shape.stride}" if shape.stride > 1 else "")


def conv_case(op: str, shape: Shape, block: int, sparsity: float, threads: int = 1) -> ConvCase:
    """Return a case in float32."""
    sizes = (shape.images, shape.in_channels, shape.side, shape.out_channels, shape.kernel, shape.stride)
    return ConvCase(op, "fp32", *sizes, block, sparsity, threads)


def conv_cases(cores: int) -> list[ConvCase]:
    """Return the cases of the full run that have no more threads than there are cores, sharing tensors in a row."""
    every = dict.fromkeys(
        (
            *(c for shape in SHAPES for c in _series("step", shape, threads=(1, 2))),
            *(c for shape in SHAPES for c in _series("fwd", shape, sparsities=(0.5, 0.9))),
            *(c for block in (16, 64, 1) for c in _series("step", STAGES[1], block=block, threads=(1, 2))),
        )
    )
    order = {scene: number for number, scene in enumerate(dict.fromkeys(case.scene for case in every))}
    ordered = sorted(every, key=lambda case: (order[case.scene], OPS.index(case.op), case.threads))
    return [case for case in ordered if case.threads <= cores]


def quick_conv_cases() -> list[ConvCase]:
    """Return the few that take a minute."""
    return [
        *(conv_case("step", shape, 32, 0.9) for shape in SHAPES),
        *(conv_case("step", STAGES[1], 32, sparsity) for sparsity in (0.5, 0.75, 0.95)),
    ]


def _series(
    op: str,
    shape: Shape,
    *,
    block: int = 32,
    sparsities: tuple[float, ...] = SPARSITIES,
    threads: tuple[int, ...] = (1,),
) -> Iterator[ConvCase]:
    for sparsity in sparsities:
        yield from (conv_case(op, shape, block, sparsity, count) for count in threads)
