"""`verify` on bundles whose delivered model is quantized, and on edits of them that it must notice."""

import json
import shutil

import numpy as np
import onnx
import pytest
from calibrated_nets import IMAGE, conv_net, inputs, text_net

from rsi_deploy import export, verify
from rsi_deploy.io.onnx_file import file_bytes, file_hash
from rsi_deploy.precision.lowering import CalibrationFeeds, Lowering, lower
from rsi_deploy.precision.record import PrecisionPoint, PrecisionRecord
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, FLOAT16, WEIGHTS4, Scheme, static
from rsi_deploy.report.schema import ProbeOutput, read_report
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.values import arrays_of_outputs
from rsi_deploy.runtime.parity import compare_outputs
from rsi_deploy.runtime.sessions import make_session, run_session

FORMS = {"conv1": ("separable", 7), "conv2": ("input", 6), "grouped": ("channel", 5), "head": ("gemm", 4)}
PRODUCTS = {"grow": ("matmul", 6), "shrink": ("matmul", 7)}
NETS = {"images": (conv_net, FORMS), "texts": (text_net, PRODUCTS)}
STATIC = static("minmax")
CASES = {
    "static": ("images", STATIC, {}),
    "static with int4": ("images", STATIC, dict.fromkeys(FORMS, 4)),
    "static with few bits": ("images", STATIC, dict(zip(FORMS, (3, 5, 4, 3), strict=True))),
    "few bits": ("images", FEW_BITS, dict(zip(FORMS, (3, 5, 4, 8), strict=True))),
    "products of few bits": ("texts", FEW_BITS, dict(zip(PRODUCTS, (5, 3), strict=True))),
    "dynamic": ("images", DYNAMIC, {}),
    "dynamic products": ("texts", DYNAMIC, {}),
    "dynamic products with int4": ("texts", DYNAMIC, dict.fromkeys(PRODUCTS, 4)),
    "int4 weights": ("texts", WEIGHTS4, {}),
    "float16": ("images", FLOAT16, {}),
}


def run_file(path, feeds):
    session = make_session(path, "cpu")
    return [output.name for output in session.get_outputs()], run_session(session, feeds, path.name)


def edit_report(bundle, change):
    content = json.loads((bundle / "report.json").read_text())
    change(content)
    (bundle / "report.json").write_text(json.dumps(content))


def deliver(bundle, lowering, data):
    """Quantize the model of a bundle, and let its report describe the quantized one."""
    model = bundle / "model.onnx"
    shutil.move(model, bundle / "float.onnx")
    lower(bundle / "float.onnx", model, lowering, data)
    (bundle / "float.onnx").unlink()
    report = read_report(bundle)
    feeds = probe_feeds(model, report.settings.seed, report.probe_shapes)
    names, arrays = run_file(model, feeds)
    error = compare_outputs(run_file(bundle / "dense.onnx", feeds)[1], arrays, what="parity", remedy="").relative_l2
    point = PrecisionPoint(name=lowering.scheme.name, scheme=lowering.scheme.name, is_rival=False, is_delivered=True)
    record = PrecisionRecord(request="auto", scheme=lowering.scheme.name, rule="smallest", points=(point,))
    probe = [ProbeOutput.of(n, a).model_dump(mode="json") for n, a in arrays_of_outputs(names, arrays).items()]

    def change(content):
        content["precision"] = record.model_dump(mode="json")
        content["files"]["model.onnx"] = file_hash(model)
        content["files"].pop("model.onnx.data", None)
        content["compressed"]["bytes"] = file_bytes(model)
        content["probe"] = probe
        content["verification"]["approximation"]["relative_l2"] = error

    edit_report(bundle, change)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    for name, (write, sites) in NETS.items():
        model = write(root / f"{name}.onnx")
        plan = {site: {"form": form, "rank": rank} for site, (form, rank) in sites.items()}
        (root / "plan.json").write_text(json.dumps({"schema_version": 1, "tool": "", "sites": plan}))
        export(str(model), root / name, plan=root / "plan.json", measure=False, keep_dense=True)
    x = np.load(inputs(root / "c.npz", *IMAGE, count=16))["x"]
    data = CalibrationFeeds(feeds=lambda: iter([{"input": x}]), samples=16)
    for case, (net, scheme, bits) in CASES.items():
        shutil.copytree(root / net, root / case)
        deliver(root / case, Lowering(scheme=scheme, bits=bits), data if net == "images" else None)
    return root


@pytest.fixture(params=CASES)
def bundle(request, bundles, tmp_path):
    shutil.copytree(bundles / request.param, tmp_path / "b")
    return tmp_path / "b"


def statuses(bundle):
    """Without what notices every edit: the manifest, the page."""
    return {c.name: c.status for c in verify(bundle).claims if c.name not in ("manifest", "page")}


def broken(bundle):
    return {name for name, status in statuses(bundle).items() if status == "broken"}


def test_a_quantized_bundle_holds(bundle):
    found = statuses(bundle)
    unchecked = {name for name, status in found.items() if status != "holds"}
    assert unchecked == {"parameters", "accuracy", "latency"}
    assert {"sites", "ranks", "bytes", "MACs", "outputs", "parity"} <= found.keys()


def split_sites(content):
    return [site for site in content["sites"] if site["decision"] == "split"]


def test_every_factor_of_a_site_in_four_bits_is_stored_so(bundles):
    for case in ("static with int4", "dynamic products with int4"):
        model = onnx.load(bundles / case / "model.onnx")
        stored = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT4]
        assert len(stored) == 2 * len(CASES[case][2])


def test_a_gemm_that_stays_float_is_not_quantized(bundles, tmp_path):
    for bits, expected in (({}, 0), ({"head": 32}, 2)):
        lowering = Lowering(scheme=DYNAMIC, bits=bits)
        lower(bundles / "images" / "model.onnx", tmp_path / "m.onnx", lowering, None)
        model = onnx.load(tmp_path / "m.onnx")
        assert sum(node.op_type == "MatMul" for node in model.graph.node) == expected
        marked = [node.name for node in model.graph.node if node.metadata_props]
        assert {"head/right", "head/left"} <= set(marked)


@pytest.mark.parametrize("number", [0, -1])
def test_an_edited_report_is_noticed(bundle, number):
    def more(content):
        split_sites(content)[number]["rank"] += 1

    def dense(content):
        split_sites(content)[number].update(decision="dense", rank=None)

    edits = {
        "ranks": more,
        "sites": dense,
        "bytes": lambda r: r["compressed"].update(bytes=r["compressed"]["bytes"] + 1),
        "MACs": lambda r: r["compressed"].update(macs=r["compressed"]["macs"] + 1),
        "outputs": lambda r: r["probe"][0].update(norm=r["probe"][0]["norm"] * 1.01),
        "budget": lambda r: r["settings"].update(budget="--max-size 100"),
        "files": lambda r: r["files"].update({"model.onnx": "0" * 64}),
    }
    before = (bundle / "report.json").read_text()
    for name, change in edits.items():
        edit_report(bundle, change)
        assert broken(bundle) == {name}
        (bundle / "report.json").write_text(before)
    assert broken(bundle) == set()


def test_a_form_of_another_operator_is_noticed(bundle):
    edit_report(bundle, lambda r: split_sites(r)[0].update(form="unknown"))
    assert broken(bundle) == {"ranks"}


def edit_model(bundle, change):
    """Change the model, and the hash and size in the report, so that only what the change means can be noticed."""
    path = bundle / "model.onnx"
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    edit_report(bundle, lambda r: r["files"].update({"model.onnx": file_hash(path)}))
    edit_report(bundle, lambda r: r["compressed"].update(bytes=file_bytes(path)))


def forget_marks(model):
    for node in model.graph.node:
        del node.metadata_props[:]


def turn_numbers(model):
    """Turn the order of the numbers in the largest tensor."""
    tensor = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    tensor.raw_data = tensor.raw_data[::-1]


def test_an_edited_model_is_noticed(bundle):
    before = (bundle / "model.onnx").read_bytes(), (bundle / "report.json").read_text()
    edit_model(bundle, forget_marks)
    assert broken(bundle) == {"sites"}
    (bundle / "model.onnx").write_bytes(before[0])
    (bundle / "report.json").write_text(before[1])
    edit_model(bundle, turn_numbers)
    assert "outputs" in broken(bundle)


def test_a_swapped_model_is_noticed(bundles, tmp_path):
    """The model of another bundle of the same splits, with its hash and size in the report."""
    shutil.copytree(bundles / "static", tmp_path / "b")
    shutil.copy(bundles / "static with int4" / "model.onnx", tmp_path / "b" / "model.onnx")
    assert {"files", "bytes", "outputs"} <= broken(tmp_path / "b")
    edit_model(tmp_path / "b", lambda model: None)
    claims = {c.name: c for c in verify(tmp_path / "b").claims}
    assert claims["outputs"].status == "broken"
    assert "CPU" in claims["outputs"].detail, "int8 kernels differ between CPUs, so a reader must know"


def test_factors_of_hidden_shape_are_not_checked(bundles, tmp_path):
    """A factor that is computed at run time has no shape to read."""
    shutil.copytree(bundles / "float16", tmp_path / "b")

    def hide(model):
        graph = model.graph
        node = next(n for n in graph.node if n.name == "head/right")
        graph.node.insert(0, onnx.helper.make_node("Neg", [node.input[1]], ["negative"]))
        graph.node.insert(1, onnx.helper.make_node("Neg", ["negative"], ["same"]))
        node.input[1] = "same"

    edit_model(tmp_path / "b", hide)
    assert statuses(tmp_path / "b")["ranks"] == "not checked"
    assert broken(tmp_path / "b") == set()
    edit_report(tmp_path / "b", lambda r: r["sites"][0].update(rank=r["sites"][0]["rank"] + 1))
    assert broken(tmp_path / "b") == {"ranks"}, "the other sites are still read"


def test_a_delivered_rival_without_splits_holds(bundles, tmp_path):
    shutil.copytree(bundles / "texts", tmp_path / "b")
    shutil.copy(tmp_path / "b" / "dense.onnx", tmp_path / "b" / "model.onnx")
    for name in ("model.onnx.data", "dense.onnx.data"):
        (tmp_path / "b" / name).unlink(missing_ok=True)
    shutil.copy(bundles / "texts.onnx", tmp_path / "b" / "model.onnx")
    shutil.copy(bundles / "texts.onnx", tmp_path / "b" / "dense.onnx")

    def dense(content):
        for site in content["sites"]:
            site.update(decision="dense", rank=None, form=None)
        content["compressed"] = content["dense"]
        content["files"] = {"dense.onnx": file_hash(tmp_path / "b" / "dense.onnx")}

    edit_report(tmp_path / "b", dense)
    deliver(tmp_path / "b", Lowering(scheme=Scheme(kind="dynamic int8")), None)
    assert broken(tmp_path / "b") == set()
    assert statuses(tmp_path / "b")["MACs"] == "holds"


@pytest.mark.parametrize(("scheme", "status"), [("float32", "holds"), ("dynamic int8", "not checked")])
def test_parameters_are_counted_where_the_choice_was_a_float_model(bundles, tmp_path, scheme, status):
    shutil.copytree(bundles / "images", tmp_path / "b")
    point = PrecisionPoint(name=scheme, scheme=scheme, is_rival=False, is_delivered=True)
    record = PrecisionRecord(request="auto", scheme=scheme, rule="smallest", points=(point,))
    edit_report(tmp_path / "b", lambda content: content.update(precision=record.model_dump(mode="json")))
    assert statuses(tmp_path / "b")["parameters"].replace("_", " ") == status
