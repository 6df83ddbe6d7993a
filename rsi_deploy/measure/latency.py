"""Latency of models side by side: one process, shuffled blocks, intervals, and a verdict that may be "no".

    block    every arm once, in an order shuffled by a seeded generator
    visit    one arm's turn in a block: an untimed call where calls are short, then the timed ones
    t[a, b]  arm a in block b: the median of the visit's timed calls, ms
    speedup  median_b t[first, b] / median_b t[a, b]

The arms of one block share the machine's mood, so the 95 % interval of the speedup comes from resampling *blocks*
(percentile bootstrap), the same ones for both arms. A difference is claimed only where that interval excludes 1.
Blocks count as independent; a load that outlasts them but hits all arms alike cancels in the ratio.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.errors import UsageError
from rsi_deploy.measure import providers
from rsi_deploy.measure.inputs import InputSpec, check_feeds, model_inputs, random_feeds

Interval = tuple[float, float]
Floats = npt.NDArray[np.float64]
Stopped = Literal["precise", "time", "interrupted"]

MIN_BLOCKS = 6  # fewer cannot cover a median with 95 %, whatever the method: 1 - 2 / 2**n
ENOUGH_BLOCKS = 20  # with fewer, the result carries a note
PARTIAL_BLOCKS = 5  # an interrupted run with fewer is not kept
PRECISION = 0.02  # half width, relative, of the intervals at which measuring ends early
RESAMPLES = 2000
SHORT_MS, VISIT_MS, MAX_CALLS = 20.0, 5.0, 50  # calls under SHORT_MS repeat until a visit has about VISIT_MS

METHOD = (
    "plain session.run with arrays in host memory, copies to and from a device included; arms interleaved in "
    "shuffled blocks in one process; onnxruntime's workers stop spinning when a run ends, or they would "
    "take the cores from the next arm; garbage collector off; clock time.perf_counter_ns"
)


class ArmResult(BaseModel, frozen=True, extra="forbid"):
    """One model's times.

    Attributes:
        label: what the arm is called.
        model: the file.
        n: timed calls, in `blocks` visits.
        blocks: visits.
        median_ms: median over the blocks of each block's median.
        median_interval_ms: its 95 % bootstrap interval.
        p90_ms: 90th percentile of all timed calls.
        p99_ms: None below 1000 calls, where it means nothing.
        warmup_calls: untimed calls before the first block.
        warm: whether the time had settled after them.
        provider_nodes: provider -> nodes that it executed, from a profiled run.
        memcpy_nodes: copies between device and host among those.
        speedup: the first arm's median over this one's; None for the first arm.
        speedup_interval: its 95 % interval over paired blocks.
        verdict: the comparison with the first arm in words.
    """

    label: str
    model: str
    n: int
    blocks: int
    median_ms: float
    median_interval_ms: Interval
    p90_ms: float
    p99_ms: float | None
    warmup_calls: int
    warm: bool
    provider_nodes: dict[str, int]
    memcpy_nodes: int
    speedup: float | None
    speedup_interval: Interval | None
    verdict: str


class BenchResult(BaseModel, frozen=True, extra="forbid"):
    """Arms measured side by side on equal inputs.

    Attributes:
        arms: in the order they were given; the first is what the others are compared with.
        provider: full name.
        threads: inside one operator; None is onnxruntime's default.
        batch: as asked; `inputs` says what was fed.
        inputs: input name -> dtype and shape.
        seed: of inputs, block order and bootstrap.
        seconds: the blocks took so long, warm-up apart.
        stopped: `precise` (every interval within 2 %), `time` (budget spent) or `interrupted`.
        partial: interrupted before either.
        onnxruntime: version.
        method: how the times were taken.
        notes: what a reader must know before trusting them.
    """

    arms: tuple[ArmResult, ...]
    provider: str
    threads: int | None
    batch: int
    inputs: dict[str, str]
    seed: int
    seconds: float
    stopped: Stopped
    partial: bool
    onnxruntime: str
    method: str
    notes: tuple[str, ...]


def bench(
    models: Sequence[str | Path],
    *,
    batch: int = 1,
    provider: str = "cpu",
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    feeds: Mapping[str, npt.NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    labels: Sequence[str] | None = None,
) -> BenchResult:
    """Measure the latency of models on equal inputs; the first is what the others are compared with.

    Args:
        models: ONNX files.
        batch: size of the dynamic first dimension of the random inputs.
        provider: short or full name; a model of which it runs no node is refused.
        threads: threads inside one operator; None leaves onnxruntime's default.
        seconds: time for the blocks; they end sooner once every interval is within 2 %. Warm-up may take half
            as long on top, and loading comes before it.
        seed: of the inputs, the block order and the bootstrap.
        feeds: input name -> array, in place of random inputs; the batch is then read from their first axis.
        input_shape: see `random_feeds`.
        labels: names of the arms; without it the file names.

    Raises:
        UsageError: nothing to measure, inputs that differ between arms, or a provider that ran nothing.
        ModelError: a model cannot be loaded or run.
        KeyboardInterrupt: again, where fewer than 5 blocks were measured; with more, the result is partial.
    """
    import onnxruntime

    names = _labels(models, labels)
    if not 0 < seconds < float("inf"):
        raise UsageError(f"seconds must be a positive number, but got {seconds}")
    full_name = providers.resolve(provider)
    sessions = [providers.make_session(model, full_name, threads, spin_between_runs=False) for model in models]
    specs = model_inputs(sessions[0])
    fed = dict(random_feeds(specs, batch, seed, input_shape) if feeds is None else feeds)
    if feeds is not None:
        batch = next((len(array) for array in fed.values() if array.ndim), 1)
    for model, session in zip(models, sessions, strict=True):
        check_feeds(model_inputs(session), fed, str(model))
    arms = []
    for name, model, session in zip(names, models, sessions, strict=True):
        placement = providers.proven_placement(model, full_name, fed, threads)
        arms.append(_warmed(name, str(model), session, fed, placement, seconds / (2 * len(models))))
    elapsed, stopped = _run_blocks(arms, seconds, seed)
    return BenchResult(
        arms=tuple(_summary(arm, arms[0], seed) for arm in arms),
        provider=full_name,
        threads=threads,
        batch=batch,
        inputs={name: f"{array.dtype} {array.shape}" for name, array in fed.items()},
        seed=seed,
        seconds=elapsed,
        stopped=stopped,
        partial=stopped == "interrupted",
        onnxruntime=onnxruntime.__version__,
        method=METHOD,
        notes=tuple(_notes(arms, specs, batch, full_name, stopped)),
    )


# Statistics: pure functions of times, so that they can be tested without a clock.


def bootstrap_medians(blocks: Floats, seed: int) -> Floats:
    """Medians of `RESAMPLES` resamples of the columns of `blocks (arms, B)`: float64 `(arms, RESAMPLES)`."""
    rng = np.random.default_rng([seed, *b"bootstrap"])
    count = blocks.shape[1]
    chunk = max(1, 1_000_000 // count)  # bounds the memory of long runs
    medians = [
        np.median(blocks[:, rng.integers(0, count, (min(chunk, RESAMPLES - start), count))], axis=2)
        for start in range(0, RESAMPLES, chunk)
    ]
    return np.concatenate(medians, axis=1)


def interval_95(samples: Floats) -> Interval:
    """The 2.5 and 97.5 percentiles of bootstrap samples `(RESAMPLES,)`."""
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(low), float(high)


def compare(first: Floats, arm: Floats, seed: int) -> tuple[float, Interval]:
    """How many times faster `arm (B,)` is than `first (B,)`, and the 95 % interval over paired blocks.

    Raises:
        ValueError: unpaired blocks, or none.
    """
    if first.shape != arm.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"expected paired blocks (B,) with B >= 1, but got {first.shape} and {arm.shape}")
    resampled = bootstrap_medians(np.stack([first, arm]), seed)
    return float(np.median(first) / np.median(arm)), interval_95(resampled[0] / resampled[1])


def verdict(speedup: float, interval: Interval, blocks: int) -> str:
    """The comparison in words; a difference is claimed only where the interval excludes 1.

    >>> verdict(1.834, (1.79, 1.88), 40)
    '1.83x faster [1.79, 1.88]'
    >>> verdict(0.909, (0.885, 0.935), 40)
    '1.10x slower [1.07, 1.13]'
    >>> verdict(1.004, (0.99, 1.02), 40)
    'no difference shown [0.99, 1.02]'
    """
    if blocks < MIN_BLOCKS:
        return f"too few blocks to compare ({blocks}; {MIN_BLOCKS} are needed)"
    low, high = interval
    if low <= 1 <= high:
        return f"no difference shown [{low:.2f}, {high:.2f}]"
    word, times, ends = "faster", speedup, (low, high)
    if high < 1:
        word, times, ends = "slower", 1 / speedup, (1 / high, 1 / low)
    digits = 2 if round(ends[0], 2) > 1 else 4  # never print an end that excludes 1 as 1.00
    return f"{times:.{digits}f}x {word} [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]"


def is_settled(times: Sequence[float]) -> bool:
    """Whether the last five times and the five before them have medians within 5 % of each other."""
    if len(times) < 10:
        return False
    before, last = float(np.median(times[-10:-5])), float(np.median(times[-5:]))
    return abs(last - before) <= 0.05 * last


def is_precise(blocks: Floats, seed: int) -> bool:
    """Whether every speedup of `blocks (arms, B)` (of one arm alone: its median) is known to within 2 %."""
    medians = bootstrap_medians(blocks, seed)
    samples = medians[:1] / medians[1:] if len(medians) > 1 else medians
    return all(high - low <= (high + low) * PRECISION for low, high in map(interval_95, samples))


def calls_per_visit(call_ms: float) -> int:
    """Timed calls in a visit: one where a call is long, else about 5 ms of them, at most 50."""
    return 1 if call_ms >= SHORT_MS else int(np.clip(np.ceil(VISIT_MS / max(call_ms, 1e-6)), 1, MAX_CALLS))


# The loop.


@dataclass(kw_only=True)
class _Arm:
    """An arm while it is measured; `visits` holds the timed calls of each block, ms."""

    label: str
    model: str
    call: Callable[[], object]
    placement: providers.Placement
    warmup_calls: int
    call_ms: float
    warm: bool
    visits: list[Floats] = field(default_factory=list)

    def visit(self) -> Floats:
        if self.call_ms < SHORT_MS:
            self.call()  # caches and workers come back from another arm
        return np.asarray([_timed(self.call) for _ in range(calls_per_visit(self.call_ms))])


def _timed(call: Callable[[], object]) -> float:
    """One call, ms."""
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


def _warmed(
    label: str, model: str, session: Any, feeds: dict[str, Any], placement: providers.Placement, seconds: float
) -> _Arm:
    """Call until the times settle, at least 3 times and for at most `seconds`."""
    outputs = [output.name for output in session.get_outputs()]
    providers.run_session(session, feeds, model)  # a failing model says so here, once
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < 3 or (not is_settled(times) and time.monotonic() < end):
        times.append(_timed(lambda: session.run(outputs, feeds)))
    return _Arm(
        label=label,
        model=model,
        call=lambda: session.run(outputs, feeds),
        placement=placement,
        warmup_calls=len(times) + 1,
        call_ms=float(np.median(times[-5:])),
        warm=is_settled(times),
    )


def _run_blocks(arms: list[_Arm], seconds: float, seed: int) -> tuple[float, Stopped]:
    """Fill the arms' visits, block by block; only whole blocks are kept. Returns the seconds taken and why it ended."""
    rng = np.random.default_rng([seed, *b"order"])
    look_at = ENOUGH_BLOCKS
    stopped: Stopped = "time"
    blocks: list[list[Floats]] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.monotonic()
    try:
        while not blocks or time.monotonic() - start < seconds:
            visits = {int(index): arms[index].visit() for index in rng.permutation(len(arms))}
            blocks.append([visits[index] for index in range(len(arms))])
            if len(blocks) == look_at:
                if is_precise(np.asarray([[np.median(times) for times in block] for block in blocks]).T, seed):
                    stopped = "precise"
                    break
                look_at += look_at // 2
    except KeyboardInterrupt:
        if len(blocks) < PARTIAL_BLOCKS:
            raise
        stopped = "interrupted"
    finally:
        if collecting:
            gc.enable()
    elapsed = time.monotonic() - start
    for arm, times in zip(arms, zip(*blocks, strict=True), strict=True):
        arm.visits = list(times)
    return elapsed, stopped


def _blocks(arms: Sequence[_Arm]) -> Floats:
    """The median of each visit: ms, `(arms, B)`."""
    return np.asarray([[np.median(times) for times in arm.visits] for arm in arms], np.float64)


def _summary(arm: _Arm, first: _Arm, seed: int) -> ArmResult:
    blocks, times = _blocks([first, arm]), np.concatenate(arm.visits)
    speedup, interval, words = None, None, "the arm that the others are compared with"
    if arm is not first:
        speedup, interval = compare(blocks[0], blocks[1], seed)
        words = verdict(speedup, interval, blocks.shape[1])
    return ArmResult(
        label=arm.label,
        model=arm.model,
        n=len(times),
        blocks=blocks.shape[1],
        median_ms=float(np.median(blocks[1])),
        median_interval_ms=interval_95(bootstrap_medians(blocks, seed)[1]),
        p90_ms=float(np.percentile(times, 90)),
        p99_ms=float(np.percentile(times, 99)) if len(times) >= 1000 else None,
        warmup_calls=arm.warmup_calls,
        warm=arm.warm,
        provider_nodes=arm.placement.provider_nodes,
        memcpy_nodes=arm.placement.memcpy_nodes,
        speedup=speedup,
        speedup_interval=interval,
        verdict=words,
    )


def _notes(arms: Sequence[_Arm], specs: Sequence[InputSpec], batch: int, provider: str, stopped: Stopped) -> list[str]:
    notes = []
    blocks = len(arms[0].visits)
    if blocks < ENOUGH_BLOCKS:
        notes.append(f"only {blocks} blocks: the intervals are rough; give more --seconds")
    if stopped == "interrupted":
        notes.append("interrupted: what was measured until then")
    if "CUDA" in provider:
        notes.append("onnxruntime computes float32 products in TF32 on CUDA unless told otherwise")
    firsts = [spec.shape[0] for spec in specs if spec.shape]
    if firsts and all(isinstance(dim, int) and dim != batch for dim in firsts):
        notes.append("the batch is fixed in the model: read it from the inputs' shapes")
    for arm in arms:
        if not arm.warm:
            notes.append(f"{arm.label}: times had not settled after {arm.warmup_calls} warm-up calls")
        elsewhere = sum(n for name, n in arm.placement.provider_nodes.items() if name != provider)
        if elsewhere:
            notes.append(f"{arm.label}: {elsewhere} nodes ran on other providers than {provider}")
    return notes


def _labels(models: Sequence[str | Path], labels: Sequence[str] | None) -> list[str]:
    if not models:
        raise UsageError("bench needs at least one ONNX file")
    if labels is None:
        stems = [Path(model).stem for model in models]
        names = stems if len(set(stems)) == len(stems) else [str(model) for model in models]
        earlier = [names[:i].count(name) for i, name in enumerate(names)]
        return [f"{name} ({n + 1})" if n else name for name, n in zip(names, earlier, strict=True)]
    if len(labels) != len(models):
        raise UsageError(f"labels must be one for each of the {len(models)} models, but got {list(labels)}")
    return list(labels)
