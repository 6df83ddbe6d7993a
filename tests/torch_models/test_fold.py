import copy
import logging

import numpy as np
import onnx_ir as ir
import pytest
import torch
import torchvision
from torch import nn

from graph_passes import FoldBatchNormPass
from rsi_deploy.torch_models.fold_batch_norm import batch_norms_behind_convs, fold_batch_norm_, fold_batch_norms_


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def random_statistics_(module):
    """BatchNorms with trained statistics; fresh ones are the identity, which would hide mistakes."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 3)
            if norm.affine:
                norm.weight.data.normal_()
                norm.bias.data.normal_()
    return module.eval()


PAIRS = {
    "1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
    "2d": (nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "2d without bias": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)),
    "2d grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=0.1)),
    "2d not affine": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False)),
    "2d circular": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6)),
    "3d": (nn.Conv3d(3, 6, 3), nn.BatchNorm3d(6)),
}


@pytest.mark.parametrize("case", PAIRS)
def test_the_folded_conv_equals_both(case):
    conv, norm = copy.deepcopy(PAIRS[case])
    both = random_statistics_(nn.Sequential(conv, norm).double())
    x = torch.randn(2, conv.in_channels, *([6] * (conv.weight.ndim - 2)), dtype=torch.float64)
    with torch.no_grad():
        unfolded, expected = conv(x), both(x)
        fold_batch_norm_(conv, norm)
        torch.testing.assert_close(conv(x), expected, rtol=1e-12, atol=1e-12)
        with pytest.raises(AssertionError):
            torch.testing.assert_close(unfolded, expected, rtol=1e-3, atol=1e-3)


def test_folding_keeps_dtype_and_whether_it_learns():
    conv, norm = nn.Conv2d(3, 6, 3).bfloat16().requires_grad_(False), nn.BatchNorm2d(6)
    fold_batch_norm_(conv, random_statistics_(norm))
    assert conv.weight.dtype == conv.bias.dtype == torch.bfloat16
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    conv = nn.Conv2d(3, 6, 3, bias=False)
    fold_batch_norm_(conv, norm)
    assert conv.weight.requires_grad
    assert conv.bias.requires_grad


def test_without_running_statistics_it_is_refused():
    with pytest.raises(ValueError, match="without running statistics"):
        fold_batch_norm_(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_every_batch_norm_of_a_torchvision_model_is_found(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    norms = {path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    convs = {path for path, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    pairs = batch_norms_behind_convs(model)
    assert set(pairs.values()) == norms
    assert set(pairs) == convs
    assert len(pairs) == len(norms)
    for conv, norm in pairs.items():
        assert model.get_submodule(conv).out_channels == model.get_submodule(norm).num_features


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.other = nn.BatchNorm2d(3)


class Plain(TwoLayers):
    def forward(self, x):
        return self.other(self.second(torch.relu(self.norm(self.conv(x)))))


class UsedTwice(TwoLayers):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Returned(TwoLayers):
    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y


class SharedNorm(TwoLayers):
    def forward(self, x):
        return self.norm(self.second(self.norm(self.conv(x))))


class SharedConv(TwoLayers):
    def forward(self, x):
        return self.other(self.conv(self.norm(self.conv(x))))


class SomethingBetween(TwoLayers):
    def forward(self, x):
        return self.norm(torch.relu(self.conv(x)))


class NormFirst(TwoLayers):
    def forward(self, x):
        return self.conv(self.norm(x))


class Untraceable(TwoLayers):
    def forward(self, x):
        return self.norm(self.conv(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [UsedTwice, Returned, SharedNorm, SharedConv, SomethingBetween, NormFirst])
def test_batch_norms_that_must_not_be_folded(kind):
    assert batch_norms_behind_convs(kind()) == {}


def test_a_batch_norm_that_must_be_folded():
    assert batch_norms_behind_convs(Plain()) == {"conv": "norm", "second": "other"}


def test_an_untraceable_model_is_not_folded_and_the_log_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert batch_norms_behind_convs(Untraceable()) == {}
    assert "BatchNorms are not folded" in caplog.text


def test_a_model_without_batch_norms_is_not_even_traced(caplog):
    class Raises(nn.Module):
        def forward(self, x):
            raise RuntimeError

    assert batch_norms_behind_convs(nn.Sequential(Raises(), nn.Conv2d(3, 3, 3))) == {}
    assert not caplog.text


def test_both_ways_give_the_same_bytes():
    """With small variances, every bit of eps matters."""
    model = random_statistics_(
        nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.Conv2d(40, 40, 3, bias=False), nn.BatchNorm2d(40))
    )
    for norm in (model[1], model[3]):
        norm.running_var.uniform_(1e-7, 1e-4)
    exported = torch.onnx.export(model, (torch.randn(2, 3, 8, 8),), dynamo=True, optimize=False, verbose=False).model
    assert len(FoldBatchNormPass()(exported).records) == 2
    assert not [node for node in exported.graph if node.op_type == "BatchNormalization"]
    convs = [node for node in exported.graph if node.op_type == "Conv"]
    for node, (conv, norm) in zip(convs, ((model[0], model[1]), (model[2], model[3])), strict=True):
        fold_batch_norm_(conv, norm)
        for value, parameter in zip(node.inputs[1:], (conv.weight, conv.bias), strict=True):
            np.testing.assert_array_equal(ir.convenience.get_const_tensor(value).numpy(), parameter.detach().numpy())


def test_all_foldable_batch_norms_are_folded_at_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.d = nn.Conv2d(4, 4, 3, padding=1)
            self.d.weight = self.c.weight  # tied: folding would change the other
            self.norm_a, self.norm_b, self.norm_c = (nn.BatchNorm2d(4) for _ in range(3))

        def forward(self, x):
            x = torch.relu(self.norm_a(self.a(x)))
            x = torch.relu(self.norm_b(self.b(x))) + x
            return self.d(self.norm_c(self.c(x)))

    net = random_statistics_(Net().double())
    net.norm_b.train()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = copy.deepcopy(net)(x)
    fold_batch_norms_(net)
    assert [type(norm) for norm in (net.norm_a, net.norm_b, net.norm_c)] == [
        nn.Identity,
        nn.BatchNorm2d,
        nn.BatchNorm2d,
    ]
    torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-10)
    net.a.bias.data += 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(net(x), expected, rtol=1e-3, atol=1e-3)
