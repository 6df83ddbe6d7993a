"""Tiny nets and models with seeded weights, which several test files share."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

SIZES = (12, 32, 24, 10)


class ShapedSequential(nn.Sequential):
    """A sequence with the attribute `input_shape`, which a model source reads."""

    def __init__(self, shape, **layers):
        super().__init__()
        self.input_shape = shape
        for name, layer in layers.items():
            self.add_module(name, layer)


class Pick(nn.Module):
    """The mean over the tokens."""

    def forward(self, x):
        return x.mean(dim=1)


class Attend(nn.Module):
    """A pre-norm attention block with a residual."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h, h, h, need_weights=False)[0]


class ResidualMLP(nn.Module):
    """An MLP of 48 hidden units, which may change their order, beside a residual stream, which may not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 12)

    def forward(self, x):
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(x))))


def seeded(make, seed=0):
    """Return `make()` with this seed in evaluation mode, with random BatchNorms and no bias of zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_(0, 0.2)
                layer.running_var.uniform_(0.5, 2)
                layer.weight.data.normal_(1, 0.2)
                layer.bias.data.normal_(0, 0.2)
        for parameter in module.parameters():
            if parameter.ndim == 1 and not parameter.any():  # a bias of zeros would hide that it was lost
                parameter.data.normal_(0, 0.02)
    return module.eval()


def mlp(seed=0):
    a, b, c, d = SIZES
    return seeded(
        lambda: ShapedSequential(
            (1, a), fc1=nn.Linear(a, b), relu1=nn.ReLU(), fc2=nn.Linear(b, c), relu2=nn.ReLU(), head=nn.Linear(c, d)
        ),
        seed,
    )


def cnn(seed=0):
    return seeded(
        lambda: ShapedSequential(
            (1, 3, 8, 8),
            conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(16),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 24, 3, stride=2, padding=1),
            norm2=nn.BatchNorm2d(24),
            relu2=nn.ReLU(),
            grouped=nn.Conv2d(24, 32, 3, padding=1, groups=2),
            flatten=nn.Flatten(),
            head=nn.Linear(512, 10),
        ),
        seed,
    )


def attention(seed=0):
    return seeded(
        lambda: ShapedSequential(
            (1, 6, 16), block=Attend(16, 2), grow=nn.Linear(16, 40), pick=Pick(), head=nn.Linear(40, 10)
        ),
        seed,
    )


def mlp_onnx(path, *, seed=0, sizes=SIZES, softmax=False, batch="batch", **changed):
    """Write the MLP as Gemms without an exporter; `changed` replaces weights by name."""
    rng = np.random.default_rng(seed)
    nodes, weights, value = [], [], "input"
    names = [*(f"fc{i}" for i in range(1, len(sizes) - 1)), "head"]
    for name, into, out in zip(names, sizes[:-1], sizes[1:], strict=True):
        weight = changed[name] if name in changed else rng.standard_normal((out, into)) / np.sqrt(into)
        weights.append(numpy_helper.from_array(weight.astype(np.float32), f"{name}.weight"))
        weights.append(numpy_helper.from_array(0.1 * rng.standard_normal(out).astype(np.float32), f"{name}.bias"))
        nodes.append(helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [f"{name}.y"], name, transB=1))
        value = f"{name}.y"
        if name != "head":
            nodes.append(helper.make_node("Relu", [value], [f"{name}.r"], f"{name}.relu"))
            value = f"{name}.r"
    nodes.append(helper.make_node("Softmax" if softmax else "Identity", [value], ["output"], "end"))
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [batch, size])
        for name, size in (("input", sizes[0]), ("output", sizes[-1]))
    )
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), path)
    return Path(path)


def labelled(path, model, *, count=60, wrong=9, seed=1):
    """Write inputs for `mlp_onnx` labelled with the model's own answers, except for the first `wrong` of them."""
    x = np.random.default_rng(seed).standard_normal((count, SIZES[0])).astype(np.float32)
    labels = run_onnx(model, x)[0].argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % SIZES[-1]
    np.savez(path, x=x, labels=labels)
    return Path(path)


def initializers(path):
    """Return the array of every initializer of a model file, by name."""
    return {t.name: numpy_helper.to_array(t, str(Path(path).parent)) for t in onnx.load(path).graph.initializer}


def session_of(path):
    """Return a session with one thread: several sessions of tests run at a time, and their models are tiny."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnx(path, feeds):
    session = session_of(path)
    if not isinstance(feeds, dict):
        feeds = {session.get_inputs()[0].name: np.asarray(feeds)}
    return session.run(None, feeds)


def random_llama(width: int) -> nn.Module:
    """A Llama of two blocks with random weights and 64 tokens; skips the test without transformers."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
