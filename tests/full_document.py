"""A made-up `BenchDocument` with every section that a page can show."""

import datetime

import numpy as np
from bench_documents import accuracy, environment

from rsi_deploy.benchmark.mlperf.loadgen import LoadGenResult
from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantFile, VariantResult
from rsi_deploy.benchmark.sections import Bursts, ColdStart, Memory, Profile, SessionStreams, SiteTime, Throughput
from rsi_deploy.benchmark.statistics import quantiles, supported_percentiles, verdict

LABELS = ("dense", "rank 50%", "rank 25%")
SPEEDS = (1.0, 0.7, 0.45)


def timed_arm(label, median, first, *, seed=0):
    times = median * (0.9 + np.random.default_rng(seed).gamma(2, 0.07, 1500))
    speedup = None if first is None else first / median
    ends = None if speedup is None else (0.97 * speedup, 1.03 * speedup)
    return VariantResult(
        label=label,
        model=f"{label}.onnx",
        n=1500,
        blocks=50,
        median_ms=median,
        median_interval_ms=(0.98 * median, 1.02 * median),
        percentiles_ms=supported_percentiles(times),
        quantiles_ms=quantiles(times),
        warmup_calls=20,
        warm=True,
        provider_nodes={"CPUExecutionProvider": 12},
        memcpy_nodes=0,
        speedup=speedup,
        speedup_interval=ends,
        verdict="the model that the others are compared with" if ends is None else verdict(speedup, ends, 50),
    )


def timed_cell(labels, medians, *, batch=1, threads=None, **more):
    return BenchResult(
        arms=tuple(
            timed_arm(label, median, medians[0] if number else None, seed=number)
            for number, (label, median) in enumerate(zip(labels, medians, strict=True))
        ),
        provider="CPUExecutionProvider",
        threads=threads,
        batch=batch,
        inputs={"input": f"float32 ({batch}, 3, 32, 32)"},
        seed=0,
        seconds=9.5,
        stopped="precise",
        partial=False,
        onnxruntime="1.31.1",
        method="made up",
        notes=("a note of this cell",),
        **more,
    )


def loadgen(label, *, valid):
    return LoadGenResult(
        model=f"{label}.onnx",
        scenario="SingleStream",
        valid=valid,
        reasons=() if valid else ("Min duration satisfied : NO",),
        headline="90.0th percentile latency: 3.161 ms",
        latency_ms={"mean": 3.0, "90": 3.161},
        per_second=320.0,
        queries=1024,
        own_p90_ms=3.158,
        batch=1,
        call_ms=3.0,
        target_qps=None,
        target_latency_ms=None,
        inputs={"input": "float32 (1, 3, 32, 32)"},
        provider="CPUExecutionProvider",
        provider_nodes={"CPUExecutionProvider": 12},
        how="bound",
        seconds=10,
        loadgen="6.0",
        summary="",
    )


def cold_start(label, s):
    return ColdStart(
        label=label,
        repeats=9,
        process_ms=22,
        import_ms=110,
        load_ms=60 * s,
        first_ms=8 * s,
        total_ms=132 + 68 * s,
        total_interval_ms=(130 + 65 * s, 135 + 70 * s),
        verdict="no difference shown [0.99, 1.02]",
    )


def memory(label, s):
    return Memory(
        label=label,
        import_bytes=60_000_000,
        loaded_bytes=int(60e6 + 80e6 * s),
        peak_bytes=int(70e6 + 95e6 * s),
        limit_bytes=150_000_000,
        fits=s < 0.8,
        stopped_in="done" if s < 0.8 else "run",
        median_ms=4 * s,
        detail="",
    )


def bursts(label, s):
    return Bursts(
        label=label,
        gap_ms=100,
        calls=5,
        bursts=40,
        first_ms=6 * s,
        first_interval_ms=(5.8 * s, 6.3 * s),
        rest_ms=4 * s,
        rest_interval_ms=(3.9 * s, 4.1 * s),
        speedup=1 / s,
        speedup_interval=(0.95 / s, 1.05 / s),
        verdict=f"{1 / s:.2f}x faster",
    )


def streams(label, s, n):
    return SessionStreams(
        label=label,
        streams=n,
        batch=1,
        windows=9,
        per_second=250 / s * n**0.5,
        per_second_interval=(240 / s * n**0.5, 260 / s * n**0.5),
        median_ms=4 * s * n**0.5,
        percentiles_ms={"p50": 4 * s, "p90": 6 * s},
    )


def throughput(label, s):
    batches = (1, 2, 4, 8)
    return Throughput(
        label=label,
        batches=batches,
        per_second=tuple(250 / s * b**0.3 for b in batches),
        per_second_intervals=tuple((240 / s * b**0.3, 260 / s * b**0.3) for b in batches),
        best=8,
        ended="the largest batch of the request",
    )


def profile(label, s):
    factors = {"dense_ms": 0.3, "right_ms": None, "left_ms": None}
    if s < 1:
        factors = {"dense_ms": None, "right_ms": 0.15 * s, "left_ms": 0.1}
    return Profile(
        label=label,
        calls=60,
        call_ms=4.4 * s,
        op_ms={"Conv": 3 * s, "Gemm": 0.8 * s, "Relu": 0.1} | ({"ReorderInput": 0.05} if s < 1 else {}),
        op_nodes={"Conv": 20, "Gemm": 2, "Relu": 17} | ({"ReorderInput": 4} if s < 1 else {}),
        sites=tuple(SiteTime(site=f"layer{i}.conv", **factors) for i in range(6)),
    )


def full_document(labels=LABELS, **changed):
    """Return three variants over three batches and two threads, faster in all but the last, with every section."""
    speeds = SPEEDS[: len(labels)]
    each = list(zip(labels, speeds, strict=True))
    cells = [timed_cell(labels, [4.0 * batch**0.8 * s for s in speeds], batch=batch) for batch in (1, 4, 16)]
    cells.append(timed_cell(labels, [2.5 * (1.4 if s < 1 else 1) for s in speeds], threads=2))
    content = {
        "tool": "rsi-deploy 0.1.0",
        "created": datetime.datetime(2026, 11, 24, 12, tzinfo=datetime.UTC),
        "command": "rsi-deploy bench dense.onnx b.onnx --batch 1,4,16",
        "environment": environment(),
        "load_after": (0.5, 0.5, 0.5),
        "arms": tuple(
            VariantFile(label=a, model=f"{a}.onnx", format="onnx", file_bytes=int(s * 40e6), sha256="0" * 64)
            for a, s in each
        ),
        "cells": tuple(cells),
        "cold_start": tuple(cold_start(a, s) for a, s in each),
        "memory": tuple(memory(a, s) for a, s in each),
        "bursts": tuple(bursts(a, s) for a, s in each),
        "streams": tuple(streams(a, s, n) for a, s in each for n in (1, 2, 4)),
        "throughput": tuple(throughput(a, s) for a, s in each),
        "profile": tuple(profile(a, s) for a, s in each),
        "loadgen": {a: (loadgen(a, valid=s < 1),) for a, s in each},
        "accuracy": {a: accuracy(92 - 9 * (1 - s) ** 2) for a, s in each},
        "notes": ("a note of the run",),
    }
    return BenchDocument(**content | changed)
