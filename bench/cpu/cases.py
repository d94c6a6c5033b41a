"""What is raced on a CPU: the cases of the full run and those of ``--quick``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

OPS = ("fwd", "dvalues", "step")
"""``step`` is forward + backward: y, then dx and dvalues."""

WIDE, LARGE, SMALL = (512, 1024, 4096), (2048, 4096, 1024), (128, 1024, 1024)
"""(tokens, in_features, out_features)"""

SPARSITIES = (0.5, 0.75, 0.9, 0.95, 0.99)
BLOCKS = (32, 1, 16, 64)
FEW_TOKENS = (1, 2, 4, 8, 16)


class Case(NamedTuple):
    """What is measured."""

    op: str
    dtype: str
    tokens: int
    in_features: int
    out_features: int
    block: int
    sparsity: float
    threads: int = 1

    @property
    def key(self) -> str:
        """The name in the results."""
        return f"{self.op} {self.dtype} {self.shape_title} b{self.block} s{self.sparsity:g} t{self.threads}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, in features, out features."""
        return self.tokens, self.in_features, self.out_features

    @property
    def shape_title(self) -> str:
        """The shape in words."""
        return "x".join(map(str, self.shape))

    @property
    def layer(self) -> str:
        """The contestant that is the package through autograd."""
        return "SparseLinear"

    @property
    def usual(self) -> tuple[str, str]:
        """The ratio's name in the results, and the dense contestant that it is against."""
        return "linear", "F.linear"

    @property
    def scene(self) -> Case:
        """The same case, but for what its numbers do not depend on: cases that agree here share their tensors."""
        return self._replace(op="step", threads=1)


def cases(cores: int) -> list[Case]:
    """Return the cases of the full run that have no more threads than there are cores, sharing tensors in a row."""
    every = dict.fromkeys(
        (
            *_series("step", LARGE, block=32, threads=(1, 2)),
            *_series("step", LARGE, block=1, sparsities=(0.9,)),
            *_series("step", WIDE, block=32, threads=(1, 2)),
            *_series("step", WIDE, block=1, threads=(1, 2)),
            *(c for block in (16, 64) for c in _series("step", WIDE, block=block)),
            *(c for op in ("fwd", "dvalues") for c in _series(op, WIDE, block=32)),
            *_series("fwd", WIDE, block=1, sparsities=(0.5, 0.9, 0.99)),
            *_series("fwd", WIDE, block=32, dtype="bf16"),
            *_series("step", WIDE, block=32, dtype="bf16", threads=(1, 2)),
            *(c for b in (1, 16, 64) for c in _series("step", WIDE, block=b, dtype="bf16", sparsities=(0.9,))),
            *(c for block in BLOCKS for c in _series("step", SMALL, block=block, threads=(1, 2))),
            *(
                case
                for block in (32, 1)
                for tokens in FEW_TOKENS
                for op in ("fwd", "step")
                for case in _series(op, (tokens, *WIDE[1:]), block=block, sparsities=(0.9,))
            ),
        )
    )
    order = {scene: number for number, scene in enumerate(dict.fromkeys(case.scene for case in every))}
    ordered = sorted(every, key=lambda case: (order[case.scene], OPS.index(case.op), case.threads))
    return [case for case in ordered if case.threads <= cores]


def quick_cases() -> list[Case]:
    """Return the few that take a minute."""
    return [case for block in (32, 1) for case in _series("step", WIDE, block=block, sparsities=(0.5, 0.9, 0.99))]


def _series(
    op: str,
    shape: tuple[int, int, int],
    *,
    block: int,
    dtype: str = "fp32",
    sparsities: tuple[float, ...] = SPARSITIES,
    threads: tuple[int, ...] = (1,),
) -> Iterator[Case]:
    for sparsity in sparsities:
        yield from (Case(op, dtype, *shape, block, sparsity, count) for count in threads)
