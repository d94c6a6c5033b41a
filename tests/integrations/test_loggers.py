"""Where numbers go."""

from __future__ import annotations

import builtins
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparsekern.integrations.methods import log, open_log
from sparsekern.lab import Config, Logged, start
from tests.lab.runs import StopAt


def test_a_folder_is_written_by_tensorboard(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = open_log(tmp_path)
    for step in (1, 2):
        log(writer, {"sparse/churn/global": 0.25 * step}, step)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("sparse/churn/global")] == [(1, 0.25), (2, 0.5)]


def test_an_object_that_logs_a_dict():
    rows: list[dict] = []
    run = SimpleNamespace(log=rows.append)
    assert open_log(run) is run
    log(run, {"loss": 1.0}, 3)
    assert rows == [{"loss": 1.0, "step": 3}]
    log(open_log(None), {"loss": 1.0}, 3)


def test_what_is_not_known_is_one_sentence(monkeypatch):
    with pytest.raises(TypeError, match="log_to is a list; it must be a folder for TensorBoard"):
        open_log([])

    def refuse(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        open_log("folder")


def test_a_run_of_the_lab_logs_the_numbers_of_every_epoch(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)  # it takes longer than the training
    rows: list[dict] = []
    told = StopAt()
    config = Config(width=32, block_size=8, sparsity=0.5, epochs=2, batch_size=400, seeds=1, device="cpu")
    start(config, tmp_path / "run", Logged(told, SimpleNamespace(log=rows.append)))
    assert [row["step"] for row in rows] == [4, 4, 8, 8]
    assert rows[2]["sparse/seed0/loss"] == told.seen[2]["loss"] and "dense/seed0/test_accuracy" in rows[3]
    assert told.asked == 16
