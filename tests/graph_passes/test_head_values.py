"""A split in the form "heads" makes both projections of an attention smaller, and changes nothing but rounding."""

from __future__ import annotations

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
from graph_passes.split_markers import found_splits
from rsi_deploy.runtime.parity import rotated_identity

SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
HEADS, SIZE = 3, 4
W = {"w": numbers(5, 12), "b": numbers(12, seed=2), "o": numbers(12, 6)}
APART, BACK = {"s": np.array([0, 0, 3, 4])}, {"z": np.array([0, 0, 12])}
TOKENS = "(float[N,S,5] x, float[N,3,S,S] p) => (float[N,S,A] y)"
VALUES = "h = MatMul(x, w)  g = Add(h, b)  i = Reshape(g, s)  v = Transpose<perm = [0, 2, 1, 3]>(i)"
JOIN = "j = Transpose<perm = [0, 2, 1, 3]>(m)  k = Reshape(j, z)"
PLAIN = f"{VALUES}  m = MatMul(p, v)  {JOIN}  y = MatMul(k, o)"
FUSED = "(float[N,7,5] x, float[N,3,7,4] q, float[N,3,7,4] r) => (float[N,S,A] y)"
ROWS = "(float[N,7,5] x, float[N,7,12] q, float[N,7,12] r) => (float[N,S,A] y)"

BODIES = {
    "plain": (TOKENS, PLAIN, W | APART | BACK),
    "fixed positions": (
        TOKENS.replace("S,5", "7,5").replace("S,S", "7,7"),
        PLAIN,
        W | {"s": np.array([-1, 7, 3, 4]), "z": np.array([-1, 7, 12])},
    ),
    "last size open": (
        TOKENS,
        PLAIN,
        W | {"s": np.array([0, 0, 3, -1]), "z": np.array([0, 0, -1])},
    ),
    "computed sizes": (
        TOKENS,
        "e = Shape<start = 0, end = 1>(x)  f = Shape<start = 1, end = 2>(x)  s = Concat<axis = 0>(e, f, open, four)"
        f"  {VALUES}  m = MatMul(p, v)  z = Concat<axis = 0>(e, f, twelve)  {JOIN}  y = MatMul(k, o)",
        W | {"open": np.array([-1]), "four": np.array([4]), "twelve": np.array([12])},
    ),
    "gathered sizes": (
        TOKENS,
        "e = Shape(x)  f = Gather(e, zero)  g2 = Gather(e, one)  f1 = Unsqueeze(f, zeros)  f2 = Unsqueeze(g2, zeros)"
        "  s = Concat<axis = 0>(f1, f2, apart)"
        f"  {VALUES}  m = MatMul(p, v)  z = Concat<axis = 0>(f1, f2, open)  {JOIN}  y = MatMul(k, o)",
        W
        | {"open": np.array([-1]), "apart": np.array([3, 4]), "zeros": np.array([0])}
        | {"zero": np.array(0), "one": np.array(1)},
    ),
    "batch and heads in one axis": (
        "(float[7,N,5] x, float[M,7,7] p) => (float[R,A] y)",
        "h = MatMul(x, w)  g = Add(b, h)  i = Reshape(g, s)  v = Transpose<perm = [1, 0, 2]>(i)  m = MatMul(p, v)"
        "  j = Transpose<perm = [1, 0, 2]>(m)  k = Reshape(j, z)  y = Gemm<transB = 1>(k, t, c)",
        W | {"s": np.array([7, -1, 4]), "z": np.array([-1, 12]), "t": numbers(6, 12), "c": numbers(6)},
    ),
    "rows": (
        "(float[R,5] x, float[N,3,7,7] p) => (float[N,S,A] y)",
        f"{VALUES.replace('MatMul(x, w)  g = Add(h, b)', 'Gemm<transB = 1, alpha = 0.5>(x, t, b)  g = Identity(h)')}"
        f"  m = MatMul(p, v)  {JOIN}  y = MatMul(k, o)",
        W | {"t": numbers(12, 5), "s": np.array([-1, 7, 3, 4]), "z": np.array([-1, 7, 12])},
    ),
    "axes of one": (
        "(float[N,S,5] x, float[N,3,1,S,S] p) => (float[N,S,A] y)",
        f"{VALUES}  u = Unsqueeze(v, two)  m = MatMul(p, u)  n = Squeeze(m, two)  {JOIN.replace('(m)', '(n)')}"
        "  y = MatMul(k, o)",
        W | APART | BACK | {"two": np.array([2])},
    ),
    "the same for all heads": (
        TOKENS.replace("float[N,3,S,S] p", "float[S,S] p"),
        PLAIN,
        W | APART | BACK,
    ),
    "fused": (FUSED, f"{VALUES}  m = Attention(q, r, v)  {JOIN}  y = MatMul(k, o)", W | APART | BACK),
    "fused rows": (
        ROWS,
        "h = MatMul(x, w)  v = Add(h, b)  k = Attention<q_num_heads = 3, kv_num_heads = 3>(q, r, v)  y = MatMul(k, o)",
        W,
    ),
    "fused by onnxruntime": (
        ROWS,
        "h = MatMul(x, w)  v = Add(h, b)  k = com.microsoft.MultiHeadAttention<num_heads = 3>(q, r, v)"
        "  y = MatMul(k, o)",
        W,
    ),
}

REFUSED = {
    "activation": (TOKENS, f"{VALUES}  a = Relu(v)  m = MatMul(p, a)  {JOIN}  y = MatMul(k, o)", W | APART | BACK),
    "a scale for every number": (
        TOKENS,
        f"{VALUES}  a = Mul(v, f)  m = MatMul(p, a)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK | {"f": numbers(4)},
    ),
    "heads and positions mixed": (
        TOKENS.replace("S,5", "7,5").replace("S,S", "7,7"),
        f"{VALUES}  m = MatMul(p, v)  k = Reshape(m, z)  y = MatMul(k, o)",
        W | APART | {"z": np.array([-1, 7, 12])},
    ),
    "heads side by side in another order": (
        TOKENS,
        f"{VALUES}  m = MatMul(p, v)  j = Transpose<perm = [0, 2, 3, 1]>(m)  k = Reshape(j, z)  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "mixed numbers": (
        TOKENS.replace("3,S,S", "3,4,4"),
        f"{VALUES.replace('[0, 2, 1, 3]', '[0, 2, 3, 1]')}  m = MatMul(p, v)"
        "  j = Transpose<perm = [0, 3, 1, 2]>(m)  k = Reshape(j, z)  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "no attention": (TOKENS, f"{VALUES}  {JOIN.replace('(m)', '(v)')}  y = MatMul(k, o)", W | APART | BACK),
    "two readers": (
        TOKENS.replace("y)", "y, float[N,H,S,D] u)"),
        f"{VALUES}  m = MatMul(p, v)  u = Relu(v)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "an output between": (
        TOKENS.replace("y)", "y, float[N,H,S,D] v)"),
        PLAIN,
        W | APART | BACK,
    ),
    "a bias of heads apart": (
        TOKENS,
        f"{VALUES}  a = Add(v, f)  m = MatMul(p, a)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK | {"f": numbers(4)},
    ),
    "one number for all": (
        TOKENS,
        PLAIN,
        W | APART | BACK | {"b": numbers(1)},
    ),
    "shared heads of values": (
        "(float[N,7,5] x, float[N,7,24] q, float[N,7,12] r) => (float[N,S,A] y)",
        "h = MatMul(x, w)  k = Attention<q_num_heads = 6, kv_num_heads = 3>(q, r, h)  y = MatMul(k, o)",
        W | {"o": numbers(24, 6)},
    ),
    "a past": (
        FUSED.replace(") =>", ", float[N,3,2,4] d, float[N,3,2,4] e) =>"),
        f"{VALUES}  m, n, l = Attention(q, r, v, , d, e)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "sizes of unknown origin": (
        TOKENS.replace(" p)", " p, int64[4] s)"),
        PLAIN,
        W | BACK,
    ),
    "two rows of values in one": (
        TOKENS.replace("S,5", "7,5").replace("S,S", "14,14"),
        PLAIN,
        W | BACK | {"s": np.array([-1, 14, 3, 4]), "w": numbers(5, 24), "b": numbers(24)},
    ),
    "a chain without end": (
        TOKENS,
        f"{VALUES}  m = MatMul(p, v)  {JOIN.replace('(m)', '(c70)')}  c0 = Identity(m)  "
        + "  ".join(f"c{n + 1} = Identity(c{n})" for n in range(70))
        + "  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "computed axes": (
        TOKENS.replace(" p)", " p, int64[1] f)"),
        f"{VALUES}  u = Unsqueeze(v, f)  n = Squeeze(u, f)  m = MatMul(p, n)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "positions squeezed": (
        TOKENS,
        f"{VALUES}  u = Squeeze(v, two)  m = MatMul(p, u)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK | {"two": np.array([2])},
    ),
    "a copied size of another axis": (
        "(float[3,S,5] x, float[1,3,S,S] p) => (float[N,S,A] y)",
        f"{VALUES}  l = Reshape(v, c)  m = MatMul(p, l)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK | {"c": np.array([1, 0, -1, 0])},
    ),
    "sizes that do not fit": (
        TOKENS,
        PLAIN,
        W | APART | {"z": np.array([0, 0, 3])},
    ),
    "a copied size that is not there": (
        TOKENS,
        PLAIN,
        W | APART | {"z": np.array([-1, 12, 1, 1, 0])},
    ),
    "other axes than declared": (TOKENS, PLAIN, W | APART | BACK),
    "rows turned": (
        "(float[N,12,5] x, float[N,12,12] q, float[N,12,12] r) => (float[N,S,A] y)",
        "h = MatMul(x, w)  v = Transpose<perm = [0, 2, 1]>(h)"
        "  k = Attention<q_num_heads = 3, kv_num_heads = 3>(q, r, v)  y = MatMul(k, o)",
        W,
    ),
    "queries of unknown shape": (ROWS, BODIES["fused rows"][1], W),
    "other heads of queries": (
        FUSED.replace("[N,3,", "[N,6,"),
        f"{VALUES}  m = Attention(q, r, v)  {JOIN}  y = MatMul(k, o)",
        W | APART | BACK,
    ),
    "numbers for positions": (
        TOKENS.replace("S,5", "4,5").replace("S,S", "4,4"),
        f"{VALUES.replace('[0, 2, 1, 3]', '[0, 2, 3, 1]')}  m = MatMul(p, v)  {JOIN}  y = MatMul(k, o)",
        W | {"s": np.array([0, 0, 3, 4])} | BACK,
    ),
    "odd heads": (
        "(float[N,7,5] x, float[N,7,10] q, float[N,7,10] r) => (float[N,S,A] y)",
        "h = MatMul(x, w)  k = com.microsoft.MultiHeadAttention<num_heads = 5>(q, r, h)  y = MatMul(k, o)",
        W,
    ),
}


def built(signature: str, body: str, constants: dict[str, np.ndarray]) -> ir.Model:
    opsets = '"" : 23, "com.microsoft" : 1' if "Attention" in body else '"" : 18'
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]> g {signature} {{ {body} }}")
    for name, array in constants.items():
        if any(name in node.input for node in proto.graph.node):
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    if "com.microsoft" in body:  # which ONNX does not infer
        shape = ["N", 7, 12] if "12] q" in signature else ["N", 7, 10]
        proto.graph.value_info.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.FLOAT, shape))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def case(name: str) -> ir.Model:
    model = built(*(BODIES | REFUSED)[name])
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    declared = {
        "other axes than declared": ("j", ir.Shape([2, 5, 12])),
        "queries of unknown shape": ("q", None),
        "sizes that do not fit": ("k", ir.Shape([2, 5, 12])),
        "computed axes": ("n", ir.Shape([2, 3, 5, 4])),
        "sizes of unknown origin": ("v", ir.Shape([2, 3, 5, 4])),
    }
    if name in declared:
        values[declared[name][0]].shape = declared[name][1]
    return model


def feeds(model: ir.Model, sizes: dict[str, int] | None = None) -> dict[str, np.ndarray]:
    sizes = {"N": 2, "S": 5, "M": 2 * HEADS, "R": 14} | (sizes or {})
    return {
        value.name: numbers(*(dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape), seed=at)
        for at, value in enumerate(model.graph.inputs)
        if not value.is_initializer()
    }


def reader(model: ir.Model) -> Site:
    (found,) = [site for site in find_sites(model) if isinstance(site, Site) and "heads" in site.forms]
    return found


def blocks(kept: int, *, heads: int = HEADS, size: int = SIZE) -> np.ndarray:
    """A block for each head, `(heads * kept, heads * size)`."""
    right = np.zeros((heads, kept, heads, size), np.float32)
    right[np.arange(heads), :, np.arange(heads)] = numbers(heads, kept, size, seed=7)
    return right.reshape(heads * kept, -1)


def split_heads(model: ir.Model, right: np.ndarray, bias: np.ndarray | None = None) -> None:
    def factors(site: Site) -> SplitFactors | Dense:
        if "heads" not in site.forms:
            return Dense(reason="stays")
        left = site.load() @ np.linalg.pinv(right).astype(np.float32)
        return SplitFactors(left=left, right=right[None], form="heads", bias=bias)

    split(model, factors)


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("corrected", [False, True])
def test_a_folded_model_computes_what_the_split_computes(name, corrected):
    model, right = case(name), blocks(2)
    x, site, before = feeds(model), reader(model), count_parameters(model)
    assert site.units is not None
    assert (site.units.count, site.units.run) == (SIZE, HEADS)
    split_heads(model, right, numbers(site.bias_size, seed=9) if corrected else None)
    expected = run(model, **x)
    result = FoldUnitsPass()(model)
    assert len(result.folded) == 1, result.kept
    onnx.checker.check_model(ir.to_proto(model), full_check="com." not in BODIES[name][1])
    assert error(run(model, **x), expected) < 1e-5
    assert error(run(model, "ORT_DISABLE_ALL", **x), expected) < 1e-5
    if not corrected:
        assert count_parameters(model) == before - 2 * (site.units.numbers + HEADS * site.out_features)
        assert {k: n for k, n in ops(model).items() if k != "Constant"} == ops(case(name))
    found = found_splits(model)[site.node]
    assert (found.form, found.rank(1, site.in_features)) == ("heads", 2 * HEADS)
    other = case(name)  # blocks of other heads are seen
    wrong = right.reshape(HEADS, 2, HEADS, SIZE)[:, :, :, ::-1].reshape(right.shape)
    split_heads(other, np.ascontiguousarray(wrong))
    assert error(run(other, **x), expected) > 1e-2


@pytest.mark.parametrize("name", BODIES)
def test_the_rotated_identity_gives_the_dense_outputs_and_notices_heads_in_another_order(name):
    model = case(name)
    x, expected = feeds(model), run(case(name), **feeds(model))

    def checked(change) -> float:
        model = case(name)
        split(model, lambda site: rotated_identity(site, "heads") if "heads" in site.forms else Dense(reason="stays"))
        (first,) = [node for node in model.graph if node.metadata_props.get("rsi_deploy.split") == "bases"]
        weight = first.inputs[1]
        weight.const_value = ir.Tensor(change(weight.const_value.numpy()), name=weight.name)
        fold_splits(model)
        return error(run(model, **x), expected)

    def with_blocks(change):
        def changed(array: np.ndarray) -> np.ndarray:  # (columns, rank)
            parts = array.reshape(HEADS, SIZE, HEADS, SIZE)
            own = change(parts[np.arange(HEADS), :, np.arange(HEADS)])
            made = np.zeros_like(parts)
            made[np.arange(HEADS), :, np.arange(HEADS)] = own
            return made.reshape(array.shape)

        return changed

    assert checked(lambda array: array) < 1e-6
    assert checked(with_blocks(lambda own: own.swapaxes(1, 2))) > 1e-2
    assert checked(with_blocks(lambda own: own[::-1])) > 1e-2


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_numbers_or_heads_is_no_site_of_the_form(name):
    assert not [site for site in find_sites(case(name)) if isinstance(site, Site) and "heads" in site.forms]


def test_a_matrix_that_mixes_heads_is_not_folded():
    model, right = case("plain"), blocks(2)
    right[0, -1] = 1
    split_heads(model, right)
    x = feeds(model)
    expected = run(model, **x)
    result = FoldUnitsPass()(model)
    assert not result.folded
    assert "heads" in result.kept[0].reason
    assert error(run(model, **x), expected) == 0
    uneven = case("plain")
    split_heads(uneven, blocks(2)[:-1])
    assert not FoldUnitsPass()(uneven).folded


def test_shared_and_overridable_weights_are_no_sites_of_the_form():
    signature, body, constants = BODIES["plain"]
    twice = built(signature.replace("y)", "y, float[N,S,C] e)"), f"{body}  e = MatMul(x, w)", constants)
    assert not [site for site in find_sites(twice) if isinstance(site, Site) and "heads" in site.forms]
    model = built(signature.replace(" p)", " p, float[5,12] w)"), body, constants)
    assert not [site for site in find_sites(model) if isinstance(site, Site) and "heads" in site.forms]
    assert [s for s in find_sites(model, overridable=True) if isinstance(s, Site) and "heads" in s.forms]


def test_sizes_that_others_share_stay():
    """Reshapes of queries and values often share one constant."""
    signature, body, constants = BODIES["fixed positions"]
    text = signature.replace("=> (", "=> (float[N,D,E,F] e, ")
    model = built(text, f"{body}  f = MatMul(x, u)  e = Reshape(f, s)", constants | {"u": numbers(5, 12, seed=3)})
    x = feeds(model)
    split_heads(model, blocks(1))
    expected = run(model, **x)
    assert FoldUnitsPass()(model).folded
    assert error(run(model, **x), expected) < 1e-5


def test_weights_in_a_file_are_multiplied_when_the_model_is_saved(tmp_path: Path):
    ir.save(case("plain"), tmp_path / "dense.onnx", external_data="dense.data", size_threshold_bytes=0)
    model, other = ir.load(tmp_path / "dense.onnx"), case("plain")
    for each in (model, other):
        split_heads(each, blocks(2))
    expected = run(other, **feeds(other))
    assert len(FoldUnitsPass()(model).folded) == 1
    assert any(isinstance(value.const_value, ir.LazyTensor) for value in model.graph.initializers.values())
    ir.save(model, tmp_path / "small.onnx")
    again = ir.load(tmp_path / "small.onnx")
    assert error(run(again, **feeds(again)), expected) < 1e-5


def test_facts_name_what_a_number_of_all_heads_costs():
    units = reader(case("plain")).units
    assert units is not None
    assert (units.form, units.makers, len(units.nodes)) == ("heads", ("w",), 2)
    assert units.numbers == HEADS * (5 + 1)
    assert units.beside == HEADS
    assert replace(units, form="units") != units


@settings(max_examples=60, **SETTINGS)
@given(data=st.data())
def test_random_layouts(data):
    """Batch, heads and positions in any order of axes, apart or in one axis, fixed or open."""
    draw = data.draw
    heads, size, batch, positions = (draw(st.integers(low, 5)) for low in (1, 2, 1, 1))
    kept, merged = draw(st.integers(1, size)), draw(st.booleans())
    outer = draw(st.sampled_from(["NH", "HN"]))
    order = draw(st.sampled_from(["NS", "SN"]))
    is_open = draw(st.booleans())
    if is_open and not merged:
        heads = max(heads, 2)  # one head may be broadcast against probabilities of an unknown number of heads
    sizes = {"N": batch, "S": positions, "H": heads}
    constants = {"w": numbers(5, heads * size), "b": numbers(heads * size), "o": numbers(heads * size, 6)}
    front = [sizes[axis] for axis in order]
    apart = [-1 if is_open and axis == "N" else sizes[axis] for axis in order]
    axes = [*order, "H", "D"]
    constants |= {"s": np.array([*apart, heads, size]), "z": np.array([*apart, heads * size])}
    perm = [axes.index(axis) for axis in (*outer, "S", "D")]
    back = [(*outer, "S", "D").index(axis) for axis in axes]
    values = f"h = MatMul(x, w) g = Add(h, b) i = Reshape(g, s) v = Transpose<perm = {perm}>(i)"
    shape = [sizes[axis] for axis in outer]
    if merged:
        constants |= {"c": np.array([-1 if is_open else batch * heads, positions, size])}
        open_outer = [-1 if is_open and axis == "N" else sizes[axis] for axis in outer]
        constants |= {"d": np.array([*open_outer, positions, size])}
        mixed, shape = "l = Reshape(v, c) n = MatMul(p, l) m = Reshape(n, d)", [batch * heads]
    else:
        mixed = "m = MatMul(p, v)"
    names = [("N" if axis == "N" else str(sizes[axis])) if is_open else str(sizes[axis]) for axis in order]
    first = ",".join(["M"] if merged and is_open else ["Q", "R"] if is_open and not merged else map(str, shape))
    signature = f"(float[{','.join(names)},5] x, float[{first},{positions},{positions}] p) => (float[A,B,C] y)"
    body = f"{values} {mixed} j = Transpose<perm = {back}>(m) k = Reshape(j, z) y = MatMul(k, o)"
    model = built(signature, body, constants)
    x = {"x": numbers(*front, 5, seed=3), "p": numbers(*shape, positions, positions, seed=4)}
    dense = run(model, **x)
    split_heads(model, blocks(kept, heads=heads, size=size))
    expected = run(model, **x)
    assert len(FoldUnitsPass()(model).folded) == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert error(run(model, **x), expected) < 1e-4
    assert kept < size or error(expected, dense) < 1e-3
