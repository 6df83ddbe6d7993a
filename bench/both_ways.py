"""Does compressing in ONNX keep the accuracy that compressing in PyTorch keeps?

    onnx     dense.onnx --OnnxStreams--> plan, factors --> split nodes in the written model      as `export` does
    torch    module --TorchActivations--> plan, factors --> low-rank layers                          `compress_(calib=)`

The same weights, the same calibration samples in the same batches and the same budget; each way is as shipped, with its
own choice of rows and its own stages. Both are judged on the same test images. `difference` is the mean over the draws
of onnx less torch, in points of top-1.

Goals (`--check` exits 4 when one is missed), for resnet20 at 0.6 of the MACs and cnn_cifar10 at 0.3 of the parameters:
  1. the two ways differ by at most 0.3 points;
  2. both keep the budget.
"""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench import cases, common, models
from bench.accuracy import TASKS
from bench.arms import budget_of, planned, write
from bench.cases import Case
from bench.common import Goal
from rsi_deploy.core.errors import UsageError
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.decide import planned_splits
from rsi_deploy.planning.site_options import Calibration
from rsi_deploy.torch_models.compress import compress_

KEEPS = {"resnet20": 0.6, "cnn_cifar10": 0.3}
QUICK_NETS, QUICK_SIZE, QUICK_TEST = ("cnn_cifar10",), 256, 500
LIMIT = 0.3
WAYS = ("onnx", "torch")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One net compressed both ways: mean scores over the draws, and what the larger model of any draw kept."""

    net: str
    keep: float
    unit: str
    draws: int
    dense: float
    onnx: float
    torch: float
    onnx_kept: float
    torch_kept: float

    @property
    def difference(self) -> float:
        """Points, onnx less torch."""
        return round(self.onnx - self.torch, 6)


def by_onnx(case: Case, draw: int, keep: float) -> tuple[float, float]:
    """Score of the model that is written, and the share it keeps."""
    unit = TASKS[case.name].unit
    streams, dense = case.streams(draw), case.measured(case.path)
    calibration = Calibration(solver=Solver(seed=draw))
    budget = budget_of(unit, keep, dense, streams)
    decisions = planned(case, streams, calibration.options(streams), budget, dense)
    fitted = calibration.fit(streams, planned_splits(decisions, streams))
    path = write(case, decisions, fitted, Solver(seed=draw), case.path.with_name("candidate.onnx"))
    size = case.measured(path)
    kept = size.macs / dense.macs if unit == "MACs" else size.params / dense.params
    return case.score(path).value, kept


def by_torch(case: Case, module: nn.Module, draw: int, keep: float) -> tuple[float, float]:
    """Score of the module, and the share it keeps; it is compressed in place."""
    macs = TASKS[case.name].unit == "MACs"
    (data,) = case.draw(draw).values()
    batches = [(torch.from_numpy(batch["x"]),) for batch in cases.batches({"x": data}, cases.BATCH)]
    sample = batches[0][0][:1]
    before = _macs(module, sample) if macs else _params(module)
    compress_(module, calib=batches, seed=draw, **{"keep_macs" if macs else "keep_params": keep})
    after = _macs(module, sample) if macs else _params(module)
    (images,) = case.test.values()
    with torch.no_grad():
        outputs = [module(torch.from_numpy(batch["x"])) for batch in cases.batches({"x": images}, cases.TEST_BATCH)]
    found = torch.cat(outputs).argmax(dim=1).numpy()
    return 100 * float(np.mean(found == case.reference)), after / before


def _params(module: nn.Module) -> int:
    """Count the numbers in weights and biases; folded BatchNorms add none."""
    norms = (nn.modules.batchnorm._BatchNorm,)
    return sum(p.numel() for m in module.modules() if not isinstance(m, norms) for p in m.parameters(recurse=False))


def _macs(module: nn.Module, sample: Tensor) -> int:
    """Multiply-accumulates of all convolutions and products on a sample, whatever module they are in."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(sample)
    return counter.get_total_flops() // 2


def measure(name: str, draws: int, folder: Path, *, quick: bool) -> Iterator[tuple[str, int, float, float]]:
    """(way, draw, score, kept share) of one net; first ("dense", 0, score, 1)."""
    case = cases.load(name, folder, size=QUICK_SIZE, limit=QUICK_TEST) if quick else cases.load(name, folder)
    yield "dense", 0, case.score(case.path).value, 1.0
    for draw in range(draws):
        for way in WAYS:
            found = (
                by_onnx(case, draw, KEEPS[name])
                if way == "onnx"
                else by_torch(case, models.trained(name), draw, KEEPS[name])
            )
            common.progress(f"{name}, draw {draw}: {way} {found[0]:.2f}, {found[1]:.4f} kept")
            yield way, draw, *found


def tabulate(name: str, runs: Sequence[tuple[str, int, float, float]]) -> Row:
    """Return the row of one net."""
    scores = {way: [score for found, _, score, _ in runs if found == way] for way in ("dense", *WAYS)}
    kept = {way: max(share for found, _, _, share in runs if found == way) for way in WAYS}
    return Row(
        net=name,
        keep=KEEPS[name],
        unit=TASKS[name].unit,
        draws=len(scores["onnx"]),
        dense=scores["dense"][0],
        onnx=statistics.fmean(scores["onnx"]),
        torch=statistics.fmean(scores["torch"]),
        onnx_kept=kept["onnx"],
        torch_kept=kept["torch"],
    )


def goals(rows: Sequence[Row]) -> list[Goal]:
    """Return the goals of the docstring."""
    found = []
    for row in rows:
        at = f"{row.net} at {row.keep:g} of the {row.unit}"
        said = f"{row.onnx:.2f} and {row.torch:.2f}, {row.difference:+.2f} of {LIMIT:g} points, mean of {row.draws}"
        found.append(Goal(name=f"same accuracy, {at}", held=abs(row.difference) <= LIMIT, row=said))
        held = max(row.onnx_kept, row.torch_kept) <= row.keep
        found.append(Goal(name=f"budget, {at}", held=held, row=f"{row.onnx_kept:.4f} and {row.torch_kept:.4f} kept"))
    return found


COLUMNS = ("net", "budget", "draws", "dense", "onnx", "torch", "difference", "onnx kept", "torch kept")


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table."""
    cells = []
    for row in rows:
        scores = [f"{value:.2f}" for value in (row.dense, row.onnx, row.torch)]
        kept = [f"{share:.3f}" for share in (row.onnx_kept, row.torch_kept)]
        budget = f"{row.keep:g} of the {row.unit}"
        cells.append([row.net, budget, str(row.draws), *scores, f"{row.difference:+.2f}", *kept])
    return common.markdown_table(COLUMNS, cells)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return the exit code."""
    options = common.parser(__doc__ or "", "bench.both_ways")
    options.add_argument("--nets", nargs="+", choices=tuple(KEEPS), help="only these (default: all)")
    options.add_argument("--draws", type=int, default=3, metavar="N", help="of calibration data [default: 3]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    if args.draws < 1:
        raise UsageError(f"--draws is at least 1, but got {args.draws}")
    names = args.nets or (QUICK_NETS if args.quick else tuple(KEEPS))
    draws = 1 if args.quick else args.draws
    if args.quick:
        common.progress(f"quick: {', '.join(names)}, a draw of {QUICK_SIZE} samples, {QUICK_TEST} test samples")
    runs = {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
            runs[name] = list(measure(name, draws, Path(folder), quick=args.quick))
    rows = [tabulate(name, found) for name, found in runs.items()]
    print(markdown(rows))
    judged = goals(rows)
    document = common.document(
        "bench.both_ways",
        arguments,
        {"quick": args.quick, "draws": draws, "torch_threads": torch.get_num_threads()},
        rows=[{**asdict(row), "difference": row.difference} for row in rows],
        runs=[
            dict(zip(("net", "way", "draw", "score", "kept"), (n, *run), strict=True)) for n in runs for run in runs[n]
        ],
        goals=[asdict(goal) for goal in judged],
    )
    common.write(args.json, document)
    common.write(args.markdown, markdown(rows))
    return common.judge(judged, args.check)


if __name__ == "__main__":
    common.run(main)
