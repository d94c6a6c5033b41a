"""save_pretrained and from_pretrained of sparse models, with the library itself."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsekern as sk

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from huggingface_hub import ModelCard  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

from sparsekern.integrations.transformers import SparseConfig, model_card  # noqa: E402
from tests.integrations.transformers.models import MODELS, bloom, build, gpt2, logits  # noqa: E402


def moved(name: str, block: int = 8) -> nn.Module:
    """A sparse model whose places no seed tells."""
    model = sk.sparsify_(build(name), 0.5, block)
    assert sk.SET(model, torch.optim.SGD(model.parameters()), drop_fraction=0.5).update()
    return model


def same_places(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = sk.sparse_layers(a), sk.sparse_layers(b)
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[n].row, theirs[n].row) and torch.equal(mine[n].col, theirs[n].col) for n in mine
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_sparse_model_comes_back_sparse_with_the_same_bits(name: str, tmp_path: Path):
    model = moved(name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert same_places(model, again)
    assert torch.equal(logits(again), expected)
    again.save_pretrained(tmp_path / "again")  # what was loaded saves itself as well
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), expected)


@pytest.mark.parametrize("block", [1, (8, 16)])
def test_other_blocks_free_slots_and_sharded_files(block, tmp_path: Path):
    model = sk.sparsify_(build("gpt2"), 0.5, block, capacity=1.25)
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_places(model, again) and torch.equal(logits(again), expected)
    assert any((layer.row < 0).any() for layer in sk.sparse_layers(again).values())
    sk.load_(again, tmp_path / "model.safetensors.index.json")  # our own reader takes these files, too
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_maps_and_dtypes(device_map, tmp_path: Path):
    model = moved("gpt2")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path, device_map=device_map)), expected)
    low = type(model).from_pretrained(tmp_path, device_map=device_map, dtype=torch.bfloat16)
    layer = next(iter(sk.sparse_layers(low).values()))
    assert layer.values.dtype == torch.bfloat16 and layer.row.dtype == torch.int32
    assert torch.equal(logits(low), logits(model.to(torch.bfloat16)))


def test_layers_on_the_disk(tmp_path: Path):
    model = moved("gpt2")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "cpu", "transformer.h.1": "disk"}
    places |= {"transformer.ln_f": "cpu", "lm_head": "cpu"}
    again = type(model).from_pretrained(tmp_path, device_map=places, offload_folder=str(tmp_path / "offload"))
    assert again.transformer.h[1].mlp.c_fc.values.is_meta
    assert torch.equal(logits(again), expected)


def test_another_head_or_none(tmp_path: Path):
    model = moved("bert")
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 8)[None]
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(base(ids).last_hidden_state, model.bert(ids).last_hidden_state)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier.classifier) is nn.Linear
    hidden = classifier.bert(ids).last_hidden_state
    assert torch.equal(hidden, base(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    assert torch.equal(again.bert(ids).last_hidden_state, hidden)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "t5"])
def test_generation_with_a_cache_gives_the_same_text(name: str, tmp_path: Path):
    model = moved(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = torch.arange(2, 12).view(2, 5)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    cached = again.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, again.generate(ids, use_cache=False, **options))
    assert torch.equal(cached, model.generate(ids, **options))


def test_a_process_that_does_not_know_the_format_fails_instead_of_drawing_weights(tmp_path: Path, monkeypatch):
    moved("gpt2").save_pretrained(tmp_path)
    for mapping in (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING):
        monkeypatch.delitem(mapping, "sparsekern")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_becomes_sparse_as_it_is_loaded(tmp_path: Path):
    dense = build("qwen3")
    dense.save_pretrained(tmp_path)
    config = SparseConfig(sparsity=0.5, block_size=8, ignore=["re:.*attn.*"])
    model = type(dense).from_pretrained(tmp_path, quantization_config=config)
    assert len(sk.sparse_layers(model)) == 6
    by_hand = sk.sparsify_(dense, 0.5, 8, ignore=["re:.*attn.*"], init="norm")
    assert torch.equal(logits(model), logits(by_hand))
    model.save_pretrained(tmp_path / "sparse")
    assert torch.equal(logits(type(dense).from_pretrained(tmp_path / "sparse")), logits(model))


def test_dense_again(tmp_path: Path):
    model = moved("gpt2")
    model.save_pretrained(tmp_path / "sparse")
    expected = logits(model)
    for number, dense in enumerate((sk.densify(model), type(model).from_pretrained(tmp_path / "sparse").dequantize())):
        torch.testing.assert_close(logits(dense), expected)
        assert type(dense.transformer.h[0].mlp.c_fc).__name__ == "Conv1D"
        dense.save_pretrained(tmp_path / f"dense{number}")
        assert "quantization_config" not in json.loads((tmp_path / f"dense{number}/config.json").read_text())
        again = type(model).from_pretrained(tmp_path / f"dense{number}")
        assert not sk.sparse_layers(again) and torch.equal(logits(again), logits(dense))
    model.save_pretrained(tmp_path / "sparse")  # the model itself is as it was
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "sparse")), expected)


def test_it_casts_and_trains_as_a_model_that_is_not_quantized(tmp_path: Path):
    moved("gpt2").save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.half().dtype == torch.float16 and model.float().dtype == torch.float32
    args = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    transformers.Trainer(model, args)  # refuses models that are quantized


class OwnCode(transformers.GPT2LMHeadModel):
    """A model whose own code makes it sparse."""

    def __init__(self, config):
        super().__init__(config)
        sk.sparsify_(self, 0.5, 8)


def test_a_model_whose_own_code_makes_it_sparse(tmp_path: Path):
    model = OwnCode(gpt2().config).eval()
    assert sk.SET(model, torch.optim.SGD(model.parameters()), drop_fraction=0.5).update()
    model.save_pretrained(tmp_path)
    again = OwnCode.from_pretrained(tmp_path)
    assert same_places(model, again) and torch.equal(logits(again), logits(model))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"slots": 8', '"slots": 7'))
    with pytest.raises(ValueError, match="is sparse otherwise in the model's code than in config.json"):
        OwnCode.from_pretrained(tmp_path)


def test_bloom_reads_weights_only_where_it_imitates_its_training():
    model = sk.sparsify_(build("bloom"), 0.5, 8)
    assert len(sk.sparse_layers(model)) == 8
    with pytest.raises(ValueError, match="h.0.self_attention.dense: BloomAttention.forward reads its weight"):
        sk.sparsify_(bloom(slow_but_exact=True, pretraining_tp=2), 0.5, 8)


def test_without_absent_blocks_it_is_the_dense_model():
    for name in ("gpt2", "llama"):
        dense = build(name)
        full = sk.sparsify_(build(name), 0.0, 8, init="norm")
        torch.testing.assert_close(logits(full), logits(dense), rtol=1e-4, atol=1e-5)


SAID = {
    "gpt2": ["lm_head: stays dense (its weight is tied to the embedding 'transformer.wte')"],
    "bert": ["cls.predictions.decoder: stays dense (its weight is tied to the embedding"],
    "t5": ["lm_head: stays dense (its weight is tied to the embedding 'shared')"],
    "qwen3": ["lm_head: stays dense (its weight is tied", "(tied to lm_head.weight)"],
    "mixtral": ["in MixtralExperts.gate_up_proj (3-dimensional)", "in MixtralExperts.down_proj (3-dimensional)"],
    "vit": ["vit.embeddings.patch_embeddings.projection: stays dense (stem)"],
    "llama": ["of the model's"],
}


@pytest.mark.parametrize("name", SAID)
def test_what_stays_dense_is_said(name: str, caplog):
    with caplog.at_level(logging.INFO, logger="sparsekern"):
        model = sk.sparsify_(build(name), 0.5, 8)
    for text in [*SAID[name], f"{sk.nn.dense_share(model).fraction:.1%} of the model's"]:
        assert text in caplog.text
    assert {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} <= {"lm_head", "cls.predictions.decoder"}


def test_the_card_says_how_to_load_it_and_what_is_sparse(tmp_path: Path):
    model = moved("gpt2")
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(model_card(model, str(tmp_path)))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.tags == ["sparsekern", "block-sparse"]
    assert "50.0% of their 24,576 weights are absent" in card.content
    assert "| 2 | 96 x 32 | 8 x 8 | 50.0% |" in card.content
    code = card.content.split("```python\n")[1].split("```")[0]
    found: dict = {}
    exec(code, found)
    assert torch.equal(logits(found["model"]), logits(model))
    assert model.model_tags == card.data.tags  # what push_to_hub writes into the card of the repository
    with pytest.raises(ValueError, match="no sparse layer"):
        model_card(build("gpt2"))


def edited(folder: Path, **changes) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    return folder


def test_wrong_folders_are_one_sentence(tmp_path: Path):
    model = moved("gpt2")
    name = "transformer.h.0.mlp.c_fc"
    cases = [
        ({"version": 99}, "was saved in version 99 of the format 'sparsekern'; this sparsekern reads 1"),
        ({"layers": {name: {"block_size": [8, 8]}}}, f"describes the sparse layer '{name}' as"),
        ({"layers": {name: {"block_size": 8, "slots": 2}}}, "it must be block_size: \\[out, in\\] and slots"),
        ({"layers": {name: {"block_size": [8, 8], "slots": True}}}, "it must be block_size"),
        ({"layers": {name: 3}}, "it must be block_size"),
        ({"layers": {"transformer.ln_f": {"block_size": [8, 8], "slots": 1}}}, "in the model it is a LayerNorm"),
        ({"layers": {"nobody": {"block_size": [8, 8], "slots": 1}}}, "'nobody', of which GPT2LMHeadModel has none"),
        ({"layers": {name: {"block_size": [8, 8], "slots": 10**6}}}, "blocks"),
        ({"layers": None}, "no layers"),
    ]
    for number, (changes, message) in enumerate(cases):
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        with pytest.raises(ValueError, match=message):
            transformers.AutoModelForCausalLM.from_pretrained(edited(folder, **changes))
    folder = tmp_path / "dense"
    sparse_config = json.loads((tmp_path / "0/config.json").read_text())["quantization_config"] | {"version": 1}
    build("gpt2").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": sparse_config}))
    with pytest.raises(ValueError, match="the files hold the weights of a dense model"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_wrong_places_in_the_file_are_one_sentence(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    moved("gpt2").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    state["transformer.h.1.mlp.c_fc.col"][0] = 10**6
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match="col"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
