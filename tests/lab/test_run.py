from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import numpy
import pytest
import torch

import sparsekern as sk
from sparsekern.errors import InputError
from sparsekern.files import load_
from sparsekern.lab import Config, Interrupted, Observer, checkpoint, resume, start
from sparsekern.lab.checkpoint import Keeping
from sparsekern.lab.history import film
from sparsekern.lab.resolved import build
from sparsekern.lab.run import environment
from sparsekern.lab.train import Learner
from sparsekern.training import METHODS
from tests.lab.runs import StopAt, changed, network_of, rows_of, run_of

CONFIG = Config(
    width=32,
    block_size=8,
    sparsity=0.5,
    augment="none",
    epochs=3,
    batch_size=400,
    seeds=2,
    update_every=2,
    device="cpu",
)
BATCHES = 4
STEPS = 2 * 2 * 3 * BATCHES  # seeds, networks, epochs


def weights(folder, networks=("sparse", "dense"), seeds=(0, 1)):
    return {
        f"{seed}/{network}": (
            checkpoint.latest(folder / "checkpoints" / f"seed-{seed}") / f"{network}.safetensors"
        ).read_bytes()
        for seed in seeds
        for network in networks
    }


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)  # it takes longer than the training


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, start(CONFIG, folder, Observer()).results


def test_the_run_folder(straight):
    folder, results = straight
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "results.json",
        "summary.png",
    ]
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["config"] == CONFIG.to_json() and results["format_version"] == 4
    assert results["networks"]["sparse"]["stored_parameters"] < results["networks"]["dense"]["stored_parameters"]
    assert results["comparison"]["time_sparse_over_dense"]["median"] > 0
    rows = rows_of(folder)
    assert [(row["seed"], row["epoch"], row["network"]) for row in rows] == [
        (seed, epoch, network) for seed in (0, 1) for epoch in (1, 2, 3) for network in ("sparse", "dense")
    ]
    assert 0.1 < rows[-1]["test_accuracy"] < 1
    final = [row["test_accuracy"] for row in rows if row["epoch"] == 3 and row["network"] == "sparse"]
    assert results["networks"]["sparse"]["test_accuracy"]["by_seed"] == final


def test_a_finished_checkpoint_holds_the_network_and_no_optimizer(straight):
    newest = checkpoint.latest(straight[0] / "checkpoints" / "seed-0")
    state = checkpoint.load_state(newest)
    assert state["finished"] and "learners" not in state
    model = network_of("sparse", CONFIG, (1, 8, 8), 10, seed=99)
    load_(model, newest / "sparse.safetensors")
    keys = sk.sparse_layers(model)["hidden1"].topology.sorted_keys()
    start, frames = film(state["history"], "hidden1")
    assert frames[-1].now.flatten().nonzero().squeeze(1).tolist() == keys.tolist()
    assert frames[-1].blocks[0] == len(keys) == int(start.count_nonzero()) == 8 > frames[-1].blocks[1]


@pytest.mark.parametrize(
    "stops",
    [
        (0,),  # before the first step
        (BATCHES + 2,),  # in the middle of the dense network's first epoch
        (2 * BATCHES,),  # between two epochs
        (2 * BATCHES + 3,),  # in the middle of the sparse network's second epoch
        (STEPS // 2 + 3 * BATCHES + 1,),  # in the second seed
        (5, 0, 1, 7),  # again and again, also at once after resuming
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(straight, no_picture, tmp_path, stops):
    folder, results = straight
    with pytest.raises(Interrupted) as stopped:
        start(CONFIG, tmp_path, StopAt(stops[0]))
    assert stopped.value.folder == tmp_path
    for stop in stops[1:]:
        with pytest.raises(Interrupted):
            resume(tmp_path, StopAt(stop))
    observer = StopAt()
    resumed = resume(tmp_path, observer).results
    assert observer.asked == STEPS - sum(stops), "steps were lost or done twice"
    assert weights(tmp_path) == weights(folder)
    assert rows_of(tmp_path) == rows_of(folder)
    assert len(observer.seen) < len(rows_of(folder)) or stops == (0,)
    for name in ("sparse", "dense"):
        assert resumed["networks"][name]["test_accuracy"] == results["networks"][name]["test_accuracy"]


class Killed(StopAt):
    """Dies before a step, counted from 0."""

    def should_stop(self):
        if super().should_stop():
            raise RuntimeError("killed")
        return False


def test_a_killed_run_goes_on_from_the_last_epoch(straight, no_picture, tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        start(CONFIG, tmp_path, Killed(3 * BATCHES + 1))  # the sparse row of the second epoch is written, and lost
    assert len(rows_of(tmp_path)) == 3
    resume(tmp_path, Observer())
    assert weights(tmp_path) == weights(straight[0])
    assert rows_of(tmp_path) == rows_of(straight[0])


@pytest.mark.parametrize("every", ["1", "3", "1s"])
def test_a_long_epoch_is_not_lost(straight, no_picture, tmp_path, every, monkeypatch):
    """Killed right after a save that was due, and again; the steps between two saves are all that is done twice."""
    seconds = iter(range(10**6))
    monkeypatch.setattr("sparsekern.lab.checkpoint.time.monotonic", lambda: next(seconds))

    done = 0
    with pytest.raises(RuntimeError, match="killed"):
        start(CONFIG, tmp_path, killed := Killed(7), Keeping(save_every=every))
    while True:
        done += killed.asked - 1
        try:
            resume(tmp_path, killed := Killed(7))
            break
        except RuntimeError:
            pass
    assert STEPS <= done + killed.asked <= STEPS * (2 if every == "3" else 1.2)
    assert weights(tmp_path) == weights(straight[0]) and rows_of(tmp_path) == rows_of(straight[0])


def test_the_best_checkpoint_and_the_last_two_stay(straight):
    folder, _ = straight
    for seed in (0, 1):
        rows = [row for row in rows_of(folder) if row["seed"] == seed]
        best = max((row for row in rows if row["network"] == "sparse"), key=lambda row: row["test_accuracy"])
        there = {path.name for path in (folder / "checkpoints" / f"seed-{seed}").iterdir()}
        assert there == {f"step-{2 * step:08d}" for step in (best["step"], 2 * BATCHES, 3 * BATCHES)}


def test_a_seed_killed_between_its_last_checkpoint_and_the_deletion_of_older_ones(straight, no_picture, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "results.json").unlink()
    seed = folder / "checkpoints" / "seed-1"
    before = {path.name for path in seed.iterdir()}
    (seed / "step-00000001").mkdir()
    resume(folder, StopAt(0))
    assert {path.name for path in seed.iterdir()} == before


def test_a_seed_whose_end_is_damaged_is_trained_anew_and_its_rows_come_first(straight, no_picture, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "results.json").unlink()
    last = max((folder / "checkpoints" / "seed-0").iterdir())
    (last / "state.pt").write_bytes(b"")
    resume(folder, Observer())
    assert "state.pt is damaged" in caplog.text
    assert rows_of(folder) == rows_of(straight[0]) and weights(folder) == weights(straight[0])


def test_what_is_kept_may_change_when_a_run_is_resumed(no_picture, tmp_path):
    with pytest.raises(Interrupted):
        start(CONFIG, tmp_path, StopAt(3), Keeping(save_every="1", keep=3))
    seed = tmp_path / "checkpoints" / "seed-0"
    assert sorted(path.name for path in seed.iterdir()) == [f"step-{step:08d}" for step in (1, 2, 3)]
    with pytest.raises(Interrupted):
        resume(tmp_path, StopAt(3), keep=1)
    assert [path.name for path in seed.iterdir()] == ["step-00000006"]
    with pytest.raises(ValueError, match="keep is 0"):
        resume(tmp_path, StopAt(3), keep=0)


def test_a_second_process_is_told_that_the_folder_is_in_use(tmp_path):
    class Second(Observer):
        def should_stop(self):
            with pytest.raises(ValueError, match="is in use by another process"):
                resume(tmp_path, Observer())
            with pytest.raises(ValueError, match="is in use by another process"):
                start(CONFIG, tmp_path, Observer())
            return True

    with pytest.raises(Interrupted):
        start(CONFIG, tmp_path, Second())
    assert ".lock" not in {path.name for path in tmp_path.iterdir()}


def test_a_run_that_another_process_finished_in_the_meantime_is_only_read(straight, monkeypatch, tmp_path):
    folder, results = straight
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "results.json").rename(tmp_path / "results.json")

    @contextmanager
    def locked(path):
        (tmp_path / "results.json").rename(path / "results.json")
        yield

    monkeypatch.setattr("sparsekern.lab.run.locked", locked)
    assert resume(tmp_path / "run", StopAt(0)).results == results


EVERY_METHOD = {
    "static": {"score": "grasp"},
    "set": {"min_age": 1},
    "rigl": {"scoring": "screen"},
    "gse": {"distribution": "graest", "scope": "global"},
    "vrpge": {"structure_every": 2},
    "gradual": {"initial_sparsity": 0.2, "compact": True},
    "dsr": {"threshold": 0.1, "capacity": 1.5},
    "srigl": {"min_salient": 1},
    "mest": {"soft_bound": True, "capacity": 1.5},
    "top-kast": {"pool": 1.5},
    "granet": {"initial_sparsity": 0.2, "scoring": "screen"},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_ends_bit_for_bit_alike_when_it_is_stopped_or_killed(no_picture, tmp_path, method):
    # updates at steps 3 and 6 of 12, stop at 9: probes are armed for two stages from step 1 or 4 on
    options = {"options": EVERY_METHOD[method], "seeds": 1, "dense": False, "update_every": 3}
    config = changed(CONFIG, method=method, **options)
    start(config, tmp_path / "straight", Observer())

    def same(name):
        rows = rows_of(tmp_path / name)
        assert rows == rows_of(tmp_path / "straight") and rows[-1]["updates"] >= 2
        assert weights(tmp_path / name, ("sparse",), (0,)) == weights(tmp_path / "straight", ("sparse",), (0,))

    with pytest.raises(Interrupted):
        start(config, tmp_path / "stopped", StopAt(2))
    for stop in (3, 4):  # at step 5, between the two stages of an update, and at step 9
        with pytest.raises(Interrupted):
            resume(tmp_path / "stopped", StopAt(stop))
    resume(tmp_path / "stopped", Observer())
    same("stopped")

    with pytest.raises(RuntimeError, match="killed"):
        start(config, tmp_path / "killed", Killed(7))
    resume(tmp_path / "killed", Observer())
    same("killed")


def test_a_finished_run_is_only_read(straight):
    folder, results = straight
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert resume(folder, StopAt(0)).results == results
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_global_generator_is_left_alone(no_picture, tmp_path):
    torch.manual_seed(1)
    start(changed(CONFIG, epochs=1, seeds=1, dense=False), tmp_path, Observer())
    after = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(()))


def test_without_the_twin(no_picture, tmp_path):
    results = start(changed(CONFIG, epochs=1, seeds=1, dense=False), tmp_path, Observer()).results
    assert list(results["networks"]) == ["sparse"] and "comparison" not in results
    newest = checkpoint.latest(tmp_path / "checkpoints" / "seed-0")
    assert sorted(path.name for path in newest.iterdir()) == ["sparse.safetensors", "state.pt"]


def test_the_twin_alone_is_the_twin_of_a_pair(straight, tmp_path):
    results = start(changed(CONFIG, sparse=False, method="static"), tmp_path, Observer()).results
    assert list(results["networks"]) == ["dense"] and "comparison" not in results
    assert not (tmp_path / "summary.png").exists(), "it shows blocks"
    assert weights(tmp_path, ("dense",)) == {k: v for k, v in weights(straight[0]).items() if "dense" in k}


def test_an_error_leaves_no_folder(tmp_path):
    for wrong in ({"width": 8, "sparsity": 0.9}, {"device": "cuda:99"}, {"data": str(tmp_path / "nothing.npz")}):
        with pytest.raises(ValueError):
            start(changed(CONFIG, **wrong), tmp_path / "run", Observer())
        assert not (tmp_path / "run").exists()


@pytest.fixture
def small_data():
    generator = numpy.random.default_rng(0)
    images = {f"{part}_images": generator.integers(0, 256, (40, 6, 6), dtype="uint8") for part in ("train", "test")}
    return images | {f"{part}_labels": numpy.arange(40) % 3 for part in ("train", "test")}


def test_data_that_changed_are_noticed(small_data, tmp_path):
    path, folder = tmp_path / "data.npz", tmp_path / "run"
    numpy.savez(path, **small_data)
    with pytest.raises(Interrupted):
        start(changed(CONFIG, data=str(path)), folder, StopAt(1))
    small_data["test_images"][0, 0, 0] ^= 1
    numpy.savez(path, **small_data)
    with pytest.raises(InputError, match="have changed since it began"):
        resume(folder, Observer())


def test_data_whose_name_is_a_broken_formula(small_data, tmp_path):
    data = tmp_path / r"$\frac{1}{$ [red]<b>.npz"
    numpy.savez(data, **small_data)
    start(changed(CONFIG, data=str(data), epochs=1, seeds=1), tmp_path / "run", Observer())
    assert {"results.json", "summary.png"} < {path.name for path in (tmp_path / "run").iterdir()}


def test_the_environment_names_the_kernels():
    found = environment(run_of(CONFIG))
    assert found["kernels"] in ("cpu", "eager"), "not those that Triton interprets"
    assert found["torch"] == torch.__version__


def test_the_environment_names_the_kernels_of_convolutions(monkeypatch):
    asked = []
    monkeypatch.setattr("sparsekern.lab.run.backends.resolve", lambda name, op, *rest: asked.append(op))
    for recipe in ("mlp", "resnet20", "simplevit-tiny"):
        environment(run_of(Config(recipe=recipe), shape=(3, 8, 8)))
    assert asked == ["linear", "conv2d", "linear"]


def test_what_goes_wrong_with_a_picture_ends_no_training_and_resuming_draws_it(tmp_path, monkeypatch, caplog):
    def broken(path, config, results, rows, history):
        assert (tmp_path / "results.json").is_file(), "the results come first"
        raise RuntimeError("a formula")

    with monkeypatch.context() as patch:
        patch.setattr("sparsekern.lab.run.draw_summary", broken)
        results = start(CONFIG, tmp_path, Observer()).results
    assert "summary.png is not drawn (RuntimeError: a formula); the results are complete" in caplog.text
    assert not (tmp_path / "summary.png").exists()
    drawn = []
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda path, *what: drawn.append((path, *what)))
    assert resume(tmp_path, Observer()).results == results
    ((path, config, read, rows, history),) = drawn
    assert (
        path == tmp_path / "summary.png"
        and config == CONFIG
        and read == results
        and rows == rows_of(tmp_path, timed=True)
    )
    assert list(history["layers"]) == ["hidden1", "hidden2"]
    shutil.rmtree(
        tmp_path / "checkpoints"
    )  # of what is gone no picture can be made, and the results are read all the same
    assert resume(tmp_path, Observer()).results == results and len(drawn) == 1


def test_each_network_is_built_once(no_picture, tmp_path, monkeypatch):
    """Wrong options are found by the networks that train, before the folder is made."""
    built = []
    counted = (lambda run, *which: built.append(which) or build(run, *which),)
    monkeypatch.setattr(Learner.__init__, "__defaults__", counted)
    start(changed(CONFIG, epochs=1), tmp_path / "run", Observer())
    assert built == [(network, seed) for seed in (0, 1) for network in ("sparse", "dense")]


@pytest.mark.parametrize("version", [1, 3, 5])
@pytest.mark.parametrize("name", ["config.json", "results.json"])
def test_a_run_of_another_version_is_refused_in_one_sentence(straight, tmp_path, name, version):
    shutil.copytree(straight[0], tmp_path / "run")
    path = tmp_path / "run" / name
    path.write_text(path.read_text().replace('"format_version": 4', f'"format_version": {version}'))
    said = f"{name} has format version {version}; this code reads 4: use the version of sparsekern that wrote it"
    with pytest.raises(InputError, match=said) as error:
        resume(tmp_path / "run", Observer())
    assert "\n" not in str(error.value)
