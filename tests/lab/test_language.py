"""The language model of the command: bytes of a text, dense and sparse, from its options to its results."""

from __future__ import annotations

import html
import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import sparsekern as sk
from sparsekern.cli.main import application
from sparsekern.errors import InputError
from sparsekern.lab import Config, Interrupted, resume, start
from sparsekern.lab.language import EXAMPLES, Language
from sparsekern.lab.options import percent
from sparsekern.lab.report.tables import printable
from sparsekern.lab.resolved import resolve
from sparsekern.lab.run import Observer
from sparsekern.lab.store import RESULTS
from sparsekern.lab.train import Learner
from tests.lab.runs import StopAt, rows_of

TINY = {"recipe": "gpt-nano", "width": 64, "network": {"depth": 1, "context": 8}, "batch_size": 400, "device": "cpu"}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    return str(path)


@pytest.fixture
def config(text):
    return Config(data=text, epochs=1, **TINY)


def run_of(config):
    return resolve(config, Language.load(config.data, config.data_max_gib))


def test_targets_are_the_bytes_that_follow(config):
    task = run_of(config).task
    order = task.order(torch.Generator().manual_seed(0))
    inputs, targets = task.batch(order, 3, 400, torch.Generator())
    assert order.shape == (EXAMPLES,) and inputs.shape == targets.shape == (400, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[0].tolist() == list(task.corpus.train.read(int(order[1200]), 8))


def test_bits_per_byte_are_those_of_the_held_out_text(config):
    learner = Learner(run_of(config), "sparse", 0)
    windows = learner.task.corpus.held_out.even_windows(256, 9)
    with torch.no_grad():
        nats = cross_entropy(learner.model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
    assert learner.evaluate()["bits_per_byte"] == pytest.approx(float(nats) / math.log(2), rel=1e-5)


def test_each_kind_of_layer_has_its_sparsity(text):
    config = Config(data=text, block_size=16, sparsity={"mlp": 0.75, "attention": 0.5}, epochs=1, **TINY)
    layers = sk.sparse_layers(Learner(run_of(config), "sparse", 0).model)
    assert {name: layer.sparsity for name, layer in layers.items()} == {
        "layers.0.attention.qkv": 0.5,
        "layers.0.attention.out": 0.5,
        "layers.0.mlp.fc1": 0.75,
        "layers.0.mlp.fc2": 0.75,
    }
    one = Config(data=text, sparsity={"mlp": 0.75}, epochs=1, **TINY)
    assert set(sk.sparse_layers(Learner(run_of(one), "sparse", 0).model)) == {"layers.0.mlp.fc1", "layers.0.mlp.fc2"}
    assert percent(config.sparsity) == "mlp 75 %, attention 50 %" and one.sparsity_slug == "mlp0.75"


def test_one_number_is_for_all_kinds_and_a_free_head_stays_dense(text):
    options = TINY | {"network": TINY["network"] | {"free_head": True, "activation": "swiglu", "positions": "rotary"}}
    model = Learner(run_of(Config(data=text, sparsity=0.5, epochs=1, **options)), "sparse", 0).model
    assert isinstance(model.head, torch.nn.Linear) and model.places is None
    assert {layer.sparsity for layer in sk.sparse_layers(model).values()} == {0.5}


def test_sparse_layers_start_as_the_network_draws_its_weights(text):
    """nanoGPT's 0.02, over the root of twice the depth where the output is added to the residual stream; no bias."""
    model = Learner(run_of(Config(data=text, sparsity=0.75, epochs=1, **TINY)), "sparse", 0).model
    for name, layer in sk.sparse_layers(model).items():
        std = 0.02 / 2**0.5 if name.endswith(("out", "fc2")) else 0.02
        assert abs(float(layer.values.detach().std()) * 0.25**0.5 / std - 1) < 0.1 and not layer.bias.any()


def test_a_free_head_may_be_sparse(text):
    options = TINY | {"network": TINY["network"] | {"free_head": True}}
    config = Config(data=text, block_size=16, sparsity={"mlp": 0.75, "head": 0.5}, epochs=1, **options)
    learner = Learner(run_of(config), "sparse", 0)
    assert set(sk.sparse_layers(learner.model)) == {"layers.0.mlp.fc1", "layers.0.mlp.fc2", "head"}
    assert learner.model.head.sparsity == 0.5
    learner.step()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rigl"},
        {"method": "gse", "options": {"distribution": "grabo"}},
        {"method": "vrpge"},
        {"method": "set", "options": {"agent": True, "agent_batches": 1}},
        {"method": "static", "sparsity": 0.5, "options": {"transform": "parallel"}},
        {"method": "static", "sparsity": 0.5, "options": {"transform": "wide"}},
        {"method": "rigl", "accumulate": 3, "precision": "bfloat16"},
    ],
    ids=str,
)
def test_every_method_trains_it(text, options):
    run = run_of(Config(data=text, epochs=1, **TINY | options))
    learner = Learner(run, "sparse", 0)
    first = learner.evaluate()["bits_per_byte"]
    for _ in range(run.batches):
        learner.step()
    row = learner.finish_epoch()
    assert row["bits_per_byte"] < first and first == pytest.approx(8, abs=0.5)


def test_parts_of_a_batch_add_up_to_its_gradients(config, text):
    def gradients(accumulate):
        learner = Learner(run_of(Config(data=text, accumulate=accumulate, epochs=1, **TINY)), "dense", 0)
        loss = learner._backward(learner.next_batch())
        return loss, [p.grad for p in learner.model.parameters()]

    (whole, expected), (parts, got) = gradients(1), gradients(3)  # 400 texts in parts of 134, 133 and 133
    torch.testing.assert_close(parts, whole)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_autocast_computes_in_bfloat16(text):
    learner = Learner(run_of(Config(data=text, precision="bfloat16", epochs=1, **TINY)), "sparse", 0)
    seen = set()
    learner.model.layers[0].mlp.fc1.register_forward_hook(lambda module, inputs, out: seen.add(out.dtype))
    learner.step()
    learner.evaluate()
    assert seen == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in learner.model.parameters())


def test_a_run_ends_with_a_table_and_texts(config, tmp_path):
    folder = tmp_path / "run"
    results = start(config, folder, Observer()).results
    assert results["data"]["name"] == "text.txt" and results["data"]["held_out_bytes"] == 900
    for network in results["networks"].values():
        assert network["written"].startswith(Language.load(config.data, 1).corpus.held_out.read(0, 64).decode())
        assert 64 < len(network["written"]) <= 64 + 512 and network["bits_per_byte"]["mean"] < 8
    assert {"bits_per_byte_gap", "at_equal_time"} <= results["comparison"].keys()
    assert json.loads((folder / RESULTS).read_text())["networks"] == results["networks"]
    assert (folder / "summary.png").is_file()


def test_a_stopped_run_goes_on_bit_for_bit(config, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(config, whole, Observer())
    with pytest.raises(Interrupted):
        start(config, stopped, StopAt(5))
    resume(stopped, Observer())
    assert rows_of(stopped) == rows_of(whole)
    texts = [json.loads((folder / RESULTS).read_text())["networks"]["sparse"]["written"] for folder in (whole, stopped)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 100}, "width is 100; for recipe gpt-nano it must be a multiple of 64"),
        ({"sparsity": {"head": 0.9}}, "sparsity is given for the head, whose weight is the token embedding's"),
        ({"sparsity": {"tail": 0.9}}, "sparsity is given for tail; recipe gpt-nano has mlp, attention, head"),
        ({"sparsity": {}}, "sparsity is given for no kind of layers"),
        ({"sparsity": {"mlp": 1.0}}, "sparsity is 1.0"),
        ({"sparsity": {"mlp": "much"}}, "sparsity is .*; it must be a number"),
        (
            {"recipe": "mlp", "width": 64, "network": {}, "sparsity": {"mlp": 0.5}},
            "recipe mlp has none: give one number",
        ),
        ({"recipe": "mlp", "width": 64}, "depth is 1, but recipe mlp has no such options"),
        ({"network": {"depht": 1}}, "depht is 1, but recipe gpt-nano has depth, context, activation"),
        ({"network": {"depth": 0}}, "depth is 0; it must be a whole number from 1"),
        ({"network": {"activation": "relu"}}, "activation is 'relu'; it must be one of gelu, swiglu"),
        ({"network": []}, "network is .*; it must be a dictionary"),
        ({"width_multiplier": 2.0}, "width_multiplier is 2.0, but recipe gpt-nano has none; give a width"),
        ({"accumulate": 401}, "accumulate is 401, more than the 400 examples of a batch"),
        ({"accumulate": 0}, "accumulate is 0; it must be a whole number of 1 or more"),
        ({"precision": "float16"}, "precision is 'float16'; it must be one of float32, bfloat16"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_in_one_sentence(changes, words):
    with pytest.raises(InputError, match=words):
        Config(**TINY | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": {"context": 2000}}, "whose held-out part has 900 bytes; a context of 2000 needs 2001 or more"),
        ({"augment": "crop"}, "augment is crop, but text is not varied"),
    ],
    ids=str,
)
def test_a_text_that_does_not_fit_is_refused(text, changes, words):
    with pytest.raises(InputError, match=words):
        run_of(Config(data=text, epochs=1, **TINY | changes))


def test_a_transform_takes_one_sparsity(text):
    run = run_of(Config(data=text, epochs=1, method="static", options={"transform": "wide"}, **TINY))
    with pytest.raises(InputError, match="sparsity is given by kind of layer, but transform takes one for all"):
        Learner(run, "sparse", 0)


def test_the_page_shows_the_texts_and_the_command(text, config, tmp_path):
    folder = tmp_path / "run"
    start(config, folder, Observer())
    result = CliRunner().invoke(
        application(), ["report", str(folder), "--no-measure", "--out", str(tmp_path / "x.html")]
    )
    assert result.exit_code == 0, result.output
    page = html.unescape((tmp_path / "x.html").read_text())
    written = json.loads((folder / RESULTS).read_text())["networks"]["sparse"]["written"]
    assert "What the networks write" in page and printable(written) in page
    assert "--recipe gpt-nano" in page and "--depth 1 --context 8" in page
    assert "bits per byte" in page and "test accuracy" not in page


def test_the_command_trains_and_resumes_it(text, tmp_path):
    def command(*arguments):
        return CliRunner().invoke(application(), ["train", *arguments, "--quiet"], env={"COLUMNS": "200"})

    folder = str(tmp_path / "run")
    options = ["--recipe=gpt-nano", f"--data={text}", "--width=64", "--depth=1", "--context=8", "--batch-size=200"]
    options += ["--epochs=1", "--sparsity", "mlp=0.75", "--sparsity", "attention=0.5", "--device=cpu"]
    first = command(*options, "--out", folder)
    assert first.exit_code == 0, first.output
    assert "GPT-nano of width 64, depth 1, context 8" in first.output and "tokens a second" in first.output
    written = json.loads((tmp_path / "run" / RESULTS).read_text())["networks"]
    for name in ("sparse", "dense"):
        assert f"the {name} network writes:\n{printable(written[name]['written'])[:40]}" in first.output
    again = command("--resume", folder, "--depth=2")
    assert again.exit_code == 2 and "depth is 2, but the run in" in again.output
    assert command("--resume", folder, "--depth=1").exit_code == 0
