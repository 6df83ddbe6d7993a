"""Benches of time and the tests that need a GPU, on one machine within a limit: each step is a process of its own.

    dense          the dense models of all nets, several at a time
    speedup        every net at batch 1 and 8, in float32 (with TF32) and float16; on CUDA with graphs too
    tests          `pytest -m gpu`
    never_slower   every net at 0.7 of its parameters, batch 1 and 8; float32 first, then float16 and CUDA graphs
    rivals         nets with trained weights and data, at 0.7 of the time

A step that fails or runs out of time does not stop the others. After each one the folder has:

    gpu.json       status and reason of every step, and the document that its bench stored
    gpu.md         the same as tables
    gpu.log        what the steps printed

Weights are random where only time is measured, so nets need no files; `bench.rivals` needs data. `bench/gpu.sh` runs
this where onnxruntime-gpu has to be unpacked first.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, Literal

from rich.table import Table

from bench import common, rivals
from rsi_deploy.runtime.providers import available_providers, short_name_of_user

ROOT = Path(__file__).resolve().parents[1]
NETS = ("vgg19", "vit_b_32", "resnet50", "minilm", "smollm2_prefill", "smollm2_decode")
KINDS = ("dense", "speedup", "tests", "never_slower", "rivals")
LIMIT = 520.0
LEAST = 5.0
"""Seconds that must be left for a step to start."""
PATIENCE = 10.0
"""Seconds to clean up after an interrupt, before a step is killed."""
DENSE = "../dense"
"""Folder of the dense models, seen from that of a step."""
RESULT = ("--json", "result.json", "--markdown", "result.md")

Status = Literal["done", "failed", "out of time", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """A process to run.

    Attributes:
        name: kind of the step (one of `KINDS`), and the net.
        arguments: arguments of the interpreter, behind `-m`.
        limit: seconds that it may take.
        skip: reason to skip it; "" to run it.
    """

    name: str
    arguments: tuple[str, ...] = ()
    limit: float = 0.0
    skip: str = ""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a step.

    Attributes:
        name: name of the step.
        status: how it ended.
        reason: why it is not done, or which of its rows failed; "" for neither.
        seconds: wall-clock seconds.
        command: its command line; "" if it was not started.
        document: what its bench stored, the rows so far if it was stopped; None for nothing.
        markdown: the same as tables.
        printed: its stdout and stderr.
    """

    name: str
    status: Status
    reason: str = ""
    seconds: float = 0.0
    command: str = ""
    document: dict[str, Any] | None = None
    markdown: str = ""
    printed: str = ""


def steps_of(provider: str, nets: Sequence[str]) -> Iterator[Step]:
    """Yield the steps, the most important first."""
    is_cuda = short_name_of_user(provider) == "cuda"
    graphs = f"{provider}{',' if ':' in provider else ':'}enable_cuda_graph=1"
    yield Step(name="dense", arguments=("bench.untrained", DENSE, *nets), limit=120)
    for net in nets:
        arguments = ("--models", net, "--dense", DENSE, "--providers", provider, *([graphs] if is_cuda else []))
        arguments += ("--precisions", "float32", "float16", "--seconds", "1")
        yield Step(name=f"speedup {net}", arguments=("bench.speedup", *arguments, *RESULT), limit=90)
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text("utf-8"))
    named = tuple(path.relative_to(ROOT).as_posix() for path in files)
    yield Step(name="tests", arguments=("pytest", "-m", "gpu", "-p", "no:cacheprovider", *named), limit=90)
    for what, own, precision in (
        ("float32", provider, "float32"),
        ("float16", provider, "float16"),
        ("CUDA graphs", graphs, "float32"),
    ):
        for net in nets if is_cuda or own == provider else ():
            arguments = ("--nets", net, "--provider", own, "--precision", precision, "--tenths", "7", "--threads", "2")
            arguments += ("--seconds", "1", "--table", "12", "--dense", DENSE)
            yield Step(
                name=f"never_slower {net} {what}", arguments=("bench.never_slower", *arguments, *RESULT), limit=60
            )
        if what == "float32":
            yield from (_rivals(net, provider) for net in nets)


def _rivals(net: str, provider: str) -> Step:
    name = f"rivals {net}"
    if net not in rivals.NETS:
        return Step(
            name=name, skip=f"no trained weights and test data of it; bench.rivals has {', '.join(rivals.NETS)}"
        )
    arguments = ("--quick", "--nets", net, "--budgets", "time", "--shares", "0.7", "--provider", provider)
    return Step(name=name, arguments=("bench.rivals", *arguments, *RESULT), limit=90)


def run(step: Step, left: float, parent: Path) -> Outcome:
    """Run a step in a new folder in `parent` for at most `left` seconds."""
    if step.skip:
        return Outcome(name=step.name, status="skipped", reason=step.skip)
    if left < LEAST:
        return Outcome(name=step.name, status="out of time", reason="not started: the limit of all steps is reached")
    started, limit = time.monotonic(), min(step.limit, left)
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        with (folder / "printed").open("wb") as printed:
            code = ended(step.arguments, ROOT if step.arguments[0] == "pytest" else folder, limit, printed)
        texts = {
            path.name: path.read_text("utf-8", errors="replace")
            .replace(f"{folder}/", "")
            .replace(f"{ROOT.parent}/", "")
            for path in folder.iterdir()
            if path.is_file()
        }
    document = json.loads(texts["result.json"]) if "result.json" in texts else None
    status, reason = judged(document, texts["printed"], code, limit)
    return Outcome(
        name=step.name,
        status=status,
        reason=reason,
        seconds=time.monotonic() - started,
        command=shlex.join(["python", "-m", *step.arguments]),
        document=document,
        markdown=texts.get("result.md", ""),
        printed=texts["printed"],
    )


def ended(arguments: Sequence[str], folder: Path, limit: float, printed: IO[bytes]) -> int | None:
    """Run a module in a folder and return its exit status; None if it was stopped with all that it had started."""
    paths = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_WAIT_POLICY": "PASSIVE"}
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=os.environ | changed,
        stdout=printed,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit)
    for stop in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stop)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    return None


def judged(document: dict[str, Any] | None, printed: str, code: int | None, limit: float) -> tuple[Status, str]:
    """Return the status of a step, and the reason where it is not done or has rows that failed."""
    rows = (document or {}).get("rows", [])
    last = (printed.strip().splitlines() or ["it printed nothing"])[-1]
    if code is None:
        return "out of time", f"stopped after {limit:.0f} s with {len(rows)} rows"
    if code:
        return "skipped" if common.NO_NET in last else "failed", last if code > 0 else f"ended with {code}: {last}"
    skipped = (document or {}).get("skipped") or {}
    if document is None:
        return ("skipped", last) if re.search(r"^\d+ skipped", last) else ("done", "")
    if not rows:
        return "skipped", "; ".join(skipped.values()) or "it has no rows"
    errors = [f"{row.get('provider')}, {row.get('precision')}: {row['error']}" for row in rows if row.get("error")]
    if errors:
        return "failed" if len(errors) == len(
            rows
        ) else "done", f"{len(errors)} of {len(rows)} rows failed: {errors[0]}"
    return "done", ""


def store(folder: Path, made: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write the three files."""
    steps = [{**asdict(outcome), "seconds": round(outcome.seconds, 1)} for outcome in outcomes]
    for step in steps:
        del step["markdown"], step["printed"]
    common.write(folder / "gpu.json", {**made, "steps": steps})
    parts = [f"## {outcome.name}\n\n{outcome.markdown}" for outcome in outcomes if outcome.markdown]
    common.write(folder / "gpu.md", "\n".join([common.markdown_table(COLUMNS, [*map(_cells, outcomes)]), *parts]))
    common.write(folder / "gpu.log", "\n".join(f"=== {each.name}\n{each.printed}" for each in outcomes))


COLUMNS = ("step", "status", "seconds", "rows", "reason")


def _cells(outcome: Outcome) -> list[str]:
    rows = "" if outcome.document is None else str(len(outcome.document.get("rows", [])))
    return [outcome.name, outcome.status, f"{outcome.seconds:.0f}", rows, outcome.reason]


def main(arguments: Sequence[str]) -> int:
    """Run the steps and return 0, whatever came of them."""
    options = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("folder", type=Path, help="folder of the results")
    options.add_argument("--provider", help="of onnxruntime, with options [default: cuda where it is offered, or cpu]")
    options.add_argument("--nets", nargs="+", metavar="NAME", default=NETS, help=f"[default: {' '.join(NETS)}]")
    options.add_argument(
        "--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of steps [default: all]; dense always runs"
    )
    options.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for all steps [default: {LIMIT:g}]")
    args = options.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    provider = args.provider or ("cuda" if "CUDAExecutionProvider" in available_providers() else "cpu")
    outcomes = run_all(
        [step for step in steps_of(provider, args.nets) if step.name.split()[0] in ("dense", *args.only)],
        args.folder,
        args.limit,
        settings={"provider": provider, "nets": list(args.nets), "limit": args.limit},
    )
    shown = Table(*COLUMNS)
    for outcome in outcomes:
        shown.add_row(*_cells(outcome))
    common.console().print(shown)
    return 0


def run_all(
    steps: Sequence[Step], folder: Path, limit: float, settings: Mapping[str, Any] = MappingProxyType({})
) -> list[Outcome]:
    """Run the steps one after another for at most `limit` seconds; store the outcomes after each one."""
    started = time.monotonic()
    made = common.document("bench.gpu", ["OUT"], settings)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="gpu-") as parent:
        for step in steps:
            left = started + limit - PATIENCE - time.monotonic()
            outcomes.append(run(step, left, Path(parent)))
            common.progress(f"{left:4.0f} s left before {step.name}: {outcomes[-1].status} {outcomes[-1].reason}")
            store(folder, made, outcomes)
    return outcomes


if __name__ == "__main__":
    common.run(main)
