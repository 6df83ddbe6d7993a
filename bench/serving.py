"""How much of onnxruntime's speed does `rsi-deploy serve` reach, and what does it do under overload?

    throughput    64 clients in a closed loop, binary tensors over HTTP, against onnxruntime alone at the batch that the
                  server formed: as many processes of as many threads as the server has workers, or one process with all
                  the threads, whichever is faster. Server and onnxruntime, dense and compressed, take turns.
    in time       requests at 70 % of the rate of 16 clients, as a Poisson process, under `--latency-bound`
    past the end  twice that rate, then half of it
    light         a model of almost no work: CPU time of the server's processes for each request

Clients run on the same cores. CPU time is reported beside throughput: on a busy machine the scheduler favours the
process with more threads, so that the server's share of onnxruntime's throughput can pass 100 %. The sentence encoder
is all-MiniLM-L6-v2 with its trained weights on real sentences at 128 tokens, VGG19 torchvision's with random ones; both
at `--rank 25%`. Every answer is compared with onnxruntime's.

Goals (`--check` exits 4 when one is missed): no wrong and no lost answer; batches of two and more; throughput at least
75 % of onnxruntime's; compressed over dense at least 85 % of the factor that `bench` gives at that batch; p99 within
the bound at 70 %; past saturation refusals, answers within the bound, and no refusal later than 5 s after it; less than
3 ms of CPU a light request; ready within 5 s.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.table import Table

from bench import common, models, small
from bench.common import Goal
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.core.types import Feeds
from rsi_deploy.exporting.api import export
from rsi_deploy.runtime.sessions import make_session

MODELS = ("minilm", "vgg19")
RANK, TOKENS, ROWS, CLIENTS = "25%", 128, 64, 64
FEW = 16
"""Clients that find out what the server can under its bound: so few that none is refused."""
BOUND = {"minilm": 1.0, "vgg19": 4.0}
"""Seconds, as one would set it: many times what a row takes."""
PATIENT = 300.0
"""Bound in seconds while throughput is measured: nothing is to be refused there."""
GOALS = {"throughput": 0.75, "factor": 0.85, "light_ms": 3.0, "ready": 5.0, "recovery": 5.0}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense and a compressed model with inputs.

    Attributes:
        name: name of the model on the command line.
        files: "dense" and "compressed" -> ONNX file.
        data: "dense" and "compressed" -> .npz of inputs and expected outputs.
        output: name of the output.
    """

    name: str
    files: Mapping[str, Path]
    data: Mapping[str, Path]
    output: str


class Server:
    """A server in a process of its own that ends with the block."""

    def __init__(self, *arguments: str):
        code = "from rsi_deploy.cli import main; main()"
        command = [sys.executable, "-c", code, "serve", *arguments, "--http-port", "0", "--no-grpc", "--json"]
        start = time.perf_counter()
        self._process = subprocess.Popen([*command, "--access-log", os.devnull], stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = str(json.loads(self._process.stdout.readline())["http"])
        self.ready = time.perf_counter() - start

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(60)

    def cpu(self) -> float:
        """Return the CPU seconds of all its processes."""
        tree = psutil.Process(self._process.pid)
        return sum(sum(process.cpu_times()[:2]) for process in [tree, *tree.children(recursive=True)])

    def formed(self, model: str) -> tuple[float, float]:
        """Rows and batches of a model so far."""
        import urllib.request

        text = urllib.request.urlopen(f"http://{self.address}/metrics").read().decode()
        found = []
        for what in ("sum", "count"):
            start = f'rsi_batch_rows_{what}{{model="{model}"'
            found.append(sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(start)))
        return found[0], found[1]

    def load(
        self, pair: Pair, arm: str, seconds: float, *, rate: float = 0.0, name: str = "", clients: int = CLIENTS
    ) -> dict[str, Any]:
        """Run clients and return their report, the rows of a batch, and the CPU seconds of a request."""
        rows, batches = self.formed(name or arm)
        cpu = self.cpu()
        command = [sys.executable, "-m", "bench.serving_load", self.address, name or arm, str(pair.data[arm])]
        command += ["--output", pair.output, "--clients", str(clients), "--rate", str(rate), "--seconds", str(seconds)]
        heard: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        now = self.formed(name or arm)
        heard["batch"] = (now[0] - rows) / max(now[1] - batches, 1)
        heard["cpu_ms"] = 1e3 * (self.cpu() - cpu) / max(sum(heard["statuses"].values()), 1)
        return heard


def main(arguments: Sequence[str]) -> int:
    options = common.parser(__doc__ or "", "bench.serving")
    options.add_argument("--models", nargs="+", choices=MODELS, default=["minilm"], help="[default: minilm]")
    options.add_argument("--rounds", type=int, default=6, help="of every arm [default: 6]")
    options.add_argument("--seconds", type=float, default=10.0, help="of each arm in a round [default: 10]")
    args = options.parse_args(arguments)
    common.check_writable(args.json, args.markdown)
    rounds, seconds = (1, 3.0) if args.quick else (args.rounds, args.seconds)
    if args.quick:
        common.progress(f"quick: 1 round of {seconds:g} s an arm")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=".") as folder:
        found["light"] = light(Path(folder), seconds)
        for name in args.models:
            pair = prepared(name, Path(folder))
            found[name] = {"throughput": throughput(pair, rounds, seconds), "limits": limits(pair, seconds)}
            store(args, arguments, found, rounds, seconds)
    store(args, arguments, found, rounds, seconds)
    common.console().print(table(found))
    return common.judge([goal for name, one in found.items() for goal in goals(name, one)], args.check)


def store(args: Any, arguments: Sequence[str], found: Mapping[str, Any], rounds: int, seconds: float) -> None:
    """Write the results so far, so that an interrupted run keeps them."""
    settings = {"rank": RANK, "tokens": TOKENS, "clients": CLIENTS, "bound": BOUND}
    settings |= {"rounds": rounds, "seconds": seconds, "load_average": os.getloadavg()}
    common.write(args.json, common.document("bench.serving", arguments, settings, results=dict(found)))
    common.write(args.markdown, common.markdown_table(COLUMNS, cells(found)))


# --- measurements ----------------------------------------------------------------------------------------------------


def prepared(name: str, folder: Path) -> Pair:
    """Export a model and compute the expected outputs."""
    common.progress(f"{name}: exporting")
    bundle, rng = folder / name, np.random.default_rng(0)
    source = models.minilm(TOKENS) if name == "minilm" else f"torchvision:{name}"
    export(source, bundle, rank=RANK, weights="none", measure=False, keep_dense=True)
    files = {"dense": bundle / "dense.onnx", "compressed": bundle / "model.onnx"}
    inputs = {"input": rng.standard_normal((ROWS, 3, 224, 224)).astype(np.float32)}
    if name == "minilm":
        ids, mask = models.tokenize(models.sentences(ROWS), TOKENS)
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    return paired(name, files, inputs, folder)


def paired(name: str, files: Mapping[str, Path], inputs: Feeds, folder: Path) -> Pair:
    """Write the models with their inputs and expected outputs."""
    data, output = {}, ""
    for arm, file in files.items():
        session = make_session(file)
        output = session.get_outputs()[0].name
        rows = [session.run([output], {n: a[r : r + 1] for n, a in inputs.items()})[0] for r in range(ROWS)]
        data[arm] = folder / f"{name}-{arm}.npz"
        np.savez(data[arm], expected=np.concatenate(rows), **inputs)
    return Pair(name=name, files=files, data=data, output=output)


def throughput(pair: Pair, rounds: int, seconds: float) -> dict[str, Any]:
    """Rows a second of server and onnxruntime, dense and compressed, in turns."""
    arms = tuple(pair.files)
    served = [f"{arm}={pair.files[arm]}" for arm in arms]
    rows: dict[str, list[dict[str, Any]]] = {f"{way} {arm}": [] for way in ("served", "alone") for arm in arms}
    with Server(*served, "--latency-bound", f"{PATIENT:g}s") as server:
        batches = {arm: max(1, round(server.load(pair, arm, min(seconds, 5.0))["batch"])) for arm in arms}
        for number in range(rounds):
            turns = list(rows)
            random.Random(number).shuffle(turns)
            for turn in turns:
                common.progress(f"{pair.name}: round {number + 1}, {turn}")
                way, arm = turn.split(" ")
                one = server.load(pair, arm, seconds) if way == "served" else alone(pair, arm, batches[arm], seconds)
                rows[turn].append(one)
        ready = server.ready
    factor = offline_factor(pair, batches, seconds)
    return {"ready": ready, "batches": batches, "rows": rows, "bench_factor": factor}


def alone(pair: Pair, arm: str, batch: int, seconds: float) -> dict[str, Any]:
    """Measure onnxruntime without a server in two layouts, half of the time each, and return the faster one."""
    cores = len(os.sched_getaffinity(0))
    layouts = {"processes": (min(2, cores), max(1, cores // 2)), "threads": (1, cores)}
    found = {name: looped(pair, arm, batch, seconds / 2, *layout) for name, layout in layouts.items()}
    return {**max(found.values(), key=lambda one: one["answered_a_second"]), "layouts": found}


def looped(pair: Pair, arm: str, batch: int, seconds: float, processes: int, threads: int) -> dict[str, float]:
    """Return the rows a second of processes that run the model in a loop, and their CPU time for a row."""
    command = [sys.executable, "-m", "bench.serving_offline", str(pair.files[arm]), str(pair.data[arm])]
    command += ["--batch", str(batch), "--threads", str(threads), "--seconds", str(seconds)]
    running = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)
    ]
    total = cpu = rows = 0.0
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        said = json.loads(process.communicate()[0])
        total, cpu, rows = total + said["rows"] / said["seconds"], cpu + said["cpu"], rows + said["rows"]
    return {"answered_a_second": total, "cpu_ms": 1e3 * cpu / rows}


def offline_factor(pair: Pair, batches: Mapping[str, int], seconds: float) -> float:
    """Dense over compressed median time by `rsi_deploy.bench`, one thread, at the batch that the server formed."""
    batch = batches["compressed"]
    data = dict(np.load(pair.data["dense"]))
    feeds = {name: data[name][np.arange(batch) % ROWS] for name in data if name != "expected"}
    files = [pair.files["dense"], pair.files["compressed"]]
    result = bench(files, feeds=feeds, threads=1, seconds=4 * seconds)
    return result.arms[0].median_ms / result.arms[1].median_ms


def limits(pair: Pair, seconds: float) -> dict[str, Any]:
    """Load the compressed model at 70 % of its throughput, at twice that rate, and then at half of it."""
    common.progress(f"{pair.name}: limits")
    with Server(f"m={pair.files['compressed']}", "--latency-bound", f"{BOUND[pair.name]:g}s") as server:

        def load(rate: float, time_: float, clients: int = CLIENTS) -> dict[str, Any]:
            return server.load(pair, "compressed", time_, rate=rate, name="m", clients=clients)

        most = load(0.0, seconds, FEW)["answered_a_second"]
        calm = load(0.7 * most, 2 * seconds)
        flood = load(2.0 * most, 2 * seconds)
        after = load(0.5 * most, 10.0)
    return {"most": most, "calm": calm, "flood": flood, "after": after}


def light(folder: Path, seconds: float) -> dict[str, Any]:
    """CPU time for each request of a model of almost no work."""
    common.progress("light")
    file = small.perceptron(folder / "light.onnx", width=64, layers=2)
    inputs = {"x": np.random.default_rng(0).standard_normal((ROWS, 64)).astype(np.float32)}
    pair = paired("light", {"light": file}, inputs, folder)
    with Server(f"light={file}", "--latency-bound", f"{PATIENT:g}s") as server:
        server.load(pair, "light", 1.0)
        return server.load(pair, "light", seconds)


# --- the results -----------------------------------------------------------------------------------------------------

COLUMNS = (
    *("model", "arm", "batch", "served a second", "onnxruntime a second", "share", "p50 ms", "p99 ms"),
    *("CPU ms a request", "CPU ms a row of onnxruntime"),
)


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """One row an arm: medians over the rounds."""
    lines = []
    for name, one in found.items():
        if name == "light":
            lines.append(line(name, "", [one], None))
            continue
        rows = one["throughput"]["rows"]
        lines += [line(name, arm, rows[f"served {arm}"], rows[f"alone {arm}"]) for arm in ("dense", "compressed")]
        lines += [line(name, f"compressed, {what}", [one["limits"][what]], None) for what in ("calm", "flood", "after")]
    return lines


def line(
    name: str, arm: str, served: Sequence[Mapping[str, Any]], own: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    """The cells of one row."""
    rate = median(served, "answered_a_second")
    base = median(own, "answered_a_second") if own else 0.0
    shown = [f"{base:.1f}", f"{rate / base:.0%}"] if own else ["", ""]
    times = [statistics.median(row["ms"][p] for row in served) for p in ("p50", "p99")]
    texts = [name, arm, f"{median(served, 'batch'):.1f}", f"{rate:.1f}", *shown]
    spent = [f"{median(served, 'cpu_ms'):.2f}", f"{median(own, 'cpu_ms'):.2f}" if own else ""]
    return [*texts, *(f"{value:.0f}" for value in times), *spent]


def median(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    """The median of one number over the rounds."""
    return float(statistics.median(row[key] for row in rows))


def table(found: Mapping[str, Any]) -> Table:
    """Return the table of all results."""
    shown = Table(*COLUMNS)
    for row in cells(found):
        shown.add_row(*row)
    return shown


def goals(name: str, one: Mapping[str, Any]) -> list[Goal]:
    """Return the goals of the docstring."""
    if name == "light":
        own, limit = one["cpu_ms"], GOALS["light_ms"]
        return [Goal(name="light", held=own < limit, row=f"{own:.2f} ms of CPU a request, goal under {limit:g}")]
    return [*throughput_goals(name, one["throughput"]), *limit_goals(name, one["limits"])]


def throughput_goals(name: str, one: Mapping[str, Any]) -> list[Goal]:
    """Return the goals of the closed loop."""
    rows, found = one["rows"], []
    served = [row for arm in ("dense", "compressed") for row in rows[f"served {arm}"]]
    bad = sum(row["wrong"] + row["lost"] for row in served)
    other = sum(count for row in served for status, count in row["statuses"].items() if status != "200")
    total = sum(row["statuses"].get("200", 0) for row in served)
    text = f"{bad} wrong or lost, {other} refused, {total} right"
    found.append(Goal(name=f"{name} answers", held=not bad and not other and total > 0, row=text))
    smallest = min(row["batch"] for row in served)
    found.append(Goal(name=f"{name} batches", held=smallest >= 2, row=f"{smallest:.1f} rows or more"))
    for arm in ("dense", "compressed"):
        share = median(rows[f"served {arm}"], "answered_a_second") / median(rows[f"alone {arm}"], "answered_a_second")
        text = f"{share:.0%} of onnxruntime at batch {one['batches'][arm]}, goal {GOALS['throughput']:.0%}"
        found.append(Goal(name=f"{name} {arm} throughput", held=share >= GOALS["throughput"], row=text))
    factor = median(rows["served compressed"], "answered_a_second") / median(rows["served dense"], "answered_a_second")
    share = factor / one["bench_factor"]
    text = f"{factor:.2f}x served, {one['bench_factor']:.2f}x by bench: {share:.0%}, goal {GOALS['factor']:.0%}"
    found.append(Goal(name=f"{name} factor", held=share >= GOALS["factor"], row=text))
    found.append(Goal(name=f"{name} ready", held=one["ready"] <= GOALS["ready"], row=f"after {one['ready']:.1f} s"))
    return found


def limit_goals(name: str, one: Mapping[str, Any]) -> list[Goal]:
    """Return the goals of the open loop."""
    calm, flood, after, bound = one["calm"], one["flood"], one["after"], BOUND[name]
    refused = sum(count for status, count in flood["statuses"].items() if status != "200")
    bad = sum(run["wrong"] + run["lost"] for run in (calm, flood, after))
    texts = {
        "in time": (calm["ms"]["p99"] <= 1e3 * bound, f"p99 {calm['ms']['p99']:.0f} ms at 70 %, bound {bound:g} s"),
        "refuses": (refused > 0 and not bad, f"{refused} refused past saturation, {bad} wrong or lost"),
        "bounded": (flood["ms"]["p99"] <= 1e3 * bound, f"p99 {flood['ms']['p99']:.0f} ms past saturation"),
        "recovers": (
            after["last_refusal_at"] <= GOALS["recovery"],
            f"last refusal {after['last_refusal_at']:.1f} s after it",
        ),
    }
    return [Goal(name=f"{name} {what}", held=held, row=text) for what, (held, text) in texts.items()]


if __name__ == "__main__":
    common.run(main)
