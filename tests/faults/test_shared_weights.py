"""A weight with several users is not copied, and has one pair of factors."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from nets import initializers, run_onnx
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import rsi_deploy
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.torch_models.fold_batch_norm import fold_batch_norms_


def weight(*shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def node(*arguments, **attributes):
    return helper.make_node(*arguments, **attributes)


def saved(path, nodes, shapes, constants):
    made = {name for n in nodes for name in n.output}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [value for name, value in values.items() if name not in made],
        [value for name, value in values.items() if name in made],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def exported(path, rank="25%", **options):
    return rsi_deploy.export(str(path), path.parent / "b", rank=rank, measure=False, force=True, **options)


def split_sites(report):
    return {site.name: site.rank for site in report.sites if site.rank}


def no_claim_is_broken(folder):
    return not [claim for claim in rsi_deploy.verify(folder).claims if claim.status == "broken"]


# BatchNormalizations after Convs that share something

LEVELS, OUT = 3, 32


def statistics(name, seed):
    rng = np.random.default_rng(seed)
    return {name + part: rng.uniform(0.5, 2, OUT).astype(np.float32) for part in "sbmv"}


def heads(path, *, weights=("w",) * LEVELS, norms=range(LEVELS), bias="", plain=()):
    """Write a model with a Conv for each level; those in `plain` have no BatchNormalization after them."""
    constants = {name: weight(OUT, 16, 3, 3, seed=i) for i, name in enumerate(dict.fromkeys(weights))}
    constants |= {"bias": weight(OUT)} if bias else {}
    nodes, shapes = [], {}
    for i, (name, norm) in enumerate(zip(weights, norms, strict=True)):
        inputs = [f"x{i}", name, *["bias"] * bool(bias)]
        nodes.append(node("Conv", inputs, [f"y{i}" if i in plain else f"c{i}"], f"conv{i}", pads=[1] * 4))
        if i not in plain:
            constants |= statistics(f"n{norm}", norm)
            nodes.append(node("BatchNormalization", [f"c{i}", *(f"n{norm}{part}" for part in "sbmv")], [f"y{i}"]))
        shapes |= {f"x{i}": [1, 16, 8, 8], f"y{i}": [1, OUT, 8, 8]}
    return saved(path, nodes, shapes, constants)


@pytest.mark.parametrize(
    ("how", "norms_left"),
    [
        pytest.param({}, 3, id="a norm each"),
        pytest.param({"bias": "bias"}, 3, id="and a bias in common"),
        pytest.param({"norms": (0, 0, 0)}, 0, id="one norm for all: folded once"),
        pytest.param({"norms": (0, 0, 1)}, 3, id="two equal, one not"),
        pytest.param({"norms": (0, 0, 0), "plain": (1,)}, 2, id="one Conv without a norm"),
        pytest.param({"weights": ("w", "w", "v"), "norms": (0, 0, 1)}, 0, id="two shared, one alone"),
    ],
)
def test_a_shared_conv_weight_is_not_copied(tmp_path, how, norms_left):
    path = heads(tmp_path / "m.onnx", **how)
    report = exported(path, "50%")
    given = initializers(path)
    assert report.dense.params == sum(array.size for array in given.values())
    assert file_bytes(tmp_path / "b" / "model.onnx") == report.compressed.bytes < path.stat().st_size
    left = onnx.load(tmp_path / "b" / "model.onnx").graph.node
    assert sum(n.op_type == "BatchNormalization" for n in left) == norms_left
    assert split_sites(report) == dict.fromkeys(how.get("weights", ["w"]), 16)
    assert no_claim_is_broken(tmp_path / "b")
    rewritten = rsi_deploy.rewrite(path, tmp_path / "small.onnx", rank="50%")
    assert {site.rank for site in rewritten.sites} == {16}
    assert (tmp_path / "small.onnx").stat().st_size < path.stat().st_size
    x = {name: weight(1, 16, 8, 8, seed=i) for i, name in enumerate(("x0", "x1", "x2"))}
    rsi_deploy.rewrite(path, tmp_path / "same.onnx", rank="100%", always_split=True)
    for came, expected in zip(run_onnx(tmp_path / "same.onnx", x), run_onnx(path, x), strict=True):
        np.testing.assert_allclose(came, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("users", [2, 4, 12])
def test_shared_statistics_are_folded_if_that_saves_parameters(tmp_path, users):
    """Folding adds a bias for each Conv and removes four shared vectors."""
    path = heads(tmp_path / "m.onnx", weights=[f"w{i}" for i in range(users)], norms=[0] * users)
    rsi_deploy.rewrite(path, tmp_path / "small.onnx", rank="10%", include=["w0"])
    small, given = initializers(tmp_path / "small.onnx"), initializers(path)
    left = [n.op_type for n in onnx.load(tmp_path / "small.onnx").graph.node].count("BatchNormalization")
    assert left == (users if users > 4 else 0)
    vectors = [sum(array.size for array in constants.values() if array.ndim == 1) for constants in (small, given)]
    assert vectors[0] <= vectors[1]


# Weights used in several ways

IN = 128
GATHERED = {"ids": np.array([1, 2, 3])}
USES = {
    "Gemm twice": [node("Gemm", ["x", "w"], ["a"]), node("Gemm", ["a", "w"], ["y"], transB=1)],
    "MatMul, Transpose": [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("MatMul", ["a", "t"], ["y"]),
    ],
    "weight on the left": [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["a"], ["at"], perm=[1, 0]),
        node("MatMul", ["w", "at"], ["z"]),
        node("Transpose", ["z"], ["y"], perm=[1, 0]),
    ],
    "Gemm and Identity": [
        node("Identity", ["w"], ["i"]),
        node("Gemm", ["x", "i"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "w"], ["y"], transB=1),
    ],
    "FusedMatMul": [
        node("FusedMatMul", ["x", "w"], ["a"], domain="com.microsoft", alpha=0.5),
        node("FusedMatMul", ["a", "w"], ["y"], domain="com.microsoft", transB=1),
    ],
    "MatMul and Gemm, one layout each": [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["w"], ["t"], perm=[1, 0]),
        node("Gemm", ["x", "t"], ["b"], transB=1),
        node("Add", ["a", "b"], ["s"]),
        node("Gemm", ["s", "w"], ["y"], transB=1),
    ],
    "subgraph": [
        node("MatMul", ["x", "w"], ["a"]),
        node("ReduceMax", ["a"], ["m"], keepdims=0),
        node("Cast", ["m"], ["yes"], to=TensorProto.BOOL),
        node(
            "If",
            ["yes"],
            ["y"],
            **{
                f"{kind}_branch": helper.make_graph(
                    [node("Gemm", ["a", "w"], [kind], transB=1)],
                    kind,
                    [],
                    [helper.make_tensor_value_info(kind, TensorProto.FLOAT, [3, IN])],
                )
                for kind in ("then", "else")
            },
        ),
    ],
}


@pytest.mark.parametrize("uses", USES)
def test_a_weight_used_both_ways_has_one_pair_of_factors(tmp_path, uses):
    path = saved(tmp_path / "m.onnx", USES[uses], {"x": [3, IN], "y": [3, IN]}, {"w": weight(IN, 96)})
    (site,) = rsi_deploy.inspect(str(path), rank="25%", spectra=False).sites
    assert (site.name, site.params, site.rank) == ("w", IN * 96, 24)
    report = exported(path)
    assert (report.dense.params, report.compressed.params) == (IN * 96, 24 * (IN + 96))
    assert report.compressed.bytes < report.dense.bytes == path.stat().st_size
    assert report.verification.surgery.relative_l2 < 1e-6
    assert no_claim_is_broken(tmp_path / "b")
    planned = rsi_deploy.export(str(path), tmp_path / "p", plan=tmp_path / "b" / "plan.json", measure=False)
    assert (planned.compressed.params, split_sites(planned)) == (report.compressed.params, {"w": 24})


def test_the_factors_of_both_ways_are_those_of_one_weight(tmp_path):
    """At a low rank the model equals the dense one with the low-rank weight in both places."""
    path = saved(tmp_path / "m.onnx", USES["Gemm twice"], {"x": [3, IN], "y": [3, IN]}, {"w": weight(IN, 96)})
    report = exported(path, method="svd")
    assert report.compressed.params == 24 * (IN + 96)
    u, s, v = np.linalg.svd(weight(IN, 96).astype(np.float64))
    low_rank = (u[:, :24] * s[:24]) @ v[:24]
    x = weight(3, IN, seed=5)
    (came,) = run_onnx(tmp_path / "b" / "model.onnx", {"x": x})
    np.testing.assert_allclose(came, x @ low_rank @ low_rank.T, rtol=1e-3, atol=1e-4)
    assert np.abs(came - x @ low_rank @ low_rank.T * 1.1).max() > 1e-2


@pytest.mark.parametrize(
    ("nodes", "constants", "shapes"),
    [
        pytest.param(
            [node("Conv", ["x", "w"], ["a"], pads=[1] * 4), node("ConvTranspose", ["a", "w"], ["y"], pads=[1] * 4)],
            {"w": weight(24, 16, 3, 3)},
            {"x": [1, 16, 8, 8], "y": [1, 16, 8, 8]},
            id="Conv and ConvTranspose",
        ),
        pytest.param(
            [
                node("MatMul", ["x", "w"], ["a"]),
                node("Transpose", ["w"], ["t"], perm=[0, 2, 1]),
                node("MatMul", ["a", "t"], ["y"]),
            ],
            {"w": weight(2, 64, 48)},
            {"x": [2, 3, 64], "y": [2, 3, 64]},
            id="batched",
        ),
        pytest.param(
            [node("MatMul", ["x", "w"], ["a"]), node("Gather", ["w", "ids"], ["e"]), node("Add", ["a", "e"], ["y"])],
            {"w": weight(64, 48), **GATHERED},
            {"x": [3, 64], "y": [3, 48]},
            id="table too",
        ),
    ],
)
def test_uses_that_no_pair_of_factors_serves_stay_dense(tmp_path, nodes, constants, shapes):
    nodes = [*nodes, node("MatMul", ["z", "other"], ["o"])]
    shapes = {**shapes, "z": [1, 64], "o": [1, 64]}
    report = exported(saved(tmp_path / "m.onnx", nodes, shapes, {**constants, "other": weight(64, 64)}))
    assert split_sites(report) == {"other": 16}
    (shared,) = (site for site in report.sites if site.name == "w")
    assert "grow the file" in shared.reason
    assert report.dense.params - report.compressed.params == 64 * 64 - 16 * 128


def test_a_plan_fitted_to_data_splits_a_weight_of_both_ways_once(tmp_path):
    nodes = [*USES["Gemm twice"], node("MatMul", ["x", "other"], ["o"])]
    shapes = {"x": [3, IN], "y": [3, IN], "o": [3, IN]}
    path = saved(tmp_path / "m.onnx", nodes, shapes, {"w": weight(IN, 96), "other": weight(IN, IN)})
    exported(path)
    calib = {"x": weight(96, IN, seed=4)}
    report = rsi_deploy.export(
        str(path), tmp_path / "p", plan=tmp_path / "b" / "plan.json", calib=calib, measure=False, keep_dense=True
    )
    assert split_sites(report) == {"w": 24, "other": 32}
    assert report.compressed.params == 24 * (IN + 96) + 32 * 2 * IN + IN  # what is fitted has a bias
    assert no_claim_is_broken(tmp_path / "p")


# torch


class Heads(nn.Module):
    """A Conv with a different BatchNorm for each call."""

    input_shape = (1, 16, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, OUT, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(OUT) for _ in range(LEVELS))

    def forward(self, x):
        return tuple(norm(self.conv(x * scale)) for scale, norm in enumerate(self.norms, start=1))


class Past(nn.Module):
    """A Conv whose weight is also used without its BatchNorm."""

    input_shape = (1, 16, 8, 8)

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, OUT, 3, padding=1, bias=False), nn.BatchNorm2d(OUT)

    def forward(self, x):
        return self.norm(self.conv(x)) + F.conv2d(x, self.conv.weight, padding=1)


class Autoencoder(nn.Module):
    """A decoder whose weight is the transpose of the encoder's."""

    input_shape = (1, IN)

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(IN, 96, bias=False)

    def forward(self, x):
        return F.linear(torch.relu(self.encoder(x)), self.encoder.weight.T)


class Conv1D(nn.Module):
    """The layer of transformers with a weight (in, out)."""

    def __init__(self, out, into):
        super().__init__()
        self.nf = out
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


def evaluated(make):
    torch.manual_seed(0)
    module = make().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 2)
    return module


@pytest.mark.parametrize(("make", "weights"), [(Heads, 16 * 9), (Past, 16 * 9), (Autoencoder, IN)])
def test_torch_models_that_share_a_weight_shrink(tmp_path, make, weights):
    report = rsi_deploy.export(evaluated(make), tmp_path / "b", rank=8, measure=False)
    out = 96 if make is Autoencoder else OUT
    assert report.dense.params - report.compressed.params == out * weights - 8 * (out + weights)
    assert report.compressed.bytes < report.dense.bytes
    assert no_claim_is_broken(tmp_path / "b")


@pytest.mark.parametrize("way", ["compress_", "fold_batch_norms_"])
def test_a_weight_with_another_use_is_not_folded(way):
    module = evaluated(Past)
    x = torch.randn(2, *module.input_shape[1:])
    with torch.inference_mode():
        expected = module(x)
        if way == "compress_":
            rsi_deploy.compress_(module, "100%", always_split=True)
        else:
            fold_batch_norms_(module)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_tied_torch_layers_with_other_uses_stay_dense():
    linear, turned = nn.Linear(48, 32), Conv1D(48, 32)
    grouped = nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=2)
    turned.weight, grouped[1].weight = linear.weight, grouped[0].weight
    for pair in ((linear, turned), grouped):
        (record,) = rsi_deploy.compress_(nn.ModuleList(pair), 4)
        assert record.rank is None
        assert "tied to 1.weight" in record.reason
