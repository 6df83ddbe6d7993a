import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import graph_passes as gp
from rsi_deploy import rewrite
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io import onnx_file


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for index, (rows, columns) in enumerate([(64, 96), (96, 64), (64, 8)]):
        name = f"w{index}"
        values = (rng.standard_normal((rows, 6)) @ rng.standard_normal((6, columns))).astype(np.float32)
        weights.append(numpy_helper.from_array(values, name))
        nodes.append(helper.make_node("MatMul", [value, name], [f"h{index}"], name=f"fc{index}"))
        value = f"h{index}"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    y = helper.make_tensor_value_info(value, TensorProto.FLOAT, ["n", 8])
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def ran(path, x):
    return onnxruntime.InferenceSession(path).run(None, {"x": x})[0]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_streamed_or_in_memory_the_result_is_the_same(source, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", limit)
    target = tmp_path / "out.onnx"
    result = rewrite(source, target, rank=6)
    assert [site.rank for site in result.sites] == [6, 6, 6]
    assert (tmp_path / "out.onnx.data").exists() == (limit == 0)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file() and not p.name.startswith("out.onnx")) == []
    onnx.checker.check_model(target, full_check=True)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    dense = ran(source, x)
    source.with_name("m.data").unlink()  # the result leans on no other file
    found = ran(target, x)
    # the weights have rank 6, so the product is theirs but for float32 rounding
    assert np.linalg.norm(found - dense) <= 1e-5 * np.linalg.norm(dense)
    assert np.linalg.norm(2 * found - dense) > 1e-5 * np.linalg.norm(dense)


def test_streamed_and_in_memory_factors_are_the_same_bytes(source, tmp_path, monkeypatch):
    rewrite(source, tmp_path / "a.onnx", rank=4)
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 0)
    rewrite(source, tmp_path / "b.onnx", rank=4)
    hashes = [onnx_file.weights_hash(onnx_file.read_onnx(tmp_path / name)) for name in ("a.onnx", "b.onnx")]
    assert hashes[0] == hashes[1]
    assert hashes[0] != onnx_file.weights_hash(onnx_file.read_onnx(source))


def test_rewriting_twice_changes_nothing(source, tmp_path):
    rewrite(source, tmp_path / "a.onnx", rank=4)
    again = rewrite(tmp_path / "a.onnx", tmp_path / "b.onnx", rank=4)
    assert not any(isinstance(node, gp.Split) for node in again.nodes)
    assert all("already split" in node.reason for node in again.nodes)
    assert onnx.load(tmp_path / "a.onnx").graph == onnx.load(tmp_path / "b.onnx").graph


def test_a_failure_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 0)
    monkeypatch.setattr("rsi_deploy.onnx_models.site_factorizer.factorize_site", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rewrite(source, tmp_path / "out.onnx", rank=4)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_what_is_there_stays(source, tmp_path):
    (tmp_path / "out.onnx").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        rewrite(source, tmp_path / "out.onnx", rank=4)
    assert (tmp_path / "out.onnx").read_text() == "mine"
    with pytest.raises(UsageError, match="no such file"):
        rewrite(tmp_path / "none.onnx", tmp_path / "b.onnx", rank=4)


def test_a_model_that_is_replaced_is_whole_at_any_moment(source, tmp_path, monkeypatch):
    """Its data are not written over: the new ones have another name until the new model stands."""
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 0)
    target = tmp_path / "out.onnx"
    rewrite(source, target, rank=6)
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    whole, seen, real = ran(target, x), [], os.replace

    def replace(a, b):
        real(a, b)
        seen.append(ran(target, x))

    monkeypatch.setattr(os, "replace", replace)
    rewrite(source, target, rank=4, force=True)
    assert len(seen) == 2
    np.testing.assert_array_equal(seen[0], whole)
    assert not np.allclose(seen[1], whole, rtol=1e-3)
    np.testing.assert_array_equal(seen[1], ran(target, x))
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["out.onnx", "out.onnx.data2"]
    rewrite(source, target, rank=6, force=True)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["out.onnx", "out.onnx.data"]
    np.testing.assert_array_equal(ran(target, x), whole)


def test_the_input_is_never_the_output_by_whatever_name(source, tmp_path):
    before = {path.name: path.read_bytes() for path in source.parent.iterdir()}
    (source.parent / "hard.onnx").hardlink_to(source)
    (source.parent / "soft.onnx").symlink_to(source)
    for target in (source, source.with_name("hard.onnx"), source.with_name("soft.onnx"), source.with_name("m.data")):
        with pytest.raises(UsageError, match="is the model that is read"):
            rewrite(source, target, rank=4, force=True)
    assert {name: (source.parent / name).read_bytes() for name in before} == before


def test_a_weight_of_nan_is_named_with_what_leaves_it_dense(source, tmp_path):
    model = onnx.load(source)
    values = numpy_helper.to_array(model.graph.initializer[1]).copy()
    values[2, 3] = np.nan
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(values, "w1"))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match=r"'w1'.*NaN.* \(type --exclude 'w1' to leave it dense\)"):
        rewrite(tmp_path / "nan.onnx", tmp_path / "out.onnx", max_error="50%")
    assert not (tmp_path / "out.onnx").exists()
    made = rewrite(tmp_path / "nan.onnx", tmp_path / "out.onnx", max_error="50%", exclude=["w1"])
    assert {site.name: site.decision for site in made.sites} == {"w0": "split", "w1": "dense", "w2": "split"}
