"""Times of splits: kept at steps, read back as written, and refused where they hold for something else."""

import datetime
import os
import time

import pytest

from rsi_deploy.benchmark.statistics import MIN_BLOCKS
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.costing.cost_cache import NOISY_FOR, CostCache, conditions_here
from rsi_deploy.costing.cost_table import (
    Conditions,
    CostTable,
    ModelTime,
    SiteCost,
    SplitTime,
    block_of,
    read_cost_table,
    timing_ranks,
)
from rsi_deploy.costing.trial_plans import fitted_scale, trial_plans

HERE = Conditions(
    cpu="a cpu", cores=2, cpu_flags=("avx2",), gpus=(), onnxruntime={"onnxruntime": "1.2"}, provider="cpu", threads=2
)


def stepped(rank):
    """A kernel that works in blocks of 16 and leaves the fast path where a rank is no multiple of 8."""
    return 100 * -(-rank // 16) + (450 if rank % 8 else 30 if rank % 16 else 0)


def cost(time=stepped, *, dense=2000, largest=96, width=0.02, blocks=MIN_BLOCKS, form="channel", signature="s"):
    splits = [
        SplitTime(
            form=form,
            rank=rank,
            nanoseconds=time(rank),
            speedup_interval=(dense / time(rank) * (1 - width), dense / time(rank) * (1 + width)),
        )
        for rank in timing_ranks(largest)
    ]
    return SiteCost(signature=signature, dense_nanoseconds=dense, blocks=blocks, half_width=width, splits=tuple(splits))


def table(**costs):
    return CostTable(
        tool="t",
        created=datetime.datetime.now(datetime.UTC),
        command="c",
        conditions=HERE,
        model=ModelTime(name="m", hash="h", batch=1, inputs={}, dense_nanoseconds=10_000, scale=1.5),
        sites={name: entry.signature for name, entry in costs.items()},
        untimed={},
        costs=tuple({entry.signature: entry for entry in costs.values()}.values()),
        seconds=1.0,
        precision=0.05,
    )


@pytest.mark.parametrize("largest", [1, 7, 8, 9, 31, 33, 96, 460, 3500])
def test_every_class_of_ranks_is_timed_from_its_first_to_its_last(largest):
    ranks = timing_ranks(largest)
    assert len(ranks) == len(set(ranks)) <= 40
    assert list(ranks) == sorted(ranks)
    assert largest in ranks
    for block in (32, 16, 8, 1):
        members = [rank for rank in range(1, largest + 1) if block_of(rank) == block]
        assert not members or {members[0], members[-1]} <= set(ranks)


def test_between_grid_points_the_steps_stay():
    entry = cost()
    for rank in range(1, 97):
        assert entry.nanoseconds("channel", rank) == pytest.approx(stepped(rank), rel=0.2), rank
    # What a line through neighbours of any class would say: rank 12 between 8 and 16 costs as little as they do.
    assert stepped(12) > 2 * max(stepped(8), stepped(16))
    assert entry.nanoseconds("channel", 12) > 2 * entry.nanoseconds("channel", 16)


def test_what_was_not_timed_has_no_time():
    entry = cost(largest=40)
    assert entry.nanoseconds("input", 8) is None
    assert entry.nanoseconds("channel", 41) is None
    with pytest.raises(KeyError, match="input at rank 8 was not timed"):
        entry.is_faster("input", 8)


def test_faster_is_said_only_where_it_is_shown():
    entry = cost(dense=500)
    assert entry.is_faster("channel", 32)
    assert not entry.is_faster("channel", 12)  # slower
    assert not entry.is_faster("channel", 96)  # slower
    assert not cost(dense=500, blocks=MIN_BLOCKS - 1).is_faster("channel", 32)
    wide = cost(dense=500, width=0.7)
    assert not wide.is_faster("channel", 32)
    assert wide.is_noisy("channel", 32)
    assert not entry.is_noisy("channel", 32)


def test_between_grid_points_both_neighbours_must_be_faster():
    entry = cost(dense=500)
    ranks = timing_ranks(96)
    between = next(r for r in range(33, 96) if r not in ranks and r % 8 == 0)
    near = [r for r in ranks if block_of(r) == block_of(between)]
    below, above = max(r for r in near if r < between), min(r for r in near if r > between)
    assert entry.is_faster("channel", between) == (
        entry.is_faster("channel", below) and entry.is_faster("channel", above)
    )


def test_savings_add_up_and_the_scale_makes_them_the_models():
    made = table(a=cost(), b=cost(signature="other", dense=1000))
    saving = (2000 - 100) + (1000 - 200)
    plan = {"a": ("channel", 16), "b": ("channel", 32), "unknown": ("channel", 8)}
    assert made.saving(plan) == saving
    assert made.predicted(plan) == pytest.approx(1 - 1.5 * saving / 10_000)
    assert made.predicted({}) == 1


def test_trial_plans_take_what_is_faster_alone():
    fast, slow = cost(), cost(dense=90, signature="slow")
    plans = trial_plans({"fast": fast, "slow": slow})
    assert plans
    assert all(set(plan) == {"fast"} for plan in plans)
    assert trial_plans({"slow": slow}) == []
    assert fitted_scale([], []) == 1


def test_a_table_is_read_back_as_it_was_written(tmp_path):
    made = table(a=cost())
    (tmp_path / "cost.json").write_text(made.model_dump_json())
    assert read_cost_table(tmp_path / "cost.json") == made
    with pytest.raises(UsageError, match="make one with rsi-deploy profile"):
        read_cost_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text(made.model_dump_json().replace('"schema_version":1', '"schema_version":2'))
    with pytest.raises(ModelError, match="schema version 1: schema_version"):
        read_cost_table(tmp_path / "bad.json")


def test_documents_of_float32_need_no_scheme_and_others_keep_theirs(tmp_path):
    made = table(a=cost())
    assert "scheme" not in made.model_dump_json()
    other = made.model_copy(update={"conditions": HERE.model_copy(update={"scheme": "dynamic int8"})})
    for number, each in enumerate((made, other)):
        (tmp_path / f"{number}.json").write_text(each.model_dump_json())
    read = [read_cost_table(tmp_path / f"{number}.json").conditions for number in range(2)]
    assert [conditions.scheme for conditions in read] == ["float32", "dynamic int8"]
    assert read[0].differences(read[1]) == ["scheme float32 against dynamic int8"]


def test_differences_of_conditions_are_told():
    other = HERE.model_copy(update={"cpu": "another", "onnxruntime": {"onnxruntime": "1.3"}})
    assert HERE.differences(HERE) == []
    assert HERE.differences(other) == [
        "cpu a cpu against another",
        "onnxruntime onnxruntime 1.2 against onnxruntime 1.3",
    ]


def test_the_cache_is_of_its_conditions_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path))
    here = conditions_here("cpu", 1)
    cache, entry = CostCache.of(here), cost(signature="one")
    cache.keep([entry])
    assert cache.costs(["one", "two"]) == {"one": entry}
    assert CostCache.of(conditions_here("cpu", 2)).costs(["one"]) == {}
    assert CostCache.of(conditions_here("cpu", 1, "dynamic int8")).costs(["one"]) == {}
    cache.keep_table("key", table(a=entry))
    assert cache.table("key") == table(a=entry).model_copy(update={"created": cache.table("key").created})
    for path in cache.folder.glob("*.json"):
        path.write_text("{")  # cut off while it was written by something else
    assert cache.costs(["one"]) == {}
    assert cache.table("key") is None


@pytest.mark.parametrize("width", [0.02, 0.4, None])
def test_noisy_times_are_used_for_an_hour(tmp_path, monkeypatch, width):
    """A quiet hour's times stay known; those of a busy one are measured again when it is over."""
    monkeypatch.setenv("RSI_DEPLOY_CACHE", str(tmp_path))
    cache = CostCache.of(conditions_here("cpu", 1))
    entry = cost(signature="one").model_copy(update={"half_width": width})
    cache.keep([entry])
    cache.keep_table("key", table(a=entry))
    assert cache.costs(["one"]) == {"one": entry}
    assert cache.table("key") is not None
    for path in cache.folder.glob("*.json"):
        os.utime(path, (time.time() - 2 * NOISY_FOR,) * 2)
    quiet = width == 0.02
    assert (cache.costs(["one"]) == {"one": entry}) is quiet
    assert (cache.table("key") is not None) is quiet


def test_a_provider_that_is_not_here_has_no_conditions():
    with pytest.raises(UsageError, match="openvino"):
        conditions_here("openvino", None)
