"""What do calibrating and fitting cost, in forward passes over the calibration data and in memory?

    planned    options of every site (sensitivities measured), the choice at half of the MACs, sequential factors
    uniform    sequential factors at `--rank 25%`

passes     wall-clock seconds over the seconds of one pass of all calibration data through the dense model by
           onnxruntime: same batches, same threads, some batches at every site, about six passes in all, so that other
           work on the machine slows both
factorize  seconds of work on the moments in them: spectra, forms at all ranks, and the factors
limit      15 passes and 0.2 s a site
memory     peak resident memory of a process that does nothing else. Its limit: that process before it starts (imports,
           calibration data, and what is left of calibrating a tiny net), the dense model's file, the moments of the
           largest site, and twice what running one batch through the dense model takes beyond its file, measured in
           another process

The written models that an export measures its budget on are not part of it. Sensitivities and distances are measured
on few samples, but not on fewer than there are: with fewer than 250 samples planning costs more passes. So the time of
"planned" is a goal only where as many samples are used as in `bench.accuracy`, which those of vgg19 (random weights, 32
random images) are not.

Goals (`--check` exits 4 when one is missed; they are for two quiet cores):
  1. time within its limit;
  2. peak memory within its limit.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cases, common
from bench.cases import Case
from bench.common import Goal
from graph_passes.forms import Form
from rsi_deploy.calibration.activations import FittedSite
from rsi_deploy.calibration.moments import moment_bytes
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.io.onnx_file import file_bytes
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.planning.budget import Budget
from rsi_deploy.planning.decide import decide_by_budget, decide_uniformly, planned_splits
from rsi_deploy.planning.planner import Planner, RankSpec
from rsi_deploy.planning.site_fits import Progress
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.runtime.machine import peak_memory
from rsi_deploy.runtime.sessions import make_session, run_session

NETS = ("resnet20", "resnet56", "cnn_cifar10", "minilm", *({"lite0"} & set(cases.NETS)), "vgg19")
QUICK_NETS = ("cnn_cifar10",)
ARMS = ("planned", "uniform")
VGG_IMAGES = 32
KEEP_MACS, RANK = 0.5, "25%"
PASSES_LIMIT, SITE_SECONDS = 15.0, 0.2
UNIT_PASSES = 6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net and way; seconds are wall-clock, memory in bytes. `usual`: as many samples as in `bench.accuracy`."""

    net: str
    arm: str
    samples: int
    usual: bool
    sites: int
    pass_seconds: float
    seconds: float
    factorization: float
    peak: int
    before: int
    model: int
    moments: int
    batch: int

    @property
    def passes(self) -> float:
        """Forward passes that take as long as the work."""
        return self.seconds / self.pass_seconds

    @property
    def seconds_limit(self) -> float:
        """The longest allowed time, in seconds."""
        return PASSES_LIMIT * self.pass_seconds + SITE_SECONDS * self.sites

    @property
    def limit(self) -> int:
        """The largest allowed peak memory."""
        return self.before + self.model + self.moments + 2 * self.batch


@dataclass(frozen=True, kw_only=True)
class ClockedCalibration(Calibration):
    """A calibration that adds up the seconds of its factorizations."""

    spent: list[float] = field(default_factory=list, compare=False)

    def _fitted(self, *args: Any, **kwargs: Any) -> FittedSite:
        with self._clocked():
            return super()._fitted(*args, **kwargs)

    def _errors(self, *args: Any, **kwargs: Any) -> Iterator[tuple[tuple[Form, int], float]]:
        with self._clocked():
            found = list(super()._errors(*args, **kwargs))
        yield from found

    @contextmanager
    def _clocked(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent.append(time.perf_counter() - started)


# --- in a process of its own ----------------------------------------------------------------------------------------


class Forward:
    """Runs of the dense model on the calibration data, some batches at a time, that measure what a pass costs."""

    def __init__(self, case: Case) -> None:
        self._name, self._session = case.name, make_session(case.path, spin_between_runs=False)
        self._batches = list(cases.batches(case.draw(0), cases.BATCH))
        self._next = 0
        self.seconds = 0.0
        self(len(self._batches))  # warm-up
        self.seconds, self._next = 0.0, 0

    def __call__(self, count: int) -> None:
        """Run the next batches."""
        started = time.perf_counter()
        for _ in range(count):
            run_session(self._session, self._batches[self._next % len(self._batches)], self._name)
            self._next += 1
        self.seconds += time.perf_counter() - started

    def share(self, steps: int) -> int:
        """Return the batches of each step such that all steps run `UNIT_PASSES`."""
        return -(-UNIT_PASSES * len(self._batches) // max(steps, 1))

    @property
    def pass_seconds(self) -> float:
        """Of all the data once, on average."""
        return self.seconds * len(self._batches) / self._next


def work(streams: OnnxStreams, calibration: Calibration, case: Case, arm: str, progress: Progress | None) -> None:
    """Calibrate and fit."""
    if arm == "uniform":
        decisions = decide_uniformly(Planner(spec=RankSpec.parse(RANK)), streams)
    else:
        options = calibration.options(streams, progress)
        decisions = decide_by_budget(Budget(keep_macs=KEEP_MACS), options, case.measured(case.path), streams)
    calibration.fit(streams, planned_splits(decisions, streams), progress)


def timed(case: Case, arm: str) -> dict[str, float]:
    """Seconds of the work, of the factorizations in it, and of a forward pass over the same data."""
    forward = Forward(case)
    streams, calibration = case.streams(0), ClockedCalibration(solver=Solver())
    share = forward.share((2 if arm == "planned" else 1) * len(streams.sites))
    started = time.perf_counter()
    work(streams, calibration, case, arm, lambda name, index, count: forward(share))
    seconds = time.perf_counter() - started - forward.seconds
    return {
        "sites": len(streams.sites),
        "pass_seconds": forward.pass_seconds,
        "seconds": seconds,
        "factorization": sum(calibration.spent),
    }


def remembered(case: Case, arm: str) -> dict[str, float]:
    """Peak resident bytes of the work, those before it, and the moments of the largest site."""
    small = cases.tiny(case.path.parent)
    # Libraries are loaded and started where they are first needed.
    work(small.streams(0), Calibration(solver=Solver()), small, arm, None)
    streams = case.streams(0)  # the data are drawn, a copy of them
    before = _resident("VmRSS")
    work(streams, Calibration(solver=Solver()), case, arm, None)
    moments = max(
        moment_bytes(site.in_features, site.out_features, site.groups, streams.rows_of(site.name))
        for site in streams.sites
    )
    return {"peak": _resident("VmHWM"), "before": before, "moments": moments}


def one_batch(case: Case) -> dict[str, float]:
    """Return the bytes that running the dense model on one batch takes beyond its file."""
    small = cases.tiny(case.path.parent)
    cases.outputs_of(small.path, small.pool)
    before = _resident("VmRSS")
    first = next(cases.batches(case.draw(0), cases.BATCH))
    run_session(make_session(case.path), first, case.name)
    return {
        "batch": max(_resident("VmHWM") - before - file_bytes(case.path), sum(array.nbytes for array in first.values()))
    }


def _resident(key: str) -> int:
    """Resident memory of this program, now (VmRSS) or at its peak (VmHWM).

    `getrusage` is the last resort: it returns the peak of the parent process where that is larger.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return peak_memory()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), peak_memory())


def _child(path: Path, task: str) -> dict[str, float]:
    """Return the result of a `task` from a process of its own: "time planned", "memory uniform", "batch"."""
    command = [sys.executable, "-m", "bench.calibration_cost", "--child", str(path), "--task", task]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RsiDeployError(f"{path.stem}, {task}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _answer(path: Path, task: str) -> dict[str, float]:
    with np.load(path.with_suffix(".npz")) as file:
        pool = {name: file[name] for name in file.files}
    case = cases.untested(path, pool)
    what, *arm = task.split()
    return one_batch(case) if what == "batch" else (timed if what == "time" else remembered)(case, *arm)


# --- the command ----------------------------------------------------------------------------------------------------


def measure(name: str, folder: Path) -> Iterator[Row]:
    """Both ways of one net, each task in a process of its own."""
    images = (VGG_IMAGES, 3, 224, 224)
    case = cases.untrained(name, folder, images) if name == "vgg19" else cases.load(name, folder)
    path, samples = case.path, case.size
    cases.tiny(folder)
    np.savez(path.with_suffix(".npz"), **case.draw(0))  # type: ignore[arg-type]
    batch = _child(path, "batch")
    for arm in ARMS:
        common.progress(f"{name}, {arm}: {samples} samples")
        facts = {**batch, **_child(path, f"time {arm}"), **_child(path, f"memory {arm}")}
        yield Row(
            net=name,
            arm=arm,
            samples=samples,
            usual=name != "vgg19",
            sites=int(facts["sites"]),
            model=file_bytes(path),
            pass_seconds=facts["pass_seconds"],
            seconds=facts["seconds"],
            factorization=facts["factorization"],
            **{key: int(facts[key]) for key in ("peak", "before", "moments", "batch")},
        )


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals of the docstring."""
    found = []
    for row in rows:
        at = f"{row.net}, {row.arm}, {row.samples} samples"
        if row.usual or row.arm == "uniform":
            said = f"{row.seconds:.1f} of {row.seconds_limit:.1f} s, {row.passes:.1f} passes"
            found.append(Goal(name=f"time, {at}", held=row.seconds <= row.seconds_limit, row=said))
        said = f"{row.peak / 1e6:.0f} of {row.limit / 1e6:.0f} MB"
        found.append(Goal(name=f"memory, {at}", held=row.peak <= row.limit, row=said))
    return found


COLUMNS = (
    *("net", "way", "samples", "sites", "one pass, s", "all, s", "limit, s", "factorize, s", "passes"),
    *("peak, MB", "limit, MB", "before", "model", "moments", "a batch"),
)


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = []
    for row in rows:
        seconds = [f"{value:.1f}" for value in (row.seconds, row.seconds_limit, row.factorization, row.passes)]
        sizes = (row.peak, row.limit, row.before, row.model, row.moments, row.batch)
        memory = [f"{value / 1e6:.0f}" for value in sizes]
        cells.append([row.net, row.arm, str(row.samples), str(row.sites), f"{row.pass_seconds:.2f}", *seconds, *memory])
    return common.markdown_table(COLUMNS, cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.calibration_cost")
    options.add_argument("--nets", nargs="+", choices=(*cases.NETS, "vgg19"), help="only these")
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--task", help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.child:
        print(json.dumps(_answer(args.child, args.task)))
        return 0
    common.check_writable(args.json, args.markdown)
    if args.quick:
        common.progress(f"quick: {', '.join(QUICK_NETS)} alone, where --nets names no other")
    rows: list[Row] = []
    for name in args.nets or (QUICK_NETS if args.quick else NETS):
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
            rows += measure(name, Path(folder))
    print(markdown(rows))
    judged = goals(rows)
    settings = {"quick": args.quick, "torch_threads": torch.get_num_threads(), "keep_macs": KEEP_MACS, "rank": RANK}
    derived = ("passes", "seconds_limit", "limit")
    stored = [{**asdict(row), **{name: getattr(row, name) for name in derived}} for row in rows]
    document = common.document(
        "bench.calibration_cost", arguments, settings, rows=stored, goals=[asdict(goal) for goal in judged]
    )
    common.write(args.json, document)
    common.write(args.markdown, markdown(rows))
    return common.judge(judged, args.check)


if __name__ == "__main__":
    common.run(main)
