"""Cases and made-up rows for the tests of the race on a CPU."""

from __future__ import annotations

from rich.console import Console

from bench.cpu.cases import WIDE, Case
from bench.cpu.contestants import DENSE, OURS
from bench.cpu.conv_cases import SHAPES, ConvCase, Shape, conv_case
from bench.cpu.results import rows_of
from bench.gpu.contestants import SPARSE, Contestant
from sparsekern.analysis.clock import Timing

HEAD = Case("step", "fp32", *WIDE, 32, 0.9)
TINY = Case("step", "fp32", 24, 64, 128, 16, 0.75)
CONV_HEAD = conv_case("step", SHAPES[0], 32, 0.9)
CONV_TINY = conv_case("step", Shape(32, 7, 48, images=2), 16, 0.75)


def made_up(case: Case | ConvCase = HEAD, **ms: float) -> list[dict]:
    """Return the rows of a case in which each contestant took the milliseconds given for it."""
    kinds = dict.fromkeys(("sparsekern", "SparseLinear", "SparseConv2d", "avx2"), OURS)
    kinds |= dict.fromkeys(("linear", "onednn", "channels_last", "contiguous"), DENSE)
    names = {
        "linear": "F.linear",
        "onednn": "oneDNN",
        "csr": "torch-csr",
        "bsr": "torch-bsr",
        "avx2": "sparsekern-avx2",
    }
    timings = {names.get(name, name): Timing([0.9 * t, t, 1.2 * t]) for name, t in ms.items()}
    taking_part = {
        names.get(name, name): Contestant(name, kinds.get(name, SPARSE), lambda: None, lambda _: {}) for name in ms
    }
    elements = round((1 - case.sparsity) * case.in_features * case.out_features)
    common = {"device": "a processor", "path": "avx512", "torch": "2", "commit": "abc", "date": "2026-11-21"}
    return [{**row, **common} for row in rows_of(case, elements, taking_part, timings)]


def text_of(table) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
