"""What does a calibrated export of a small net cost, where overhead dominates?

    planned    `export net.onnx --calib c.npz --keep-macs 0.7 --no-bench`: 57 thin Convs, 32 samples, a fixed batch of 1
    again      the same with `--plan plan.json` of that bundle, which skips the measurements for the plan

wall       seconds of the whole command, each in a process of its own
CPU        seconds of all its threads, which a busy machine changes less
calibrate  seconds of its stage "calibrate and plan"

Goals (`--check` exits 4 when one is missed; they are for two quiet cores):
  1. planned: its calibration takes at most 15 s, the whole command at most 30 s of wall-clock time;
  2. again: its calibration takes at most half of planned's, and its weights are the same.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx

from bench import common, small
from bench.common import Goal
from rsi_deploy.core.errors import RsiDeployError

SAMPLES, QUICK_SAMPLES = 32, 8
SECONDS, CALIBRATE, AGAIN = 30.0, 15.0, 0.5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One command; seconds."""

    arm: str
    samples: int
    wall: float
    cpu: float
    calibrate: float


def measure(arm: str, folder: Path, samples: int, options: Sequence[str]) -> Row:
    """Run one export into `folder/arm`.

    Raises:
        RsiDeployError: the export failed; the message is its last line.
    """
    code = "from rsi_deploy.cli import main; main()"
    fixed = [
        "export",
        str(folder / "net.onnx"),
        "--calib",
        str(folder / "c.npz"),
        "--no-bench",
        "-o",
        str(folder / arm),
    ]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *fixed, *options], capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RsiDeployError(f"{arm}: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
    stages = json.loads((folder / arm / "report.json").read_text(encoding="utf-8"))["stages"]
    return Row(
        arm=arm,
        samples=samples,
        wall=wall,
        cpu=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        calibrate=sum(stage["seconds"] for stage in stages if stage["name"] == "calibrate and plan"),
    )


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two models hold the same initializers, byte for byte."""
    first, second = (
        {tensor.name: tensor.SerializeToString() for tensor in onnx.load(path).graph.initializer}
        for path in (one, other)
    )
    return first == second


def goals(planned: Row, again: Row, same: bool) -> list[Goal]:
    """Return the goals of the docstring."""
    share = again.calibrate / planned.calibrate
    words = f"{share:.2f} of {AGAIN:.2f} of its calibration, weights {'the same' if same else 'OTHERS'}"
    return [
        Goal(name="calibrate", held=planned.calibrate <= CALIBRATE, row=f"{planned.calibrate:.1f} of {CALIBRATE:g} s"),
        Goal(name="planned", held=planned.wall <= SECONDS, row=f"{planned.wall:.1f} of {SECONDS:g} s"),
        Goal(name="again", held=share <= AGAIN and same, row=words),
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    args = common.parser(__doc__ or "", "bench.detector_export").parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    samples = QUICK_SAMPLES if args.quick else SAMPLES
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as name:
        folder = Path(name)
        small.thin_detector(folder / "net.onnx")
        np.savez(folder / "c.npz", input=small.smooth_images(samples, (3, 64, 192)))
        common.progress(f"planned, then again: {samples} samples")
        planned = measure("planned", folder, samples, ["--keep-macs", "0.7"])
        again = measure("again", folder, samples, ["--plan", str(folder / "planned" / "plan.json")])
        same = same_weights(folder / "planned" / "model.onnx", folder / "again" / "model.onnx")
    rows = [planned, again]
    cells = [[r.arm, str(r.samples), *(f"{seconds:.1f}" for seconds in (r.wall, r.cpu, r.calibrate))] for r in rows]
    table = common.markdown_table(("way", "samples", "wall, s", "CPU, s", "calibrate, s"), cells)
    print(table)
    judged = goals(planned, again, same)
    document = common.document(
        "bench.detector_export",
        arguments,
        {"quick": args.quick, "samples": samples},
        rows=[asdict(row) for row in rows],
        goals=[asdict(goal) for goal in judged],
    )
    common.write(args.json, document)
    common.write(args.markdown, table)
    return common.judge(judged, args.check)


if __name__ == "__main__":
    common.run(main)
