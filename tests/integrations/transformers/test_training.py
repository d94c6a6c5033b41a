"""SparseCallback and SparseTrainer in the library's own Trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from sparsekern.integrations.transformers import SparseCallback, SparseTrainer  # noqa: E402
from tests.integrations.transformers.models import gpt2  # noqa: E402

STEPS = 12
OPTIONS = {"set": {"update_every": 2}, "rigl": {"update_every": 2}, "gse": {"update_every": 2}, "static": {}}


def agent(model, optimizer):
    return sk.AGENT(model, optimizer, method=sk.SET(model, optimizer, update_every=2, stop=9))


CALLBACKS = {name: (name, options) for name, options in OPTIONS.items()}
CALLBACKS |= {"vrpge": ("vrpge", {"sparsity": 0.75}), "agent": (agent, {})}


class StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def data() -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 48, (48, 16), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": t, "labels": t} for t in tokens]


def run(folder: Path, callback, *, stop: int = STEPS, resume=None, model=None, closure=False, more=(), **options):
    """Train a small GPT-2 with dropout; return the trainer."""
    if model is None:
        torch.manual_seed(0)
        model = sk.sparsify_(gpt2(), 0.5, 8)
    defaults = {"max_steps": STEPS, "save_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 2, "seed": 3}
    defaults |= {"gradient_accumulation_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(folder, learning_rate=1e-3, **(defaults | options))
    if closure:
        trainer = SparseTrainer(model, args, train_dataset=data(), callbacks=[StopAt(stop), *more], sparse=callback)
    else:
        trainer = transformers.Trainer(model, args, train_dataset=data(), callbacks=[callback, StopAt(stop), *more])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def new(name: str) -> SparseCallback:
    method, options = CALLBACKS[name]
    return SparseCallback(method, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_stopped_and_resumed_ends_with_the_same_weights(name: str, tmp_path: Path):
    closure = name in ("vrpge", "agent")
    callback = new(name)
    whole = run(tmp_path / "whole", callback, closure=closure)
    run(tmp_path / "parts", new(name), closure=closure, stop=6)
    resumed = new(name)
    parts = run(tmp_path / "parts", resumed, closure=closure, resume=True)
    assert same(whole.model, parts.model)
    assert (callback.method.metrics()["updates"] > 0) is (name != "static")
    for key in ("steps", "updates", "sparsity/global", "itop/global"):
        assert resumed.method.metrics()[key] == callback.method.metrics()[key]
    if name != "rigl":
        return
    moved = tmp_path / "elsewhere"
    (tmp_path / "parts/checkpoint-8").rename(moved)  # the state is in the checkpoint, not in a path
    assert same(whole.model, run(tmp_path / "new", new(name), closure=closure, resume=str(moved)).model)


def loss_of(model: nn.Module, tokens: torch.Tensor, accumulate: int) -> torch.Tensor:
    """The part that a batch has of the loss of a step: Transformers divides by all labels of the step."""
    return model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(tokens.numel() * accumulate)).loss


def by_hand(method: str, options: dict, accumulate: int) -> nn.Module:
    """The same training as a plain loop."""
    torch.manual_seed(0)
    model = sk.sparsify_(gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 0.5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparse = sk.training.METHODS[method](model, optimizer, stop=0.75 * STEPS, **options)
    batches = iter([data()[i : i + 2] for i in range(0, 48, 2)])
    model.train()
    for _ in range(STEPS):
        for _ in range(accumulate):
            tokens = torch.stack([row["input_ids"] for row in next(batches)])
            loss_of(model, tokens, accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparse.step()
    return model


@pytest.mark.parametrize("closure", [False, True], ids=["callback", "trainer"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_the_loop_that_one_writes_by_hand(accumulate: int, closure: bool, tmp_path: Path):
    torch.manual_seed(0)
    model = sk.sparsify_(gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 0.5, 8)
    options = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no"}
    options |= {
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 0.1,
        "train_sampling_strategy": "sequential",
    }
    callback = SparseCallback("set", update_every=2)
    args = {"max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    trainer_args = transformers.TrainingArguments(tmp_path, disable_tqdm=True, **args, **options)
    kind = SparseTrainer if closure else transformers.Trainer
    more = {"sparse": callback} if closure else {"callbacks": [callback]}
    trainer = kind(model, trainer_args, train_dataset=data(), **more)
    trainer.train()
    expected = by_hand("set", {"update_every": 2}, accumulate)
    for name, layer in sk.sparse_layers(model).items():
        twin = expected.get_submodule(name)
        assert torch.equal(layer.row, twin.row) and torch.equal(layer.col, twin.col)
        torch.testing.assert_close(layer.values, twin.values)
    assert callback.method.steps == STEPS and callback.method.closed


@pytest.mark.parametrize("name", ["vrpge", "agent"])
def test_the_closure_of_the_trainer_is_that_of_the_hand_made_loop(name: str, tmp_path: Path):
    def fresh():
        torch.manual_seed(0)
        model = sk.sparsify_(gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 0.5, 8)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    def method(model, optimizer):
        if name == "vrpge":
            return sk.VRPGE(model, optimizer, sparsity=0.75, stop=9)
        inner = sk.SET(model, optimizer, update_every=2, stop=9)
        return sk.AGENT(model, optimizer, method=inner, estimate="gradients", gamma=0.5, every=3)

    model, optimizer = fresh()
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "disable_tqdm": True}
    options |= {"max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}
    options |= {"gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential"}
    args = transformers.TrainingArguments(tmp_path, **options)
    callback = SparseCallback(method)
    SparseTrainer(model, args, train_dataset=data(), optimizers=(optimizer, None), sparse=callback).train()

    twin, optimizer = fresh()
    sparse = method(twin, optimizer)
    twin.train()
    batches = iter([data()[i : i + 2] for i in range(0, 48, 2)])
    for _ in range(STEPS):
        for _ in range(2):
            tokens = torch.stack([row["input_ids"] for row in next(batches)])
            sparse.backward(lambda tokens=tokens: loss_of(twin, tokens, 2))
        optimizer.step()
        optimizer.zero_grad()
        sparse.step()
    for key, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-4, atol=1e-6)


def test_numbers_are_logged_where_asked(tmp_path: Path):
    seen: list[dict] = []
    written: list[tuple] = []
    writer = SimpleNamespace(add_scalar=lambda *args: written.append(args), flush=lambda: None)
    later = SimpleNamespace(logs=[])

    class Later(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            later.logs.append(dict(logs))

    run_object = SimpleNamespace(log=seen.append)
    callback = SparseCallback("set", update_every=2, log_to=run_object)
    trainer = run(tmp_path, callback, more=[Later()])
    assert [numbers["step"] for numbers in seen] == [2, 4, 6, 8, 10, 12]
    assert all({"loss", "sparse/sparsity/global", "sparse/itop/global"} <= numbers.keys() for numbers in seen)
    assert seen[-1]["sparse/updates"] == callback.method.updates == 4
    assert not any("transformer.h.0" in key for key in seen[0])
    assert later.logs[0]["sparse/steps"] == 2
    assert trainer.state.log_history[0]["sparse/steps"] == 2
    assert "sparse/steps" not in later.logs[-1]  # the summary at the end
    run(tmp_path, SparseCallback("set", log_to=writer, layers=True), stop=2)
    assert ("sparse/sparsity/transformer.h.0.mlp.c_fc", 0.5, 2) in written


def test_numbers_are_in_the_reports_of_a_sparse_trainer(tmp_path: Path):
    reported: list[dict] = []

    class Report(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            reported.append(dict(logs))

    torch.manual_seed(0)
    model = sk.sparsify_(gpt2(), 0.5, 8)
    args = transformers.TrainingArguments(tmp_path, max_steps=2, logging_steps=1, report_to="none", use_cpu=True)
    trainer = SparseTrainer(
        model, args, train_dataset=data(), callbacks=[Report()], sparse=SparseCallback("set", update_every=1)
    )
    trainer.train()  # Report comes before the callback, as those of report_to do
    assert reported[0]["sparse/steps"] == 1 and reported[1]["sparse/steps"] == 2


def test_an_evaluation_in_the_middle_sees_the_network_that_is_trained(tmp_path: Path):
    seen: list[float] = []

    class Probe(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(metrics["eval_loss"])

    torch.manual_seed(0)
    model = sk.sparsify_(gpt2(), 0.5, 8)
    options = {
        "max_steps": 4,
        "eval_steps": 2,
        "learning_rate": 0.01,
        "eval_strategy": "steps",
        "report_to": "none",
        "use_cpu": True,
    }
    callback = SparseCallback("vrpge", sparsity=0.75, stop=100)
    args = transformers.TrainingArguments(tmp_path, save_strategy="no", disable_tqdm=True, **options)
    rows = data()[:8]
    trainer = SparseTrainer(model, args, train_dataset=data(), eval_dataset=rows, callbacks=[Probe()], sparse=callback)
    trainer.train()
    assert len(seen) == 2
    tokens = torch.stack([row["input_ids"] for row in rows])
    model.eval()
    with torch.no_grad():
        all_candidates = model(input_ids=tokens, labels=tokens).loss.item()
        with callback.method.evaluation():
            chosen = model(input_ids=tokens, labels=tokens).loss.item()
    # Transformers divides by all tokens, of which the first of a row is not predicted
    assert seen[-1] == pytest.approx(chosen * 15 / 16, abs=1e-5) and abs(chosen - all_candidates) > 1e-4


def test_training_twice_builds_a_method_each_time(tmp_path: Path):
    callback = SparseCallback("set", update_every=2)
    trainer = run(tmp_path, callback)
    first = callback.method
    trainer.train()
    assert callback.method is not first and callback.method.steps == STEPS
    assert "sparsekern" not in trainer.optimizer.state_dict()["param_groups"][0]


KILLED = """
import os, signal, sys
sys.modules["kernels"] = None
import torch, transformers
from pathlib import Path
from tests.integrations.transformers.test_training import new, run

class Kill(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

run(Path(sys.argv[1]), new("rigl"), more=[Kill()])
"""


def test_a_killed_run_resumes_with_the_same_bits(tmp_path: Path):
    whole = run(tmp_path / "whole", new("rigl"))
    folder = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-4"]
    assert same(whole.model, run(folder, new("rigl"), resume=True).model)


def test_wrong_inputs_are_one_sentence(tmp_path: Path):
    cases = [
        (ValueError, "method is 'rigel'; it must be one of static, set, rigl", lambda: SparseCallback("rigel")),
        (TypeError, "method is a int; it must be the name", lambda: SparseCallback(3)),
        (ValueError, "update_every: options go with the name", lambda: SparseCallback(agent, update_every=3)),
        (TypeError, "log_to is a int; it must be a folder", lambda: SparseCallback("set", log_to=3)),
        (ValueError, "VRPGE runs the passes over a batch.*SparseTrainer", lambda: run(tmp_path, new("vrpge"))),
        (ValueError, "AGENT runs the passes", lambda: run(tmp_path, new("agent"))),
        (TypeError, "the function returned a dict", lambda: run(tmp_path, SparseCallback(lambda m, o: {}))),
        (ValueError, "no sparse layer; call sparsekern.sparsify_", lambda: run(tmp_path, new("set"), model=gpt2())),
        (ValueError, "updateevery is no option of SET", lambda: run(tmp_path, SparseCallback("set", updateevery=3))),
    ]
    for kind, message, wrong in cases:
        with pytest.raises(kind, match=message):
            wrong()


def test_a_checkpoint_without_the_method_is_refused(tmp_path: Path):
    run(tmp_path, transformers.TrainerCallback(), stop=4)
    with pytest.raises(ValueError, match="the checkpoint of step 4 holds no state of SET"):
        run(tmp_path, new("set"), resume=True)
    run(tmp_path / "other", new("rigl"), stop=4)
    with pytest.raises(ValueError, match="the state is of RigL; this is SET"):
        run(tmp_path / "other", new("set"), resume=True)


def test_the_checkpoint_itself_is_a_sparse_model(tmp_path: Path):
    trainer = run(tmp_path, new("rigl"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}")
    assert same(trainer.model, again)
    state = json.loads((tmp_path / f"checkpoint-{STEPS}/trainer_state.json").read_text())
    assert state["global_step"] == STEPS
