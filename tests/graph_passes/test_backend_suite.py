"""The ONNX backend suite at full rank: whatever onnxruntime runs, it runs the same after the split."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from backend_cases import Case, cases
from split_checks import full_rank

from graph_passes import Record, Site, Split, SplitFactors, split

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}  # of the norm; a few roundings


def outputs(model: onnx.ModelProto, feeds: dict) -> list:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def distance(came: list, expected: list) -> float:
    """The largest distance of two outputs in units of its tolerance; infinite where shape, dtype or NaNs differ."""
    worst = 0.0
    for a, b in zip(came, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return np.inf
        x, y = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(x[finite]).all():
            return np.inf
        scale = np.linalg.norm(y[finite]) * TOLERANCE.get(b.dtype.name, 1e-5)
        worst = max(worst, float(np.linalg.norm(x[finite] - y[finite])) / max(scale, 1e-30))
    return worst


def is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:
        return False
    return True


def rewritten(case: Case, source=full_rank) -> tuple[onnx.ModelProto, list[Record]]:
    model = ir.from_proto(case.model)
    records = split(model, source)
    return ir.to_proto(model), records


def test_every_case_that_onnxruntime_runs(capsys):
    ran, not_run, split_cases, wrong = 0, 0, 0, []
    splits, reasons = Counter(), Counter()
    caught, controls = 0, 0
    for case in cases():
        before = ir.to_proto(ir.from_proto(case.model)).SerializeToString()
        model, records = rewritten(case)  # also where onnxruntime cannot run it: no crash
        if is_valid(case.model) and not is_valid(model):
            wrong.append(f"{case.name}: invalid model")
        try:
            expected = outputs(case.model, case.feeds)
        except Exception:
            not_run += 1
            continue
        ran += 1
        done = [record for record in records if isinstance(record, Split)]
        splits.update(record.op_type for record in done)
        reasons.update(re.sub(r"'.*?'|\(\d.*?\)", "...", r.reason) for r in records if not isinstance(r, Split))
        if not done:
            if model.SerializeToString() != before:
                wrong.append(f"{case.name}: changed without a split")
            continue
        split_cases += 1
        if (far := distance(outputs(model, case.feeds), expected)) > 1:
            wrong.append(f"{case.name}: {far:.1e} tolerances away")
        again = ir.from_proto(model)
        if any(isinstance(record, Split) for record in split(again, full_rank)):
            wrong.append(f"{case.name}: split twice")
        if any(np.abs(output).max(initial=0) > 0 for output in expected):
            controls += 1
            caught += distance(outputs(rewritten(case, sabotaged)[0], case.feeds), expected) > 1
    with capsys.disabled():
        print(f"\nbackend suite: {ran} cases run, {not_run} that onnxruntime cannot run, {split_cases} split")
        print("  splits:", dict(splits.most_common()))
        for reason, count in reasons.most_common():
            print(f"  {count:4} skipped: {reason}")
        print(f"  sabotage control: {caught} of {controls} wrong factors caught")
    assert wrong == []
    assert ran >= 1300
    assert split_cases >= 70
    assert caught == controls


def sabotaged(site: Site) -> SplitFactors:
    """Factors of 1.1 times the weight."""
    factors = full_rank(site)
    return SplitFactors(left=(factors.left * 1.1).astype(factors.left.dtype), right=factors.right)
