"""Metrics of ONNX sites against Jacobians known on paper, or taken by torch through the same network."""

import functools

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rsi_deploy.calibration.output_sensitivity import SensitivityAccumulator
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.onnx_models.calibration import gradients as onnx_gradients
from rsi_deploy.onnx_models.calibration import operators as onnx_operators
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.torch_models.model_source import source_of_module
from rsi_deploy.torch_models.to_onnx import to_onnx

SAMPLES = 64


def sensitivities_of(streams):
    return {name: sensitivity.directions.double() for name, sensitivity in streams.sensitivities().items()}


def streams_of(path, feeds):
    return OnnxStreams(path, lambda: iter([feeds]), len(next(iter(feeds.values()))), seed=1)


def close(found, expected):
    """Whether two metrics are the same but for their scale, and for the noise of the probes."""
    a, b = found / found.norm(), expected / expected.norm()
    return float((a - b).norm()) < 0.25


@pytest.fixture
def chain(tmp_path):
    """x -> first (8) -> second (6): behind `first` the Jacobian is the weight of `second`."""
    module = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6)).eval().requires_grad_(False)
    with torch.no_grad():
        module[1].weight.mul_(torch.tensor([3.0, 1, 0.1, 2, 0.5, 1, 0.2, 0.7]))
    model = to_onnx(source_of_module(module, (2, 5))).model
    path = tmp_path / "chain.onnx"
    write_external(model, path)
    return module, path


def test_a_linear_rest_gives_its_own_gram_matrix(chain):
    module, path = chain
    (name,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    feeds = {name: np.random.default_rng(0).standard_normal((128, 5), dtype=np.float32)}
    sensitivities = sensitivities_of(streams_of(path, feeds))
    V = module[1].weight.double()
    assert set(sensitivities) == {"0", "1"}
    assert sensitivities["0"].shape == (1, 8, 8)
    assert close(sensitivities["0"][0], V.T @ V)
    assert close(sensitivities["1"][0], torch.eye(6, dtype=torch.float64))
    assert not close(sensitivities["0"][0], torch.eye(8, dtype=torch.float64))


def test_the_probes_are_seeded(chain):
    _, path = chain
    (name,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    feeds = {name: np.ones((8, 5), np.float32)}
    one, two = sensitivities_of(streams_of(path, feeds)), sensitivities_of(streams_of(path, feeds))
    assert all(torch.equal(one[site], two[site]) for site in one)


class Net(nn.Module):
    """A residual Conv block with a grouped Conv, pooled."""

    def __init__(self):
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 6, 3, padding=1, stride=2), nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        """Logits, and what the sites said."""
        h1 = self.c1(x)
        r = h1.relu()
        h2 = self.c2(r)
        return self.fc((h2 + r).relu().mean(dim=(2, 3)))


def test_metrics_of_convs_are_those_of_torch(tmp_path):
    torch.manual_seed(0)
    module = Net().eval()
    path = tmp_path / "net.onnx"
    write_external(to_onnx(source_of_module(module, (2, 3, 8, 8))).model, path)
    (name,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    x = torch.randn(SAMPLES, 3, 8, 8)
    found = sensitivities_of(streams_of(path, {name: x.numpy()}))
    heard = {}
    for site in ("c1", "c2"):
        getattr(module, site).register_forward_hook(lambda m, a, y, site=site: heard.__setitem__(site, y))
    z = module(x)
    for site, groups in (("c1", 1), ("c2", 2)):
        expected = 0
        for row in torch.eye(4):
            (g,) = torch.autograd.grad((z * row).sum(), heard[site], retain_graph=True)
            rows = g.movedim(1, -1).reshape(-1, groups, 6 // groups).movedim(1, 0).double()
            expected = expected + rows.mT @ rows
        assert found[site].shape == expected.shape
        assert close(found[site], expected)
        assert not close(found[site], expected.flip(-1))


def test_an_operator_that_has_no_gradient_here_leaves_all_without_metric(tmp_path):
    path = tmp_path / "selu.onnx"
    onnx.save(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, 4] x) => (float[n, 3] y) <float[4, 5] a, float[5, 3] b> {
          h = MatMul(x, a)
          s = Selu(h)
          y = MatMul(s, b)
        }
        """),
        path,
    )
    model = onnx.load(path)
    for name, shape in (("a", (4, 5)), ("b", (5, 3))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, path)
    assert sensitivities_of(streams_of(path, {"x": np.ones((4, 4), np.float32)})) == {}


HEAD = '<ir_version: 10, opset_import: ["" : 20]>'


def saved(path, text, seed=0, **weights):
    """A model written as text; its weights are random, of these shapes."""
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(HEAD + text)
    for name, (shape, dtype) in weights.items():
        array = rng.standard_normal(shape).astype(dtype)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.save(model, path)
    return path


def test_half_precision_is_computed_in_single(tmp_path):
    sensitivities = {}
    for kind, dtype in (("float16", np.float16), ("float", np.float32)):
        text = f"g ({kind}[n, 4] x) => ({kind}[n, 3] y) {{ h = MatMul(x, a)  s = Tanh(h)  y = MatMul(s, b) }}"
        path = saved(tmp_path / f"{kind}.onnx", text, a=((4, 5), dtype), b=((5, 3), dtype))
        feeds = {"x": np.random.default_rng(1).standard_normal((64, 4)).astype(dtype)}
        sensitivities[kind] = sensitivities_of(streams_of(path, feeds))
    assert set(sensitivities["float16"]) == set(sensitivities["float"]) == {"a", "b"}
    for site, G in sensitivities["float"].items():
        torch.testing.assert_close(sensitivities["float16"][site], G, rtol=0.02, atol=1e-2 * float(G.abs().max()))


def test_the_output_is_the_first_floating_one_and_other_branches_may_hold_anything(tmp_path):
    path = saved(
        tmp_path / "two.onnx",
        """g (float[n, 4] x) => (int64[n] best, float[n, 3] y, float[n, 5] other) {
          h = MatMul(x, a)
          best = ArgMax<axis = 1, keepdims = 0>(h)
          s = Tanh(h)
          y = MatMul(s, b)
          other = Selu(h)
        }""",
        a=((4, 5), np.float32),
        b=((5, 3), np.float32),
    )
    sensitivities = sensitivities_of(streams_of(path, {"x": np.ones((64, 4), np.float32)}))
    assert set(sensitivities) == {"a", "b"}
    assert close(sensitivities["b"][0], torch.eye(3, dtype=torch.float64))


def test_padding_is_not_asked(tmp_path):
    path = saved(
        tmp_path / "tokens.onnx",
        """g (float[n, l, 4] x, int64[n, l] mask) => (float[n, l, 3] y) {
          h = MatMul(x, a)
          s = Relu(h)
          y = MatMul(s, b)
        }""",
        a=((4, 5), np.float32),
        b=((5, 3), np.float32),
    )
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 6, 4), dtype=np.float32)
    mask = (np.arange(6) < rng.integers(1, 6, (8, 1))).astype(np.int64)
    loud = np.where(mask[..., None] == 1, x, np.float32(50)).astype(np.float32)
    one, two = (sensitivities_of(streams_of(path, {"x": data, "mask": mask})) for data in (x, loud))
    torch.testing.assert_close(one["a"], two["a"])
    whole = sensitivities_of(streams_of(path, {"x": loud, "mask": np.ones_like(mask)}))
    assert not torch.allclose(whole["a"], one["a"], rtol=1e-2)


def test_an_error_of_torch_is_logged_and_leaves_all_without(tmp_path, monkeypatch, caplog):
    def broken(attributes, *given):
        raise RuntimeError("the size of tensor a must match")

    path = saved(
        tmp_path / "m.onnx",
        "g (float[n, 4] x) => (float[n, 3] y) { h = MatMul(x, a) s = Tanh(h) y = MatMul(s, b) }",
        a=((4, 5), np.float32),
        b=((5, 3), np.float32),
    )
    feeds = {"x": np.ones((4, 4), np.float32)}
    assert sensitivities_of(streams_of(path, feeds))
    monkeypatch.setitem(onnx_operators._OPERATORS, "Tanh", broken)
    with caplog.at_level("WARNING"):
        assert sensitivities_of(streams_of(path, feeds)) == {}
    assert "must match" in caplog.text


def test_memory_is_bounded(tmp_path, monkeypatch, caplog):
    path = saved(
        tmp_path / "m.onnx",
        "g (float[n, 4] x) => (float[n, 3] y) { h = MatMul(x, a) s = Tanh(h) y = MatMul(s, b) }",
        a=((4, 500), np.float32),
        b=((500, 3), np.float32),
    )
    feeds = {"x": np.random.default_rng(0).standard_normal((64, 4), dtype=np.float32)}
    whole = sensitivities_of(streams_of(path, feeds))
    fixed = 4 * (500**2 + 3**2) + 4 * 500 * 7  # the metrics, and the weights
    for room, there in ((3 * 500 * 4 * 4, True), (500 * 4, False)):
        limit = functools.partial(SensitivityAccumulator, memory=fixed + room)
        monkeypatch.setattr(onnx_gradients, "SensitivityAccumulator", limit)
        with caplog.at_level("INFO"):
            cut = sensitivities_of(streams_of(path, feeds))
        assert bool(cut) is there
        for site in cut:
            torch.testing.assert_close(cut[site], whole[site], rtol=1e-4, atol=1e-4)
    assert "bytes" in caplog.text


def test_an_old_opset_is_refused(tmp_path):
    text = "g (float[n, 4] x) => (float[n, 5] y) { h = MatMul(x, a) y = Softmax(h) }"
    path = saved(tmp_path / "m.onnx", text, a=((4, 5), np.float32))
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)}
    assert sensitivities_of(streams_of(path, feeds))
    model = onnx.load(path)
    model.opset_import[0].version = 12
    onnx.save(model, path)
    assert sensitivities_of(streams_of(path, feeds)) == {}


def test_outputs_that_depend_on_no_site_give_no_metric(tmp_path, caplog):
    """A class number is no floating output, and the other output stands beside the site."""
    text = "g (float[n, 4] x) => ({} top, float[n, 4] same) {{ h = MatMul(x, a) top = {} same = Relu(x) }}"
    weight = ((4, 5), np.float32)
    numbers = saved(tmp_path / "numbers.onnx", text.format("int64[n, 1]", "ArgMax <axis = 1> (h)"), a=weight)
    scores = saved(tmp_path / "scores.onnx", text.format("float[n, 5]", "Relu(h)"), a=weight)
    feeds = {"x": np.random.default_rng(0).standard_normal((8, 4), dtype=np.float32)}
    with caplog.at_level("INFO"):
        assert sensitivities_of(streams_of(numbers, feeds)) == {}
    assert "no floating output depends on a site" in caplog.text
    assert set(sensitivities_of(streams_of(scores, feeds))) == {"a"}
