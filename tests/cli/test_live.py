import io
import math
from types import SimpleNamespace

from rich.console import Console

from sparsekern.cli.shell import Live
from sparsekern.lab import Config

CONFIG = Config(epochs=2, seeds=2)


def row(network, epoch, accuracy=0.5):
    return {"seed": 0, "network": network, "epoch": epoch, "step": 3 * epoch, "loss": 1.25, "test_accuracy": accuracy}


def show(*, terminal, quiet=False):
    text = io.StringIO()
    with Live(Console(file=text, force_terminal=terminal, width=140), lambda: False, quiet=quiet) as live:
        live.begin(CONFIG, 3, [row("sparse", 1), row("dense", 1)])
        live.step(SimpleNamespace(seed=0, network="sparse", all_epochs=1, all_steps=4, speed=lambda: ""), 0.75)
        live.row(row("sparse", 2, 0.625))
        live.row(row("dense", 2, 0.875))
        task = live._progress.tasks[0]
    return text.getvalue(), task


def test_elsewhere_a_line_an_epoch_but_none_for_earlier_rows():
    text, _ = show(terminal=False)
    assert text == "seed 1/2  epoch 2/2  sparse loss 1.2500 62.5 %  dense loss 1.2500 87.5 %\n"


def test_a_language_model_shows_bits_per_byte_and_its_speed():
    text = io.StringIO()
    with Live(Console(file=text, force_terminal=True, width=200), lambda: False, quiet=False) as live:
        live.begin(Config(recipe="gpt-nano"), 3, [])
        learner = SimpleNamespace(seed=0, network="sparse", all_epochs=0, all_steps=1, speed=lambda: "1,234 tokens/s")
        live.step(learner, 2 * math.log(2))
        bits = {key: value for key, value in row("sparse", 1).items() if key != "test_accuracy"}
        live.row(bits | {"bits_per_byte": 1.75})
        live.step(learner, 2 * math.log(2))
        state = live._progress.tasks[0].fields["state"]
    assert state == "sparse bits per byte 2.0000 1.75 1,234 tokens/s"


def test_on_a_terminal_a_bar():
    text, task = show(terminal=True)
    assert "seed 1/2  epoch 2/2" in text and "dense loss 1.2500 87.5 %" in text
    assert (task.completed, task.total) == (12, 2 * 2 * 2 * 3)


def test_quiet_is_silent():
    assert show(terminal=True, quiet=True)[0] == show(terminal=False, quiet=True)[0] == ""


def test_asks_whether_to_stop():
    answers = iter([False, True])
    live = Live(Console(file=io.StringIO()), lambda: next(answers), quiet=True)
    assert (live.should_stop(), live.should_stop()) == (False, True)


def test_a_comparison_has_a_bar_of_its_own():
    for terminal in (True, False):
        text = io.StringIO()
        with Live(Console(file=text, force_terminal=terminal, width=140), lambda: False, quiet=False) as live:
            for number, name in enumerate(("dense", "set-s0.9-b16")):
                live.cell(name, CONFIG, number, 2)
                live.begin(CONFIG, 3, [])
                live.row(row("dense", 1))
            totals = [(task.completed, task.total) for task in live._progress.tasks]
        assert totals == [(1, 2), (3, 2 * 2 * 2 * 3)], "one bar of runs, one of the present run's steps"
        assert "run 2/2" in text.getvalue() and "set-s0.9-b16" in text.getvalue()
    assert text.getvalue().splitlines()[2:] == [
        "run 2/2  set-s0.9-b16",
        "set-s0.9-b16  seed 1/2  epoch 1/2  dense loss 1.2500 50.0 %",
    ]
