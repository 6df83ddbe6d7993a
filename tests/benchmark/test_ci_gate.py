import numpy as np
import pytest
from bench_documents import accuracy, arm, cell, document, environment

from rsi_deploy.benchmark.ci_gate import GateReport, check_gates, machine_differences, slowdown_check
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.evaluation.intervals import ratio

BASE = document(cell(arm("m", 10.0)))


def one(median, **changes):
    return document(cell(arm("m", median, **changes)))


def statuses(report):
    return [check.status for check in report.checks]


# -- slowdown


@pytest.mark.parametrize(
    ("median", "width", "status"),
    [
        (10.0, 0.01, "holds"),
        (5.0, 0.01, "holds"),
        (10.3, 0.01, "holds"),  # up to 4.4 %
        (10.45, 0.01, "not shown"),
        (10.6, 0.01, "not shown"),
        (10.8, 0.01, "failed"),
        (30.0, 0.01, "failed"),
        (10.0, 0.2, "not shown"),  # too rough to exclude 5 %
    ],
)
def test_a_slowdown_fails_where_it_is_shown_to_exceed_the_allowance(median, width, status):
    report = check_gates(one(median, width=width), BASE, max_slowdown=5.0)
    assert statuses(report) == [status]
    assert report.ok == (status != "failed")
    low, high = report.checks[0].interval
    assert report.checks[0].change == pytest.approx(10 * median - 100)
    assert low < report.checks[0].change < high


def test_the_sentence_says_what_and_why():
    with pytest.raises(GateError) as caught:
        check_gates(one(12.0), BASE, max_slowdown=5.0).enforce()
    assert str(caught.value) == (
        "gate failed: m, batch 1: 20.0 % slower than the baseline [+18.3, +21.7], more than the 5 % allowed"
        "; --max-slowdown and --max-drop say what is allowed"
    )
    (check,) = check_gates(one(10.6), BASE, max_slowdown=5.0).checks
    assert check.sentence.endswith("neither shows nor excludes more than the 5 % allowed; more --seconds would tell")
    (check,) = check_gates(one(9.0), BASE, max_slowdown=5.0).checks
    assert "10.0 % faster than the baseline [-11.3, -8.7], within" in check.sentence
    check_gates(one(9.0), BASE, max_slowdown=5.0).enforce()


def test_false_alarms_are_rare_and_regressions_are_found():
    rng = np.random.default_rng(0)

    def failed(true, runs=400, width=0.02):
        medians = rng.normal([10, 10 * true], [10 * width / 1.96, 10 * true * width / 1.96], (runs, 2))
        reports = [check_gates(one(b, width=width), one(a, width=width), max_slowdown=5.0) for a, b in medians]
        return np.mean([not report.ok for report in reports])

    assert failed(1.0) == 0
    assert failed(1.05) < 0.05
    assert failed(1.15) > 0.95


def test_the_interval_of_a_ratio_covers_it():
    rng = np.random.default_rng(0)
    draws = rng.normal([2.0, 1.0], [0.1, 0.02], (3000, 2))
    ends = [ratio(a, (a - 0.196, a + 0.196), b, (b - 0.0392, b + 0.0392))[1] for a, b in draws]
    assert 0.93 < np.mean([low <= 2 <= high for low, high in ends]) < 0.97


def two(first, second, speedup, hashes=None, **machine):
    return document(cell(arm("dense", first), arm("small", second, speedup=speedup)), hashes=hashes, **machine)


def test_with_a_common_first_model_its_ratio_counts_and_the_machines_mood_cancels():
    base = two(10.0, 5.0, 2.0)
    assert statuses(check_gates(two(20.0, 10.0, 2.0), base, max_slowdown=5.0)) == ["holds"]
    assert statuses(check_gates(two(20.0, 12.0, 1.67), base, max_slowdown=5.0)) == ["failed"]
    report = check_gates(two(20.0, 10.0, 2.0), base, max_slowdown=5.0)
    assert "dense, batch 1: 2.00x the baseline's time" in report.notes[0]
    other = check_gates(two(20.0, 10.0, 2.0, hashes={"dense": "another file"}), base, max_slowdown=5.0)
    assert statuses(other) == ["failed", "failed"], "another first model is no common measure"


def test_another_machine_gates_ratios_alone():
    base = two(10.0, 5.0, 2.0)
    report = check_gates(two(80.0, 40.0, 2.0, cpu="Another CPU"), base, max_slowdown=5.0)
    assert statuses(report) == ["holds"]
    assert report.notes == ("another machine than the baseline's (CPU Some CPU there, Another CPU here): ratios only",)
    assert not check_gates(two(80.0, 60.0, 1.33, cpu="Another CPU"), base, max_slowdown=5.0).ok
    with pytest.raises(UsageError, match=r"another machine \(cores 4 there, 8 here\).*measure a baseline here"):
        check_gates(document(cell(arm("m", 10.0)), cores=8), BASE, max_slowdown=5.0)


def test_what_makes_another_machine():
    here = environment()
    assert machine_differences(here, environment(memory_bytes=8.1 * 10**9, python="3.12", versions={"x": "1"})) == []
    for change, words in (
        ({"cpu": "B"}, "CPU Some CPU there, B here"),
        ({"gpus": ("H100",)}, "GPUs none there, H100 here"),
        ({"memory_bytes": 16 * 10**9}, "memory 8.0 GB there, 16.0 GB here"),
    ):
        assert machine_differences(here, environment(**change)) == [words]


def test_without_a_baseline_the_first_model_is_it():
    assert statuses(check_gates(two(10.0, 5.0, 2.0), max_slowdown=0.0)) == ["holds"]
    assert statuses(check_gates(two(10.0, 11.0, 0.91), max_slowdown=5.0)) == ["failed"]
    with pytest.raises(UsageError, match=r"nothing to compare with: give --baseline result\.json, or a second model"):
        check_gates(one(10.0), max_slowdown=5.0)


def test_every_configuration_is_held_against_its_own():
    base = document(cell(arm("m", 10.0)), cell(arm("m", 60.0), batch=8))
    now = document(cell(arm("m", 70.0), batch=8), cell(arm("m", 10.0)))
    report = check_gates(now, base, max_slowdown=5.0)
    assert statuses(report) == ["failed", "holds"]
    assert "m, batch 8: 16.7 % slower" in report.checks[0].sentence
    with pytest.raises(UsageError, match="measured with batch 1 on CPU.*; batch 8.*but this run with batch 1 on"):
        check_gates(one(10.0), base, max_slowdown=5.0)
    more = document(cell(arm("m", 10.0)), cell(arm("m", 99.0), batch=4))
    assert statuses(check_gates(more, BASE, max_slowdown=5.0)) == ["holds"], "the baseline says nothing of batch 4"
    other = document(cell(arm("m", 10.0), provider="CUDAExecutionProvider"))
    with pytest.raises(UsageError, match="but this run with batch 1 on CUDAExecutionProvider"):
        check_gates(other, BASE, max_slowdown=5.0)


def test_an_interrupted_measurement_fails():
    short = document(cell(arm("m", 10.0), partial=True))
    with pytest.raises(GateError, match="m, batch 1: measured too briefly.*--seconds"):
        check_gates(short, BASE, max_slowdown=5.0).enforce()
    with pytest.raises(UsageError, match="--baseline was interrupted"):
        check_gates(BASE, short, max_slowdown=5.0)
    assert not check_gates(
        document(cell(arm("a", 10.0), arm("b", 5.0, speedup=2.0), partial=True)), max_slowdown=5.0
    ).ok


def test_models_are_matched_by_name_or_place():
    renamed = document(cell(arm("build/m", 10.0)))
    assert statuses(check_gates(renamed, BASE, max_slowdown=5.0)) == ["holds"]
    with pytest.raises(UsageError, match="--baseline holds m, but this run a, b: give as many models"):
        check_gates(document(cell(arm("a", 10.0), arm("b", 5.0, speedup=2.0))), BASE, max_slowdown=5.0)


# -- drop


def scored(top1, **changes):
    return document(cell(arm("m", 10.0)), accuracy={"m": accuracy(top1, **changes)})


@pytest.mark.parametrize(
    ("top1", "status"), [(92.0, "holds"), (93.0, "holds"), (91.5, "holds"), (91.45, "failed"), (80.0, "failed")]
)
def test_a_drop_on_the_same_data_is_a_fact(top1, status):
    report = check_gates(scored(top1), scored(92.0), max_drop=0.5)
    assert statuses(report) == [status]
    assert report.checks[0].change == pytest.approx(92.0 - top1)


def test_the_sentence_of_a_drop():
    with pytest.raises(GateError) as caught:
        check_gates(scored(91.2), scored(92.0), max_drop=0.5).enforce()
    assert str(caught.value) == (
        "gate failed: m: top-1 91.20 %, 0.80 points below the baseline's 92.00 %, more than the 0.5 allowed"
        "; --max-slowdown and --max-drop say what is allowed"
    )
    (same,) = check_gates(scored(92.0), scored(92.0), max_drop=0.0).checks
    assert same.sentence == "m: top-1 92.00 %, as the baseline's 92.00 %, within the 0 allowed"


def test_without_a_baseline_the_drop_is_against_the_first_model_with_its_test():
    now = document(
        cell(arm("dense", 10.0), arm("small", 5.0, speedup=2.0)),
        accuracy={"dense": accuracy(92.0), "small": accuracy(91.0, lost=20)},
    )
    (check,) = check_gates(now, max_drop=0.5).checks
    assert check.status == "failed"
    assert "below dense's 92.00 % (20 fewer right of 2,000: less accurate (p < 0.0001)), more than" in check.sentence


def test_accuracies_that_do_not_compare_are_refused():
    for other in (scored(92.0, fingerprint="e" * 64), scored(92.0, samples=1000)):
        with pytest.raises(UsageError, match="evaluated on other data.*give the baseline's --data"):
            check_gates(scored(92.0), other, max_drop=0.5)
    with pytest.raises(UsageError, match="add --data DATA"):
        check_gates(one(10.0), scored(92.0), max_drop=0.5)
    with pytest.raises(UsageError, match="--baseline holds no top-1 of m"):
        check_gates(scored(92.0), BASE, max_drop=0.5)
    with pytest.raises(GateError, match="interrupted"):
        check_gates(scored(92.0, partial=True), scored(92.0), max_drop=0.5).enforce()


def test_both_gates_are_told_in_one_sentence():
    base = document(cell(arm("m", 10.0)), accuracy={"m": accuracy(92.0)})
    now = document(cell(arm("m", 20.0)), accuracy={"m": accuracy(90.0)})
    with pytest.raises(GateError, match="100.0 % slower than the baseline.*; m: top-1 90.00 %, 2.00 points below"):
        check_gates(now, base, max_slowdown=5.0, max_drop=0.5).enforce()
    report = check_gates(now, base, max_slowdown=5.0, max_drop=0.5)
    assert GateReport.model_validate_json(report.model_dump_json()) == report
    with pytest.raises(UsageError, match="add --max-slowdown 5% or --max-drop 0.5"):
        check_gates(now, base)


def test_an_equal_time_is_no_slowdown():
    assert slowdown_check("m", "b", 1.0, (1.0, 1.0), 0.0).status == "holds"
