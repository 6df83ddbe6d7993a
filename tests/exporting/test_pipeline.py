import json
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from nets import SIZES, ShapedSequential, attention, cnn, initializers, labelled, mlp, mlp_onnx, run_onnx, seeded
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from torch import nn

from rsi_deploy import compress_, export, read_report
from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing

A, B, C, D = SIZES
QUICK = {"measure": False}
BUNDLE = ["README.md", "manifest.json", "model.onnx", "plan.json", "recipe.toml", "report.html", "report.json"]


@pytest.fixture
def model(tmp_path):
    return mlp_onnx(tmp_path / "m.onnx")


@pytest.fixture(scope="module")
def net_exports(tmp_path_factory):
    """Bundles of the three torch nets at 25 %, made once."""
    root = tmp_path_factory.mktemp("nets")
    nets = {"mlp": mlp(), "cnn": cnn(), "attention": attention()}
    return {name: (net, root / name, export(net, root / name, rank="25%", **QUICK)) for name, net in nets.items()}


def inputs(shape, count, seed=3):
    return np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype(np.float32)


def ops(path):
    return [node.op_type for node in onnx.load(path).graph.node]


# -- one model in every form gives one result


def as_module(tmp_path):
    return mlp(), {}


def as_factory(tmp_path):
    (tmp_path / "made_here.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        f"    input_shape = (1, {A})\n"
        "def make():\n"
        "    net = Net()\n"
        f"    layers = dict(fc1=nn.Linear({A}, {B}), relu1=nn.ReLU(), fc2=nn.Linear({B}, {C}), relu2=nn.ReLU())\n"
        f"    for name, layer in dict(**layers, head=nn.Linear({C}, {D})).items():\n"
        "        net.add_module(name, layer)\n"
        "    return net\n"
    )
    save_file(mlp().state_dict(), tmp_path / "weights.safetensors")
    return "made_here:make", {"checkpoint": "weights.safetensors"}


def as_pt2(tmp_path):
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(mlp(), (torch.randn(2, A),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "net.pt2")
    return "net.pt2", {}


def as_onnx(tmp_path):
    weights = {name: getattr(mlp(), name).weight.detach().numpy() for name in ("fc1", "fc2", "head")}
    path = mlp_onnx(tmp_path / "net.onnx", **weights)
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith(".bias"):
            bias = getattr(mlp(), tensor.name.removesuffix(".bias")).bias.detach().numpy()
            tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
    onnx.save(proto, path)
    return "net.onnx", {}


@pytest.mark.parametrize("form", [as_module, as_factory, as_pt2, as_onnx])
def test_every_form_of_a_model_gives_the_same_bundle(tmp_path, monkeypatch, form):
    monkeypatch.chdir(tmp_path)
    source, options = form(tmp_path)
    report = export(source, "b", rank="25%", **options, **QUICK)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == BUNDLE
    assert read_report(tmp_path / "b") == report
    assert {s.name: s.rank for s in report.sites} == {"fc1": 3, "fc2": 6, "head": 3}
    assert (report.verification.exporter is None) == (form is as_onnx)
    x = inputs((1, A), 5)
    compressed = mlp()
    compress_(compressed, "25%")
    with torch.inference_mode():
        expected = compressed(torch.from_numpy(x)).numpy()
    # float32 rounding: the factors are the same bits, for they depend on the weight, its name and the seed alone
    np.testing.assert_allclose(run_onnx("b/model.onnx", x)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_the_batch_is_dynamic(net_exports, name):
    net, folder, report = net_exports[name]
    five = inputs(net.input_shape, 5)
    together = run_onnx(folder / "model.onnx", five)[0]
    alone = np.concatenate([run_onnx(folder / "model.onnx", x[None])[0] for x in five])
    np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)  # another batch takes another kernel
    assert report.verification.exporter.relative_l2 < 1e-5
    assert report.verification.approximation.relative_l2 > 1e-3


def test_the_callers_module_stays_as_it_was(net_exports):
    for make in (mlp, cnn, attention):
        net, fresh = net_exports[make.__name__][0], make()
        assert [type(layer) for layer in net.modules()] == [type(layer) for layer in fresh.modules()]
        assert net.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(fresh.state_dict()[key], value) for key, value in net.state_dict().items())


# -- the numbers in the report


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention"])
def test_parameters_are_those_of_the_file(net_exports, name):
    net, folder, report = net_exports[name]
    arrays = [a for a in initializers(folder / "model.onnx").values() if a.dtype.kind == "f"]
    assert report.compressed.params == sum(a.size for a in arrays)
    saved = sum(s.params_dense - s.params_compressed for s in report.sites)
    assert report.dense.params - report.compressed.params == saved > 0
    if name != "cnn":  # its BatchNorms are folded
        assert report.dense.params == pytest.approx(sum(p.numel() for p in net.parameters()), abs=2)  # constants of ops
    assert report.compressed.bytes == (folder / "model.onnx").stat().st_size


def test_macs_of_an_mlp_by_hand(net_exports):
    _, _, report = net_exports["mlp"]
    assert report.dense.macs == A * B + B * C + C * D
    assert report.compressed.macs == 3 * (A + B) + 6 * (B + C) + 3 * (C + D)
    assert [(s.macs_dense, s.macs_compressed) for s in report.sites] == [
        (A * B, 3 * (A + B)),
        (B * C, 6 * (B + C)),
        (C * D, 3 * (C + D)),
    ]


def test_macs_of_a_cnn_by_hand(net_exports):
    _, _, report = net_exports["cnn"]
    dense = {"conv1": 64 * 16 * 27, "conv2": 16 * 24 * 16 * 9, "grouped": 16 * 32 * 12 * 9, "head": 512 * 10}
    assert {s.name: s.macs_dense for s in report.sites} == dense
    assert report.dense.macs == sum(dense.values())
    (conv2,) = (s for s in report.sites if s.name == "conv2")
    assert conv2.macs_compressed == 16 * conv2.rank * (24 + 16 * 9)


def test_macs_are_a_sample_whatever_the_probe_batch(tmp_path):
    counts = set()
    for batch in ("n", 1, 6):
        path = mlp_onnx(tmp_path / f"{batch}.onnx", batch=batch)
        report = export(str(path), tmp_path / f"b{batch}", rank="25%", **QUICK)
        counts.add((report.dense.macs, report.compressed.macs))
        assert next(iter(report.probe_shapes.values()))[0] == (2 if batch == "n" else batch)
    assert len(counts) == 1


def test_sites_carry_ranks_errors_and_reasons(net_exports):
    for _, folder, report in net_exports.values():
        arrays = initializers(folder / "model.onnx")
        for site in report.split_sites:
            assert site.rank == int(np.ceil(0.25 * min(site.out_features, site.in_features)))
            assert site.params_compressed == site.groups * site.rank * (site.out_features + site.in_features)
            assert arrays[f"{site.name}.right"].size == site.groups * site.rank * site.in_features
            assert site.normalized_error >= 1
            assert 0 < site.spectral_error <= 1
            assert 0 < site.frobenius_error <= 1
            assert site.reason == "split"
        assert [stage.name for stage in report.stages][:2] == ["load", "export dense"]
        assert all(stage.seconds >= 0 for stage in report.stages)
        assert report.peak_memory > 0


def test_dense_accuracy_is_that_of_the_model_itself(tmp_path, model):
    data = labelled(tmp_path / "d.npz", model, count=50, wrong=10)
    report = export(str(model), tmp_path / "b", rank=8, data=data, **QUICK)
    assert report.accuracy.dense.top1 == pytest.approx(80)
    assert report.accuracy.dense.samples == 50
    with np.load(data) as archive:
        answers = run_onnx(tmp_path / "b" / "model.onnx", archive["x"])[0].argmax(1)
        dense = run_onnx(model, archive["x"])[0].argmax(1)
        assert report.accuracy.compressed.top1 == pytest.approx(100 * np.mean(answers == archive["labels"]))
        assert report.accuracy.compressed.agreement == pytest.approx(100 * np.mean(answers == dense))
    assert report.softmax_bound is None  # rank 8 saves nothing at the head, which therefore stayed dense


def test_dense_accuracy_is_that_of_torch_on_pictures(tmp_path):
    net = cnn()
    net.preprocessing = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3), np.uint8)
    mean, std = (torch.tensor(net.preprocessing[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std
        labels = net(x).argmax(1).numpy()
    labels[:4] = (labels[:4] + 1) % 10
    np.savez(tmp_path / "d.npz", images=images, labels=labels)
    report = export(net, tmp_path / "b", rank="25%", data=tmp_path / "d.npz", **QUICK)
    assert report.accuracy.dense.top1 == pytest.approx(90)
    assert report.softmax_bound.samples == 40
    assert report.softmax_bound.violations == 0


def test_the_softmax_bound_is_in_the_report(tmp_path, model):
    report = export(str(model), tmp_path / "b", rank=5, data=labelled(tmp_path / "d.npz", model), **QUICK)
    bound = report.softmax_bound
    assert (bound.site, bound.samples, bound.violations, bound.delta_norm_kind) == ("head.weight", 60, 0, "spectral")
    weights = initializers(model)["head.weight"]
    after = initializers(tmp_path / "b" / "model.onnx")
    right, left = after["head.right"], after["head.left"]
    product = np.linalg.multi_dot([right, left]).T if right.shape[0] == C else left @ right
    np.testing.assert_allclose(bound.delta_norm, np.linalg.norm(weights - product, 2), rtol=1e-5)


def test_ready_inputs_go_with_a_model_that_tells_a_preprocessing(tmp_path, model):
    steps = Preprocessing(mean=(0.5,), std=(0.5,))
    data = labelled(tmp_path / "d.npz", model)
    export(str(model), tmp_path / "a", rank=5, preprocessing=steps, **QUICK)
    again = tmp_path / "again.onnx"
    shutil.copy(tmp_path / "a" / "model.onnx", again)
    with pytest.raises(ModelError, match="nothing to split: already split"):
        export(str(again), tmp_path / "b", rank=3, **QUICK)
    net = mlp()
    net.preprocessing = {"mean": (0.5,), "std": (0.5,)}
    report = export(net, tmp_path / "c", rank=5, data=data, **QUICK)
    assert report.preprocessing == steps
    assert report.accuracy.dense.preprocessing is None
    with pytest.raises(UsageError, match="ready model inputs: no preprocessing applies"):
        export(str(model), tmp_path / "d", rank=5, preprocessing=steps, data=data, **QUICK)


def test_an_onnx_source_tells_its_own_preprocessing(tmp_path, model):
    steps = Preprocessing(mean=(0.25,), std=(2.0,))
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, {METADATA_KEY: steps.to_metadata(), "theirs": "kept"})
    onnx.save(proto, model)
    report = export(str(model), tmp_path / "b", rank=4, preprocessing=Preprocessing(crop=(3, 4)), **QUICK)
    assert report.preprocessing == Preprocessing(mean=(0.25,), std=(2.0,), crop=(3, 4))
    props = {p.key: p.value for p in onnx.load(tmp_path / "b" / "model.onnx").metadata_props}
    assert Preprocessing.from_metadata(props[METADATA_KEY]) == report.preprocessing
    assert props["theirs"] == "kept"


def test_latency_is_measured_against_dense(tmp_path, model):
    report = export(str(model), tmp_path / "b", rank=4, bench_batch=3, bench_seconds=0.05, threads=1, allow_slower=True)
    assert [(arm.label, arm.model) for arm in report.latency.arms] == [
        ("dense", "dense.onnx"),
        ("compressed", "model.onnx"),
    ]
    assert (report.latency.batch, report.latency.threads) == (3, 1)
    assert report.latency.inputs == {"input": f"float32 (3, {A})"}


# -- the gate on the outputs


def test_the_output_gate(tmp_path, model, capsys):
    with pytest.raises(GateError, match="approximation gate .*--max-output-error.* is above the tolerance 1e-03"):
        export(str(model), tmp_path / "b", rank=4, max_output_error=1e-3, **QUICK)
    assert (
        run(
            [
                "export",
                str(model),
                "--rank",
                "4",
                "-o",
                str(tmp_path / "b"),
                "--no-bench",
                "--max-output-error",
                "0.001",
            ]
        )
        == 4
    )
    assert not (tmp_path / "b").exists()
    report = export(str(model), tmp_path / "b", rank=4, max_output_error=5, **QUICK)
    assert report.verification.approximation.tolerance == 5


def test_defective_surgery_never_becomes_a_bundle(tmp_path, model, monkeypatch):
    rewrite = __import__("graph_passes.split_gemm", fromlist=["x"]).SplitGemmPass.rewrite

    def lost_bias(found, parts):
        first = rewrite(found, parts)
        found.node.replace_input_with(2, None)
        return first

    monkeypatch.setattr("graph_passes.split_gemm.SplitGemmPass.rewrite", staticmethod(lost_bias))
    with pytest.raises(GateError, match="^surgery gate"):
        export(str(model), tmp_path / "b", rank=4, **QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_wrong_exporter_never_becomes_a_bundle(tmp_path, monkeypatch):
    from rsi_deploy.exporting import dense_step as stages

    good = stages.to_onnx

    def doubled(source, opset=None):
        exported = good(source, opset=opset)
        bias = exported.model.graph.initializers["head.bias"]
        bias.const_value = __import__("onnx_ir").tensor(bias.const_value.numpy() * 2 + 1)
        return exported

    monkeypatch.setattr(stages, "to_onnx", doubled)
    with pytest.raises(GateError, match="^exporter gate"):
        export(mlp(), tmp_path / "b", rank=4, **QUICK)
    assert list(tmp_path.iterdir()) == []


# -- the same bytes tomorrow


@pytest.mark.parametrize("make", [mlp, attention])
def test_the_same_seed_gives_the_same_bytes(tmp_path, net_exports, make, monkeypatch):
    _, folder, first = net_exports[make.__name__]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(99)  # the user's global seed does not enter
    second = export(make(), "another name", rank="25%", bench_seconds=0.01, keep_dense=True, allow_slower=True)
    assert (tmp_path / "another name" / "model.onnx").read_bytes() == (folder / "model.onnx").read_bytes()
    assert first.source.hash == second.source.hash
    assert first.probe == second.probe


def test_another_seed_weight_or_setting_gives_other_bytes(tmp_path, model):
    names = {}
    for name, options in {
        "first": {},
        "again": {},
        "seed": {"seed": 1},
        "q": {"power_iterations": 5},
        "rank": {"rank": 5},
    }.items():
        export(str(model), tmp_path / name, **{"rank": 4, **QUICK, **options})
        names.setdefault((tmp_path / name / "model.onnx").read_bytes(), []).append(name)
    assert list(names.values()) == [["first", "again"], ["seed"], ["q"], ["rank"]]


def test_nothing_of_time_or_machine_is_in_the_model(tmp_path, net_exports):
    for _, folder, report in net_exports.values():
        content = (folder / "model.onnx").read_bytes()
        home, here = os.path.expanduser("~"), os.getcwd()
        for secret in (str(folder), str(folder.parent), here, home + "/", "site-packages", ".py", report.created[:10]):
            assert secret.encode() not in content, secret


def test_metadata(net_exports):
    for name, (_, folder, report) in net_exports.items():
        proto = onnx.load(folder / "model.onnx")
        props = {p.key: p.value for p in proto.metadata_props}
        assert set(props) == {"rsi_deploy.version", "rsi_deploy.settings", "rsi_deploy.source_hash"}, name
        assert json.loads(props["rsi_deploy.settings"]) == json.loads(report.settings.model_dump_json())
        assert props["rsi_deploy.source_hash"] == report.source.hash
        assert f"rsi-deploy {props['rsi_deploy.version']}" == report.tool
        assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == ["input", "output"]
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert report.settings.opset == proto.opset_import[0].version == (23 if name == "attention" else 20)


def test_attention_stays_one_op(tmp_path, net_exports):
    _, folder, report = net_exports["attention"]
    assert ops(folder / "model.onnx").count("Attention") == 1
    assert {s.name for s in report.split_sites} >= {"block.attention.in_proj_weight", "block.attention.out_proj"}
    low = export(attention(), tmp_path / "b", rank="25%", opset=18, **QUICK)
    assert low.settings.opset == onnx.load(tmp_path / "b" / "model.onnx").opset_import[0].version == 18
    x = inputs((1, 6, 16), 3)
    np.testing.assert_allclose(
        run_onnx(tmp_path / "b" / "model.onnx", x)[0], run_onnx(folder / "model.onnx", x)[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_that_cannot_be_written_is_refused(tmp_path, opset):
    with pytest.raises(UsageError, match="--opset must be between 18 and 23"):
        export(mlp(), tmp_path / "b", rank=4, opset=opset, **QUICK)


class TiedHead(nn.Module):
    """A head with the embedding's weight, small enough for torch's exporter to fold its Transpose into a copy."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.relu(self.fc(self.embed(x))))


def test_a_small_tied_weight_is_not_copied(tmp_path):
    net = seeded(TiedHead)
    torch.export.save(torch.export.export(net, (torch.zeros(2, 5, dtype=torch.int64),)), tmp_path / "net.pt2")
    report = export(str(tmp_path / "net.pt2"), tmp_path / "b", rank=3, **QUICK)
    assert report.dense.params == sum(p.numel() for p in net.parameters())
    assert {site.name: len(site.nodes) for site in report.sites} == {"embed": 2, "fc": 1}
    assert [site.name for site in report.split_sites] == ["fc"]


def test_an_onnx_source_keeps_its_opset(tmp_path, model):
    assert export(str(model), tmp_path / "b", rank=4, opset=20, **QUICK).settings.opset == 20


# -- which sites


@pytest.mark.parametrize(
    "filters", [{"include": ["fc*"]}, {"exclude": ["head"]}, {"include": ["*"], "exclude": ["fc1", "h*d"]}], ids=str
)
def test_filters_reach_the_same_sites_both_ways(tmp_path, model, filters):
    report = export(str(model), tmp_path / "b", rank="25%", **filters, **QUICK)
    records = compress_(mlp(), "25%", **filters)
    assert [(s.name, s.rank, s.reason) for s in report.sites] == [(r.name, r.rank, r.reason) for r in records]
    assert any(s.rank is None for s in report.sites)
    assert report.settings.include == tuple(filters.get("include", ()))


def test_filters_reach_packed_attention_both_ways(tmp_path):
    filters = {"include": ["*.in_proj_weight", "grow"]}
    report = export(attention(), tmp_path / "b", rank="25%", **filters, **QUICK)
    assert {s.name for s in report.split_sites} == {"block.attention.in_proj_weight", "grow"}
    assert {r.name for r in compress_(attention(), "25%", **filters) if r.rank} == {s.name for s in report.split_sites}


def test_filters_change_no_other_sites_factors(tmp_path, model):
    export(str(model), tmp_path / "all", rank="25%", **QUICK)
    export(str(model), tmp_path / "one", rank="25%", include=["fc2"], **QUICK)
    every, one = (initializers(tmp_path / name / "model.onnx") for name in ("all", "one"))
    np.testing.assert_array_equal(every["fc2.left"], one["fc2.left"])
    assert "fc1.weight" in one


def test_a_filter_that_matches_nothing_is_refused(tmp_path, model):
    with pytest.raises(UsageError, match=r"--exclude 'classifier\.\*' matches none of the 3 sites"):
        export(str(model), tmp_path / "b", rank=4, exclude=["classifier.*"], **QUICK)


def test_nothing_to_split_lists_the_reasons(tmp_path, model, capsys):
    command = ["export", str(model), "-o", str(tmp_path / "b"), "--no-bench", "--rank"]
    assert run([*command, "100%"]) == 3
    err = capsys.readouterr().err
    assert "nothing to split: rank 12 saves nothing: break-even is 8.7 (fc1); " in err
    assert run([*command, "25%", "--exclude", "*"]) == 3
    assert "excluded by --exclude * (fc1, fc2, head)" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
    x = inputs((1, A), 4)
    assert run([*command, "100%", "--always-split"]) == 0
    # float32 rounding: the factors have full rank
    np.testing.assert_allclose(run_onnx(tmp_path / "b/model.onnx", x)[0], run_onnx(model, x)[0], rtol=1e-4, atol=1e-5)


def test_a_model_without_weights_says_so(tmp_path):
    with pytest.raises(ModelError, match="nothing to split: the graph has no weight-bearing node"):
        export(ShapedSequential((1, 4), relu=nn.ReLU()), tmp_path / "b", rank=1, **QUICK)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys, bad):
    weight = np.ones((C, B), np.float32)
    weight[2, 3] = bad
    path = mlp_onnx(tmp_path / "m.onnx", fc2=weight)
    command = ["export", str(path), "--rank", "4", "-o", str(tmp_path / "b"), "--no-bench"]
    assert run(command) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "site 'fc2'" in err
    assert "1 NaN or infinite values of 768" in err
    assert "--exclude 'fc2'" in err
    assert not (tmp_path / "b").exists()


# -- what else the bundle may hold


def test_keep_dense(tmp_path, model):
    report = export(str(model), tmp_path / "b", rank=4, keep_dense=True, **QUICK)
    assert set(report.files) == {"dense.onnx", "dense.onnx.data", "model.onnx"}
    x = inputs((1, A), 3)
    np.testing.assert_array_equal(run_onnx(tmp_path / "b" / "dense.onnx", x)[0], run_onnx(model, x)[0])
    assert not (tmp_path / "b" / "work").exists()


class Static(nn.Module):
    """The batch is a Python number in the graph."""

    input_shape = (1, 12)

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(12, 32), nn.Linear(32, 10)

    def forward(self, x):
        if x.shape[0] == 2:
            x = x + 0
        return self.head(self.fc(x).relu())


def test_a_model_without_a_dynamic_batch_gets_a_fixed_one_and_a_note(tmp_path):
    net = seeded(Static)
    report = export(net, tmp_path / "b", rank="25%", bench_seconds=0.05, allow_slower=True)
    (note,) = report.notes
    assert note.startswith("the batch size is fixed at 1: the model does not export with a dynamic one (")
    assert next(iter(report.probe_shapes.values()))[0] == 1
    assert report.dense.macs == 12 * 32 + 32 * 10
    assert onnxruntime.InferenceSession(tmp_path / "b" / "model.onnx").get_inputs()[0].shape == [1, 12]


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_an_onnx_model_with_a_fixed_batch(tmp_path, batch):
    path = mlp_onnx(tmp_path / "m.onnx", batch=batch)
    data = labelled(tmp_path / "d.npz", mlp_onnx(tmp_path / "dynamic.onnx"), count=60)
    report = export(str(path), tmp_path / "b", rank=5, data=data, **QUICK)
    assert report.accuracy.dense.top1 == pytest.approx(85)
    assert next(iter(report.probe_shapes.values()))[0] == batch
    if batch == 64:
        assert report.softmax_bound is None
        (note,) = report.notes
        assert note.startswith("no softmax bound: 60 samples")
        assert note.endswith("64")
    else:
        assert report.softmax_bound.samples == 60 // batch * batch


class TwoOutputs(nn.Module):
    """A tensor, and what an attention block gives without weights."""

    input_shape = (1, 12)

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 30)

    def forward(self, x):
        return self.fc(x), None


def test_an_output_that_is_no_tensor_is_none_of_the_models(tmp_path):
    report = export(seeded(TwoOutputs), tmp_path / "b", rank=4, **QUICK)
    assert len(report.probe) == 1


class Tied(nn.Module):
    """One weight at two places."""

    input_shape = (1, 12)

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 10)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu())


def test_tied_weights_stay_tied(tmp_path):
    report = export(seeded(Tied), tmp_path / "b", rank=3, allow_larger=True, **QUICK)
    (site,) = (s for s in report.sites if s.name == "a")
    assert len(site.nodes) == 2
    assert sorted(n for n in initializers(tmp_path / "b" / "model.onnx") if "left" in n or "right" in n) == [
        "a.left",
        "a.right",
        "head.left",
        "head.right",
    ]
    assert site.macs_dense == 2 * 144
    assert report.dense.params - report.compressed.params == (144 - 72) + (120 - 66)
    tied = seeded(Tied)
    compress_(tied, 3)
    x = inputs((1, 12), 4)
    with torch.inference_mode():
        expected = tied(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(
        run_onnx(tmp_path / "b" / "model.onnx", x)[0], expected, rtol=1e-4, atol=1e-6
    )  # rounding


def test_seeds_and_baselines_are_recorded(tmp_path, model):
    report = export(
        str(model), tmp_path / "b", rank=4, method="rsvd", power_iterations=4, seed=5, oversampling=2, **QUICK
    )
    settings = report.settings
    assert (settings.method, settings.power_iterations, settings.seed, settings.oversampling) == ("rsvd", 1, 5, 2)
    errors = {}
    for method in ("svd", "rsi", "rsvd"):
        report = export(str(model), tmp_path / method, rank=4, method=method, **QUICK)
        errors[method] = sum(s.normalized_error for s in report.sites)
    assert 3 <= errors["svd"] <= 3 + 1e-3
    assert errors["svd"] <= errors["rsi"] < errors["rsvd"]


def test_progress_is_told(tmp_path, model):
    seen = []
    export(str(model), tmp_path / "b", rank=4, progress=lambda *a: seen.append(a), **QUICK)
    assert seen == [("fc1", 0, 3), ("fc2", 1, 3), ("head", 2, 3)]


def test_a_model_onnxruntime_cannot_run_is_rewritten_and_says_what_was_not_checked(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Strange", ["h"], ["y"], domain="my.ops")]
    weight = numpy_helper.from_array(np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32), "w")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 64]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [weight])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("my.ops", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    report = export(str(tmp_path / "m.onnx"), tmp_path / "out", rank="25%")
    assert [site.rank for site in report.sites] == [16]
    assert (report.verification.surgery, report.verification.approximation, report.latency) == (None, None, None)
    checked, counted = report.notes
    assert checked.startswith("nothing could be verified or measured: m.onnx")
    assert "MACs" in counted
    assert all("Strange" in note and str(tmp_path) not in note for note in report.notes)
    assert onnx.load(tmp_path / "out" / "model.onnx").graph.node[-1].op_type == "Strange"


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="torch 2.9 cannot convert *args")
def test_a_forward_of_any_number_of_inputs_keeps_its_dynamic_batch(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16)
            self.example_inputs = (torch.zeros(2, 16), torch.zeros(2, 16))

        def forward(self, *parts):
            return self.fc(sum(parts))

    report = export(Sum(), tmp_path / "out", rank=2, measure=False)
    assert not any("batch" in note for note in report.notes)
    x = np.ones((5, 16), np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    assert session.run(None, {i.name: x for i in session.get_inputs()})[0].shape == (5, 16)
