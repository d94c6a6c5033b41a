"""SparseCallback in the real Trainer of Lightning."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger

from sparsekern.integrations.lightning import SparseCallback

pytestmark = pytest.mark.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)

BATCHES = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in range(12)]


class Loader:
    """Batches in order, going on where a checkpoint was taken: what Lightning asks of a loader that resumes."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self):
        self.at %= len(BATCHES)
        while self.at < len(BATCHES):
            self.at += 1
            yield BATCHES[self.at - 1]

    def state_dict(self) -> dict:
        return {"at": self.at}

    def load_state_dict(self, state: dict) -> None:
        self.at = state["at"]


class Module(LightningModule):
    def __init__(self, callback: SparseCallback, manual: bool, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 16))
        if sparse:
            sk.sparsify_(self.net, 0.5, 8)
        self.callback = [callback]  # in a list: callbacks are no modules
        self.automatic_optimization = not manual

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.01)

    def loss(self, x: Tensor) -> Tensor:
        return (self.net(x) - 1).square().mean()

    def training_step(self, x: Tensor, number: int):
        if self.automatic_optimization:
            return self.loss(x)
        optimizer = self.optimizers()
        self.callback[0].method.backward(lambda: self.loss(x))
        optimizer.step()
        optimizer.zero_grad()
        return None


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


def fit(folder: Path, callback: SparseCallback, *, manual=False, resume=None, accumulate=1, sparse=True, **more):
    module = Module(callback, manual, sparse)
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        default_root_dir=folder,
        accumulate_grad_batches=accumulate,
        callbacks=[callback, ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)],
        **(options | more),
    )
    trainer.fit(module, Loader(), ckpt_path=resume)
    return module


def agent(model, optimizer):
    inner = sk.SET(model, optimizer, update_every=2)
    return sk.AGENT(model, optimizer, method=inner, estimate="gradients", gamma=0.5, every=3)


CASES = {
    "set": ("set", {"update_every": 2}, {}),
    "rigl accumulated": ("rigl", {"update_every": 2}, {"accumulate": 2}),
    "gse by hand": ("gse", {"update_every": 2}, {"manual": True}),
    "vrpge by hand": ("vrpge", {"sparsity": 0.75}, {"manual": True}),
    "top-kast by hand, finished": ("top-kast", {"sparsity": 0.7, "update_every": 1, "stop": 3}, {"manual": True}),
    "agent by hand": (agent, {}, {"manual": True}),
}


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[key]) for key, x in a.state_dict().items())


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumed_from_its_checkpoint_ends_with_the_same_weights(case: str, tmp_path: Path):
    method, options, how = CASES[case]
    callback = SparseCallback(method, **options)
    whole = fit(tmp_path, callback, **how)
    steps = 24 // how.get("accumulate", 1)
    assert callback.method.metrics()["steps"] == steps and callback.method.metrics()["updates"] > 0
    resumed = SparseCallback(method, **options)
    again = fit(tmp_path / "again", resumed, resume=tmp_path / "step=4.ckpt", **how)
    assert same(whole, again)
    assert resumed.method.metrics()["itop/global"] == callback.method.metrics()["itop/global"]


def test_the_forward_set_is_validated(tmp_path: Path):
    seen = []

    class Validated(Module):
        def validation_step(self, x: Tensor, number: int):
            if self.callback[0].method is not None:  # Lightning tries a step before the training
                seen.append(self.loss(x))

    callback = SparseCallback("top-kast", sparsity=0.75, stop=100)
    module = Validated(callback, manual=True)
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    trainer.fit(module, Loader(), torch.utils.data.DataLoader(BATCHES[0], batch_size=8))
    with torch.no_grad():
        stored = module.loss(BATCHES[0])
        for name, layer in callback.method.layers.items():
            layer.values[~callback.method._forward[name]] = 0
        assert seen == [module.loss(BATCHES[0])] != [stored]


@pytest.mark.parametrize("manual", [False, True])
def test_it_is_the_loop_that_one_writes_by_hand(manual: bool, tmp_path: Path):
    module = fit(tmp_path, SparseCallback("set", update_every=2), manual=manual)
    twin = Module(SparseCallback("set"), manual)
    optimizer = twin.configure_optimizers()
    sparse = sk.SET(twin, optimizer, update_every=2, stop=0.75 * 24)
    for x in BATCHES * 2:
        twin.loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparse.step()
    assert same(module, twin)


def test_a_second_fit_goes_on(tmp_path: Path):
    callback = SparseCallback("set", update_every=2, stop=100)
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    module = Module(callback, manual=False)
    trainer.fit(module, Loader())
    first = callback.method
    assert first.closed and first.steps == 12
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, Loader())
    assert callback.method is not first and callback.method.steps == 24


def test_numbers_are_logged_where_asked(tmp_path: Path):
    recorder, rows = Recorder(), []
    callback = SparseCallback("set", update_every=2, log_to=SimpleNamespace(log=rows.append), layers=True)
    fit(tmp_path, callback, logger=recorder, log_every_n_steps=5, max_epochs=1)
    logged = [(step, numbers) for step, numbers in recorder.rows if "sparse/steps" in numbers]
    assert [step for step, _ in logged] == [5, 10] == [row["step"] for row in rows]
    assert logged[1][1]["sparse/steps"] == 10 and logged[1][1]["sparse/sparsity/net.0"] == 0.5


def test_wrong_inputs_are_one_sentence(tmp_path: Path):
    cases = [
        ("method is 'x'; it must be one of", lambda: SparseCallback("x")),
        ("VRPGE runs the passes.*automatic_optimization = False", lambda: fit(tmp_path, SparseCallback("vrpge"))),
        ("no optimizer of configure_optimizers holds", lambda: fit(tmp_path, SparseCallback("set"), sparse=False)),
    ]
    for message, wrong in cases:
        with pytest.raises(ValueError, match=message):
            wrong()
    module = Module(SparseCallback("set"), manual=False)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, **options)
    trainer.fit(module, Loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="the checkpoint of step 12 holds no state of SET"):
        fit(tmp_path, SparseCallback("set"), resume=tmp_path / "plain.ckpt")
