import io
import json
import signal

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.cli.train import recipe_table, recipe_values
from sparsekern.lab.recipes import RECIPES
from sparsekern.lab.train import Learner

TINY = ["--width=32", "--block-size=8", "--sparsity=0.5", "--epochs=2", "--batch-size=400", "--seeds=1", "--device=cpu"]


def invoke(*arguments):
    return CliRunner().invoke(application(), ["train", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture
def no_picture(monkeypatch):
    monkeypatch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)  # it takes longer than the training


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, invoke(*TINY, "--out", folder)


@pytest.fixture
def ctrl_c(monkeypatch):
    """Press Ctrl-C during the given step, so many times. A shell's background job would ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press(at, times=1):
        step, done = Learner.step, []

        def pressed(learner):
            loss = step(learner)
            done.append(loss)
            if len(done) == at:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            return loss

        monkeypatch.setattr(Learner, "step", pressed)

    yield press
    signal.signal(signal.SIGINT, previous)


def test_the_table_the_folder_and_the_progress(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    for text in (
        "digits",
        "50.0 % sparse",
        "test accuracy",
        "stored parameters",
        "training state",
        "median time",
        "dense",
    ):
        assert text in result.stdout
    assert str(folder / "summary.png") in result.stdout
    assert "seed 1/1  epoch 2/2  sparse loss" in result.stderr and "seed" not in result.stdout.split("accuracy  ")[0]
    assert (folder / "summary.png").is_file() and (folder / "config.json").is_file()


def test_resuming_a_finished_run_prints_the_table_again(finished):
    folder, result = finished
    again = invoke("--resume", folder)
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert again.stderr == f"{folder} is finished: nothing is left to train. This is what came out\n"


def test_resuming_a_finished_run_checks_its_options_all_the_same(finished):
    for option, rule in (("--keep=0", "keep is 0; it must be"), ("--save-every=x", "save_every is 'x'; it must be")):
        result = invoke("--resume", finished[0], option)
        assert result.exit_code == 2 and rule in result.stderr and result.stdout == ""


def test_json_is_alone_on_stdout(finished):
    folder, _ = finished
    result = invoke("--resume", folder, "--json")
    content = json.loads(result.stdout)
    assert content["folder"] == str(folder)
    assert {"config", "data", "environment", "networks", "comparison"} < content.keys()


def test_quiet_shows_only_the_table(no_picture, tmp_path):
    result = invoke(*TINY, "--out", tmp_path / "run", "--quiet", "--no-dense")
    assert result.exit_code == 0 and result.stderr == ""
    assert "test accuracy" in result.stdout and "against dense" not in result.stdout


def test_the_twin_alone(tmp_path):
    result = invoke(*TINY, "--out", tmp_path / "run", "--no-sparse")
    assert result.exit_code == 0, result.output
    assert "width 32: dense" in " ".join(result.stdout.split()) and "picture" not in result.stdout


def test_the_default_folder(no_picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(*TINY, "--method", "static", "--json", "--quiet").exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-static-0.5")


def test_the_list_of_recipes():
    result = invoke("--list")
    assert result.exit_code == 0 and "simplevit-tiny" in result.stdout and "Zagoruyko" in result.stdout
    values = json.loads(invoke("--list", "--json").stdout)
    assert [entry["name"] for entry in values["recipes"]][:2] == ["mlp", "resnet20"]


def test_another_recipe(no_picture, tmp_path):
    options = ["--recipe=simplevit-tiny", "--width-multiplier=0.0625", "--block-size=8", "--sparsity=0.5"]
    options += ["--epochs=1", "--batch-size=400", "--device=cpu", "--augment=crop", "--quiet"]
    result = invoke(*options, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "SimpleViT-tiny, 0.0625 times as wide" in " ".join(result.stdout.split())
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["recipe"], config["augment"], config["seeds"], config["rate"]) == ("simplevit-tiny", "crop", 1, 1e-3)


def test_a_preset_with_an_option(no_picture, tmp_path):
    arguments = [*TINY, "--no-dense", "--preset=gse-grabo", "--drop-fraction=0.1", "--quiet"]
    result = invoke(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0 and "(gse-grabo, drop fraction 0.1)" in " ".join(result.stdout.split())
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["method"], config["preset"], config["options"]) == ("gse", "gse-grabo", {"drop_fraction": 0.1})
    assert invoke("--resume", tmp_path / "run", *arguments).exit_code == 0


def test_memory_that_does_not_suffice_is_one_line(tmp_path, monkeypatch):
    def start(*_):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr("sparsekern.cli.train.start_resolved", start)
    result = invoke("--out", tmp_path / "run")
    assert result.exit_code == 2 and result.stderr.startswith("error: the memory does not suffice; choose a smaller")
    for error, defect in ((MemoryError(), False), (RuntimeError("its data is not allocated yet"), True)):
        monkeypatch.setattr("sparsekern.cli.train.start_resolved", lambda *_, error=error: (_ for _ in ()).throw(error))
        result = invoke("--out", tmp_path / "run")
        assert (result.exception is error) == defect, "a defect keeps its traceback"


def test_options_that_contradict_the_resumed_run(finished, tmp_path):
    folder, _ = finished
    for arguments, message in (
        (["--width", "64"], f"width is 64, but the run in {folder} has 32"),
        (["--batch-size", "1"], "batch_size is 1, but"),
        (["--no-dense"], "dense is False, but"),
        (["--data", tmp_path], "data is"),
        (["--min-age", "2"], f"min_age is 2, but the run in {folder} has it not given"),
        (["--out", tmp_path], "--out is"),
    ):
        result = invoke("--resume", folder, *arguments)
        assert result.exit_code == 2 and message in result.stderr
    assert invoke("--resume", folder, *TINY, "--out", folder).exit_code == 0


def test_ctrl_c_saves_and_says_how_to_go_on(no_picture, finished, tmp_path, ctrl_c, monkeypatch):
    folder = tmp_path / "my run"
    with monkeypatch.context() as patch:
        ctrl_c(6)
        result = invoke(*TINY, "--out", folder)
        patch.undo()
    assert result.exit_code == 130 and result.stdout == ""
    assert f"saved. To go on: sparsekern train --resume '{folder}'" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = invoke("--resume", folder, "--json")
    networks = json.loads(resumed.stdout)["networks"]
    straight = json.loads((finished[0] / "results.json").read_text())["networks"]
    assert [n["test_accuracy"] for n in networks.values()] == [n["test_accuracy"] for n in straight.values()]


def test_a_second_ctrl_c_stops_at_once(tmp_path, ctrl_c):
    ctrl_c(6, times=2)
    result = invoke(*TINY, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "stopped at once; what was saved last is kept. To go on:" in result.stderr


def test_ctrl_c_before_anything_is_written(tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekern.lab.tasks.load", stopped)
    result = invoke("--out", tmp_path / "run")
    assert result.exit_code == 130 and "nothing is saved" in result.stderr


def test_a_transform_with_spectral_measures(tmp_path):
    """The table says which; the picture of the block graphs lies beside the other."""
    folder = tmp_path / "run"
    options = ("--transform", "wide", "--sparsity", "0.75", "--spectral", "--width", "64", "--block-size", "8")
    result = invoke(*options, "--epochs", "1", "--seeds", "1", "--update-every", "4", "--out", str(folder))
    assert result.exit_code == 0, result.output
    assert "(set, transform wide)," in " ".join(result.stdout.split())
    assert (folder / "spectral.png").stat().st_size > 10_000
    assert f"and the pictures {folder / 'summary.png'} and {folder / 'spectral.png'}" in " ".join(result.stdout.split())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    sparse = next(row for row in rows if row["network"] == "sparse")
    assert sparse["spectral"][0]["step"] == 1 and sparse["spectral"][-1]["step"] > 1


def test_a_line_a_recipe_on_a_narrow_terminal():
    console = Console(file=io.StringIO(), width=80)
    console.print(recipe_table())
    lines = [line for line in console.file.getvalue().splitlines() if line.strip()]
    rows = dict(zip(RECIPES, lines[2:], strict=False))
    assert len(lines) == 2 + len(RECIPES) + 1 and "default" in lines[-1]
    for name, recipe in RECIPES.items():
        assert rows[name].split()[0] == name and rows[name].rstrip().endswith(recipe.source)
    assert rows["resnet20"].split() == ["resnet20", "0.1", "128", "164", "He", "2016,", "section", "4.2"]


def test_the_same_as_values():
    values = recipe_values()
    assert [entry["name"] for entry in values] == list(RECIPES)
    assert values[0]["epochs"] is None and values[1] == {
        "name": "resnet20",
        "title": "ResNet-20",
        "source": "He 2016, section 4.2",
        "rate": 0.1,
        "batch_size": 128,
        "epochs": 164,
        "block_size": 16,
        "distribution": "erk",
        "augmentation": "crop-flip",
    }


def test_the_numbers_are_shown_by_tensorboard(tmp_path, no_picture):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = invoke(*TINY, "--out", tmp_path / "run", "--log-to", tmp_path / "board")
    assert result.exit_code == 0, result.output
    events = accumulator.EventAccumulator(str(tmp_path / "board")).Reload()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    expected = [(row["step"], row["test_accuracy"]) for row in rows if row["network"] == "sparse"]
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("sparse/seed0/test_accuracy")] == expected
