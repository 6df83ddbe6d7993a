"""Nets of every family that is served are proved: as exporters write them, split, optimized, quantized."""

import numpy as np
import onnxruntime
import pytest
import torch
import torchvision
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_dynamic, quantize_static
from torch import nn

from graph_passes.axis_rules.values import BatchPlace
from graph_passes.batch_axis import prove
from rsi_deploy import export
from rsi_deploy.io.onnx_reader import read_graph
from samples.digits import cnn, vit

pytestmark = pytest.mark.filterwarnings("ignore")
OLD_EXPORTER = torch.__version__.startswith("2.9.")  # its sequences and open shapes are not proved, and not batched
OLD_RUNTIME = onnxruntime.__version__.startswith("1.23.")


class Tagger(nn.Module):
    """LSTMs over `(N, T, 16)` in both directions, and the last step."""

    example_inputs = (torch.zeros(2, 7, 16),)

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(16, 24, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(48, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        y, _ = self.gru(self.lstm(x)[0])
        return self.head(y[:, -1])


class TimeFirst(nn.Module):
    """A transformer that swaps batch and time inside, as those of torch do by default."""

    example_inputs = (torch.zeros(2, 7, 32),)

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(32, 48)

    def forward(self, x):
        return self.head(self.encoder(x.transpose(0, 1)).mean(0))


class Rows(nn.Module):
    """Tokens as rows of one matrix, with a BatchNorm over them, and back."""

    example_inputs = (torch.zeros(2, 7, 24),)

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(24, 40), nn.BatchNorm1d(40)

    def forward(self, x):
        n, t, c = x.shape
        return self.norm(self.linear(x.reshape(-1, c))).view(n, t, 40).softmax(-1).mean(1)


class Sentences(nn.Module):
    """A BERT with a padding mask and mean pooling, as sentence encoders are."""

    example_inputs = (torch.ones(2, 9, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64))

    def __init__(self):
        super().__init__()
        transformers = pytest.importorskip("transformers", reason="no transformers here")
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99
        )
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1).clamp_min(1), dim=-1)


def convnext():
    blocks = torchvision.models.convnext.CNBlockConfig
    return torchvision.models.ConvNeXt([blocks(32, 64, 1), blocks(64, None, 1)], num_classes=10)


def small_vit():
    return torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10)


PICTURE = (1, 3, 32, 32)
NETS = {
    "cnn": (cnn, (1, 1, 8, 8)),
    "digits vit": (vit, (1, 1, 8, 8)),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), PICTURE),
    "mobilenet": (lambda: torchvision.models.mobilenet_v3_small(weights=None), PICTURE),
    "convnext": (convnext, PICTURE),
    "vit": (small_vit, PICTURE),
    "tagger": (Tagger, None),
    "time first": (TimeFirst, None),
    "rows": (Rows, None),
    "sentences": (Sentences, None),
}


def proved(path):
    """Why the first axis of every input and output is not a batch of independent samples."""
    model = read_graph(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    proof = prove(model, {value.name: 0 for value in model.graph.input if value.name not in stored})
    return proof.reason or (
        "" if all(place == BatchPlace(0) for place in proof.outputs.values()) else str(proof.outputs)
    )


def optimized(path, level):
    """What onnxruntime makes of a model offline."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath, options.log_severity_level = str(path.with_suffix(f".{level}.onnx")), 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return options.optimized_model_filepath


SLOW = ("resnet18", "mobilenet", "vit", "time first")


@pytest.fixture(scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in NETS])
def bundle(request, tmp_path_factory):
    if OLD_EXPORTER and request.param in ("convnext", "tagger"):
        pytest.skip("torch 2.9 exports it with sequences or shapes that are known only when it runs")
    make, shape = NETS[request.param]
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("net") / "b"
    export(make().eval(), folder, rank="30%", measure=False, keep_dense=True, input_shape=shape, always_split=True)
    return folder


@pytest.mark.parametrize("name", ["dense", "model"])
@pytest.mark.parametrize("level", ["", "BASIC", "EXTENDED", "ALL"])
def test_exports_are_proved(bundle, name, level):
    path = bundle / f"{name}.onnx"
    assert proved(optimized(path, level) if level else path) == ""


class Reader(CalibrationDataReader):
    """Two random samples."""

    def __init__(self, path):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        rng = np.random.default_rng(0)
        self.left = [
            {
                value.name: rng.integers(0, 2, [2, *value.shape[1:]]).astype(np.int64)
                if "int64" in value.type
                else rng.standard_normal([2, *value.shape[1:]]).astype(np.float32)
                for value in session.get_inputs()
            }
        ]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.mark.skipif(OLD_RUNTIME, reason="onnxruntime 1.23 runs no QuantizeLinear of opset 23")
def test_static_quantization_keeps_samples_apart_and_dynamic_does_not(bundle, tmp_path):
    path = str(bundle / "model.onnx")
    for form in (QuantFormat.QDQ, QuantFormat.QOperator):
        quantize_static(path, tmp_path / "s.onnx", Reader(path), quant_format=form)
        assert proved(tmp_path / "s.onnx") == ""
        assert proved(optimized(tmp_path / "s.onnx", "EXTENDED")) == ""
    quantize_dynamic(path, tmp_path / "d.onnx")
    assert "Dynamic" in proved(tmp_path / "d.onnx")


@pytest.mark.parametrize("name", ["vit", "convnext", "tagger", "time first", "rows"])
def test_exports_by_tracing_are_proved(tmp_path, name):
    make, shape = NETS[name]
    net = make().eval()
    example = (torch.zeros(shape).repeat(2, 1, 1, 1),) if shape else net.example_inputs
    path = tmp_path / "t.onnx"
    torch.onnx.export(net, example, path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    for level in ("", "EXTENDED"):
        assert proved(optimized(path, level) if level else path) == ""
