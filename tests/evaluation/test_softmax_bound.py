import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import mlp_onnx
from onnx import helper, numpy_helper

import graph_passes as gp
from rsi_deploy.core.errors import GateError
from rsi_deploy.evaluation import softmax_bound as bound_module
from rsi_deploy.evaluation.softmax_bound import checked_bound, find_head, softmax_bound

RNG = np.random.default_rng(0)


def truncated(weight, rank):
    u, s, vt = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    left, right = (u[:, :rank] * s[:rank])[None], vt[None, :rank]
    return gp.SplitFactors(left=left.astype(np.float32), right=right.astype(np.float32))


def weight_of(path, name):
    (found,) = (s for s in gp.find_sites(ir.load(path)) if s.weight == name)
    return found.load()[0]


def measured(path, rank, *, samples=200, factors=None, scale=1.0):
    head = find_head(ir.load(path))
    factors = factors or truncated(weight_of(path, head.weight), rank)
    x = (scale * np.random.default_rng(5).standard_normal((samples, 12))).astype(np.float32)
    return softmax_bound(path, head, factors, [{"input": part} for part in np.array_split(x, 3)])


# -- the bound itself


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 9, 10])
@pytest.mark.parametrize("scale", [0.01, 1, 30])
def test_the_bound_holds_on_random_heads(tmp_path, rank, scale, softmax):
    path = mlp_onnx(tmp_path / "m.onnx", seed=rank, softmax=softmax)
    result = measured(path, rank, scale=scale)
    assert (result.site, result.samples, result.violations, result.delta_norm_kind) == (
        "head.weight",
        200,
        0,
        "spectral",
    )
    assert 0 <= result.largest_ratio <= 1
    assert 0 <= result.guaranteed_unchanged <= result.observed_unchanged <= 100
    exact = np.linalg.svd(weight_of(path, "head.weight").astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(result.delta_norm, exact[rank] if rank < 10 else 0, rtol=1e-5, atol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]  # the tapped model is gone


def test_full_rank_guarantees_everything(tmp_path):
    result = measured(mlp_onnx(tmp_path / "m.onnx"), 10)
    assert result.guaranteed_unchanged == result.observed_unchanged == 100


def test_the_bound_is_reached_up_to_the_curvature_of_softmax():
    """Two classes, a tie, a tiny change along the worst direction: the ratio comes near 1, so the bound is no slack."""
    h, delta = np.array([[1.0, 0.0]]), 1e-3 * np.array([[1.0, 0], [-1, 0]]) / np.sqrt(2)
    distance, norm, margin, unchanged = bound_module._observed(h, np.zeros((1, 2)), delta)
    result = checked_bound("head", np.linalg.norm(delta, 2), "spectral", distance, norm, margin, unchanged | True)
    assert 0.999 < result.largest_ratio <= 1


def test_the_frobenius_norm_stands_in_for_a_huge_head_and_is_above(tmp_path, monkeypatch):
    path = mlp_onnx(tmp_path / "m.onnx")
    exact = measured(path, 3)
    monkeypatch.setattr(bound_module, "EXACT_NORM_LIMIT", 4)
    result = measured(path, 3)
    assert result.delta_norm_kind == "frobenius"
    assert result.delta_norm > exact.delta_norm
    assert result.largest_ratio < exact.largest_ratio
    assert result.violations == 0


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 5)])
def test_the_norm_is_the_largest_singular_value(shape):
    delta = RNG.standard_normal(shape)
    norm, kind = bound_module._upper_norm(delta)
    assert kind == "spectral"
    np.testing.assert_allclose(norm, np.linalg.norm(delta, 2), rtol=1e-12)


# -- controls: what must be noticed


def observations(n=50, classes=6, width=9):
    h, delta = RNG.standard_normal((n, width)), 0.2 * RNG.standard_normal((classes, width))
    z = RNG.standard_normal((n, classes))
    return bound_module._upper_norm(delta)[0], bound_module._observed(h, z, delta)


def test_true_observations_pass():
    norm, (distances, norms, margins, unchanged) = observations()
    assert checked_bound("head", norm, "spectral", distances, norms, margins, unchanged).violations == 0


def test_doctored_distances_are_noticed():
    norm, (distances, norms, margins, unchanged) = observations()
    distances[7] = norm * norms[7]  # twice what the bound allows
    with pytest.raises(GateError, match="softmax bound: 1 of 50 samples exceed .* at the head 'head'"):
        checked_bound("head", norm, "spectral", distances, norms, margins, unchanged)


def test_an_understated_norm_is_noticed():
    norm, rest = observations()
    with pytest.raises(GateError, match="softmax bound"):
        checked_bound("head", norm / 100, "spectral", *rest)


def test_a_changed_answer_that_was_guaranteed_is_noticed():
    norm, (distances, norms, margins, unchanged) = observations()
    margins[3], unchanged[3] = 2 * norm * norms[3], False
    with pytest.raises(GateError, match="1 of 50 samples"):
        checked_bound("head", norm, "spectral", distances, norms, margins, unchanged)
    margins[3] = 1.0 * norm * norms[3]  # under sqrt(2): no guarantee, so no violation
    checked_bound("head", norm, "spectral", distances, norms, margins, unchanged)


def test_factors_other_than_the_measured_ones_are_noticed(tmp_path, monkeypatch):
    path = mlp_onnx(tmp_path / "m.onnx")
    good = truncated(weight_of(path, "head.weight"), 9)
    measure = bound_module._upper_norm
    monkeypatch.setattr(bound_module, "_upper_norm", lambda delta: (measure(delta)[0] / 1e3, "spectral"))
    with pytest.raises(GateError):
        measured(path, 9, factors=dataclasses.replace(good, left=good.left * np.float32(1.5)))
    assert not (tmp_path / "tapped.onnx").exists()


# -- finding the head


def headed(*nodes, extra=(), outputs=("output",), shape=("n", 6)):
    x = helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, list(shape))
    ys = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs]
    arrays = {"w": np.ones((6, 4)), "b": np.ones(4), "k": np.ones((4, 6, 1, 1)), **dict(extra)}
    used = {name for node in nodes for name in node.input}
    tensors = [
        numpy_helper.from_array(np.asarray(a, np.int64 if name == "s" else np.float32), name)
        for name, a in arrays.items()
        if name in used
    ]
    graph = helper.make_graph(list(nodes), "g", [x], ys, tensors)
    return ir.from_proto(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)]))


N = helper.make_node


@pytest.mark.parametrize(
    "nodes",
    [
        [N("Gemm", ["input", "w", "b"], ["output"], "fc")],
        [N("MatMul", ["input", "w"], ["output"], "fc")],
        [N("MatMul", ["input", "w"], ["z"], "fc"), N("Add", ["z", "b"], ["output"], "add")],
        [N("MatMul", ["input", "w"], ["z"], "fc"), N("Add", ["b", "z"], ["output"], "add")],
        [N("Gemm", ["input", "w", "b"], ["z"], "fc"), N("Softmax", ["z"], ["output"], "p")],
        [N("Gemm", ["input", "w"], ["z"], "fc"), N("Reshape", ["z", "s"], ["y"]), N("LogSoftmax", ["y"], ["output"])],
    ],
    ids=["gemm", "matmul", "matmul_add", "add_matmul", "gemm_softmax", "reshape_logsoftmax"],
)
def test_the_head_is_found(nodes):
    head = find_head(headed(*nodes, extra=[("s", [-1, 4])]))
    assert (head.weight, head.input, head.output) == ("w", "input", nodes[0].output[0])


@pytest.mark.parametrize(
    ("nodes", "options"),
    [
        ([N("Conv", ["input", "k"], ["output"], "conv")], {"shape": ("n", 6, 2, 2)}),
        ([N("Gemm", ["input", "w"], ["output"], "fc"), N("Relu", ["input"], ["o2"])], {"outputs": ("output", "o2")}),
        ([N("Gemm", ["input", "w"], ["z"], "fc"), N("Relu", ["z"], ["output"])], {}),
        ([N("Gemm", ["input", "w"], ["z"], "fc"), N("Add", ["z", "z"], ["output"])], {}),
        ([N("Gemm", ["input", "w"], ["output"], "fc", alpha=2.0)], {}),
        (
            [N("MatMul", ["input", "t"], ["output"], "fc"), N("Relu", ["input"], ["r"])],
            {"extra": [("t", np.ones((2, 6, 4)))]},
        ),
        ([N("Identity", ["input"], ["output"])], {}),
    ],
    ids=["conv", "two_outputs", "relu", "add_of_two_values", "scaled", "batched_weight", "no_weight"],
)
def test_what_is_no_head_is_none(nodes, options):
    assert find_head(headed(*nodes, **options)) is None
