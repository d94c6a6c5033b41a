"""Runs of several processes end as runs of one: the same blocks, and values within rounding."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsekern.errors import InputError
from sparsekern.lab import Config, Interrupted, Observer, resume, start
from sparsekern.lab.checkpoint import Keeping
from sparsekern.lab.distributed import ALONE, Launch, ToldByFirst, World, launched, lost_ranks
from sparsekern.lab.resolved import resolve
from sparsekern.lab.store import METRICS, RESULTS, read_results
from sparsekern.lab.tasks import Classification
from tests.lab.runs import StopAt, changed, rows_of
from tests.ranks import on_ranks, start_command

MLP = Config(width=32, block_size=8, sparsity=0.5, epochs=2, batch_size=400, seeds=1, update_every=2, device="cpu")
GPT = Config(
    recipe="gpt-nano",
    width=64,
    block_size=16,
    network={"depth": 1, "context": 16},
    epochs=1,
    batch_size=12,
    seeds=1,
    update_every=2,
    accumulate=2,
    method="gse",
    options={"score": "snip"},
    device="cpu",
)
CONV = Config(
    recipe="resnet20",
    width_multiplier=0.25,
    block_size=4,
    sparsity=0.5,
    epochs=1,
    batch_size=720,
    dense=False,
    device="cpu",
)
"""With weights whose channels are last in memory, and momentum."""

AGENT = changed(MLP, method="gse", epochs=4, batch_size=1437, update_every=3, options={"agent": True})
"""Its last batch has one image, for the first of three ranks."""

ODD = changed(AGENT, batch_size=480, epochs=3)

STOPPED = changed(
    MLP, batch_size=396, method="rigl", options={"scoring": "screen"}
)  # what it does on several ranks anyway
"""Its last batch has 250 images, 83 or 84 for each of three ranks."""


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("".join(f"{n} squared is {n * n}. " for n in range(2000)))
    return str(path)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap(monkeypatch)


def cheap(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
    patch.setattr("sparsekern.lab.language.EXAMPLES", 96)  # eight batches


def assert_alike(folder: Path, other: Path, seeds: int = 1) -> None:
    """The same blocks in the same slots, and values, optimizer and losses within rounding."""
    for seed in range(seeds):
        mine, theirs = (max((run / "checkpoints" / f"seed-{seed}").glob("step-*")) for run in (folder, other))
        assert mine.name == theirs.name
        for path in mine.glob("*.safetensors"):
            one, two = load_file(path), load_file(theirs / path.name)
            for name, tensor in one.items():
                if name.endswith("qkv.bias"):  # softmax takes no notice of the keys' part, whose gradient is rounding
                    for state in (tensor, two[name]):
                        state.chunk(3)[1].zero_()
                torch.testing.assert_close(two[name], tensor, atol=1e-6 * tensor.is_floating_point(), rtol=0)
    for one, two in zip(rows_of(folder), rows_of(other), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-6) and one.get("updates") == two.get("updates")


def two_ranks(rank: int, folder: Path, text: str) -> list[str]:
    """Train both recipes to the end, stop a third run, and meet errors; return what was told."""
    ranks, told = World(rank, 2, rank), []
    with pytest.MonkeyPatch.context() as patch:
        cheap(patch)
        for name, config in (("mlp", MLP), ("gpt", changed(GPT, data=text))):
            done = start(config, folder / name, Observer(), world=ranks)
            assert done.results == read_results(folder / name)
        sharded = replace(ranks, strategy="fsdp2")
        start(changed(GPT, data=text), folder / "sharded", Observer(), world=sharded)
        start(CONV, folder / "conv", Observer(), world=sharded)
        for name, config, step in (("sharded-stopped", changed(GPT, data=text), 11), ("agent-stopped", ODD, 9)):
            with pytest.raises(Interrupted):
                start(config, folder / name, StopAt(step), world=sharded)
        with pytest.raises(Interrupted):  # one rank is asked to stop, and all do
            start(STOPPED, folder / "stopped", StopAt(9) if rank == 1 else Observer(), world=ranks)
        for work in (
            lambda: start(MLP, folder / "mlp", Observer(), world=ranks),
            lambda: start(changed(MLP, batch_size=401), folder / "new", Observer(), world=ranks),
            lambda: ranks.together(lambda: 1 if rank == 0 else Config(width=0)),
            lambda: start(changed(MLP, options={"spectral": True}), folder / "new", Observer(), world=sharded),
            lambda: start(changed(MLP, rate=1e30), folder / "hot", Observer(), world=ranks),
            lambda: start(changed(GPT, data=text if rank else __file__), folder / "new", Observer(), world=ranks),
        ):
            with pytest.raises(InputError) as error:
                work()
            told.append(str(error.value))
            assert isinstance(error.value, ToldByFirst) == (rank == 1 and "NaN" not in told[-1])  # that each rank meets
    assert not (folder / "new").exists()
    return told


def finish(rank: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        cheap(patch)
        resume(folder / "stopped", Observer(), World(rank, 3, rank))
        for name in ("sharded-stopped", "agent-stopped"):
            resume(folder / name, Observer(), World(rank, 3, rank, "fsdp2"))
        for strategy in ("ddp", "fsdp2"):
            start(AGENT, folder / f"agent-{strategy}", Observer(), world=World(rank, 3, rank, strategy))


def test_two_ranks_train_as_one_and_a_run_goes_on_with_another_number(tmp_path, text):
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    told, silent = on_ranks(two_ranks, 2, two, two, text)
    words = (
        "not empty",
        "which 2 ranks do not divide",
        "on rank 1: width is 0",
        "spectral needs whole weights",
        "lower the learning rate",
        "data of rank 1 are others",
    )
    assert [word for word, said in zip(words, told, strict=True) if word not in said] == [] and len(silent) == len(told)
    for name, config in (("mlp", MLP), ("gpt", changed(GPT, data=text)), ("stopped", STOPPED)):
        start(config, one / name, Observer())
    for name in ("mlp", "gpt"):
        assert_alike(one / name, two / name)
        assert read_results(two / name)["environment"]["ranks"] == 2
    assert_alike(one / "gpt", two / "sharded")
    assert 0 < read_results(two / "conv")["networks"]["sparse"]["test_accuracy"]["mean"] < 1
    with pytest.raises(Interrupted):  # alone from step 9, of three ranks from step 13
        resume(two / "stopped", StopAt(4))
    with pytest.raises(Interrupted):
        resume(two / "sharded-stopped", StopAt(1))
    (tmp_path / "meet").mkdir()
    on_ranks(finish, 3, tmp_path / "meet", two)
    assert_alike(one / "stopped", two / "stopped")
    assert_alike(one / "gpt", two / "sharded-stopped")
    for name, config in (("agent", AGENT), ("agent-stopped", ODD)):
        start(config, one / name, Observer())
    assert_alike(one / "agent-stopped", two / "agent-stopped")
    for strategy in ("ddp", "fsdp2"):
        assert_alike(one / "agent", two / f"agent-{strategy}")


@pytest.mark.parametrize("examples", [1, 3, 7])
def test_the_mean_over_ranks_is_that_of_the_batch(examples):
    """Also where some ranks get more examples than others, or none."""
    batch = torch.arange(float(examples))[:, None], torch.arange(examples)
    shares = [World(rank, 4).part(batch) for rank in range(4)]
    parts = [part for share in shares for part in share.split(2)]
    assert sum(part.weight * float(part.batch[0].mean()) for part in parts) / 4 == pytest.approx((examples - 1) / 2)
    counted = [int(n) for part in parts if part.weight for n in part.batch[1]]
    assert counted == list(range(examples)) and {share.examples for share in shares} == {examples}
    assert sum(share.counted for share in shares) == examples
    assert ALONE.part(batch).batch is batch and ALONE.part(batch).weight == 1


def test_a_launcher_says_which_process_this_is(monkeypatch):
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "5"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert launched() == World(5, 8, 1)
    for count in ("1", "", "many"):
        monkeypatch.setenv("WORLD_SIZE", count)
        assert launched() == ALONE


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"strategy": "dp"}, "strategy is 'dp'; it must be one of ddp, fsdp2"),
        ({"timeout": 0.0}, "timeout is 0.0; it must be a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
    ],
)
def test_a_launch_that_cannot_be(values, words):
    with pytest.raises(InputError, match=f"^{words}"):
        Launch(**values)


def test_each_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(Classification, "prepared", lambda self, *_: self)
    task = Classification.noise({"train_images": 100, "image_shape": (1, 8, 8), "classes": 10}, 100)
    assert resolve(changed(MLP, device="cuda"), task, World(3, 4, 1)).device == torch.device("cuda", 1)
    with pytest.raises(InputError, match="device is 'cuda:2', but each rank takes a GPU of its own; give cuda"):
        resolve(changed(MLP, device="cuda:2"), task, World(3, 4, 1))


def start_ranks(arguments: list[str], logs: list[Path]) -> tuple[torch.distributed.Store, list[BaseProcess]]:
    """Start the command on a rank for each log, as torchrun does; return its store, on a free port, and the ranks."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(logs))]
    return store, [start_command(arguments, shared | rank, log) for rank, log in zip(ranks, logs, strict=True)]


@pytest.fixture
def launch(tmp_path):
    """Start processes of the command that train, without a launcher that would notice an end.

    Takes their number and timeout; returns them, their folder and their logs once they train.
    """
    folder, stores, started = tmp_path / "run", [], []

    def launch(count: int, timeout: int) -> tuple[list[BaseProcess], Path, list[Path]]:
        options = ["--width=32", "--block-size=8", "--sparsity=0.5", "--epochs=60", "--batch-size=150", "--seeds=1"]
        options += ["--update-every=2", "--device=cpu", "--no-dense", "--save-every=1", f"--out={folder}"]
        logs = [tmp_path / f"{rank}.log" for rank in range(count)]
        store, ranks = start_ranks(["train", *options, f"--timeout={timeout}"], logs)
        stores.append(store)
        started.extend(ranks)
        deadline = time.monotonic() + 120
        while not (folder / METRICS).is_file() or not (folder / METRICS).read_text():
            assert time.monotonic() < deadline and started[0].is_alive(), logs[0].read_text()
            time.sleep(0.05)
        return started, folder, logs

    try:
        yield launch
    finally:
        for process in started:
            process.kill()
            process.join()


def code_of(process: BaseProcess) -> int | None:
    process.join(60)
    return process.exitcode


def last_line(log: Path) -> str:
    return log.read_text().splitlines()[-1]


def test_ctrl_c_saves_and_ends_all(launch):
    started, folder, logs = launch(2, 60)
    os.kill(started[1].pid, signal.SIGINT)  # on any of them
    assert [code_of(process) for process in started] == [130, 0]
    assert last_line(logs[0]) == f"saved. To go on: sparsekern train --resume {folder}"
    assert logs[1].read_text() == ""


def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(launch, tmp_path):
    started, folder, logs = launch(2, 20)
    os.kill(started[1].pid, signal.SIGKILL)
    assert code_of(started[0]) == 3
    words = "error: rank 0: rank 1 has ended, or not answered for 20 seconds. stopped at once; what was saved last is"
    assert last_line(logs[0]) == f"{words} kept. To go on: sparsekern train --resume {folder}"
    assert not (folder / RESULTS).exists()
    with pytest.raises(Interrupted):
        resume(folder, StopAt(15), keep=1)
    config = changed(MLP, epochs=60, batch_size=150, dense=False)
    newest = max((folder / "checkpoints" / "seed-0").glob("step-*"))  # the best one may stay beside it
    with pytest.raises(Interrupted):
        start(config, tmp_path / "one", StopAt(int(newest.name[5:])), Keeping(keep=1))
    one = load_file(tmp_path / "one" / "checkpoints" / "seed-0" / newest.name / "sparse.safetensors")
    for name, tensor in load_file(newest / "sparse.safetensors").items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, one[name]), name


def test_a_rank_that_falls_silent_is_named_by_the_others(launch):
    """Also where it holds up one of them only, which then holds up the next."""
    started, folder, logs = launch(3, 10)
    os.kill(started[1].pid, signal.SIGSTOP)
    assert [code_of(started[rank]) for rank in (0, 2)] == [3, 3] and started[1].is_alive()
    for rank, saved in ((0, "was saved"), (2, "rank 0 saved")):
        words = f"error: rank {rank}: rank 1 has ended, or not answered for 10 seconds. stopped at once; what {saved}"
        assert last_line(logs[rank]) == f"{words} last is kept. To go on: sparsekern train --resume {folder}"


def test_a_store_that_has_vanished_does_not_hold_up_a_rank():
    class Vanished(torch.distributed.HashStore):
        def check(self, keys: list[str]) -> bool:
            time.sleep(60)
            return False

    assert lost_ranks(World(1, 3), Vanished(), 0.2) == lost_ranks(World(1, 3), None, 0.2) == [0, 2]


def test_a_store_whose_process_has_ended_leaves_no_traceback(monkeypatch):
    class Ended(torch.distributed.HashStore):
        def set(self, key: str, value: str) -> None:
            raise torch.distributed.DistNetworkError("failed to send, got error 32: Broken pipe")

    traced: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", traced.append)
    assert lost_ranks(World(1, 3), Ended(), 0.2) == [0, 2] and not traced


def test_the_commands_of_the_page_run(tmp_path, text):
    """In small, and two ranks in place of eight, once by torchrun; those of examples are for their own tests."""
    page = (Path(__file__).parent.parent.parent / "docs" / "scale.md").read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commands = [line for kind, block in blocks if not kind for line in block.splitlines() if "examples/" not in line]
    assert len(commands) == 5
    small = (
        f"--data {text} --width 64 --depth 1 --context 16 --batch-size 200 --epochs 1 --device cpu --no-dense --quiet"
    )
    launched = ["--nproc-per-node", "2", "-m", "sparsekern"]
    for number, command in enumerate(commands):
        program, *words = command.replace("-node 8", "-node 2").replace(" runs/", f" {tmp_path}/runs/").split()
        options = [] if "--resume" in words else [*small.split(), "--quiet"]
        if number == 1:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *words, *options],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0 and done.stdout.count("config, metrics, checkpoints") == 1, done.stderr
            continue
        assert program == "sparsekern" or words[:4] == launched
        logs = [tmp_path / f"{number}-{rank}.log" for rank in range(2 if program == "torchrun" else 1)]
        if program == "torchrun":
            _store, ranks = start_ranks(words[4:] + options, logs)
        else:
            ranks = [start_command(words + options, {}, logs[0])]
        for rank in ranks:
            rank.join(300)
        assert [rank.exitcode for rank in ranks] == [0] * len(logs), [log.read_text() for log in logs]
    folders = [tmp_path / "runs" / name for name in ("one", "two", "eight")]
    for folder in folders[1:]:
        assert_alike(folders[0], folder)
