import json
import shutil

import numpy as np
import onnx
import pytest
from calibrated_nets import IMAGE, conv_net, inputs
from nets import labelled, mlp_onnx
from onnx import numpy_helper

from rsi_deploy import export, verify
from rsi_deploy.cli import run
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_file import file_hash

CLAIMS = [
    "manifest",
    "files",
    "graph",
    "sites",
    "parameters",
    "bytes",
    "ranks",
    "MACs",
    "outputs",
    "parity",
    "accuracy",
    "page",
    "latency",
]


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
    """But for what notices every edit: the manifest (see test_manifest), and the page (see test_html)."""
    return {name for name, status in statuses(bundle, **options).items() if status == "broken"} - {"page", "manifest"}


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
    assert broken(bundle) == set()


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
        (lambda r: r["compressed"].update(macs=r["compressed"]["macs"] - 1), {"MACs"}),
        (lambda r: r["sites"][0].update(form="matmul"), {"ranks"}),
        (lambda r: r["sites"][0].update(form=None), {"ranks"}),
        (lambda r: r["sites"][0].update(groups=2), {"ranks"}),
        (lambda r: r["files"].update({"model.onnx": "0" * 64}), {"files"}),
        (lambda r: r["files"].update({"more.onnx": "0" * 64}), {"files"}),
    ],
    ids=[
        "rank", "rank_like_in", "rank_like_out", "decision", "params", "bytes", "norm", "value", "shape", "name",
        "none", "seed", "parity", "accuracy", "macs", "form", "no_form", "groups", "hash", "file",
    ],
)  # fmt: skip
def test_an_edited_report_is_noticed(bundle, data, change, claims, capsys):
    edit_report(bundle, change)
    assert broken(bundle, data=data) == claims
    assert run(["verify", str(bundle), "--data", str(data)]) == 4
    assert all(name in capsys.readouterr().err for name in claims) or len(claims) > 1


# -- forms, budgets and calibration


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A model with one split in each form of a Conv, fitted to `c.npz`, under a plan; and one under a budget."""
    root = tmp_path_factory.mktemp("calibrated")
    conv_net(root / "m.onnx")
    sites = {"conv1": ("separable", 7), "conv2": ("input", 6), "grouped": ("channel", 5), "head": ("gemm", 4)}
    plan = {name: {"form": form, "rank": rank} for name, (form, rank) in sites.items()}
    (root / "plan.json").write_text(json.dumps({"schema_version": 1, "tool": "", "sites": plan}))
    common = {"calib": inputs(root / "c.npz", *IMAGE, count=60), "measure": False, "keep_dense": True}
    export(str(root / "m.onnx"), root / "forms", plan=root / "plan.json", **common)
    export(str(root / "m.onnx"), root / "budget", keep_macs=0.5, **common)
    return root


@pytest.fixture
def forms(tmp_path, calibrated):
    shutil.copytree(calibrated / "forms", tmp_path / "b")
    return tmp_path / "b"


@pytest.fixture
def budgeted(tmp_path, calibrated):
    shutil.copytree(calibrated / "budget", tmp_path / "b")
    return tmp_path / "b"


def test_every_form_is_read_from_the_graph(forms, calibrated):
    result = verify(forms, calib=calibrated / "c.npz")
    assert {c.name for c in result.claims if c.status != "holds"} == {"responses", "accuracy", "latency"}
    details = {c.name: c.detail for c in result.claims}
    assert details["ranks"] == "ranks and forms as reported (1 channel, 1 gemm, 1 input, 1 separable)"
    assert result.ok


@pytest.mark.parametrize("site", [0, 1, 2, 3])
def test_other_ranks_and_forms_than_the_graph_has_are_noticed(forms, site):
    edit_report(forms, lambda r: r["sites"][site].update(rank=r["sites"][site]["rank"] + 1))
    assert broken(forms) == {"ranks"}
    edit_report(forms, lambda r: r["sites"][site].update(rank=r["sites"][site]["rank"] - 1))
    assert broken(forms) == set()
    for form in ("channel", "input", "separable", "gemm", "matmul"):
        before = json.loads((forms / "report.json").read_text())["sites"][site]["form"]
        if form != before:
            edit_report(forms, lambda r, form=form: r["sites"][site].update(form=form))
            assert broken(forms) == {"ranks"}, form
            edit_report(forms, lambda r, form=before: r["sites"][site].update(form=form))
    assert broken(forms) == set()


def test_a_budget_that_is_not_kept_is_noticed(budgeted):
    assert statuses(budgeted)["budget"] == "holds"
    edit_report(budgeted, lambda r: r["settings"].update(budget="--keep-macs 10%"))
    assert broken(budgeted) == {"budget"}
    edit_report(budgeted, lambda r: r["settings"].update(budget="--max-size 100"))
    assert broken(budgeted) == {"budget"}
    edit_report(budgeted, lambda r: r["settings"].update(budget="--keep-params 100%"))
    assert broken(budgeted) == set()


def test_a_drop_that_is_not_kept_is_noticed(bundle):
    for drop, found in (("100", set()), ("0.001", {"budget"})):
        edit_report(bundle, lambda r, drop=drop: r["settings"].update(budget=f"--max-drop {drop}"))
        assert broken(bundle) == found


@pytest.mark.parametrize("part", ["checked", "in_sample"])
@pytest.mark.parametrize(("key", "factor"), [("output_error", 0.9), ("divergence", 0.9), ("agreement", 1.05)])
def test_what_the_report_says_of_calibration_is_computed_again(forms, calibrated, part, key, factor):
    def change(report):
        quality = report["calibration"][part]
        quality[key] *= factor

    edit_report(forms, change)
    assert broken(forms, calib=calibrated / "c.npz") == {"calibration"}
    assert run(["verify", str(forms), "--calib", str(calibrated / "c.npz")]) == 4
    assert broken(forms) == set()  # without the data nobody can know


def test_quality_on_separate_check_data_is_computed_again(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx", sizes=(12, 48, 48, 10))
    fit, check = inputs(tmp_path / "c.npz", 12, low_rank=5), inputs(tmp_path / "k.npz", 12, seed=9)
    report = export(
        str(model), tmp_path / "b", calib=fit, calib_check=check, rank="25%", measure=False, keep_dense=True
    )
    assert report.calibration.is_separate
    assert broken(tmp_path / "b", calib=fit, calib_check=check) == set()

    def status(**data):
        return {c.name: c for c in verify(tmp_path / "b", **data).claims}["calibration"].status

    assert status(calib=fit, calib_check=check) == "holds"
    assert status(calib=fit) == status(calib=fit, calib_check=inputs(tmp_path / "o.npz", 12, seed=8)) == "not checked"


def test_what_of_calibration_cannot_be_checked_is_said(forms, calibrated, tmp_path):
    def detail(**options):
        claims = {c.name: c for c in verify(forms, **options).claims}
        assert claims["calibration"].status == claims["responses"].status == "not checked"
        return claims["calibration"].detail

    assert detail() == "add --calib with the same data"
    other = inputs(tmp_path / "other.npz", *IMAGE, count=60, seed=5)
    assert detail(calib=other) == "--calib is not the data of the report"
    fewer = inputs(tmp_path / "fewer.npz", *IMAGE, count=59)
    assert detail(calib=fewer) == "--calib is not the data of the report"
    for name in ("dense.onnx", "dense.onnx.data"):
        (forms / name).unlink(missing_ok=True)
        edit_report(forms, lambda r, name=name: r["files"].pop(name, None))
    assert detail(calib=calibrated / "c.npz") == "dense.onnx is not in the bundle (export --keep-dense)"
    with pytest.raises(UsageError, match=r"--calib: .*nowhere\.npz does not exist"):
        verify(forms, calib=tmp_path / "nowhere.npz")


def test_a_bias_that_is_lost_is_noticed(forms, calibrated):
    edit_model(forms, scale("conv2.bias", 0.0))
    assert broken(forms, calib=calibrated / "c.npz") - {"bytes"} == {"outputs", "parity", "calibration"}


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
    assert err.startswith(f"rsi-deploy: {bundle}: manifest, files")


@pytest.mark.parametrize("keep", [0, 10, 1500])
def test_a_cut_file_is_noticed_and_is_no_crash(bundle, keep, capsys):
    path = bundle / "model.onnx"
    path.write_bytes(path.read_bytes()[:keep])
    assert run(["verify", str(bundle)]) == 4
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_file_is_noticed(bundle):
    (bundle / "model.onnx").unlink()
    result = verify(bundle)
    assert {c.name: c.detail for c in result.claims if c.status == "broken"} == {
        "manifest": "missing: model.onnx",
        "files": "missing: model.onnx",
    }


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
    with pytest.raises(ModelError, match="is no report of schema version 1: "):
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
