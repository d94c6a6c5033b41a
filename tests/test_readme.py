"""The Python of the README and of the pages under docs runs, each page as one program; links and commands exist."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekern as sk
from sparsekern.topology import generator_for

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def python_of(page: Path) -> list[str]:
    """The Python of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """What the Python of a page leaves behind."""
    found: dict[str, Any] = {"__name__": "readme"}
    for code in python_of(page):
        exec(compile(code, page.name, "exec"), found)
    return found


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    return run(ROOT / "docs/methods.md")


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub writes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "methods.md"], ids=lambda page: page.name)
def test_the_code_runs(page):
    assert ("sk" in run(page)) == bool(python_of(page))


def test_the_code_about_methods_runs(namespace):
    assert len(python_of(ROOT / "docs/methods.md")) >= 3 and "agent" in namespace


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        there = page.parent / file if file else page
        assert there.is_file(), target
        assert not anchor or anchor in anchors(there), target


def test_every_page_is_linked_and_the_readme_short():
    assert all(f"](docs/{page.name})" in README for page in PAGES[1:])
    assert len(README.splitlines()) < 300


def test_the_method_of_ones_own(namespace):
    (code,) = (code for code in python_of(ROOT / "docs/methods.md") if "class StrongRows(Method)" in code)
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


def test_whole_networks_are_as_fast_as_their_results_say():
    rows = [json.loads(line) for line in (ROOT / "bench/results/end_to_end.jsonl").read_text().splitlines()]
    resnet, vgg = (
        {row["sparsity"]: row for row in rows if row["network"] == name and row["threads"] == 2}
        for name in ("resnet18-cifar", "vgg16-small")
    )
    text = " ".join(README.partition("A whole training step")[2].partition("\n\n")[0].split())
    assert f"is {resnet[0.9]['vs_dense']:.1f} times as fast at 90 %" in text
    assert f"in blocks of 16, {vgg[0.9]['vs_dense']:.1f} times, and slower at 50 %" in text and vgg[0.5]["vs_dense"] < 1
    assert resnet[0.9]["shares"]["batch norm"] == pytest.approx(1 / 5, abs=0.03)  # with the ReLU that follows it


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
    convolutions = re.findall(r"^\| \d\S+->\d+ k3(?: s2)?, 32x32 \|.*\|$", README, re.MULTILINE)
    at_90 = sorted((line.split("|")[4].strip() for line in convolutions), key=float)
    assert len(at_90) == 5
    assert f"3x3, as ResNets have them, are {at_90[0]} to {at_90[-1]} times as fast at 90 %" in claim
    assert float(single["50 %"]) < 1 < float(blocks["50 %"])
