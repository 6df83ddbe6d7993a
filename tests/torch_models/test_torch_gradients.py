"""Output sensitivities of a torch module equal those of the same network in ONNX, whatever the module does."""

import onnx
import pytest
import torch
from torch import nn

from rsi_deploy.calibration.activations import RowCounts
from rsi_deploy.io.onnx_file import write_external
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.torch_models.calibration.activations import TorchActivations
from rsi_deploy.torch_models.fold_batch_norm import fold_batch_norms_
from rsi_deploy.torch_models.model_source import source_of_module
from rsi_deploy.torch_models.to_onnx import to_onnx
from tests import nets

CASES = {"mlp": (nets.mlp, (12,)), "cnn": (nets.cnn, (3, 8, 8)), "attention": (nets.attention, (6, 16))}


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sensitivities_of(module, *data):
    return directions(TorchActivations(module.eval(), lambda: iter(data), seed=1))


def directions(activations):
    return {name: sensitivity.directions.double() for name, sensitivity in activations.sensitivities().items()}


def relative(found, expected):
    """The distance of two sensitivities up to their scale."""
    a, b = found / found.norm(), expected / expected.norm()
    return float((a - b).norm())


@pytest.mark.parametrize("name", CASES)
def test_torch_and_onnx_have_the_same_sensitivities(tmp_path, name):
    make, shape = CASES[name]
    module = make().eval()
    fold_batch_norms_(module)  # as compress_ with calib does
    path = tmp_path / "dense.onnx"
    model = to_onnx(source_of_module(module, (2, *shape))).model
    write_external(model, path)
    (given,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    data = [torch.randn(24, *shape), torch.randn(16, *shape)]
    a = sensitivities_of(module, *((x,) for x in data))
    b = directions(OnnxStreams(path, lambda: iter({given: x.numpy()} for x in data), 40, seed=1))
    common = a.keys() & b.keys()
    assert len(common) >= 2
    for site in common:
        assert a[site].shape == b[site].shape
        assert relative(a[site], b[site]) < 1e-3, site
    other = directions(OnnxStreams(path, lambda: iter({given: x.numpy()} for x in data), 40, seed=2))
    assert any(relative(a[site], other[site]) > 1e-2 for site in common)


def test_torch_and_onnx_have_the_same_row_weights(tmp_path):
    module = Block(nn.Tanh())
    module = nn.Sequential(module.first, module.middle, module.second).eval()
    path = tmp_path / "dense.onnx"
    write_external(to_onnx(source_of_module(module, (2, 6, 5))).model, path)
    (given,) = (value.name for value in onnx.load(path, load_external_data=False).graph.input)
    data = [torch.randn(24, 6, 5), torch.randn(16, 6, 5)]
    a = TorchActivations(module, lambda: iter((x,) for x in data), seed=1)
    b = OnnxStreams(path, lambda: iter({given: x.numpy()} for x in data), 40, seed=1)
    for site in ("0", "2"):
        one, two = (activations.sensitivities()[site].rows.by_sample for activations in (a, b))
        assert one.keys() == two.keys() == set(range(40))
        torch.testing.assert_close(
            torch.stack([one[n] for n in range(40)]), torch.stack([two[n] for n in range(40)]), rtol=1e-3, atol=1e-3
        )

    def gathered(activations, site, counts):
        found = {}
        activations.sequence(lambda s, moments: found.__setitem__(s.name, moments), counts)
        return found[site]

    generator = torch.Generator().manual_seed(0)
    often = torch.randint(1, 4, (40, 6), generator=generator)
    counts = {"2": RowCounts(by_sample={n: often[n].float() for n in range(40)})}
    x = torch.tanh(module[0](torch.cat(data))).reshape(240, 8).double().detach()
    x = x.repeat_interleave(often.reshape(-1), dim=0)
    expected = torch.cov(x.mT, correction=0)
    for activations in (a, b):
        found = gathered(activations, "2", counts)
        torch.testing.assert_close(found.xx[0], expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(gathered(activations, "2", {}).xx[0], expected, rtol=1e-2, atol=1e-4)


class Block(nn.Module):
    """Two sites and what the middle does."""

    def __init__(self, middle):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 6)
        self.middle = middle

    def forward(self, x):
        """The output."""
        return self.second(self.middle(self.first(x)))


def test_overwriting_the_response_changes_nothing():
    x = torch.randn(32, 5)
    plain, in_place = (sensitivities_of(Block(nn.ReLU(inplace=flag)), (x,)) for flag in (False, True))
    assert set(plain) == {"first", "second"}
    for site, G in plain.items():
        torch.testing.assert_close(in_place[site], G)
    assert relative(sensitivities_of(Block(nn.Tanh()), (x,))["first"], plain["first"]) > 1e-2


class Called(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        """What the function gives."""
        return self.function(x)


def test_a_module_that_keeps_no_gradients_cuts_off_what_is_before():
    x = torch.randn(8, 5)
    assert set(sensitivities_of(Block(Called(torch.no_grad()(torch.relu))), (x,))) == {"second"}
    whole = Block(nn.ReLU())
    whole.forward = torch.no_grad()(whole.forward)
    assert sensitivities_of(whole, (x,)) == {}


def test_an_overwritten_value_leaves_no_sensitivities():
    assert sensitivities_of(Block(Called(lambda x: x.exp().add_(1))), (torch.randn(8, 5),)) == {}


def test_the_module_is_as_it_was():
    module = Block(nn.ReLU())
    module.first.weight.requires_grad_(False)
    sensitivities_of(module, (torch.randn(8, 5),))
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in module.parameters())
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    x = torch.randn(32, 5)
    exact, found = (
        sensitivities_of(Block(nn.Tanh()), (x,)),
        sensitivities_of(Block(nn.Tanh()).to(dtype), (x.to(dtype),)),
    )
    assert found.keys() == exact.keys()
    for site, G in exact.items():
        assert found[site].dtype == torch.float64
        assert relative(found[site], G) < 0.03
    assert relative(found["first"], torch.eye(8)[None]) > 0.1


class Tokens(nn.Module):
    """A site over tokens whose output at each is its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, mask):
        """Tokens."""
        return self.second(self.first(x).relu())


def test_padding_has_no_gradients():
    module, x = Tokens(), torch.randn(6, 5, 4)
    mask = torch.arange(5).expand(6, 5) < torch.tensor([5, 1, 3, 2, 5, 4])[:, None]
    loud = torch.where(mask[..., None], x, 50 * torch.randn(6, 5, 4).abs())
    one, two = (sensitivities_of(module, (data, mask.long())) for data in (x, loud))
    torch.testing.assert_close(one["first"], two["first"])
    all_of_it = sensitivities_of(module, (x, torch.ones_like(mask).long()))
    assert relative(all_of_it["first"], one["first"]) > 1e-2
