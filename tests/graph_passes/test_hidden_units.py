"""Hidden units that no split keeps are gone, and the model computes what it computes with zeros in their place."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from split_checks import error, numbers, ops, run

from graph_passes import Dense, FoldUnitsPass, Site, SplitFactors, count_parameters, find_sites, fold_splits, split
from graph_passes.hidden_units import UnitAxis
from graph_passes.split_markers import found_splits

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
ROWS = "(float[N,5] x) => (float[N,A] y)"
TOKENS = "(float[N,3,5] x) => (float[N,S,A] y)"
PICTURE = "(float[N,3,8,8] x) => (float[N,C,H,W] y)"
FLAT = "(float[N,3,8,8] x) => (float[N,A] y)"
MLP = {"w": numbers(5, 8), "b": numbers(8), "v": numbers(8, 6)}
CONV = {"w": numbers(8, 3, 3, 3), "b": numbers(8), "v": numbers(4, 8, 3, 3)}
NORM = {name: np.abs(numbers(8, seed=seed)) + np.float32(0.5) for seed, name in enumerate(("s", "t", "m", "r"))}

BODIES = {
    "product": (TOKENS, "h = MatMul(x, w)  g = Add(h, b)  a = Gelu(g)  y = MatMul(a, v)", MLP),
    "exact gelu": (
        TOKENS,
        "h = MatMul(x, w)  g = Add(b, h)  d = Div(g, two)  e = Erf(d)  f = Add(e, one)  i = Mul(g, f)  a = Mul(i, half)"
        " y = MatMul(a, v)",
        MLP | {"two": np.float32(1.5), "one": np.ones(1, np.float32), "half": np.full((1, 1, 1), 0.5, np.float32)},
    ),
    "gate": (
        TOKENS,
        "h = MatMul(x, w)  g = MatMul(x, u)  i = Sigmoid(h)  j = Mul(h, i)  a = Mul(j, g)  y = MatMul(a, v)",
        MLP | {"u": numbers(5, 8, seed=3)},
    ),
    "gemm": (
        ROWS,
        "h = Gemm<transB = 1>(x, w, b)  a = PRelu(h, s)  y = Gemm<transB = 1, beta = 0.5>(a, v, c)",
        {"w": numbers(8, 5), "b": numbers(8), "s": numbers(8), "v": numbers(6, 8), "c": numbers(6)},
    ),
    "channels": (
        PICTURE,
        "h = Conv<pads = [1, 1, 1, 1]>(x, w, b)  a = Relu(h)  p = MaxPool<kernel_shape = [2, 2]>(a)  y = Conv(p, v)",
        CONV,
    ),
    "depthwise": (
        PICTURE,
        "h = Conv(x, w)  n = BatchNormalization(h, s, t, m, r)  a = Clip(n, lo, hi)  d = Conv<group = 8>(a, k, b)"
        " e = HardSwish(d)  y = Conv(e, v)",
        CONV
        | NORM
        | {"w": numbers(8, 3, 1, 1), "k": numbers(8, 1, 3, 3), "v": numbers(4, 8, 1, 1)}
        | {"lo": np.float32(-1), "hi": np.float32(1)},
    ),
    "flatten": (
        FLAT,
        "h = Conv<strides = [3, 3]>(x, w, b)  a = Mul(h, s)  f = Flatten(a)  i = Tanh(f)  y = Gemm(i, v, c)",
        CONV | {"s": numbers(8, 1, 1), "v": numbers(32, 6), "c": numbers(6)},
    ),
    "reshape": (
        FLAT,
        "h = Conv<strides = [3, 3]>(x, w, b)  f = Reshape(h, z)  y = MatMul(f, v)",
        CONV | {"v": numbers(32, 6), "z": np.array([-1, 32])},
    ),
    "mean": (
        FLAT,
        "h = Conv(x, w, b)  a = Relu(h)  f = ReduceMean<axes = [2, 3], keepdims = 0>(a)  y = MatMul(f, v)",
        CONV | {"v": numbers(8, 6)},
    ),
    "transpose": (
        "(float[N,3,4,4] x) => (float[N,H,W,A] y)",
        "h = Conv(x, w, b)  a = Relu(h)  t = Transpose<perm = [0, 2, 3, 1]>(a)  y = MatMul(t, v)",
        CONV | {"v": numbers(8, 6)},
    ),
}

REFUSED = {
    "softmax": (TOKENS, "h = MatMul(x, w)  a = Softmax<axis = 2>(h)  y = MatMul(a, v)", MLP),
    "norm": (TOKENS, "h = MatMul(x, w)  a = LayerNormalization(h, b)  y = MatMul(a, v)", MLP),
    "two readers": (
        "(float[N,5] x) => (float[N,A] y, float[N,B] z)",
        "h = MatMul(x, w)  a = Relu(h)  y = MatMul(a, v)  z = MatMul(a, u)",
        MLP | {"u": numbers(8, 3)},
    ),
    "output between": (
        "(float[N,5] x) => (float[N,A] y, float[N,B] a)",
        "h = MatMul(x, w)  a = Relu(h)  y = MatMul(a, v)",
        MLP,
    ),
    "residual": (
        TOKENS,
        "h = MatMul(x, w)  a = Add(h, x)  y = MatMul(a, v)",
        MLP | {"w": numbers(5, 5), "v": numbers(5, 6)},
    ),
    "mixed by a reshape": (
        "(float[N,2,5] x) => (float[M,A] y)",
        "h = MatMul(x, w)  f = Reshape(h, z)  y = MatMul(f, v)",
        MLP | {"v": numbers(16, 6), "z": np.array([-1, 16])},
    ),
    "grouped": (
        PICTURE,
        "h = Conv<group = 3>(x, w)  y = Conv(h, v)",
        {"w": numbers(6, 1, 3, 3), "v": numbers(4, 6, 1, 1)},
    ),
    "summed over units": (
        FLAT,
        "h = Conv(x, w, b)  f = ReduceMean<axes = [1, 2], keepdims = 0>(h)  y = MatMul(f, v)",
        CONV | {"v": numbers(6, 6)},
    ),
    "one unit": (TOKENS, "h = MatMul(x, w)  y = MatMul(h, v)", {"w": numbers(5, 1), "v": numbers(1, 6)}),
}


def built(signature: str, body: str, constants: dict[str, np.ndarray], *, opset: int = 20) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {signature} {{ {body} }}')
    for name, array in constants.items():
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def case(name: str) -> ir.Model:
    signature, body, constants = (BODIES | REFUSED)[name]
    return built(signature, body, constants, opset=17 if "keepdims" in body or "LayerNorm" in body else 20)


def feeds(model: ir.Model) -> dict[str, np.ndarray]:
    (x,) = [value for value in model.graph.inputs if not value.is_initializer()]
    return {"x": numbers(*(dim if isinstance(dim, int) else 2 for dim in x.shape), seed=5)}


def reader(model: ir.Model) -> Site:
    (found,) = [site for site in find_sites(model) if isinstance(site, Site) and site.units is not None]
    return found


def keeping(site: Site, kept: np.ndarray, *, bias: np.ndarray | None = None) -> SplitFactors:
    """The weight without the other units."""
    assert site.units is not None
    places = UnitAxis(0, site.units.run).entries(kept)
    weight = site.load("units")
    right = np.eye(weight.shape[-1], dtype=weight.dtype)[places]
    return SplitFactors(left=np.ascontiguousarray(weight[..., places]), right=right[None], form="units", bias=bias)


def split_keeping(model: ir.Model, kept: np.ndarray, bias: np.ndarray | None = None) -> None:
    split(model, lambda site: keeping(site, kept, bias=bias) if site.units else Dense(reason="stays"))


def without(model: ir.Model, gone: np.ndarray) -> ir.Model:
    """The model whose reader has zeros in the columns of some units."""
    site = reader(model)
    assert site.units is not None
    value = model.graph.initializers[site.weight]
    weight = value.const_value.numpy().copy()
    columns = UnitAxis(0, site.units.run).entries(gone)
    is_rows = site.op_type == "MatMul" or (site.op_type == "Gemm" and weight.shape[0] == site.in_features)
    weight[(columns,) if is_rows else (slice(None), columns)] = 0
    value.const_value = ir.Tensor(weight, name=site.weight)
    return model


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("corrected", [False, True])
def test_units_that_are_left_out_are_gone(name, corrected):
    expected_of, model = without(case(name), np.array([0, 3, 4])), case(name)
    x, site, before = feeds(model), reader(model), count_parameters(model)
    assert site.units is not None
    assert site.units.count == 8
    kept = np.array([6, 1, 7, 2, 5])  # in another order
    expected, wrong = run(expected_of, **x), run(case(name), **x)
    bias = numbers(site.bias_size, seed=9) if corrected else None
    if bias is not None:
        expected = expected + bias.reshape(-1, *[1] * (expected.ndim - 2 if name in ("channels", "depthwise") else 0))
    split_keeping(model, kept, bias)
    selected = run(model, **x)
    result = FoldUnitsPass()(model)
    assert len(result.folded) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert error(selected, expected) < 1e-5
    assert error(run(model, **x), expected) < 1e-5
    assert error(run(model, "ORT_DISABLE_ALL", **x), expected) < 1e-5
    assert error(wrong, expected) > 1e-3
    if not corrected:
        rows, _ = site.shape("units")
        gone = 3 * (site.units.numbers + site.units.run * rows)
        assert count_parameters(model) == before - gone
        assert ops(model) - Counter(["Constant"]) == ops(case(name))
    found = found_splits(model)[site.node]
    assert (found.form, found.rank(1, site.in_features)) == ("units", 5 * site.units.run)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_unit_is_no_site_of_the_form(name):
    assert not [site for site in find_sites(case(name)) if isinstance(site, Site) and "units" in site.forms]


def test_each_refusal_is_due_to_what_stands_between():
    """The refused graphs have the form once the hindrance is gone."""
    signature, body, constants = REFUSED["softmax"]
    assert reader(built(signature, body.replace("Softmax<axis = 2>", "Tanh"), constants)).units is not None
    signature, body, constants = REFUSED["two readers"]
    model = built(signature.replace(", float[N,B] z", ""), body.partition(" z =")[0], constants)
    assert reader(model).units is not None


def test_shared_and_overridable_weights_have_no_units():
    shared = built(
        TOKENS,
        "h = MatMul(x, w)  a = Relu(h)  i = MatMul(a, w)  j = Relu(i)  y = MatMul(j, v)",
        {"w": numbers(5, 5), "v": numbers(5, 6)},
    )
    assert not [site for site in find_sites(shared) if isinstance(site, Site) and site.units]
    text = "(float[N,3,5] x, float[5,8] w) => (float[N,S,A] y)"
    model = built(text, "h = MatMul(x, w)  a = Relu(h)  y = MatMul(a, v)", MLP)
    assert not [site for site in find_sites(model) if isinstance(site, Site) and site.units]
    (site,) = [s for s in find_sites(model, overridable=True) if isinstance(s, Site) and s.units]
    assert site.units.makers == ("w",)


def test_a_selection_stays_where_its_units_got_another_reader():
    model = case("product")
    x, expected = feeds(model), run(without(case("product"), np.array([1, 2])), **feeds(model))
    split_keeping(model, np.array([0, 3, 4, 5, 6, 7]))
    (selection,) = [node for node in model.graph if node.metadata_props.get("rsi_deploy.split") == "selection"]
    data = selection.inputs[0]
    other = ir.Node("", "Identity", [data], outputs=[ir.Value(name="z", shape=data.shape, type=data.type)])
    selection.append(other)
    model.graph.outputs.append(other.outputs[0])
    result = FoldUnitsPass()(model)
    assert not result.folded
    assert data.name in result.kept[0].reason
    assert error(run(model, **x), expected) < 1e-5


def test_two_pairs_in_a_chain_are_folded_in_any_order():
    signature = FLAT
    body = "h = Conv(x, w, b)  a = Relu(h)  i = Conv(a, v)  j = Relu(i)  f = Flatten(j)  y = Gemm(f, u)"
    constants = CONV | {"u": numbers(64, 6)}
    model, x = built(signature, body, constants), feeds(built(signature, body, constants))
    expected = run(model, **x)
    split(
        model, lambda site: keeping(site, np.roll(np.arange(site.units.count), 1)) if site.units else Dense(reason="")
    )
    fold_splits(model)
    assert error(run(model, **x), expected) < 1e-5
    assert ops(model) == Counter({"Conv": 2, "Relu": 2, "Flatten": 1, "Gemm": 1})


def test_weights_in_a_file_are_cut_when_the_model_is_saved(tmp_path: Path):
    expected = run(without(case("gate"), np.array([0])), **feeds(case("gate")))
    ir.save(case("gate"), tmp_path / "dense.onnx", external_data="dense.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "dense.onnx")
    split_keeping(model, np.arange(1, 8))
    assert len(FoldUnitsPass()(model).folded) == 1
    assert any(isinstance(value.const_value, ir.LazyTensor) for value in model.graph.initializers.values())
    ir.save(model, tmp_path / "small.onnx")
    again = ir.load(tmp_path / "small.onnx")
    assert error(run(again, **feeds(again)), expected) < 1e-5


def test_a_matrix_that_selects_nothing_is_not_folded():
    model = case("product")
    x = feeds(model)
    split_keeping(model, np.arange(8))
    (selection,) = [node for node in model.graph if node.metadata_props.get("rsi_deploy.split") == "selection"]
    right = selection.inputs[1]
    right.const_value = ir.Tensor(numbers(8, 8), name=right.name)
    expected = run(model, **x)
    assert not FoldUnitsPass()(model).folded
    assert error(run(model, **x), expected) == 0


@settings(max_examples=40, **SETTINGS)
@given(data=st.data())
def test_random_chains(data):
    """Random operators between two products, with any units kept, compute what zeros in the place of the others do."""
    count, steps = data.draw(st.integers(2, 12)), []
    constants = {"w": numbers(5, count), "v": numbers(count, 6)}
    for at in range(data.draw(st.integers(0, 5))):
        kind = data.draw(st.sampled_from(["Relu", "Tanh", "Sigmoid", "bias", "scale", "square", "gate", "scalar"]))
        before, after = f"h{at}", f"h{at + 1}"
        if kind in ("bias", "scale", "scalar"):
            shape = (
                data.draw(st.sampled_from([(count,), (1, count), (3, count), (1, 3, 1)])) if kind != "scalar" else ()
            )
            constants[f"c{at}"] = numbers(*shape, seed=at)
            steps.append(f"{after} = {'Add' if kind == 'bias' else 'Mul'}({before}, c{at})")
        elif kind == "square":
            steps.append(f"{after} = Mul({before}, {before})")
        elif kind == "gate":
            constants[f"u{at}"] = numbers(5, count, seed=at)
            steps.append(f"g{at} = MatMul(x, u{at})  {after} = Mul({before}, g{at})")
        else:
            steps.append(f"{after} = {kind}({before})")
    body = f"h0 = MatMul(x, w) {' '.join(steps)} y = MatMul(h{len(steps)}, v)"
    kept = np.array(data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))])
    model = built(TOKENS, body, constants)
    x, gone = feeds(model), np.setdiff1d(np.arange(count), kept)
    expected = run(without(built(TOKENS, body, constants), gone), **x)
    split_keeping(model, kept)
    assert len(FoldUnitsPass()(model).folded) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert error(run(model, **x), expected) < 1e-4


def test_facts_name_what_goes_with_a_unit():
    units = reader(case("depthwise")).units
    assert units is not None
    assert units.makers == ("w",)
    assert len(units.nodes) == 2
    assert units.numbers == 3 + 4 + 9 + 1  # the row of w, the normalization, the filter, its bias
    assert units.beside == 4 + 9 + 1
    flat = reader(case("flatten")).units
    assert flat is not None
    assert (flat.count, flat.run) == (8, 4)
    assert replace(flat, run=1) != flat
