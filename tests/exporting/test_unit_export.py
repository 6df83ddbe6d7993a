"""Hidden units from a plan or a budget to a verified bundle: fitted, smaller on both sides, in low precision too."""

import json

import numpy as np
import onnx
import pytest
import torch
from calibrated_nets import text_net
from nets import ResidualMLP
from torch import nn

from rsi_deploy import export, verify
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io import onnx_file
from rsi_deploy.runtime.sessions import make_session

QUICK = {"measure": False, "input_shape": (1, 24)}
IMAGES = {"measure": False, "input_shape": (1, 3, 8, 8)}


class Images(nn.Module):
    """Two Convs, flattened for a Linear: 16 inputs for each channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3), nn.Linear(12 * 16, 10)

    def forward(self, x):
        return self.head(torch.flatten(torch.relu(self.two(torch.relu(self.one(x)))), 1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    x = rng.standard_normal((400, 10)) @ rng.standard_normal((10, 24)) + 0.1 * rng.standard_normal((400, 24))
    np.savez(folder / "rows.npz", x=x.astype(np.float32))
    np.savez(folder / "images.npz", x=rng.standard_normal((300, 3, 8, 8)).astype(np.float32))
    return folder


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Return a function that writes a plan for a module, with other entries for some sites."""
    root = tmp_path_factory.mktemp("plans")
    known = {}
    for name, module, options in (("rows", ResidualMLP(), QUICK), ("images", Images(), IMAGES)):
        export(module.eval(), root / name, rank="50%", **options)
        known[name] = json.loads((root / name / "plan.json").read_text())

    def written(name, **sites):
        text = json.loads(json.dumps(known[name]))
        text["sites"] = {site: {"form": "dense"} for site in text["sites"]} | sites
        path = root / f"{len(list(root.iterdir()))}.json"
        path.write_text(json.dumps(text))
        return path

    return written


def test_a_plan_keeps_units_and_the_bundle_verifies(tmp_path, plans, data):
    plan = plans("rows", down={"form": "units", "rank": 20})
    report = export(
        ResidualMLP().eval(), tmp_path / "b", plan=plan, calib=data / "rows.npz", precision="float32", **QUICK
    )
    sites = {site.name: site for site in report.sites}
    assert (sites["down"].form, sites["down"].rank, sites["down"].params_compressed) == ("units", 20, 20 * 24)
    assert sites["down"].macs_compressed == 20 * 24
    assert (sites["up"].rank, sites["up"].params_compressed, sites["up"].macs_compressed) == (None, 20 * 24, 20 * 24)
    assert "down" in sites["up"].reason
    assert report.compressed.params == sum(site.params_compressed for site in sites.values()) + 20 + 24 + 12
    shapes = {tuple(tensor.dims) for tensor in onnx.load(tmp_path / "b" / "model.onnx").graph.initializer}
    assert not any(48 in shape for shape in shapes)
    assert len(onnx.load(tmp_path / "b" / "model.onnx").graph.node) <= 9
    assert verify(tmp_path / "b").ok
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["sites"]["down"]["form"] == "units"


def test_a_false_report_of_units_does_not_verify(tmp_path, plans, data):
    plan = plans("rows", down={"form": "units", "rank": 20})
    export(ResidualMLP().eval(), tmp_path / "b", plan=plan, calib=data / "rows.npz", precision="float32", **QUICK)
    path = tmp_path / "b" / "report.json"
    path.write_text(path.read_text().replace('"rank": 20', '"rank": 21').replace('"rank":20', '"rank":21'))
    result = verify(tmp_path / "b")
    assert any(claim.name == "ranks" and claim.status == "broken" for claim in result.claims)


def test_the_fit_makes_the_kept_units_stand_for_the_others(tmp_path, plans, data):
    """Twenty of 48 units, refitted, answer better than the same number at the rank that a plain split gets for it."""
    errors = {}
    for name, sites in {
        "units": {"down": {"form": "units", "rank": 20}},
        "splits": {"up": {"form": "gemm", "rank": 6}, "down": {"form": "gemm", "rank": 6}},
    }.items():
        report = export(
            ResidualMLP().eval(),
            tmp_path / name,
            plan=plans("rows", **sites),
            calib=data / "rows.npz",
            precision="float32",
            **QUICK,
        )
        errors[name] = report.calibration.quality.output_error
    assert errors["units"] < errors["splits"]
    assert errors["units"] > 0


def test_channels_in_front_of_a_flatten_and_of_a_conv(tmp_path, plans, data):
    plan = plans("images", two={"form": "units", "rank": 10}, head={"form": "dense"})
    more = {"calib": data / "images.npz", "precision": "float32", "allow_broken": False}
    report = export(Images().eval(), tmp_path / "a", plan=plan, **more, **IMAGES)
    assert {site.name: site.params_compressed for site in report.sites}["one"] == 10 * 27
    assert verify(tmp_path / "a").ok
    plan = plans("images", head={"form": "units", "rank": 8 * 16})
    report = export(Images().eval(), tmp_path / "b", plan=plan, **more, **IMAGES)
    assert {site.name: site.params_compressed for site in report.sites}["two"] == 8 * 16 * 9
    assert verify(tmp_path / "b").ok


@pytest.mark.parametrize(
    ("net", "sites", "calib", "words"),
    [
        ("rows", {"down": {"form": "units", "rank": 20}}, None, "--calib"),
        ("rows", {"up": {"form": "units", "rank": 20}}, "rows.npz", "\"up\"|'up'"),
        ("rows", {"down": {"form": "units", "rank": 49}}, "rows.npz", "up to rank 48"),
        ("rows", {"down": {"form": "units", "rank": 48}}, "rows.npz", "keep all"),
        ("rows", {"down": {"form": "units", "rank": 20}, "up": {"form": "gemm", "rank": 5}}, "rows.npz", "'up'"),
        ("images", {"head": {"form": "units", "rank": 100}}, "images.npz", '"rank": 96'),
    ],
)
def test_plans_that_do_not_fit(tmp_path, plans, data, net, sites, calib, words):
    module, options = (ResidualMLP(), QUICK) if net == "rows" else (Images(), IMAGES)
    more = {} if calib is None else {"calib": data / calib}
    with pytest.raises(UsageError, match=words):
        export(module.eval(), tmp_path / "b", plan=plans(net, **sites), precision="float32", **more, **options)
    assert not (tmp_path / "b").exists()


def test_a_budget_takes_units_and_counts_both_sides(tmp_path, data):
    more = {"calib": data / "images.npz", "precision": "float32", "allow_broken": True, "allow_slower": True}
    report = export(Images().eval(), tmp_path / "b", keep_macs=0.3, **more, **IMAGES)
    assert report.compressed.macs <= 0.3 * report.dense.macs
    assert report.compressed.macs == sum(site.macs_compressed for site in report.sites)
    assert verify(tmp_path / "b").ok


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_units_in_few_bits(tmp_path, plans, data, precision):
    plan = plans("rows", down={"form": "units", "rank": 32})
    report = export(
        ResidualMLP().eval(), tmp_path / "b", plan=plan, calib=data / "rows.npz", precision=precision, **QUICK
    )
    assert report.precision is not None
    assert verify(tmp_path / "b").ok
    assert {site.form for site in report.split_sites} == {"units"}
    assert report.calibration.quality.output_error < 0.5


def test_the_plan_of_a_bundle_makes_it_again_where_other_weights_stand_beside_the_sites(tmp_path):
    """The embedding table of the net is in the plan, and is no site."""
    path = str(text_net(tmp_path / "net.onnx"))
    export(path, tmp_path / "a", rank="25%", measure=False)
    sites = json.loads((tmp_path / "a" / "plan.json").read_text())["sites"]
    assert {site["form"] for site in sites.values()} >= {"dense", "matmul"}
    export(path, tmp_path / "b", plan=tmp_path / "a" / "plan.json", measure=False)
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["sites"].keys() == sites.keys()
    again = json.loads((tmp_path / "a" / "plan.json").read_text())
    again["sites"]["no such weight"] = {"form": "dense"}
    (tmp_path / "plan.json").write_text(json.dumps(again))
    with pytest.raises(UsageError, match="'no such weight' is not in the model"):
        export(path, tmp_path / "c", plan=tmp_path / "plan.json", measure=False)


def test_a_large_model_keeps_its_weights_in_a_file(tmp_path, plans, data, monkeypatch):
    plan = plans("rows", down={"form": "units", "rank": 20})
    more = {"plan": plan, "calib": data / "rows.npz", "precision": "float32"}
    small = export(ResidualMLP().eval(), tmp_path / "a", **more, **QUICK)
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1)
    large = export(ResidualMLP().eval(), tmp_path / "b", **more, **QUICK)
    assert verify(tmp_path / "b").ok
    assert large.compressed.params == small.compressed.params
    x = {"input": np.random.default_rng(3).standard_normal((2, 24)).astype(np.float32)}
    first, second = (make_session(tmp_path / name / "model.onnx").run(None, x)[0] for name in "ab")
    assert np.abs(first - second).max() < 1e-5
    assert large.compressed.bytes < large.dense.bytes + 20_000  # nothing of the dense weights is left in the file


def test_a_site_that_makes_fewer_units_is_neither_split_nor_dense(tmp_path, plans, data):
    plan = plans("rows", down={"form": "units", "rank": 20})
    more = {"calib": data / "rows.npz", "precision": "float32"}
    report = export(ResidualMLP().eval(), tmp_path / "a", plan=plan, **more, **QUICK)
    assert {site.name: site.outcome for site in report.sites} == {"up": "smaller", "down": "split", "head": "dense"}
    text = json.loads((tmp_path / "a" / "plan.json").read_text())
    text["sites"]["down"] = {"form": "gemm", "rank": 6}  # the reader alone is edited
    (tmp_path / "plan.json").write_text(json.dumps(text))
    again = export(ResidualMLP().eval(), tmp_path / "b", plan=tmp_path / "plan.json", **more, **QUICK)
    (up,) = [site for site in again.sites if site.name == "up"]
    assert (up.outcome, up.params_compressed) == ("dense", up.params_dense)
    assert "units" not in up.reason
