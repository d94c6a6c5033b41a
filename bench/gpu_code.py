"""The static proof of the Triton kernels: compile what would be launched, and look at the machine code. Needs no GPU.

    python -m bench.gpu_code                          compile every row, compare with the committed table
    python -m bench.gpu_code --only 'sm_90 fwd *'     some rows; may be given more than once
    python -m bench.gpu_code --update                 write what is new or better into the table

A row is a kernel, dtype, block and architecture, in the configuration that a call gets where nothing was measured:

    products    which matrix instructions, and how often they are written; - for none
    copies      bytes of the asynchronous copies, and how many there are; tma for the copy engine
    spills      bytes that did not fit into registers
    registers   of a thread
    shared      bytes of shared memory of a program
    buffers     how many tiles of both operands the pipeline holds
    loop        instructions of a turn of the main loop
    per_block   warp instructions for a stored block and 128 tokens (all tokens in decoding), whatever the tile

The table is a ratchet. The exit code is 0 when nothing is wrong, 1 when a row is not what
:func:`bench.code.rules.requirements` asks for, or, with the version of Triton that made the table, worse than its
committed row (``--allow-worse`` excuses the second), and 2 when the arguments make no sense, such as ``--update`` of
some rows with another version of Triton.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.code.rules import Row, judge

TABLE = Path(__file__).parent / "results/gpu_code.json"
COLUMNS = ("products", "copies", "spills", "registers", "shared", "buffers", "loop", "per_block")


def measure(case: Any) -> Row:
    """Compile one row of the table and return it."""
    import torch

    from bench.code.compiled import facts
    from bench.code.launches import compiled

    torch.set_num_threads(1)
    kernel, config, default = compiled(case)
    found = facts(kernel)
    instruction = next(iter(found["products"]), "").split(" ")[0]
    per_block = found["loop"] * kernel.metadata.num_warps * block_share(case, config)
    return {"config": config, "default": default, "instruction": instruction, **found, "per_block": round(per_block, 1)}


def block_share(case: Any, config: dict[str, Any]) -> float:
    """Return a stored block and 128 tokens (a block, in decoding) as a share of the products of one turn."""
    if not config:
        return 1.0
    block = case.bo * case.bi
    if "tile_n" in config:
        return block / (config["tile_n"] * config["tile_k"])
    if "tile_out" in config:
        return block * 128 / (config["tile_out"] * config["tile_in"] * config["tile_t"])
    other_side = config["tile_in"] * case.bo if "tile_in" in config else config["tile_k"] * kept_side(case)
    return block * 128 / (config["tile_t"] * other_side)


def kept_side(case: Any) -> int:
    """Return the side of a block along the output of a product."""
    return int(case.bi if case.kernel.removeprefix("conv2d_").startswith("dx") else case.bo)


def measure_all(cases: Sequence[Any], processes: int, quiet: bool) -> dict[str, Row]:
    """Compile rows in several processes and show how far it is."""
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(processes, context) as pool:
        rows = pool.map(measure, cases)
        return dict(zip((case.key for case in cases), progress(rows, len(cases), quiet), strict=True))


def progress(rows: Iterable[Row], total: int, quiet: bool) -> Iterable[Row]:
    """Yield the rows, with a progress bar if rich is installed and someone looks."""
    if not quiet and sys.stderr.isatty():
        try:
            from rich.console import Console
            from rich.progress import track
        except ImportError:
            return rows
        return track(rows, "compiling", total, console=Console(stderr=True))
    return rows


def short(row: Row) -> list[str]:
    """Return the columns of a row as words."""
    counted = ({k: v for k, v in row[name].items()} for name in ("products", "copies"))
    products, copies = (", ".join(f"{key} x{count}" for key, count in column.items()) or "-" for column in counted)
    return [products, copies, *(str(row[name]) for name in COLUMNS[2:])]


def show(rows: dict[str, Row]) -> None:
    """Print a table."""
    lines = [["row", *COLUMNS], *([case, *short(row)] for case, row in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def read_table() -> dict[str, Any]:
    """Return the committed table."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "rows": {}}
    return table


def write_table(version: str, rows: dict[str, Row]) -> None:
    """Write the table, a line per row, so that a difference can be read."""
    lines = ",\n".join(f"  {json.dumps(case)}: {json.dumps(row)}" for case, row in rows.items())
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(f'{{\n "triton": {json.dumps(version)},\n "rows": {{\n{lines}\n }}\n}}\n')


def updated(old: dict[str, Row], new: dict[str, Row], known: Sequence[str], refused: set[str]) -> dict[str, Row]:
    """Return the rows of the next table, in the order of all that are known; refused ones stay as they were."""
    rows = old | {case: row for case, row in new.items() if case not in refused}
    return {case: rows[case] for case in known if case in rows}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 when nothing is wrong, 1 when a row is, 2 when no row is called so."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_code",
        description=(__doc__ or "").replace("``", "").replace(":func:", "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="rows, such as 'sm_90 fwd * 64x64'")
    parser.add_argument("--sample", action="store_true", help="one row for each kernel, width of numbers, architecture")
    parser.add_argument("--update", action="store_true", help="write new and better rows into the table")
    parser.add_argument("--allow-worse", action="append", default=[], metavar="GLOB", help="rows that may get worse")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON, and what is wrong to stderr")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8), help="how many compile at a time")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error("--processes must be at least 1")
    os.environ.pop("TRITON_INTERPRET", None)  # otherwise the kernels would be Python functions, and nothing to compile

    import triton

    from bench.code.cases import cases, sample

    try:
        chosen, known = (sample if options.sample else cases)(options.only), [case.key for case in cases([])]
        cases(options.allow_worse)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    table = read_table()
    same = table["triton"] == triton.__version__
    if options.update and (options.only or options.sample) and table["rows"] and not same:
        print(
            f"the table is of Triton {table['triton']}, this is {triton.__version__}: --update writes all rows, "
            "so give neither --only nor --sample",
            file=sys.stderr,
        )
        return 2
    rows = measure_all(chosen, options.processes, quiet=options.json)
    wrong, changed = judge(table["rows"], rows, same, options.allow_worse)
    if options.json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
    else:
        show(rows)
    say = sys.stderr if options.json else sys.stdout
    if not same:
        print(
            f"\nthe table is of Triton {table['triton']}, this is {triton.__version__}: no numbers compared", file=say
        )
    print(f"\n{len(rows)} rows, {len(changed)} not as in the table, {len(wrong)} things wrong", file=say)
    for line in wrong:
        print(f"  {line}", file=say)
    if options.update:
        refused = {line.split(":")[0] for line in wrong}
        write_table(triton.__version__, updated(table["rows"] if same else {}, rows, known, refused))
        print(f"written; {len(refused)} rows refused", file=say)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
