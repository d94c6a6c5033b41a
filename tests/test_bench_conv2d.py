"""The race of the convolutions and the steps of whole networks: cases, answers, goals, tables, files."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from rich.console import Console

from bench import bench_conv2d, end_to_end, race, readme
from bench.cpu import conv_contestants, run
from bench.cpu.conv_cases import SHAPES, ConvCase, Shape, conv_case, conv_cases, quick_conv_cases
from bench.cpu.conv_goals import conv_findings
from bench.cpu.conv_scene import make_conv_scene
from bench.cpu.results import Race, case_of, rows_of
from bench.cpu.table import case_table, goal_table, losing
from bench.gpu.clock import Timing
from bench.gpu.contestants import DENSE, OURS, Contestant
from bench.gpu.peers import NotSupported
from bench.gpu.results import read_rows
from bench.gpu.scene import Judge
from tests.oracle_conv2d import conv_blocks, conv_weight

TINY = conv_case("step", Shape(32, 7, 48, images=2), 16, 0.75)
HEAD = conv_case("step", SHAPES[0], 32, 0.9)


def made_up(case: ConvCase = HEAD, **ms: float) -> list[dict]:
    """Return the rows of a case in which each contestant took the milliseconds given for it."""
    kinds = {"sparsekern": OURS, "SparseConv2d": OURS}
    timings = {name: Timing([t]) for name, t in ms.items()}
    taking_part = {name: Contestant(name, kinds.get(name, DENSE), lambda: None, lambda _: {}) for name in ms}
    common = {"device": "a processor", "path": "avx512", "torch": "2", "commit": "abc", "date": "2026-11-21"}
    return [{**row, **common} for row in rows_of(case, 1000, taking_part, timings)]


def text_of(table) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_cases_are_distinct_and_those_that_share_tensors_follow_each_other():
    every = conv_cases(2)
    assert len({case.key for case in every}) == len(every) and set(quick_conv_cases()) <= set(every)
    scenes = [case.scene for case in every]
    assert len(dict.fromkeys(scenes)) == 1 + sum(a != b for a, b in pairwise(scenes))
    assert {case.threads for case in conv_cases(1)} == {1} and {case.block for case in every} == {1, 16, 32, 64}
    assert {finding.case for finding in conv_findings(Race([]))} <= set(every)


def test_the_sizes_of_a_case():
    case = conv_case("step", Shape(64, 7, 128, stride=2, images=3), 32, 0.9)
    assert (case.tokens, case.in_features, case.out_features) == (3 * 16, 9 * 64, 128)
    assert case.conv_shape.output_size(7, 7) == (4, 4) and case.key == "step fp32 3x64x7x7->128 k3 s2 b32 s0.9 t1"


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("op", ["fwd", "step"])
@pytest.mark.parametrize("sizes", [{}, {"stride": 2}, {"side": 8, "stride": 2}, {"kernel": 1}])
def test_all_contestants_agree_with_the_oracle(sizes, op, block):
    case = TINY._replace(op=op, block=block, **sizes)
    scene = make_conv_scene(case)
    judge = Judge(scene, "step", tf32=False)
    weight = conv_weight(scene.values, scene.row, scene.col, case.conv_shape).requires_grad_()
    x = scene.x.double().requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, None, case.stride, case.kernel // 2)
    dx, dweight = torch.autograd.grad(y, (x, weight), scene.dy.double())
    exact = {"y": y.detach(), "dx": dx}
    exact["dvalues"] = conv_blocks(dweight, scene.row, scene.col, scene.grid.block, case.conv_shape)
    for name, tensor in exact.items():
        torch.testing.assert_close(judge.exact[name][0], tensor)
    agreed, reasons = set(), []
    for name, make in run.makers(case).items():
        try:
            contestant = make(scene, op)
        except NotSupported as error:
            reasons.append(str(error))
            continue
        answer = contestant.answer(contestant.run())
        assert set(answer) == ({"y"} if op == "fwd" else {"y", "dx", "dvalues"})
        assert judge.wrong(answer, by_element=contestant.kind == OURS) is None, name
        assert contestant.name == name
        agreed.add(name)
    assert {"SparseConv2d", "channels_last", "contiguous"} <= agreed and all(reasons)


def test_a_wrong_answer_is_found():
    scene = make_conv_scene(TINY)
    judge = Judge(scene, "step", tf32=False)
    right = conv_contestants.sparse_conv2d(scene, "step")
    answer = right.answer(right.run())
    for name in answer:
        assert judge.wrong({name: 1.001 * answer[name]}, by_element=True) is not None


def test_kernels_that_are_not_there_say_so(monkeypatch):
    monkeypatch.setattr(conv_contestants.cpu, "why_not", lambda *_: "it was not built")
    for make in (conv_contestants.sparsekern, conv_contestants.unfold):
        with pytest.raises(NotSupported, match="it was not built"):
            make(make_conv_scene(TINY), "fwd")


@pytest.mark.parametrize(("ours", "said"), [(2.0, "reached aim"), (2.6, "reached must"), (4.0, "MISSED")])
def test_goals_are_judged_against_channels_last(ours, said):
    found = Race(made_up(sparsekern=ours, channels_last=16.0, contiguous=1.0))
    (finding,) = (f for f in conv_findings(found) if f.measured is not None)
    assert (finding.verdict, finding.must, finding.aim, finding.measured) == (said, 5.5, 7.5, pytest.approx(16 / ours))
    assert f"90% {16 / ours:.1f}/5.5" in text_of(goal_table(found, "AMD EPYC"))


def test_the_table_names_the_layer_and_who_it_is_against():
    slow = HEAD._replace(sparsity=0.5)
    found = Race(
        made_up(sparsekern=2.0, SparseConv2d=2.5, channels_last=16.0, contiguous=12.0)
        + made_up(slow, sparsekern=20.0, channels_last=19.0)
    )
    text = text_of(case_table(found))
    assert "SparseConv2d" in text and "x channels_last" in text and "12 contiguous" in text and losing(found) == [slow]
    assert "8.0" in text and "fwd+bwd fp32 32x64x32x32->64 k3 b32 1T" in text
    assert [case_of(row) for row in found.rows[:1]] == [HEAD]


def test_quick_races_the_quick_cases(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.cpu.conv_cases.quick_conv_cases", lambda: [TINY])
    monkeypatch.setattr(run, "SECONDS", 0.0)
    out = tmp_path / "quick.jsonl"
    assert race.main(["--kernel", "conv2d", "--quick", "--out", str(out)]) == 0
    assert "2x32x7x7->48 k3" in capsys.readouterr().out and {case_of(row) for row in read_rows(out)} == {TINY}
    with pytest.raises(SystemExit):
        race.options(["--kernel", "attention"])


def test_the_benchmarks_of_pytest_check_before_they_time():
    calls = []

    class OneCall:
        group = ""

        def __call__(self, call) -> None:
            calls.append(call())

    benchmark = OneCall()
    bench_conv2d.test_conv2d(benchmark, TINY, "channels_last")
    assert len(calls) == 1 and benchmark.group == TINY.key
    assert {case for case, _ in bench_conv2d.CONTESTANTS} == set(quick_conv_cases())


def test_the_readme_shows_them_too():
    rows = made_up(sparsekern=2.0, channels_last=16.0)
    rows += made_up(HEAD._replace(threads=2, sparsity=0.5), sparsekern=20.0, channels_last=19.0)
    text = readme.conv_section(rows)
    assert "| 32x64x32x32->64 k3, 32x32 | - | - | 8.0 | - |" in text
    assert "| 32x64x32x32->64 k3, 32x32, 2 threads | **0.95** | - | - | - |" in text
    assert "16x16" not in text and "In 1 of 2 measured cases another contestant is faster." in text


# Whole networks.


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("sparsekern::conv2d", "our kernels"),
        ("aten::mkldnn_convolution", "dense products"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::threshold_backward", "relu"),
        ("aten::_foreach_add_", "optimizer"),
        ("autograd::engine::evaluate_function: AddBackward0", "other"),
    ],
)
def test_where_an_operator_is_shown(name, part):
    assert end_to_end.part_of(name) == part


def test_steps_are_measured_and_their_parts_too(monkeypatch, tmp_path, capsys, threads):
    monkeypatch.setattr(end_to_end, "IMAGES", 2)
    monkeypatch.setattr(end_to_end, "NETWORKS", ("resnet20",))
    threads(1)
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(["--quick", "--out", str(out)]) == 0 and torch.get_num_threads() == 1
    dense, sparse = read_rows(out)
    assert (dense["sparsity"], sparse["sparsity"], dense["vs_dense"]) == (None, 0.9, 1.0)
    assert "our kernels" not in dense["shares"] and sparse["shares"]["our kernels"] > 0
    assert sum(sparse["shares"].values()) == pytest.approx(1, abs=0.01) and sparse["samples"] == 4
    assert sparse["vs_dense"] == pytest.approx(dense["ms"] / sparse["ms"], rel=1e-2)
    said = capsys.readouterr().out
    assert "resnet20 b16" in said and "our kernels" in said and "90%" in said
