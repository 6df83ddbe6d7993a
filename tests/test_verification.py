import json

import numpy as np
import onnx
import pytest
from nets import labelled, mlp_onnx
from onnx import numpy_helper

from rsi_deploy import export, verify
from rsi_deploy.cli import run
from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.onnx_file import file_hash

CLAIMS = ["files", "graph", "sites", "parameters", "bytes", "ranks", "outputs", "parity", "accuracy", "latency"]


@pytest.fixture
def data(tmp_path):
    return labelled(tmp_path / "data.npz", mlp_onnx(tmp_path / "m.onnx"), count=300)


@pytest.fixture
def bundle(tmp_path, data):
    export(str(tmp_path / "m.onnx"), tmp_path / "b", rank=6, data=data, measure=False, keep_dense=True)
    return tmp_path / "b"


def statuses(bundle, **options):
    return {claim.name: claim.status for claim in verify(bundle, **options).claims}


def broken(bundle, **options):
    return {name for name, status in statuses(bundle, **options).items() if status == "broken"}


def edit_report(bundle, change):
    path = bundle / "report.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_model(bundle, change, *, rehash=True):
    """Change the model itself, and the report's hash of it, so that only what the change means can be noticed."""
    path = bundle / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    if rehash:
        edit_report(bundle, lambda r: r["files"].update({"model.onnx": file_hash(path)}))


def test_a_fresh_bundle_holds(bundle, data):
    result = verify(bundle, data=data)
    assert [c.name for c in result.claims] == CLAIMS
    assert {c.name for c in result.claims if c.status != "holds"} == {"latency"}
    assert result.ok


def test_what_cannot_be_checked_is_said(tmp_path, bundle):
    for name in ("dense.onnx", "dense.onnx.data"):
        (bundle / name).unlink()
    edit_report(bundle, lambda r: [r["files"].pop(n) for n in ("dense.onnx", "dense.onnx.data")])
    result = verify(bundle)
    details = {c.name: c.detail for c in result.claims if c.status == "not checked"}
    assert details.keys() == {"parity", "accuracy", "latency"}
    assert "--keep-dense" in details["parity"]
    assert "--data" in details["accuracy"]
    assert result.ok


def test_other_data_say_nothing_about_the_accuracy(tmp_path, bundle):
    other = labelled(tmp_path / "other.npz", tmp_path / "m.onnx", seed=2)
    (claim,) = (c for c in verify(bundle, data=other).claims if c.name == "accuracy")
    assert (claim.status, claim.detail) == ("not checked", "--data is not the data of the report")


def first(name):
    """The named number of the first split site, one more."""

    def change(report):
        site = next(s for s in report["sites"] if s["decision"] == "split")
        site[name] += 1

    return change


@pytest.mark.parametrize(
    ("change", "claims"),
    [
        (first("rank"), {"ranks"}),
        (lambda r: r["sites"][0].update(rank=r["sites"][0]["in_features"]), {"ranks"}),
        (lambda r: r["sites"][0].update(rank=r["sites"][0]["out_features"]), {"ranks"}),
        (lambda r: r["sites"][0].update(decision="dense", rank=None), {"sites"}),
        (lambda r: r["compressed"].update(params=r["compressed"]["params"] - 1), {"parameters"}),
        (lambda r: r["compressed"].update(bytes=r["compressed"]["bytes"] // 2), {"bytes"}),
        (lambda r: r["probe"][0].update(norm=r["probe"][0]["norm"] * 1.01), {"outputs"}),
        (lambda r: r["probe"][0]["first"].__setitem__(3, -r["probe"][0]["first"][3]), {"outputs"}),
        (lambda r: r["probe"][0].update(shape=[2, 11]), {"outputs"}),
        (lambda r: r["probe"][0].update(name="other"), {"outputs"}),
        (lambda r: r["probe"].clear(), {"outputs"}),
        (lambda r: r["settings"].update(seed=1), {"outputs", "parity"}),
        (lambda r: r["verification"]["approximation"].update(relative_l2=0.01), {"parity"}),
        (lambda r: r["accuracy"]["compressed"].update(top1=99.9), {"accuracy"}),
        (lambda r: r["files"].update({"model.onnx": "0" * 64}), {"files"}),
        (lambda r: r["files"].update({"more.onnx": "0" * 64}), {"files"}),
    ],
    ids=[
        "rank", "rank_like_in", "rank_like_out", "decision", "params", "bytes", "norm", "value", "shape", "name",
        "none", "seed", "parity", "accuracy", "hash", "file",
    ],
)  # fmt: skip
def test_an_edited_report_is_noticed(bundle, data, change, claims, capsys):
    edit_report(bundle, change)
    assert broken(bundle, data=data) == claims
    assert run(["verify", str(bundle), "--data", str(data)]) == 4
    assert all(name in capsys.readouterr().err for name in claims) or len(claims) > 1


def scale(name, factor):
    def change(model):
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))

    return change


def forget_marks(model):
    for node in model.graph.node:
        del node.metadata_props[:]


def wrong_operator(model):
    model.graph.node[0].op_type = "NoSuchOperator"


@pytest.mark.parametrize(
    ("change", "claims"),
    [
        (scale("fc1.left", 1.1), {"outputs", "parity"}),
        (scale("head.bias", np.nan), {"outputs", "parity", "accuracy"}),
        (forget_marks, {"sites"}),
        (wrong_operator, {"graph", "outputs", "parity", "accuracy"}),
    ],
    ids=["scaled", "nan", "marks", "operator"],
)
def test_an_edited_model_is_noticed_even_with_its_hash_edited_too(bundle, data, change, claims):
    edit_model(bundle, change)
    assert broken(bundle, data=data) - {"bytes"} >= claims
    assert "files" not in broken(bundle, data=data)


def test_flipped_bytes_are_noticed(bundle, capsys):
    path = bundle / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)
    assert "files" in broken(bundle)
    assert run(["verify", str(bundle)]) == 4
    out, err = capsys.readouterr()
    assert "changed: model.onnx" in out
    assert err.startswith(f"rsi-deploy: {bundle}: files")


@pytest.mark.parametrize("keep", [0, 10, 1500])
def test_a_cut_file_is_noticed_and_is_no_crash(bundle, keep, capsys):
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    assert run(["verify", str(bundle)]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_is_noticed(bundle):
    (bundle / "model.onnx").unlink()
    result = verify(bundle)
    assert {c.name: c.detail for c in result.claims if c.status == "broken"} == {"files": "missing: model.onnx"}


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(schema_version=2),
        lambda r: r.pop("sites"),
        lambda r: r.update(more=1),
        lambda r: r["compressed"].update(params="many"),
    ],
    ids=["version", "missing", "unknown", "type"],
)
def test_a_report_of_another_schema_is_refused(bundle, change, capsys):
    edit_report(bundle, change)
    with pytest.raises(ModelError, match="is not a report of schema version 1: "):
        verify(bundle)
    assert run(["verify", str(bundle)]) == 3
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_report_that_is_no_report_is_refused(bundle, content):
    (bundle / "report.json").write_bytes(content)
    assert run(["verify", str(bundle)]) == 3


def test_requests_that_cannot_be_meant(tmp_path, bundle):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "m.onnx"):
        with pytest.raises(UsageError, match=r"no bundle: it has no report\.json"):
            verify(folder)
        assert run(["verify", str(folder)]) == 2
    assert run(["verify", str(bundle), "--data", str(tmp_path / "nowhere.npz")]) == 2
    assert run(["verify", str(bundle), "--provider", "nonsense"]) == 2


def test_json(bundle, capsys):
    assert run(["verify", str(bundle), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [c["name"] for c in result["claims"]] == CLAIMS
