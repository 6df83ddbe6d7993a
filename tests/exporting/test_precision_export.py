"""`export --precision` from end to end, on the digit network of the samples."""

import json
import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from calibrated_nets import IMAGE, conv_net, inputs

from rsi_deploy import export, verify
from rsi_deploy.core.errors import ModelError, UsageError

MODEL = "samples.digits:cnn"
WEIGHTS = {"checkpoint": "samples/digits_cnn.safetensors", "measure": False}
CALIB = "samples/digits_calib.npz"
SIZE = 150_000


def made(folder, **options):
    return export(MODEL, folder, **WEIGHTS, **{"calib": CALIB, "keep_dense": True} | options)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return folder / "b", made(folder / "b", precision="auto", max_size=SIZE)


def test_a_size_is_kept_and_the_bundle_verifies(small):
    folder, report = small
    assert (folder / "model.onnx").stat().st_size == report.compressed.bytes <= SIZE
    claims = {claim.name: claim.status for claim in verify(folder).claims}
    assert "broken" not in claims.values()
    assert {claims[name] for name in ("budget", "bytes", "outputs", "sites", "ranks", "parity", "MACs")} == {"holds"}


def test_every_model_is_listed_and_no_rival_is_better(small):
    _, report = small
    points = report.precision.points
    chosen = report.precision.delivered
    assert chosen.keeps_limit
    assert chosen.bytes == report.compressed.bytes
    assert {p.scheme for p in points if p.is_rival} >= {"float32", "static int8 (minmax)", "dynamic int8"}
    assert all(p.keeps_limit == (p.bytes <= SIZE) for p in points)
    losses = [p.quality.output_error for p in points if p.is_rival and p.keeps_limit]
    assert all(loss >= chosen.quality.output_error / 1.25 for loss in losses)


def test_a_float16_model_for_the_cpu_says_what_computes_it(small, tmp_path):
    report = made(tmp_path / "b", precision="float16", keep_macs=0.7)
    (note,) = [note for note in report.notes if "float16" in note]
    assert "float32" in note
    assert "CPU" in note
    assert "Cast" in report.precision.operators, "as the note says"
    assert note in (tmp_path / "b" / "README.md").read_text()
    assert not any("float16" in note for note in small[1].notes)


def test_the_model_answers_as_the_report_says(small):
    folder, report = small
    x = np.load("samples/digits_eval.npz")["images"].astype(np.float32).transpose(0, 3, 1, 2)
    answers = []
    for name in ("dense.onnx", "model.onnx"):
        session = ort.InferenceSession(folder / name, providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"input": (x / 255 - 0.305) / 0.376})[0].argmax(axis=1))
    assert len(set(answers[0])) == 10
    assert 100 * np.mean(answers[0] == answers[1]) >= report.precision.delivered.quality.agreement_at_least


def test_the_same_command_writes_the_same_model(tmp_path):
    source, data = conv_net(tmp_path / "m.onnx"), inputs(tmp_path / "c.npz", *IMAGE)
    models = []
    for name, size in (("a", 20_000), ("b", 20_000), ("c", 12_000)):
        export(str(source), tmp_path / name, calib=data, precision="auto", max_size=size, measure=False)
        models.append((tmp_path / name / "model.onnx").read_bytes())
    assert models[0] == models[1] != models[2]
    assert max(len(model) for model in models[:2]) <= 20_000


def kinds_of(path):
    """Names of the sites' nodes, and whether each one's weight is stored as a float."""
    graph = onnx.load(path).graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Gemm", "MatMul", "MatMulInteger")]
    return {
        re.sub(r"_MatMul$", "", node.name): stored.get(node.input[1]) == onnx.TensorProto.FLOAT for node in products
    }


def test_a_rank_is_kept_in_int8(tmp_path):
    report = made(tmp_path / "b", precision="int8", rank="20%")
    assert report.precision.delivered.name.startswith("low rank")
    ranks = {site.name: site.rank for site in report.sites if site.rank}
    assert ranks["classifier.fc1"] == 103
    assert not any(kinds_of(tmp_path / "b" / "model.onnx").values())
    assert "broken" not in {claim.status for claim in verify(tmp_path / "b").claims}


def test_a_budget_of_macs_is_kept_and_every_product_is_int8(tmp_path):
    report = made(tmp_path / "b", precision="int8", keep_macs=0.4)
    assert report.compressed.macs <= 0.4 * report.dense.macs
    assert report.precision.delivered.name.startswith("low rank")
    kinds = kinds_of(tmp_path / "b" / "model.onnx")
    assert len(kinds) >= 4
    assert not any(kinds.values())
    assert set(report.precision.bits.values()) == {8}


def test_int4_delivers_four_bits(tmp_path):
    report = made(tmp_path / "b", precision="int4", max_size=700_000)
    assert {bits for name, bits in report.precision.bits.items() if "classifier" in name} == {4}


def test_a_quality_is_kept_with_few_bits_everywhere(tmp_path):
    report = made(tmp_path / "b", min_agreement=0.95, precision="auto")
    chosen = report.precision.delivered
    assert chosen.quality.agreement_at_least >= 95
    assert chosen.bytes < 0.3 * report.dense.bytes
    assert max(report.precision.bits.values()) <= 8
    assert {point.scheme for point in report.precision.points} >= {"few bits, float32 products"}
    assert "broken" not in {claim.status for claim in verify(tmp_path / "b").claims}


def test_a_precision_needs_data(tmp_path):
    with pytest.raises(UsageError, match="--precision int8 .*--calib"):
        made(tmp_path / "b", precision="int8", rank="50%", calib=None)


def test_an_impossible_size_names_the_smallest_that_there_is(tmp_path):
    with pytest.raises(ModelError, match=r"--max-size 5kB.*--max-size") as refused:
        made(tmp_path / "b", precision="auto", max_size=5000)
    nearest = float(re.search(r"type --max-size ([\d.]+)kB", str(refused.value)).group(1))
    assert 5 < nearest < 100  # int8 of the dense model, without ranks, takes six times as much
    assert not (tmp_path / "b").exists()


def test_a_plan_makes_the_model_again_and_its_edits_count(small, tmp_path):
    folder, report = small
    assert report.precision.scheme != "float32"
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["scheme"] == report.precision.scheme
    again = made(tmp_path / "again", plan=folder / "plan.json")
    assert again.precision.bits == report.precision.bits
    assert weights(tmp_path / "again/model.onnx") == weights(folder / "model.onnx")
    name = next(name for name, site in plan["sites"].items() if site.get("bits") == 8)
    plan["sites"][name]["bits"] = 4
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    edited = made(tmp_path / "edited", plan=tmp_path / "plan.json")
    assert edited.precision.bits == report.precision.bits | {name: 4}
    assert edited.compressed.bytes < report.compressed.bytes
    plan["scheme"] = "int7"
    (tmp_path / "wrong.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"wrong\.json.*int7.*static int8"):
        made(tmp_path / "wrong", plan=tmp_path / "wrong.json")
    plan |= {"scheme": report.precision.scheme, "tables": {"emb": 8}}
    (tmp_path / "wrong.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match=r"wrong\.json.*'emb'"):
        made(tmp_path / "wrong", plan=tmp_path / "wrong.json")
    with pytest.raises(UsageError, match="--precision int4"):
        made(tmp_path / "wrong", plan=folder / "plan.json", precision="int4")


def test_a_plan_in_float32_has_the_ranks_alone(small, tmp_path):
    folder, report = small
    plain = made(tmp_path / "b", plan=folder / "plan.json", precision="float32")
    assert plain.precision is None
    assert {s.name: s.rank for s in plain.sites} == {s.name: s.rank for s in report.sites}
    assert any("bits" in note for note in plain.notes)
    plan = json.loads((folder / "plan.json").read_text())
    for site in plan["sites"].values():
        site["form"] = "dense"
        site.pop("rank", None)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(UsageError, match="--calib"):
        made(tmp_path / "c", plan=tmp_path / "plan.json", calib=None)


def weights(path):
    return {tensor.name: tensor.SerializeToString() for tensor in onnx.load(path).graph.initializer}
