"""`bench --baseline` and `bench --compare`: measurements held against stored ones."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from rsi_deploy.benchmark.settings import BenchConfig
from rsi_deploy.cli.terminal import console
from rsi_deploy.core.errors import UsageError

if TYPE_CHECKING:
    from rsi_deploy.benchmark.result import BenchDocument


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The gates of a measurement.

    Attributes:
        baseline: stored result to compare with; None is the first model of the run.
        max_slowdown: largest slowdown, percent.
        max_drop: largest loss of top-1, percentage points.
    """

    baseline: "BenchDocument | None"
    max_slowdown: float | None
    max_drop: float | None

    def enforce(self, now: "BenchDocument", *, as_json: bool) -> None:
        """Show every check and fail where one does; beside a JSON document they go to stderr.

        Raises:
            GateError: a gate failed, in one sentence.
            UsageError: the two cannot be compared.
        """
        from rsi_deploy.benchmark.ci_gate import check_gates
        from rsi_deploy.report.tables.comparison import print_gates

        report = check_gates(now, self.baseline, max_slowdown=self.max_slowdown, max_drop=self.max_drop)
        print_gates(console(stderr=as_json), report)
        report.enforce()


def requested_gates(settings: BenchConfig, *, models: Sequence[str]) -> Gates | None:
    """Return the gates, None without any; what is wrong with them is refused before the measurement.

    Raises:
        UsageError: gates that cannot be checked.
        ModelError: a baseline of another version.
    """
    baseline, max_slowdown, max_drop = settings.baseline, settings.max_slowdown, settings.max_drop
    if baseline is None and max_slowdown is None and max_drop is None:
        return None
    from rsi_deploy.benchmark.result import read_bench

    if max_slowdown is None and max_drop is None:
        raise UsageError("--baseline gates nothing by itself: add --max-slowdown 5% or --max-drop 0.5")
    if baseline is None and len(models) < 2:
        raise UsageError("a gate needs something to compare with: --baseline result.json, or a second model")
    if max_drop is not None and settings.data is None:
        raise UsageError("--max-drop is about top-1 on labelled data: add --data DATA")
    stored = None if baseline is None else read_bench(baseline)
    if stored is not None and max_drop is not None and not stored.accuracy:
        raise UsageError(f"--max-drop: {baseline} holds no accuracy; measure it again with --data DATA")
    return Gates(baseline=stored, max_slowdown=max_slowdown, max_drop=max_drop)


def show_comparison(paths: Sequence[str], *, as_json: bool) -> None:
    """Show results of several devices side by side.

    Raises:
        UsageError: fewer than two, no such file, or nothing in common.
        ModelError: a result of another version.
    """
    from rsi_deploy.benchmark.compare import compare_documents, device_names
    from rsi_deploy.benchmark.result import read_bench
    from rsi_deploy.report.tables.comparison import print_comparison

    if wrong := [path for path in paths if path.endswith(".onnx")]:
        raise UsageError(f"--compare takes results of bench --json, but got the model {wrong[0]}; measure it first")
    documents = [read_bench(path) for path in paths]
    if len(set(paths)) < len(paths):
        raise UsageError(f"--compare: the same result twice in {', '.join(paths)}; leave one out")
    result = compare_documents(dict(zip(device_names(paths), documents, strict=True)))
    if as_json:
        click.echo(json.dumps(result.model_dump(mode="json"), indent=2))
    else:
        print_comparison(console(), result)
