"""constraints-oldest.txt is what pyproject.toml allows at least."""

import copy
import tomllib
from pathlib import Path

import pytest

from tests.release.oldest import oldest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_stored_constraints_are_the_bounds():
    stored = (ROOT / "constraints-oldest.txt").read_text(encoding="utf-8")
    assert stored == oldest(PROJECT), "python -m tests.release.oldest > constraints-oldest.txt"
    for name in ("torch", "onnx", "onnxruntime", "onnx-ir", "numpy", "onnxscript"):
        assert f"\n{name}==" in stored


def test_a_raised_bound_shows():
    raised = copy.deepcopy(PROJECT)
    raised["dependencies"] = [line.replace("torch>=2", "torch>=9") for line in raised["dependencies"]]
    assert oldest(raised) != oldest(PROJECT)


@pytest.mark.parametrize(
    ("line", "words"), [("rich", "'rich' has no lower bound"), ("torch>=1.0", "torch has the lower bounds 2.9 and 1.0")]
)
def test_a_requirement_has_one_lower_bound(line, words):
    wrong = copy.deepcopy(PROJECT)
    wrong["dependencies"].append(line)
    with pytest.raises(ValueError, match=words):
        oldest(wrong)


def test_what_ci_installs_is_not_older():
    """Each constraint of constraints.txt keeps its bound; the two files together are the range that is tried."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    newest = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    lowest = dict(line.split("==") for line in oldest(PROJECT).splitlines() if "==" in line)
    for name, version in lowest.items():
        above = newest[name.lower().replace("_", "-")]
        assert numbers(above) >= numbers(version), name


def numbers(version):
    return [int(part) if part.isdigit() else 0 for part in version.split(".")]
