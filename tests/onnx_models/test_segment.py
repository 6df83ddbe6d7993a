"""Segments run piece by piece give what the whole model gives, and leave no file behind."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

import graph_passes as gp
from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.core.errors import ModelError
from rsi_deploy.linalg.solver import exact_svd
from rsi_deploy.onnx_models.calibration.rows import Taps
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import cut
from tests import flows

MLP = """agraph (float[n, 6] x) => (float[n, 3] y)
<float[6, 8] a, float[8] a_bias, float[8, 8] b, float[8, 3] c> {
  h = MatMul(x, a)
  g = Add(h, a_bias)
  r = Relu(g)
  k = MatMul(r, b)
  s = Add(k, r)
  y = MatMul(s, c)
}"""

SHARED = """agraph (float[n, 6] x) => (float[n, 6] y, float[6, 6] constant, float[n, 6] x_again)
<float[6, 6] w, float[6, 6] constant> {
  turned = Transpose <perm = [1, 0]> (w)
  h = MatMul(x, w)
  k = MatMul(h, turned)
  l = MatMul(k, turned)
  y = Add(l, x)
  x_again = Identity(x)
}"""

BRANCH = """agraph (float[n, 6] x, bool c) => (float[n, 6] y) <float[6, 6] a, float[6, 6] b, float[6] shift> {
  h = MatMul(x, a)
  m = Relu(h)
  z = If (c) <
    then_branch = then_graph () => (float[n, 6] t) {
      inner = Add(m, shift)
      t = Relu(inner)
    },
    else_branch = else_graph () => (float[n, 6] e) { e = Identity(x) }
  >
  y = MatMul(z, b)
}"""

LOOP = """agraph (float[n, 6] x) => (float[n, 6] y) <float[6, 6] a, float[6, 6] b, float[6] shift> {
  count = Constant <value_int = 3> ()
  h = MatMul(x, a)
  z = Loop (count, , h) <
    body = step (int64 i, bool go, float[n, 6] state) => (bool still, float[n, 6] next) {
      still = Identity(go)
      more = Add(state, shift)
      next = Add(more, h)
    }
  >
  y = MatMul(z, b)
}"""

SEQUENCE = """agraph (float[n, 6] x) => (float[n, 3] y) <float[6, 6] a, float[3, 3] b> {
  h = MatMul(x, a)
  three = Constant <value_int = 3> ()
  parts = SplitToSequence <axis = 1> (h, three)
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  first = SequenceAt(parts, zero)
  k = MatMul(first, b)
  second = SequenceAt(parts, one)
  y = Add(k, second)
}"""

# text, outputs of the sites, more inputs
MODELS = {
    "mlp": (MLP, ["h", "k", "y"], {}),
    "shared": (SHARED, ["h", "k", "l"], {}),
    "then": (BRANCH, ["h", "y"], {"c": np.array(True)}),
    "else": (BRANCH, ["h", "y"], {"c": np.array(False)}),
    "loop": (LOOP, ["h", "y"], {}),
    "sequence": (SEQUENCE, ["h", "k"], {}),
}
each_model = pytest.mark.parametrize(("text", "sites", "more"), MODELS.values(), ids=MODELS)


def made(tmp_path, text, *, external=False):
    return flows.saved(flows.text_model(text), tmp_path / "model.onnx", external=external)


def fed(more, count=5, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((count, 6)).astype(np.float32), **more}


def piecewise(path, sites, feeds, *, keep=None):
    """What a run wave by wave gives, only what is alive handed on."""
    model = onnx.load(path, load_external_data=False)
    program = cut(model, sites)
    live = dict(feeds)
    for wave in program.waves:
        with Segment(program, path, [*wave.nodes, *wave.sites], Taps(), wave.alive) as run:
            assert run.reads <= live.keys()
            live |= run(live)
        live = {name: value for name, value in live.items() if name in wave.alive or name in feeds}
    return {value.name: live[value.name] for value in model.graph.output if value.name in live}


@each_model
@pytest.mark.parametrize("external", [False, True])
def test_piece_by_piece_is_the_whole(tmp_path, text, sites, more, external):
    path, feeds = made(tmp_path, text, external=external), fed(more)
    expected = dict(zip([v.name for v in onnx.load(path).graph.output], flows.outputs(path, feeds), strict=True))
    before = sorted(tmp_path.iterdir())
    found = piecewise(path, sites, feeds)
    assert "y" in found
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6)
    assert sorted(tmp_path.iterdir()) == before
    other = piecewise(path, sites, fed(more, seed=1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(other["y"], expected["y"], rtol=1e-2, atol=1e-2)


def test_half_precision_and_functions(tmp_path):
    text = MLP.replace("float[", "float16[")
    path = flows.saved(flows.text_model(text), tmp_path / "half.onnx")
    feeds = {"x": fed({})["x"].astype(np.float16)}
    (expected,) = flows.outputs(path, feeds)
    np.testing.assert_allclose(piecewise(path, ["h", "k", "y"], feeds)["y"], expected, rtol=2e-2, atol=2e-2)
    model = flows.text_model(MLP)
    function = helper.make_function(
        "own", "Twice", ["u"], ["v"], [helper.make_node("Add", ["u", "u"], ["v"])], model.opset_import
    )
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = next(node for node in model.graph.node if node.op_type == "Relu")
    node.op_type, node.domain = "Twice", "own"
    path = flows.saved(model, tmp_path / "function.onnx")
    (expected,) = flows.outputs(path, fed({}))
    np.testing.assert_allclose(piecewise(path, ["h", "k", "y"], fed({}))["y"], expected, rtol=1e-5, atol=1e-6)


def replacement_of(path, name, rank=2, bias=0.3, form=None):
    site = flows.graph_sites(path)[name]
    left, right = exact_svd(torch.from_numpy(site.load(form or site.forms[0]).astype(np.float32)), rank)
    return Replacement(
        form or site.forms[0], left, right, torch.full((site.groups, site.bias_size // site.groups), bias)
    )


@pytest.mark.parametrize("external", [False, True])
def test_split_weights_are_split_as_in_the_whole(tmp_path, external):
    path = made(tmp_path, MLP, external=external)
    became = {name: replacement_of(path, name) for name in ("a", "b")}
    compressed = flows.really_split(path, tmp_path / "split.onnx", became)
    (expected,) = flows.outputs(compressed, fed({}))
    program = cut(onnx.load(path, load_external_data=False), ["h", "k", "y"])
    sites = flows.graph_sites(path)
    factors = {sites[name].weight: flows.graph_factors(became[name], sites[name]) for name in became}
    nodes = program.model.graph.node
    before = sorted(tmp_path.iterdir())
    with Segment(program, path, nodes, Taps(), ["y", "r"], factors) as run:
        assert run.keeps == ["r", "y"]
        found = run(fed({}))
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(flows.outputs(path, fed({}))[0], expected, rtol=1e-2, atol=1e-2)
    assert sorted(tmp_path.iterdir()) == before


def test_a_weight_that_cannot_be_split_is_an_error_and_leaves_no_file(tmp_path):
    path = made(tmp_path, MLP)
    program = cut(onnx.load(path), ["h", "k", "y"])
    factors = {"a_bias": gp.SplitFactors(left=np.ones((1, 3, 1), np.float32), right=np.ones((1, 1, 8), np.float32))}
    with (
        pytest.raises(ModelError, match="a_bias"),
        Segment(program, path, program.model.graph.node, Taps(), ["y"], factors) as run,
    ):
        run(fed({}))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_run_that_fails_says_so_and_leaves_no_file(tmp_path):
    path = made(tmp_path, MLP)
    program = cut(onnx.load(path), ["h", "k", "y"])
    with (
        pytest.raises(ModelError, match="a part of the model"),
        Segment(program, path, program.waves[0].sites, Taps(), ["h"]) as run,
    ):
        run({"x": np.zeros((2, 7), np.float32)})
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
