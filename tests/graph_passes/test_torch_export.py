"""Graphs as the torch exporter makes them, unoptimized, so that the names of the weights are still there."""

import numpy as np
import onnx_ir as ir
import pytest
from split_checks import assert_sound, error, full_rank, numbers, run, splits

from graph_passes import FoldBatchNormPass, split

torch = pytest.importorskip("torch")


def exported(module, *inputs) -> ir.Model:
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, optimize=False, verbose=False)
    return program.model


def test_conv_bn_relu_linear():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(32, 5),
    )
    module[1].running_mean.uniform_(-1, 1)
    module[1].running_var.uniform_(0.5, 2)
    x = numbers(2, 3, 8, 8)
    expected = module.eval()(torch.from_numpy(x)).detach().numpy()
    model = exported(module, torch.from_numpy(x))
    folds = FoldBatchNormPass()(model).records
    assert [(fold.weight, fold.bias) for fold in folds] == [("0.weight", "1.bias")]
    records = split(model, full_rank)
    assert [(r.weight, r.groups) for r in splits(records)] == [("0.weight", 1), ("3.weight", 2), ("5.weight", 1)]
    assert {"0.right", "0.left", "3.right", "3.left", "5.right", "5.left"} <= set(model.graph.initializers)
    assert not {"0.weight", "3.weight", "5.weight"} & set(model.graph.initializers)
    name = model.graph.inputs[0].name
    assert error(run(model, **{name: x}), expected) <= 1e-5
    assert error(2 * run(model, **{name: x}), expected) > 0.9
    assert_sound(model)


def test_multihead_attention():
    torch.manual_seed(0)

    class SelfAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = torch.nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    module = SelfAttention()
    x = numbers(2, 5, 16)
    expected = module.eval()(torch.from_numpy(x)).detach().numpy()
    model = exported(module, torch.from_numpy(x))
    records = split(model, full_rank)
    weights = {record.weight for record in splits(records)}
    assert weights == {"attention.in_proj_weight", "attention.out_proj.weight"}
    name = model.graph.inputs[0].name
    assert error(run(model, **{name: x}), expected) <= 1e-5
    assert np.isfinite(expected).all()
    assert_sound(model)
