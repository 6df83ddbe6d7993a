"""Bench documents made by hand."""

import datetime

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantFile, VariantResult
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.evaluation.paired_test import paired_test
from rsi_deploy.runtime.machine import Environment


def environment(**changes):
    found = {
        "python": "3.11",
        "platform": "Linux",
        "cpu": "Some CPU",
        "cores": 4,
        "physical_cores": 4,
        "memory_bytes": 8 * 10**9,
        "cpu_flags": (),
        "gpus": (),
        "versions": {},
        "load_average": (0.1, 0.1, 0.1),
    }
    return Environment(**{**found, **changes})


def arm(label, median, width=0.01, speedup=None, speedup_width=0.01):
    """Return a variant of `median` ms +- `width` (relative) and `speedup` +- `speedup_width`."""
    return VariantResult(
        label=label,
        model=f"{label}.onnx",
        n=100,
        blocks=50,
        median_ms=median,
        median_interval_ms=(median * (1 - width), median * (1 + width)),
        percentiles_ms={},
        quantiles_ms=(),
        warmup_calls=3,
        warm=True,
        provider_nodes={},
        memcpy_nodes=0,
        speedup=speedup,
        speedup_interval=None if speedup is None else (speedup * (1 - speedup_width), speedup * (1 + speedup_width)),
        verdict="the model that the others are compared with" if speedup is None else f"{speedup:.2f}x",
    )


def cell(*arms, batch=1, partial=False, **changes):
    found = {
        "arms": arms,
        "provider": "CPUExecutionProvider",
        "threads": None,
        "batch": batch,
        "inputs": {"x": f"float32 ({batch}, 3)"},
        "seed": 0,
        "seconds": 1.0,
        "stopped": "precise",
        "partial": partial,
        "onnxruntime": "1.31.1",
        "method": "",
        "notes": (),
    }
    return BenchResult(**{**found, **changes})


def accuracy(top1, samples=2000, fingerprint="d" * 64, lost=None, partial=False):
    return AccuracyResult(
        samples=samples,
        classes=10,
        top1=top1,
        top1_interval=None if top1 is None else (top1 - 1, top1 + 1),
        top5=None,
        agreement=None,
        divergence=None,
        paired=None if lost is None else paired_test(lost, 0, samples),
        provider="CPUExecutionProvider",
        preprocessing=None,
        data_fingerprint=fingerprint,
        partial=partial,
    )


def document(*cells, accuracy=None, hashes=None, partial=False, **machine):
    labels = [arm.label for arm in cells[0].arms]
    return BenchDocument(
        tool="rsi-deploy 0",
        created=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        command="",
        environment=environment(**machine),
        load_after=None,
        arms=tuple(
            VariantFile(
                label=label,
                model=f"{label}.onnx",
                format="onnx",
                file_bytes=1000,
                sha256=(hashes or {}).get(label, label),
            )
            for label in labels
        ),
        cells=cells,
        accuracy=accuracy or {},
        partial=partial,
    )
