"""Is the cost of rewriting a graph, apart from factorization, linear in its nodes?

A chain graph of `n` nodes is made, a quarter of them MatMuls with a constant; `graph_passes.split` rewrites all of them
with ready factors (nothing is factorized). Sizes run interleaved, `--rounds` times, each in a process of its own.
Seconds are of CPU time: one thread works and nothing waits, so a busy machine disturbs less.

CPython's cyclic collector visits all live objects whenever a quarter of them is new: not once at 10,000 nodes, two or
three times at 100,000. So `split` pauses it; the remaining time of the collector counts, and is shown separately.

Goals (`--check` exits 4 when one is missed), on the medians of the full run:
  1. 100,000 nodes take at most 12 times as long as 10,000;
  2. 100,000 nodes take at most 30 s.
"""

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

import graph_passes as gp
from bench import common
from bench.common import Goal
from rsi_deploy.core.errors import RsiDeployError

SIZES, QUICK_SIZES = (10_000, 100_000), (2_000, 20_000)
WIDTH, RANK = 8, 2
MEASURED = ("find", "split", "collector")
RATIO_LIMIT, SECONDS_LIMIT = 12.0, 30.0


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.surgery_cost")
    options.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of every size [default: 3]")
    options.add_argument("--nodes", type=int, help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.nodes:
        print(json.dumps(measure(args.nodes)))
        return 0
    common.check_writable(args.json, args.markdown)
    sizes, rounds = (QUICK_SIZES, 1) if args.quick else (SIZES, args.rounds)
    if args.quick:
        common.progress(f"quick: {sizes} nodes, one round")
    plan = list(sizes) * rounds
    random.Random(0).shuffle(plan)
    runs: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for size in plan:
        common.progress(f"{size} nodes")
        runs[size].append(_child(size))
    rows = [
        {"nodes": size, **{key: statistics.median(run[key] for run in runs[size]) for key in MEASURED}}
        for size in sizes
    ]
    common.console().print(table(rows))
    settings = {"rounds": rounds, "sizes": sizes}
    common.write(args.json, common.document("bench.surgery_cost", arguments, settings, rows=rows, runs=runs))
    common.write(args.markdown, common.markdown_table(COLUMNS, [_cells(row) for row in rows]))
    return common.judge(goals(rows), args.check)


def measure(nodes: int) -> dict[str, float]:
    """CPU seconds of `find_sites` and of `split` on a graph of so many nodes, and those of them in the collector."""
    model = chain(nodes)
    gc.collect()  # else a collection caused by building the graph falls into the measured time
    passes: list[float] = []
    gc.callbacks.append(lambda phase, _: passes.append(time.process_time() * (-1 if phase == "start" else 1)))
    started = time.process_time()
    sites = len(gp.find_sites(model))
    found = time.process_time()
    left, right = np.ones((1, WIDTH, RANK), np.float32), np.ones((1, RANK, WIDTH), np.float32)
    records = gp.split(model, lambda site: gp.SplitFactors(left=left, right=right))
    done = time.process_time()
    gc.callbacks.pop()
    if sites != nodes // 4 or sum(isinstance(record, gp.Split) for record in records) != sites:
        raise RsiDeployError(f"expected {nodes // 4} splits in {nodes} nodes, but got {sites}")
    return {"find": found - started, "split": done - found, "collector": sum(passes)}


def chain(nodes: int) -> ir.Model:
    """Return a chain of repeated `MatMul, Relu, Sigmoid, Tanh`; every MatMul has its own weight."""
    value = graph_input = ir.val("x", ir.DataType.FLOAT, ["batch", WIDTH])
    made, initializers = [], []
    weight = np.ones((WIDTH, WIDTH), np.float32)
    for index in range(nodes):
        op_type = ("MatMul", "Relu", "Sigmoid", "Tanh")[index % 4]
        inputs = [value]
        if op_type == "MatMul":
            name = f"w{index}"
            initializers.append(ir.Value(name=name, const_value=ir.tensor(weight, name=name)))
            inputs.append(initializers[-1])
        made.append(ir.node(op_type, inputs, name=f"n{index}"))
        value = made[-1].outputs[0]
        value.name, value.type, value.shape = f"v{index}", graph_input.type, ir.Shape(["batch", WIDTH])
    graph = ir.Graph([graph_input], [value], nodes=made, initializers=initializers, opset_imports={"": 20}, name="g")
    return ir.Model(graph, ir_version=10)


def _child(nodes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.surgery_cost", "--nodes", str(nodes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RsiDeployError(f"{nodes} nodes: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring; find and split together."""
    small, large = (row["find"] + row["split"] for row in rows)
    ratio = large / small
    said = f"{ratio:.1f} of {RATIO_LIMIT:g}"
    return [
        Goal(name="linear", held=ratio <= RATIO_LIMIT, row=said),
        Goal(name="time", held=large <= SECONDS_LIMIT, row=f"{large:.1f} s of {SECONDS_LIMIT:g} s"),
    ]


COLUMNS = ("nodes", "find_sites, s", "split, s", "of it collector, s", "microseconds a node")


def _cells(row: dict[str, Any]) -> list[str]:
    total = row["find"] + row["split"]
    seconds = [f"{row[key]:.2f}" for key in MEASURED]
    return [f"{row['nodes']:,}", *seconds, f"{1e6 * total / row['nodes']:.0f}"]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS)
    for row in rows:
        result.add_row(*_cells(row))
    return result


if __name__ == "__main__":
    common.run(main)
