"""The pivoted form from a plan to a verified bundle, in low precision and float16 too."""

import json

import numpy as np
import onnx
import pytest
from nets import ResidualMLP

from rsi_deploy import export, read_report, verify
from rsi_deploy.core.errors import UsageError

SHAPE = (1, 24)
QUICK = {"measure": False, "input_shape": SHAPE}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Inputs near a subspace, so that ranks pay."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "calib.npz"
    x = rng.standard_normal((400, 10)) @ rng.standard_normal((10, 24)) + 0.1 * rng.standard_normal((400, 24))
    np.savez(path, x=x.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan with the pivoted form at two sites, made from that of an export."""
    root = tmp_path_factory.mktemp("plan")
    export(ResidualMLP().eval(), root / "first", rank="50%", **QUICK)
    text = json.loads((root / "first" / "plan.json").read_text())
    text["sites"]["up"] = {"form": "pivoted", "rank": 20}
    text["sites"]["down"] = {"form": "pivoted", "rank": 16}
    text["sites"]["head"] = {"form": "dense"}
    (root / "plan.json").write_text(json.dumps(text))
    return root / "plan.json"


@pytest.mark.parametrize("calib", [False, True])
def test_a_plan_with_pivots_makes_a_bundle_that_verifies(tmp_path, plan, data, calib):
    more = {"calib": data, "precision": "float32"} if calib else {}
    report = export(ResidualMLP().eval(), tmp_path / "b", plan=plan, **more, **QUICK)
    sites = {site.name: site for site in report.sites}
    assert {name: (site.form, site.rank) for name, site in sites.items()} == {
        "up": ("pivoted", 20),
        "down": ("pivoted", 16),
        "head": (None, None),
    }
    for name, (rows, columns) in {"up": (48, 24), "down": (24, 48)}.items():
        rank = sites[name].rank
        assert sites[name].params_compressed == rank * (rows + columns - rank)
        assert sites[name].break_even_rank == min(rows, columns)
    numbers = sum(site.params_compressed for site in sites.values())
    biases = 48 + 24 + 12
    assert report.compressed.params == numbers + biases
    assert verify(tmp_path / "b").ok
    again = json.loads((tmp_path / "b" / "plan.json").read_text())["sites"]
    assert again["up"]["form"] == "pivoted"


def test_the_hidden_units_need_no_gather(tmp_path, plan):
    export(ResidualMLP().eval(), tmp_path / "b", plan=plan, precision="float32", **QUICK)
    model = onnx.load(tmp_path / "b" / "model.onnx")
    orders = [node.name for node in model.graph.node if node.op_type == "Gather"]
    assert all("up" not in name for name in orders)
    assert sum(node.op_type == "Concat" for node in model.graph.node) == 2


def test_a_budget_takes_it(tmp_path, data):
    """Where the hidden units of the block are left out: they would save more."""
    more = {"keep_params": 0.6, "precision": "float32", "allow_broken": True, "exclude": ["down"]}
    found = export(ResidualMLP().eval(), tmp_path / "b", calib=data, **more, **QUICK)
    assert any(site.form == "pivoted" for site in found.split_sites)
    assert found.compressed.params <= 0.6 * found.dense.params
    assert verify(tmp_path / "b").ok


def test_a_plan_for_a_site_that_cannot_take_it(tmp_path, plan):
    text = json.loads(plan.read_text())
    text["sites"]["up"] = {"form": "pivoted", "rank": 25}
    (tmp_path / "plan.json").write_text(json.dumps(text))
    with pytest.raises(UsageError, match='"pivoted" up to rank 24'):
        export(ResidualMLP().eval(), tmp_path / "b", plan=tmp_path / "plan.json", **QUICK)
    assert not (tmp_path / "b").exists()


def test_low_precision_beside_it(tmp_path, data):
    report = export(
        ResidualMLP().eval(), tmp_path / "b", calib=data, keep_params=0.5, precision="int8", allow_broken=True, **QUICK
    )
    assert verify(tmp_path / "b").ok
    assert read_report(tmp_path / "b").precision is not None
    assert report.compressed.bytes < report.dense.bytes
