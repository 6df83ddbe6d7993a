"""bench/rivals: a rival dominates that is no larger, not slower and surely better; a tie or a doubt does not."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from bench.rivals import Model, Row, compared, judged, markdown

CELL = Row(net="n", precision="auto", budget="bytes", keep=0.5, dense_bytes=1000, dense_value=90.0)


def model(right=800, *, name="r", size=400, speed=2.0, of=1000):
    """A model that is right on the first `right` of `of` samples."""
    return Model(
        name=name,
        bytes=size,
        values=np.arange(of) < right,
        speedup=speed,
        speedup_interval=(0.95 * speed, 1.05 * speed),
    )


def embeddings(cosine, *, noise=0.0, **changed):
    values = cosine + noise * np.random.default_rng(0).standard_normal(300)
    return replace(model(**changed), values=values, neighbours=0.9)


def test_a_rival_that_is_better_in_answers_alone_dominates():
    row = compared(CELL, model(name="ours"), [model(805, name="unsure"), model(850, name="better")])
    assert row.dominated_by == "better"
    assert (row.name, row.bytes, row.value) == ("ours", 400, 80.0)


@pytest.mark.parametrize(
    "rival",
    [
        model(),  # the same
        model(size=399, speed=3.0),  # equal answers, smaller and faster
        model(803),  # better within the interval
        model(900, size=401),
        model(900, speed=1.7),
        model(700, size=300, speed=3.0),
    ],
)
def test_a_tie_a_doubt_or_one_thing_that_is_worse_is_no_domination(rival):
    assert compared(CELL, model(), [rival]).dominated_by == ""


def test_a_rival_whose_times_overlap_is_not_slower():
    assert compared(CELL, model(), [model(900, speed=1.9)]).dominated_by == "r"


def test_cosines_are_compared_sample_by_sample():
    ours = embeddings(0.90, noise=0.05)
    better = replace(ours, name="better", values=ours.values + 0.001)
    assert compared(CELL, ours, [better]).dominated_by == "better"  # within the interval of either alone
    assert compared(CELL, ours, [ours]).dominated_by == ""
    assert compared(CELL, ours, [embeddings(0.88)]).dominated_by == ""


def test_a_refused_budget_is_dominated_by_a_rival_that_keeps_it():
    refused = replace(CELL, refused="nothing is so small")
    assert compared(refused, None, [model(size=501)]).dominated_by == ""
    assert compared(refused, None, [model(size=500)]).dominated_by == "r"
    of_time = replace(refused, budget="time")
    assert compared(of_time, None, [model(speed=2.0)]).dominated_by == ""  # it may be slower than the budget
    assert compared(of_time, None, [model(speed=2.2)]).dominated_by == "r"


def test_one_dominated_cell_misses_the_goal_and_low_rank_alone_does_not():
    good, bad = compared(CELL, model(), [model()]), compared(CELL, model(), [model(900)])
    assert judged([good, good])[0].held
    (missed,) = judged([good, bad])
    assert not missed.held
    assert "1 of 2" in missed.row
    assert "n at 0.5 of bytes by r" in missed.row
    (held,) = judged([good, replace(bad, precision="float32")])
    assert held.held
    assert "low rank alone: 1 of 1" in held.row
    assert not judged([])[0].held


def test_tables_show_refused_cells_and_rivals():
    refused = compared(replace(CELL, refused="too small"), None, [model(size=100)])
    table = markdown([refused, compared(CELL, embeddings(0.9), [])], {"n": [model(name="dynamic")]})
    assert "| refused |" in table
    assert "0.9000, neighbours 0.900" in table
    assert "| n | dynamic | 400 |" in table
    assert asdict(refused)["dominated_by"] == "r"
