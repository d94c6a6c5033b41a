"""Sparse layers and methods inside Transformers, Lightning, Accelerate, PEFT, torch.fx and quantization."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import sparsekern as sk
from sparsekern.training.attachment import unwrapped
from tests.training.test_base import batch, make

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
QUIET |= {"enable_progress_bar": False, "enable_model_summary": False}
"""Options of Lightning's trainer."""

# Optimizers in wrappers: the method acts in the one that makes the steps.


class AcceleratedOptimizer(torch.optim.Optimizer):
    """An imitation of accelerate's: a property for each part of the inner one, and no ``__init__`` of PyTorch's."""

    def __init__(self, optimizer, scaler=None, every=1):
        self.optimizer, self.scaler, self.every, self.calls = optimizer, scaler, every, 0

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.calls += 1
        if self.calls % self.every:
            return
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step(closure)

    def zero_grad(self):
        if self.calls % self.every == 0:
            self.optimizer.zero_grad()


class LightningOptimizer:
    """An imitation of Lightning's: takes over the class of what it wraps, and hands on every other attribute."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure=None):
        return self._optimizer.step(closure)

    def __getattr__(self, item):
        return getattr(self._optimizer, item)


class KeepsItsOwn(AcceleratedOptimizer):
    """A wrapper by name, with a state of its own."""

    state = {}  # noqa: RUF012


class Average(torch.optim.Optimizer):
    """Hands on state and groups, but does more than that: not certain."""

    def __init__(self, optimizer):
        self.optimizer, self.reference = optimizer, [p.clone() for p in optimizer.param_groups[0]["params"]]

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)


WRAPPERS = {
    "accelerate": AcceleratedOptimizer,
    "lightning": LightningOptimizer,
    "both": lambda optimizer: AcceleratedOptimizer(LightningOptimizer(optimizer)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("kind", [sk.SET, sk.RigL, sk.VRPGE])
def test_the_inner_one_is_followed(kind, wrap):
    def run(wrap):
        model = make()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        outer = wrap(inner)
        method = kind(model, outer, update_every=3, stop=9)
        agent = sk.AGENT(model, outer, method=method, gamma=0.0)
        assert method.optimizer is inner and agent.optimizer is inner
        moved = []
        for step in range(10):
            agent.backward(lambda step=step: model(batch(step)).square().mean())
            outer.step()
            outer.zero_grad()
            moved.append(agent.step())
        return model.state_dict(), moved, method.steps

    (state, moved, steps), (expected, theirs, _) = run(wrap), run(lambda optimizer: optimizer)
    assert moved == theirs and any(moved) and steps == 10
    assert all(torch.equal(value, expected[key]) for key, value in state.items())


def test_the_steps_really_made_are_counted():
    model = make()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    outer = AcceleratedOptimizer(inner, scaler, every=2)
    method = sk.SET(model, outer, update_every=1, drop_fraction=0.5)
    seen = []
    for step in range(8):
        factor = float("inf") if step == 3 else 1.0  # the second step overflows, and is skipped
        scaler.scale(model(batch(step)).square().mean() * factor).backward()
        outer.step()
        outer.zero_grad()
        seen.append(method.step())
    assert method.steps == 3 and seen == [False, True, False, False, False, True, False, True]


def test_what_is_not_certain_is_refused():
    model = make()
    inner = torch.optim.SGD(model.parameters())
    for outer in (KeepsItsOwn(inner), Average(inner)):
        assert unwrapped(outer) is outer
        with pytest.raises(ValueError, match=r"keeps its state in another optimizer \('optimizer'\)"):
            sk.SET(model, outer)
    for nothing in (None, [inner], nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"optimizer is a \w+; it must be a torch.optim.Optimizer"):
            sk.SET(model, nothing)


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="an optional launcher")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, inner = make(), None
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    model, optimizer = accelerator.prepare(model, inner)
    method = sk.RigL(model, optimizer, update_every=3, scoring="screen")
    assert method.optimizer is inner
    moved = []
    for step in range(16):
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(step)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        moved.append(method.step())
    assert method.steps == 8 and sum(moved) == 2 and moved[5] and moved[11]


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning", reason="an optional launcher")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.moved = make(), []

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=0.01)

        def on_fit_start(self):
            self.method = sk.SET(self.net, self.optimizers(), update_every=2)

        def training_step(self, x, index):
            return self.net(x).square().mean()

        def on_train_batch_end(self, *args):
            self.moved.append(self.method.step())

    module = Module()
    trainer = lightning.Trainer(max_epochs=1, default_root_dir=tmp_path, accumulate_grad_batches=2, **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader([batch(step) for step in range(12)], batch_size=None))
    assert module.method.steps == 6 and sum(module.moved) == 3
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = make()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = fabric.setup(model, inner)
    method = sk.SET(model, optimizer, update_every=1)
    fabric.backward(wrapped(batch(0)).square().mean())
    optimizer.step()
    assert method.optimizer is inner and method.step()


# Models that Transformers and Lightning build and fill.

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 8))


@pytest.mark.parametrize("block", [1, 16])
def test_from_pretrained_twenty_times(tmp_path: Path, block: int):
    """Buffers that no file holds are made of memory that was never set."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()

    class Config(transformers.PretrainedConfig):
        model_type = "sparse-classifier"

    class Classifier(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.net = sk.sparsify_(net(), sparsity=0.5, block_size=block)
            self.post_init()

        def forward(self, x):
            return self.net(x)

    model = Classifier(Config())
    assert sk.SET(model, torch.optim.SGD(model.parameters())).update()  # the seed no longer tells the places
    model.save_pretrained(tmp_path)
    expected = model(X)
    for _ in range(20):
        assert torch.equal(Classifier.from_pretrained(tmp_path)(X), expected)
    low = Classifier.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert low.net[0].row.dtype == torch.int32
    assert torch.equal(low(X.bfloat16()), model.to(torch.bfloat16)(X.bfloat16()))


def test_lightning_averages_parameters_and_never_computes_with_averaged_places(tmp_path: Path):
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = sk.sparsify_(net(), sparsity=0.3, block_size=4, seed=0)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, number):
            return self.net(batch[0]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X.repeat(3, 1)), batch_size=4)

    def fit(**options) -> None:
        averaging = EMAWeightAveraging(decay=0.9992, update_every_n_steps=1, **options)
        Trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[averaging], **QUIET).fit(Module(), data, data)

    with pytest.raises(ValueError, match=r"other code overwrote row and col.*average parameters only"):
        fit()
    fit(use_buffers=False)


# PEFT, quantization, and inputs by name.


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


# torch.fx.

PADDED = {"padding": 1, "padding_mode": "circular"}
MODELS = {
    "linear": (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (3, 8)),
    "conv2d": (nn.Sequential(nn.Conv2d(4, 8, 3, **PADDED), nn.ReLU(), nn.Conv2d(8, 4, 1)), (2, 4, 5, 5)),
    "conv1d": (nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)), (2, 4, 9)),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_graph_runs_trains_and_moves(kind):
    model, shape = MODELS[kind]
    model = sk.sparsify_(copy.deepcopy(model), 0.5, 2)
    graph = torch.fx.symbolic_trace(model)
    nodes = [(node.op, node.target) for node in graph.graph.nodes]
    assert nodes[1:-1] == [("call_module", "0"), ("call_module", "1"), ("call_module", "2")]
    x = torch.randn(shape)
    assert torch.equal(graph(x), model(x))
    assert list(sk.sparse_layers(graph)) == ["0", "2"]
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    method = sk.SET(graph, optimizer, update_every=1)
    graph(x).sum().backward()
    optimizer.step()
    assert method.step() and torch.equal(graph(x), model(x))


def test_a_layer_cannot_be_traced_by_itself():
    with pytest.raises(TypeError, match="a sparse layer is a node of torch.fx and cannot be traced by itself"):
        torch.fx.symbolic_trace(sk.SparseLinear(8, 8, block_size=4, sparsity=0.5))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    layer = sk.SparseLinear(8, 4, block_size=2, sparsity=0.5)
    graph = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.randn(3, 8))
    x = torch.randn(5, 8)
    assert torch.equal(graph(x), layer(x))
