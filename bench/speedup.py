"""How much faster does the compressed model run than the dense one, on this machine's providers?

Models with random weights (speed does not depend on their values), torchvision's and transformers, are exported at
`--rank 25%`; dense and compressed run interleaved in shuffled blocks in one process (`rsi_deploy.bench`), at batch 1
and 8. The factor is dense over compressed median time with its bootstrap interval; slowdowns are shown as they are.

    cpu         onnxruntime's own kernels
    openvino    `onnxruntime-openvino` in the environment that `make openvino` makes: it runs on any x86 CPU
    cuda        where this environment's onnxruntime has it and there is a GPU

Every row is measured in a process of its own. An absent provider is skipped, and the table says why. A model that
a provider does not load (OpenVINO 2025.4 knows no Attention) is exported again at opset 20, which the row says.

Goal (`--check` exits 4 when it is missed): VGG19 at 25 %, batch 8, CPU provider, is at least 2.5 times faster.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench import common, models, untrained
from bench.common import Goal
from rsi_deploy.benchmark.statistics import MIN_BLOCKS
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.exporting.api import export
from rsi_deploy.runtime.float16 import float16_file
from rsi_deploy.runtime.providers import resolve_provider

MODELS = ("vgg19", "vit_b_32", "resnet50", "mobilenet_v2", "minilm", "resnet18", "convnext_tiny")
QUICK_MODELS = ("mobilenet_v2", "minilm")
PROVIDERS = ("cpu", "openvino", "cuda")
PRECISIONS = ("float32", "float16")
OPENVINO = Path(".venv-openvino/bin/python")
BATCHES = (1, 8)
RANK = "25%"
OLDER_OPSET = 20
PATIENCE = 8.0
"""Times `--seconds` that a row may take where those give too few blocks for a verdict: slow models, a busy machine."""
GOAL_MODEL, GOAL_BATCH, GOAL_SPEEDUP = "vgg19", 8, 2.5


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.speedup")
    options.add_argument("--models", nargs="+", metavar="NAME", help="of bench.untrained")
    options.add_argument("--providers", nargs="+", default=PROVIDERS, metavar="NAME[:key=value]", help="[default: all]")
    options.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS[:1], help="[default: float32]"
    )
    options.add_argument("--dense", type=Path, metavar="FOLDER", help="folder of dense models: see bench.untrained")
    options.add_argument("--seconds", type=float, default=30.0, help="per row [default: 30]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    names = tuple(args.models or (QUICK_MODELS if args.quick else MODELS))
    seconds = min(args.seconds, 2.0) if args.quick else args.seconds
    if args.quick:
        common.progress(f"quick: {', '.join(names)}, {seconds:g} s a row")
    pythons, skipped = environments(args.providers)
    rows: list[dict[str, Any]] = []
    settings = {"rank": RANK, "models": names, "batches": BATCHES, "seconds": seconds, "tokens": untrained.TOKENS}

    def store() -> None:
        document = common.document("bench.speedup", arguments, settings, rows=rows, skipped=skipped)
        common.write(args.json, document)
        common.write(args.markdown, markdown(rows, skipped, document))

    for name in names:
        try:
            for found in model_rows(name, pythons, seconds, args.precisions, args.dense):
                rows.append(found)
                store()  # a long run that is stopped leaves what it has
        except models.UnavailableError as reason:
            skipped[name] = str(reason)
    store()
    common.console().print(table(rows))
    for name, reason in skipped.items():
        common.console().print(f"skipped: {name}: {reason}", soft_wrap=True)
    return common.judge(goals(rows), args.check)


def model_rows(
    name: str,
    pythons: Mapping[str, str],
    seconds: float,
    precisions: Sequence[str] = PRECISIONS[:1],
    dense: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Export one model and measure it on every provider at every batch in every precision.

    Raises:
        UnavailableError: this machine does not have the model.
    """
    common.progress(f"{name}: exporting")
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        bundle, older = Path(folder) / "bundle", Path(folder) / "older"
        report = exported(name, bundle, dense)
        for precision, (provider, python), batch in itertools.product(precisions, pythons.items(), BATCHES):
            common.progress(f"{name}: {provider}, {precision}, batch {batch}")
            result = measured(python, bundle, provider, batch, seconds, precision)
            if "cannot load it" in result.get("error", ""):
                if not older.exists():
                    exported(name, older, opset=OLDER_OPSET)
                result = measured(python, older, provider, batch, seconds, precision) | {"opset": OLDER_OPSET}
            yield row(name, provider, batch, report, result) | {"precision": precision}


def environments(providers: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Provider -> the interpreter that has it, and provider -> why it is skipped."""
    pythons, skipped = {}, {}
    for provider in providers:
        try:
            resolve_provider(provider)
            pythons[provider] = sys.executable
        except UsageError as error:
            if provider.startswith("openvino") and OPENVINO.exists():
                pythons[provider] = str(OPENVINO)
            elif provider.startswith("openvino"):
                skipped[provider] = "no environment with onnxruntime-openvino: run make openvino"
            else:
                skipped[provider] = str(error)
    return pythons, skipped


def exported(name: str, bundle: Path, dense: Path | None = None, opset: int | None = None) -> Any:
    """The report of a bundle with `dense.onnx` and `model.onnx`; `dense` is a folder that may hold the dense model."""
    source = untrained.written(name, dense or bundle.parent, opset)
    return export(str(source), bundle, rank=RANK, measure=False, keep_dense=True)


def measured(
    python: str, bundle: Path, provider: str, batch: int, seconds: float, precision: str = "float32"
) -> dict[str, Any]:
    """The `BenchResult` of one row, from a process of its own; {"error": ...} where the provider refuses."""
    files = [bundle / "dense.onnx", bundle / "model.onnx"]
    try:
        files = files if precision == "float32" else [_half(file) for file in files]
    except ModelError as error:
        return {"error": str(error).replace(f"{bundle}/", "")}
    command = [python, "-m", "bench.provider_row", *map(str, files), "--provider", provider, "--batch", str(batch)]
    command += ["--seconds", str(seconds), "--tokens", str(untrained.TOKENS), "--patience", str(PATIENCE * seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it wrote nothing"])[-1]
        if done.returncode not in (UsageError.exit_code, ModelError.exit_code):
            last = f"the process ended with {done.returncode}: {last}"
        return {"error": last.replace(f"{bundle}/", "")}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _half(file: Path) -> Path:
    """Return the float16 variant of a file, which is written once."""
    half = file.with_name(f"{file.stem}.float16.onnx")
    return half if half.exists() else float16_file(file, file.parent)


def row(name: str, provider: str, batch: int, report: Any, result: dict[str, Any]) -> dict[str, Any]:
    """One line: sizes as shares of the dense model, both medians, the factor and its interval."""
    found = {
        "model": name,
        "provider": provider,
        "batch": batch,
        "opset": result.get("opset", "as exported"),
        "kept_params": report.compressed.params / report.dense.params,
        "kept_macs": report.compressed.macs / report.dense.macs,
    }
    if "error" in result:
        return {**found, "error": result["error"]}
    first, second = result["arms"]
    return {
        **found,
        "dense_ms": first["median_ms"],
        "compressed_ms": second["median_ms"],
        "speedup": second["speedup"],
        "interval": second["speedup_interval"],
        "verdict": second["verdict"],
        "blocks": second["blocks"],
        "provider_nodes": second["provider_nodes"],
        "memcpy_nodes": second["memcpy_nodes"],
        "onnxruntime": result["onnxruntime"],
    }


def goals(rows: Sequence[dict[str, Any]]) -> list[Goal]:
    """Return the goal of the docstring, where its row was measured."""
    return [
        Goal(
            name=f"{GOAL_MODEL} at {RANK}, batch {GOAL_BATCH}, cpu",
            held="error" not in r and r["blocks"] >= MIN_BLOCKS and r["speedup"] >= GOAL_SPEEDUP,
            row=f"{r.get('verdict') or r['error']}, goal {GOAL_SPEEDUP}x",
        )
        for r in rows
        if (r["model"], r["batch"], r["provider"]) == (GOAL_MODEL, GOAL_BATCH, "cpu")
        and r.get("precision", "float32") == "float32"
    ]


COLUMNS = (
    "model",
    "provider",
    "precision",
    "batch",
    "opset",
    "kept params",
    "kept MACs",
    "dense ms",
    "compressed ms",
    "verdict",
)


def _cells(r: dict[str, Any]) -> list[str]:
    kept = [f"{r['kept_params']:.1%}", f"{r['kept_macs']:.1%}"]
    what = [r["model"], r["provider"], r.get("precision", "float32"), str(r["batch"]), str(r["opset"]), *kept]
    if "error" in r:
        return [*what, "", "", r["error"]]
    return [*what, f"{r['dense_ms']:.2f}", f"{r['compressed_ms']:.2f}", r["verdict"]]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS)
    for r in rows:
        result.add_row(*_cells(r))
    return result


def markdown(rows: Sequence[dict[str, Any]], skipped: dict[str, str], document: Mapping[str, Any]) -> str:
    """Return the rows as a Markdown table, with the command that made it, the load beside it and what was skipped."""
    versions = {r["provider"]: r["onnxruntime"] for r in rows if "onnxruntime" in r}
    lines = [f"onnxruntime: {', '.join(f'{version} ({provider})' for provider, version in versions.items())}"]
    machine = document["machine"]
    load = ", ".join(f"{value:.1f}" for value in machine["load_average"] or ())
    lines.append(f"{machine['cpu']}, {machine['cores']} cores; load average over 1, 5 and 15 minutes: {load}")
    lines += [f"Skipped: {name}: {reason}" for name, reason in skipped.items()]
    return (
        f"`{document['command']}`\n\n{common.markdown_table(COLUMNS, [_cells(r) for r in rows])}\n"
        + "\n\n".join(lines)
        + "\n"
    )


if __name__ == "__main__":
    common.run(main)
