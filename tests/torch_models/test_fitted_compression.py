"""`compress_` with calibration data: better than without at equal size, within the budget, with correct records."""

import copy

import onnx_ir
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graph_passes import find_sites
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.planner import Filters
from rsi_deploy.planning.site_options import PLAIN_FORMS, Calibration
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.fitted_compression import compress_fitted_
from rsi_deploy.torch_models.layers import PivotedConv, PivotedLinear
from rsi_deploy.torch_models.model_source import Source
from rsi_deploy.torch_models.to_onnx import to_onnx
from tests.nets import run_onnx


class Net(nn.Module):
    """Two convolutions with a shortcut, one BatchNorm, one head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(24)
        self.branch = nn.Conv2d(24, 24, 3, padding=1)
        self.head = nn.Linear(24 * 16, 20)

    def forward(self, x):
        """`(N, 3, 4, 4)` to `(N, 20)`."""
        x = F.relu(self.norm(self.stem(x)))
        return self.head((x + self.branch(x)).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for _ in range(20):
            net(data(64, torch.randint(1 << 30, ()).item()))
    return net.eval().requires_grad_(False)


def data(count, seed):
    """Inputs that live near 12 directions of 48."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(12, 48, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, 12, generator=generator) @ basis + 0.05 * torch.randn(count, 48, generator=generator)
    return x.reshape(count, 3, 4, 4)


def error(module, dense, x):
    z, w = dense(x), module(x)
    return float((z - w).square().sum() / (z - z.mean(dim=0)).square().sum())


def test_better_than_the_weights_alone_at_the_same_rank(net):
    plain, fitted = copy.deepcopy(net), copy.deepcopy(net)
    compress_(plain, "25%")
    records = compress_(fitted, calib=[(data(128, seed),) for seed in range(4)], rank="25%")
    test = data(256, 77)
    assert error(fitted, net, test) < 0.5 * error(plain, net, test)
    assert {record.name for record in records if record.decision == "split"} == {"branch", "head", "stem"}
    assert all(record.response_error is not None for record in records if record.rank)


@pytest.mark.parametrize("share", [0.8, 0.6, 0.45])
def test_a_budget_is_kept_and_used(net, share):
    dense = sum(p.numel() for p in net.parameters()) - sum(p.numel() for p in net.norm.parameters())
    records = compress_(net, calib=[(data(256, 1),)], keep_params=share)
    kept = sum(p.numel() for p in net.parameters())
    assert kept <= share * dense
    assert kept > (share - 0.2) * dense
    for record in records:
        if record.rank:
            assert net.get_submodule(record.name).right.shape[0] == record.rank


def mlp():
    torch.manual_seed(0)
    layers = nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 20)
    return nn.Sequential(nn.Flatten(), *layers).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [mlp, "net"])
def test_within_a_budget_the_pivoted_form_loses_less(make, net):
    dense, calib = net if make == "net" else make(), [(data(256, 1),)]
    plain, low = copy.deepcopy(dense), copy.deepcopy(dense)
    records = []
    for module, forms in ((plain, PLAIN_FORMS), (low, (*PLAIN_FORMS, "pivoted"))):
        calibration = Calibration(solver=Solver(), forms=forms)
        records = compress_fitted_(module, calib, Budget.parse(keep_params=0.5), Filters(), calibration, None)
    test = data(256, 77)
    assert 0.0 < error(low, dense, test) < 0.9 * error(plain, dense, test)
    assert any(record.form == "pivoted" for record in records)
    for record in records:
        layer = low.get_submodule(record.name)
        assert sum(p.numel() for name, p in layer.named_parameters() if name != "bias") == record.params_compressed
        if record.form == "pivoted":
            assert isinstance(layer, (PivotedConv, PivotedLinear))
            assert record.break_even_rank == min(record.out_features, record.in_features)


def test_a_rank_keeps_the_usual_form(net):
    records = compress_(net, calib=[(data(128, 1),)], rank=3)
    assert {record.form for record in records if record.rank} == {"channel", "matmul"}


@pytest.mark.filterwarnings("ignore")
def test_pivoted_layers_are_exported_and_not_split_again(net, tmp_path):
    records = compress_(net, calib=[(data(256, 1),)], keep_params=0.5)
    pivoted = {record.name: record for record in records if record.form == "pivoted"}
    exported = to_onnx(Source(name="net", module=net, example_inputs=(data(2, 3),)))
    assert exported.dynamic_batch
    named = {value.name: value for value in exported.model.graph.initializers.values()}
    for name, record in pivoted.items():
        assert (
            sum(named[f"{name}.{factor}"].const_value.size for factor in ("left", "right")) == record.params_compressed
        )
    entries = {entry.weight: entry for entry in find_sites(exported.model)}
    for name in pivoted:
        for factor in ("left", "right"):
            assert "already low-rank" in entries[f"{name}.{factor}"].reason
    onnx_ir.save(exported.model, tmp_path / "net.onnx")
    x = data(5, 4)
    (found,) = run_onnx(tmp_path / "net.onnx", {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(torch.from_numpy(found), net(x.flip(0)), rtol=1e-4, atol=1e-4)


def test_filters_apply_and_give_reasons(net):
    records = {r.name: r for r in compress_(net, calib=[(data(128, 1),)], rank="25%", exclude=["head"])}
    assert records["head"].decision == "dense"
    assert "--exclude head" in records["head"].reason
    assert isinstance(net.head, nn.Linear)
    assert not isinstance(net.branch, nn.Conv2d)


def test_the_result_is_trainable(net):
    compress_(net, calib=[(data(128, 1),)], rank="25%")
    net.requires_grad_(True)
    net(data(8, 3)).square().sum().backward()
    assert all(p.grad is not None for p in net.branch.parameters())


@pytest.mark.parametrize("asked", [{}, {"rank": 3, "keep_macs": 0.5}])
def test_exactly_one_request(net, asked):
    with pytest.raises(UsageError, match="exactly one"):
        compress_(net, calib=[(data(8, 1),)], **asked)


def test_no_data(net):
    with pytest.raises(UsageError, match="no batches"):
        compress_(net, calib=[], rank=3)


def test_a_budget_of_macs_counts_what_the_filters_leave_dense():
    """Of two equal layers one is excluded, so the other one must save the whole difference."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)).eval()
    (record,) = [
        record
        for record in compress_(net, calib=[(torch.randn(256, 32),)], keep_macs=0.75, exclude=["1"])
        if record.rank
    ]
    assert 0.9 * 0.5 <= record.params_compressed / (32 * 32) <= 0.5


def test_a_budget_of_macs_is_refused_where_a_layer_is_not_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head = nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 16)

        def forward(self, x):
            return self.head(self.lstm(x)[0])

    calib = [(torch.randn(64, 5, 16),)]
    with pytest.raises(ModelError, match=r"lstm\.weight_ih_l0 .*keep-params"):
        compress_(Net().eval(), calib=calib, keep_macs=0.5)
    assert compress_(Net().eval(), calib=calib, keep_params=0.95)
