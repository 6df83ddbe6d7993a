"""Values of attention heads from a plan or a budget to a verified bundle: fitted, smaller on both sides."""

import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rsi_deploy import export, verify
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io import onnx_file
from rsi_deploy.runtime.sessions import make_session

QUICK = {"measure": False, "input_shape": (1, 6, 48), "precision": "float32"}
HEADS, SIZE = 3, 16


class Block(nn.Module):
    """Attention with three heads of 16 values beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.query, self.key, self.value, self.out = (nn.Linear(48, 48) for _ in range(4))
        self.head = nn.Linear(48, 12)

    def forward(self, x):
        q, k, v = (make(x).reshape(-1, 6, HEADS, SIZE).transpose(1, 2) for make in (self.query, self.key, self.value))
        p = torch.softmax(4 * q @ k.transpose(2, 3), -1)
        return self.head(x + self.out((p @ v).transpose(1, 2).reshape(-1, 6, HEADS * SIZE))).mean(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "x.npz"
    x = rng.standard_normal((300, 6, 8)) @ rng.standard_normal((8, 48)) + 0.2 * rng.standard_normal((300, 6, 48))
    np.savez(path, x=x.astype(np.float32))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a function that writes a plan with some sites split and the others dense."""
    root = tmp_path_factory.mktemp("plans")
    export(Block().eval(), root / "first", rank="50%", **QUICK)
    known = json.loads((root / "first" / "plan.json").read_text())

    def write(**sites):
        entries = {site: {"form": "dense"} for site in known["sites"]} | sites
        path = root / f"{len(list(root.iterdir()))}.json"
        path.write_text(json.dumps(known | {"sites": entries}))
        return path

    return write


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, written, data):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    export(Block().eval(), folder, plan=written(out={"form": "heads", "rank": 24}), calib=data, **QUICK)
    return folder


def test_a_plan_makes_both_projections_smaller_and_the_bundle_verifies(bundle):
    report = json.loads((bundle / "report.json").read_text())
    sites = {site["name"]: site for site in report["sites"]}
    assert (sites["out"]["form"], sites["out"]["rank"], sites["out"]["params_compressed"]) == ("heads", 24, 24 * 48)
    assert (sites["value"]["rank"], sites["value"]["params_compressed"]) == (None, 24 * 48)
    assert sites["value"]["macs_compressed"] * 2 == sites["value"]["macs_dense"]
    assert "out" in sites["value"]["reason"]
    mixture = 6 * 6 * HEADS * SIZE
    saved = report["dense"]["macs"] - report["compressed"]["macs"]
    assert saved == 6 * 48 * 48 + mixture // 2  # half of both projections, and of the product with the probabilities
    graph = onnx.load(bundle / "model.onnx").graph
    assert sorted(node.op_type for node in graph.node).count("MatMul") <= 7
    assert (48, 24) in {tuple(tensor.dims) for tensor in graph.initializer}
    assert verify(bundle).ok


def test_a_false_report_does_not_verify(bundle, tmp_path, data, written):
    export(Block().eval(), tmp_path / "b", plan=written(out={"form": "heads", "rank": 24}), calib=data, **QUICK)
    path = tmp_path / "b" / "report.json"
    path.write_text(path.read_text().replace('"rank": 24', '"rank": 27').replace('"rank":24', '"rank":27'))
    assert any(claim.name == "ranks" and claim.status == "broken" for claim in verify(tmp_path / "b").claims)


def test_a_plan_goes_round(bundle, tmp_path, data):
    export(Block().eval(), tmp_path / "again", plan=bundle / "plan.json", calib=data, **QUICK)
    assert json.loads((bundle / "plan.json").read_text())["sites"]["out"]["form"] == "heads"
    graphs = [onnx.load(folder / "model.onnx").graph for folder in (bundle, tmp_path / "again")]
    assert graphs[0].initializer == graphs[1].initializer
    assert graphs[0].node == graphs[1].node


def test_the_fit_answers_better_than_splits_of_both_with_as_many_numbers(bundle, tmp_path, data, written):
    splits = written(out={"form": "matmul", "rank": 12}, value={"form": "matmul", "rank": 12})
    report = export(Block().eval(), tmp_path / "splits", plan=splits, calib=data, **QUICK)
    again = export(Block().eval(), tmp_path / "again", plan=bundle / "plan.json", calib=data, **QUICK)
    assert 0 < again.calibration.quality.output_error < report.calibration.quality.output_error


@pytest.mark.parametrize(
    ("sites", "with_data", "words"),
    [
        ({"out": {"form": "heads", "rank": 24}}, False, "--calib"),
        ({"value": {"form": "heads", "rank": 24}}, True, "'value'|\"value\""),
        ({"out": {"form": "heads", "rank": 51}}, True, "up to rank 48"),
        ({"out": {"form": "heads", "rank": 25}}, True, '"rank": 24'),
        ({"out": {"form": "heads", "rank": 24}, "value": {"form": "pivoted", "rank": 5}}, True, "'value'"),
    ],
)
def test_plans_that_do_not_fit(tmp_path, written, data, sites, with_data, words):
    more = {"calib": data} if with_data else {}
    with pytest.raises(UsageError, match=words):
        export(Block().eval(), tmp_path / "b", plan=written(**sites), **more, **QUICK)
    assert not (tmp_path / "b").exists()


def test_a_budget_takes_heads_where_both_projections_count(tmp_path, data):
    more = {"calib": data, "allow_broken": True, "allow_slower": True}
    report = export(Block().eval(), tmp_path / "b", keep_params=0.45, **more, **QUICK)
    assert report.compressed.params <= 0.45 * report.dense.params
    assert "heads" in {site.form for site in report.split_sites}
    assert verify(tmp_path / "b").ok


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_heads_in_few_bits(tmp_path, written, data, precision):
    plan = written(out={"form": "heads", "rank": 36})
    report = export(Block().eval(), tmp_path / "b", plan=plan, calib=data, **QUICK | {"precision": precision})
    assert report.precision is not None
    assert verify(tmp_path / "b").ok
    assert {site.form for site in report.split_sites} == {"heads"}
    assert report.calibration.quality.output_error < 0.5


def test_a_large_model_keeps_its_weights_in_a_file(bundle, tmp_path, data, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1)
    large = export(Block().eval(), tmp_path / "b", plan=bundle / "plan.json", calib=data, **QUICK)
    assert verify(tmp_path / "b").ok
    x = {"x": np.random.default_rng(3).standard_normal((2, 6, 48)).astype(np.float32)}
    sessions = [make_session(folder / "model.onnx") for folder in (bundle, tmp_path / "b")]
    first, second = (session.run(None, {session.get_inputs()[0].name: x["x"]})[0] for session in sessions)
    assert np.abs(first - second).max() < 1e-5
    assert large.compressed.params == sum(array.size for array in stored(bundle / "model.onnx"))
    assert large.compressed.bytes < large.dense.bytes + 20_000  # nothing of the dense weights is left in the file


def stored(path):
    """Return the floating-point arrays of a model."""
    arrays = map(onnx.numpy_helper.to_array, onnx.load(path).graph.initializer)
    return [array for array in arrays if array.dtype.kind == "f"]
