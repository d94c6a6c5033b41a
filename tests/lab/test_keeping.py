import pytest

from sparsekern.lab.keeping import Clock, Keeping, best_step


@pytest.mark.parametrize("every", ["0", "", "10", "05", "1.5min", "min", "3 h", "1d", "9" * 12, "5\n", None, 5])
def test_how_often(every):
    if every == "10":
        assert Keeping(every).save_every == every
        return
    with pytest.raises(ValueError, match=r"save_every is .* a number of steps such as 500, or a time"):
        Keeping(every)


@pytest.mark.parametrize("keep", [0, -1, 1.0, True, "2", None])
def test_how_many(keep):
    with pytest.raises(ValueError, match=r"keep is .*; it must be a whole number of 1 or more"):
        Keeping(keep=keep)


def test_there_and_back():
    assert Keeping.from_json(Keeping("2h", 5).to_json()) == Keeping("2h", 5)
    assert Keeping.from_json({"keep": 5}) == Keeping(keep=5)
    with pytest.raises(ValueError, match=r"does not know: \['last', 'other'\]"):
        Keeping.from_json({"other": 1, "last": 2})


def test_a_clock_of_steps():
    clock = Clock(Keeping("3"), steps=10)
    assert [clock.due(steps) for steps in (10, 12, 13)] == [False, False, True]
    clock.set(13)
    assert not clock.due(15) and clock.due(16)


@pytest.mark.parametrize(("every", "seconds"), [("2s", 2), ("10min", 600), ("2h", 7200)])
def test_a_clock_of_time(every, seconds, monkeypatch):
    now = [5.0]
    monkeypatch.setattr("sparsekern.lab.keeping.time.monotonic", lambda: now[0])
    clock = Clock(Keeping(every), steps=0)
    now[0] += seconds - 1
    assert not clock.due(10**9)
    now[0] += 1
    assert clock.due(0)
    clock.set(0)
    assert not clock.due(0)


def row(network, epoch, accuracy):
    return {"network": network, "epoch": epoch, "step": 10 * epoch, "test_accuracy": accuracy}


def test_the_best_epoch_is_the_first_networks():
    rows = [row("sparse", 1, 0.5), row("dense", 1, 0.9), row("sparse", 2, 0.7), row("dense", 2, 0.6)]
    rows += [row("sparse", 3, 0.7), row("dense", 3, 1.0)]
    assert best_step(rows, ["sparse", "dense"]) == 40, "of equal ones the first"
    assert best_step([*rows, row("sparse", 4, 0.9)], ["sparse", "dense"]) == 40, "the dense one is not done with it"
    assert best_step(rows[:1], ["sparse"]) == 10
    assert best_step(rows[:1], ["sparse", "dense"]) is None and best_step([], ["sparse"]) is None
