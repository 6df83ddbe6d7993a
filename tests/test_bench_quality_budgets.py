"""bench/quality_budgets: a model below its quality on test samples is a miss, as is a search that is not tight."""

from bench.quality_budgets import Row, judged, markdown


def row(test=0.98, next_smaller=0.96, **changed):
    known = {"net": "n", "measure": "agreement", "quality": 0.97, "bound": 0.975, "tried": 7, "kept": 0.8}
    known |= {"is_dense": False, "checked": 300, "tested": 1000, "seconds": 1.0}
    return Row(test=test, next_smaller=next_smaller, **known | changed)


def test_one_miss_in_ten_is_allowed_and_two_are_not():
    good, bad = row(), row(test=0.96)
    assert [goal.held for goal in judged([good] * 9 + [bad])] == [True, True]
    missed, _ = judged([good] * 8 + [bad] * 2)
    assert not missed.held
    assert "8 of 10" in missed.row
    assert "n at 0.97: 0.9600" in missed.row


def test_a_search_that_stops_early_is_not_tight():
    assert not judged([row(next_smaller=0.98), row(next_smaller=None)])[1].held
    assert judged([row(), row(), row(next_smaller=None)])[1].held


def test_nothing_measured_is_no_success():
    assert not any(goal.held for goal in judged([]))


def test_a_dense_model_is_named():
    assert "| dense |" in markdown([row(is_dense=True)])
