"""What `serve` refuses before it listens, with exit codes and what to type."""

import importlib.util
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper
from served import BLOCKED, MAIN, Server, body, linear, value, write

from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.io.manifest import check_manifest, file_hash
from rsi_deploy.serving import bundles
from rsi_deploy.serving.engine.model import LoadedModel

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")

ROW = np.ones((1, 12), np.float32)


def refused(*arguments, code=MAIN):
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("option", ["--http-port", "--grpc-port"])
def test_a_port_in_use(tmp_path, option):
    model = linear(tmp_path / "m.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        others = {"--http-port": 0, "--grpc-port": 0, option: port}
        code, said = refused(model, *(text for pair in others.items() for text in pair))
    assert (code, f"{option}: port {port} on 127.0.0.1 is in use" in said) == (2, True), said


@pytest.mark.parametrize("module", ["uvicorn", "grpc", "tritonclient", "onnxruntime"])
def test_a_missing_extra(tmp_path, monkeypatch, capsys, module):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else found(name, *rest))
    assert run(["serve", str(linear(tmp_path / "m.onnx"))]) == 2
    assert "pip install 'rsi-deploy[serve" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["changed", "missing", "swapped data", "foreign", "no report", "broken report"])
def test_a_bundle_with_changed_files_is_not_served(copied, capsys, harm):
    model, report = copied / "model.onnx", copied / "report.json"
    if harm == "changed":
        content = bytearray(model.read_bytes())
        content[-1000] ^= 1
        model.write_bytes(content)
        expected = (4, "changed since report.json was written: model.onnx")
    elif harm == "missing":
        model.unlink()
        expected = (4, "missing: model.onnx")
    elif harm == "swapped data":
        (copied / "model.onnx.data").write_bytes(b"other weights")
        expected = (4, "not in report.json: model.onnx.data")
    elif harm == "foreign":
        (copied / "notes.txt").write_text("foreign")
        expected = (4, "not in the manifest: notes.txt")
    elif harm == "no report":
        report.unlink()
        expected = (2, "has no report.json")
    else:
        report.write_text(json.dumps({"schema_version": 99, "files": {}}))
        expected = (3, "schema_version")
    code = run(["serve", str(copied), "--http-port", "0", "--no-grpc"])
    said = capsys.readouterr().err
    assert (code, expected[1] in said) == (expected[0], True), said


def test_each_file_of_a_bundle_is_read_once(digits, monkeypatch):
    """Report and manifest list the same files, which may have hundreds of MB."""
    read = []
    monkeypatch.setattr(bundles, "file_hash", lambda path: (read.append(path.name), file_hash(path))[1])
    bundles.open_bundle(digits)
    assert sorted(read) == sorted(set(read))
    assert {"model.onnx", "dense.onnx", "report.json"} <= set(read)


def test_what_is_typed_wrong(tmp_path, capsys):
    model = linear(tmp_path / "m.onnx")
    for arguments, words in (
        ([tmp_path / "nothing"], "does not exist"),
        ([tmp_path], "is no bundle"),
        ([f"a={model}", f"a={model}"], "given twice"),
        ([f"a:0={model}"], "a version is a number of 1 or more"),
        ([f"a b={model}"], "a model's name is letters"),
        ([model, "--canary", model], "go together"),
        ([f"a={model}", f"b={model}", "--shadow", model], "which of a, b is it for?"),
        ([model, "--shadow", f"z={model}"], "no model 'z' is served"),
        ([model, "--canary", model, "--canary-share", "50"], "--canary-share"),
        ([model, "--host", "no.such.host.invalid"], "--host"),
    ):
        code = run(["serve", *map(str, arguments), "--http-port", "0", "--no-grpc"])
        said = capsys.readouterr().err
        assert (code, words in said) == (2, True), said


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    code, said = refused(tmp_path / "m.onnx", "--http-port", 0, "--grpc-port", 0)
    assert (code, "is not an ONNX file" in said) == (3, True), said


def test_numbered_folders_are_versions(copied, tmp_path):
    (tmp_path / "many").mkdir()
    for version in ("2", "11"):
        (tmp_path / "many" / version).symlink_to(copied)
    with Server(tmp_path / "many", "--no-grpc") as server:
        assert server.info["models"] == {"many": ["2", "11"]}
        assert server.grpc == ""


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from rsi_deploy.cli import run; run(['serve', '--help']); "
        "print(sorted({'torch', 'onnxruntime', 'uvicorn', 'grpc', 'tritonclient', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Serve bundles" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_access_log_is_json(tmp_path):
    log = tmp_path / "access.log"
    with Server(linear(tmp_path / "m.onnx"), "--access-log", log, code=BLOCKED + MAIN) as server:
        server.ask("POST", "/v2/models/m/infer", body({"x": ROW}, id='q"\n'), {})
        server.ask("POST", "/v2/models/m/infer", b"{")
    right, wrong = [json.loads(line) for line in log.read_text().splitlines()]
    assert (right["status"], right["model"], right["version"], right["id"]) == (200, "m", "1", 'q"\n')
    assert right["bytes_in"] > 0 < right["bytes_out"]
    assert right["ms"] >= right["batch_ms"] >= 0
    assert (wrong["status"], "no JSON" in wrong["error"]) == (400, True)


def test_a_log_that_is_not_read(tmp_path):
    """A log whose reader has stopped does not stop the server."""
    reader, writer = os.pipe()
    try:
        with Server(linear(tmp_path / "m.onnx"), "--access-log", f"/dev/fd/{writer}", pass_fds=[writer]) as server:
            for _ in range(250):  # more than a pipe holds
                assert server.ask("POST", "/v2/models/m/infer", body({"x": ROW}, id="i" * 200))[0] == 200
    finally:
        os.close(reader)
        os.close(writer)


def test_a_bundle_that_changes_while_it_is_read_is_not_served(copied, monkeypatch):
    bundles.open_bundle(copied)

    def meanwhile(folder, hash_of):
        os.utime(folder / "model.onnx")
        return check_manifest(folder, hash_of)

    monkeypatch.setattr(bundles, "check_manifest", meanwhile)
    with pytest.raises(GateError, match="digits changed while it was read; serve it when"):
        bundles.open_bundle(copied)


def test_a_file_that_was_replaced_since_it_was_checked_is_not_loaded(tmp_path):
    bundle = bundles.open_bundle(linear(tmp_path / "m.onnx"))
    assert LoadedModel(bundle).infer({"x": ROW})["y"].shape == (1, 5)
    linear(tmp_path / "m.onnx", seed=3)
    with pytest.raises(GateError, match=r"m\.onnx has been replaced since it was checked; start again"):
        LoadedModel(bundle)


def test_a_tensor_that_the_protocol_does_not_carry_is_named(tmp_path):
    x, y = value("x", TensorProto.BFLOAT16, ["N", 4]), value("y", TensorProto.FLOAT, ["N", 4])
    cast = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)
    bundle = bundles.open_bundle(write(tmp_path / "m.onnx", [cast], [x], [y], []))
    with pytest.raises(
        ModelError, match=r"cannot be served: input x: bfloat16 \(N, 4\) is none of BOOL, .*; export a model with"
    ):
        LoadedModel(bundle)


def test_outputs_without_a_row_for_each_request_are_not_split(tmp_path):
    """A sum over all rows cannot be split between two requests that were joined without a test."""
    x, y = value("x", TensorProto.FLOAT, ["N", 12]), value("y", TensorProto.FLOAT, [])
    total = helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)
    bundle = bundles.open_bundle(write(tmp_path / "m.onnx", [total], [x], [y], []))
    model = LoadedModel(bundle, try_batches=False)
    assert model.infer_batch([{"x": ROW}])[0]["y"] == 12
    with pytest.raises(ModelError, match=r"output y has the shape \(\) for 2 rows; serve it with --max-batch 1"):
        model.infer_batch([{"x": ROW}, {"x": ROW}])
    assert LoadedModel(bundle).alone  # the test finds it
