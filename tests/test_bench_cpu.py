"""The race on a CPU, of linear layers and of convolutions: cases, contestants and answers, and how it runs."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from bench import gpt_step, readme
from bench.cpu import contestants, conv_contestants, peers, run
from bench.cpu.cases import LARGE, WIDE, cases, quick_cases
from bench.cpu.contestants import DENSE, OURS
from bench.cpu.conv_cases import Shape, conv_case, conv_cases, quick_conv_cases
from bench.cpu.conv_goals import conv_findings
from bench.cpu.conv_scene import make_conv_scene
from bench.cpu.goals import findings
from bench.cpu.results import Race, case_of, circumstances, write_rows
from bench.cpu.scene import MOVED, make_scene
from bench.gpu.contestants import Contestant
from bench.gpu.peers import NotSupported
from bench.gpu.results import read_rows
from bench.gpu.scene import Judge
from sparsekern.nn import sparse_layers
from sparsekern.topology import random
from tests.bench_rows import CONV_TINY, HEAD, TINY, made_up
from tests.oracle import dense_weight, stored_blocks
from tests.oracle_conv2d import conv_blocks, conv_weight

# Cases.


@pytest.mark.parametrize(
    ("cases", "quick", "findings"), [(cases, quick_cases, findings), (conv_cases, quick_conv_cases, conv_findings)]
)
def test_cases_are_distinct_and_those_that_share_tensors_follow_each_other(cases, quick, findings):
    every = cases(2)
    assert len({case.key for case in every}) == len(every) and set(quick()) <= set(every)
    scenes = [case.scene for case in every]
    assert len(dict.fromkeys(scenes)) == 1 + sum(a != b for a, b in pairwise(scenes))
    assert {case.threads for case in cases(1)} == {1} and {case.threads for case in every} == {1, 2}
    assert {finding.case for finding in findings(Race([]))} <= set(every)


def test_every_line_of_the_readme_is_in_the_cases():
    every = set(cases(2))
    assert {line.case(s) for line in readme.LINES for s in readme.SPARSITIES} <= every
    assert {readme._few(op, tokens, b) for op in ("fwd", "step") for tokens in (1, 16) for b in (1, 32)} <= every


def test_the_sizes_of_a_convolution():
    case = conv_case("step", Shape(64, 7, 128, stride=2, images=3), 32, 0.9)
    assert (case.tokens, case.in_features, case.out_features) == (3 * 16, 9 * 64, 128)
    assert case.conv_shape.output_size(7, 7) == (4, 4) and case.key == "step fp32 3x64x7x7->128 k3 s2 b32 s0.9 t1"
    assert {case.block for case in conv_cases(2)} == {1, 16, 32, 64}


def test_a_scene_is_a_layer_in_whose_middle_blocks_have_moved():
    scene = make_scene(TINY)
    layer, (bo, bi) = scene.layer, scene.grid.block
    drawn = random(scene.grid, len(scene.row), torch.Generator().manual_seed(0))
    assert len(scene.row) == 8 and (bo, bi) == (16, 16) and drawn.slots == 8
    keys = layer.topology.keys()
    assert keys.unique().numel() == 8 and not torch.equal(keys, keys.sort().values) and 0 < MOVED < 1
    exact = dense_weight(scene.values, scene.row, scene.col, TINY.out_features, TINY.in_features)
    assert torch.equal(scene.weight.double(), exact)
    assert torch.equal(scene.blocks_of(exact), stored_blocks(exact, scene.row, scene.col, scene.grid.block))
    assert layer.index.row_ptr.data_ptr() == scene.index.row_ptr.data_ptr()


# Contestants.


def check_agreement(scene, op, exact, makers) -> set[str]:
    """Compare the answer of each contestant; return who took part."""
    judge = Judge(scene, "step", tf32=False)
    for name, tensor in exact.items():
        torch.testing.assert_close(judge.exact[name][0], tensor)
    agreed, reasons = set(), []
    for name, make in makers.items():
        try:
            contestant = make(scene, op)
        except NotSupported as error:
            reasons.append(str(error))
            continue
        answer = contestant.answer(contestant.run())
        assert set(answer) == {"fwd": {"y"}, "dvalues": {"dvalues"}, "step": {"y", "dx", "dvalues"}}[op]
        assert judge.wrong(answer, by_element=contestant.kind == OURS) is None, name
        assert contestant.name == name
        agreed.add(name)
    assert all(reasons)
    return agreed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("block", [1, 16, 32])
@pytest.mark.parametrize("op", ["fwd", "dvalues", "step"])
def test_all_contestants_agree_with_the_oracle(op, block, dtype):
    case = TINY._replace(op=op, block=block, dtype=dtype)
    scene = make_scene(case)
    weight = dense_weight(scene.values, scene.row, scene.col, case.out_features, case.in_features)
    exact = {
        "y": scene.x.double() @ weight.T,
        "dx": scene.dy.double() @ weight,
        "dvalues": stored_blocks(scene.dy.double().T @ scene.x.double(), scene.row, scene.col, scene.grid.block),
    }
    wide = case._replace(tokens=WIDE[0], in_features=WIDE[1], out_features=WIDE[2])
    agreed = check_agreement(scene, op, exact, run.makers(wide))
    assert {"F.linear", "oneDNN"} <= agreed
    assert ("torch-csr" in agreed) == (dtype == "fp32") and ("torch-bsr" in agreed) == (dtype == "fp32" and block > 1)


@pytest.mark.parametrize("block", [1, 16])
@pytest.mark.parametrize("op", ["fwd", "step"])
@pytest.mark.parametrize("sizes", [{}, {"stride": 2}, {"side": 8, "stride": 2}, {"kernel": 1}])
def test_all_contestants_of_a_convolution_agree_with_the_oracle(sizes, op, block):
    case = CONV_TINY._replace(op=op, block=block, **sizes)
    scene = make_conv_scene(case)
    weight = conv_weight(scene.values, scene.row, scene.col, case.conv_shape).requires_grad_()
    x = scene.x.double().requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, None, case.stride, case.kernel // 2)
    dx, dweight = torch.autograd.grad(y, (x, weight), scene.dy.double())
    exact = {"y": y.detach(), "dx": dx}
    exact["dvalues"] = conv_blocks(dweight, scene.row, scene.col, scene.grid.block, case.conv_shape)
    agreed = check_agreement(scene, op, exact, run.makers(case))
    assert {"SparseConv2d", "channels_last", "contiguous"} <= agreed


def test_a_wrong_answer_of_a_convolution_is_found():
    scene = make_conv_scene(CONV_TINY)
    judge = Judge(scene, "step", tf32=False)
    right = conv_contestants.sparse_conv2d(scene, "step")
    answer = right.answer(right.run())
    for name in answer:
        assert judge.wrong({name: 1.001 * answer[name]}, by_element=True) is not None


def test_float32_is_judged_as_float32():
    scene = make_scene(TINY)
    good = contestants.f_linear(scene, "fwd")
    y = good.answer(good.run())["y"]
    off = {"y": y * (1 + 2**-12)}  # as tf32 would be
    assert Judge(scene, "fwd").wrong(off, by_element=False) is None
    assert "of its norm" in (Judge(scene, "fwd", tf32=False).wrong(off, by_element=False) or "")


def test_the_avx2_contestant_leaves_the_path_as_it_was(monkeypatch):
    calls = []

    class Library:
        def sk_use(self, name: bytes) -> int:
            calls.append(name)
            return 1

    monkeypatch.setattr(contestants, "load", lambda: (Library(), "avx512"))
    monkeypatch.setenv("SPARSEKERN_CPU", "avx512")
    plain = Contestant("sparsekern", OURS, lambda: calls.append(b"call"), lambda _: {})
    monkeypatch.setattr(contestants, "sparsekern", lambda scene, op: plain)
    contestant = contestants.sparsekern_avx2(make_scene(TINY), "fwd")
    contestant.run()
    assert calls == [b"avx2", b"avx512", b"avx2", b"call", b"avx512"] and contestant.name == "sparsekern-avx2"


@pytest.mark.parametrize(
    ("library", "path", "said"),
    [(None, "not built", "not built"), (object(), "avx2", "the path is avx2")],
)
def test_the_avx2_contestant_says_why_it_does_not_run(monkeypatch, library, path, said):
    monkeypatch.setattr(contestants, "load", lambda: (library, path))
    with pytest.raises(NotSupported, match=said):
        contestants.sparsekern_avx2(make_scene(TINY), "step")


def test_who_takes_part():
    assert "nn.Linear" in contestants.makers(HEAD) and "sparsekern-avx2" in contestants.makers(HEAD)
    assert "nn.Linear" not in contestants.makers(
        HEAD._replace(tokens=LARGE[0], in_features=LARGE[1], out_features=LARGE[2])
    )
    assert "sparsekern-avx2" not in contestants.makers(HEAD._replace(threads=2))
    assert set(peers.makers(HEAD)) == {"torch-csr", "torch-bsr"}
    assert {"scipy-csr", "scipy-bsr"} < set(peers.makers(HEAD._replace(op="fwd")))


def test_what_is_not_installed_or_not_possible_says_so(monkeypatch):
    scene = make_scene(TINY)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotSupported, match=r"scipy is not installed; pip install -e '\.\[bench\]'"):
        peers.scipy("csr", scene, "fwd")
    monkeypatch.undo()
    pytest.importorskip("scipy")
    with pytest.raises(NotSupported, match="no product for dvalues"):
        peers.scipy("csr", scene, "step")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(NotSupported, match="without oneDNN"):
        contestants.onednn(scene, "fwd")
    monkeypatch.setattr(contestants.cpu, "why_not", lambda *_: "it was not built")
    with pytest.raises(NotSupported, match="it was not built"):
        contestants.sparsekern(scene, "fwd")
    monkeypatch.setattr(conv_contestants.cpu, "why_not", lambda *_: "it was not built")
    for make in (conv_contestants.sparsekern, conv_contestants.unfold):
        with pytest.raises(NotSupported, match="it was not built"):
            make(make_conv_scene(CONV_TINY), "fwd")


# Running, and the file.


def test_a_wrong_answer_is_recorded_and_not_timed():
    def wrong(scene, op):
        dense = contestants.f_linear(scene, op)
        return Contestant("liar", DENSE, dense.run, lambda r: {k: 1.5 * v for k, v in dense.answer(r).items()})

    def breaks(scene, op):
        raise RuntimeError("no such kernel")

    def unable(scene, op):
        raise NotSupported("not here")

    scene = make_scene(TINY)
    taking_part = {"F.linear": contestants.f_linear, "liar": wrong, "none": breaks, "unable": unable}
    rows = run.run_case(TINY, scene, Judge(scene, "step", tf32=False), taking_part, seconds=0.0)
    found = {row["contestant"]: row for row in rows}
    assert found["F.linear"]["ms"] > 0 and found["F.linear"]["samples"] >= 2
    assert "of its norm" in found["liar"]["refused"] and "ms" not in found["liar"]
    assert found["none"]["error"] == "RuntimeError: no such kernel" and found["unable"]["not_supported"] == "not here"


def test_cases_run_with_their_threads_and_leave_the_number_as_it_was(monkeypatch, threads):
    seen, said = [], []

    def spy(scene, op):
        seen.append(torch.get_num_threads())
        return contestants.f_linear(scene, op)

    def unable(scene, op):
        raise NotSupported("not here")

    monkeypatch.setattr(run, "makers", lambda case: {"F.linear": spy, "unable": unable})
    threads(1)
    rows = run.run_cases([TINY, TINY._replace(threads=2)], {"device": "here"}, said.append, seconds=0.0)
    assert seen == [1, 2] and torch.get_num_threads() == 1
    assert [(row["contestant"], row["threads"]) for row in rows] == [("F.linear", 1), ("unable", 1), ("F.linear", 2)]
    assert {row["device"] for row in rows} == {"here"} and case_of(rows[2]) == TINY._replace(threads=2)
    assert len(said) == 2 and all("F.linear" in line and "unable NOT TIMED (not here)" in line for line in said)


def test_the_ratios_of_a_case():
    rows = {r["contestant"]: r for r in made_up(sparsekern=2.0, linear=20.0, onednn=16.0, csr=5.0, bsr=6.0)}
    ours = rows["sparsekern"]
    assert (ours["ms"], ours["p25"], ours["p75"], ours["samples"]) == (2.0, 1.8, 2.4, 3) or ours["samples"] == 3
    assert (ours["vs_dense"], ours["best_dense"]) == (8.0, "oneDNN") and ours["vs_linear"] == 10.0
    assert (ours["vs_sparse"], ours["best_sparse"]) == (2.5, "torch-csr")
    assert ours["rate_vs_dense"] == pytest.approx(0.8, rel=1e-3)  # 8 times as fast on a tenth of the products
    assert "vs_dense" not in rows["oneDNN"]
    assert rows["oneDNN"]["gflops"] == pytest.approx(3 * 2 * 512 * 1024 * 4096 / 16e-3 / 1e9, rel=1e-3)
    (alone,) = made_up(sparsekern=2.0)
    assert alone["vs_dense"] is alone["vs_linear"] is alone["vs_sparse"] is None and "rate_vs_dense" not in alone


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, made_up(sparsekern=2.0, linear=4.0))
    assert [row["contestant"] for row in read_rows(path)] == ["sparsekern", "F.linear"]

    def torn():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(path, torn())
    assert len(read_rows(path)) == 2 and [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_row_says_on_what_it_was_measured():
    here = circumstances()
    assert here["torch"] == torch.__version__ and here["device"] and here["path"] and len(here["date"]) == 10
    assert json.loads(json.dumps(here)) == here and {"commit", "python", "scipy", "sparsekern"} <= set(here)


def test_a_gpt_has_the_sparse_layers_that_its_row_says(monkeypatch):
    monkeypatch.setattr(gpt_step, "DEPTH", 1)
    sizes = {"width": 64, "vocabulary": 32, "free_head": True}
    head, dense_head = (gpt_step.Network(**sizes, sparsities=(0.75, 0.5, last)) for last in (0.75, 0.0))
    layers = {name: layer.sparsity for name, layer in sparse_layers(gpt_step.sparse_gpt(head, 16)).items()}
    inside = {"layers.0.attention.qkv": 0.5, "layers.0.attention.out": 0.5}
    inside |= {"layers.0.mlp.fc1": 0.75, "layers.0.mlp.fc2": 0.75}
    assert layers == inside | {"head": 0.75}
    model = gpt_step.sparse_gpt(dense_head, 16)
    assert sparse_layers(model).keys() == inside.keys() and type(model.head) is torch.nn.Linear
    assert gpt_step.sparse_gpt(head._replace(free_head=False), 16).head is None
