import numpy as np
import pytest
import torch
from nets import initializers, mlp, mlp_onnx
from onnx import load, save

from rsi_deploy import export, inspect
from rsi_deploy.core.errors import ModelError, UsageError

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 24, 3, groups=2)
        self.up = nn.ConvTranspose2d(24, 4, 2)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(30, 20)

def make():
    return Net()
"""


@pytest.fixture
def model(tmp_path):
    return mlp_onnx(tmp_path / "m.onnx")


def by_name(result):
    return {site.name: site for site in result.sites}


@pytest.mark.parametrize("rank", ["25%", 4, "100%"])
def test_it_tells_what_export_does(tmp_path, model, rank):
    options = {"rank": rank, "exclude": ["fc2"]}
    shown = [(s.name, s.rank, s.reason) for s in inspect(str(model), **options).sites]
    if rank == "100%":
        assert all(r is None for _, r, _ in shown)
        return
    done = export(str(model), tmp_path / "b", measure=False, **options).sites
    assert shown == [(s.name, s.rank, s.reason) for s in done]


def test_the_spectrum_is_that_of_an_svd(model):
    values = np.linalg.svd(initializers(model)["fc1.weight"].astype(float), compute_uv=False) ** 2
    fc1 = by_name(inspect(str(model)))["fc1"]
    assert fc1.rank_90 == int((np.cumsum(values) < 0.9 * values.sum()).sum()) + 1
    assert fc1.rank_99 == int((np.cumsum(values) < 0.99 * values.sum()).sum()) + 1
    assert fc1.stable_rank == pytest.approx(values.sum() / values[0], rel=1e-6)
    assert fc1.break_even_rank == pytest.approx(12 * 32 / 44)
    assert (fc1.out_features, fc1.in_features, fc1.groups, fc1.params, fc1.rank) == (32, 12, 1, 384, 3)


def test_a_factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inspected_factory.py").write_text(FACTORY)
    result = inspect("inspected_factory:make")
    sites = by_name(result)
    assert list(sites) == ["conv", "up", "attention.in_proj_weight", "attention.out_proj", "head"]
    conv = sites["conv"]
    assert (conv.out_features, conv.in_features, conv.groups, conv.params, conv.rank) == (12, 18, 2, 432, 3)
    assert (sites["up"].rank, sites["up"].reason) == (None, "ConvTranspose is not split")
    assert result.notes == ("no --checkpoint: the weights are those the factory made",)


def test_spectra_are_optional_and_limited(model):
    assert all(s.rank_90 is s.stable_rank is None for s in inspect(str(model), spectra=False).sites)
    result = inspect(str(model), spectrum_limit=10)
    assert [s.rank_90 is None for s in result.sites] == [True, True, False]
    assert result.notes == ("no spectrum of 2 sites with min(out, in) above 10: --spectrum-limit raises it",)


def test_a_weight_that_is_not_finite_has_no_spectrum(tmp_path):
    weight = np.ones((24, 32))
    weight[0, 0] = np.nan
    sites = by_name(inspect(str(mlp_onnx(tmp_path / "m.onnx", fc2=weight))))
    assert (sites["fc2"].rank_90, sites["fc2"].stable_rank) == (None, None)
    assert sites["fc1"].rank_90


def test_a_weight_of_low_rank_shows(tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((24, 2)) @ rng.standard_normal((2, 32))
    site = by_name(inspect(str(mlp_onnx(tmp_path / "m.onnx", fc2=weight))))["fc2"]
    assert site.rank_90 <= site.rank_99 <= 2
    assert 1 <= site.stable_rank <= 2


def test_what_cannot_be_split_is_listed(tmp_path, model):
    proto = load(model)
    proto.graph.input.append(type(proto.graph.input[0])(name="head.weight", type=proto.graph.input[0].type))
    save(proto, model)
    site = by_name(inspect(str(model)))["head"]
    assert site.rank is None
    assert site.reason.startswith("overridable")


def test_requests_that_cannot_be_meant(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="matches none"):
        inspect("m.onnx", include=["nothing"])
    with pytest.raises(UsageError, match="above the full rank"):
        inspect("m.onnx", rank=25)
    torch.export.save(torch.export.export(mlp(), (torch.randn(2, 12),)), tmp_path / "net.pt2")
    with pytest.raises(ModelError, match="has no modules to list"):
        inspect("net.pt2")
