"""Every family of torchvision classifiers, and small transformers: exported by torch, then split at full rank.

    torch --to_onnx--> dense.onnx      the exporter's gate: what fails here is torch's, and is listed by name
    dense.onnx --split--> split.onnx   the surgery's gate: what fails here is ours

Random networks as they are initialized tell no image from another: their outputs would stay equal whatever a first
layer became. So every net is stirred until its outputs depend on its inputs, and each must notice one mirrored factor.
"""

import importlib
import re
import warnings
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest
import torch
import torchvision
from nets import run_onnx
from torch import nn

import graph_passes as gp
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.runtime.parity import EXPORTER_TOLERANCE, SURGERY_TOLERANCE, compare_outputs, rotated_identity
from rsi_deploy.torch_models.model_source import load_source, source_of_module
from rsi_deploy.torch_models.to_onnx import to_onnx

# What torch's exporter cannot do, by its own message. An entry that works is an error too: remove it then.
EXPORTER_FAILURES: dict[str, str] = {}

# Products with a constant that stay whole at full rank, and why; all others must be split.
TIED = "weight is also used by Gather"
WHOLE = {
    "gpt2-sdpa": {TIED: 1},
    "t5-eager": {TIED: 1},
    "t5-sdpa": {TIED: 1},
    "whisper-sdpa": {TIED: 1},
    "swin_v2_t": {"both operands are constant": 12},  # one a block: the table of relative positions, before its MLP
    "swin_v2_s": {"both operands are constant": 24},
    "swin_v2_b": {"both operands are constant": 24},
}


# -- torchvision

FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "efficientnet_b0",
    "mnasnet0_5",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "resnext50_32x4d",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
]
HEAVY = {"densenet", "googlenet", "inception", "maxvit", "swin_transformer", "vgg", "vision_transformer"}
CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)
SIDES = {"inception_v3": 75, "maxvit_t": 224, "vit": 224}  # the smallest that they take; all others 64
TOLD_APART = 0.01  # relative distance of three images' outputs from their mean


def side_of(name):
    return next((side for start, side in SIDES.items() if name.startswith(start)), 64)


def images(count, side, generator):
    """Noise on a smooth picture on a colour: images that differ by more than their pixels' noise."""
    smooth = torch.randn(count, 3, 3, 3, generator=generator)
    return (
        torch.randn(count, 3, 1, 1, generator=generator)
        + nn.functional.interpolate(smooth, size=(side, side), mode="bilinear")
        + torch.randn(count, 3, side, side, generator=generator) / 2
    )


def spread(outputs):
    """How far the outputs of several inputs are from their mean, relative L2."""
    return float(np.linalg.norm(outputs - outputs.mean(0)) / np.linalg.norm(outputs))


@torch.no_grad()
def stir_(module, inputs, generator):
    """Move what starts at zero, and set BatchNorms by `inputs`.

    With statistics 0 and 1 a deep net forgets its input; with those of a batch it multiplies rounding hundredfold.
    Between the two: the variance is the batch's times the largest factor that still tells the inputs apart.
    """
    for name, parameter in module.named_parameters():
        if not parameter.any() or name.endswith("layer_scale"):  # ConvNeXt's 1e-6 would switch its blocks off
            parameter.normal_(0, 0.1, generator=generator)
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in norms:
        layer.reset_running_stats()
        layer.train().momentum = None
        layer.weight.normal_(1, 0.2, generator=generator)
        layer.bias.normal_(0, 0.2, generator=generator)
    if not norms:
        return
    module(inputs)
    variances = [layer.eval().running_var.clone() for layer in norms]
    for factor in (1.35, 1.2, 1.1, 1):
        for layer, variance in zip(norms, variances, strict=True):
            layer.running_var.copy_(factor * variance)
        if spread(module(inputs[:3]).numpy()) > 10 * TOLD_APART:
            return


def classifier(name):
    """The source of a torchvision model, and inputs of another batch size than it is exported with."""
    side = side_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # googlenet and inception announce another initialization
        source = load_source(f"torchvision:{name}", weights="none", input_shape=(1, 3, side, side))
    generator = torch.Generator().manual_seed(0)
    stir_(source.module, images(16, side, generator), generator)
    return source, (images(3, side, generator),)


# -- transformers

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VOCABULARY = 100
PATCHES = {"image_size": 16, "patch_size": 4}
TOKENS, WORDS = 8, 5


class Logits(nn.Module):
    """A transformer as a function of tensors; `forward` names its inputs, for torch.export counts them."""

    def __init__(self, model, output, **example):
        super().__init__()
        self.model, self.output, self.names = model, output, tuple(example)
        self.example_inputs = tuple(example.values())

    def forward(self, first, second=None, third=None):
        given = [value for value in (first, second, third) if value is not None]
        return getattr(self.model(**dict(zip(self.names, given, strict=True))), self.output)


def ids(count, length=TOKENS):
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(length))


def ended(count):
    return torch.cat([ids(count)[:, :-1], torch.full((count, 1), 2)], dim=1)


def mask(count):
    result = torch.ones(count, TOKENS, dtype=torch.long)
    result[1, -2:] = 0
    return result


def noise(count, *shape):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def bert(t, attention, n):
    config = t.BertConfig(**WIDTHS, vocab_size=VOCABULARY, num_labels=5, attn_implementation=attention)
    return Logits(t.BertForSequenceClassification(config), "logits", input_ids=ids(n), attention_mask=mask(n))


def gpt2(t, attention, n):
    config = t.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        use_cache=False,
        attn_implementation=attention,
    )
    return Logits(t.GPT2LMHeadModel(config), "logits", input_ids=ids(n), attention_mask=mask(n))


def t5(t, attention, n):
    config = t.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        attn_implementation=attention,
    )
    model = t.T5ForConditionalGeneration(config)
    return Logits(model, "logits", input_ids=ids(n), attention_mask=mask(n), decoder_input_ids=ids(n, WORDS))


def vit(t, attention, n):
    config = t.ViTConfig(**WIDTHS, **PATCHES, num_labels=5, attn_implementation=attention)
    return Logits(t.ViTForImageClassification(config), "logits", pixel_values=noise(n, 3, 16, 16))


def swin(t, attention, n):
    config = t.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
        attn_implementation=attention,
    )
    return Logits(t.SwinForImageClassification(config), "logits", pixel_values=noise(n, 3, 32, 32))


def clip(t, attention, n):
    text = {**WIDTHS, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 16}
    config = t.CLIPConfig(
        text_config=text, vision_config={**WIDTHS, **PATCHES}, projection_dim=24, attn_implementation=attention
    )
    inputs = {"input_ids": ended(n), "pixel_values": noise(n, 3, 16, 16), "attention_mask": mask(n) | 1}
    return Logits(t.CLIPModel(config), "logits_per_image", **inputs)


def whisper(t, attention, n):
    config = t.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        use_cache=False,
        attn_implementation=attention,
    )
    model = t.WhisperForConditionalGeneration(config)
    return Logits(model, "logits", input_features=noise(n, 8, 32), decoder_input_ids=ids(n, WORDS))


TRANSFORMERS = {f"{make.__name__}-sdpa": make for make in (bert, gpt2, t5, vit, swin, clip, whisper)}
TRANSFORMERS |= {"t5-eager": t5, "swin-eager": swin}


@torch.no_grad()
def transformer(name):
    """The source of a small random transformer, and inputs of another batch size than it is exported with."""
    library = importlib.import_module("transformers")
    attention = name.partition("-")[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = TRANSFORMERS[name](library, attention, 2).eval()
        for parameter in module.parameters():  # its own start is so small that attention is uniform
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            elif not parameter.any():
                parameter.normal_(0, 0.1)
        inputs = TRANSFORMERS[name](library, attention, 3).example_inputs
    return source_of_module(module), inputs


# -- the two gates


def exported(name, source, inputs, path):
    """Write the dense model to `path`; its outputs, and what it was fed. A failure here is the exporter's own."""
    known = EXPORTER_FAILURES.get(name)
    try:
        result = to_onnx(source)
        assert result.dynamic_batch, result.notes
        write_external(result.model, path)
        with torch.inference_mode():
            expected = source.module(*inputs).numpy()
        names = [value.name for value in onnx.load(path, load_external_data=False).graph.input]
        feeds = {given: value.numpy() for given, value in zip(names, inputs, strict=True)}
        dense = run_onnx(path, feeds)
        what = f"{name}: the exporter's own error (torch against dense ONNX)"
        compared = compare_outputs([expected], dense, what=what, tolerance=EXPORTER_TOLERANCE[4])
    except (ModelError, GateError) as error:
        message = f"{error}\n{error.__cause__ or ''}"
        if known and re.search(known, message):
            pytest.xfail(f"the exporter's own failure: {known}")
        raise
    assert known is None, f"torch exports {name} now: remove it from EXPORTER_FAILURES"
    assert compared.informative
    assert spread(expected) > TOLD_APART
    return dense, feeds


def products(path):
    """Names of the nodes that multiply by what follows from constants alone, found without graph_passes."""
    model = onnx.load(path, load_external_data=False)
    assert not model.functions
    constant, found = {tensor.name for tensor in model.graph.initializer}, []
    for node in model.graph.node:
        operands = {"MatMul": (0, 1), "Gemm": (0, 1), "Conv": (1,), "ConvTranspose": (1,)}.get(node.op_type, ())
        if any(node.input[i] in constant for i in operands):
            found.append(node.name)
        if node.op_type == "Constant" or (node.input and all(not used or used in constant for used in node.input)):
            constant.update(node.output)
    assert len(set(found)) == len(found)
    return found


def structure(model):
    """The model without its weights' data, as bytes."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        tensor.ClearField("raw_data")
    return proto.SerializeToString(deterministic=True)


def mirror_one_factor_(model, records):
    """Turn the left factor of the middle site around: every shape stays. Returns the site's weight."""
    splits = [record for record in records if isinstance(record, gp.Split) and record.rank > 2]
    record = splits[len(splits) // 2]
    node = next(node for node in model.graph if node.name == record.second_node)
    value = next(value for value in node.inputs if value is not None and ".left" in value.name)
    turned = np.ascontiguousarray(np.flip(value.const_value.numpy()))
    value.const_value = ir.tensor(turned, name=value.name)
    return record.weight


def check(name, source, inputs, folder, tolerance=SURGERY_TOLERANCE[4]):
    """All that is promised of one net: outputs, nodes, checker, second run, and a wrong model that is rejected."""
    path, small, wrong = (folder / f"{which}.onnx" for which in ("dense", "split", "wrong"))
    dense, feeds = exported(name, source, inputs, path)
    model = ir.load(path)
    records = gp.split(model, rotated_identity)
    write_external(model, small)
    compare_outputs(dense, run_onnx(small, feeds), what=f"{name}: surgery", tolerance=tolerance)  # relative L2
    onnx.checker.check_model(small, full_check=True)

    bearing = [record for record in records if record.op_type != "Gather"]
    assert sorted(record.node for record in bearing) == sorted(products(path))
    whole = Counter(re.split(r" '|:", r.reason)[0] for r in bearing if isinstance(r, gp.Skip))
    assert whole == WHOLE.get(name, {})
    protos = [onnx.load(p, load_external_data=False) for p in (path, small)]
    assert protos[0].graph.input == protos[1].graph.input
    assert protos[0].graph.output == protos[1].graph.output
    assert protos[0].opset_import == protos[1].opset_import

    again = ir.load(small)
    before = structure(again)
    second = gp.split(again, rotated_identity)
    assert not [record for record in second if isinstance(record, gp.Split)]
    assert structure(again) == before

    where = mirror_one_factor_(model, records)
    write_external(model, wrong)
    with pytest.raises(GateError, match="relative error"):
        compare_outputs(dense, run_onnx(wrong, feeds), what=f"control: {where}", tolerance=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_member_of_every_cheap_family(tmp_path, name):
    check(name, *classifier(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLASSIFIERS if name not in FAMILIES])
def test_every_other_classifier(tmp_path, name):
    numbers = torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
    needed, free = 24 * numbers, psutil.virtual_memory().available  # six copies in float32
    if needed > free:
        pytest.skip(f"{name} needs {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
    check(name, *classifier(name), tmp_path)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(tmp_path, name):
    pytest.importorskip("transformers")
    check(name, *transformer(name), tmp_path)


def test_no_family_is_forgotten():
    """torchvision keeps a family in a module: each is in CI, or known to be heavy; every classifier is in one."""

    def families(names):
        return {torchvision.models.get_model_builder(name).__module__.rpartition(".")[2] for name in names}

    assert families(CLASSIFIERS) - families(FAMILIES) == HEAVY
    assert {make.__name__ for make in TRANSFORMERS.values()} == {"bert", "gpt2", "t5", "vit", "swin", "clip", "whisper"}


def test_the_exporters_failures_are_told_apart(tmp_path, monkeypatch):
    """Controls of the first gate: a net that torch cannot capture, and one that it exports wrongly."""
    source, inputs = classifier("squeezenet1_1")
    with monkeypatch.context() as patch:
        patch.setattr(source.module.classifier[1], "forward", lambda x: x if x.sum() > 0 else -x)
        with pytest.raises(ModelError, match="^torch.export cannot capture torchvision:squeezenet1_1"):
            exported("squeezenet1_1", source, inputs, tmp_path / "dense.onnx")
    run = run_onnx

    def doubled(path, feeds):
        return [2 * output for output in run(path, feeds)]

    monkeypatch.setitem(globals(), "run_onnx", doubled)
    with pytest.raises(GateError, match="^squeezenet1_1: the exporter's own error .* relative error 1.00e"):
        exported("squeezenet1_1", source, inputs, tmp_path / "dense.onnx")
