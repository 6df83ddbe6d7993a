"""What the tests of bias corrections share: a correction that is known, and the comparison."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from split_checks import assert_sound, error, full_rank, numbers, run, splits

from graph_passes import Record, Site, SplitFactors, split


def delta_of(size: int) -> np.ndarray:
    return numbers(size, seed=42)


def biased(site: Site) -> SplitFactors:
    """Exact factors and a correction."""
    return full_rank(site, bias=delta_of(site.bias_size))


def assert_corrected(
    a_model: ir.Model, correction: np.ndarray, *, tolerance: float = 1e-5, source=biased, **feeds
) -> list[Record]:
    """After the split the first output is the dense one plus the correction; all else is as it was."""
    expected = run(a_model, **feeds) + correction.astype(np.float32)
    outputs = [(value.name, value.dtype, value.shape) for value in a_model.graph.outputs]
    records = split(a_model, source)
    assert splits(records) == list(records) != []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        assert error(run(a_model, level, **feeds), expected) <= tolerance
        assert error(run(a_model, level, **feeds), expected - correction.astype(np.float32)) > 1e-2
    assert [(value.name, value.dtype, value.shape) for value in a_model.graph.outputs] == outputs
    names = [node.name for node in a_model.graph.all_nodes() if node.name]
    assert len(names) == len(set(names))
    assert_sound(a_model)
    return records
