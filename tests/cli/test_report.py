import json

import pytest
from typer.testing import CliRunner

from sparsekern.cli.main import application
from sparsekern.lab import Config, Interrupted, Observer, start
from sparsekern.lab.report.page import MARK

CONFIG = Config(width=32, block_size=8, sparsity=0.5, epochs=2, batch_size=400, seeds=1, update_every=1, device="cpu")


def invoke(*arguments):
    return CliRunner().invoke(application(), ["report", *map(str, arguments)], env={"COLUMNS": "120"})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekern.lab.run.draw_summary", lambda *_: None)
        folder = tmp_path_factory.mktemp("finished") / "my run é"
        start(CONFIG, folder, Observer())
    return folder


class StopAfter(Observer):
    def __init__(self, steps):
        self.left = steps

    def should_stop(self):
        self.left -= 1
        return self.left < 0


def test_the_page_of_a_finished_run(finished):
    result = invoke(finished)
    assert result.exit_code == 0, result.output
    page = finished / "report.html"
    assert result.stdout == f"{page}: open it in a browser\n"
    text = page.read_text()
    assert text.startswith(MARK) and len(text) < 2_000_000
    for words in (
        "Finished: 1 seed, 2 epochs each.",
        "hidden2",
        "time, ms",
        "test accuracy",
        "update 3",
        "<li>accuracy: after the last epoch",
    ):
        assert words in text
    assert "cannot show" not in text


def test_a_page_is_replaced_and_json_is_alone(finished, tmp_path):
    page = tmp_path / "a page.html"
    page.write_text(MARK + "an older page")
    result = invoke(finished, "--out", page, "--json", "--no-measure")
    values = json.loads(result.stdout)
    assert values["page"] == str(page) and values["finished"] and "an older page" not in page.read_text()
    assert values["layers"][1]["blocks"] == 8 and values["topology"][0]["update"] == 0
    assert "--no-measure" in page.read_text() and values["results"] == json.loads(
        (finished / "results.json").read_text()
    )


@pytest.mark.parametrize(("steps", "said"), [(0, "no epoch is done"), (9, "has done epoch 1")])
def test_the_page_of_a_run_that_is_not_finished(tmp_path, steps, said):
    with pytest.raises(Interrupted):
        start(CONFIG, tmp_path, StopAfter(steps))
    result = invoke(tmp_path, "--no-measure")
    assert result.exit_code == 0 and "note: The run is not finished" in result.stdout
    text = (tmp_path / "report.html").read_text()
    assert said in text and "cannot show" in text and ("training state" in text) == (steps > 0)


def test_a_run_whose_checkpoints_are_gone(tmp_path):
    with pytest.raises(Interrupted):
        start(CONFIG, tmp_path, StopAfter(9))
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    result = invoke(tmp_path)
    assert result.exit_code == 0 and "no checkpoint" in result.stdout


def test_a_disk_that_is_full(finished, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsekern.cli.report.write_text", full)
    result = invoke(finished, "--out", tmp_path / "page.html", "--no-measure")
    assert result.exit_code == 2 and "no room left on the disk; free some" in result.stderr
    assert list(tmp_path.iterdir()) == []
