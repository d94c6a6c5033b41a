"""``docs/plan.md``: what training costs for models of 0.1 to 70 billion parameters on 1 to 512 devices.

    python -m bench.plan_table           a minute or two, without a GPU and with little memory

Nothing is trained: the figures are predictions of :mod:`sparsekern.analysis.plan` from the published peaks of a device.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import sparsekern as sk
from bench.gpu.results import ROOT
from sparsekern.analysis.plan import DEVICES, Layout, Prediction, Step, Trace, Updates, predict, repeated_blocks, trace
from sparsekern.lab.models import gpt

PAGE = ROOT / "docs" / "plan.md"

MODELS = {"0.1 B": (768, 12), "1.3 B": (2048, 24), "6.7 B": (4096, 32), "13 B": (5120, 40), "70 B": (8192, 80)}
"""Width and depth of GPTs, nearly those of GPT-3 (Brown et al., arXiv 2005.14165, table 2.1); heads of 64 features."""

VOCABULARY = 50_257

COUNTS = (1, 8, 64, 512)
DEVICE, SPARSITY, BLOCK, TEXTS, TOKENS = "h200", 0.9, 128, 4, 2048

UPDATES = Updates(every=100, moved=0.3, ranked=True)
"""Those of SET."""

BEGIN, END = "<!-- bench.plan_table -->", "<!-- end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.plan_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=Path, default=PAGE, help="whose tables are replaced")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), help="only these")
    given = parser.parse_args(argv)
    text = given.page.read_text()
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    given.page.write_text(f"{head}{BEGIN}\n{tables(given.models)}{END}{tail}")
    return 0


def tables(models: Sequence[str]) -> str:
    """Return the tables in Markdown, with their date."""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    lines = [
        f"Predicted, not measured: written by `python -m bench.plan_table` on {today}, sparsekern {sk.__version__}, "
        f"torch {torch.__version__}.",
        "",
    ]
    lines += ["| model | devices | strategy | GB a device, dense | sparse | fits | GB sent a step, dense | sparse |"]
    lines[-1] += " s a step, dense | sparse | dense / sparse |"
    lines += ["|---|--:|---|--:|--:|---|--:|--:|--:|--:|--:|"]
    for model in models:
        for row in rows_of(model):
            lines.append(f"| {' | '.join(row)} |")
        print(model, file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def step_of(model: str, network: str) -> Step:
    """Return a pass of a device over its texts, with bfloat16 products."""
    width, depth = MODELS[model]
    with torch.device("meta"):
        built = gpt(VOCABULARY, TOKENS, width, depth=depth)
    if network == "sparse":
        sk.sparsify_(built, SPARSITY, BLOCK)
    return Step(
        built,
        torch.empty(TEXTS, TOKENS, dtype=torch.int64, device="meta"),
        lambda model, texts: cross_entropy(model(texts).flatten(0, 1), texts.flatten()),
        lambda model: torch.optim.AdamW(model.parameters(), fused=True),
        clip_norm=1.0,
        autocast=torch.bfloat16,
    )


def rows_of(model: str) -> Iterator[list[str]]:
    """Yield a row for each number of devices and strategy."""
    traces: dict[str, Trace] = {}
    blocks: list[str] = []
    for network in ("dense", "sparse"):
        step = step_of(model, network)
        blocks = repeated_blocks(step.model)
        traces[network] = trace(step, blocks)
    device = DEVICES[DEVICE]
    for devices in COUNTS:
        for strategy in ("single",) if devices == 1 else ("ddp", "fsdp2"):
            layout = Layout(strategy, devices, tuple(blocks))
            found: dict[str, Prediction] = {
                network: predict(
                    traced,
                    device,
                    layout=layout,
                    updates=UPDATES if network == "sparse" else Updates(),
                    sends=device.sends(devices),
                )
                for network, traced in traces.items()
            }
            dense, sparse = found["dense"], found["sparse"]
            room = {name: p.memory.total <= device.gigabytes * 1e9 for name, p in found.items()}
            fits = {(True, True): "both", (False, True): "sparse", (False, False): "neither"}
            yield [
                model,
                str(devices),
                strategy,
                f"{dense.memory.total / 1e9:,.1f}",
                f"{sparse.memory.total / 1e9:,.1f}",
                fits[room["dense"], room["sparse"]],
                f"{dense.traffic.step / 1e9:,.2f}",
                f"{sparse.traffic.step / 1e9:,.2f}",
                f"{dense.step_seconds:,.3f}",
                f"{sparse.step_seconds:,.3f}",
                f"{dense.step_seconds / sparse.step_seconds:.2f}",
            ]


if __name__ == "__main__":
    sys.exit(main())
