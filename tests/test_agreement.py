"""Both ways of a model give the same numbers: `compress_` in PyTorch then export, and export then split in ONNX."""

import copy

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from nets import attention, cnn, mlp, seeded
from torch import nn

from rsi_deploy.core.errors import GateError
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.split import split_model
from rsi_deploy.planning.planner import Planner, RankSpec
from rsi_deploy.runtime.parity import compare_outputs
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.model_source import source_of_module
from rsi_deploy.torch_models.to_onnx import to_onnx
from samples import digits

# Measured: at most 8e-7 (swin_t), 0 for most. The weights of both graphs are the same numbers, but a BatchNorm is
# folded by torch in one and by numpy in the other, and onnxruntime may fuse and thread the two graphs differently.
# Depth multiplies that rounding (6e-8 a step). 1e-5 leaves a decade for other machines; wrong factors are far above.
ROUNDING = 1e-5


def shallow(name):
    """Each kind of block of a large family of nets, once or twice; the whole nets are slow."""
    from torchvision.models.mobilenetv2 import MobileNetV2
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.models.swin_transformer import SwinTransformer

    if name == "shallow_resnet":
        return ResNet(BasicBlock, [1, 1, 1, 1])
    if name == "shallow_mobilenet":
        return MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]])
    return SwinTransformer(patch_size=[4, 4], embed_dim=48, depths=[2, 2], num_heads=[3, 6], window_size=[7, 7])


def torchvision_net(name):
    def make():
        import torchvision

        module = shallow(name) if name in BIG else torchvision.models.get_model(name, weights=None)
        if name.startswith("vit"):
            nn.init.normal_(module.heads.head.weight, std=0.02)  # zero at first: every output would be equal
        return module

    return seeded(make)


NETS = {
    "mlp": (mlp, (2, 12)),
    "cnn": (cnn, (2, 3, 8, 8)),
    "attention": (attention, (2, 6, 16)),
    "samples_cnn": (lambda: seeded(digits.cnn), (2, 1, 8, 8)),
    "samples_vit": (lambda: seeded(digits.vit), (2, 1, 8, 8)),
}
BIG = {"shallow_resnet": 64, "shallow_mobilenet": 64, "shallow_swin": 64}
BIGGEST = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "swin_t": 64,
    "convnext_tiny": 64,
    "vgg11": 64,
    "vit_b_32": 224,
}
CASES = [
    *NETS,
    *BIG,
    *(pytest.param(name, marks=pytest.mark.slow) for name in BIGGEST),
]


def net_of(name):
    if name in NETS:
        make, shape = NETS[name]
        return make(), shape
    side = (BIG | BIGGEST)[name]
    return torchvision_net(name), (2, 3, side, side)


def outputs(model, path, x):
    write_external(model, path)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"input": x})


def ranks(records):
    return {record.name: record.rank for record in records if record.rank}


def through_torch(module, rank, path, x, **settings):
    """`compress_`, then export: outputs, and rank by site."""
    module = copy.deepcopy(module)
    records = compress_(module, rank, **settings)
    return outputs(to_onnx(source_of_module(module, x.shape)).model, path, x), ranks(records)


def dense_file(module, path, x):
    write_external(to_onnx(source_of_module(module, x.shape)).model, path)
    return path


def through_onnx(dense, rank, path, x, **settings):
    """`split_model` of the exported dense model with the same settings: outputs, and rank by site."""
    model = ir.load(dense)
    sites = split_model(model, Planner(spec=RankSpec.parse(rank)), Solver(**settings), joint=False).sites
    return outputs(model, path, x), ranks(sites)


def probe(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("name", CASES)
def test_both_ways_agree(tmp_path, name):
    module, shape = net_of(name)
    x = probe(shape)
    a, torch_ranks = through_torch(module, "25%", tmp_path / "a.onnx", x)
    b, onnx_ranks = through_onnx(dense_file(module, tmp_path / "dense.onnx", x), "25%", tmp_path / "b.onnx", x)
    assert torch_ranks == onnx_ranks
    assert torch_ranks
    compare_outputs(a, b, what="both ways", tolerance=ROUNDING)  # relative L2
    with torch.inference_mode():
        uncompressed = [module(torch.from_numpy(x)).numpy()]
    with pytest.raises(GateError):  # the comparator tells the compressed model from the dense one
        compare_outputs(uncompressed, b, what="control", tolerance=ROUNDING)


def test_both_ways_agree_whatever_the_settings(tmp_path):
    module, shape = net_of("cnn")
    x = probe(shape)
    dense = dense_file(module, tmp_path / "dense.onnx", x)
    for settings in ({"method": "rsvd"}, {"method": "svd"}, {"oversampling": 3, "seed": 7}):
        a, first = through_torch(module, 3, tmp_path / "a.onnx", x, **settings)
        b, second = through_onnx(dense, 3, tmp_path / "b.onnx", x, **settings)
        assert first == second
        compare_outputs(a, b, what=f"both ways, {settings}", tolerance=ROUNDING)


def test_other_factors_are_told_apart(tmp_path):
    """The control: another seed, or a better or worse method, gives outputs that the same comparator rejects."""
    module, shape = net_of("samples_cnn")
    x = probe(shape)
    dense = dense_file(module, tmp_path / "dense.onnx", x)
    a, _ = through_torch(module, "25%", tmp_path / "a.onnx", x)
    for changed in ({"seed": 1}, {"power_iterations": 1}, {"method": "rsvd"}, {"method": "svd"}):
        b, _ = through_onnx(dense, "25%", tmp_path / "b.onnx", x, **changed)
        with pytest.raises(GateError, match="relative error"):
            compare_outputs(a, b, what=f"control, {changed}", tolerance=ROUNDING)
    b, _ = through_onnx(dense, "25%", tmp_path / "b.onnx", x)
    compare_outputs(a, b, what="both ways", tolerance=ROUNDING)
