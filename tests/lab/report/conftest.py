import pytest


@pytest.fixture(autouse=True)
def _text_stays_text(monkeypatch):
    """SVG files hold their text as text, so that a test can look for it."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


@pytest.fixture
def calls(monkeypatch):
    """Returns a function that records the arguments of every later call of a method of matplotlib's axes."""
    from matplotlib.axes import Axes

    def record(name):
        made, method = [], getattr(Axes, name)
        monkeypatch.setattr(Axes, name, lambda axes, *args, **how: (made.append(args), method(axes, *args, **how))[1])
        return made

    return record
