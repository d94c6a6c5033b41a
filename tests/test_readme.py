"""The README's Python runs, in order, as one program; its commands exist."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import generator_for

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    """What the README's Python leaves behind."""
    found: dict[str, Any] = {"__name__": "readme"}
    for code in BLOCKS:
        exec(compile(code, "README.md", "exec"), found)
    return found


def test_the_code_runs(namespace):
    assert len(BLOCKS) >= 3 and "sk" in namespace


def test_the_method_of_ones_own(namespace):
    (code,) = (code for code in BLOCKS if "class StrongRows(Method)" in code)
    assert len(code[: code.index("sparse = StrongRows")].splitlines()) <= 40
    kind = namespace["StrongRows"]

    def learner(rows=0.25):
        layer = sk.SparseLinear(64, 48, sparsity=0.75, block_size=8, seed=0)
        return layer, kind(layer, torch.optim.Adam(layer.parameters()), update_every=2, stop=9, rows=rows, min_age=1)

    def train(layer, method, steps):
        for step in steps:
            layer(torch.randn(4, 64, generator=generator_for(step))).square().mean().backward()
            method.optimizer.step()
            method.optimizer.zero_grad()
            method.step()

    layer, method = learner()
    before = layer.topology.sorted_keys()
    train(layer, method, range(5))
    grown = layer.topology.sorted_keys()
    grown = grown[~torch.isin(grown, before)]
    assert 0 < len((grown // 8).unique()) <= 4 and len(grown) <= 2 * int(0.3 * 12), "in two rows an update"
    states = [copy.deepcopy(part.state_dict()) for part in (layer, method.optimizer, method)]
    train(layer, method, range(5, 10))
    other, resumed = learner()
    for part, state in zip((other, resumed.optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(other, resumed, range(5, 10))
    assert torch.equal(layer.values, other.values) and torch.equal(layer.row, other.row)
    with pytest.raises(ValueError, match="rows is 0"):
        learner(rows=0)


def test_the_test_command_is_the_one_that_make_runs():
    makefile = (ROOT / "Makefile").read_text()
    assert ".venv/bin/python -m pytest\n" in README
    assert "$(BIN)/python -m pytest" in makefile and "make test" in (ROOT / ".ci/run").read_text()


def test_the_layout_names_what_is_there():
    layout = re.search(r"## Layout\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = {line.split()[0] for line in layout.splitlines()}
    there = {
        f"sparsekern/{p.name}/"
        for p in (ROOT / "sparsekern").iterdir()
        if p.is_dir() and p.name not in ("__pycache__", "kernels")
    }
    assert named == there | {"kernels/", "tests/", "bench/"}


def test_the_claim_is_what_the_tables_say():
    claim = " ".join(README.partition("**How much faster, and where not.**")[2].partition("\n\n")[0].split())
    blocks, single = (
        {line.split("|")[1].strip(): line.split("|")[5].strip(" *") for line in table.splitlines() if " % |" in line}
        for table in re.findall(
            r"forward \+ backward, 512 x 1024 x 4096[^\n]*one thread:\n\n(.*?)\n\n", README, re.DOTALL
        )
    )
    for words in (
        f"90 % of its 32x32 blocks absent is {blocks['90 %']} times as fast as `F.linear`",
        f"and {blocks['50 %']} times at 50 %",
        f"(1x1) are {single['90 %']} times as fast at 90 % and slower, {single['50 %']} times, at 50 %",
    ):
        assert words in claim
    assert float(single["50 %"]) < 1 < float(blocks["50 %"])
