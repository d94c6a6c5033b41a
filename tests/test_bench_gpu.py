"""How bench/gpu_run.sh times, judges, tunes and shows: what can be known of it without a GPU."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sparsekern.kernels.gpu.launch import interpreted

from bench.gpu import (
    calls,
    cases_conv2d,
    contestants,
    contestants_conv2d,
    micro,
    peers,
    race,
    scene_conv2d,
    table,
    tune,
)
from bench.gpu.goals import GOALS, break_even, verdict
from bench.gpu.part import Part
from bench.gpu.results import Results, circumstances
from bench.gpu.scene import NORMS, OPS, Case, Judge, make_scene
from sparsekern.analysis import Clock

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
CASE = Case("step", "fp16", 16, 32, 32, 16, 0.5)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the rehearsal is for machines without a GPU")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="TRITON_INTERPRET is not set")


@pytest.fixture
def part(tmp_path: Path):
    results = Results(tmp_path / "race.jsonl", circumstances("race", True))
    yield Part(tmp_path, True, CPU, results, time.monotonic() + 60, SimpleNamespace(rehearse=True, no_tma=False))
    results.close()


def test_what_is_gathered_fits_the_l2_cache(monkeypatch):
    for properties, size in (({"L2_cache_size": 50 * 2**20}, 25), ({"L2_cache_size": 0}, 16), ({}, 16)):
        found = SimpleNamespace(**properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert micro.gathered_bytes(torch.device("cuda")) == size * 2**20


# Right and wrong answers.


CONVOLUTION = cases_conv2d.rehearsal_cases()[0]._replace(dtype="fp16", size=5)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "case",
    [
        *(CASE._replace(dtype=dtype) for dtype in ("fp16", "bf16", "fp32")),
        *(CONVOLUTION._replace(stride=stride) for stride in (1, 2)),
    ],
    ids=lambda case: case.key,
)
def test_the_dense_layer_is_right_and_any_wrong_element_is_not(op, case):
    linear, case = isinstance(case, Case), case._replace(op=op)
    scene = (make_scene if linear else scene_conv2d.make_scene)(case, CPU)
    dense = (contestants.cublas if linear else contestants_conv2d.cudnn)(scene, op)
    judge = Judge(scene, op)
    answer = dense.answer(dense.run())
    # oneDNN rounds an element of a convolution more than by_element allows on some processors.
    assert judge.wrong(answer, by_element=linear) is None
    assert linear or case.tokens == scene.dy.numel() // scene.dy.shape[1]
    for name, tensor in answer.items():
        others = {other: given for other, given in answer.items() if other != name}
        for value in (float("nan"), 50.0) if linear else (float("nan"),):
            bad = tensor.detach().clone(memory_format=torch.contiguous_format)
            bad.view(-1)[-1] = value
            assert name in (judge.wrong({name: bad} | others, by_element=True) or "")
        if linear:
            assert "shape" in (judge.wrong(answer | {name: tensor[:-1]}, by_element=False) or "")


@needs_interpreter
@pytest.mark.parametrize("op", NORMS)
def test_norms_are_judged(op):
    scene = make_scene(CASE._replace(op=op), CPU)
    judge = Judge(scene, op)
    answer = contestants.named(op, contestants.sparsekern_gpu(scene, op).run())
    assert judge.wrong(answer, by_element=True) is None
    assert "of its norm" in (judge.wrong({op: 1.1 * answer[op]}, by_element=True) or "")


def test_a_wrong_answer_is_recorded_and_not_timed(part):
    def wrong(scene, op):
        dense = contestants.cublas(scene, op)
        return dataclasses.replace(dense, answer=lambda r: {k: 1.5 * v for k, v in dense.answer(r).items()})

    def breaks(scene, op):
        raise NotImplementedError("no such kernel")

    def unable(scene, op):
        raise peers.NotSupported("not here")

    taking_part = {"cublas": contestants.cublas, "liar": wrong, "none": breaks, "unable": unable}
    race.run_case(part, Clock(CPU), CASE, taking_part)
    rows = {row["key"]: row for row in part.results.rows}
    assert "of its norm" in rows[f"{CASE.key} | liar"]["refused"] and "ms" not in rows[f"{CASE.key} | liar"]
    assert rows[f"{CASE.key} | none"]["error"] == "NotImplementedError: no such kernel"
    assert rows[f"{CASE.key} | unable"]["not_supported"] == "not here"
    assert rows[f"{CASE.key} | cublas"]["vs_dense"] == 1.0 and rows[CASE.key]["contestants"] == 1


def test_peers_that_are_not_installed_are_named(monkeypatch, capsys, part):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "blksprs" else object())
    monkeypatch.setattr(race, "rehearsal_cases", list)
    assert race.run(part) and peers.present() == ["torch-bsr", "stk"]
    assert capsys.readouterr().out == "race: blksprs is not installed and takes no part: pip install blksprs\n"


TUNED = [calls.calls(True)[1], *cases_conv2d.calls(True)]


@needs_interpreter
@pytest.mark.parametrize("case", TUNED, ids=lambda case: case.key)
def test_the_tuner_writes_a_table_that_the_package_reads(part, monkeypatch, case):
    from sparsekern.kernels.gpu import tables
    from sparsekern.kernels.gpu.linear import FEW_TOKENS

    monkeypatch.setenv("SPARSEKERN_CACHE", str(part.out))
    monkeypatch.setattr(tune, "compile_side_by_side", lambda *_: None)
    which = calls.problem_of(case, CPU, FEW_TOKENS)
    tune.tune_one(part, Clock(CPU), which, case)
    assert tables.read(which) is not None and tables.choose is calls.tables.choose
    assert json.loads((part.out / "sm_90.json").read_text())["rehearsal"] is True
    candidates = [row for row in part.results.rows if "predicted" in row]
    assert len(candidates) == 2 and all(row["ms"] > 0 for row in candidates)
    assert min(candidates, key=lambda row: row["ms"])["config"] == part.results.rows[-1]["chosen"]


@needs_interpreter
@pytest.mark.parametrize("op", ["fwd", "dx", "dvalues", *NORMS])
def test_a_strided_convolution_asks_for_the_problem_that_is_tuned(op):
    """Seven rows and columns make four of y; the phases of dx have four, or three."""
    case = scene_conv2d.Case(op, "fp16", 2, 7, 32, 64, 2, 16, 0.4)
    asked = []

    def note(which, launch):
        asked.append(which)
        raise StopIteration

    with calls.choosing(note), pytest.raises(StopIteration):
        calls.ours(calls.scene_of(case, CPU), op).run()
    assert asked == [calls.problem_of(case, CPU, few_tokens=0)]


def test_every_raced_convolution_is_tuned_and_the_headlines_of_both_layers_first():
    def problems(cases):
        return list(dict.fromkeys(calls.problem_of(case, CPU, few_tokens=16).key for case in cases))

    halves, tuned = OPS[:3], problems(calls.calls(False))
    raced = [case._replace(op=op) for case in cases_conv2d.cases() for op in halves if case.op in ("step", op)]
    linear = [case._replace(op=op) for case in race.cases()[:8] for op in halves]
    assert set(problems(raced)) <= set(tuned)
    assert set(tuned[:36]) == {*problems(linear), *problems(raced[:12])}


# The cases and the table.


def test_the_cases_are_those_that_were_asked_for_the_goals_first():
    cases = race.cases()
    assert len(cases) == len({case.key for case in cases})
    assert all(case.in_features % case.block == 0 and case.out_features % case.block == 0 for case in cases)
    assert {case.tokens for case in cases} == {16, 2048, 8192, 32768} and {case.dtype for case in cases} == {
        *("bf16", "fp16", "fp32")
    }
    assert {(c.block, c.sparsity) for c in cases[:8]} == {(b, s) for b in GOALS for s in (0.9, 0.95)}
    assert len({(case.in_features, case.out_features) for case in cases}) == 4


def test_break_even_is_where_the_sparse_layer_takes_as_long():
    assert break_even({0.5: 1 / 1.5, 0.9: 1 / 0.5}) == (pytest.approx(0.7), "=")
    assert break_even({0.5: 2.0, 0.9: 4.0}) == (0.5, "<")
    assert break_even({0.5: 0.2, 0.9: 0.4}) == (0.9, ">")
    assert break_even({}) is None
    assert [verdict(x, 2, 3) for x in (1.9, 2, 3)] == ["MISSED", "reached must", "reached aim"]


def test_the_table_makes_sense_of_whatever_is_there(tmp_path):
    text = "\n".join(table.lines(tmp_path))
    for missing in ("environment: not recorded", "tests: not run", "sanitizer: not run", "micro: not", "nothing tuned"):
        assert missing in text
    row = Case("step", "bf16", 8192, 4096, 4096, 64, 0.9)._asdict() | {
        "contestant": "sparsekern",
        "key": "x",
        "ms": 1.0,
    }
    row |= {"vs_dense": 4.5, "wall_vs_dense": 4.0, "vs_sparse": 1.3, "best_sparse": "torch-bsr", "tflops": 300.0}
    (tmp_path / "race.jsonl").write_text(json.dumps(row) + "\n{cut")
    text = "\n".join(table.lines(tmp_path))
    assert (
        "  b64 at 90%: 4.50x on the device (must 4, aim 5.5: reached must), 4.00x with Python; "
        "break-even below 90% (goal 45%); 1.3x of torch-bsr\n" in text
    )
    assert "REHEARSAL" not in text and "b64 at 95%: not measured" in text


def test_a_rehearsal_has_no_verdicts(tmp_path):
    row = race.rehearsal_cases()[5]._asdict() | {"contestant": "sparsekern", "key": "x", "ms": 1.0, "rehearsal": True}
    row |= {"vs_dense": 4.5, "wall_vs_dense": 4.0, "vs_sparse": None, "tflops": 300.0}
    (tmp_path / "race.jsonl").write_text(json.dumps(row))
    text = "\n".join(table.lines(tmp_path))
    assert "b32 at 50%: 4.50x on the device, 4.00x with Python" in text
    assert "MISSED" not in text and "reached" not in text and "goal" not in text


# The convolution.


@needs_interpreter
def test_the_race_of_the_convolution_has_a_row_for_each_contestant(part):
    case = cases_conv2d.rehearsal_cases()[0]
    race.run_case(
        part, Clock(CPU), case, {"sparsekern": contestants_conv2d.sparsekern_gpu, "cudnn": contestants_conv2d.cudnn},
        scene_conv2d.make_scene,
    )  # fmt: skip
    rows = {row["contestant"]: row for row in part.results.rows if "ms" in row}
    assert set(rows) == {"sparsekern", "cudnn"} and rows["sparsekern"]["vs_dense"] > 0


def test_the_convolutions_are_those_that_were_asked_for_the_goals_first():
    cases = cases_conv2d.cases()
    assert len(cases) == len({case.key for case in cases})
    assert [(c.in_channels, c.block, c.sparsity, c.op) for c in cases[:2]] == [
        (256, 64, 0.9, "step"),
        (512, 64, 0.9, "step"),
    ]
    with pytest.raises(ValueError, match="blocks of 24 do not divide 256 and 256 channels"):
        scene_conv2d.make_scene(cases[0]._replace(block=24), CPU)


@pytest.mark.parametrize(("speedup", "said"), [(3.5, "3.50x (must 3: reached)"), (2.5, "2.50x (must 3: MISSED)")])
def test_the_table_judges_the_convolution(tmp_path, speedup, said):
    case = cases_conv2d.cases()[0]
    row = case._asdict() | {"contestant": "sparsekern", "key": f"{case.key} | sparsekern", "ms": 1.0}
    (tmp_path / "conv2d.jsonl").write_text(json.dumps(row | {"vs_dense": speedup}))
    text = "\n".join(table.lines(tmp_path))
    assert said in text and "step bf16 128x16x16 256-256 stride 1 b64 s0.9" in text
    assert "convolution: nothing measured" in "\n".join(table.lines(tmp_path / "none"))
