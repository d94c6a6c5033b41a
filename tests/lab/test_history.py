import copy

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.lab import history
from sparsekern.lab.history import FRAMES, LAYERS, PIXELS, History, View, film, view_of
from sparsekern.topology import Grid, conv_grid


def test_a_fine_view_shows_each_block():
    view = view_of(Grid(64, 96, (32, 32)))  # 2 x 3 blocks
    assert (view.tile, view.shape) == (1, (2, 3))
    assert view.share(torch.tensor([0, 5])).tolist() == [[255, 0, 0], [0, 0, 255]]


def test_tiles_are_cut_inside_groups_and_taps():
    # 2 groups of 3 block rows, 2 taps of 3 block columns: in tiles of 2, two pixels each way for each of them
    view = View(conv_grid(6, 6, (1, 2), (1, 1), groups=2), 2)
    assert (view.grid.rows, view.grid.cols, view.shape) == (6, 6, (4, 4))
    share = view.share(torch.tensor([0, 1, 6, 2 * 6 + 2, 3 * 6 + 3, 5 * 6 + 5]))
    assert share.tolist() == [
        [192, 0, 0, 0],  # 3 of 4 places, rounded up
        [0, 255, 0, 0],  # the only one
        [0, 0, 64, 0],
        [0, 0, 0, 255],
    ]
    assert view.share(torch.arange(36)).eq(255).all() and view.share(torch.tensor([])).eq(0).all()


@pytest.mark.parametrize(
    "grid", [Grid(2048, 2048, (1, 1)), conv_grid(512, 512, (3, 3), (1, 1)), Grid(3, 10**6, (1, 1))]
)
def test_an_image_is_bounded(grid):
    height, width = view_of(grid).shape
    assert PIXELS / 4 <= height * width <= PIXELS


def test_more_groups_than_pixels_end_in_a_pixel_each():
    assert view_of(conv_grid(2**15, 2**15, (1, 1), (4, 4), groups=2**15)).shape == (2**15, 1)


def trained(updates, *, state=None, layers=2, after=None):
    """Train with an update a step; return the model, its method and the film."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    sk.sparsify_(model, 0.5, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = sk.SET(model, optimizer, update_every=1, drop_fraction=0.5)
    taken = History(method, state)
    for update in range(updates):
        optimizer.step()
        method.step()
        taken.step()
        if after is not None:
            after(update + 1, model, method, taken)
    return model, method, taken


def test_the_film_shows_what_the_topology_was():
    seen = {}

    def after(update, model, method, taken):
        seen[update] = model[0].topology.sorted_keys()

    _, method, taken = trained(4, after=after)
    start, frames = film(taken.state_dict(), "0")
    assert [(frame.step, frame.update) for frame in frames] == [(n, n) for n in range(5)]
    first = method.state_dict()["start"]["0"]
    assert start.flatten().nonzero().squeeze(1).tolist() == first.tolist()
    assert torch.equal(frames[0].now, start) and torch.equal(frames[0].kept, start)
    for update, keys in seen.items():
        now, kept = (image.flatten().nonzero().squeeze(1) for image in (frames[update].now, frames[update].kept))
        assert now.tolist() == keys.tolist() and frames[update].blocks == (len(now), len(kept))
        assert kept.tolist() == sorted(set(keys.tolist()) & set(first.tolist()))
    assert not torch.equal(frames[4].now, start)


def test_a_long_film_is_thinned_out_and_keeps_start_and_end():
    updates = {}

    def after(update, model, method, taken):
        updates[update] = [frame["update"] for frame in taken.state_dict()["frames"]]
        assert len(updates[update]) <= FRAMES
        assert updates[update][0] == 0 and updates[update][-1] == update

    trained(4 * FRAMES, after=after)
    assert updates[FRAMES - 1] == list(range(FRAMES))
    assert updates[FRAMES + 1] == [*range(0, FRAMES + 1, 2), FRAMES + 1]
    assert updates[4 * FRAMES][:3] == [0, 8, 16]


def test_only_the_largest_layers_are_filmed():
    state = trained(0, layers=LAYERS + 2)[2].state_dict()
    assert list(state["layers"]) == [str(i) for i in range(LAYERS)]
    assert state["layers"]["0"] == {
        "shape": (4, 4), "tile": 1, "rows": 4, "cols": 4, "kernel": None, "groups": 1, "block": (4, 4)
    }  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return all(map(same, one, other)) and len(one) == len(other) if isinstance(one, list) else one == other


def test_a_film_goes_on_from_its_state(tmp_path):
    states = {}

    def after(update, model, method, taken):
        states[update] = copy.deepcopy((taken.state_dict(), method.state_dict(), model.state_dict()))

    trained(30, after=after)
    torch.save(states[26][0], tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    model, method, _ = trained(0)
    method.load_state_dict(states[26][1])
    model.load_state_dict(states[26][2])
    again = History(method, saved)
    for _ in range(4):
        method.optimizer.step()
        method.step()
        again.step()
    assert same(again.state_dict(), states[30][0])


def test_steps_without_an_update_take_no_frame():
    _, _, taken = trained(3)
    for _ in range(3):
        taken.step()
    assert len(taken.state_dict()["frames"]) == 4


def test_a_film_is_small(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False))
    sk.sparsify_(model, 0.9, 16)
    state = History(sk.Static(model, torch.optim.SGD(model.parameters()))).state_dict()
    assert state["frames"][0]["images"]["0"].numel() < 6000
    assert history.LAYERS * history.FRAMES * 6000 < 2**20
