"""The programs of examples/ run, in small, and reach what they say."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from tests.ranks import on_ranks

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch):
    """Imports an example as its own folder does when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


def test_gpt(example):
    found = example("gpt").main(steps=30, width=64, depth=1)
    assert found["sparse"]["bits per byte"] < 7 and found["dense"]["bits per byte"] < 7  # 8 before the first step
    assert found["sparse"]["parameters"] < found["dense"]["parameters"]


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(example, tmp_path: Path):
    pytest.importorskip("transformers")
    written = example("transformers_trainer").main(steps=4, width=64, depth=1, folder=str(tmp_path))
    assert written.startswith("def ") and len(written) > 40
    assert {"README.md", "config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_lightning_digits(example, capsys):
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    assert example("lightning_digits").main(epochs=4, width=160) > 0.8
    assert "90.0% absent" in capsys.readouterr().out


def test_resnet(example):
    pytest.importorskip("sklearn")
    assert example("resnet").main(epochs=1, width=16) > 0.6


def test_own_method(example, capsys):
    pytest.importorskip("sklearn")
    assert example("own_method").main(steps=100, width=160) > 0.6
    assert " 10% of all places" not in capsys.readouterr().out  # some blocks moved


def test_sparse_finetuning(example):
    pytest.importorskip("sklearn")
    found = example("sparse_finetuning").main(epochs=2, width=256)
    assert found["trained on sparse"] > max(0.85, found["cut to sparse"]) and found["trained on dense again"] > 0.85


def fsdp2(rank: int, folder: Path) -> list[tuple[float, int]]:
    """Train, and go on from the checkpoint to a later step."""
    sys.path.insert(0, str(EXAMPLES))
    main = importlib.import_module("fsdp2").main
    return [main(steps=steps, width=128, folder=str(folder / "runs")) for steps in (50, 110)]


def test_fsdp2(tmp_path: Path):
    for (before, first), (after, again) in on_ranks(fsdp2, 2, tmp_path, tmp_path):
        assert first == 0 and again == 50
        assert after < before < 2.08


def test_each_is_one_page_and_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 110, path
        program = "__main__" in text
        assert (f"(examples/{path.name})" in readme) == program, path
        if program:
            assert re.search(rf"^(python|torchrun .*) examples/{path.name} ", text, re.MULTILINE), path
