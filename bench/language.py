"""SmolLM2-135M with a fifth and more of its linear layers' numbers removed: perplexity of our exports and of baselines.

The baselines cut every linear layer of the blocks to the same share of its numbers, in torch, with float32 factors:

    svd                   W = U s V^T, truncated
    asvd                  the same of W diag(mean |x|^0.5): inputs that are large count for more
    svd-llm               the same of the whitened weight W S, S S^T = E x x^T
    svd-llm-sequential    svd-llm, block by block on the inputs that the compressed blocks before give; then the left
                          factor is fitted again to what the dense weight makes of those inputs
    ours                  `rsi-deploy export FOLDER --calib valid.txt --keep-params P`, through ONNX and onnxruntime

All are written here from the papers (Yuan et al. 2023; Wang et al. 2024), with no code of theirs. P keeps as many
numbers of the whole model as the baselines do; the embedding table, which is the output layer too, stays as it is in
all of them. The text is `wikitext2/valid.txt` to calibrate, and the first 8 windows of 1,024 tokens of `test.txt` to
test.
FOLDER is what onnxruntime-genai's builder makes of the model: `--folder`; without it, `ours` is left out.

Goals (`--check` exits 4 when one is missed): perplexity at most 34 with 0.2 removed, at most 75 with 0.4, and half of
the better svd-llm with 0.6; the lowest of all methods at each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import common, language_model
from bench.common import Goal
from bench.forms import rank_for, whitened_basis
from bench.language_model import LanguageModel
from bench.models import DATA_ROOT, present
from rsi_deploy.calibration.moments import MomentAccumulator, Moments
from rsi_deploy.calibration.reduced_rank_regression import regularized_cholesky, ridge_level
from rsi_deploy.calibration.rounding import second_moments
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.io.model_folder import find_model

BASELINES = ("svd", "asvd", "svd-llm", "svd-llm-sequential")
METHODS = (*BASELINES, "ours")
REMOVED, WINDOWS, TEST_WINDOWS, CALIB_TOKENS = (0.2, 0.4, 0.6), 24, 8, 131_072
MOST = {0.2: 34.0, 0.4: 75.0}
SHARE_OF_BASELINE = 0.5
ASVD_POWER = 0.5
RIDGE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compressed model.

    Attributes:
        method: one of `METHODS`, or "dense".
        removed: share of the numbers of the linear layers that is gone.
        kept: numbers over those of the dense model, of the whole model.
        perplexity: on the test text.
        seconds: to compress; 0 for the dense model.
    """

    method: str
    removed: float
    kept: float
    perplexity: float
    seconds: float


def measured_baselines(model: LanguageModel, methods: Sequence[str], removed: Sequence[float]) -> Iterator[Row]:
    """Yield the perplexity of the dense model and of the baselines; changes the model's weights."""
    layers = model.linears()
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    linear = sum(weight.numel() for weight in weights.values())

    def row(method: str, share: float, kept: int, seconds: float) -> Row:
        value = language_model.perplexity(model.module, model.test[:TEST_WINDOWS])
        common.progress(f"{method}, {share:g} removed: perplexity {value:.2f}")
        return Row(method=method, removed=share, kept=kept / whole, perplexity=value, seconds=seconds)

    yield row("dense", 0.0, whole, 0.0)
    started = time.perf_counter()
    text = model.calibration[:WINDOWS]
    moments = language_model.input_moments(model.module, text, list(layers))
    common.progress("moments of all inputs are computed")
    scales = _scales(model.module, text, layers) if "asvd" in methods else {}
    gathering = time.perf_counter() - started
    for method in methods:
        started = time.perf_counter()
        if method == "svd-llm-sequential":
            for share in removed:
                begun = time.perf_counter()
                for layer, weight in zip(layers.values(), weights.values(), strict=True):
                    layer.weight.copy_(weight)
                kept = _sequential_(model.module, text, layers, weights, share)
                yield row(method, share, whole - linear + kept, time.perf_counter() - begun)
            continue
        bases = {name: _basis(method, weight, moments[name], scales.get(name)) for name, weight in weights.items()}
        seconds = gathering * (method != "svd") + time.perf_counter() - started
        for share in removed:
            kept = 0
            for name, layer in layers.items():
                rank = _rank(weights[name], share)
                left = bases[name][:, :rank]
                layer.weight.copy_(
                    left @ (left.mT @ weights[name])
                )  # of a scaled weight too: its columns are scaled back
                kept += rank * sum(weights[name].shape)
            yield row(method, share, whole - linear + kept, seconds)


def _rank(weight: Tensor, share: float) -> int:
    return rank_for("gemm", *weight.shape, 1 - share)


def _basis(method: str, weight: Tensor, moments: Moments, scale: Tensor | None) -> Tensor:
    """Return the left singular vectors of the weight that a method truncates."""
    if method == "svd-llm":
        return whitened_basis(weight, moments)
    seen = weight if method == "svd" or scale is None else weight * scale
    return torch.linalg.svd(seen.double(), full_matrices=False).U.to(weight.dtype)


def _scales(module: nn.Module, text: Tensor, layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    """Return the scale of each layer's inputs: mean |x|^0.5, 1 in the mean."""
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].abs().reshape(-1, inputs[0].shape[-1]).sum(dim=0)
            sums[name] = sums[name] + x if name in sums else x

        return add

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            for ids in text:
                module(ids[None], use_cache=False)
    finally:
        for each in hooks:
            each.remove()
    roots = {name: total.clone().clamp_min(1e-12) ** ASVD_POWER for name, total in sums.items()}
    return {name: root / root.mean() for name, root in roots.items()}


def _sequential_(
    module: nn.Module, text: Tensor, layers: dict[str, nn.Linear], weights: dict[str, Tensor], share: float
) -> int:
    """Compress the blocks one after another, and return the numbers that the layers keep."""
    decoder: Any = module.get_submodule("model")
    with torch.inference_mode():
        hidden = [decoder.embed_tokens(ids[None]) for ids in text]
        turns = decoder.rotary_emb(hidden[0], torch.arange(text.shape[1])[None])
    kept = 0
    for number, block in enumerate(decoder.layers):
        own = [name for name in layers if name.startswith(f"model.layers.{number}.")]
        for name, x in _block_moments(block, own, layers, hidden, turns).items():
            weight = weights[name]
            rank = _rank(weight, share)
            basis = whitened_basis(weight, x)[:, :rank]
            right = basis.mT @ weight
            second = second_moments(x)[0].to(torch.float64)
            A = right.double()
            gram = A @ second @ A.mT
            root, _ = regularized_cholesky(gram[None], ridge_level(gram.diagonal()[None], RIDGE))
            left = torch.cholesky_solve(A @ second @ weight.double().mT, root[0]).mT
            layers[name].weight.copy_(left.to(weight.dtype) @ right)
            kept += rank * sum(weight.shape)
        with torch.inference_mode():
            hidden = [_run(block, x, turns) for x in hidden]
    return kept


def _block_moments(
    block: nn.Module, names: Sequence[str], layers: dict[str, nn.Linear], hidden: Sequence[Tensor], turns: Any
) -> dict[str, Moments]:
    """Return the moments of the inputs of a block's layers."""
    sums = {name: MomentAccumulator(layers[name].in_features) for name in names}

    def hook(name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].reshape(1, -1, inputs[0].shape[-1])
            sums[name].add(rows, rows[..., :0])

        return add

    hooks = [layers[name].register_forward_pre_hook(hook(name)) for name in names]
    try:
        with torch.inference_mode():
            for x in hidden:
                _run(block, x, turns)
    finally:
        for each in hooks:
            each.remove()
    found = {name: total.result() for name, total in sums.items()}
    return {name: each for name, each in found.items() if isinstance(each, Moments)}


def _run(block: nn.Module, x: Tensor, turns: Any) -> Tensor:
    made = block(x, position_embeddings=turns)
    found: Tensor = made[0] if isinstance(made, tuple) else made
    return found


def measured_exports(
    folder: Path, removed: Sequence[float], whole: int, linear: int, out: Path | None
) -> Iterator[Row]:
    """Yield the perplexity of our exports of a folder.

    Args:
        folder: folder of onnxruntime-genai.
        removed: shares of the numbers of the linear layers.
        whole: numbers of the dense model.
        linear: numbers of its linear layers.
        out: where the bundles are kept; None deletes them.
    """
    texts = DATA_ROOT / "wikitext2"
    with tempfile.TemporaryDirectory() as scratch:
        for share in removed:
            bundle = (out or Path(scratch)) / f"removed-{share:g}"
            keep = 1 - share * linear / whole
            command = [
                *(
                    sys.executable,
                    "-m",
                    "rsi_deploy",
                    "export",
                    str(folder),
                    "--calib",
                    str(present(texts / "valid.txt")),
                ),
                *("--calib-tokens", str(CALIB_TOKENS), "--keep-params", f"{keep:.4f}", "--allow-broken", "--no-bench"),
                *("-o", str(bundle), "--force"),
            ]
            started = time.perf_counter()
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - started
            report = json.loads((bundle / "report.json").read_text())
            kept = report["totals"]["params"]["compressed"] / report["totals"]["params"]["dense"]
            value = bundle_perplexity(bundle, Path(scratch))
            common.progress(f"ours, {share:g} removed: perplexity {value:.2f}, {seconds:.0f} s")
            yield Row(method="ours", removed=share, kept=kept, perplexity=value, seconds=seconds)


def bundle_perplexity(bundle: Path, scratch: Path) -> float:
    """Return the perplexity of a bundle on the first windows of the test text, read as one document."""
    text = present(DATA_ROOT / "wikitext2" / "test.txt").read_text()
    path = scratch / "test.jsonl"
    path.write_text(json.dumps({"text": text[: TEST_WINDOWS * 6500]}) + "\n")
    source = with_text(path, TextOptions(sequence_length=language_model.TOKENS), str(bundle))
    found = evaluate(find_model(bundle), _First(source, TEST_WINDOWS), batch_size=1)
    assert found.text is not None
    return found.text.perplexity


class _First:
    """The first rows of text, where `limit` would take evenly spaced ones."""

    def __init__(self, source: Any, count: int) -> None:
        self._source, self._count = source, count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def for_inputs(self, specs: Any) -> Any:
        """Return the rows for a model's inputs."""
        rows = self._source.for_inputs(specs)
        return replace(rows, rows=rows.rows[: self._count], documents=rows.documents[: self._count])


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals whose rows were measured."""
    goals = []
    for share in dict.fromkeys(row.removed for row in rows if row.method == "ours"):
        own = {row.method: row for row in rows if row.removed == share}
        ours, others = own["ours"], [row.perplexity for method, row in own.items() if method != "ours"]
        peers = [own[name].perplexity for name in ("svd-llm", "svd-llm-sequential") if name in own]
        most = MOST.get(share) or (SHARE_OF_BASELINE * min(peers) if peers else None)
        text = f"perplexity {ours.perplexity:.2f} with {ours.kept:.4f} of the model kept"
        if most is not None:
            goals.append(
                Goal(name=f"at most {most:.1f} with {share:g} removed", held=ours.perplexity <= most, row=text)
            )
        if others:
            is_best = ours.perplexity < min(others)
            goals.append(Goal(name=f"the lowest with {share:g} removed", held=is_best, row=f"others {min(others):.2f}"))
    return goals


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = [
        [row.method, f"{row.removed:g}", f"{row.kept:.4f}", f"{row.perplexity:.2f}", f"{row.seconds:.0f}"]
        for row in rows
    ]
    return common.markdown_table(("method", "removed", "of the model kept", "perplexity", "s"), cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.language")
    options.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    options.add_argument("--removed", nargs="+", type=float, default=list(REMOVED), metavar="SHARE", help="only these")
    options.add_argument("--folder", type=Path, metavar="FOLDER", help="folder of onnxruntime-genai, for `ours`")
    options.add_argument("--keep", type=Path, metavar="FOLDER", help="keep our bundles here")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    started = time.perf_counter()
    settings: dict[str, Any] = {"quick": args.quick, "methods": args.methods, "removed": args.removed}
    rows = list(_measured(args))
    settings["wall_seconds"] = time.perf_counter() - started
    stored = [asdict(row) for row in rows]
    return common.finish("bench.language", arguments, args, settings, markdown(rows), judged(rows), rows=stored)


def _measured(args: argparse.Namespace) -> Iterator[Row]:
    model = language_model.smollm2()
    whole = sum(parameter.numel() for parameter in model.module.parameters())
    linear = sum(layer.weight.numel() for layer in model.linears().values())
    removed = args.removed[:1] if args.quick else args.removed
    with torch.no_grad():
        yield from measured_baselines(model, [name for name in args.methods if name in BASELINES], removed)
    del model
    if "ours" in args.methods and args.folder is not None:
        yield from measured_exports(args.folder, removed, whole, linear, args.keep)


if __name__ == "__main__":
    common.run(main)
