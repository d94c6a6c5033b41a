from __future__ import annotations

import json
import signal

import pytest
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.lab.train import Learner

TINY = ["--width=32", "--block-size=8", "--sparsity=0.5", "--batch-size=400", "--device=cpu", "--quick"]


def invoke(*arguments):
    return CliRunner().invoke(application(), ["compare", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "new"
    return folder, invoke(
        *TINY, "--method=static", "--method=gse:distribution=grabo", "--sparsity=0.75", "--out", folder
    )


def test_the_table_and_the_progress(finished):
    folder, result = finished
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert "digits" in lines[0] and "width 32" in lines[0]
    assert [line.split("  ")[1] for line in lines if " 75 % " in line] == ["static", "gse, distribution grabo"]
    assert "one seed" in result.stdout and str(folder / "comparison.png") in result.stdout
    assert "run 5/5  gse-distribution-grabo-s0.75-b8" in result.stderr and "seed 1/1  epoch 1/1" in result.stderr
    assert (folder / "comparison.png").is_file()


def test_a_second_call_shows_the_same(finished):
    folder, result = finished
    again = invoke("--out", folder, "--quiet")
    assert (again.exit_code, again.stdout) == (0, result.stdout)
    assert again.stderr == f"{folder} is finished: nothing is left to train. This is what came out\n"


def test_what_is_finished_is_not_announced_again(finished):
    result = invoke("--out", finished[0])
    assert "run " not in result.stderr


def test_json_is_alone_on_stdout(finished):
    content = json.loads(invoke("--out", finished[0], "--json", "--quiet").stdout)
    assert content["folder"] == str(finished[0]) and len(content["rows"]) == 5
    assert content["rows"][0]["training_flops"] > content["rows"][1]["training_flops"] > 0
    assert content["rows"][0]["peak_bytes"] > 0


def test_a_language_model_with_a_sparsity_for_each_kind_of_layers(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsekern.lab.language.EXAMPLES", 32)
    (tmp_path / "a.txt").write_text("To be, or not to be. " * 200)
    options = [
        f"--data={tmp_path / 'a.txt'}",
        "--recipe=gpt-nano",
        "--depth=1",
        "--context=16",
        "--width=64",
        "--quick",
    ]
    kinds = ["--sparsity=mlp=0.75,attention=0.5", "--sparsity=0.5", "--no-dense", "--method=static", "--quiet"]
    result = invoke(*options, *kinds, "--device=cpu", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert "mlp 75 %, attention 50 %" in result.stdout and (tmp_path / "new" / "comparison.png").is_file()
    names = {path.name for path in (tmp_path / "new").iterdir() if path.is_dir()}
    assert names == {"static-smlp0.75-attention0.5-b16", "static-s0.5-b16"}
    again = invoke("--out", tmp_path / "new", "--quiet", "--json")
    rows = json.loads(again.stdout)["rows"]
    assert [row["sparsity"] for row in rows] == [{"mlp": 0.75, "attention": 0.5}, 0.5]
    wrong = invoke("--recipe=gpt-nano", "--sparsity=tail=0.5", "--out", tmp_path / "other")
    assert (
        wrong.exit_code == 2 and "sparsity is given for tail; recipe gpt-nano has mlp, attention, head" in wrong.stderr
    )


def test_another_folder_is_not_written_to(finished):
    result = invoke("--epochs", "7", "--out", finished[0])
    assert result.exit_code == 2 and "epochs is 7, but the comparison in" in result.stderr


def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch):
    folder, step, done = tmp_path / "my folder", Learner.step, []

    def pressed(learner):
        done.append(learner)
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)
        return step(learner)

    monkeypatch.setattr(Learner, "step", pressed)
    result = invoke(*TINY, "--method=static", "--no-dense", "--out", folder)
    assert result.exit_code == 130 and result.stdout == ""
    assert f"saved. To go on: sparsekern compare --out '{folder}'" in result.stderr
    assert invoke("--out", folder, "--quiet", "--json").exit_code == 0


def test_ctrl_c_before_anything_is_written(tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsekern.lab.tasks.load", stopped)
    result = invoke("--out", tmp_path / "new")
    assert result.exit_code == 130 and "nothing is saved" in result.stderr


def test_the_help_names_what_train_says_too():
    text = " ".join(CliRunner().invoke(application(), ["compare", "--help"], env={"COLUMNS": "200"}).output.split())
    for option in ("--method", "--preset", "--sparsity", "--block-size", "--recipe", "--seeds", "--quick", "--json"):
        assert option in text
