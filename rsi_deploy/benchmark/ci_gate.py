"""Gates for CI: check a measurement against a stored baseline. Pure functions of two bench documents.

    quantity                                                                   condition
    slowdown   time of a model                                                 on the machine of the baseline
               time of a model over that of the first (base / now speedup)     if the first model is the same file
    drop       top-1 on the same evaluation data, percentage points            none

Without a baseline, the first model of the measurement takes its place.

**Slowdown** `now / base` has an interval from those of both runs (`intervals.ratio`: 95 % for times, 99 % for ratios
to the first model). The gate **fails** if the lower end is above the allowance, so that noise does not break builds. If
the allowance is inside the interval, the gate passes, and the report says that nothing is shown. An interrupted
measurement fails. Two runs on one machine also differ by changes between them, such as load and heat, which neither
interval includes. The ratio to a first model cancels these changes, so it is used wherever it is available.

**Drop** fails if top-1 is lower by more than the allowance. The samples are the same, so the difference is exact and
reproducible. McNemar's test is reported with it, if there is one.
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel

from rsi_deploy.benchmark.result import BenchDocument, BenchResult, VariantResult
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.core.types import Interval
from rsi_deploy.evaluation.intervals import ratio
from rsi_deploy.runtime.machine import Environment

Status = Literal["holds", "failed", "not shown"]


class Check(BaseModel, frozen=True, extra="forbid"):
    """One comparison with the baseline.

    Attributes:
        gate: quantity that is checked.
        status: result; `not shown` is a slowdown that is neither shown nor excluded, which passes.
        change: slowdown in percent, or drop in percentage points; above 0 is worse.
        interval: interval of the slowdown in percent; None for a drop.
        allowed: largest allowed `change`.
        sentence: description of the check.
    """

    gate: Literal["slowdown", "drop"]
    status: Status
    change: float
    interval: Interval | None
    allowed: float
    sentence: str


class GateReport(BaseModel, frozen=True, extra="forbid"):
    """All checks, and notes on the comparison."""

    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Return whether nothing failed."""
        return all(check.status != "failed" for check in self.checks)

    def enforce(self) -> None:
        """Raise an error if a gate failed.

        Raises:
            GateError: a gate failed; the message names every failure.
        """
        failed = [check.sentence for check in self.checks if check.status == "failed"]
        if failed:
            raise GateError(f"gate failed: {'; '.join(failed)}; --max-slowdown and --max-drop say what is allowed")


def check_gates(
    now: BenchDocument,
    baseline: BenchDocument | None = None,
    *,
    max_slowdown: float | None = None,
    max_drop: float | None = None,
) -> GateReport:
    """Check a measurement against a baseline.

    Args:
        now: measurement.
        baseline: stored measurement; None for the first model of `now`.
        max_slowdown: largest allowed slowdown in percent.
        max_drop: largest allowed drop of top-1 in percentage points.

    Raises:
        UsageError: nothing to check, or the two cannot be compared: different machines without a common first model,
            different configurations, models or evaluation data.
    """
    if max_slowdown is None and max_drop is None:
        raise UsageError("a baseline gates nothing by itself: add --max-slowdown 5% or --max-drop 0.5")
    if baseline is None and len(now.arms) < 2:
        raise UsageError("there is nothing to compare with: give --baseline result.json, or a second model")
    checks: list[Check] = []
    notes: list[str] = []
    if max_slowdown is not None:
        if baseline is None:
            checks += _own_slowdowns(now, max_slowdown)
        else:
            found, said = _slowdowns(now, baseline, max_slowdown)
            checks, notes = checks + found, notes + said
    if max_drop is not None:
        checks += _drops(now, baseline, max_drop)
    return GateReport(checks=tuple(checks), notes=tuple(notes))


def machine_differences(a: Environment, b: Environment) -> list[str]:
    """Describe the differences of two machines that affect times. Package versions do not count."""
    differences = [
        f"{name} {theirs} there, {ours} here"
        for name, theirs, ours in (
            ("CPU", a.cpu, b.cpu),
            ("cores", a.cores, b.cores),
            ("GPUs", ", ".join(a.gpus) or "none", ", ".join(b.gpus) or "none"),
        )
        if theirs != ours
    ]
    if abs(a.memory_bytes - b.memory_bytes) > 0.1 * max(a.memory_bytes, b.memory_bytes):
        differences.append(f"memory {a.memory_bytes / 1e9:.1f} GB there, {b.memory_bytes / 1e9:.1f} GB here")
    return differences


def slowdown_check(what: str, against: str, slower: float, ends: Interval, allowed: float) -> Check:
    """Check a slowdown (1 for none) against its allowance in percent."""
    change, (low, high) = 100 * (slower - 1), (100 * (ends[0] - 1), 100 * (ends[1] - 1))
    status: Status = "failed" if low > allowed else "holds" if high <= allowed else "not shown"
    words = {
        "failed": f"more than the {allowed:g} % allowed",
        "holds": f"within the {allowed:g} % allowed",
        "not shown": f"which neither shows nor excludes more than the {allowed:g} % allowed; more --seconds would tell",
    }
    moved = f"{abs(change):.1f} % {'slower' if change >= 0 else 'faster'} than {against}"
    sentence = f"{what}: {moved} [{low:+.1f}, {high:+.1f}], {words[status]}"
    return Check(
        gate="slowdown", status=status, change=change, interval=(low, high), allowed=allowed, sentence=sentence
    )


def _own_slowdowns(now: BenchDocument, allowed: float) -> list[Check]:
    """Check every other model against the first one."""
    checks = []
    for cell in now.cells:
        for variant in cell.arms[1:]:
            what, first = f"{variant.label}, {cell.name}", cell.arms[0].label
            if cell.partial or variant.speedup is None or variant.speedup_interval is None:
                checks.append(_cut_short(what, allowed))
                continue
            low, high = variant.speedup_interval
            checks.append(slowdown_check(what, first, 1 / variant.speedup, (1 / high, 1 / low), allowed))
    return checks


def _slowdowns(now: BenchDocument, baseline: BenchDocument, allowed: float) -> tuple[list[Check], list[str]]:
    """Check every model against the same one of the baseline."""
    before = {_key(cell): cell for cell in baseline.cells}
    pairs = [(cell, before[_key(cell)]) for cell in now.cells if _key(cell) in before]
    missing = [cell.name for cell in baseline.cells if _key(cell) not in {_key(c) for c in now.cells}]
    if missing or not pairs:
        there, here = ("; ".join(map(_described, document.cells)) for document in (baseline, now))
        raise UsageError(
            f"--baseline was measured with {there}, but this run with {here}: times of other configurations do not "
            f"compare; measure with the baseline's options"
        )
    names = _partners(now, baseline)
    with_ratio = len(now.arms) > 1 and len(baseline.arms) > 1 and now.arms[0].sha256 == baseline.arms[0].sha256
    differences = machine_differences(baseline.environment, now.environment)
    if differences and not with_ratio:
        raise UsageError(
            f"--baseline was measured on another machine ({'; '.join(differences)}), so times cannot be compared: "
            f"measure a baseline here, or give both runs the same first model (bench dense.onnx model.onnx) to "
            f"compare ratios to it"
        )
    notes = [f"another machine than the baseline's ({'; '.join(differences)}): ratios only"] * bool(differences)
    checks = []
    for cell, old in pairs:
        if old.partial:
            raise UsageError(f"--baseline was interrupted ({old.name}): measure it again, with more --seconds")
        theirs = {variant.label: variant for variant in old.arms}
        for place, variant in enumerate(cell.arms):
            if place or not with_ratio:
                checks.append(_against(cell, variant, theirs[names[variant.label]], allowed, with_ratio=with_ratio))
            elif not differences:
                moved, (low, high) = _times(variant, theirs[names[variant.label]])
                notes.append(
                    f"{variant.label}, {cell.name}: {moved:.2f}x the baseline's time [{low:.2f}, {high:.2f}]; the "
                    f"others are compared with it, and it gates nothing"
                )
    return checks, notes


def _against(
    cell: BenchResult, variant: VariantResult, old: VariantResult, allowed: float, *, with_ratio: bool
) -> Check:
    what = f"{variant.label}, {cell.name}"
    if cell.partial:
        return _cut_short(what, allowed)
    if not with_ratio:
        return slowdown_check(what, "the baseline", *_times(variant, old), allowed)
    if not (variant.speedup and variant.speedup_interval and old.speedup and old.speedup_interval):
        return _cut_short(what, allowed)
    slower, ends = ratio(old.speedup, old.speedup_interval, variant.speedup, variant.speedup_interval)
    return slowdown_check(what, f"the baseline, over {cell.arms[0].label}'s time", slower, ends, allowed)


def _times(variant: VariantResult, old: VariantResult) -> tuple[float, Interval]:
    return ratio(variant.median_ms, variant.median_interval_ms, old.median_ms, old.median_interval_ms)


def _cut_short(what: str, allowed: float) -> Check:
    sentence = f"{what}: measured too briefly for a verdict; give more --seconds"
    return Check(gate="slowdown", status="failed", change=0.0, interval=None, allowed=allowed, sentence=sentence)


def _drops(now: BenchDocument, baseline: BenchDocument | None, allowed: float) -> list[Check]:
    """Check top-1 of every model against the baseline, or against the first model."""
    if not any(found.top1 is not None for found in now.accuracy.values()):
        raise UsageError("--max-drop is about top-1 on labelled data: add --data DATA")
    labels = [variant.label for variant in now.arms if variant.label in now.accuracy]
    if baseline is None:
        source, against, labels = now, labels[0], labels[1:]
        names: Mapping[str, str] = dict.fromkeys(labels, against)
    else:
        source, against, names = baseline, "the baseline", _partners(now, baseline)
    checks = []
    for label in labels:
        after, before = now.accuracy[label], source.accuracy.get(names[label])
        if before is None or before.top1 is None or after.top1 is None:
            raise UsageError(f"--baseline holds no top-1 of {names[label]}: measure it with --data DATA")
        if (before.data_fingerprint, before.samples) != (after.data_fingerprint, after.samples):
            raise UsageError(
                f"--baseline was evaluated on other data ({before.samples:,} samples, {before.data_fingerprint[:8]}; "
                f"here {after.samples:,}, {after.data_fingerprint[:8]}): give the baseline's --data, or measure anew"
            )
        drop = before.top1 - after.top1
        cut = after.partial or before.partial
        failed = drop > allowed + 1e-9 or cut
        direction = f"{abs(drop):.2f} points {'below' if drop > 0 else 'above'}" if drop else "as"
        words = f"top-1 {after.top1:.2f} %, {direction} {against}'s {before.top1:.2f} %"
        tested = f" ({after.paired.verdict})" if baseline is None and after.paired else ""
        within = "interrupted, so there is no verdict" * cut or (
            f"{'more than' if failed else 'within'} the {allowed:g} allowed"
        )
        checks.append(
            Check(
                gate="drop",
                status="failed" if failed else "holds",
                change=drop,
                interval=None,
                allowed=allowed,
                sentence=f"{label}: {words}{tested}, {within}",
            )
        )
    return checks


def _partners(now: BenchDocument, baseline: BenchDocument) -> dict[str, str]:
    """Return label -> label in the baseline, by name or else by position."""
    ours, theirs = [variant.label for variant in now.arms], [variant.label for variant in baseline.arms]
    if set(ours) <= set(theirs):
        return {label: label for label in ours}
    if len(ours) == len(theirs):
        return dict(zip(ours, theirs, strict=True))
    raise UsageError(
        f"--baseline holds {', '.join(theirs)}, but this run {', '.join(ours)}: give as many models in the same order"
    )


def _key(cell: BenchResult) -> tuple[object, ...]:
    return cell.batch, tuple(sorted(cell.inputs.items())), cell.threads, cell.precision, cell.provider, cell.pinned


def _described(cell: BenchResult) -> str:
    return f"{cell.name} on {cell.provider} ({', '.join(cell.inputs.values())})"
