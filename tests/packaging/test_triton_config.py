import dataclasses
import json

import numpy as np
import pytest
from engines import asked, environment
from models import bundle_of, mixing, mlp_bundle, tokens
from nets import mlp_onnx, run_onnx
from served import Server

from rsi_deploy import ModelError, package
from rsi_deploy.io import onnx_file
from rsi_deploy.packaging.servable import Tensor, read_servable
from rsi_deploy.packaging.triton_config import TritonSettings, config_text, proto_text


@pytest.fixture(scope="module")
def mlp(tmp_path_factory):
    return mlp_bundle(tmp_path_factory.mktemp("mlp"))


def config(folder, name="mlp"):
    """Return the config as Triton's own protobuf reads it; an unknown field is an error there."""
    python = environment("triton")
    return json.loads(asked(python, "check_config.py", folder / "models" / name / "config.pbtxt"))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# -- the config, read by Triton's protobuf


@pytest.mark.triton
def test_a_batched_model(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="triton", max_batch=16, max_delay_ms=2.5, instances=2, threads=3)
    assert config(tmp_path / "p") == {
        "name": "mlp",
        "backend": "onnxruntime",
        "max_batch_size": 16,
        "input": [{"name": "input", "data_type": "TYPE_FP32", "dims": ["12"]}],
        "output": [{"name": "output", "data_type": "TYPE_FP32", "dims": ["10"]}],
        "dynamic_batching": {"max_queue_delay_microseconds": "2500"},
        "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
        "parameters": {"intra_op_thread_count": {"string_value": "3"}},
        "model_warmup": [
            {
                "name": f"batch {size}",
                "batch_size": size,
                "inputs": {"input": {"data_type": "TYPE_FP32", "dims": ["12"], "random_data": True}},
            }
            for size in (1, 16)
        ],
    }


@pytest.mark.triton
def test_a_gpu_with_tensorrt(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="triton", device="gpu", tensorrt="fp16")
    found = config(tmp_path / "p")
    assert found["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    (accelerator,) = found["optimization"]["execution_accelerators"]["gpu_execution_accelerator"]
    assert accelerator["name"] == "tensorrt"
    assert accelerator["parameters"]["precision_mode"] == "FP16"


@pytest.mark.triton
def test_integers_dynamic_shapes_and_scalars_of_a_sample(tmp_path):
    made = bundle_of(tokens(tmp_path / "t.onnx"), tmp_path / "t", input_shape=["ids=2x7"])
    package(made, tmp_path / "p", target="triton")
    found = config(tmp_path / "p", "t")
    assert [(i["name"], i["data_type"], i["dims"]) for i in found["input"]] == [
        ("ids", "TYPE_INT64", ["-1"]),
        ("mask", "TYPE_INT64", ["-1"]),
    ]
    assert [(o["name"], o["data_type"], o["dims"], "reshape" in o) for o in found["output"]] == [
        ("vector", "TYPE_FP32", ["32"], False),
        ("score", "TYPE_FP32", ["1"], True),
        ("same", "TYPE_INT64", ["-1"], False),
    ]
    warm = found["model_warmup"][0]["inputs"]["ids"]
    assert warm == {"data_type": "TYPE_INT64", "dims": ["7"], "zero_data": True}


@pytest.mark.triton
@pytest.mark.parametrize(
    ("make", "dims", "why"),
    [
        (lambda path: mlp_onnx(path, batch=2), ["2", "12"], "input input (2, 12) has no dynamic first dimension"),
        (mixing, ["-1", "32"], "samples are not proved independent: ReduceMean 'm' reduces over"),
    ],
)
def test_dependent_samples_are_not_batched(tmp_path, make, dims, why):
    made = bundle_of(make(tmp_path / "m.onnx"), tmp_path / "m")
    result = package(made, tmp_path / "p", target="triton")
    found = config(tmp_path / "p", "m")
    assert found["input"][0]["dims"] == dims
    assert found.get("max_batch_size", 0) == 0
    assert "dynamic_batching" not in found
    assert result.batched is False
    assert why in result.notes[0]
    assert f"# Not batched: {why}" in (tmp_path / "p" / "models" / "m" / "config.pbtxt").read_text()


@pytest.mark.triton
def test_triton_s_protobuf_refuses_an_unknown_field(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="triton")
    path = tmp_path / "p" / "models" / "mlp" / "config.pbtxt"
    for right, wrong in (("max_batch_size", "max_batch"), ("TYPE_FP32", "TYPE_FLOAT"), ("KIND_CPU", '"KIND_CPU"')):
        text = path.read_text()
        path.write_text(text.replace(right, wrong))
        with pytest.raises(AssertionError, match="ParseError"):
            config(tmp_path / "p")
        path.write_text(text)


# -- the repository


def test_the_dense_model_as_another_version(mlp, tmp_path):
    result = package(mlp, tmp_path / "p", target="triton", dense=mlp.parent / "mlp.onnx")
    assert files(tmp_path / "p" / "models") == ["mlp/1/model.onnx", "mlp/2/model.onnx", "mlp/config.pbtxt"]
    dense, compressed = (tmp_path / "p" / "models" / "mlp" / version / "model.onnx" for version in "12")
    assert dense.read_bytes() == (mlp.parent / "mlp.onnx").read_bytes()
    assert compressed.read_bytes() == (mlp / "model.onnx").read_bytes()
    assert "version_policy {\n  all {\n  }\n}" in (tmp_path / "p" / "models" / "mlp" / "config.pbtxt").read_text()
    assert "version 1 the dense one" in (tmp_path / "p" / "README.md").read_text()
    assert result.notes == ()


def test_the_dense_model_under_another_name(mlp, tmp_path):
    package(mlp, tmp_path / "p", target="triton", dense=mlp.parent / "mlp.onnx", dense_as="name", backend="python")
    found = files(tmp_path / "p" / "models")
    assert [name for name in found if name.startswith("mlp-dense/")] == [
        "mlp-dense/1/model.onnx",
        "mlp-dense/1/model.py",
        "mlp-dense/config.pbtxt",
    ]
    text = (tmp_path / "p" / "models" / "mlp-dense" / "config.pbtxt").read_text()
    assert 'name: "mlp-dense"\nbackend: "python"' in text
    assert "version_policy" not in text


def test_a_kept_dense_model_is_named(tmp_path):
    made = mlp_bundle(tmp_path, keep_dense=True)
    result = package(made, tmp_path / "p", target="triton")
    assert f"--dense {made / 'dense.onnx'}" in result.notes[0]
    package(made, tmp_path / "q", target="triton", dense=made / "dense.onnx")
    assert "mlp/1/dense.onnx.data" in files(tmp_path / "q" / "models")


def test_external_weights_are_copied(tmp_path, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    package(mlp_bundle(tmp_path, rank=8, sizes=(12, 64, 64, 10)), tmp_path / "p", target="triton")
    assert files(tmp_path / "p" / "models") == ["mlp/1/model.onnx", "mlp/1/model.onnx.data", "mlp/config.pbtxt"]
    session = onnxruntime.InferenceSession(tmp_path / "p" / "models" / "mlp" / "1" / "model.onnx")
    assert session.run(None, {"input": np.ones((2, 12), np.float32)})[0].shape == (2, 10)


def test_the_readme_s_client_runs(mlp, tmp_path):
    """It runs against our own server, which has the same protocol as Triton."""
    pytest.importorskip("tritonclient.http")
    package(mlp, tmp_path / "p", target="triton")
    code = (tmp_path / "p" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "localhost:8000" in code
    with Server(f"mlp={mlp}") as server:
        code, found = code.replace("localhost:8000", server.http), {}
        exec(code, found)
        (want,) = run_onnx(mlp / "model.onnx", found["arrays"])
        np.testing.assert_allclose(found["answer"], want, rtol=0, atol=1e-5)
        with pytest.raises(Exception, match="nobody"):
            exec(code.replace('infer("mlp"', 'infer("nobody"'), {})


def test_strings_are_escaped():
    assert proto_text({"name": 'a"b\\c\nd'}) == 'name: "a\\"b\\\\c\\nd"\n'


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        (
            "bfloat16",
            ("n", 10),
            "output y is bfloat16, which Triton does not support; it supports tensors of bool",
        ),
        (
            "float",
            ("n", 0),
            "output y has a dimension of 0, which Triton does not support; export",
        ),
        ("float", (0, 10), ""),
    ],
)
def test_tensors_that_triton_does_not_support(mlp, kind, shape, words):
    """The size of the batch axis does not matter: the config does not have it."""
    settings = TritonSettings(
        backend="onnxruntime", max_batch=8, max_delay_ms=1, instances=1, threads=1, device="cpu", tensorrt="off"
    )
    model = dataclasses.replace(read_servable(mlp), outputs=(Tensor(name="y", type=kind, shape=shape),))
    if not words:
        assert "dims: [10]" in config_text("mlp", model, settings, versions=1)
        return
    with pytest.raises(ModelError, match=words):
        config_text("mlp", model, settings, versions=1)
