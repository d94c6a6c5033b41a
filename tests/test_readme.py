"""The README's Python runs, in order, as one program; its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_code_runs():
    namespace: dict[str, object] = {"__name__": "readme"}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for code in blocks:
        exec(compile(code, "README.md", "exec"), namespace)


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
