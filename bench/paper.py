"""Does the claim of the paper (arXiv 2604.02659) hold on real weights: q = 4 near exact SVD and far better than RSVD?

Every site of a net gets the same ratio, 10 % to 60 % of full rank (`ceil(ratio * min(out, in))`), without any
fine-tuning, by RSVD (which is q = 1), by RSI with q = 2, 3, 4, and by exact SVD. Per net, ratio and method:

    error     ||W - left right||_2 / s_{rank+1}(W) of the stored factors, exact, mean over the split sites; then mean
              and standard deviation over the seeds. 1.000 is optimal
    accuracy  top-1 in percent; for the sentence encoder 100 * mean cosine to the dense embedding
    time      seconds of all factorizations of the net together, median over the seeds; all methods, ratios and seeds
              in one shuffled order after one uncounted warm-up each; exact SVD, which has no seed, once a ratio,
              spread over the run; "faster" is exact SVD's time over this one
    split     sites that were split, of those offered; the others stay dense because at this ratio the two factors
              would hold no fewer numbers than the weight
    kept      numbers left in the offered sites, dense ones included

Offered are, as in the paper, the linear layers; for the ResNets, which have none, the convolutions with their
BatchNorms folded in. The ten-row output layers of the small nets are not offered: 10 % of their full rank is rank 1,
which leaves no ten classes to tell apart however exact the factors are, and they are 1 % of the parameters.
Texts for the encoder are sentences of the Python language reference (`bench.models.sentences`).

Goals (`--check` exits 4 when one is missed), for every net, on the mean over ratios and seeds:
  1. the error falls strictly with q: q1 > q2 > q3 > q4;
  2. the accuracy of q = 4 is within 1.0 point of exact SVD's, or above it;
  3. the error of RSVD is at least 1.15 times that of q = 4.
For the ResNets goal 2 says little: one ratio for all 3x3 kernels, without fine-tuning, leaves even exact SVD near
chance at most ratios, so that seeds differ by more than a point.

The full run takes 5 seeds and all samples, but 1,000 images for ResNet-20 and those of ImageNet, and 500 images and
3 seeds for ResNet-56.
VGG19 and ViT-B/32 join it with `--imagenet DIR`: 1,000 class folders, or a subset with `--classes FILE`, a JSON object
from folder name to ImageNet class number (Imagenette: {"n01440764": 0, "n02102040": 217, "n02979186": 482,
"n03000684": 491, "n03028079": 497, "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574,
"n03888257": 701}). Residuals of their large sites are estimated from below by 64 power iterations, and marked so.
"""

import copy
import hashlib
import itertools
import json
import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from bench import common, models
from bench.common import Goal
from rsi_deploy.core.errors import UsageError
from rsi_deploy.linalg.solver import Factors, Method, residual_norm, singular_values
from rsi_deploy.torch_models.compress import compress_
from rsi_deploy.torch_models.layers import LowRankConv, LowRankMultiheadAttention
from rsi_deploy.torch_models.module_sites import find_module_sites

RATIOS = (10, 20, 30, 40, 50, 60)
EXACT_RESIDUAL_LIMIT = 1024
"""Up to this full rank the norm of a residual is an eigenvalue; above it, an estimate from below."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method under comparison."""

    name: str
    method: Method
    power_iterations: int


SVD = Arm(name="exact SVD", method="svd", power_iterations=1)
Q = (
    Arm(name="RSVD (q=1)", method="rsvd", power_iterations=1),
    *(Arm(name=f"RSI q={q}", method="rsi", power_iterations=q) for q in (2, 3, 4)),
)
ARMS = (*Q, SVD)


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much of a net's data and how many seeds a run spends; `samples` None is all of them."""

    seeds: int = 5
    samples: int | None = None


FULL = {
    "resnet20": Effort(samples=1000),
    "resnet56": Effort(seeds=3, samples=500),
    "vgg19": Effort(samples=1000),
    "vit_b_32": Effort(samples=1000),
}
QUICK = Effort(seeds=2, samples=250)
QUICK_NETS = ("mlp_mnist", "cnn_cifar10", "resnet20")
QUICK_RATIOS = (20, 40)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One net compressed once. Errors are means over the split sites, `seconds` a sum over them."""

    net: str
    ratio: int
    arm: str
    seed: int
    error: float
    accuracy: float
    seconds: float
    split: int
    offered: int
    kept: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a table: the runs of one net and arm at one ratio, or (ratio None) the mean over the ratios.

    `gap` is the accuracy less exact SVD's in points; `speedup` is exact SVD's seconds over this arm's (in the mean
    over ratios: the median of the ratios' speedups, and the sum of their seconds).
    """

    net: str
    ratio: int | None
    arm: str
    error: float
    error_spread: float
    accuracy: float
    accuracy_spread: float
    gap: float
    seconds: float
    speedup: float
    split: int
    offered: int
    kept: float


# --- measuring ------------------------------------------------------------------------------------------------------


class Errors:
    """Normalized errors of a net's sites; the spectra of the dense weights are computed once."""

    def __init__(self, net: models.Net) -> None:
        sites = [site for site in find_module_sites(net.module) if site.name in net.sites]
        self.weights = {site.name: site.matrix()[0] for site in sites}  # none of these nets has grouped sites
        self.paths = {site.name: site.paths[0] for site in sites}
        self.spectra = {name: singular_values(weight) for name, weight in self.weights.items()}

    @property
    def kind(self) -> str:
        """How the norms of the residuals are computed: "exact", or "from below" where a site is too large."""
        largest = max(min(weight.shape) for weight in self.weights.values())
        return "exact" if largest <= EXACT_RESIDUAL_LIMIT else "from below"

    def of(self, module: nn.Module, site: str) -> float:
        """The normalized error at `site` of the factors that `module` stores: `rsi.normalized_error`, but faster."""
        weight, s = self.weights[site], self.spectra[site]
        factors = stored_factors(module.get_submodule(self.paths[site]))
        if min(weight.shape) <= EXACT_RESIDUAL_LIMIT:
            residual = singular_values(weight.double() - factors.left.double() @ factors.right.double())[0]
        else:
            residual = residual_norm(weight, factors, iterations=64, columns=8).norm
        optimum = float(s[factors.left.shape[-1]])
        rounding = float(s[0]) * 10 * torch.finfo(weight.dtype).eps
        return 1.0 if max(float(residual), optimum) <= rounding else float(residual) / max(optimum, 1e-300)


def stored_factors(layer: nn.Module) -> Factors:
    """`left (out, rank)` and `right (rank, in)` of a low-rank layer, as stored."""
    keys = ("in_proj_left", "in_proj_right") if isinstance(layer, LowRankMultiheadAttention) else ("left", "right")
    left, right = (getattr(layer, key).detach() for key in keys)
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return Factors(left.flatten(1), right.flatten(1)) if isinstance(layer, LowRankConv) else Factors(left, right)


def measure(net: models.Net, ratios: Sequence[int], seeds: int, errors: Errors) -> list[Run]:
    """Compress and score `net` by every arm, ratio and seed, in shuffled order."""
    for arm in ARMS:  # warm-up
        compress_(copy.deepcopy(net.module), f"{ratios[0]}%", include=net.sites, method=arm.method, route="direct")
    # A round is a seed; the exact SVDs, one a ratio, are dealt out to the rounds.
    rounds = [
        [(ratio, arm) for index, ratio in enumerate(ratios) for arm in ARMS if arm is not SVD or index % seeds == seed]
        for seed in range(seeds)
    ]
    runs = []
    for seed, jobs in enumerate(rounds):
        started = time.perf_counter()
        random.Random(seed).shuffle(jobs)
        runs += [_run(net, ratio, arm, seed, errors) for ratio, arm in jobs]
        common.progress(f"{net.name}: seed {seed + 1} of {seeds}, {time.perf_counter() - started:.0f} s")
    return runs


def _run(net: models.Net, ratio: int, arm: Arm, seed: int, errors: Errors) -> Run:
    module = copy.deepcopy(net.module)
    records = compress_(
        module,
        f"{ratio}%",
        include=net.sites,
        method=arm.method,
        route="direct",  # the paper's algorithm itself, in its own precision
        mixed_precision=False,
        power_iterations=arm.power_iterations,
        seed=seed,
    )
    offered = [record for record in records if record.name in net.sites]
    split = [record for record in offered if record.decision == "split"]
    return Run(
        net=net.name,
        ratio=ratio,
        arm=arm.name,
        seed=seed,
        error=statistics.fmean(errors.of(module, record.name) for record in split),
        accuracy=net.score(module),
        seconds=sum(record.seconds or 0.0 for record in split),
        split=len(split),
        offered=len(offered),
        kept=sum(record.params_compressed for record in offered) / sum(record.params_dense for record in offered),
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def tabulate(runs: Sequence[Run]) -> list[Row]:
    """One row a net, ratio and arm, in the order of the runs' nets, then ratios, then `ARMS`."""
    rows = []
    for net in dict.fromkeys(run.net for run in runs):
        for ratio in sorted({run.ratio for run in runs if run.net == net}):
            here = [run for run in runs if (run.net, run.ratio) == (net, ratio)]
            exact = next(run for run in here if run.arm == SVD.name)
            for arm in ARMS:
                own = [run for run in here if run.arm == arm.name]
                accuracy = statistics.fmean(run.accuracy for run in own)
                seconds = statistics.median(run.seconds for run in own)
                rows.append(
                    Row(
                        net=net,
                        ratio=ratio,
                        arm=arm.name,
                        error=statistics.fmean(run.error for run in own),
                        error_spread=_spread(run.error for run in own),
                        accuracy=accuracy,
                        accuracy_spread=_spread(run.accuracy for run in own),
                        gap=accuracy - exact.accuracy,
                        seconds=seconds,
                        speedup=exact.seconds / seconds,
                        split=own[0].split,
                        offered=own[0].offered,
                        kept=own[0].kept,
                    )
                )
    return rows


def summarize(rows: Sequence[Row]) -> list[Row]:
    """One row a net and arm: the mean over the ratios (of spreads too)."""
    summary = []
    for net in dict.fromkeys(row.net for row in rows):
        for arm in ARMS:
            own = [row for row in rows if (row.net, row.arm) == (net, arm.name)]
            summary.append(
                Row(
                    net=net,
                    ratio=None,
                    arm=arm.name,
                    error=statistics.fmean(row.error for row in own),
                    error_spread=statistics.fmean(row.error_spread for row in own),
                    accuracy=statistics.fmean(row.accuracy for row in own),
                    accuracy_spread=statistics.fmean(row.accuracy_spread for row in own),
                    gap=statistics.fmean(row.gap for row in own),
                    seconds=sum(row.seconds for row in own),
                    speedup=statistics.median(row.speedup for row in own),
                    split=sum(row.split for row in own),
                    offered=sum(row.offered for row in own),
                    kept=statistics.fmean(row.kept for row in own),
                )
            )
    return summary


def judged(summary: Sequence[Row]) -> list[Goal]:
    """The three goals of the module's docstring, for every net in `summary` (rows of `summarize`)."""
    goals = []
    for net in dict.fromkeys(row.net for row in summary):
        rows = {row.arm: row for row in summary if row.net == net}
        errors = [rows[arm.name].error for arm in Q]
        goals += [
            Goal(
                name="1. the error falls with q",
                held=all(before > after for before, after in itertools.pairwise(errors)),
                row=f"{net}: " + " > ".join(f"{error:.4f}" for error in errors),
            ),
            Goal(
                name="2. q = 4 within 1.0 point of exact SVD",
                held=rows[Q[-1].name].gap >= -1.0,
                row=f"{net}: {rows[Q[-1].name].gap:+.2f} points",
            ),
            Goal(
                name="3. RSVD's error at least 1.15 times that of q = 4",
                held=errors[0] >= 1.15 * errors[-1],
                row=f"{net}: {errors[0] / errors[-1]:.2f} times",
            ),
        ]
    return goals


COLUMNS = ("ratio", "split", "kept", "method", "error", "accuracy", "vs SVD", "time, ms", "faster")


def cells(row: Row) -> tuple[str, ...]:
    """The texts of one line, as `COLUMNS`."""
    return (
        "mean" if row.ratio is None else f"{row.ratio}%",
        f"{row.split}/{row.offered}",
        f"{100 * row.kept:.0f}%",
        row.arm,
        f"{row.error:.3f} ± {row.error_spread:.3f}",
        f"{row.accuracy:.2f} ± {row.accuracy_spread:.2f}",
        f"{row.gap:+.2f}",
        f"{1000 * row.seconds:.1f}",
        f"{row.speedup:.1f}x",
    )


def show(title: str, rows: Iterable[Row], *, with_net: bool = False) -> None:
    """Print one table on stdout."""
    table = Table(title=title, title_justify="left")
    for column in (("net",) if with_net else ()) + COLUMNS:
        table.add_column(column, justify="left" if column in ("net", "method") else "right", no_wrap=True)
    before: tuple[str, int | None] | None = None
    for row in rows:
        if before not in (None, (row.net, row.ratio)):
            table.add_section()
        before = (row.net, row.ratio)
        table.add_row(*((row.net,) if with_net else ()), *cells(row))
    common.console().print(table)


def markdown(document: dict[str, Any], blocks: Sequence[tuple[str, Sequence[Row]]], goals: Sequence[Goal]) -> str:
    """The tables of `blocks` (title, rows) as Markdown, with the machine, the command and the goals."""
    machine = document["machine"]
    lines = [
        "# RSI against exact SVD and RSVD on real weights",
        "",
        f"`{document['command']}`, {document['date']}: {machine['cpu']}, {machine['cores']} cores, load "
        f"{machine['load_average']} at the end, torch {machine['versions']['torch']} on "
        f"{document['settings']['threads']} threads, "
        f"{document['settings']['wall_seconds']:.0f} s in all. The columns are explained in `bench/paper.py`.",
    ]
    lines += [f"\nLeft out: {name}: {reason}" for name, reason in document["settings"]["left_out"].items()]
    for title, rows in blocks:
        header = ("net", *COLUMNS)
        lines += ["", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
        lines += ["| " + " | ".join((row.net, *cells(row))) + " |" for row in rows]
    lines += ["", "## Goals", ""]
    lines += [f"- {'held' if goal.held else '**missed**'}: {goal.name}: {goal.row}" for goal in goals]
    return "\n".join(lines) + "\n"


# --- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.paper")
    options.add_argument("--nets", nargs="+", choices=models.NETS, help="only these (default: all)")
    options.add_argument(
        "--data-root", type=Path, default=models.DATA_ROOT, help="weights and images of the small nets"
    )
    options.add_argument("--imagenet", type=Path, metavar="DIR", help="run VGG19 and ViT-B/32 on this folder too")
    options.add_argument("--classes", type=Path, metavar="FILE", help="folder -> ImageNet class number, for a subset")
    options.add_argument("--threads", type=int, help="torch's threads; 1 suffers least from other work on the machine")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    if args.threads is not None:
        if args.threads < 1:
            raise UsageError(f"--threads must be at least 1, but got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.classes and not args.imagenet:
        raise UsageError("--classes goes with --imagenet DIR")
    classes = models.read_class_map(args.classes) if args.classes else None
    if args.imagenet:
        models.imagenet_folder(args.imagenet, classes)  # a folder that does not fit is refused before the long work

    started = time.perf_counter()
    ratios = QUICK_RATIOS if args.quick else RATIOS
    settings: dict[str, Any] = {"quick": args.quick, "ratios": ratios, "threads": torch.get_num_threads(), "nets": {}}
    left_out: dict[str, str] = {}
    runs: list[Run] = []
    blocks: list[tuple[str, Sequence[Row]]] = []
    names = args.nets or (QUICK_NETS if args.quick else models.NETS)
    for name in (*names, *(models.IMAGENET_NETS if args.imagenet else ())):
        effort = QUICK if args.quick else FULL.get(name, Effort())
        try:
            if name in models.IMAGENET_NETS:
                net = models.load_imagenet_net(name, args.imagenet, classes, limit=effort.samples)
            else:
                net = models.load_net(name, args.data_root, limit=effort.samples)
        except models.UnavailableError as reason:
            left_out[name] = str(reason)
            common.console().print(f"{name} is left out: {reason}", soft_wrap=True)
            continue
        errors = Errors(net)
        dense = net.score(net.module)
        settings["nets"][name] = {
            "seeds": effort.seeds,
            "samples": len(net.reference),
            "metric": net.metric,
            "dense": dense,
            "errors": errors.kind,
            "sites": net.sites,
            "texts_sha256": hashlib.sha256("\n".join(net.texts).encode()).hexdigest() if net.texts else None,
        }
        own = measure(net, ratios, effort.seeds, errors)
        runs += own
        title = (
            f"{name}: {net.note} ({errors.kind} errors, {effort.seeds} seeds); {net.metric} on {len(net.reference)} "
            f"samples, dense {dense:.2f}"
        )
        blocks.append((title, tabulate(own)))
        show(*blocks[-1])
    if not runs:
        raise UsageError(f"no net could be loaded; put the weights under {args.data_root} or name --data-root")

    summary = summarize(tabulate(runs))
    goals = judged(summary)
    quick = (
        f" (--quick: {len(ratios)} ratios, {QUICK.seeds} seeds, {QUICK.samples} samples a net)" if args.quick else ""
    )
    blocks.insert(0, (f"Mean over the ratios{quick}", summary))
    show(*blocks[0], with_net=True)
    settings |= {"left_out": left_out, "wall_seconds": time.perf_counter() - started}
    document = common.document(
        "bench.paper",
        arguments,
        settings,
        summary=[asdict(row) for row in summary],
        rows=[asdict(row) for row in tabulate(runs)],
        runs=[asdict(run) for run in runs],
        goals=[asdict(goal) for goal in goals],
    )
    common.write(args.json, document)
    common.write(args.markdown, markdown(json.loads(json.dumps(document)), blocks, goals))
    return common.judge(goals, args.check)


def _spread(values: Iterable[float]) -> float:
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    common.run(main)
