"""Is anything lost when runs are killed? Exports and sweeps ended by kill -9 at random times of their run.

    export    the digits CNN, the torch way, with evaluation data
    large     an ONNX file whose finished sites are stored as for a large model; each run replaces the last bundle
    sweep     three points of a small ONNX model from one calibration

Each case first runs to its end, which gives its time and its bytes. Then each kill comes at a random moment of that
time, in a process that has imported everything. The file under the final name is compared with its manifest, the inputs
with their hashes, and the same command runs again: it must succeed, leave nothing but its output, and write the same
bytes.

Goals (`--check` exits 4 when one is missed): no partial bundle, no damaged input, and every next run repairs.
"""

import hashlib
import random
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rsi_deploy
from bench import common, small
from bench.common import Goal
from bench.killing import Runner
from rsi_deploy.io.manifest import check_manifest

KILLS, QUICK_KILLS = 50, 2
SAMPLES = Path(rsi_deploy.__file__).parents[1] / "samples"
COLUMNS = ("case", "run", "kills", "within the run", "left something", "gone on", "partial", "damaged", "not mended")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One command that is killed.

    Attributes:
        name: name of the row.
        argv: the command; it runs in a folder with `in` and `out`.
        afresh: whether `out` is emptied before each kill; else each run replaces the last bundle.
        constants: as in `Runner.run`.
    """

    name: str
    argv: tuple[str, ...]
    afresh: bool
    constants: Mapping[str, Any]


CASES = (
    Case(
        name="export",
        argv=(
            *("export", "samples.digits:cnn", "--checkpoint", "in/cnn.safetensors", "--rank", "25%"),
            *("--data", "in/eval.npz", "-o", "out/b", "--bench-seconds", "0.5"),
            *("--allow-slower", "--force"),  # a kill may come too late: the next run finds a whole bundle then
        ),
        afresh=True,
        constants={},
    ),
    Case(
        name="large",
        argv=("export", "in/mlp.onnx", "--rank", "25%", "-o", "out/b", "--no-bench", "--force"),
        afresh=False,
        constants={"rsi_deploy.execution.result_store:LARGE": 0},
    ),
    Case(
        name="sweep",
        argv=(
            "sweep",
            "in/mlp.onnx",
            "--calib",
            "in/calib.npz",
            "-o",
            "out/s",
            "--points",
            "3",
            "--no-bench",
            "--allow-larger",
        ),
        afresh=True,
        constants={},
    ),
)


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.kills")
    options.add_argument("--case", choices=[case.name for case in CASES], action="append", help="[default: all]")
    options.add_argument("--kills", type=int, default=KILLS, metavar="N", help=f"of each case [default: {KILLS}]")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--seconds", type=float, default=1e9, metavar="S", help="begin no kill after so long")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    kills = min(args.kills, QUICK_KILLS) if args.quick else args.kills
    if args.quick:
        common.progress(f"quick: {kills} kills of each")
    cases = [case for case in CASES if not args.case or case.name in args.case]
    with Runner() as runner:
        end = time.monotonic() + args.seconds
        rows = [killed(runner, case, kills, args.seed, end) for case in cases]
    text = common.markdown_table(COLUMNS, [_cells(row) for row in rows])
    common.console().print(text, soft_wrap=True)
    settings = {"kills": kills, "seed": args.seed, "seconds": args.seconds}
    common.write(args.json, common.document("bench.kills", arguments, settings, rows=rows))
    common.write(args.markdown, text)
    return common.judge(goals(rows), args.check)


def killed(runner: Runner, case: Case, kills: int, seed: int, end: float) -> dict[str, Any]:
    """Kill one case repeatedly until `end` of the clock and return what was found after each kill."""
    rng = random.Random(f"{case.name} {seed}")
    row: dict[str, Any] = {"case": case.name, "kills": 0, "within": 0, "left": 0, "gone_on": 0}
    row |= {"partial": [], "damaged": [], "unmended": []}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as name:
        place = Path(name).resolve()
        out = place / "out"
        make_inputs(place / "in")
        out.mkdir()
        whole = runner.run(case.argv, place, constants=case.constants)
        if whole.code:
            raise RuntimeError(whole.said)
        row["seconds"] = whole.seconds
        inputs, expected = hashes(place / "in"), models(out)
        while row["kills"] < kills and time.monotonic() < end:
            row["kills"] += 1
            if case.afresh:
                shutil.rmtree(out)
                out.mkdir()
            after = rng.uniform(0, whole.seconds)
            ended = runner.run(case.argv, place, after=after, constants=case.constants)
            row["within"] += ended.code < 0
            row["left"] += any(path.name.startswith(".") for path in out.rglob("*"))
            row["partial"] += [f"{after:.3f} s: {problem}" for problem in broken(out)]
            again = runner.run(case.argv, place, constants=case.constants)
            row["gone_on"] += any("killed" in path.read_text() for path in out.rglob("report.json"))
            row["damaged"] += [] if hashes(place / "in") == inputs else [f"{after:.3f} s"]
            if wrong := unmended(again.code, again.said, out, expected):
                row["unmended"].append(f"{after:.3f} s: {wrong}")
            if row["kills"] % 10 == 0:
                common.progress(f"{case.name}: {row['kills']} of {kills}")
    return row


def make_inputs(folder: Path) -> None:
    """Write the inputs of all cases."""
    folder.mkdir()
    shutil.copyfile(SAMPLES / "digits_cnn.safetensors", folder / "cnn.safetensors")
    shutil.copyfile(SAMPLES / "digits_eval.npz", folder / "eval.npz")
    small.perceptron(folder / "mlp.onnx", width=192, layers=6)
    x = np.random.default_rng(0).standard_normal((512, 192)).astype(np.float32)
    np.savez(folder / "calib.npz", x=x)


def hashes(folder: Path) -> dict[str, str]:
    """Return the hash of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def models(out: Path) -> dict[str, str]:
    """Return the hash of each model under a final name, by path."""
    paths = [path for path in sorted(out.rglob("model.onnx")) if not _is_hidden(path, out)]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def broken(out: Path) -> list[str]:
    """Return the bundles under a final name that are not whole."""
    folders = [out / "b", *out.glob("s/point-*")]
    found = []
    for folder in folders:
        if folder.exists() and any(folder.iterdir()):
            checked = check_manifest(folder)
            found += [] if checked.present and checked.ok else [f"{folder.name}: {checked.summary}"]
    return found


def unmended(code: int, said: str, out: Path, expected: Mapping[str, str]) -> str:
    """Return what is wrong after the next run, or an empty text."""
    if code:
        return f"exit {code}: {said.strip()[-300:]}"
    if hidden := [str(path.relative_to(out)) for path in out.rglob("*") if path.name.startswith(".")]:
        return f"left behind: {', '.join(hidden)}"
    if problems := broken(out):
        return "; ".join(problems)
    return "" if models(out) == expected else "other bytes"


def _is_hidden(path: Path, out: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(out).parts)


def _cells(row: dict[str, Any]) -> list[str]:
    counts = [str(row[key]) for key in ("kills", "within", "left", "gone_on")]
    return [row["case"], f"{row['seconds']:.1f} s", *counts, *(str(len(row[k])) for k in BAD)]


BAD = ("partial", "damaged", "unmended")


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goals of the docstring."""
    words = {"partial": "no partial bundle", "damaged": "no damaged input", "unmended": "every next run mends"}
    return [
        Goal(name=f"{row['case']}: {words[bad]}", held=not row[bad], row="; ".join(row[bad]) or f"0 of {row['kills']}")
        for row in rows
        for bad in BAD
    ]


if __name__ == "__main__":
    common.run(main)
