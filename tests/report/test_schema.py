import json

import jsonschema
import numpy as np
import pydantic
import pytest
from nets import labelled, mlp_onnx

from rsi_deploy import Report, export, read_report
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.report.schema import ProbeOutput


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    data = labelled(root / "d.npz", mlp_onnx(root / "m.onnx"))
    export(
        str(root / "m.onnx"),
        root / "b",
        rank=5,
        data=data,
        bench_seconds=0.05,
        allow_slower=True,
        command="rsi-deploy export ...",
    )
    return root / "b"


@pytest.fixture
def content(bundle):
    return json.loads((bundle / "report.json").read_text())


def test_round_trip(bundle):
    text = (bundle / "report.json").read_text()
    report = read_report(bundle)
    assert report.model_dump_json(indent=2) + "\n" == text
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert (report.schema_version, report.command) == (1, "rsi-deploy export ...")


def test_every_part_is_there(content):
    empty = {key for key, value in content.items() if value in (None, [], {}, "")}
    assert empty == {"preprocessing", "notes", "calibration", "plan", "precision", "timing", "probe_fingerprint"}
    assert content["verification"].keys() == {"exporter", "surgery", "approximation"}
    assert {"cpu", "cores"} <= content["environment"].keys()


def test_split_sites(bundle):
    report = read_report(bundle)
    assert [s.name for s in report.split_sites] == ["fc1", "fc2", "head"]
    assert all(s.rank == 5 for s in report.split_sites)


def test_the_json_schema_describes_reports(content):
    schema = Report.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    assert schema["properties"]["schema_version"]["const"] == 1
    # so that older reports can be read
    optional = {"schema_version", "plan", "precision", "timing", "recipe", "probe_fingerprint"}
    assert set(schema["required"]) == set(content) - optional


def places(value, path=()):
    """Yield the path of every object in the report."""
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def test_unknown_fields_are_refused_everywhere(bundle, content):
    # mappings with arbitrary names
    free = {
        "files",
        "packages",
        "inputs",
        "provider_nodes",
        "provider_options",
        "percentiles_ms",
        "versions",
        "probe_shapes",
    }
    checked = 0
    for path in places(content):
        if path and path[-1] in free:
            continue
        changed = json.loads(json.dumps(content))
        inner = changed
        for key in path:
            inner = inner[key]
        inner["surprise"] = 1
        with pytest.raises(pydantic.ValidationError, match="surprise"):
            Report.model_validate(changed)
        checked += 1
    assert checked > 10


def test_a_report_is_frozen(bundle):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        read_report(bundle).tool = "other"


def test_numbers_that_are_not_finite_never_get_in_as_numbers(tmp_path, content):
    """JSON has no NaN: it would be written as null, which no number of ours may be."""
    content["verification"]["approximation"]["relative_l2"] = None
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="verification.approximation.relative_l2: Input should be a valid number"):
        read_report(tmp_path)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_still_give_a_readable_report(tmp_path, bad):
    path = mlp_onnx(tmp_path / "m.onnx")
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(path)
    (bias,) = (t for t in proto.graph.initializer if t.name == "head.bias")
    values = numpy_helper.to_array(bias).copy()
    values[3] = bad
    bias.CopyFrom(numpy_helper.from_array(values, "head.bias"))
    onnx.save(proto, path)
    report = export(str(path), tmp_path / "b", rank=4, measure=False)
    assert np.isfinite(report.verification.approximation.relative_l2)
    again = read_report(tmp_path / "b")
    assert again.verification == report.verification
    from rsi_deploy import verify

    assert verify(tmp_path / "b").ok


def test_a_fingerprint_of_an_output():
    array = np.arange(20, dtype=np.float32).reshape(4, 5)
    probe = ProbeOutput.of("y", array)
    assert (probe.name, probe.shape, probe.first) == ("y", (4, 5), tuple(float(i) for i in range(8)))
    assert probe.norm == pytest.approx(np.linalg.norm(array))
    assert ProbeOutput.of("y", np.zeros((0, 3))).first == ()


def test_no_report_no_bundle(tmp_path):
    with pytest.raises(UsageError, match=r"is no bundle: it has no report\.json"):
        read_report(tmp_path)


def test_records_take_keywords_of_the_right_type_only():
    assert Size(bytes=1, params=2, macs=3).macs == 3
    with pytest.raises(pydantic.ValidationError):
        Size(bytes="many", params=2, macs=3)
    with pytest.raises(pydantic.ValidationError):
        ExportSettings(rank="4")
