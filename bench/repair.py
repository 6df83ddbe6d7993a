"""What does a low-rank repair save of the response that rounding to four bits loses?

Every product of a net is rounded in four ways, fitted to three folds of the calibration data and judged on the fourth:

    int4        nearest numbers, one scale for 128 inputs, as onnxruntime's MatMulNBits stores them
    repaired    int4 with a low-rank part of at most 15 % more bytes, fitted to the response of what was lost
    fitted      our four bits: each error is compensated by the inputs that follow; a multiplier for 16 inputs
    both        fitted with the low-rank part

Of SmolLM2's 210 linear layers (`bench.language_model`), every fifth is rounded. Its weights had four bits in blocks of
32 inputs before; float32 arithmetic has unpacked them.

The goal (`--check` exits 4 when it is missed): `repaired`, or what the export uses in its place, loses at most half of
int4's response error, mean over sites, for at most 15 % more bytes.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import cases, common, language_model
from bench.common import Goal
from bench.language_model import LanguageModel
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.cross_validation import has_folds, parted
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import dense_response_error
from rsi_deploy.calibration.repair import repair_bytes, repairs
from rsi_deploy.calibration.rounding import CODES, rounded_weight, second_moments, stored_bytes
from rsi_deploy.linalg.solver import Solver

NETS = ("minilm", "resnet20", "resnet56", "cnn_cifar10", "smollm2")
BLOCK, SCALE_BYTES = 128, 4
MOST = 0.15
"""Largest growth in bytes."""
EVERY, WINDOWS = 5, 24
"""SmolLM2: one layer in so many is measured, on so many windows of text."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One site: response errors on the fold left out, and bytes over those of int4.

    Attributes:
        net, site: names.
        rows, columns: shape of the weight.
        rank: rank of the repair.
        int4, repaired, fitted, both: response errors.
        repaired_bytes, fitted_bytes, both_bytes: bytes over those of int4.
    """

    net: str
    site: str
    rows: int
    columns: int
    rank: int
    int4: float
    repaired: float
    fitted: float
    both: float
    repaired_bytes: float
    fitted_bytes: float
    both_bytes: float


def nearest(weight: Tensor) -> tuple[Tensor, int]:
    """Return a weight `(out, in)` in the nearest four bits of blocks of inputs, and its bytes."""
    blocks = weight.split(BLOCK, dim=1)
    scales = [block.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 8 for block in blocks]
    near = [(block / scale).round().clamp(*CODES[4]) * scale for block, scale in zip(blocks, scales, strict=True)]
    return torch.cat(near, dim=1), weight.numel() // 2 + SCALE_BYTES * len(weight) * len(blocks)


def measured(net: str, site: CalibratedSite, moments: Moments) -> Row | None:
    """Return a site's row; None where no rank has so few bytes."""
    others, judged = next(parted(moments))
    weight, second = site.load().float(), second_moments(others)[0]
    rows, columns = weight.shape[1:]
    int4, size = nearest(weight[0])
    rank = int((MOST * size - 4 * rows) / (rows + columns + 4))
    if rank < 1:
        return None

    def error(near: Tensor) -> float:
        return dense_response_error(weight, near[None], judged)

    fitted = rounded_weight(weight, second[None], is_product=not site.kernel)
    fitted_bytes = stored_bytes(rows * columns, rows, 4, is_product=not site.kernel)
    least = int((1 + MOST) * size - fitted_bytes - 4 * rows) // (rows + columns + 4)
    repaired = repairs(weight[0], int4, second, [rank], Solver())[0]
    both = repairs(weight[0], fitted.weight(), second, [max(least, 1)], Solver())[0]
    return Row(
        net=net,
        site=site.name,
        rows=rows,
        columns=columns,
        rank=rank,
        int4=error(int4),
        repaired=error(int4 + repaired.product()),
        fitted=error(fitted.weight()),
        both=error(fitted.weight() + both.product()),
        repaired_bytes=(size + repair_bytes(rank, rows, columns)) / size,
        fitted_bytes=fitted_bytes / size,
        both_bytes=(fitted_bytes + repair_bytes(max(least, 1), rows, columns)) / size,
    )


def ratios(rows: Sequence[Row], name: str) -> tuple[float, float]:
    """Return the mean response error over int4's, and the mean bytes over int4's."""
    errors = [getattr(row, name) / row.int4 for row in rows]
    return float(np.mean(errors)), float(np.mean([getattr(row, f"{name}_bytes") for row in rows]))


def judged(rows: Sequence[Row]) -> list[Goal]:
    """Return a goal for each net."""
    goals = []
    for net in dict.fromkeys(row.net for row in rows):
        found = {name: ratios([r for r in rows if r.net == net], name) for name in ("repaired", "fitted", "both")}
        text = ", ".join(
            f"{name} {error:.2f} of the loss at {size:.2f} of the bytes" for name, (error, size) in found.items()
        )
        held = any(error <= 0.5 and size <= 1 + MOST for error, size in found.values())
        goals.append(Goal(name=f"{net}: half of int4's loss", held=held, row=text))
    return goals


def markdown(rows: Sequence[Row]) -> str:
    """Return means over the sites of each net as a Markdown table."""
    cells = []
    for net in dict.fromkeys(row.net for row in rows):
        of_net = [row for row in rows if row.net == net]
        found = [ratios(of_net, name) for name in ("repaired", "fitted", "both")]
        cells.append([net, str(len(of_net)), *(f"{error:.2f} ({size:.2f})" for error, size in found)])
    return common.markdown_table(("net", "sites", "repaired: loss (bytes)", "fitted", "both"), cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.repair")
    options.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS[:1]), help="(default: minilm)")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    settings: dict[str, Any] = {"block": BLOCK, "most": MOST}
    rows = common.measured_nets(args.nets, settings, _measured)
    stored = [asdict(row) for row in rows]
    return common.finish("bench.repair", arguments, args, settings, markdown(rows), judged(rows), rows=stored)


def _measured(name: str) -> list[Row]:
    if name == "smollm2":
        return language_rows(language_model.smollm2(), EVERY, WINDOWS)
    found: list[Row] = []

    def visit(site: CalibratedSite, moments: Moments | Samples) -> None:
        if site.groups == 1 and isinstance(moments, Moments) and has_folds(moments):
            row = measured(name, site, moments)
            found.extend([] if row is None else [row])

    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        cases.load(name, Path(folder)).streams(0).survey(visit)
    return found


def language_rows(model: LanguageModel, every: int, count: int) -> list[Row]:
    """Return the rows of one linear layer in `every` of a language model, from `count` windows of calibration text."""
    layers = model.linears()
    measured_ones = dict(list(layers.items())[::every])
    common.progress(f"smollm2: {len(measured_ones)} of {len(layers)} linear layers, every {every}th")
    moments = language_model.input_moments(model.module, model.calibration[:count], list(measured_ones))
    rows = []
    for name, layer in measured_ones.items():
        site = CalibratedSite(
            name=name,
            kind="Linear",
            groups=1,
            out_features=layer.out_features,
            in_features=layer.in_features,
            forms=("gemm",),
            load=lambda layer=layer: layer.weight[None],
        )
        rows.append(measured("smollm2", site, moments[name]))
        common.progress(f"smollm2: {name}")
    return [row for row in rows if row is not None]


if __name__ == "__main__":
    common.run(main)
