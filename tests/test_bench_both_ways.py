"""bench/both_ways: both ways see the same samples, shares are those of the model that is left, misses are noticed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench import both_ways, cases
from bench.common import judge
from rsi_deploy.core.errors import UsageError
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.model_source import source_of_module


def small() -> nn.Module:
    """A perceptron with random weights, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU()).eval()


@pytest.fixture
def case(tmp_path: Path) -> cases.Case:
    images = np.random.default_rng(0).standard_normal((200, 3, 4, 4), dtype=np.float32)
    path = tmp_path / "small.onnx"
    cases.write_dense(source_of_module(small(), (1, 3, 4, 4)), path)
    (key,) = (value.name for value in cases.make_session(path).get_inputs())
    with torch.no_grad():
        labels = small()(torch.from_numpy(images)).argmax(dim=1).numpy()
    whole = cases.untested(path, {key: images[:120]})
    return dataclasses.replace(
        whole, name="cnn_cifar10", size=96, test={key: images[120:]}, reference=labels[120:]
    )  # the budget is on all parameters


def test_both_ways_keep_the_budget_and_the_answers(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    draw = cases.Case.draw
    monkeypatch.setattr(cases.Case, "draw", lambda self, number: seen.append(draw(self, number)) or seen[-1])
    module = small()
    dense = both_ways._params(module)
    (onnx, kept), (other, left) = both_ways.by_onnx(case, 1, 0.7), both_ways.by_torch(case, module, 1, 0.7)
    (one,), (two,) = (data.values() for data in seen)
    assert np.array_equal(one, two), "the same samples"
    assert 0.4 < kept <= 0.7
    assert left == both_ways._params(module) / dense
    assert 0.4 < left <= 0.7
    assert min(onnx, other) > 20, "of 30 classes"
    wrong = dataclasses.replace(case, reference=(case.reference + 1) % 30)
    assert max(both_ways.by_onnx(wrong, 1, 0.7)[0], both_ways.by_torch(wrong, small(), 1, 0.7)[0]) < 15


def test_macs_are_counted_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 25, 7)
    ).eval()
    assert both_ways._macs(net, torch.zeros(1, 4, 5, 5)) == 25 * 6 * 2 * 9 + 150 * 7
    assert both_ways._params(net) == 6 * 2 * 9 + 6 + 150 * 7 + 7


def test_macs_of_what_replaced_a_layer_count() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(150, 40)).eval()
    compress_(net, 2)
    conv, product = 25 * 2 * (4 * 9 + 6), 2 * (150 + 40)
    assert both_ways._macs(net, torch.zeros(1, 4, 5, 5)) == conv + product


def test_a_difference_and_a_model_above_its_budget_are_noticed() -> None:
    good = both_ways.Row(
        net="resnet20",
        keep=0.6,
        unit="MACs",
        draws=1,
        dense=92.2,
        onnx=91.0,
        torch=91.3,
        onnx_kept=0.6,
        torch_kept=0.59,
    )
    assert judge(both_ways.goals([good]), check=True) == 0
    assert "-0.30" in both_ways.markdown([good])
    for change in ({"onnx": 90.99}, {"torch": 90.69}, {"onnx_kept": 0.601}, {"torch_kept": 0.601}):
        assert judge(both_ways.goals([dataclasses.replace(good, **change)]), check=True) == 4, change


def test_the_mean_is_over_the_draws() -> None:
    runs = [("dense", 0, 92.0, 1.0), ("onnx", 0, 91.0, 0.6), ("torch", 0, 90.0, 0.5), ("onnx", 1, 90.0, 0.5)]
    row = both_ways.tabulate("resnet20", [*runs, ("torch", 1, 92.0, 0.4)])
    assert (row.onnx, row.torch, row.difference, row.onnx_kept, row.torch_kept) == (90.5, 91.0, -0.5, 0.6, 0.5)


def test_no_draws_are_refused() -> None:
    with pytest.raises(UsageError, match="--draws is at least 1, but got 0"):
        both_ways.main(["--draws", "0"])
