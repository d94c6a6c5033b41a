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
