"""How much memory and time does rewriting a model larger than memory take?

A model of `--size` bytes is generated (external data, MatMuls of 11008 x 4096 and back), rewritten by
`rsi_deploy.rewrite` in a process of its own, and its peak resident memory is read. The floor is
measured in another process: factorizing the same weights one by one, plus one sequential read of the source's data
and one sequential write of as many bytes as the result has.

Goals (`--check` exits 4 when one is missed), for the full size of 12 GB:
  1. peak resident memory is below 3 GB;
  2. the time is at most 1.5 times the floor.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.table import Table

from bench import common
from bench.common import Goal
from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.io.external_data import DataFile
from rsi_deploy.runtime.machine import peak_memory

WIDE, NARROW = 11008, 4096
BLOCK = 2 * WIDE * NARROW * 4
RANK, POWER_ITERATIONS = "5%", 2
PEAK_LIMIT, TIME_LIMIT = 3e9, 1.5


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.out_of_core")
    options.add_argument("--size", default="12GB", help="of the generated model [default: 12GB]")
    options.add_argument("--folder", type=Path, default=Path("."), help="where 1.2 times that much space is free")
    options.add_argument("--child", choices=("rewrite", "floor"), help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.child:
        print(json.dumps(_rewrite(args.folder) if args.child == "rewrite" else _floor(args.folder)))
        return 0
    common.check_writable(args.json, args.markdown)
    size = _bytes("2GB" if args.quick else args.size)
    blocks = max(1, round(size / BLOCK))
    if args.quick:
        common.progress(f"quick: {blocks * BLOCK / 1e9:.1f} GB")
    with tempfile.TemporaryDirectory(prefix="out-of-core-", dir=args.folder) as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < 1.3 * blocks * BLOCK:
            raise UsageError(f"{args.folder} has too little space for {1.3 * blocks * BLOCK / 1e9:.0f} GB; --folder")
        common.progress(f"generating {blocks * BLOCK / 1e9:.1f} GB")
        generate(folder / "source.onnx", blocks)
        common.progress("rewriting")
        rewritten = _child("rewrite", folder)
        common.progress("floor: factorization, one read, one write")
        floor = _child("floor", folder)
    row = {
        "bytes": blocks * BLOCK,
        "result_bytes": rewritten["result_bytes"],
        "peak": rewritten["peak"],
        "seconds": rewritten["seconds"],
        "floor": floor["seconds"],
        "factorization": floor["factorization"],
        "time_ratio": rewritten["seconds"] / floor["seconds"],
    }
    common.console().print(table(row))
    settings = {"rank": RANK, "power_iterations": POWER_ITERATIONS, "blocks": blocks}
    common.write(args.json, common.document("bench.out_of_core", arguments, settings, row=row))
    common.write(args.markdown, common.markdown_table(COLUMNS, [_cells(row)]))
    return common.judge(goals(row), args.check)


def generate(path: Path, blocks: int) -> None:
    """A chain of `blocks` times MatMul (4096, 11008), Relu, MatMul (11008, 4096); weights go to disk as made."""
    rng = np.random.default_rng(0)
    graph_input = ir.val("x", ir.DataType.FLOAT, ["batch", NARROW])
    nodes, initializers, value = [], [], graph_input
    with DataFile(path.with_name(f"{path.name}.data")) as data:
        for index in range(blocks):
            for side, shape in (("up", (NARROW, WIDE)), ("down", (WIDE, NARROW))):
                weight = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)
                name = f"block.{index}.{side}.weight"
                initializers.append(ir.Value(name=name, const_value=data.append(weight, name)))
                del weight
                nodes.append(ir.node("MatMul", [value, initializers[-1]], name=f"block.{index}.{side}"))
                value = nodes[-1].outputs[0]
                value.name = f"block.{index}.{side}.out"
                if side == "up":
                    nodes.append(ir.node("Relu", [value], name=f"block.{index}.relu"))
                    value = nodes[-1].outputs[0]
                    value.name = f"block.{index}.relu.out"
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", NARROW])
    for initializer in initializers:
        tensor = initializer.const_value
        assert tensor is not None
        initializer.type, initializer.shape = ir.TensorType(tensor.dtype), ir.Shape(list(tensor.shape))
    graph = ir.Graph(
        [graph_input], [value], nodes=nodes, initializers=initializers, opset_imports={"": 20}, name="main"
    )
    ir.save(ir.Model(graph, ir_version=10), path)


def _rewrite(folder: Path) -> dict[str, float]:
    from rsi_deploy.onnx_models.rewrite import rewrite

    started = time.perf_counter()
    rewrite(folder / "source.onnx", folder / "result.onnx", rank=RANK, power_iterations=POWER_ITERATIONS)
    os.sync()
    seconds = time.perf_counter() - started
    data = folder / "result.onnx.data"
    return {"seconds": seconds, "peak": float(peak_memory()), "result_bytes": float(data.stat().st_size)}


def _floor(folder: Path) -> dict[str, float]:
    import graph_passes as gp
    from rsi_deploy.core.arrays import as_torch
    from rsi_deploy.io.onnx_file import read_onnx
    from rsi_deploy.linalg.solver import rsi
    from rsi_deploy.planning.planner import RankSpec

    spec = RankSpec.parse(RANK)
    factorization = 0.0
    sites = gp.find_sites(read_onnx(folder / "source.onnx"))
    while sites:
        site = sites.pop()
        assert isinstance(site, gp.Site)
        weight = as_torch(np.ascontiguousarray(site.load()))  # in memory before the clock starts
        started = time.perf_counter()
        rsi(weight, spec.resolve(site.out_features, site.in_features), power_iterations=POWER_ITERATIONS)
        factorization += time.perf_counter() - started
    started = time.perf_counter()
    block = bytearray(1 << 25)
    with (folder / "source.onnx.data").open("rb", buffering=0) as source:
        while source.readinto(block):
            pass
    remaining = (folder / "result.onnx.data").stat().st_size
    with (folder / "floor.data").open("wb", buffering=0) as target:
        while remaining > 0:
            remaining -= target.write(block[: min(len(block), remaining)])
    os.sync()
    return {"seconds": factorization + time.perf_counter() - started, "factorization": factorization}


def _child(arm: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.out_of_core", "--child", arm, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RsiDeployError(f"{arm}: {done.stderr.strip().splitlines()[-1]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def goals(row: dict[str, Any]) -> list[Goal]:
    """Return the goals of the docstring."""
    return [
        Goal(name="memory", held=row["peak"] < PEAK_LIMIT, row=f"{row['peak'] / 1e9:.2f} GB of 3 GB"),
        Goal(name="time", held=row["time_ratio"] <= TIME_LIMIT, row=f"{row['time_ratio']:.2f} of {TIME_LIMIT}"),
    ]


COLUMNS = ("model", "result", "peak memory", "seconds", "floor", "of it factorization", "time ratio")


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['bytes'] / 1e9:.2f} GB",
        f"{row['result_bytes'] / 1e9:.2f} GB",
        f"{row['peak'] / 1e9:.2f} GB",
        f"{row['seconds']:.1f}",
        f"{row['floor']:.1f}",
        f"{row['factorization']:.1f}",
        f"{row['time_ratio']:.2f}",
    ]


def table(row: dict[str, Any]) -> Table:
    """Return the row for the terminal."""
    result = Table(*COLUMNS)
    result.add_row(*_cells(row))
    return result


def _bytes(text: str) -> float:
    number = text.upper().removesuffix("GB")
    try:
        return float(number) * 1e9
    except ValueError:
        raise UsageError(f"--size takes gigabytes such as 12GB, but got {text!r}") from None


if __name__ == "__main__":
    common.run(main)
