"""bench/language: each baseline keeps its share and does what its paper says; missed goals are noticed."""

import pytest
import torch

from bench import language
from bench.common import judge
from bench.language import Row
from bench.language_model import LanguageModel, perplexity
from tests.nets import random_llama

REMOVED = 0.4


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    """A language model of two blocks with weights of falling singular values, on text with a few frequent tokens."""
    module = random_llama(64)
    text = (torch.rand(10, 96, generator=torch.Generator().manual_seed(0)) ** 4 * 64).long()
    module.model.embed_tokens.weight.mul_(torch.linspace(0.2, 4, 64)[:, None])
    module.lm_head.weight.mul_(8)
    return LanguageModel(module=module, calibration=text[:6], test=text[6:])


def shift(model: LanguageModel, dense: torch.Tensor) -> float:
    """How far the logits of the calibration text moved."""
    return float((model.module(model.calibration, use_cache=False).logits - dense).norm() / dense.norm())


def test_every_baseline_keeps_its_share_and_what_the_data_need(model: LanguageModel) -> None:
    weights = {name: layer.weight.clone() for name, layer in model.linears().items()}
    dense = model.module(model.calibration, use_cache=False).logits
    moved = {}
    rows = {}
    for row in language.measured_baselines(model, language.BASELINES, [REMOVED]):
        moved[row.method], rows[row.method] = shift(model, dense), row
    for name, layer in model.linears().items():
        layer.weight.copy_(weights[name])
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    linear = sum(weight.numel() for weight in weights.values())
    assert moved.pop("dense") == 0
    assert rows["dense"].perplexity == pytest.approx(perplexity(model.module, model.test))
    assert len({round(value, 6) for value in moved.values()}) == len(language.BASELINES)
    most = 1 - REMOVED * linear / whole
    assert all(most - 0.02 < rows[name].kept <= most for name in language.BASELINES)
    assert max(moved["svd-llm-sequential"], moved["svd-llm"]) < min(moved["svd"], moved["asvd"])


def rows_of(ours: float, other: float, removed: float = 0.4) -> list[Row]:
    """Rows with these perplexities."""
    values = {"svd-llm": other, "ours": ours}
    return [Row(method=m, removed=removed, kept=0.7, perplexity=v, seconds=1.0) for m, v in values.items()]


@pytest.mark.parametrize(
    ("rows", "held"),
    [
        (rows_of(74, 150), [True, True]),
        (rows_of(76, 150), [False, True]),
        (rows_of(74, 73), [True, False]),
        (rows_of(400, 900, 0.6), [True, True]),
        (rows_of(500, 900, 0.6), [False, True]),
    ],
)
def test_missed_goals_are_noticed(rows: list[Row], held: list[bool], capsys: pytest.CaptureFixture[str]) -> None:
    goals = language.judged(rows)
    assert [goal.held for goal in goals] == held
    assert judge(goals, True) == (0 if all(held) else 4)
