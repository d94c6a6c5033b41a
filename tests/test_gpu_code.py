"""The Triton kernels, compiled for GPUs that are not here: a row for each kernel, dtype and architecture.

The whole table takes minutes: ``python -m bench.gpu_code``.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.code.cases import DTYPES, cases, sample, sampled_by
from bench.code.rules import judge, narrowest, requirements, worse
from bench.gpu_code import COLUMNS, main, read_table, updated, write_table

ROOT = Path(__file__).parent.parent

Row = dict[str, Any]


def run_gpu_code(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process where kernels are compiled: the one of the tests interprets them."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "SPARSEKERN"))}
    command = [sys.executable, "-m", "bench.gpu_code", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def compiled() -> tuple[bool, dict[str, Row]]:
    """Whether the table is of this Triton, and the sampled rows as compiled now."""
    result = run_gpu_code("--sample", "--json")
    assert result.returncode in (0, 1), result.stderr
    found = json.loads(result.stdout)
    return found["triton"] == read_table()["triton"], found["rows"]


@pytest.fixture
def row() -> Row:
    """A healthy row: fwd on sm_90 in bf16."""
    return {
        "config": {"tile_t": 128, "tile_k": 64, "group": 8, "warps": 4, "stages": 4, "tma": False},
        "default": True,
        "instruction": "wgmma",
        "products": {"wgmma m64n32k16": 8},
        "copies": {"16": 40},
        "registers": 72,
        "spills": 0,
        "shared": 81920,
        "buffers": 4,
        "loop": 108,
        "per_block": 216.0,
    }


CASE = "sm_90 fwd bf16 32x32"


@pytest.mark.parametrize("case", [case.key for case in sample([])])
def test_compiled_code(case: str, compiled: tuple[bool, dict[str, Row]]) -> None:
    same_compiler, rows = compiled
    committed = read_table()["rows"]
    assert case in committed, "python -m bench.gpu_code --update"
    assert requirements(case, rows[case]) == []
    if same_compiler:
        assert worse(committed[case], rows[case]) == []


def test_every_committed_row_is_known_and_as_required() -> None:
    rows = read_table()["rows"]
    assert list(rows) == [case.key for case in cases([])]
    assert {case: problems for case, row in rows.items() if (problems := requirements(case, row))} == {}


def test_sample_has_every_pair_of_kernel_dtype_and_architecture() -> None:
    """Of a convolution every kernel and architecture, in several dtypes and blocks."""
    assert sorted({sampled_by(case) for case in cases([])}) == sorted(sampled_by(case) for case in sample([]))
    for pair in (("arch", "kernel"), ("arch", "dtype"), ("kernel", "dtype")):
        found, known = (
            {tuple(getattr(case, name) for name in pair) for case in some if "conv2d" not in case.kernel}
            for some in (sample([]), cases([]))
        )
        assert found == known, pair
    convolutions = [case for case in sample([]) if case.kernel.startswith("conv2d_")]
    assert {case.dtype for case in convolutions} == set(DTYPES)
    assert {case.bo for case in convolutions} == {16, 32, 64, 128}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"instruction": "mma.sync"}, "products by mma.sync, not wgmma"),
        ({"copies": {"16": 32, "4": 8}}, "copies of 4 bytes, not 16"),
        ({"copies": {}}, "copies of 0 bytes, not 16"),
        ({"buffers": 3}, "buffers 4 -> 3"),
        ({"shared": 81921}, "shared memory 81920 -> 81921"),
        ({"spills": 8}, "spills 0 -> 8"),
        ({"per_block": 218.0}, "per_block 216.0 -> 218.0"),
    ],
)
def test_worse_is_refused(row: Row, change: Row, said: str) -> None:
    assert worse(row, row | change) == [said]
    wrong, changed = judge({CASE: row}, {CASE: row | change}, same_compiler=True)
    assert f"{CASE}: {said}" in wrong and changed == [CASE]
    assert updated({CASE: row}, {CASE: row | change}, [CASE], {CASE}) == {CASE: row}
    excused, _ = judge({CASE: row}, {CASE: row | change}, same_compiler=True, may_worsen=["sm_90 fwd *"])
    assert excused == [f"{CASE}: {problem}" for problem in requirements(CASE, row | change)]


@pytest.mark.parametrize("change", [{"per_block": 200.0}, {"shared": 1}, {"buffers": 5, "shared": 99999}])
def test_better_is_accepted(row: Row, change: Row) -> None:
    assert worse(row, row | change) == []


def test_another_compiler_is_held_to_the_requirements_only(row: Row) -> None:
    longer = row | {"per_block": 999.0}
    assert judge({CASE: row}, {CASE: longer}, same_compiler=False) == ([], [CASE])
    wrong, _ = judge({CASE: row}, {CASE: longer | {"spills": 4}}, same_compiler=False)
    assert wrong == [f"{CASE}: it spills 4 bytes"]


def test_new_row_is_added_in_order(row: Row) -> None:
    assert judge({}, {CASE: row}, same_compiler=True) == ([], [CASE])
    assert list(updated({"b": row}, {"a": row}, ["a", "b"], set())) == ["a", "b"]


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        (CASE, {"instruction": "mma.sync"}, "its products are mma.sync, not wgmma"),
        ("sm_100 fwd bf16 32x32", {}, "its products are wgmma, not tcgen05"),
        ("sm_90 fwd ieee 32x32", {"buffers": 3}, "its products are wgmma, not scalar"),
        ("sm_90 few_fwd bf16 32x32", {"buffers": 3}, "its products are wgmma, not mma.sync"),
        ("sm_90 dvalues fp32 32x32", {"buffers": 3}, "its products are wgmma, not mma.sync"),
        (CASE, {"copies": {"16": 8, "8": 1}}, "its copies are 16, 8, not 16"),
        ("sm_90 fwd_tma bf16 64x64", {}, "its copies are 16, not tma"),
        ("sm_90 all_block_norms fp32 32x32", {}, "its copies are 16, not 4"),
        (CASE, {"buffers": 2}, "it has 2 buffers, not 4, in 4 stages"),
        ("sm_80 fwd bf16 32x32", {"instruction": "mma.sync"}, "it has 4 buffers, not 3, in 4 stages"),
        ("sm_90 sum_splits bf16 32x32", {"spills": 4}, "it spills 4 bytes"),
        ("sm_90 conv2d_projection bf16 32x32", {"spills": 4}, "it spills 4 bytes"),
        ("sm_90 conv2d_fwd bf16 32x32", {"instruction": "mma.sync"}, "its products are mma.sync, not wgmma"),
        ("sm_90 conv2d_dvalues fp32 32x32", {"buffers": 3}, "its products are wgmma, not mma.sync"),
    ],
)
def test_requirements(row: Row, case: str, change: Row, said: str) -> None:
    assert requirements(case, row | change) == [said]
    assert requirements(CASE, row) == []


def test_table_is_read_as_it_was_written(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.gpu_code.TABLE", tmp_path / "table.json")
    assert read_table() == {"triton": None, "rows": {}}
    write_table("1.2", {CASE: row, "b": copy.deepcopy(row)})
    assert read_table() == {"triton": "1.2", "rows": {CASE: row, "b": row}}


def test_a_copy_that_was_by_tma_is_called_so(row: Row) -> None:
    assert worse(row | {"copies": {"tma": 2}}, row) == ["copies of 16 bytes, not by TMA"]


@pytest.mark.parametrize("width", ["4", "8", "16"])
def test_tf32_over_tokens_is_copied_in_4_bytes_by_need_only_on_hopper(row: Row, width: str) -> None:
    copied = row | {"copies": {width: 8}, "config": row["config"] | {"tile_in": 128, "warps": 8}}
    hopper = requirements("sm_90 all_block_norms fp32 32x32", copied)
    assert hopper == ([] if width == "4" else [f"its copies are {width}, not 4"])
    assert requirements("sm_100 all_block_norms fp32 32x32", copied | {"instruction": "tcgen05"}) == []


def test_sample_of_some_rows() -> None:
    assert {case[:3] for case in sample(["sm_90 fwd *"])} == {("sm_90", "fwd", d) for d in ("fp16", "fp32", "ieee")}
    assert len(sample(["sm_90 fwd bf16 *"])) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "sm_90 backward *"], "no row is called 'sm_90 backward *'"),
        (["--allow-worse", "sm_90 backward *"], "no row is called 'sm_90 backward *'"),
        (["--processes", "0"], "--processes must be at least 1"),
        (["--update", "--only", "sm_90 fwd *"], "the table is of Triton 0.1"),
        (["--update", "--sample"], "the table is of Triton 0.1"),
    ],
)
def test_arguments_that_make_no_sense(
    arguments: list[str], said: str, row: Row, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr("bench.gpu_code.TABLE", tmp_path / "table.json")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # main takes it out of the environment
    monkeypatch.setattr("bench.gpu_code.measure_all", lambda *_, **__: pytest.fail("something is compiled"))
    write_table("0.1", {CASE: row})
    before = (tmp_path / "table.json").read_text()
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2 and said in capsys.readouterr().err
    assert (tmp_path / "table.json").read_text() == before


def test_help_explains_columns_and_exit_codes() -> None:
    said = run_gpu_code("--help").stdout
    assert "exit code is 0" in said and all(f"    {column} " in said for column in COLUMNS)


def test_narrowest(row: Row) -> None:
    assert narrowest(row | {"copies": {"tma": 2, "16": 1}}) == 16
    assert narrowest(row | {"copies": {"tma": 2}}) > 16


PTX = """
    @%p1 cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4;
    cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 0;
    wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r1}, %rd1, %rd2, %p1, 1, 1, 0, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
    @%p2 tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1, %rd2, %r2, %p1;
"""

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   IADD3 R3, R3, 0x1, RZ ;
.L_x_2:
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
.L_x_3:
        /*0070*/                   BRA `(.L_x_3);
"""


def test_what_is_read_from_compiled_code() -> None:
    from bench.code import compiled as code

    assert code.matrix_instructions(PTX) == {"mma.sync m16n8k16": 1, "tcgen05 tf32": 1, "wgmma m64n32k16": 2}
    assert code.copy_widths(PTX) == {"16": 1, "4": 2, "tma": 1}
    assert [line.split()[0] for line in code.main_loop(SASS)] == ["HGMMA.64x32x16.F32.BF16", "@!P0", "IADD3", "@P1"]
    assert code.main_loop(SASS.replace("HGMMA", "IMMA")) == []
    assert code.resources(" REG:72 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:600") == {"registers": 72, "spills": 12}
    with pytest.raises(ValueError, match="no resource usage"):
        code.resources("nothing")


def test_buffers_are_those_of_both_operands() -> None:
    from bench.code.compiled import buffers

    x = "%x = ttg.local_alloc : () -> !ttg.memdesc<4x128x64xbf16, #shared, #smem, mutable>\n"
    barrier = "%b = ttg.local_alloc : () -> !ttg.memdesc<4x1xi64, #shared, #smem, mutable>\n"
    assert buffers(x + x.replace("4x128", "3x64") + barrier) == 3
    assert buffers(x + barrier) == 0
