"""Races of tiny layers: who takes part, what is checked, what is said. No test here looks at a time."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from sparsekern.analysis.layer_race import CHECKED, LayerInput, dense_contestant, sparse_contestant, what_is_wrong
from sparsekern.lab.bench import request, run
from sparsekern.lab.bench.request import Request
from sparsekern.lab.bench.results import draw_bench
from sparsekern.lab.bench.run import FORWARD, STEP, run_bench
from sparsekern.nn import SparseConv2d, SparseLinear

TINY = Request(
    linear=((32, 48),),
    tokens=6,
    conv=((8, 16, 3),),
    stride=2,
    image=(2, 6, 5),
    model=None,
    input=None,
    sparsity=(0.5, 0.75),
    block=((1, 1), (8, 8)),
    dtype=("float32",),
    threads=(1,),
    device=torch.device("cpu"),
    peers=False,
    seconds=1e-3,
)


def raced(**changes):
    seen = []
    return run_bench(replace(TINY, **changes), lambda *progress: seen.append(progress)), seen


def test_every_layer_sparsity_pass_and_contestant_has_a_row(threads):
    threads(1)
    report, seen = raced(dtype=("float32", "bfloat16"))
    assert len(report.rows) == 2 * 2 * 2 * 2 * 3  # layers, dtypes, sparsities, passes, contestants
    assert {row["contestant"] for row in report.rows} == {"dense", "1x1", "8x8"}
    assert {row["pass"] for row in report.rows} == {FORWARD, STEP}
    assert {row["layer"] for row in report.rows} == {
        "linear 32 -> 48, 6 tokens", "conv 8 -> 16, 3x3, stride 2, 2 images of 6x5",
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["samples"] >= 2 for row in report.rows)
    assert all(row["vs_dense"] == 1 for row in report.rows if row["contestant"] == "dense")
    assert seen[-1][1:] == (15, 16) and not report.notes and torch.get_num_threads() == 1


def test_a_wrong_answer_is_said_and_not_timed(monkeypatch):
    forward = SparseLinear.forward
    monkeypatch.setattr(SparseLinear, "forward", lambda self, x: (1 + (self.block_size == (8, 8))) * forward(self, x))
    report, _ = raced(conv=(), sparsity=(0.5,))
    assert {row["contestant"] for row in report.rows} == {"dense", "1x1"}
    (note,) = report.notes
    assert note == "linear 32 -> 48, 6 tokens, float32, 50%: 8x8 is wrong and not raced: y is off by 1 of its norm"


def test_what_cannot_be_built_is_said_and_the_others_are_raced():
    report, _ = raced(conv=(), sparsity=(0.75,), block=((8, 8), (64, 64)))
    assert {row["contestant"] for row in report.rows} == {"dense", "8x8"}
    (note,) = report.notes
    assert "linear 32 -> 48, 6 tokens, float32, 75%: 64x64 is not raced: " in note
    with pytest.raises(ValueError, match="nothing could be raced: .* 64x64 is not raced"):
        raced(conv=(), sparsity=(0.75,), block=((64, 64),))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_right_answers_pass_and_wrong_gradients_do_not(dtype):
    x = torch.randn(5, 32).to(dtype)
    images = torch.randn(2, 8, 6, 5).to(dtype)
    layers = [(SparseLinear(32, 48, sparsity=0.5, block_size=8, dtype=dtype), x), (nn.Linear(32, 48, dtype=dtype), x)]
    layers += [(SparseConv2d(8, 16, 3, sparsity=0.5, block_size=8, dtype=dtype), images)]
    for layer, given in layers:
        contestant = dense_contestant(layer) if isinstance(layer, nn.Linear) else sparse_contestant(layer)
        for multiply_adds in (1, 3 * CHECKED):  # all rows, and the first third
            assert what_is_wrong(contestant, LayerInput(given), multiply_adds) is None
        exact = contestant.exact
        for place, said in enumerate(("y is off", "the gradient of x is off", "that of parameter 0 is off")):

            def off(x, dy, place=place, exact=exact):
                return tuple(1.05 * a if i == place else a for i, a in enumerate(exact(x, dy)))

            assert said in str(what_is_wrong(replace(contestant, exact=off), LayerInput(given), 1))


def test_a_busy_machine_is_not_believed(monkeypatch):
    monkeypatch.setattr(run, "usable_cores", lambda: 2)
    calm = [{"contestant": "dense", "ms": 1.0, "p25": 0.98, "p75": 1.02}]
    assert run._busy(1.2, TINY, calm) is None and run._busy(0.0, TINY, calm) is None
    assert "the load average was 1.6 on 2 cores" in str(run._busy(1.6, TINY, calm))
    said = run._busy(0.1, TINY, [{"contestant": "dense", "ms": 1.0, "p25": 0.9, "p75": 1.2}])
    assert "too busy to believe these figures (the quartiles of the dense layer are up to 30% of its median" in str(
        said
    )


def test_the_picture_has_a_panel_for_each_layer(tmp_path):
    report, _ = raced()
    assert draw_bench(tmp_path / "a.svg", report.rows, "here") == 0
    text = (tmp_path / "a.svg").read_text()
    for words in ("linear 32 -&gt; 48, 6 tokens, float32, 1 thread", "ideal: 1 / density", "8x8, forward + backward"):
        assert words in text
    many = [row | {"layer": f"{row['layer']} {i}"} for i in range(7) for row in report.rows]
    assert draw_bench(tmp_path / "b.svg", many, "here") == 2


# Models.


def network():
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 48)]
    return nn.Sequential(*layers), torch.randn(2, 3, 8, 8)


def test_the_layers_of_a_model_are_raced_on_what_a_sample_gives_them(monkeypatch):
    monkeypatch.setattr(request, "_call", lambda name: network())
    found = request.subjects(replace(TINY, linear=(), conv=(), model="nets:network"))
    assert [(one.title, one.count) for one in found] == [("1", 1), ("2", 1), ("4", 1)]  # 0 is a stem
    assert [tuple(one.given.x.shape) for one in found] == [(2, 8, 6, 6), (2, 8, 4, 4), (2, 32)]
    assert [one.multiply_adds for one in found] == [2 * 16 * 576, 2 * 4 * 576, 2 * 32 * 48]


def test_equal_layers_of_a_model_are_raced_once(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False))
    monkeypatch.setattr(request, "_call", lambda name: model)
    report, _ = raced(linear=(), conv=(), model="nets:model", input=(4, 16), sparsity=(0.5,))
    assert {(row["layer"], row["count"], row["pass"]) for row in report.rows} == {("0 (x2)", 2, STEP), ("2", 1, STEP)}


def test_a_recipe_is_a_model():
    asked = replace(TINY, linear=(), conv=(), model="resnet20", image=(2, 32, 32))
    found = request.subjects(asked)
    assert found[0].title == "blocks.0.conv1 (x6)" or found[0].count > 1
    assert found[0].given.x.shape[0] == 2


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (3, "which returns an object of class int; it must return a torch.nn.Module, or one and a sample"),
        (nn.Linear(4, 4), "which returns no sample of its input; give --input"),
        ((nn.BatchNorm1d(3), torch.ones(2, 3)), "model has no layer that could be sparse, or the sample reaches none"),
    ],
)
def test_models_that_cannot_be_raced(monkeypatch, made, said):
    monkeypatch.setattr(request, "_call", lambda name: made)
    with pytest.raises(ValueError, match=said):
        request.subjects(replace(TINY, model="nets:made"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet200", "model is 'resnet200'; it must be module:function, or one of the recipes mlp"),
        ("nowhere_at_all:made", "model is 'nowhere_at_all:made', which fails with ModuleNotFoundError"),
        ("math:pi", "model is 'math:pi', which fails with TypeError"),
    ],
)
def test_names_that_are_no_models(name, said):
    with pytest.raises(ValueError, match=said):
        request.subjects(replace(TINY, linear=(), conv=(), model=name))


def test_the_input_of_a_recipe_is_its_own():
    with pytest.raises(ValueError, match="input is given, but a recipe has its own"):
        request.subjects(replace(TINY, model="resnet20", input=(2, 2)))


def test_a_module_of_the_current_folder_is_found(monkeypatch, tmp_path):
    (tmp_path / "my_nets_of_a_test.py").write_text("from torch import nn\ndef made(): return nn.Linear(4, 4)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (one,) = request.subjects(replace(TINY, linear=(), conv=(), model="my_nets_of_a_test:made", input=(3, 4)))
    assert one.title == "Linear"
