"""The command that predicts what a training costs."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from sparsekern.analysis.plan import DEVICES, Machine, trace
from sparsekern.analysis.plan.machine import ATTENTION
from sparsekern.cli import plan as module
from sparsekern.cli.main import application

SMALL = ("--recipe", "gpt-nano", "--width", "64", "--depth", "2", "--batch-size", "8")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own, and the number of threads as it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def largest(monkeypatch):
    """Only tests that ask for it look for the largest network, which takes most of the time."""
    real = module._largest
    monkeypatch.setattr(module, "_largest", lambda *given: 7)
    return lambda: monkeypatch.setattr(module, "_largest", real)


def run(*options, code=0):
    result = CliRunner().invoke(application(), ["plan", *options])
    assert result.exit_code == code, result.output
    return result


def test_a_plan_for_gpus(largest):
    largest()
    found = json.loads(run(*SMALL, "--device", "h200", "--devices", "4", "--strategy", "fsdp2", "--json").stdout)
    assert list(found["predictions"]) == ["sparse", "sparse checkpointed", "dense", "dense checkpointed"]
    sparse, dense = found["predictions"]["sparse"], found["predictions"]["dense"]
    assert sparse["memory"]["values"] < dense["memory"]["values"]
    assert sparse["memory_total"] == sum(
        sparse["memory"][part] for part in ("values", "optimizer", "index", "buffers", "communication", "step")
    )
    assert sparse["step_seconds"] == pytest.approx(sum(sparse["seconds"].values()))
    assert found["dense_over_sparse"] == pytest.approx(dense["step_seconds"] / sparse["step_seconds"])
    assert sparse["traffic"]["gathers"] > 0 and sparse["traffic"]["every"] >= 1
    assert "published peaks of h200" in found["constants"] and "nothing was run there" in found["constants"]
    plain, small = found["largest sparse"], found["largest sparse checkpointed"]
    assert plain["size"] > 100 < small["size"] and plain["now"] == 1


@pytest.mark.parametrize(("device", "kind"), [("h200", "attention"), ("cpu", "qkv attention")])
def test_attention_is_that_of_the_device(monkeypatch, device, kind):
    seen = []
    monkeypatch.setattr(module, "clocked_of", lambda *_: DEVICES["h200"])
    monkeypatch.setattr(module, "trace", lambda *given: seen.append(trace(*given)) or seen[-1])
    run(*SMALL, "--device", device, "--precision", "float32")
    kinds = {op.kind for found in seen for op in found.backward if op.group == ATTENTION}
    assert kinds == {
        f"{kind} forward causal",
        f"{kind} backward causal",
    }  # the former where checkpointed


def test_the_largest_network_is_not_built_where_its_blocks_would_fill_the_memory_here(largest, monkeypatch):
    largest()
    built, real = [], module.Planned.scaled
    monkeypatch.setattr(module.Planned, "scaled", lambda source, size: built.append(size) or real(source, size))
    options = ("--recipe", "mlp", "--width", "64", "--block-size", "1", "--device", "h200", "--json")
    size = json.loads(run(*options).stdout)["largest sparse"]["size"]
    assert built == [64, 128, 192] and size > 10_000


def test_a_device_holds_the_same_from_one_and_from_four():
    """Four devices with a quarter of the batch each hold what one does of the sparse layers, and buckets."""
    alone = json.loads(run(*SMALL[:-1], "2", "--device", "a100", "--json").stdout)["predictions"]["sparse"]
    four = json.loads(run(*SMALL, "--device", "a100", "--devices", "4", "--strategy", "ddp", "--json").stdout)
    four = four["predictions"]["sparse"]
    assert four["memory"] == alone["memory"] | {"communication": alone["memory"]["gradients"]}
    assert four["flops"] == alone["flops"]


def test_the_table_and_its_notes():
    text = run(*SMALL, "--device", "h100").stdout
    for words in ("values", "gradients", "optimizer", "index", "activations", "peak of a step", "attention"):
        assert words in text
    assert "is predicted to be faster: a dense step takes" in text
    assert "largest sparse network in 80 GB: 7 times 64 features of width, at the same depth (now 1)" in text
    assert text.rstrip().endswith("lower bounds, and nothing was run there")


@pytest.mark.parametrize("method", ["static", "set", "gse", "vrpge"])
def test_every_method(method):
    options = (*SMALL, "--method", method, "--devices", "2", "--strategy", "ddp", "--device", "a100", "--json")
    found = json.loads(run(*options).stdout)["predictions"]["sparse"]
    assert (found["traffic"]["moves"] > 0) == (method != "static")  # ranks agree even that no block moves
    assert (found["traffic"]["scores"] > 0) == (method == "gse")
    assert (found["seconds"]["updates of the topology"] > 0) == (method == "gse")


def test_rigl_scores_everything_on_one_device_and_sketches_on_two():
    one, two = (
        json.loads(run(*SMALL, "--method", "rigl", "--device", "a100", "--json", *more).stdout)["predictions"]["sparse"]
        for more in ((), ("--devices", "2", "--strategy", "ddp"))
    )
    assert one["traffic"]["scores"] == 0 < two["traffic"]["scores"]
    assert one["seconds"]["updates of the topology"] > 0 < two["seconds"]["updates of the topology"]


@pytest.mark.parametrize("recipe", ["mlp", "resnet20", "simplevit-tiny"])
def test_recipes_of_images(recipe):
    found = json.loads(run("--recipe", recipe, "--batch-size", "4", "--device", "h200", "--json").stdout)
    assert 0 < found["predictions"]["sparse"]["flops"] < found["predictions"]["dense"]["flops"]
    assert ("sparse checkpointed" in found["predictions"]) == (recipe != "mlp")


def test_this_machine_must_be_measured_first(cache, monkeypatch):
    words = "this machine is not measured with 1 thread yet; run: sparsekern plan --measure --threads 1"
    assert words in run(*SMALL, "--threads", "1", code=2).stderr

    def measured(about, told, watch):
        told(1.0)
        curves = {name: [(1.0, 1e-9)] for name in ("add", "mm", "attention forward causal", "_fused_adamw_")}
        curves |= {"attention backward causal": [(1.0, 1e-9)], "sparse linear 16x16 forward@64": [(1.0, 1e-9)]}
        return Machine(about, 1e-5, 1e-5, curves | {"sparse linear 16x16 backward@64": [(1.0, 1e-9)]})

    monkeypatch.setattr(module, "measure", measured)
    told = run("--measure", "--threads", "1").stdout
    assert told.startswith("measured ") and "1 thread, torch" in told and str(cache) in told.replace("\n", "")
    text = run(*SMALL, "--threads", "1").stdout
    assert "times from a measurement of" in text and "1 thread" in text
    assert "this machine is not measured with 2 threads" in run(*SMALL, "--threads", "2", code=2).stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--device h300", "device is 'h300'; it must be one of cpu, a100, h100"),
        ("--device h200 --devices 3 --strategy ddp", "batch_size is 8, which 3 devices cannot share evenly; give a"),
        ("--device h200 --devices 2", "strategy is 'single' and devices is 2; use ddp or fsdp2"),
        ("--device h200 --strategy fsdp", "strategy is 'fsdp'; it must be one of single, ddp, fsdp2"),
        ("--device h200 --devices 0", "devices is 0; it must be 1 or more"),
        ("--device h200 --accumulate 3", "batch_size is 8, which 1 device in 3 parts each cannot share evenly"),
        ("--threads 0", "threads is 0; it must be 1 or more"),
        ("--precision bfloat16", "precision is bfloat16, of which nothing is measured on a CPU; use float32"),
        ("--device h200 --sparsity lots", "sparsity is 'lots'"),
        ("--device h200 --method rigll", "method is 'rigll'"),
        ("--config nowhere", "config is given, with which depth, recipe, width do not go; drop one or the other"),
    ],
)
def test_errors_in_one_sentence(options, words):
    result = run(*SMALL, *options.split(), code=2)
    assert words in result.stderr.replace("\n", " ") and "Traceback" not in result.output


def test_published_peaks_are_those_of_the_kernels_where_the_device_is_the_same():
    assert {device.arch for device in DEVICES.values()} <= {"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}
    assert all(device.gigabytes > 0 and device.memory_tb_s > 0 and device.link_gb_s > 0 for device in DEVICES.values())
