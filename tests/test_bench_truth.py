"""bench/truth: a report is compared with samples that nothing has seen, and a wrong statement is a miss."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench import cases, common, truth
from rsi_deploy.core.errors import GateError
from rsi_deploy.exporting.run import ExportRun
from rsi_deploy.torch_models.model_source import source_of_module

IMAGES = 240


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    """A small net with random weights; all images are test images, as those of CIFAR-10 in the beginning."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 40), nn.ReLU(), nn.Linear(40, 8)
        ).eval()
        images = torch.randn(IMAGES, 4, 4, 4)
        labels = module(images).argmax(dim=1).numpy()
    path = tmp_path_factory.mktemp("case") / "small.onnx"
    cases.write_dense(source_of_module(module, (1, 4, 4, 4)), path)
    return dataclasses.replace(
        cases.untested(path, {"input": images.numpy()}), test={"input": images.numpy()}, reference=labels
    )


def row(net: str, keep: float, test: float = 95, **change: object) -> truth.Row:
    made = truth.Row(
        net=net, keep=keep, data="new", measure="agreement", reported=96, interval=(94, 97), in_sample=99, test=test
    )
    return dataclasses.replace(made, **change)


CELLS = [row(net, keep) for net in truth.NETS for keep in truth.KEEPS]


def test_images_calibrate_or_test(case: cases.Case) -> None:
    same = truth.of_the_same_kind(case)
    (calib,), (test,) = same.pool.values(), same.test.values()
    assert len(calib) == same.size == len(test) == len(same.reference) == IMAGES // 2
    both = np.concatenate([calib, test]).reshape(IMAGES, -1)
    assert len(np.unique(both, axis=0)) == IMAGES
    assert same.score(same.path).value == 100, "images keep their labels"


def test_a_report_is_compared_with_the_test_samples(case: cases.Case) -> None:
    same = truth.of_the_same_kind(case)
    (found,) = truth.measure(same, "new", [0.6])
    assert (found.checked, found.tested) == (24, IMAGES // 2)
    assert found.kept is not None
    assert found.kept <= 0.6
    assert found.interval is not None
    assert found.reported is not None
    assert found.interval[0] <= found.reported <= found.interval[1]
    compressed = next(same.path.parent.glob("*/model.onnx"))
    (images,) = same.test.values()
    dense, outputs = (cases.outputs_of(path, {"input": images}).argmax(axis=1) for path in (same.path, compressed))
    assert found.test == pytest.approx(100 * (dense == outputs).mean())
    assert found.confidence != found.test_confidence


class Encoder(nn.Module):
    """A perceptron with unit embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.second(torch.relu(self.first(x))), dim=-1)


def test_embeddings_are_compared_by_their_cosine(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, samples = Encoder().eval(), torch.randn(200, 24).numpy()
    path = tmp_path / "encoder.onnx"
    cases.write_dense(source_of_module(module, (1, 24)), path)
    (key,) = (value.name for value in cases.make_session(path).get_inputs())
    untested = cases.untested(path, {key: samples[:150]})
    (found,) = truth.measure(dataclasses.replace(untested, name="minilm", test={key: samples[150:]}), "new", [0.5])
    dense, compressed = (
        cases.outputs_of(model, {key: samples[150:]}) for model in (path, next(tmp_path.glob("*/model.onnx")))
    )
    assert found.measure == "cosine"
    assert found.test == pytest.approx(float((dense * compressed).sum(axis=1).mean()), abs=1e-5)
    assert found.interval is not None
    assert found.reported is not None
    assert -1 <= found.interval[0] <= found.reported <= found.interval[1] <= 1
    assert found.confidence is found.test_confidence is None


def test_a_refused_budget_is_a_row_without_values(case: cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise GateError("no plan holds up")

    monkeypatch.setattr(ExportRun, "write_bundle", refuse)
    (found,) = truth.measure(truth.of_the_same_kind(case), "training images", [0.5])
    assert (found.refused, found.reported, found.holds) == ("no plan holds up", None, False)
    assert "refused" in truth.markdown([found])


@pytest.mark.parametrize(
    ("wrong", "held"),
    [
        ([], True),
        ([{"test": 93.9}, {"test": 97.1}], True),
        ([{"test": 93.9}, {"test": 97.1}, {"test": 4.0}], False),
        ([{"test": 93.9}, {"test": 97.1}, {"reported": None, "interval": None}], False),
    ],
)
def test_a_value_outside_the_reported_interval_is_a_miss(wrong: list[dict[str, float]], held: bool) -> None:
    rows = [dataclasses.replace(cell, **dict(change)) for cell, change in zip(CELLS, wrong + [{}] * 20, strict=False)]
    goals = truth.judged(rows)
    assert [goal.held for goal in goals] == [held]
    assert f"{20 - len(wrong)} of 20" in goals[0].row
    assert ("resnet20 at 0.9" in goals[0].row) == bool(wrong)
    assert common.judge(goals, check=True) == (0 if held else 4)


def test_rows_of_training_images_are_shown_but_not_judged() -> None:
    trained = [row("resnet20", keep, 80, data="training images") for keep in truth.KEEPS]
    assert truth.judged([*CELLS, *trained])[0].held
    assert not truth.judged(trained)[0].held, "nothing was judged"
    assert "not judged" in truth.markdown(trained)
