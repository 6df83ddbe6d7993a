"""Calibration of Einsum sites: the moments, sensitivities and distances of a twin of MatMul and Reshape."""

import json

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from rsi_deploy.calibration.activations import Replacement
from rsi_deploy.cli import run
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams

SAMPLES, LENGTH, WIDTH, HEADS, SIZE = 24, 5, 8, 2, 3


def weights():
    rng = np.random.default_rng(0)
    shapes = {
        "q": (WIDTH, HEADS, SIZE),
        "o": (HEADS, SIZE, WIDTH),
        "m": (WIDTH, WIDTH),
        "up": (WIDTH, 12),
        "head": (12, 4),
    }
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


EINSUMS = """
    h = Einsum<equation = "bsd,dhk->bhsk">(x, q)
    t = Tanh(h)
    a = Einsum<equation = "bhsk,hkd->bsd">(t, o)
    r = Add(x, a)
    c = Transpose<perm = [0, 2, 1]>(r)
    n = Einsum<equation = "bds,de->bes">(c, m)
    e = Transpose<perm = [0, 2, 1]>(n)
    u = Einsum<equation = "dk,...d->...k">(up, e)
    g = Relu(u)
    y = MatMul(g, head)
"""
TWIN = """
    p = MatMul(x, q)
    ps = Constant<value_ints = [0, 0, 2, 3]>()
    pr = Reshape(p, ps)
    h = Transpose<perm = [0, 2, 1, 3]>(pr)
    t = Tanh(h)
    tt = Transpose<perm = [0, 2, 1, 3]>(t)
    ts = Constant<value_ints = [0, 0, 6]>()
    tr = Reshape(tt, ts)
    a = MatMul(tr, o)
    r = Add(x, a)
    e = MatMul(r, m)
    u = MatMul(e, up)
    g = Relu(u)
    y = MatMul(g, head)
"""


def saved(path, body, flat=False):
    text = f"""<ir_version: 9, opset_import: ["" : 18]>
        g (float[n, {LENGTH}, {WIDTH}] x) => (float[n, {LENGTH}, 4] y) {{ {body} }}"""
    model = onnx.parser.parse_model(text)
    for name, array in weights().items():
        shape = {"q": (WIDTH, -1), "o": (-1, WIDTH)}.get(name, array.shape) if flat else array.shape
        model.graph.initializer.append(numpy_helper.from_array(array.reshape(shape), name))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def data():
    return np.random.default_rng(1).standard_normal((SAMPLES, LENGTH, WIDTH)).astype(np.float32)


@pytest.fixture
def both(tmp_path):
    def streams(path):
        return OnnxStreams(path, lambda: iter([{"x": data()}]), SAMPLES, seed=1)

    return streams(saved(tmp_path / "a.onnx", EINSUMS)), streams(saved(tmp_path / "b.onnx", TWIN, flat=True))


def sequenced(streams, rank=0):
    """The moments of every site of a sequence in which each becomes its best product of that rank."""
    found = {}

    def visit(site, moments):
        found[site.name] = moments
        return replaced(site, rank) if rank else None

    streams.sequence(visit)
    return found


def replaced(site, rank):
    u, s, v = torch.linalg.svd(site.load().double(), full_matrices=False)
    left, right = (u[..., :rank] * s[:, None, :rank]).float(), v[:, :rank].float()
    return Replacement(left=left, right=right, bias=torch.linspace(-1, 1, site.out_features)[None], form=site.forms[0])


def test_all_of_them_are_reached(both):
    one, two = both
    assert one.unreachable == {}
    assert {s.name: (s.out_features, s.in_features) for s in one.sites} == {
        s.name: (s.out_features, s.in_features) for s in two.sites
    }


@pytest.mark.parametrize("rank", [0, 2])
def test_moments_are_those_of_the_twin(both, rank):
    one, two = (sequenced(streams, rank) for streams in both)
    assert one.keys() == two.keys() == {"q", "o", "m", "up", "head"}
    for name in one:
        for field in ("mean_x", "mean_y", "xx", "yx"):
            came, expected = getattr(one[name], field), getattr(two[name], field)
            torch.testing.assert_close(came, expected, rtol=1e-4, atol=1e-4, msg=f"{name}: {field}")
            with pytest.raises(AssertionError):
                torch.testing.assert_close(came.flip(-1), expected, rtol=1e-2, atol=1e-2)


def test_sensitivities_are_those_of_the_twin(both):
    one, two = (streams.sensitivities() for streams in both)
    assert one.keys() == two.keys() == {"q", "o", "m", "up", "head"}
    for name in one:
        torch.testing.assert_close(one[name].directions, two[name].directions, rtol=1e-4, atol=1e-4)
        assert one[name].rows.by_sample.keys() == two[name].rows.by_sample.keys()
        for sample, counts in one[name].rows.by_sample.items():
            torch.testing.assert_close(counts, two[name].rows.by_sample[sample], rtol=1e-3, atol=1e-4)


def test_distances_are_those_of_the_twin(both):
    found = []
    for streams in both:
        replacements = {site.name: replaced(site, 2) for site in streams.sites}
        each = {name: streams.distance({name: replacement}) for name, replacement in replacements.items()}
        found.append({name: distance.relative for name, distance in each.items()})
        within = {}

        def visit(site, moments, streams=streams, replacements=replacements, within=within):
            within[site.name] = streams.distance({site.name: replacements[site.name]}).relative

        streams.survey(visit)
        assert within == pytest.approx(found[-1], rel=1e-4)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert all(error > 1e-3 for error in found[0].values())


class Attention(nn.Module):
    """Self-attention and a feed-forward layer whose projections are einsums, as torch exports them."""

    def __init__(self, width=32, heads=2, size=16):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Parameter(torch.randn(width, heads, size) / width**0.5) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, size, width) / width**0.5)
        self.up = nn.Parameter(torch.randn(width, 4 * width) / width**0.5)
        self.down = nn.Parameter(torch.randn(4 * width, width) / width**0.5 / 2)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        """Logits of the mean token."""
        q, k, v = (torch.einsum("bsd,dhk->bhsk", x, weight) for weight in (self.q, self.k, self.v))
        scores = torch.einsum("bhsk,bhtk->bhst", q, k).softmax(-1)
        mixed = torch.einsum("bhst,bhtk->bshk", scores, v)
        x = x + torch.einsum("bshk,hkd->bsd", mixed, self.o)
        h = torch.einsum("bsd,dk->bsk", x, self.up).relu()
        x = x + torch.einsum("abc,cd->abd", h, self.down)
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    shapes = {"x": {0: torch.export.Dim("n")}}
    x = torch.randn(2, 6, 32)
    torch.onnx.export(
        Attention().eval(), (x,), dynamo=True, dynamic_shapes=shapes, input_names=["x"], verbose=False
    ).save(folder / "net.onnx")
    np.savez(folder / "calib.npz", x=np.random.default_rng(2).standard_normal((64, 6, 32)).astype(np.float32))
    return folder


@pytest.mark.parametrize(
    "options", [["--rank", "25%"], ["--rank", "25%", "--calib"], ["--keep-macs", "50%", "--calib"]], ids=" ".join
)
def test_a_torch_model_with_einsums_is_exported_and_verified(exported, tmp_path, options):
    calib = ["--calib", str(exported / "calib.npz")] if "--calib" in options else []
    options = [option for option in options if option != "--calib"]
    out = tmp_path / "out"
    assert run(["export", str(exported / "net.onnx"), "-o", str(out), "--no-bench", *options, *calib]) == 0
    report = json.loads((out / "report.json").read_text())
    kinds = {site["name"]: site["kind"] for site in report["sites"] if site["rank"]}
    assert sum(kind == "Einsum" for kind in kinds.values()) >= 3
    assert report["compressed"]["macs"] < 0.75 * report["dense"]["macs"]
    assert run(["verify", str(out), *calib]) == 0
