"""Joint splits through `rewrite`, `export`, `verify`, `inspect` and the command line."""

import json
import math

import numpy as np
import onnx
import pytest
from joint_weights import related, unrelated
from nets import initializers, run_onnx, seeded
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from torch import nn

from rsi_deploy import export, inspect, read_report, rewrite, verify
from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting.timing import model_times as stages
from rsi_deploy.io import onnx_file
from rsi_deploy.report.tables.report import print_sites
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.shape_trace import trace_run

WIDTH, RANK = 32, 9  # the related weights are of that rank, so their splits are exact but for rounding


def qkv_onnx(path, weights, *, tied=""):
    """`relu([x q, x k, x v])` with MatMul weights `(in, out)`; `tied`: the operator that uses the weight of k again."""
    tensors, nodes = [], []
    for name, weight in zip("qkv", weights, strict=True):
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(weight[0].numpy().T), f"{name}.weight"))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}.y"], f"{name}.node"))
        nodes.append(helper.make_node("Relu", [f"{name}.y"], [f"{name}.r"], f"{name}.relu"))
    nodes.append(helper.make_node("Concat", ["q.r", "k.r", "v.r"], ["y"], "concat", axis=1))
    x, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", size])
        for name, size in (("x", WIDTH), ("y", 3 * WIDTH), ("z", WIDTH))
    )
    if tied:
        turn = {"transB": 1} if tied == "Gemm" else {}
        nodes.append(helper.make_node(tied, ["v.r", "k.weight"], ["z"], "tied", **turn))
    graph = helper.make_graph(nodes, "g", [x], outputs[: 1 + bool(tied)], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture
def source(tmp_path):
    return qkv_onnx(tmp_path / "m.onnx", related(32, 32, 32))


@pytest.fixture
def bundle(tmp_path, source):
    export(str(source), tmp_path / "b", rank=RANK, measure=False, keep_dense=True)
    return tmp_path / "b"


def test_a_shared_right_factor_holds_less_and_gives_the_same(tmp_path, source):
    x = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    sites = rewrite(source, tmp_path / "joint.onnx", rank=RANK).sites
    apart = rewrite(source, tmp_path / "apart.onnx", rank=RANK, joint=False).sites
    assert [(s.rank, s.joint) for s in sites] == [(RANK, ("q", "k", "v"))] * 3
    assert [(s.rank, s.joint, s.reason) for s in apart] == [(RANK, (), "split")] * 3
    joint, dense = initializers(tmp_path / "joint.onnx"), run_onnx(source, x)[0]
    assert set(joint) == {"q.right", "q.left", "k.left", "v.left"}
    assert sum(a.size for a in joint.values()) == sum(s.params_compressed for s in sites)
    assert sum(a.size for a in joint.values()) < sum(s.params_compressed for s in apart)
    assert relative(run_onnx(tmp_path / "joint.onnx", x)[0], dense) < 1e-5
    assert relative(run_onnx(tmp_path / "joint.onnx", 1.01 * x)[0], dense) > 1e-3
    onnx.checker.check_model(tmp_path / "joint.onnx", full_check=True)


def test_unrelated_weights_are_split_as_without_the_flag(tmp_path):
    source = qkv_onnx(tmp_path / "m.onnx", unrelated(32, 32, 32))
    sites = rewrite(source, tmp_path / "a.onnx", rank=RANK).sites
    rewrite(source, tmp_path / "b.onnx", rank=RANK, joint=False)
    assert sites[0].reason == "not jointly with k, v: it costs no less for the same errors"
    assert not any(s.joint for s in sites)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@pytest.mark.parametrize("filters", [{"exclude": ["v"]}, {"include": ["q", "k"]}])
def test_a_member_that_stays_dense_keeps_the_others_apart(tmp_path, source, filters):
    q, k, v = rewrite(source, tmp_path / "a.onnx", rank=RANK, **filters).sites
    assert (q.rank, k.rank, v.rank) == (RANK, RANK, None)
    assert q.joint == k.joint == v.joint == ()
    assert q.reason == "not jointly with k, v: v stays dense"
    assert "clude" in v.reason


@pytest.mark.parametrize("tied", ["MatMul", "Gemm"])
def test_a_weight_used_elsewhere_too_is_not_shared(tmp_path, tied):
    """Neither the same way round nor transposed is it a member of a group."""
    source = qkv_onnx(tmp_path / "m.onnx", related(32, 32, 32), tied=tied)
    q, k, v = rewrite(source, tmp_path / "a.onnx", rank=RANK).sites
    assert (q.joint, k.joint, v.joint) == (("q", "v"), (), ("q", "v"))


def test_break_even_and_always_split(tmp_path, source):
    assert {s.decision for s in rewrite(source, tmp_path / "a.onnx", rank=16).sites} == {"dense"}
    for rank in (RANK, 16):
        sites = rewrite(source, tmp_path / "b.onnx", rank=rank, always_split=True, force=True).sites
        assert [(s.rank, s.joint) for s in sites] == [(rank, ())] * 3


def test_streamed_and_in_memory_are_the_same(tmp_path, source, monkeypatch):
    rewrite(source, tmp_path / "a.onnx", rank=RANK)
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 0)
    rewrite(source, tmp_path / "b.onnx", rank=RANK)
    assert (tmp_path / "b.onnx.data").exists()
    hashes = {onnx_file.weights_hash(onnx_file.read_onnx(tmp_path / f"{name}.onnx")) for name in "ab"}
    assert len(hashes) == 1


# -- export, verify, inspect


def test_totals_add_up(tmp_path, source):
    report = export(str(source), tmp_path / "b", rank=RANK, measure=False)
    assert report.settings.joint
    assert [s.decision for s in report.split_sites] == ["split"] * 3
    assert sum(s.params_compressed for s in report.sites) == report.compressed.params
    feeds = random_feeds(model_inputs(tmp_path / "b" / "model.onnx"), 2, 0)
    assert report.compressed.macs == sum(trace_run(tmp_path / "b" / "model.onnx", feeds).macs.values()) // 2
    assert report.compressed.macs == sum(s.macs_compressed for s in report.sites)
    apart = export(str(source), tmp_path / "c", rank=RANK, measure=False, joint=False)
    assert report.compressed.macs < apart.compressed.macs
    assert not apart.settings.joint
    assert not export(str(source), tmp_path / "d", rank=RANK, measure=False, always_split=True).settings.joint


@pytest.mark.parametrize(("apart", "stays"), [((0.7, 0.8), True), ((0.98, 1.05), True), ((1.2, 1.3), False)])
def test_jointly_or_apart_is_decided_by_time(tmp_path, source, monkeypatch, apart, stays):
    bench, pairs = stages.bench, []

    def measured(paths, **options):
        """A real run, but for the clock: how fast split apart is is made up, and every model is faster than dense."""
        pairs.append([path.name for path in paths])
        result = bench(paths, **{**options, "seconds": 0.2})
        ends = apart if "apart.onnx" in pairs[-1] else (1.4, 1.5)
        arm = result.arms[1].model_copy(update={"speedup_interval": ends, "speedup": sum(ends) / 2, "blocks": 30})
        return result.model_copy(update={"arms": (result.arms[0], arm)})

    monkeypatch.setattr(stages, "bench", measured)
    report = export(str(source), tmp_path / "b", rank=RANK, threads=1, keep_dense=True)
    assert pairs == [["model.onnx", "apart.onnx"], ["dense.onnx", "model.onnx"]]
    assert all(bool(site.joint) == stays for site in report.sites)
    assert ("q.right" in initializers(tmp_path / "b" / "model.onnx")) or not stays
    (note,) = [note for note in report.notes if "may share a right factor" in note]
    assert ("jointly" if stays else "apart:") in note
    assert claims(tmp_path / "b", "broken") == set()
    assert not list((tmp_path / "b").glob("apart*"))
    pairs.clear()
    export(str(source), tmp_path / "c", rank=RANK, threads=1, allow_slower=True)
    assert pairs == [["dense.onnx", "model.onnx"]]  # jointly is smaller, whatever its time


def claims(bundle, status):
    return {claim.name for claim in verify(bundle).claims if claim.status == status}


def edit(bundle, change):
    content = json.loads((bundle / "report.json").read_text())
    change(content["sites"])
    (bundle / "report.json").write_text(json.dumps(content))


def test_a_fresh_bundle_holds(bundle):
    assert claims(bundle, "broken") == set()
    assert {"sites", "ranks", "parameters", "outputs", "parity"} <= claims(bundle, "holds")


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (lambda sites: sites[1].update(joint=[]), {"sites"}),
        (lambda sites: [site.update(joint=[]) for site in sites], {"sites"}),
        (lambda sites: [site.update(joint=["q", "k"]) for site in sites], {"sites"}),
        (lambda sites: sites[2].update(joint=["q", "k", "other"]), {"sites"}),
        (lambda sites: sites[2].update(decision="dense", rank=None, joint=[]), {"sites"}),
        (lambda sites: sites[1].update(rank=RANK - 1), {"ranks"}),
    ],
    ids=["one", "all", "fewer", "other", "dense", "rank"],
)
def test_a_doctored_record_is_rejected(bundle, change, broken):
    edit(bundle, change)
    assert claims(bundle, "broken") == broken | {"page", "manifest"}


def test_a_joint_split_that_is_none_is_rejected(tmp_path, source):
    export(str(source), tmp_path / "b", rank=RANK, measure=False, joint=False)
    assert claims(tmp_path / "b", "broken") == set()
    edit(tmp_path / "b", lambda sites: [site.update(joint=["q", "k", "v"]) for site in sites])
    assert claims(tmp_path / "b", "broken") == {"sites", "page", "manifest"}


def test_the_surgery_gate_sees_rows_given_to_the_wrong_member(tmp_path, source, monkeypatch):
    from graph_passes import joint

    monkeypatch.setattr("graph_passes.split_pass.cut", lambda *a: joint.cut(*a)[::-1])
    with pytest.raises(GateError, match="^surgery gate"):
        export(str(source), tmp_path / "b", rank=RANK, measure=False)


def test_it_is_said_in_words(tmp_path, source, capsys):
    argv = ["export", str(source), "--rank", str(RANK), "--no-bench", "-o", str(tmp_path / "b")]
    assert run(argv) == 0
    out = capsys.readouterr().out
    assert "split: jointly with k, v" in out
    assert "split jointly share one right factor" in out
    row = next(line for line in (tmp_path / "b" / "README.md").read_text().splitlines() if line.startswith("| k |"))
    assert "split: jointly with q, v" in row
    assert "Sites split jointly share one right factor" in (tmp_path / "b" / "README.md").read_text()
    print_sites(Console(), read_report(tmp_path / "b").sites, most=2)
    assert "3 of 3 sites split (3 jointly)" in capsys.readouterr().out
    assert run([*argv, "--no-joint", "--force"]) == 0
    assert "joint" not in capsys.readouterr().out + (tmp_path / "b" / "README.md").read_text()


def test_inspect_says_what_may_be_joint(source, capsys):
    assert [s.joint for s in inspect(str(source), rank=RANK).sites] == [("q", "k", "v")] * 3
    for options in ({"joint": False}, {"exclude": ["v"]}, {"rank": 16}):
        assert not any(s.joint for s in inspect(str(source), **{"rank": RANK} | options).sites)
    assert run(["inspect", str(source), "--rank", str(RANK)]) == 0
    assert f"rank {RANK}, or jointly with k, v" in capsys.readouterr().out
    assert run(["inspect", str(source), "--rank", str(RANK), "--no-joint"]) == 0
    assert "joint" not in capsys.readouterr().out


class Attention(nn.Module):
    """Grouped-query attention with linear layers of its own, and a gated feed-forward."""

    def __init__(self, width=WIDTH, heads=4):
        super().__init__()
        self.input_shape, self.heads = (1, 6, width), heads
        self.norm = nn.LayerNorm(width)
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(width, width // 2), nn.Linear(width, width // 2, bias=False)
        self.gate, self.up, self.down = nn.Linear(width, 80), nn.Linear(width, 80), nn.Linear(80, width)
        for layer, weight in zip((self.q, self.k, self.v), related(width, width // 2, width // 2), strict=True):
            layer.weight.data = weight[0] / math.sqrt(width)
        for layer, weight in zip((self.gate, self.up), unrelated(80, 80), strict=True):
            layer.weight.data = weight[0] / math.sqrt(width)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (layer(h).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def test_a_torch_model_end_to_end(tmp_path):
    report = export(seeded(Attention), tmp_path / "b", rank=RANK, measure=False, keep_dense=True)
    joint = {site.name: site.joint for site in report.sites}
    assert joint["q"] == joint["k"] == joint["v"]
    assert set(joint["q"]) == {"q", "k", "v"}
    assert not any(joint[name] for name in ("gate", "up", "o", "down"))
    assert report.verification.surgery.relative_l2 < 2e-5
    assert claims(tmp_path / "b", "broken") == set()
    apart = export(seeded(Attention), tmp_path / "c", rank=RANK, measure=False, joint=False)
    assert report.compressed.params < apart.compressed.params
    before = {site.name: site.frobenius_error for site in apart.sites}
    assert all(site.frobenius_error <= before[site.name] + 1e-5 for site in report.sites)
