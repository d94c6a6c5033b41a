import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch
from sparsekern.kernels.cpu import library
from typer.testing import CliRunner

import sparsekern
from sparsekern.cli import info as module
from sparsekern.cli.main import application


def run(*options):
    result = CliRunner().invoke(application(), ["info", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if options else result.stdout


@pytest.fixture
def fresh():
    """The library is looked for anew, and once more afterwards."""
    library.load.cache_clear()
    yield
    library.load.cache_clear()


def test_versions_and_devices():
    found = run("--json")
    assert found["versions"]["sparsekern"] == sparsekern.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"]["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["devices"]["cpu"]["cores"] >= 1 and found["devices"]["cpu"]["model"]
    assert len(found["devices"]["gpus"]) == torch.cuda.device_count()


def test_backends_come_in_the_order_of_speed_and_eager_is_always_live():
    backends = run("--json")["backends"]
    assert list(backends) == list(sparsekern.ops.BACKENDS)
    assert backends["eager"] == {"live": True, "detail": "plain PyTorch, on every device"}


def test_the_text_says_the_same():
    found, text = run("--json"), run()
    assert found["devices"]["cpu"]["model"] in text
    for name, state in found["backends"].items():
        line = next(line for line in text.splitlines() if line.startswith(name + " "))
        assert line.endswith(state["detail"]) and ("no: " in line) == (not state["live"])


@pytest.mark.skipif(library.load()[0] is None, reason="the native library is not there")
@pytest.mark.parametrize(("openmp", "words"), [(1, "OpenMP"), (0, "one thread: built without OpenMP")])
def test_the_live_instruction_set_is_named(openmp, words, monkeypatch):
    name = library.load()[1]
    monkeypatch.setattr(module, "load", lambda: (SimpleNamespace(sk_openmp=lambda: openmp), name))
    assert run("--json")["backends"]["cpu"] == {"live": True, "detail": f"{name} (native library, {words})"}


def test_a_library_that_was_not_built(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEKERN_CPU", raising=False)
    monkeypatch.setattr(library, "FILE", tmp_path / "absent.so")
    state = run("--json")["backends"]["cpu"]
    assert not state["live"] and "was not built" in state["detail"]
    assert "cpu         no: the native library was not built" in run()


def test_a_request_that_cannot_be_met_is_told_and_does_not_end_the_command(fresh, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CPU", "sse")
    assert "SPARSEKERN_CPU is 'sse'; it must be one of" in run("--json")["backends"]["cpu"]["detail"]


def test_a_machine_without_gpu_and_triton(monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "version", absent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    found, text = run("--json"), run()
    assert found["versions"]["triton"] is None and "triton      not installed" in text
    assert found["backends"]["gpu"] == {"live": False, "detail": "PyTorch finds no NVIDIA GPU here"}
    assert "GPU         none" in text


def test_a_machine_with_two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name=f"Card {i}", total_memory=(i + 1) * 2**34)
    )
    monkeypatch.setattr(sparsekern.ops.BACKENDS["gpu"], "why_not", lambda *a: None)
    text = run()
    assert "GPU         Card 0, 16 GiB\nGPU         Card 1, 32 GiB" in text
    assert "gpu         Triton" in text


def test_it_is_a_sub_command_that_helps():
    assert "info" in CliRunner().invoke(application(), []).output
    assert "--json" in CliRunner().invoke(application(), ["info", "--help"], env={"COLUMNS": "200"}).output
