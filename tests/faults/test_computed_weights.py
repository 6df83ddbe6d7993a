"""Layers whose weight is computed at every call (weight_norm, spectral_norm, pruning and others) are split, too."""

import copy
import warnings

import onnx
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import rsi_deploy
from rsi_deploy import compress_
from rsi_deploy.torch_models.computed_weights import computed_tensors, fold_computed_, folded


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def halved(layer):
    return parametrize.register_parametrization(layer, "weight", Halved())


WAYS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "pruned": pruned,
    "own": halved,
    "two": lambda layer: halved(parametrizations.weight_norm(layer)),
}


@pytest.fixture(params=WAYS)
def way(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield WAYS[request.param]


def trained(net, x):
    """Call a net in training mode, as spectral norms need, and return it in evaluation mode."""
    for _ in range(3):
        net(x)
    return net.eval()


def linear(way):
    torch.manual_seed(0)
    return trained(nn.Sequential(way(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 8)), torch.randn(4, 32))


def conv(way):
    torch.manual_seed(0)
    net = nn.Sequential(way(nn.Conv1d(16, 16, 5, bias=False)), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 4, 1))
    return trained(net, torch.randn(4, 16, 20))


def test_compress_records_and_splits_a_computed_weight(way):
    net = linear(way)
    x = torch.randn(5, 32)
    expected = net(x)
    records = {record.name: record for record in compress_(net, "100%", always_split=True)}
    assert records["0"].decision == "split"
    assert not computed_tensors(net[0])
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in net.parameters())


def test_the_computed_value_is_factorized():
    net = linear(halved)
    value = net[0].weight.detach()
    compress_(net, 8)
    best = torch.linalg.svdvals(value)[8]
    error = torch.linalg.matrix_norm(value - net[0].left @ net[0].right, 2)
    assert best * 0.99 <= error <= 1.2 * best
    assert not torch.allclose(2 * value, net[0].left @ net[0].right, rtol=0.5)  # not the tensor behind it


def test_a_dense_layer_stays_computed(way):
    net = linear(way)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items() if name.startswith("0.")}
    records = {record.name: record for record in compress_(net, 4, exclude=["0"])}
    assert records["0"].decision == "dense"
    assert records["0"].reason
    after = net.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_batch_norm_is_folded_into_the_value(way):
    if way is WAYS["orthogonal"]:
        pytest.skip("of a square matrix")
    net = conv(way)
    x = torch.randn(3, 16, 20)
    expected = net(x)
    assert [record.decision for record in compress_(net, "100%", always_split=True)] == ["split", "split"]
    assert isinstance(net[1], nn.Identity)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_fitted_compression_splits_a_computed_weight(way):
    net = linear(way)
    records = compress_(net, 4, calib=[(torch.randn(256, 32),)])
    assert [(record.name, record.decision) for record in records] == [("0", "split"), ("2", "split")]


def test_export_splits_a_computed_weight_and_keeps_the_module(way, tmp_path):
    net = linear(way)
    before, x = copy.deepcopy(net.state_dict()), torch.randn(5, 32)
    expected = net(x)
    report = rsi_deploy.export(net, tmp_path / "b", rank=4, input_shape="1x32", measure=False)
    assert {site.name: site.rank for site in report.sites} == {"0": 4, "2": 4}
    names = {tensor.name for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    assert not [name for name in names if "original" in name or name.endswith(("_g", "_v", "_orig", "_mask", "_u"))]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "orthogonal"])  # its exponential has no ONNX
def test_a_program_with_computed_weights_is_split(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        net = nn.Sequential(WAYS[name](nn.Linear(128, 128)), nn.ReLU()).eval()
    torch.export.save(torch.export.export(net, (torch.randn(2, 128),)), tmp_path / "net.pt2")
    report = rsi_deploy.export(str(tmp_path / "net.pt2"), tmp_path / "b", rank=8, measure=False)
    assert [(site.name, site.rank) for site in report.sites] == [("0", 8)]


def test_two_layers_of_one_tensor_stay_dense():
    """Each layer would get its own factors, but they share their numbers."""
    net = nn.Sequential(halved(nn.Linear(32, 32)), halved(nn.Linear(32, 32))).eval()
    net[1].parametrizations.weight.original = net[0].parametrizations.weight.original
    records = compress_(net, 4)
    assert [record.decision for record in records] == ["dense", "dense"]
    assert all("grow the file" in record.reason for record in records)


def test_a_layer_in_two_places_is_split_once():
    layer = weight_norm(nn.Linear(32, 32))
    net = nn.Sequential(layer, nn.ReLU(), layer).eval()
    (record,) = compress_(net, 4)
    assert (record.name, record.decision) == ("0", "split")
    assert net[0] is net[2]


def test_copies_of_a_module_do_not_lose_their_parametrization():
    """Copies share a class, which torch edits when it removes a parametrization."""
    net = linear(parametrizations.weight_norm)
    other, x = copy.deepcopy(net), torch.randn(5, 32)
    expected = other(x)
    fold_computed_(net[0])
    assert torch.equal(other(x), expected)
    assert computed_tensors(other[0])


def test_folding_copies_only_computed_weights():
    net = linear(parametrizations.weight_norm)
    new = folded(net)
    assert new is not net
    assert new[2].weight is net[2].weight
    assert isinstance(new[0].weight, nn.Parameter)
    plain = nn.Sequential(nn.Linear(4, 4))
    assert folded(plain) is plain


@pytest.mark.parametrize("way", [parametrizations.weight_norm, weight_norm])
def test_recurrent_layers_are_recorded(way):
    net = nn.ModuleDict({"rnn": way(nn.LSTM(8, 8), "weight_hh_l0"), "fc": nn.Linear(8, 8)}).eval()
    records = {record.name: record for record in compress_(net, 2)}
    assert records["rnn.weight_hh_l0"].decision == "dense"
    assert records["fc"].decision == "split"
