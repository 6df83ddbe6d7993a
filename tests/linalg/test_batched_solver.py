import pytest
import torch
from torch import nn

from rsi_deploy.linalg.batched_solver import FactorizationRequest, SolutionCache, solve_in_batches
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.layers import LowRankMultiheadAttention
from rsi_deploy.torch_models.module_sites import find_module_sites


def transformer():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 3, enable_nested_tensor=False)


def convolutional():
    """As in a ResNet, and with groups: equal shapes in a row, and one that is alone."""
    layers = [nn.Conv2d(3, 16, 3), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))]
    return nn.Sequential(*layers, nn.Conv2d(16, 64, 1), nn.Conv2d(64, 64, 3, groups=2), nn.Conv2d(64, 64, 3, groups=2))


def asked(model, rank):
    return {
        site.name: FactorizationRequest(site.matrix()[0], rank) for site in find_module_sites(model) if site.groups == 1
    }


@pytest.mark.parametrize("settings", [{}, {"method": "rsvd"}, {"method": "svd"}, {"route": "exact"}], ids=str)
@pytest.mark.parametrize("kind", [transformer, convolutional])
def test_a_net_compressed_together_has_the_bytes_of_its_sites_alone(kind, settings):
    torch.manual_seed(0)
    model = kind().eval()
    dense = {site.name: site.matrix().clone() for site in find_module_sites(model)}
    ready = solve_in_batches(Solver(seed=5, **settings), asked(model, 4)).ready
    assert bool(ready) == (settings != {"method": "svd"})
    records = compress_(model, 4, seed=5, always_split=True, **settings)
    for record in records:
        alone = Solver(seed=5, **settings).solve(dense[record.name], 4, site=record.name)
        if record.groups == 1:
            alone = Solver(seed=5, **settings).solve(dense[record.name][0], 4, site=record.name)
        assert (record.route, record.power_iterations) == (alone.route, alone.power_iterations)
        assert record.seconds > 0
        layer = model.get_submodule(record.name.removesuffix(".in_proj_weight"))
        packed = isinstance(layer, LowRankMultiheadAttention)
        left = layer.in_proj_left if packed else layer.left
        right = layer.in_proj_right if packed else layer.right
        assert torch.equal(left.reshape(-1), alone.factors.left.reshape(-1))
        assert torch.equal(right.reshape(-1), alone.factors.right.reshape(-1))
        other = Solver(seed=6, **settings).solve(dense[record.name], 4, site=record.name)
        exact = alone.route in ("svd", "exact")
        assert exact or not torch.equal(left.reshape(-1), other.factors.left.reshape(-1))


def test_only_small_equal_weights_are_taken_and_each_solution_once():
    weights = {name: FactorizationRequest(torch.randn(20, 30), 3) for name in "ab"}
    weights |= {
        "other rank": FactorizationRequest(torch.randn(20, 30), 4),
        "other shape": FactorizationRequest(torch.randn(30, 20), 3),
    }
    weights |= {name: FactorizationRequest(torch.randn(400, 300), 3) for name in ("large", "larger")}
    weights |= {name: FactorizationRequest(torch.randn(20, 30), 21) for name in ("above", "full")}
    ahead = solve_in_batches(Solver(), weights)
    assert set(ahead.ready) == {"a", "b"}
    first = ahead.solve(weights["a"].weight, 3, site="a")
    again = ahead.solve(weights["a"].weight, 3, site="a")
    assert set(ahead.ready) == {"b"}
    assert torch.equal(first.factors.left, again.factors.left)
    assert not torch.equal(first.factors.left, ahead.solve(weights["b"].weight, 3, site="b").factors.left)


@pytest.mark.parametrize("bad", [float("nan"), 3e38])
def test_one_that_cannot_be_factorized_is_said_by_its_name(bad):
    weights = {name: FactorizationRequest(torch.randn(20, 30), 3) for name in "abc"}
    weights["b"].weight.fill_(bad)
    ahead = solve_in_batches(Solver(), weights)
    assert ahead == SolutionCache(solver=Solver(), ready={})
    assert torch.isfinite(ahead.solve(weights["a"].weight, 3, site="a").factors.left).all()
    with pytest.raises(ValueError, match="site 'b': "):
        ahead.solve(weights["b"].weight, 3, site="b")
