"""bench/accuracy and bench/calibration_cost: data are what they claim, budgets are kept, missed goals are noticed."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from bench import accuracy, arms, calibration_cost, cases, models, texts
from bench.common import judge
from graph_passes.forms import Form
from graph_passes.split_markers import found_splits
from rsi_deploy.core.errors import ModelError, RsiDeployError, UsageError
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import planned_splits
from rsi_deploy.planning.site_options import PLAIN_FORMS, Calibration
from rsi_deploy.torch_models.model_source import source_of_module

PROSE = "This is a paragraph of plain prose which is long enough to be counted, since it goes on, and on, and on"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> cases.Case:
    """A perceptron and a Conv with random weights, which answers for its own labels: nothing has to be on disk."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 40), nn.ReLU(), nn.Linear(40, 8)
        ).eval()
        images = torch.randn(160, 4, 4, 4)
        labels = module(images[64:]).argmax(dim=1).numpy()
    path = tmp_path_factory.mktemp("case") / "small.onnx"
    cases.write_dense(source_of_module(module, (1, 4, 4, 4)), path)
    (key,) = (value.name for value in cases.make_session(path).get_inputs())
    return cases.Case(
        name="small",
        path=path,
        pool={key: images[:64].numpy()},
        size=48,
        apart=False,
        test={key: images[64:].numpy()},
        reference=labels,
    )


# --- data -----------------------------------------------------------------------------------------------------------


def test_texts_are_prose_without_copies_and_always_the_same(tmp_path: Path) -> None:
    other = "Another text about something else entirely, " + ", ".join(f"word{number}" for number in range(30)) + "."
    doc = f'class A:\n    """{PROSE} {PROSE}.\n\n    Args:\n        x: short.\n    """\n'
    copy = doc.replace("on, and on, and on", "on, and on, and so on")
    (tmp_path / "a.py").write_text(doc)
    (tmp_path / "b.py").write_text(copy)
    (tmp_path / "c.py").write_text(f'"""{other}"""\n')
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "d.py").write_text(f'"""{other.replace("word", "term")}"""\n')
    found = texts.harvest([tmp_path])
    assert len(found) == 2, "one of two copies, none of the tests, no list of arguments"
    assert other in found
    assert found == texts.harvest([tmp_path]) == tuple(sorted(found))
    assert texts.digest(found) != texts.digest(found[:1])


def test_the_standard_library_is_where_texts_come_from() -> None:
    found = texts.harvest([Path(json.__file__).parent, Path(json.__file__).parents[1] / "asyncio"])
    assert len(found) > 3
    assert all(200 <= len(text) <= 600 and "\n" not in text for text in found)


def test_held_out_texts_are_apart_from_all_draws() -> None:
    corpus = [f"text {number}" for number in range(100)]
    test, rest = texts.parted(corpus, 40)
    assert (test, rest) == texts.parted(corpus, 40)
    assert len(test) == 40
    assert sorted(test + rest) == sorted(corpus)
    assert list(test) != corpus[:40], "shuffled, or the packages would be split"


def test_draws_apart_share_nothing(case: cases.Case) -> None:
    apart = dataclasses.replace(case, apart=True, size=20)
    assert apart.draws == 3
    drawn = [next(iter(apart.draw(number).values())) for number in range(3)]
    everything = np.concatenate(drawn)
    assert len(np.unique(everything.reshape(60, -1), axis=0)) == 60


def test_a_draw_depends_on_its_number_alone(case: cases.Case) -> None:
    (first,), (again,), (second,) = (list(case.draw(number).values()) for number in (0, 0, 1))
    assert first.shape == (48, 4, 4, 4)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert case.draws is None
    assert dataclasses.replace(case, size=64).draws == 1, "the whole pool: there is one draw"


def test_a_model_scores_against_its_own_labels(case: cases.Case) -> None:
    assert case.score(case.path).value == 100
    assert dataclasses.replace(case, reference=(case.reference + 1) % 8).score(case.path).value < 5


def test_lite0_is_calibrated_and_tested_on_different_classes(tmp_path: Path) -> None:
    try:
        found = cases.load("lite0", tmp_path, limit=50)
        drawn, judged = models.imagenet_sample()
    except models.UnavailableError as reason:
        pytest.skip(str(reason))
    assert found.available == found.size == 250
    assert drawn.labels is not None
    assert judged.labels is not None
    assert not set(drawn.labels) & set(judged.labels)
    assert set(found.reference) <= set(judged.labels)
    assert found.score(found.path).value > 80
    unscaled = dataclasses.replace(found, test={name: array * 128 + 127 for name, array in found.test.items()})
    assert unscaled.score(found.path).value < 20


# --- arms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("unit", "keep"), [("MACs", 0.5), ("parameters", 0.4), ("linear parameters", 0.6)])
def test_every_arm_keeps_the_budget(case: cases.Case, unit: arms.Unit, keep: float) -> None:
    runs = list(accuracy.measure(case, unit, [keep], 2))
    assert [(run.arm, run.draw) for run in runs] == [
        *((arm.name, 0) for arm in arms.ARMS),
        *((arm.name, 1) for arm in arms.ARMS[3:]),
    ]
    assert all(keep - 0.2 < run.kept <= keep for run in runs), "measured on the written model"
    if unit == "MACs":
        assert all(run.kept == run.kept_macs for run in runs)


@pytest.mark.parametrize(("forms", "is_pivoted"), [(PLAIN_FORMS, False), (("pivoted",), True)])
def test_only_the_forms_under_comparison_are_planned(
    case: cases.Case, forms: tuple[Form, ...], is_pivoted: bool
) -> None:
    (run,) = accuracy.measure(case, "parameters", [0.5], 1, arms=[arms.PRODUCT], forms=forms)
    splits = found_splits(ir.load(case.path.with_name("candidate.onnx")))
    assert run.kept <= 0.5
    assert {split.form == "pivoted" for split in splits.values()} == {is_pivoted}


def test_one_ratio_is_the_largest_that_fits(case: cases.Case) -> None:
    streams, dense = case.streams(0), case.measured(case.path)
    budget = Budget(keep_params=0.5)
    decisions = arms.same_ratio(case, streams, budget, dense)
    ranks = {site.name: decisions[site.name].rank for site in streams.sites}
    assert ranks[streams.sites[-1].name] is None, "the eight outputs are not split"
    assert arms.cost_of(case, streams, decisions, budget) <= dense.params // 2
    more = {
        name: dataclasses.replace(decision, rank=decision.rank + 1) if decision.rank else decision
        for name, decision in decisions.items()
    }
    assert arms.cost_of(case, streams, more, budget) > dense.params // 2
    with pytest.raises(ModelError, match="no uniform ratio keeps --keep-params 1%"):
        arms.same_ratio(case, streams, Budget(keep_params=0.01), dense)


def test_fitting_to_the_response_is_told_from_the_sequence(case: cases.Case) -> None:
    streams, dense = case.streams(0), case.measured(case.path)
    decisions = arms.same_ratio(case, streams, Budget(keep_params=0.4), dense)
    calibration = Calibration(solver=Solver())
    alone, sequence = (arms.factors(arm, calibration, streams, decisions) for arm in arms.ARMS[3:5])
    first, second = planned_splits(decisions, streams)
    assert alone.keys() == sequence.keys() == {first, second}
    assert torch.allclose(alone[first].replacement.left, sequence[first].replacement.left, atol=1e-3)
    assert not torch.allclose(alone[second].replacement.right, sequence[second].replacement.right, atol=1e-3)
    exported = arms.factors(arms.PRODUCT, calibration, streams, decisions)  # in the metric of the output, too
    assert not torch.allclose(exported[first].replacement.left, sequence[first].replacement.left, atol=1e-3)


# --- goals ----------------------------------------------------------------------------------------------------------


def row(net: str, keep: float, lost: float, **change: object) -> accuracy.Row:
    known = accuracy.Row(
        net=net,
        unit=accuracy.TASKS[net].unit,
        keep=keep,
        arm=arms.PRODUCT.name,
        draws=3,
        kept=keep - 0.001,
        kept_macs=keep,
        kept_params=keep,
        score=92.3 - lost,
        lowest=92.2 - lost,
        highest=92.4 - lost,
        lost=lost,
        overlap=None,
    )
    return dataclasses.replace(known, **change)


GOOD = [
    row("mlp_mnist", 0.2, 0.5),
    row("cnn_cifar10", 0.3, 0.5),
    *(row("resnet20", keep, lost) for keep, lost in ((0.7, 0.6), (0.6, 1.5), (0.5, 3.0), (0.4, 8.0))),
    *(row("resnet56", keep, lost) for keep, lost in ((0.7, 0.3), (0.6, 0.8), (0.5, 1.8), (0.4, 4.5))),
    *(row("lite0", keep, lost) for keep, lost in ((0.9, 0.3), (0.8, 7.8))),
    row("minilm", 0.5, 8.0, overlap=0.75),
]


def test_the_goals_are_the_issues() -> None:
    assert judge(accuracy.judged(GOOD), check=True) == 0
    assert len(accuracy.judged(GOOD)) == 14
    assert accuracy.judged([dataclasses.replace(GOOD[0], arm="RSVD", lost=90)]) == [], "baselines promise nothing"
    assert accuracy.judged([row("resnet20", 0.55, 80)]) == [], "this budget has no goal"


@pytest.mark.parametrize("index", range(len(GOOD)))
def test_a_wrong_table_is_noticed(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    good = GOOD[index]
    for change in ({"lost": good.lost + 0.01}, {"kept": good.keep + 0.001}):
        goals = accuracy.judged([*GOOD[:index], dataclasses.replace(good, **change), *GOOD[index + 1 :]])
        assert judge(goals, check=True) == 4, change
        assert judge(goals, check=False) == 0
    assert f"goal missed: lost, {good.net} at {good.keep:g} of the {good.unit}" in capsys.readouterr().err


def test_lost_neighbours_and_a_wide_spread_are_noticed() -> None:
    assert judge(accuracy.judged([row("minilm", 0.5, 1, overlap=0.74)]), check=True) == 4
    near = row("resnet56", 0.6, 0.1, draws=5, lowest=93.0, highest=93.45)
    assert [goal.held for goal in accuracy.judged([near])] == [True, True]
    far = dataclasses.replace(near, highest=93.5)
    assert [goal.held for goal in accuracy.judged([far])] == [True, False]
    assert len(accuracy.judged([dataclasses.replace(far, draws=3)])) == 1, "three draws say little of a spread"


def test_the_mean_is_over_the_draws() -> None:
    def run(arm: str, draw: int, score: float, kept: float = 0.6) -> accuracy.Run:
        return accuracy.Run(
            net="resnet20", keep=0.6, arm=arm, draw=draw, kept=kept, kept_macs=kept, kept_params=0.7, score=score,
            overlap=None,
        )  # fmt: skip

    runs = [run("RSVD", 0, 20), run("sensitivities", 0, 91), run("sensitivities", 1, 90, kept=0.61)]
    baseline, product = accuracy.tabulate(runs, "MACs", 92)
    assert (baseline.lost, baseline.draws, baseline.arm) == (72, 1, "RSVD")
    assert (product.lost, product.draws, product.lowest, product.highest, product.kept) == (1.5, 2, 90, 91, 0.61)


# --- commands -------------------------------------------------------------------------------------------------------


def test_the_command_stores_what_it_shows(
    case: cases.Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cases, "load", lambda *_, **__: dataclasses.replace(case, name="mlp_mnist"))
    stored, table = tmp_path / "accuracy.json", tmp_path / "accuracy.md"
    arguments = ["--nets", "mlp_mnist", "--draws", "2", "--keeps", "0.5", "--json", str(stored)]
    assert accuracy.main([*arguments, "--markdown", str(table)]) == 0
    document = json.loads(stored.read_text())
    assert document["command"].startswith("python -m bench.accuracy --nets mlp_mnist --draws 2")
    assert document["settings"]["nets"]["mlp_mnist"]["dense"] == 100
    assert (len(document["rows"]), len(document["runs"])) == (6, 9)
    shown = capsys.readouterr().out
    assert all(arm.name in shown and arm.name in table.read_text() for arm in arms.ARMS)


def test_what_cannot_be_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise models.UnavailableError("data is absent")

    monkeypatch.setattr(cases, "load", absent)
    with pytest.raises(UsageError, match="no net could be loaded.*data is absent"):
        accuracy.main(["--quick"])
    with pytest.raises(UsageError, match="--keeps lie in"):
        accuracy.main(["--keeps", "50"])


def test_the_cost_of_calibration_is_measured_and_judged(case: cases.Case) -> None:
    whole = cases.untested(case.path, case.pool)
    for arm in calibration_cost.ARMS:
        seconds = calibration_cost.timed(whole, arm)
        assert 0 < seconds["factorization"] < seconds["seconds"]
    memory = calibration_cost.remembered(whole, "uniform")
    assert memory["peak"] >= memory["before"] > 0
    assert memory["moments"] == 4 * 8 * 384 * (384 + 40)
    assert calibration_cost.one_batch(whole)["batch"] >= 32 * 4 * 4 * 4 * 4


def test_costs_beyond_the_goals_are_noticed() -> None:
    good = calibration_cost.Row(
        net="resnet20",
        arm="planned",
        samples=1024,
        usual=True,
        sites=20,
        pass_seconds=1.0,
        seconds=19.0,
        factorization=5.0,
        peak=160,
        before=100,
        model=10,
        moments=10,
        batch=20,
    )
    assert judge(calibration_cost.goals([good]), check=True) == 0
    assert good.passes == 19
    for change in ({"sites": 19}, {"seconds": 19.1}, {"pass_seconds": 0.9}, {"peak": 161}, {"batch": 19}):
        assert judge(calibration_cost.goals([dataclasses.replace(good, **change)]), check=True) == 4, change
    few = dataclasses.replace(good, usual=False, seconds=900.0)
    assert [goal.name for goal in calibration_cost.goals([few])] == ["memory, resnet20, planned, 1024 samples"]
    assert "| resnet20 | planned | 1024 | 20 | 1.00 | 19.0 | 19.0 | 5.0 | 19.0 |" in calibration_cost.markdown([good])


def test_a_child_that_fails_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RsiDeployError, match=r"absent, batch: .*No such file"):
        calibration_cost._child(tmp_path / "absent.onnx", "batch")
