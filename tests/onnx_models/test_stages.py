"""Programs cut from graphs written as text: nothing lost, nothing twice, nothing before its time."""

import onnx
import pytest

from rsi_deploy.onnx_models.calibration.stages import cut, needed_constants, reads
from tests import flows

CHAIN = """agraph (float[n, 4] x) => (float[n, 2] y) <float[4, 4] a, float[4, 4] b, float[4, 2] c> {
  h = MatMul(x, a)
  r = Relu(h)
  k = MatMul(r, b)
  s = Add(k, r)
  y = MatMul(s, c)
}"""

ATTENTION = """agraph (float[n, 4] x) => (float[n, 4] y, float[n, 4] side)
<float[4, 4] wq, float[4, 4] wk, float[4, 4] wv, float[4, 4] wo> {
  side = Neg(x)
  q = MatMul(x, wq)
  k = MatMul(x, wk)
  kt = Transpose <perm = [1, 0]> (k)
  v = MatMul(x, wv)
  s = MatMul(q, kt)
  p = Softmax(s)
  o = MatMul(p, v)
  y = MatMul(o, wo)
}"""

CONSTANTS = """agraph (float[n, 4] x) => (float[n, 4] y) <float[4, 4] w, float[4] bias, int64[1] one = {1}> {
  turned = Transpose <perm = [1, 0]> (w)
  twice = Add(turned, turned)
  three = Constant <value_float = 3.0> ()
  h = MatMul(x, twice)
  noise = RandomNormal <shape = [4]> ()
  g = Add(h, noise)
  k = MatMul(g, turned)
  y = Mul(k, three)
}"""

BRANCH = """agraph (bool c, float[n, 4] x) => (float[n, 4] y) <float[4, 4] a, float[4, 4] b, float[4] shift> {
  h = MatMul(x, a)
  m = Relu(h)
  z = If (c) <
    then_branch = then_graph () => (float[n, 4] t) {
      inner = Add(m, shift)
      t = Relu(inner)
    },
    else_branch = else_graph () => (float[n, 4] e) { e = Identity(x) }
  >
  y = MatMul(z, b)
}"""

LOOSE = """agraph (float[n, 4] x, float[n, 4] z) => (float[n, 4] y, float[n, 4] u) <float[4, 4] a> {
  y = MatMul(x, a)
  u = Neg(z)
}"""

# text, outputs of the sites, sites in each wave
GRAPHS = {
    "chain": (CHAIN, ["h", "k", "y"], [["h"], ["k"], ["y"]]),
    "some of a chain": (CHAIN, ["k"], [["k"], []]),
    "none": (CHAIN, [], [[]]),
    "attention": (ATTENTION, ["q", "k", "v", "y"], [["q", "k", "v"], ["y"]]),
    "constants": (CONSTANTS, ["h", "k"], [["h"], ["k"], []]),
    "branch": (BRANCH, ["h", "y"], [["h"], ["y"]]),
    "loose end": (LOOSE, ["y"], [["y"]]),
}
each_graph = pytest.mark.parametrize(("text", "sites", "waves"), GRAPHS.values(), ids=GRAPHS)


model_of = flows.text_model


def names(nodes):
    return [node.output[0] for node in nodes]


def check_program(program):
    """Every node exactly once, and each reads only what is there, from what is said to be alive."""
    graph = program.model.graph
    parts = [(wave, part) for wave in program.waves for part in (wave.nodes, wave.sites)]
    done = [name for _, part in parts for name in names(part)]
    assert sorted(done + list(dict.fromkeys(names(program.constants.values())))) == sorted(names(graph.node))
    alive = {value.name for value in graph.input}
    for wave in program.waves:
        here = set(alive)
        for node in (*wave.nodes, *wave.sites):
            assert reads(node) <= here | program.fixed, node.output[0]
            if node in wave.nodes:
                here |= set(node.output)
        made = {name for part in (wave.nodes, wave.sites) for node in part for name in node.output}
        alive = {value.name for value in graph.input} | ((alive | made) & wave.alive)
    assert {value.name for value in graph.output} <= alive | program.fixed


@each_graph
def test_every_node_stands_once_and_in_time(text, sites, waves):
    program = cut(model_of(text), sites)
    check_program(program)
    assert [names(wave.sites) for wave in program.waves] == waves


@each_graph
def test_the_check_rejects_what_is_wrong(text, sites, waves):
    model = model_of(text)
    program = cut(model, sites)
    if len(program.waves) > 1:
        wrong = type(program)(model=model, fixed=program.fixed, constants=program.constants, waves=program.waves[::-1])
        with pytest.raises(AssertionError):
            check_program(wrong)
    short = type(program)(model=model, fixed=program.fixed, constants=program.constants, waves=program.waves[1:])
    with pytest.raises(AssertionError):
        check_program(short)


@each_graph
def test_within_a_wave_no_site_reads_another(text, sites, waves):
    for wave in cut(model_of(text), sites).waves:
        made = {name for node in wave.sites for name in node.output}
        assert all(not made & reads(node) for node in wave.sites)
        behind = set(made)
        assert all(not behind & reads(node) for node in wave.nodes)


def test_what_is_made_of_constants_is_fixed_and_comes_along():
    program = cut(model_of(CONSTANTS), ["h", "k"])
    assert set(program.constants) == {"turned", "twice", "three"}
    assert "noise" not in program.fixed  # drawn once, not once a wave
    assert {"w", "one", "turned", "twice"} <= program.fixed
    by_name = {node.output[0]: node for node in program.model.graph.node}
    assert names(needed_constants(program, [by_name["h"]])) == ["turned", "twice"]
    assert names(needed_constants(program, [by_name["y"], by_name["k"]])) == ["turned", "three"]
    assert needed_constants(program, [by_name["g"]]) == []


def test_a_node_reads_what_its_subgraphs_take_from_outside():
    by_name = {node.output[0]: node for node in model_of(BRANCH).graph.node}
    assert reads(by_name["z"]) == {"c", "m", "shift", "x"}
    first, second = cut(model_of(BRANCH), ["h", "y"]).waves
    assert {"h", "c", "x"} <= first.alive
    assert "z" in second.alive
    assert not {"h", "c", "x", "m"} & second.alive


def test_subgraphs_in_subgraphs_and_their_own_names():
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["deep", "own"], ["out"])],
        "inner",
        [],
        [onnx.helper.make_tensor_value_info("out", 1, None)],
        [onnx.helper.make_tensor("own", 1, [1], [1.0])],
    )
    middle = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Relu", ["arg"], ["local"]),
            onnx.helper.make_node("If", ["local"], ["res"], then_branch=inner, else_branch=inner),
        ],
        "middle",
        [onnx.helper.make_tensor_value_info("arg", 1, None)],
        [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("res", "passed")],
    )
    node = onnx.helper.make_node("Loop", ["m", "", "v"], ["o", "p"], body=middle)
    assert reads(node) == {"m", "v", "deep", "passed"}


def test_overridable_initializers_are_constants():
    model = model_of(CHAIN)
    model.graph.input.append(onnx.helper.make_tensor_value_info("a", 1, [4, 4]))
    assert "a" in cut(model, ["h"]).fixed
