"""What does `rsi-deploy export` cost over a plain dense export and the factorization alone?

Per model, each in a process of its own, interleaved in shuffled order, `--rounds` times (the medians count):

    dense    model = ...; torch.onnx.export(model, dynamo=True); program.save(FILE), as torch's users write it
    lean     the same with program.save(FILE, external_data=True), which takes the least memory in torch
    factors  RSI of every weight that export splits, and nothing else
    export   rsi-deploy export torchvision:NAME --weights none --rank 25% --no-bench

    time ratio     export's whole wall time less making the model, over (dense export + save) + factors
    memory ratio   export's peak resident memory over that of `dense`, and over that of `lean`

Making the model (torchvision's random initialization) is left out of both sides of the time ratio.

Goals (`--check` exits 4 when one is missed), for every model:
  1. the time ratio is at most 1.6;
  2. the memory ratio to `dense` is at most 1.3.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import common
from bench.common import Goal
from rsi_deploy.core.errors import RsiDeployError
from rsi_deploy.runtime.machine import peak_memory

MODELS = ("vgg19", "vit_b_32")
QUICK_MODELS = ("mobilenet_v2",)
ARMS = ("dense", "lean", "factors", "export")
RANK = "25%"
TIME_LIMIT, MEMORY_LIMIT = 1.6, 1.3


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.export_cost")
    options.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of every arm [default: 3]")
    options.add_argument("--models", nargs="+", metavar="NAME", help="torchvision models")
    options.add_argument("--arm", help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.arm:  # the child: one arm, one model
        print(json.dumps(run_arm(args.arm, args.models[0])))
        return 0
    common.check_writable(args.json, args.markdown)
    names = tuple(args.models or (QUICK_MODELS if args.quick else MODELS))
    rounds = 1 if args.quick else args.rounds
    if args.quick:
        common.progress(f"quick: {', '.join(names)}, one round")
    plan = [(arm, name) for name in names for arm in ARMS] * rounds
    random.Random(0).shuffle(plan)
    runs: list[dict[str, Any]] = []
    for index, (arm, name) in enumerate(plan):
        common.progress(f"{index + 1}/{len(plan)} {name} {arm}")
        runs.append({"model": name, "arm": arm, **_child(arm, name)})
    rows = [summary(name, [r for r in runs if r["model"] == name]) for name in names]
    common.console().print(table(rows))
    settings = {"rank": RANK, "rounds": rounds, "models": names}
    common.write(args.json, common.document("bench.export_cost", arguments, settings, rows=rows, runs=runs))
    common.write(args.markdown, markdown(rows))
    return common.judge(goals(rows), args.check)


def run_arm(arm: str, name: str) -> dict[str, float]:
    """Run one arm in this process; seconds of its work without making the model, and peak bytes."""
    import torch

    from rsi_deploy.torch_models.model_source import load_source

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        if arm == "export":
            from rsi_deploy.exporting.api import export

            report = export(f"torchvision:{name}", Path(folder) / "out", rank=RANK, weights="none", measure=False)
            making = next(stage.seconds for stage in report.stages if stage.name == "load")
        else:
            source = load_source(f"torchvision:{name}", weights="none")
            making = time.perf_counter() - started
            assert source.module is not None
            if arm == "factors":
                _factorize(source.module)
            else:
                dynamic = ({0: torch.export.Dim("batch")},)
                program = torch.onnx.export(
                    source.module, source.example_inputs, dynamo=True, dynamic_shapes=dynamic, verbose=False
                )
                assert program is not None
                program.save(f"{folder}/model.onnx", external_data=arm == "lean")
        seconds = time.perf_counter() - started - making
    return {"seconds": seconds, "making": making, "peak": float(peak_memory())}


def _factorize(module: Any) -> None:
    from rsi_deploy.linalg.solver import Solver
    from rsi_deploy.planning.planner import Planner, RankSpec
    from rsi_deploy.torch_models.module_sites import find_module_sites

    planner, solver = Planner(spec=RankSpec.parse(RANK)), Solver()
    for site in find_module_sites(module):
        rank = planner.decide(site.name, *site.shape).rank
        if rank is not None and not site.obstacle:
            solver(site.matrix(), rank, site=site.name)


def _child(arm: str, name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.export_cost", "--arm", arm, "--models", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RsiDeployError(f"{name}, {arm}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def summary(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios of them."""
    seconds = {arm: statistics.median(r["seconds"] for r in runs if r["arm"] == arm) for arm in ARMS}
    peak = {arm: statistics.median(r["peak"] for r in runs if r["arm"] == arm) for arm in ARMS}
    return {
        "model": name,
        "seconds": seconds,
        "peak": peak,
        "time_ratio": seconds["export"] / (seconds["dense"] + seconds["factors"]),
        "time_ratio_lean": seconds["export"] / (seconds["lean"] + seconds["factors"]),
        "memory_ratio": peak["export"] / peak["dense"],
        "memory_ratio_lean": peak["export"] / peak["lean"],
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring, judged row by row."""
    found = []
    for row in rows:
        time_ratio, memory = row["time_ratio"], row["memory_ratio"]
        found.append(
            Goal(name="time", held=time_ratio <= TIME_LIMIT, row=f"{row['model']} {time_ratio:.2f} of {TIME_LIMIT}")
        )
        found.append(
            Goal(name="memory", held=memory <= MEMORY_LIMIT, row=f"{row['model']} {memory:.2f} of {MEMORY_LIMIT}")
        )
    return found


COLUMNS = (
    "model",
    "dense s",
    "lean s",
    "factors s",
    "export s",
    "time ratio",
    "(lean)",
    "peak GB",
    "memory ratio",
    "(lean)",
)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        *(f"{row['seconds'][arm]:.1f}" for arm in ARMS),
        f"{row['time_ratio']:.2f}",
        f"{row['time_ratio_lean']:.2f}",
        f"{row['peak']['export'] / 1e9:.2f}",
        f"{row['memory_ratio']:.2f}",
        f"{row['memory_ratio_lean']:.2f}",
    ]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS)
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    return common.markdown_table(COLUMNS, [_cells(row) for row in rows])


if __name__ == "__main__":
    common.run(main)
