"""How does the time of the RSI kernel compare with the time of its matrix products, and with other libraries?

The floor is the direct route's products alone, `4 q out in rank` flops, at the rate at which `W @ Y` and `W^T @ X` run
in float32 in the same rounds. Arms are interleaved in shuffled order; a ratio is that of the least times of all rounds,
beside it the median of the ratios within a round; a row is repeated until it has taken `SECONDS`, at least `--rounds`
times. Spectra, over the place `i` in `n = min(out, in)`: slow `i^-0.4`, medium `i^-1`, fast `0.9^(80 (i-1) / n)`; with
`--real NET` the weights of a trained net, one of each shape. Peers get more iterations until their error is no larger
than the kernel's, and the time of the cheapest such setting counts.

Goals (`--check` exits 4 when one is missed):
  1. q = 4 in at most 0.6 of the floor where min(out, in) is at least 2048 and at most 1.1 elsewhere, on a CPU with
     fast bfloat16; at most 1.15 without; at most 0.25 on a GPU (--device cuda);
  2. normalized error with bfloat16 at most 1.01 times that without, same seed, q and route, on every row (the table
     also shows the ratio to the paper's iteration in float32, whose sketch for a tall weight differs);
  3. at normalized error at most 1.05, 15 times faster than torch.linalg.svd for ranks up to a tenth (--exact);
  4. faster than every peer on every row, at equal or smaller error;
  5. the certified interval holds the norm and is at most 5 % wide on every row;
  6. extra memory in tensors at most two blocks of `(out + in) x rank` in float32 (the table also
     shows the resident set, which includes buffers of libraries and freed memory; on a GPU the memory that the
     allocator reserves);
  7. all linear layers of VGG19 and ViT-B/32 at 25 % in at most 1.3 times the kernel's own time in them (--models).
"""

import argparse
import functools
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench import common, models
from bench.common import Goal
from bench.kernel_peers import NEAR, error, interleaved, near_optimal, peers
from rsi_deploy.linalg.products.rates import rates
from rsi_deploy.linalg.solver import Solver, singular_values
from rsi_deploy.runtime.machine import peak_memory

Q = 4
SHAPES = ((768, 768), (3072, 768), (512, 4608), (4096, 4096), (11008, 4096), (4096, 25088))
LEAST = 256
"""Sides below which a real weight is nothing to measure: calls take longer than products."""
RATIOS = (0.05, 0.1, 0.25, 0.5)
SPECTRA = ("slow", "medium", "fast")
PEERED = (0.05, 0.1)
LARGE, LARGE_LIMIT, SMALL_LIMIT, PLAIN_LIMIT, GPU_LIMIT = 2048, 0.6, 1.1, 1.15, 0.25
ERROR_LIMIT, WIDTH_LIMIT, SVD_SPEEDUP, MODEL_LIMIT = 1.01, 0.05, 15.0, 1.3
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.kernel")
    options.add_argument("--shapes", default="", help="such as 768x768,4096x4096, or none [default: all six]")
    options.add_argument("--ratios", default="", help="ranks over min(out, in), such as 0.05,0.1 [default: four]")
    options.add_argument("--spectra", default="", help="of slow,medium,fast [default: all]")
    options.add_argument(
        "--real", nargs="+", choices=models.NETS, default=(), help="nets whose weights are measured too"
    )
    options.add_argument("--rounds", type=int, default=5, help="of interleaved arms [default: 5]")
    options.add_argument("--no-peers", action="store_true", help="leave the peers out")
    options.add_argument("--exact", action="store_true", help="goal 3: minutes of torch.linalg.svd")
    options.add_argument("--models", action="store_true", help="goal 7")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--child", help=argparse.SUPPRESS)
    args = options.parse_args(arguments)
    if args.child:
        print(json.dumps(_memory(json.loads(args.child))))
        return 0
    common.check_writable(args.json, args.markdown)
    quick, device = args.quick, torch.device(args.device)
    names = [] if args.shapes == "none" else args.shapes.split(",") if args.shapes else None
    shapes = list(SHAPES[:3] if quick else SHAPES) if names is None else [_shape(name) for name in names]
    ratios = [float(text) for text in args.ratios.split(",")] if args.ratios else list(RATIOS[:2] if quick else RATIOS)
    spectra = args.spectra.split(",") if args.spectra else list(SPECTRA[:1] if quick else SPECTRA)
    if quick:
        common.progress("quick: the three small shapes, two ranks, the slow spectrum, without peers")
    rows: list[Row] = []
    wholes: list[Row] = []

    def store() -> None:
        settings = {"q": Q, "rounds": args.rounds, "threads": torch.get_num_threads(), "load": list(_load())}
        settings["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
        results = {"rates": vars(rates(device)), "rows": rows, "models": wholes}
        made = common.document("bench.kernel", arguments, settings, **results)
        common.write(args.json, made)
        table = common.markdown_table(COLUMNS, [_cells(row) for row in rows])
        held = [
            f"- {'held' if goal.held else 'MISSED'}: {goal.name}: {goal.row}" for goal in goals(rows, wholes, device)
        ]
        common.write(args.markdown, "\n\n".join([f"`{made['command']}`", table, *held]) + "\n")

    for name, weight, values in itertools.chain(_weights(shapes, spectra, device), _real_weights(args.real, device)):
        for ratio in ratios:
            row = measured(name, weight, values, ratio, rounds=args.rounds)
            if not (args.no_peers or quick) and ratio in PEERED:
                row["peers"] = peers(weight, row, rounds=2)
            if args.exact and ratio in PEERED and name.endswith("slow") and min(weight.shape) >= LARGE:
                row["near"] = near_optimal(weight, row["rank"], values)
            if device.type == "cuda":
                row["memory"] = _memory_on_gpu(weight, row["rank"])
            else:
                row["memory"] = _child({"shape": list(weight.shape), "rank": row["rank"]})
            rows.append(row)
            store()
            common.progress(
                f"{row['matrix']} rank {row['rank']}: {row['ratio']:.2f} of the floor ({row['route']}, "
                f"the paper's {row['ratio_float32']:.2f}), error {row['error_ratio']:.4f} of float32's"
            )
    for which in ("vgg19", "vit_b_32") if args.models else ():
        wholes.append(whole_model(which, device))
        store()
    common.console().print(table(rows))
    return common.judge(goals(rows, wholes, device), args.check)


def with_spectrum(values: Tensor, out_features: int, in_features: int, seed: int, device: torch.device) -> Tensor:
    """A float32 weight `(out, in)` with these singular values: random orthogonal vectors on either side."""
    generator = torch.Generator(device).manual_seed(seed)
    n = len(values)
    drawn = (torch.randn(side, n, generator=generator, device=device) for side in (out_features, in_features))
    left, right = (torch.linalg.qr(block).Q for block in drawn)
    return ((left * values.to(left)) @ right.mT).contiguous()


def spectrum(name: str, n: int) -> Tensor:
    """Singular values `(n,)`, float64."""
    place = torch.arange(1, n + 1, dtype=torch.float64)
    values: dict[str, Tensor] = {"slow": place**-0.4, "medium": place**-1.0, "fast": 0.9 ** (80 * (place - 1) / n)}
    return values[name]


def _weights(
    shapes: list[tuple[int, int]], spectra: list[str], device: torch.device
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for (out_features, in_features), name in itertools.product(shapes, spectra):
        values = spectrum(name, min(out_features, in_features))
        yield (
            f"{out_features}x{in_features} {name}",
            with_spectrum(values, out_features, in_features, 0, device),
            values,
        )


def _real_weights(nets: Sequence[str], device: torch.device) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The first weight of each shape of 256 and more, with its singular values."""
    for net in nets:
        seen = set()
        for layer in models.load_net(net, limit=1).module.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                weight = layer.weight.detach().flatten(1).float().contiguous()
                if min(weight.shape) >= LEAST and weight.shape not in seen:
                    seen.add(weight.shape)
                    yield f"{weight.shape[0]}x{weight.shape[1]} {net}", weight.to(device), singular_values(weight)


def measured(name: str, weight: Tensor, values: Tensor, ratio: float, *, rounds: int) -> Row:
    """The kernel with and without bfloat16 against the floor, and the errors of both."""
    out_features, in_features = weight.shape
    rank = math.ceil(ratio * min(weight.shape))
    Y, X = (torch.randn(side, rank, device=weight.device) for side in (in_features, out_features))
    solvers = {"kernel": Solver(), "float32": Solver(mixed_precision=False, route="direct")}
    alike = Solver(mixed_precision=False, route=Solver().solve(weight, rank, site=name).route)  # type: ignore[arg-type]
    found: dict[str, Any] = {}

    def solve(arm: str) -> None:
        found[arm] = solvers[arm].solve(weight, rank, site=name)

    arms: dict[str, Callable[[], Any]] = {"floor": lambda: (weight @ Y, weight.mT @ X)}
    arms |= {arm: functools.partial(solve, arm) for arm in solvers}
    times = interleaved(arms, rounds)
    floor = [Q * seconds for seconds in times["floor"]]
    errors = {arm: error(weight, solution.factors, values, rank) for arm, solution in found.items()}
    unmixed = error(weight, alike(weight, rank, site=name), values, rank)[2]
    low, high = errors["kernel"][:2]
    return {
        "matrix": name,
        "shape": [out_features, in_features],
        "rank": rank,
        "rank_ratio": ratio,
        "route": found["kernel"].route,
        "route_float32": found["float32"].route,
        "floor_seconds": min(floor),
        "seconds": min(times["kernel"]),
        "ratio": min(times["kernel"]) / min(floor),
        "ratio_float32": min(times["float32"]) / min(floor),
        "median_ratio": statistics.median(a / b for a, b in zip(times["kernel"], floor, strict=True)),
        "normalized_error": errors["kernel"][2],
        "error_ratio": errors["kernel"][2] / unmixed,
        "error_of_paper": errors["kernel"][2] / errors["float32"][2],
        "interval": [low, high],
        "holds": errors["kernel"][3],
        "times": times,
    }


def whole_model(name: str, device: torch.device) -> Row:
    """Time the linear layers of a torchvision model with random slow-spectrum weights and their records, at 25 %."""
    import torchvision
    from torch import nn

    from rsi_deploy.torch_models.compress import compress_

    with torch.device("meta"):
        module = getattr(torchvision.models, name)(weights=None)
    module = module.to_empty(device=device).eval()
    names = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
    for index, parameter in enumerate(p for p in module.parameters()):
        with torch.no_grad():
            if parameter.ndim == 2 and min(parameter.shape) > 1:
                values = spectrum("slow", min(parameter.shape))
                parameter.copy_(with_spectrum(values, parameter.shape[0], parameter.shape[1], index, device))
            else:
                parameter.zero_()
    started = time.perf_counter()
    records = compress_(module, "25%", include=[*names, "*in_proj*"] if name == "vit_b_32" else names)
    seconds = time.perf_counter() - started
    split = [record for record in records if record.rank]
    kernel = sum(record.seconds or 0.0 for record in split)
    return {"model": name, "sites": len(split), "seconds": seconds, "kernel": kernel, "ratio": seconds / kernel}


def _memory(job: Row) -> Row:
    """Return the peak bytes beyond the weight, in tensors and of the resident set; it runs in a process of its own."""
    out_features, in_features = job["shape"]
    Solver()(torch.randn(1100, 1000), 20)  # threads, workspaces, the machine's rates
    weight = torch.rand(out_features, in_features).sub_(0.5)  # in place: a temporary would raise the peak
    before = peak_memory()
    Solver(route="chebyshev")(weight, job["rank"])
    resident = peak_memory() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        Solver(route="chebyshev")(weight, job["rank"])
    events = recorded.profiler.kineto_results.events()
    live = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    allowed = 2 * 4 * (out_features + in_features) * job["rank"]
    return {"extra": max(live), "resident": resident, "allowed": allowed}


def _memory_on_gpu(weight: Tensor, rank: int) -> Row:
    """Bytes beyond the weight at most, allocated and reserved."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    Solver(route="chebyshev")(weight, rank)
    peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    extra, reserved = (peak - known for peak, known in zip(peaks, before, strict=True))
    return {"extra": extra, "resident": reserved, "allowed": 2 * 4 * sum(weight.shape) * rank}


def _child(job: Row) -> Row:
    command = [sys.executable, "-m", "bench.kernel", "--child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: Row = json.loads(done.stdout.splitlines()[-1])
    return result


COLUMNS = (
    "matrix",
    "rank",
    "route",
    "of the floor",
    "paper's",
    "normalized error",
    "to float32",
    "to the paper's",
    "memory",
    "resident",
    "peers",
)


def _cells(row: Row) -> list[str]:
    memory = row["memory"]
    peered = ", ".join(f"{name.split('.')[-1]} {peer['speedup']:.1f}x" for name, peer in row.get("peers", {}).items())
    return [
        row["matrix"],
        str(row["rank"]),
        row["route"],
        f"{row['ratio']:.2f}",
        f"{row['ratio_float32']:.2f}",
        f"{row['normalized_error']:.3f}",
        f"{row['error_ratio']:.4f}",
        f"{row['error_of_paper']:.4f}",
        f"{memory['extra'] / memory['allowed']:.2f}",
        f"{memory['resident'] / memory['allowed']:.2f}",
        peered,
    ]


def table(rows: Sequence[Row]) -> Table:
    """Return the rows for the terminal."""
    result = Table(*COLUMNS, title="the kernel against its float32 floor, q = 4")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def goals(rows: Sequence[Row], wholes: Sequence[Row], device: torch.device) -> list[Goal]:
    """Return the goals of the docstring, each with its worst row."""
    mixed = rates(device).mixed
    found: list[Goal] = []

    def hold(name: str, judged: Sequence[tuple[float, bool, str]]) -> None:
        if judged:
            missed = [one for one in judged if not one[1]]
            worst = max(missed or judged, key=lambda one: one[0])
            text = f"{len(judged) - len(missed)} of {len(judged)}, worst: {worst[2]} at {worst[0]:.4g}"
            found.append(Goal(name=name, held=not missed, row=text))

    for large in (True, False):
        limit = (LARGE_LIMIT if large else SMALL_LIMIT) if mixed else PLAIN_LIMIT
        limit = GPU_LIMIT if device.type == "cuda" else limit
        of = [row for row in rows if (min(row["shape"]) >= LARGE) is large]
        what = f"1. min(out, in) {'>=' if large else '<'} {LARGE}: at most {limit} of the floor"
        hold(what, [(row["ratio"], row["ratio"] <= limit, _name(row)) for row in of])
    hold("2. error with bfloat16", [(r["error_ratio"], r["error_ratio"] <= ERROR_LIMIT, _name(r)) for r in rows])
    near = [row for row in rows if "near" in row]
    fast = [(r, r["near"]["speedup"] >= SVD_SPEEDUP and r["near"]["normalized_error"] <= NEAR) for r in near]
    hold(
        "3. 15 times faster than an exact SVD (1/speedup)", [(1 / r["near"]["speedup"], ok, _name(r)) for r, ok in fast]
    )
    pairs = [(row, name, peer) for row in rows for name, peer in row.get("peers", {}).items()]
    hold("4. peers (1/speedup)", [(1 / p["speedup"], p["speedup"] > 1, f"{_name(row)} {n}") for row, n, p in pairs])
    widths = [(row["interval"][1] / max(row["interval"][0], 1e-300) - 1, row) for row in rows]
    hold("5. interval", [(width, width <= WIDTH_LIMIT and row["holds"], _name(row)) for width, row in widths])
    memory = [(row["memory"]["extra"] / row["memory"]["allowed"], _name(row)) for row in rows]
    hold("6. memory in tensors, of two blocks", [(share, share <= 1, name) for share, name in memory])
    hold("7. whole models", [(m["ratio"], m["ratio"] <= MODEL_LIMIT, m["model"]) for m in wholes])
    return found


def _name(row: Row) -> str:
    return f"{row['matrix']} rank {row['rank']}"


def _shape(text: str) -> tuple[int, int]:
    out_features, in_features = (int(part) for part in text.split("x"))
    return out_features, in_features


def _load() -> tuple[float, float, float]:
    import os

    return os.getloadavg()


if __name__ == "__main__":
    common.run(main)
