"""Errors that no other test reaches, in the order of how likely a user meets them: each by what a user would do."""

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from nets import labelled, mlp, mlp_onnx
from onnx import TensorProto, helper
from PIL import Image
from torch import nn

import rsi_deploy
from rsi_deploy.benchmark.concurrency import together
from rsi_deploy.benchmark.variants import variant_labels
from rsi_deploy.cli import run
from rsi_deploy.core import error_table
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.data.sources import open_data
from rsi_deploy.planning.budget import Budget
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.parity import compare_outputs


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", tmp_path / "m.onnx")
    (tmp_path / "empty").touch()
    np.save(tmp_path / "one.npy", np.zeros((1, 12), np.float32))
    (tmp_path / "torn.npz").write_bytes((tmp_path / "d.npz").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["serve", "a="], 2, "a=: expected [NAME[:VERSION]=]PATH"),
        (
            ["serve", "a=m.onnx", "--canary", "a:2=m.onnx", "--canary-share", "10%"],
            2,
            "its version is always the next one",
        ),
        (["serve", "m.onnx", "--api-key-file", "empty"], 2, "--api-key-file: the file is empty; write the key into it"),
        (["serve", "m.onnx", "--host", "192.0.2.1", "--http-port", "0"], 2, "cannot listen on 192.0.2.1 port 0"),
        (["serve", "m.onnx", "--access-log", "no/such/log"], 2, "--access-log no/such/log: No such file or directory"),
        (
            ["profile", "m.onnx", "--weights", "none", "-o", "c.json"],
            2,
            "go with PyTorch models, not with an ONNX file",
        ),
        (["export", "m.onnx", "--max-error", "5%", "--calib", "d.npz", "-o", "b"], 2, "leave --calib out"),
        (
            ["bench", "m.onnx", "--feeds", "d.npz", "--input-shape", "input=1x12"],
            2,
            "--feeds and --input-shape contradict",
        ),
        *(
            (
                ["export", "m.onnx", "--rank", "4", "--feeds", name, "-o", "b"],
                2,
                f"--feeds {name}: expected an .npz with",
            )
            for name in ("empty", "one.npy", "torn.npz", "absent.npz")
        ),
        (["profile", "absent.onnx", "-o", "c.json"], 2, "no such file: absent.onnx; expected an .onnx file"),
        (["profile", "empty.onnx", "-o", "c.json"], 3, "empty.onnx has no nodes; give a model that computes something"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_typed(here, capsys, argv, code, words):
    nothing = helper.make_graph([], "g", [value("x")], [value("x")])
    onnx.save(helper.make_model(nothing, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]), "empty.onnx")
    assert (run(argv), words in (said := capsys.readouterr().err)) == (code, True), said


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4])


def test_what_data_can_get_wrong(here, capsys):
    (here / "tree" / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(here / "tree" / "a" / "1.png")
    (here / "saved").mkdir()
    (here / "saved" / "state.json").write_text("[]")
    (here / "parts").mkdir()
    for number, names in enumerate((["x", "labels"], ["x", "answers"])):
        table = pa.table({name: pa.array([1.0]) for name in names})
        pq.write_table(table, here / "parts" / f"train-{number:05}-of-00002.parquet")
    (here / "batches.py").write_text("def ragged():\n    yield [[1.0], [2.0, 3.0]], [0, 1]\n")
    for data, words in (
        ("tree#classes=absent.txt", "the class list absent.txt cannot be read"),
        ("saved", "state.json is not what datasets.save_to_disk writes; save the data again"),
        ("parts", "00000-of-00002.parquet x, labels; store the same columns in every file"),
        ("batches:ragged", "a batch holds list, which is not an array"),
    ):
        code = run(["eval", "m.onnx", "--data", data])
        assert (code, words in (said := capsys.readouterr().err)) == (2, True), said
    with pytest.raises(
        UsageError, match="d.npz already has class numbers; a class list is only for folders of class folders"
    ):
        open_data("d.npz", classes=["a", "b"])


def test_what_python_code_asks_for(here):
    with pytest.raises(UsageError, match="--by must be .*, but got 'weight'"):
        rsi_deploy.sweep("m.onnx", "s", calib="d.npz", by="weight")
    with pytest.raises(UsageError, match="calib holds no batches; type for example"):
        rsi_deploy.compress_(mlp(), keep_macs=0.5, calib=[])
    with pytest.raises(UsageError, match="max_batch.* must be more than 0"):
        rsi_deploy.serve(["m.onnx"], max_batch=0)
    with pytest.raises(UsageError, match="nothing to serve: name a bundle"):
        rsi_deploy.serve([], http_port=0, grpc_port=None)
    with pytest.raises(UsageError, match="precision must be between 0 % and 100 %, but got 200 %"):
        rsi_deploy.bench(["m.onnx"], precision=2)
    with pytest.raises(UsageError, match="always_split goes with a rank and without calib; leave it out"):
        rsi_deploy.compress_(mlp(), max_error="5%", always_split=True)
    with pytest.raises(UsageError, match="--always-split goes with --rank alone; leave it out with --max-error"):
        rsi_deploy.rewrite("m.onnx", "n.onnx", max_error="5%", always_split=True)
    with pytest.raises(
        UsageError, match="--max-latency must be at least 1 nanosecond, but got 0; write for example 25ms"
    ):
        Budget(max_latency=0)
    with pytest.raises(UsageError, match="--device must be auto, cpu or cuda, but got 'gpu'"):
        rsi_deploy.export(mlp(), "b", rank=4, device="gpu")
    with pytest.raises(UsageError, match="labels must differ from each other, but got \\['a', 'a'\\]"):
        variant_labels(["m.onnx", "n.onnx"], ["a", "a"])


class Decides(nn.Module):
    """What it computes depends on the values that it sees."""

    input_shape = (1, 12)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(x) if x.sum().item() > 0 else x


def test_a_model_that_no_graph_can_hold(here):
    with pytest.raises(
        ModelError, match="torch.export cannot capture .*; change the module, or export it to ONNX yourself"
    ):
        rsi_deploy.export(Decides(), "b", rank=4)


class Eigen(nn.Module):
    """Captured, but ONNX has no eigenvalues."""

    input_shape = (1, 12)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        y = self.fc(x)
        return y * torch.linalg.eigvalsh(y[..., None] * y[..., None, :])


def test_a_model_that_onnx_has_no_operators_for(here):
    with pytest.raises(
        ModelError,
        match=r"torch\.onnx\.export cannot convert Eigen: .*; change the module, or export it to ONNX yourself",
    ):
        rsi_deploy.export(Eigen(), "b", rank=4)
    assert not (here / "b").exists()


def test_inputs_that_no_array_can_feed(here):
    whole = onnx.load("m.onnx")
    shapeless = onnx.load("m.onnx")
    shapeless.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="input input has no shape, not even a rank; run onnx.shape_inference first"):
        model_inputs(shapeless)
    sequence = onnx.load("m.onnx")
    sequence.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("input", TensorProto.FLOAT, [1]))
    with pytest.raises(ModelError, match="input input is a sequence, but only tensors"):
        model_inputs(sequence)
    assert [spec.name for spec in model_inputs(whole)] == ["input"]


def test_a_call_that_fails_beside_others():
    def failing():
        raise RuntimeError("out of memory")

    with pytest.raises(ModelError, match="a concurrent run failed: out of memory; give fewer --streams"):
        together([failing, lambda: None], 0.01)


def test_outputs_of_another_shape():
    one, other = [np.zeros((2, 3), np.float32)], [np.zeros((2, 4), np.float32)]
    with pytest.raises(GateError, match="split: output 0 has shape \\(2, 4\\), expected \\(2, 3\\)"):
        compare_outputs(one, other, what="split")


def test_errors_without_source(monkeypatch):
    monkeypatch.setattr(error_table, "PACKAGES", ("absent",))
    error_table.read_errors.cache_clear()
    with pytest.raises(ModelError, match="absent has no source to read the errors from; pip install rsi-deploy"):
        error_table.read_errors()


@pytest.mark.parametrize(
    ("inputs", "more", "words"),
    [
        ([], {}, "there are no inputs; expected one for each input of the model"),
        ([{}, {}], {}, "input x is repeated"),
        ([{}], {"raw_input_contents": [b"", b""]}, "2 raw_input_contents for 1 inputs; expected one for each"),
        ([{"datatype": "FP16"}], {}, "input x: FP16 has no contents; send raw_input_contents"),
        ([{"shape": [1, 3]}], {}, "input x: 2 values came, but shape says [1, 3]"),
        ([{"contents": {"int_contents": [1, 2]}}], {}, "input x: FP32 is sent in fp32_contents, but got int_contents"),
        (
            [{"parameters": {"classification": {"int64_param": 3}}}],
            {},
            "the extension of parameter classification is not supported",
        ),
    ],
)
def test_what_a_grpc_request_can_get_wrong(inputs, more, words):
    pb = pytest.importorskip("tritonclient.grpc.service_pb2", reason="needs the extra serve")
    from rsi_deploy.serving.protocol.refusal import Refusal
    from rsi_deploy.serving.transports.grpc_app import decode

    given = {"name": "x", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}}
    right = decode(pb.ModelInferRequest(inputs=[given]))
    np.testing.assert_array_equal(right.feeds["x"], [[1, 2]])
    with pytest.raises(Refusal) as caught:
        decode(pb.ModelInferRequest(inputs=[given | changed for changed in inputs], **more))
    assert (caught.value.status, words in caught.value.message) == (400, True), caught.value.message
