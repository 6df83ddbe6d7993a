"""The fuzz targets. Each takes bytes; any exception that it raises is a finding.

    onnx       a model file: inspected, its inputs drawn, compressed to rank 1
    runtime    a model file that passes the reader: onnx's checker and an onnxruntime session, both native code
    report     a bundle's report.json: read, printed, made a page of, verified, looked at by the server
    plan       plan.json: read, and held against sites
    cost       a table of times: read, printed, planned with
    config     a preprocessing, a sweep, a manifest, a benchmark's document: read and shown

Bytes are a file as it is, or choices for `mutations`. The errors of `rsi_deploy.core.errors` are what a hostile file
should come to; they are passed over here, and everything else is not.
"""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fuzz_seeds import bundle, documents, models
from mutations import mutated_document, mutated_model
from rich.console import Console

import rsi_deploy
from rsi_deploy.benchmark.result import read_bench
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.costing.cost_table import read_cost_table
from rsi_deploy.costing.trial_plans import trial_plans
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.manifest import check_manifest, write_manifest
from rsi_deploy.io.onnx_reader import check_file
from rsi_deploy.planning.plan_file import check_plan, read_plan
from rsi_deploy.report.pages.bench import page_of_bench
from rsi_deploy.report.pages.report import page_of_report
from rsi_deploy.report.pages.sweep import page_of_sweep, sweep_rows
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.sweep_schema import read_sweep
from rsi_deploy.report.tables.bench import print_document
from rsi_deploy.report.tables.costs import print_costs
from rsi_deploy.report.tables.report import print_report
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.random_feeds import random_feeds
from rsi_deploy.runtime.sessions import make_session
from rsi_deploy.serving.bundles import open_bundle

PASSED_OVER: tuple[type[Exception], ...] = (RsiDeployError,)
"""Errors that a hostile file may cause; a test removes them for valid files."""

SITES = {"w": {"matmul": 8}, "k": {}}
"""Forms and full ranks of the sites of plans."""


def onnx_target(data: bytes) -> None:
    """Run a model file through the steps that all verbs share."""
    with _folder() as folder:
        path = _model(data, folder)
        for use in (_inspected, _fed, _compressed):
            with contextlib.suppress(*PASSED_OVER):
                use(path)


def runtime_target(data: bytes) -> None:
    """Run a model file that the reader accepts through native code; a finding may end the process."""
    with _folder() as folder, contextlib.suppress(*PASSED_OVER):
        path = _model(data, folder)
        check_file(path)
        with contextlib.suppress(Exception):  # as `verify` does; a finding is a process that ends
            onnx.checker.check_model(str(path), full_check=True)
        make_session(path, threads=1)


def report_target(data: bytes) -> None:
    """Read a bundle with a changed report.json."""
    with _folder() as folder:
        copy = folder / "b"
        shutil.copytree(bundle(), copy)
        (copy / "report.json").write_bytes(_document(data, "report"))
        write_manifest(copy)  # so that the check of hashes passes
        for use in (_shown_report, rsi_deploy.verify, open_bundle):
            with contextlib.suppress(*PASSED_OVER):
                use(copy)


def plan_target(data: bytes) -> None:
    """Read a plan."""
    with _file(data, "plan") as path:
        check_plan(read_plan(path), SITES.items())


def cost_target(data: bytes) -> None:
    """Read a cost table."""
    with _file(data, "cost") as path:
        table = read_cost_table(path)
        print_costs(_console(), table)
        costs = table.by_site()
        for name, cost in costs.items():
            for split in cost.splits:
                table.saving({name: (split.form, split.rank)})
                cost.is_faster(split.form, split.rank)
                cost.is_noisy(split.form, split.rank)
        trial_plans(costs)


def config_target(data: bytes) -> None:
    """Read one of the smaller documents; the first byte selects it."""
    uses: tuple[Callable[[Path], object], ...] = (_preprocessing, _sweep, check_manifest_of, _bench)
    number = data[0] % len(uses) if data else 0
    with _folder() as folder:
        path = folder / ("preprocessing.json", "sweep.json", "manifest.json", "bench.json")[number]
        path.write_bytes(_document(data[1:], "config", number))
        with contextlib.suppress(*PASSED_OVER):
            uses[number](path)


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "onnx": onnx_target,
    "runtime": runtime_target,
    "report": report_target,
    "plan": plan_target,
    "cost": cost_target,
    "config": config_target,
}


def seeds(target: str) -> Iterator[bytes]:
    """Yield bytes that are valid input of the target, and bytes that select changes."""
    if target in ("onnx", "runtime"):
        yield from (b"\0" + model.SerializeToString() for model in models())
    elif target != "config":
        yield from (b"\0" + json.dumps(document).encode() for document in documents()[target])
    else:
        yield from (bytes([n]) + b"\0" + json.dumps(d).encode() for n, d in enumerate(documents()["config"]))
    random = np.random.default_rng(0)
    yield from (b"\1" + random.bytes(40) for _ in range(20))


def _model(data: bytes, folder: Path) -> Path:
    """Write the bytes, or a seed that they change, as a model file."""
    path = folder / "m.onnx"
    if data[:1] and data[0] % 2:
        seed = models()[data[1] % len(models()) if data[1:] else 0]
        data = b"\0" + mutated_model(seed, data[2:]).SerializePartialToString()
    path.write_bytes(data[1:])
    return path


def _document(data: bytes, target: str, number: int = 0) -> bytes:
    if data[:1] and data[0] % 2:
        return json.dumps(mutated_document(documents()[target][number], data[1:])).encode()
    return data[1:]


def _inspected(path: Path) -> None:
    rsi_deploy.inspect(str(path), rank="25%", spectrum_limit=64)


def _fed(path: Path) -> None:
    random_feeds(model_inputs(path), 2, 0)


def _compressed(path: Path) -> None:
    rsi_deploy.rewrite(path, path.with_name("made.onnx"), rank=1, always_split=True)


def _shown_report(folder: Path) -> None:
    report = read_report(folder)
    print_report(_console(), report)
    page_of_report(report)


def _preprocessing(path: Path) -> None:
    steps = Preprocessing.from_metadata(path.read_text(encoding="utf-8", errors="replace"))
    steps.describe()
    steps.apply(np.zeros((1, 5, 7, 3), np.uint8))


def _sweep(path: Path) -> None:
    sweep = read_sweep(path.parent)
    page_of_sweep(sweep)
    sweep_rows(sweep)
    for cost in ("time", "bytes", "macs"):
        sweep.front(cost)


def check_manifest_of(path: Path) -> None:
    """Check a folder against its manifest."""
    _ = check_manifest(path.parent).summary


def _bench(path: Path) -> None:
    document = read_bench(path)
    print_document(_console(), document)
    page_of_bench(document)


def _console() -> Console:
    return Console(file=io.StringIO(), width=120)


@contextlib.contextmanager
def _file(data: bytes, target: str) -> Iterator[Path]:
    with _folder() as folder, contextlib.suppress(*PASSED_OVER):
        path = folder / f"{target}.json"
        path.write_bytes(_document(data, target))
        yield path


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rsi-fuzz-") as name:
        yield Path(name)


def shown_input(target: str, data: bytes) -> Any:
    """Return the model or the document of a finding."""
    if target not in ("onnx", "runtime"):
        number = data[0] % 4 if target == "config" and data else 0
        return _document(data[1:] if target == "config" else data, target, number)
    with _folder() as folder:
        return onnx.ModelProto.FromString(_model(data, folder).read_bytes())
