"""What docs/models.md says of PEFT, of quantization, and of Transformers' inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sparsekern as sk


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x)))


def test_lora_first_and_sparse_afterwards():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["fc1", "fc2"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, Network())
    weight = model.fc1.base_layer.weight.detach().clone()
    sk.sparsify_(model, 0.5, 8, targets="*.base_layer", init="norm")
    assert list(sk.sparse_layers(model)) == ["fc1.base_layer", "fc2.base_layer"]
    kept = model.fc1.base_layer.dense_weight()
    assert torch.equal(kept, weight * (kept != 0))
    x = torch.randn(3, 32)
    low = model.fc1.lora_B["default"].weight @ model.fc1.lora_A["default"].weight * model.fc1.scaling["default"]
    expected = x @ (kept + low).T + model.fc1.base_layer.bias
    torch.testing.assert_close(model.fc1(x), expected)
    model(x).sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"fc{i}.lora_{ab}.default.weight" for i in (1, 2) for ab in "AB"}
    with pytest.raises(ValueError, match="SparseLinear.*is not supported"):
        peft.inject_adapter_in_model(config, sk.sparsify_(Network(), 0.5, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dynamic_quantization_takes_densified_models_and_skips_sparse_ones():
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None or "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this PyTorch has no dynamic quantization on this machine")
    model = sk.sparsify_(Network(), 0.5, 8)
    assert len(sk.sparse_layers(quantize(model, {nn.Linear}, dtype=torch.qint8))) == 2
    quantized = quantize(sk.densify(model), {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.fc1).__name__ == "DynamicQuantizedLinear" or "quantized" in type(quantized.fc1).__module__
    x = torch.randn(3, 32)
    assert (quantized(x) - model(x)).abs().max() < 0.05


def test_summary_of_a_model_that_takes_names():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    sk.sparsify_(model, 0.5, 8)
    tokens = torch.arange(6).view(2, 3)
    batch = transformers.BatchEncoding({"input_ids": tokens, "attention_mask": torch.ones(2, 3)})
    rows = {row.name: row for row in sk.summary(model, batch, measure=False).rows}
    assert rows["encoder.layer.0.intermediate.dense"].tokens == 6 and rows["pooler.dense"].tokens == 2
