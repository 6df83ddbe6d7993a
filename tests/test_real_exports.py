"""`export` on four graphs that others made: every weight-bearing node has a record, and the bundle is what it says."""

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import run_onnx

from rsi_deploy import export, verify
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting import run as stages
from rsi_deploy.io.onnx_file import file_bytes, file_hash, save_model

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "onnx"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no model files in {FOLDER}")

RNG = np.random.default_rng(0)
SPEECH = {
    "input": RNG.standard_normal((1, 576), np.float32),
    "state": RNG.standard_normal((2, 1, 128), np.float32),
    "sr": np.array(16000),
}
MODELS = {
    "dtln/model_1.onnx": {},
    "magika/standard_v3_3.onnx": {},
    "silero_vad/silero_vad.onnx": {"feeds": SPEECH},  # 16000 and 8000 are all that `sr` may be
    "ultralight_face/version-RFB-320.onnx": {"assume_constant": True},
}
FEEDS = {
    "dtln/model_1.onnx": {
        "input_2": RNG.random((1, 1, 257), np.float32),
        "input_3": RNG.random((1, 2, 128, 2), np.float32),
    },
    "magika/standard_v3_3.onnx": {"bytes": RNG.integers(0, 257, (2, 2048), np.int32)},
    "silero_vad/silero_vad.onnx": SPEECH,
    "ultralight_face/version-RFB-320.onnx": {"input": RNG.standard_normal((1, 3, 240, 320), np.float32)},
}
# Operator -> the inputs where a weight may stand
WEIGHT_INPUTS = {"Conv": [1], "MatMul": [1, 0], "Gemm": [1, 0], "ConvTranspose": [1], "LSTM": [1], "GRU": [1]}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Each model's bundle at 25 %, made once."""
    root = tmp_path_factory.mktemp("real")
    made = {}
    for name, options in MODELS.items():
        folder = root / Path(name).stem
        report = export(str(FOLDER / name), folder, rank="25%", keep_dense=True, measure=False, **options)
        made[name] = (folder, report)
    return made


def weights_of(graph, outer=()):
    """Name and number of weights of each node that multiplies by a constant, read from the protobuf alone.

    A value is constant where it is stored, or follows from constants alone; its size is known where it is stored.
    """
    sizes = dict(outer) | {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        for index in WEIGHT_INPUTS.get(node.op_type, ()):
            if node.input[index] in sizes:
                yield node.name or node.output[0], sizes[node.input[index]]
                break
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if node.op_type == "Constant":
            sizes[node.output[0]] = math.prod(attributes["value"].t.dims) if "value" in attributes else 0
        elif node.input and all(name in sizes for name in node.input if name) and node.op_type != "If":
            sizes |= dict.fromkeys(node.output, 0)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from weights_of(attribute.g, sizes)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_bearing_node_has_one_record(bundles, name):
    _, report = bundles[name]
    expected = sorted(weights_of(onnx.load(FOLDER / name).graph))
    assert len(expected) == {"dtln": 3, "magika": 3, "silero_vad": 16, "ultralight_face": 52}[name.split("/")[0]]
    assert sorted(node for site in report.sites for node in site.nodes) == [node for node, _ in expected]
    assert all((site.rank is None) == (site.reason != "split") for site in report.sites)
    sizes = dict(expected)
    for site in report.split_sites:
        assert {sizes[node] for node in site.nodes} == {site.params_dense}
        assert site.params_compressed == site.groups * site.rank * (site.in_features + site.out_features)


@pytest.mark.parametrize("name", MODELS)
def test_the_bundle_runs_and_errs_as_reported(bundles, name):
    folder, report = bundles[name]
    dense, compressed = (run_onnx(path, FEEDS[name]) for path in (FOLDER / name, folder / "model.onnx"))
    assert [a.shape for a in compressed] == [a.shape for a in dense]
    assert all(np.isfinite(a).all() for a in compressed)
    assert report.verification.surgery.relative_l2 <= 1e-6
    assert 1e-3 < report.verification.approximation.relative_l2 < 2
    assert report.compressed.params < report.dense.params
    assert report.compressed.bytes == file_bytes(folder / "model.onnx") < (FOLDER / name).stat().st_size
    if name == "silero_vad/silero_vad.onnx":  # measured on these very inputs
        worst = max(np.linalg.norm(a - b) / np.linalg.norm(a) for a, b in zip(dense, compressed, strict=True))
        assert report.verification.approximation.relative_l2 == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_verify_holds(bundles, name):
    folder, _ = bundles[name]
    result = verify(folder)
    assert result.ok
    given = {"outputs", "parity", "MACs"} if "feeds" in MODELS[name] else set()
    unchecked = {claim.name for claim in result.claims if claim.status != "holds"}
    assert unchecked == {"accuracy", "latency"} | given


def doctored_(path):
    """Make the left factors of a model file half as large again, which no shape and no count shows."""
    model = ir.load(path)
    lefts = [n.inputs[1] for n in model.graph.all_nodes() if n.metadata_props.get("rsi_deploy.split") == "left"]
    assert lefts
    for value in lefts:
        value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.5), name=value.name)
    save_model(model, path)


@pytest.mark.parametrize("name", MODELS)
def test_doctored_factors_are_found_by_verify(bundles, name, tmp_path):
    folder = shutil.copytree(bundles[name][0], tmp_path / "b")
    doctored_(folder / "model.onnx")
    assert "files" in broken(verify(folder))
    report = bundles[name][1]
    report = report.model_copy(update={"files": {file: file_hash(folder / file) for file in report.files}})
    (folder / "report.json").write_text(report.model_dump_json())  # a forged hash shows in the outputs
    assert broken(verify(folder)) == (set() if "feeds" in MODELS[name] else {"outputs", "parity"})


def broken(result):
    """But for the page, which was made from the report as it was before it was edited."""
    return {claim.name for claim in result.claims if claim.status == "broken"} - {"page", "manifest"}


@pytest.mark.parametrize("name", MODELS)
def test_doctored_factors_do_not_pass_the_output_gate(name, tmp_path, monkeypatch):
    options = {"rank": "100%", "always_split": True, "measure": False, "max_output_error": 1e-2, **MODELS[name]}
    report = export(str(FOLDER / name), tmp_path / "good", **options)
    assert report.verification.approximation.relative_l2 <= 1e-2  # magika's own rounding is 2e-3, the others' 1e-5
    write = stages.split_model

    def doctored(*arguments, path, **named):
        result = write(*arguments, path=path, **named)
        doctored_(path)
        return result

    monkeypatch.setattr(stages, "split_model", doctored)
    with pytest.raises(GateError, match="^approximation gate"):
        export(str(FOLDER / name), tmp_path / "b", **options)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("name", MODELS)
def test_in_another_opset_the_same_is_done(bundles, name, opset, tmp_path):
    kept = bundles[name][1]
    report = export(str(FOLDER / name), tmp_path / "b", rank="25%", opset=opset, measure=False, **MODELS[name])
    assert report.settings.opset == opset != kept.settings.opset
    assert report.verification.exporter.relative_l2 <= 1e-6
    assert timeless(report.sites) == timeless(kept.sites)
    assert report.verification.approximation == kept.verification.approximation
    assert verify(tmp_path / "b").ok


def timeless(sites):
    return [site.model_copy(update={"seconds": 0.0}) for site in sites]
