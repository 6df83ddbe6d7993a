"""Metrics of ONNX sites against Jacobians known on paper, or taken by torch through the same network."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from rsi_deploy.calibrate.onnx_streams import OnnxStreams
from rsi_deploy.onnx_file import write_external
from rsi_deploy.source import source_of_module
from rsi_deploy.to_onnx import to_onnx

SAMPLES = 64


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
    metrics = streams_of(path, feeds).metrics()
    V = module[1].weight.double()
    assert set(metrics) == {"0", "1"}
    assert metrics["0"].shape == (1, 8, 8)
    assert close(metrics["0"][0], V.T @ V)
    assert close(metrics["1"][0], torch.eye(6, dtype=torch.float64))
    assert not close(metrics["0"][0], torch.eye(8, dtype=torch.float64))


def test_the_probes_are_seeded(chain):
    _, path = chain
    (name,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    feeds = {name: np.ones((8, 5), np.float32)}
    one, two = streams_of(path, feeds).metrics(), streams_of(path, feeds).metrics()
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
    found = streams_of(path, {name: x.numpy()}).metrics()
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
    assert streams_of(path, {"x": np.ones((4, 4), np.float32)}).metrics() == {}
