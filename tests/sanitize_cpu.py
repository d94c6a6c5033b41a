"""Build the native CPU library with AddressSanitizer and UndefinedBehaviorSanitizer, and run it on random inputs.

    python tests/sanitize_cpu.py [seeds]      (200; ``make soak`` takes 5000)

Every exported function gets, on each instruction set of this machine, this many random inputs and some of fixed sizes
(below 100 seeds each of these on one set alone, by turns), which keep the contract that the checks in Python guarantee;
some of them also with an index of noise, and while another thread writes into it. Each is compared with the oracle on
one of the instruction sets; tests/kernels/cpu does that on all of them, without sanitizers. Scratch memory is allocated
to the byte here and freed after every call: the usual steps of 2 MiB, kept for the next call, would hide a kernel that
reads or writes beyond its own.
``tests/test_cpu_sanitizers.py`` runs this file.
"""

from __future__ import annotations

import os
import random
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from sparsekern.kernels.contract import Index

    from tests.index_noise import Calls
    from tests.oracle import Case
    from tests.oracle_conv2d import ConvCase

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "kernels" / "cpu" / "csrc"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
# Not optimised: GCC takes four times as long to optimise what it has instrumented, and the kernels are soon done.
FLAGS = ["-std=c++17", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-w", *SANITIZE]
PIECES = "constexpr size_t page = size_t(1) << 21;"


def runtimes() -> list[str]:
    """Return the files that must be in a process before Python is; empty where the compiler has none."""
    files = []
    for name in ("libasan.so", "libubsan.so"):
        try:
            said = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return []
        files.append(said.stdout.strip())
    return files if all(Path(file).is_absolute() for file in files) else []


def flags_of_the_build() -> dict[str, list[str]]:
    """Return the sources and the flags of their instruction sets, as setup.py has them.

    Where no processor has AMX, its file compiles to nothing, as with a compiler that does not know it.
    """
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        with mock.patch("setuptools.setup"):
            found: dict[str, list[str]] = runpy.run_path("setup.py")["ISA_FLAGS"]
    finally:
        os.chdir(here)
    processor = Path("/proc/cpuinfo")
    if processor.exists() and "amx_tile" not in processor.read_text():
        found["amx.cpp"] = found["avx512.cpp"]
    return found


def build(folder: Path) -> Path:
    """Return the library, compiled into a folder."""
    for source in CSRC.iterdir():
        text = source.read_text()
        if source.name == "library.cpp":
            assert PIECES in text, f"library.cpp no longer says {PIECES!r}: look where scratch is allocated now"
            text = text.replace(PIECES, "constexpr size_t page = 64;")
        (folder / source.name).write_text(text)

    def compile_one(item: tuple[str, list[str]]) -> str:
        out = str(folder / f"{item[0]}.o")
        subprocess.run([COMPILER, *FLAGS, *item[1], "-c", str(folder / item[0]), "-o", out], check=True)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, flags_of_the_build().items()))
    subprocess.run([COMPILER, *FLAGS, "-shared", "-o", str(folder / "library.so"), *objects], check=True)
    return folder / "library.so"


def cases(seeds: int) -> Iterator[dict[str, Any]]:
    """Yield what is given of each random case of the linear layer; the rest is drawn."""
    import torch

    blocks = ((1, 1), (16, 16), (32, 32), (64, 64), (128, 128), (16, 64), (128, 16), (32, 16))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for seed in range(seeds):
        yield {"block": blocks[seed % 8], "dtype": dtypes[seed % 3]}
    for tokens in (1, 2, 5, 12, 16, 17, 130, 300):
        for block in blocks[:3]:
            yield {"block": block, "dtype": dtypes[tokens % 3], "tokens": tokens}
    for block in ((16, 16), (32, 32)):  # enough for two threads
        for dtype in dtypes[:2]:
            yield {"block": block, "rows": 9, "cols": 9, "blocks": 40, "tokens": 300, "dtype": dtype}
    yield {"block": (1, 1), "rows": 60, "cols": 65, "blocks": 3000, "tokens": 400, "dtype": torch.float32}


def conv_cases(seeds: int) -> Iterator[dict[str, Any]]:
    """The same for convolutions."""
    import torch

    blocks = ((1, 1), (16, 16), (32, 32), (1, 1), (16, 64), (64, 16), (128, 128))
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for seed in range(seeds):
        yield {"block": blocks[seed % 7], "dtype": dtypes[seed % 3]}
    square = {"kernel": (3, 3), "dilation": (1, 1), "groups": 1, "group_out": 33, "group_in": 35}
    for block in ((1, 1), (16, 32)):
        for width in (1, 4, 12, 17, 40):  # rows in turn and by themselves; enough for two threads
            size = {"height": 9, "width": width, "images": 5, "padding": (1, 1, 1, 1), "dtype": dtypes[width % 3]}
            yield {"block": block, **square, **size}
        large = {"height": 150, "width": 130, "images": 1, "group_in": 64, "group_out": 16, "blocks": 4}
        yield {"block": block, "dtype": torch.float32, "kernel": (3, 3), "groups": 1, **large}
    for images in (2, 16, 17):  # two parts of the images
        for block, dtype in (((1, 1), dtypes[0]), ((16, 32), dtypes[0]), ((16, 32), dtypes[1])):
            size = {"height": 20, "width": 23, "images": images, "blocks": 500 // block[0] ** 2 + 2}
            yield {"block": block, "dtype": dtype, **square, **size}


LEVELS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")


def sweep(library_file: Path, seeds: int) -> None:
    """Run random cases on every instruction set of this machine, and fixed ones on each or on one of them by turns."""
    import torch
    from sparsekern.kernels.cpu import library

    from tests.index_noise import calls_of
    from tests.oracle import random_case
    from tests.oracle_conv2d import conv_case

    library.FILE = library_file
    torch.set_num_threads(2)

    def use(name: str) -> bool:
        os.environ["SPARSEKERN_CPU"] = name
        library.load.cache_clear()
        with suppress(RuntimeError):
            library.load()
            return True
        return False

    def numbered(given: Iterable[dict[str, Any]], seeds: int) -> Iterator[tuple[int, dict[str, Any], bool]]:
        """Yield a set's cases by number, and whether it is its turn; fixed ones follow those of the seeds."""
        for number, case in enumerate(given):
            mine = number % len(levels) == turn
            if mine or number < seeds or everything:
                yield number, case, mine

    levels, total, everything = [name for name in LEVELS if use(name)], 0, seeds >= 100
    assert "generic" in levels
    for turn, name in enumerate(levels):
        use(name)
        calls = 0

        def call(which: str, *arguments: Any, real: Any = library.call) -> None:
            nonlocal calls
            calls += 1
            library.release_scratch()
            real(which, *arguments)

        with mock.patch("sparsekern.kernels.cpu.products.call", call):
            for seed, given, check in numbered(cases(seeds), seeds):
                case = random_case(seed, **given)
                run(case, seed % 11 + 1, check=check)
                if seed < 3:  # one of each: 1x1, and blocks in two dtypes
                    run_noise(calls_of(case), case.index, case.grid.block, seed)
            for seed, given, check in numbered(conv_cases(seeds // 4), seeds // 4):
                conv = conv_case(seed, **given)
                run(conv, seed % 9 + 1, check=check)
                if seed < 2:
                    run_noise(calls_of(conv), conv.index, conv.grid.block, seed)
            run_extremes(turn)
        for seed in range(turn, seeds, len(levels)):  # the same on all of them
            library.release_scratch()
            run_places(seed)
            run_norm(seed)
            run_attention(seed)
        print(f"{name}: {calls} inputs", flush=True)
        total += calls
    print(f"{total} inputs, no report of the sanitizers")


def run(case: Case | ConvCase, pairs: int, *, check: bool) -> None:
    """Call the products and the scores of a layer; compare the results with the oracle if asked to."""
    from tests.kernels.cpu import calls
    from tests.oracle import check_norms, check_sketch, signs
    from tests.oracle_conv2d import ConvCase

    u, v = signs(pairs, case.grid.out_features, 1), signs(pairs, case.grid.in_features, 2)
    sketch, norms, used = calls.sketch(case, u, v), calls.all_norms(case), case.row >= 0
    if not isinstance(case, ConvCase):
        calls.chosen_norms(case, case.row[used], case.col[used])
    if not check:
        for product in (calls.fwd, calls.dx, calls.dvalues, calls.backward):
            product(case)
        return
    calls.check(case)
    check_sketch(case, sketch, u, v)
    check_norms(case, norms)


def run_noise(calls: Calls, index: Index, block: tuple[int, int], seed: int) -> None:
    """Call kernels on an index that holds what it must not, and while another thread writes into it.

    What must be refused is for tests/test_unsafe_input.py to say.
    """
    from tests.index_noise import copy_of, illegal, noises, survive, survive_writer

    for call, lists in calls.values():
        for number in lists if int(index.row_ptr[-1]) else ():
            for wrong in illegal(index, number, block, seed):
                survive(call, wrong)
    for wrong in noises(index, seed):
        for call, _ in calls.values():
            survive(call, wrong)
    survive_writer(calls, copy_of(index), 1)


def run_extremes(turn: int) -> None:
    """Call convolutions of sizes that nobody has: a result, or the error that says that they cannot be planned."""
    import torch
    from sparsekern.kernels import cpu
    from sparsekern.kernels.contract import ConvShape

    from sparsekern.topology import balanced, build_index, conv_grid, generator_for

    draw = random.Random(turn)
    sizes = (1, 2, 5, 70, 3 * 10**4, 2**31 + 1, 2**40)
    for number in range(20):
        block, groups = draw.choice(((1, 1), (16, 16), (16, 32))), draw.choice((1, 2))
        kernel, stride, dilation = ((draw.choice(few), draw.choice(few)) for few in ((1, 2, 3), sizes, sizes))
        size, out = ((draw.randrange(1, most), draw.randrange(1, most)) for most in (6, 4))
        padding: list[int] = []
        for axis in range(2):
            seen = (out[axis] - 1) * stride[axis] + (kernel[axis] - 1) * dilation[axis] + 1
            before = draw.randrange(max(seen - size[axis], 0) + 1)
            padding += [before, max(seen - size[axis] - before, 0)]
        top, bottom, left, right = padding
        shape = ConvShape(40 * groups, 20 * groups, kernel, stride, (top, bottom, left, right), dilation, groups)
        grid = conv_grid(shape.in_channels, shape.out_channels, kernel, block, groups)
        index = build_index(balanced(grid, max(1, grid.cells // 3), generator_for(number)))
        x = torch.randn(2, *size, shape.in_channels).permute(0, 3, 1, 2)
        dy = torch.randn(2, *shape.output_size(*size), shape.out_channels).permute(0, 3, 1, 2)
        values = torch.randn(index.slots, *block)
        for call in (
            partial(cpu.products.fwd, x, values, None, index, shape),
            partial(cpu.products.dx, dy, values, index, shape, size),
            partial(cpu.products.dvalues, dy, x, index, block, shape, torch.float32),
            partial(cpu.products.backward, dy, x, values, index, shape),
        ):
            with suppress(MemoryError):  # its text is for tests/kernels/cpu/test_conv2d.py to see
                call()


def run_places(seed: int) -> None:
    """Call what works on lists of places, legal ones and others, and compare the results."""
    import torch
    from sparsekern.kernels.cpu import places
    from sparsekern.kernels.eager import places as eager

    from tests.kernels.eager.test_places import drawn, index_of

    draw = random.Random(seed).randint
    rows, cols, count, ascending = draw(1, 37), draw(1, 90), draw(0, 399), bool(draw(0, 1))
    cells = rows * cols
    keys, present = drawn(seed, count, cells), drawn(seed + 1, cells // 3, cells).unique()
    for name in ("distinct", "first_occurrences"):
        assert torch.equal(getattr(places, name)(keys, present, cells), getattr(eager, name)(keys, present, cells))
    assert torch.equal(places.find(present, keys - 1, cells), eager.find(present, keys - 1, cells))
    left_out = torch.arange(0, count, draw(1, 5))
    assert torch.equal(places.leave_out_(keys.clone(), left_out), eager.leave_out_(keys.clone(), left_out))
    row, col = places.places_of(torch.cat([present, keys[:1]]), cols)
    assert places.are_legal(row, col, rows, cols) == eager.are_legal(row, col, rows, cols)
    row, col = row[: present.shape[0]], col[: present.shape[0]]
    assert places.are_legal(row, col, rows, cols)
    mine, theirs = (index_of(row.shape[0], rows, cols) for _ in range(2))
    for kernels, index in ((places, mine), (eager, theirs)):
        kernels.orders_(index, row, col, by_slot=False, ascending=ascending)
    assert all(map(torch.equal, mine, theirs))
    into, expected = (index_of(row.shape[0], rows, cols) for _ in range(2))
    keep = row % 3 != 1
    places.masked_(into, mine, keep, by_slot=False)
    eager.masked_(expected, mine, keep, by_slot=False)
    assert all(map(torch.equal, into, expected))
    too_small = index_of(row.shape[0], max(1, rows - 1), cols)
    places.orders_(too_small, row, col, by_slot=True, ascending=ascending)  # refuses, and asks the others
    for name in ("lowest", "highest"):
        scores = keys.float() / cells
        assert torch.equal(getattr(places, name)(scores, count // 3), getattr(eager, name)(scores, count // 3))
    edges = drawn(seed, draw(1, 50), 9).double().cumsum(0) + 1
    queries = torch.linspace(0, 0.999, count, dtype=torch.float64) * edges[-1]
    assert torch.equal(places.search(edges, queries), eager.search(edges, queries))


def run_norm(seed: int) -> None:
    """Call batch norm with ReLU, forward and backward, on images of some size."""
    import torch
    from sparsekern.kernels.cpu import norms

    draw = random.Random(seed).randint  # a level has every few seeds: what is formed of their remainders would agree
    shape = draw(1, 3), draw(1, 70), draw(1, 5), draw(2, 5)
    x, dy, residual = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(3))
    weight, bias = torch.randn(2, shape[1])
    for added in (None, residual):
        y, stats = norms.forward(x, weight, bias, added, 1e-5)
        norms.backward(dy, x, None if added is None else y, weight, bias, stats, 1e-5)


def run_attention(seed: int) -> None:
    """Call attention, forward and backward, on some number of tokens: few, more than a tile, and parts of a head."""
    import torch
    from sparsekern.kernels.cpu import attention

    draw = random.Random(seed).randint
    for tokens in (draw(1, 64), draw(65, 300), draw(512, 800)):
        batch, heads, features = draw(1, 2), draw(1, 3), 32 * draw(1, 4 if tokens < 512 else 1)
        qkv, dy = torch.randn(batch, tokens, 3 * heads * features), torch.randn(batch, tokens, heads * features)
        for is_causal in (False, True):
            _, stats = attention.forward(qkv, heads, is_causal)
            attention.backward(dy, qkv, stats, heads, is_causal)


def main() -> int:
    """Build, then run the sweep in a process in which the sanitizers' runtimes come first."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    if not runtimes():
        print(f"{COMPILER} has no libasan.so and libubsan.so", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(runtimes()),
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=66",  # Python's own leaks, that is
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(ROOT),
        }
        code = f"from tests.sanitize_cpu import *; sweep(Path({str(build(Path(folder)))!r}), {seeds})"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
