"""A short run of every fuzz target with fixed bytes; `make fuzz` is the long run.

Whatever a target raises is a finding, and so is what takes longer than 10 s.
"""

import sys
from pathlib import Path

import fuzz_targets
import pytest
from fuzz_seeds import documents, models
from fuzz_targets import TARGETS, onnx_target, seeds, shown_input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated_document, mutated_model

from rsi_deploy.core.errors import RsiDeployError

sys.path.append(str(Path(__file__).parents[1] / "graph_passes"))
from random_graphs import cases

HANG_MS = 10_000
EXAMPLES = {"onnx": 150, "runtime": 60, "report": 60, "plan": 150, "cost": 150, "config": 100}

quiet = settings(
    deadline=HANG_MS,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def whole(target):
    """Return the seeds that are valid files, without those that select changes."""
    return [seed for seed in seeds(target) if seed[1 if target == "config" else 0] == 0]


@pytest.mark.parametrize("target", TARGETS)
def test_valid_files_are_accepted(target, monkeypatch):
    """Any of our own errors is a false refusal here."""
    monkeypatch.setattr(fuzz_targets, "PASSED_OVER", ())
    files = whole(target)
    assert len(files) >= 1
    for file in files:
        TARGETS[target](file)


@pytest.mark.parametrize("target", TARGETS)
def test_a_refusal_of_a_valid_file_is_noticed(target, monkeypatch):
    monkeypatch.setattr(fuzz_targets, "PASSED_OVER", ())
    file = whole(target)[0]
    with pytest.raises(RsiDeployError):
        TARGETS[target](file[: len(file) // 2])


@pytest.mark.parametrize("target", TARGETS)
def test_changed_files_are_handled(target):
    """The result is success or one of our own errors."""

    @settings(quiet, max_examples=EXAMPLES[target])
    @given(st.binary(min_size=2, max_size=48))
    def run(data):
        TARGETS[target](b"\1" + data if target != "config" else data[:1] + b"\1" + data[1:])

    run()


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_bytes_are_handled(target):
    """Valid files with a changed byte, or cut off."""
    files = whole(target)

    @settings(quiet, max_examples=40)
    @given(st.sampled_from(files), st.integers(0), st.integers(0, 255), st.booleans())
    def run(file, at, value, cut):
        at %= len(file)
        TARGETS[target](file[:at] + (b"" if cut else bytes([value]) + file[at + 1 :]))

    run()


@settings(quiet, max_examples=100)
@given(cases(), st.binary(max_size=40))
def test_changed_graphs_of_every_form_are_handled(case, data):
    """Changed names, dims, types, attributes, edges, tensors, subgraphs and functions of valid graphs."""
    onnx_target(b"\0" + mutated_model(case.proto, data).SerializePartialToString())


def test_a_target_raises_other_errors(monkeypatch):
    """The tests above can fail: an exception that is none of our errors is raised."""

    def broken(*args, **options):
        raise IndexError("a defect")

    monkeypatch.setattr("fuzz_targets.rsi_deploy.inspect", broken, raising=False)
    with pytest.raises(IndexError, match="a defect"):
        onnx_target(next(seeds("onnx")))


@given(st.binary(max_size=40))
@settings(quiet, max_examples=50)
def test_bytes_are_choices(data):
    """Equal bytes give equal results, and the seed is not changed."""
    for model in models():
        before = model.SerializeToString(deterministic=True)
        made = [mutated_model(model, data).SerializePartialToString(deterministic=True) for _ in range(2)]
        assert made[0] == made[1]
        assert model.SerializeToString(deterministic=True) == before
    plan = documents()["plan"][0]
    assert repr(mutated_document(plan, data)) == repr(mutated_document(plan, data))


def test_mutations_change_something():
    """Most byte strings change the model and the document."""
    plan = documents()["plan"][0]
    changed = [
        mutated_model(models()[0], bytes([n, 3 * n % 256, 7 * n % 256, n // 2])) != models()[0] for n in range(256)
    ]
    assert sum(changed) > 150
    assert sum(mutated_document(plan, bytes([n, 5 * n % 256, 3])) != plan for n in range(256)) > 150


def test_a_finding_can_be_shown():
    assert shown_input("onnx", b"\1\0\5\6\7").graph.node
    assert shown_input("config", b"\0\0{}") == b"{}"
