"""Does a change of the code change what comes out?

Some thirty commands that cover every verb, source, form, budget and option run on the samples: fixed routes and seeds,
stored times, one thread, nothing measured. Of each command the record keeps

    code       the exit code
    files      sha256 of model.onnx without its metadata, and of plan.json
    numbers    every number of the JSON document, with its path; times and facts of the machine are left out

`--store` writes the record to bench/results/golden/golden.json. Without it, the record is made again and compared; what
differs is named. Bytes hold for one kind of processor and one set of versions, which the record names.

Goals (`--check` exits 4 when one is missed): every command gives what the record holds.
"""

import contextlib
import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import torch

from bench import common
from bench.common import Goal
from rsi_deploy import cli, compress_
from rsi_deploy.exporting.timing import timed_export
from rsi_deploy.runtime.machine import environment

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "bench" / "results" / "golden" / "golden.json"
SAMPLES = ROOT / "samples"
CNN = ["samples.digits:cnn", "--checkpoint", str(SAMPLES / "digits_cnn.safetensors")]
VIT = ["samples.digits:vit", "--checkpoint", str(SAMPLES / "digits_vit.safetensors")]
EVAL, CALIB = str(SAMPLES / "digits_eval.npz"), str(SAMPLES / "digits_calib.npz")
FIXED = ["--no-bench", "--no-mixed-precision", "--json"]
PLAIN = ["--route", "chebyshev", *FIXED]
FITTED = ["--calib", CALIB, "--calib-size", "256", *PLAIN]
OF_THE_RUN = {
    "created",
    "command",
    "environment",
    "machine",
    "peak_memory",
    "seconds",
    "stages",
    "table_seconds",
    "tool",
}
"""Keys of a document whose values are of the run and not of the result."""

CASES = {
    "cnn": ["export", *CNN, "--rank", "25%", "--include", "classifier.fc*", "--data", EVAL, "--keep-dense", *PLAIN],
    "vit": ["export", *VIT, "--rank", "25%", "--keep-dense", *PLAIN],
    "no-joint": ["export", *VIT, "--rank", "25%", "--no-joint", *PLAIN],
    "program": ["export", "vit.pt2", "--rank", "12", *PLAIN],
    "onnx": ["export", "cnn/dense.onnx", "--rank", "25%", *PLAIN],
    "opset": ["export", "cnn/dense.onnx", "--rank", "25%", "--opset", "21", *PLAIN],
    "feeds": ["export", "cnn/dense.onnx", "--rank", "25%", "--feeds", "feeds.npz", *PLAIN],
    "error-of-norm": ["export", "cnn/dense.onnx", "--max-error", "20%", *PLAIN],
    "error-of-best": ["export", "cnn/dense.onnx", "--max-error", "1.2x", *PLAIN],
    "always-split": ["export", "cnn/dense.onnx", "--rank", "100%", "--always-split", *PLAIN],
    "filters": ["export", "cnn/dense.onnx", "--rank", "8", "--exclude", "*head*", "--seed", "7", *PLAIN],
    "rsvd": ["export", "cnn/dense.onnx", "--rank", "25%", "--method", "rsvd", "--oversampling", "8", *FIXED],
    "svd": ["export", "cnn/dense.onnx", "--rank", "25%", "--method", "svd", *FIXED],
    "iterations": ["export", "cnn/dense.onnx", "--rank", "25%", "-q", "2", *PLAIN],
    "gram": ["export", "cnn/dense.onnx", "--rank", "25%", "--route", "gram", *FIXED],
    "krylov": ["export", "cnn/dense.onnx", "--rank", "25%", "--route", "krylov", *FIXED],
    "exact": ["export", "cnn/dense.onnx", "--rank", "25%", "--route", "exact", *FIXED],
    "keep-params": ["export", *VIT, "--keep-params", "0.35", *FITTED],
    "keep-macs": ["export", "cnn/dense.onnx", "--keep-macs", "0.5", "--data", EVAL, *FITTED],
    "max-size": ["export", "cnn/dense.onnx", "--max-size", "1MB", "--min-rank", "4", "--rank-multiple", "4", *FITTED],
    "max-drop": ["export", "cnn/dense.onnx", "--max-drop", "2", "--data", EVAL, *FITTED],
    "fitted-rank": ["export", "cnn/dense.onnx", "--rank", "25%", *FITTED],
    "weights-at-planned-ranks": ["export", "cnn/dense.onnx", "--keep-macs", "0.5", "--factors", "weights", *FITTED],
    "plan": ["export", "cnn/dense.onnx", "--plan", "keep-macs/plan.json", *FITTED],
    "times": [
        "export",
        "cnn/dense.onnx",
        "--keep-latency",
        "0.6",
        "--cost",
        "cost.json",
        "--allow-cost-mismatch",
        *FITTED,
    ],
    "impossible": ["export", "cnn/dense.onnx", "--keep-macs", "0.001", *FITTED],
    "usage": ["export", "cnn/dense.onnx", "--rank", "0.4", *PLAIN],
    "inspect-torch": ["inspect", *VIT, "--rank", "25%", "--json"],
    "inspect-onnx": ["inspect", "vit/dense.onnx", "--rank", "16", "--json"],
    "sweep": [
        "sweep",
        "cnn/dense.onnx",
        "--calib",
        CALIB,
        "--calib-size",
        "128",
        "--points",
        "3",
        "--no-bench",
        "--json",
    ],
    "eval": ["eval", "cnn", "--reference", "cnn/dense.onnx", "--data", EVAL, "--json"],
    "verify": ["verify", "cnn", "--data", EVAL, "--json"],
    "triton": ["package", "cnn", "--target", "triton", "--json"],
    "ort": ["package", "cnn", "--target", "ort", "--json"],
    "schema": ["schema"],
}
"""Each runs in one folder, where the folders of those before it lie."""
QUICK = ("cnn", "vit", "onnx", "usage", "inspect-onnx")
MAKE_FOLDERS = {"export", "sweep", "package"}


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.golden")
    options.add_argument("--store", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    chosen = options.parse_args(arguments)
    common.check_writable(chosen.json)
    torch.set_num_threads(1)
    names = QUICK if chosen.quick else tuple(CASES)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _write_inputs(Path(folder))
        found = {name: _outcome(name) for name in names}
        found |= {} if chosen.quick else _modules()
    versions = {name: environment().model_dump(mode="json")[name] for name in ("cpu", "versions")}
    made = common.document("bench.golden", arguments, {"quick": chosen.quick}, made_with=versions, outcomes=found)
    common.write(chosen.json, made)
    if chosen.store:
        common.write(RECORD, made)
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["made_with"] != versions:
        common.progress("the record is of another processor or other versions: bytes may differ for that alone")
    return common.judge([_goal(name, record["outcomes"].get(name), found[name]) for name in found], chosen.check)


def _write_inputs(folder: Path) -> None:
    """Make the files that the commands name: a program and feeds."""
    from samples import digits

    network = digits.vit().eval()
    torch.export.save(torch.export.export(_seeded(network), (torch.zeros(2, 1, 8, 8),)), folder / "vit.pt2")
    np.savez(folder / "feeds.npz", input=np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32))


DENSE_SITE, RANK_ONE = 64_000, 1800
"""Nanoseconds of a dense site, and of a split of rank one, in the cost table."""


def _measured_plans(dense: Path, feeds: Any, plans: Sequence[Any], *_: Any) -> Any:
    """In the place of what `export` measures of whole models: times that follow from the ranks, 5 % off the table."""
    sites = len(json.loads(Path("cost.json").read_text(encoding="utf-8"))["sites"])
    found = [SimpleNamespace(median_ms=DENSE_SITE * sites / 1e6, speedup=None, speedup_interval=None)]
    for plan in plans:
        saved = sum(DENSE_SITE - RANK_ONE * rank for _, rank in plan.values())
        speed = 1 / (1 - 0.95 * saved / (DENSE_SITE * sites))
        found.append(SimpleNamespace(median_ms=None, speedup=speed, speedup_interval=(0.99 * speed, 1.01 * speed)))
    return SimpleNamespace(arms=found)


def _write_cost_table(folder: Path) -> None:
    """A cost table of the CNN whose times follow from the ranks: what `profile` measures varies."""
    run = _run(["profile", str(folder / "cnn/dense.onnx"), "-o", str(folder / "cost.json"), "--budget", "2s", "--json"])
    table = json.loads(run[1])
    for cost in table["costs"]:
        dense = DENSE_SITE
        form = "channel" if cost["signature"].startswith("Conv") else "gemm"
        times = [(form, rank, RANK_ONE * rank) for rank in (1, 8, 16, 32)]
        cost |= {"dense_nanoseconds": dense, "blocks": 100, "half_width": 0.01}
        cost["splits"] = [
            {
                "form": form,
                "rank": rank,
                "nanoseconds": time,
                "speedup_interval": [0.99 * dense / time, 1.01 * dense / time],
            }
            for form, rank, time in times
        ]
    table["model"] |= {"dense_nanoseconds": DENSE_SITE * len(table["sites"]), "scale": 1.0, "checks": []}
    (folder / "cost.json").write_text(json.dumps(table), encoding="utf-8")


def _outcome(name: str) -> dict[str, Any]:
    """Run one command; what the record holds of it."""
    common.progress(name)
    if name == "times":
        _write_cost_table(Path.cwd())
    words = [*CASES[name], *(["-o", name] if CASES[name][0] in MAKE_FOLDERS else [])]
    code, out = _run(words)
    files = {
        str(path): _hash(path) for path in sorted(Path(name).rglob("*")) if path.name in ("model.onnx", "plan.json")
    }
    numbers = dict(_numbers(json.loads(out))) if code == 0 and out.strip().startswith("{") else {}
    return {"code": code, "files": files, "numbers": numbers}


def _run(words: Sequence[str]) -> tuple[int, str]:
    """The exit code of a command, and what it writes to stdout."""
    out, err = io.StringIO(), io.StringIO()
    timed = mock.patch.object(timed_export, "measured_plans", _measured_plans)
    with timed, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run(list(words))
    return code, out.getvalue()


def _modules() -> dict[str, dict[str, Any]]:
    """The parameters that `compress_` makes, without and with calibration data."""
    from samples import digits

    images = torch.from_numpy(np.load(CALIB)["images"][:128]).float().movedim(-1, 1) / 255
    found = {}
    for name, make in (("cnn", digits.cnn), ("vit", digits.vit)):
        network = _seeded(make()).eval()
        compress_(network, "25%", route="chebyshev", mixed_precision=False)
        found[f"compress_ {name}"] = _parameters(network)
        network = _seeded(make()).eval()
        compress_(network, keep_params=0.5, calib=[(images,)])
        found[f"compress_to_data_ {name}"] = _parameters(network)
    return found


def _seeded(network: torch.nn.Module) -> torch.nn.Module:
    """The network with weights of one generator."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 1) ** 0.5)
    return network


def _parameters(network: torch.nn.Module) -> dict[str, Any]:
    files = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in network.state_dict().items()
    }
    return {"code": 0, "files": files, "numbers": {}}


def _hash(path: Path) -> str:
    """sha256 of a file; of a model, without its metadata, which hold the version."""
    if path.suffix != ".onnx":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    model = onnx.load(path)
    del model.metadata_props[:]
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a JSON document, with its path."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key not in OF_THE_RUN:
                yield from _numbers(entry, f"{path}.{key}")
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _numbers(entry, f"{path}.{place}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path.removeprefix("."), value


def _goal(name: str, then: dict[str, Any] | None, now: dict[str, Any]) -> Goal:
    """Whether a command gives what the record holds; the row names what differs."""
    if then is None:
        return Goal(name=name, held=False, row="not in the record: --store")
    differing = [f"exit code {then['code']} -> {now['code']}"] * (then["code"] != now["code"])
    for part in ("files", "numbers"):
        keys = {*then[part], *now[part]}
        differing += [
            f"{key} {then[part].get(key)} -> {now[part].get(key)}"
            for key in sorted(keys)
            if then[part].get(key) != now[part].get(key)
        ]
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return Goal(name=name, held=not differing, row=("; ".join(differing[:5]) + more) if differing else "equal")


if __name__ == "__main__":
    common.run(main)
