"""The tables and sentences of a report, for the terminal, the page and the model card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from rsi_deploy.benchmark.result import VariantResult
from rsi_deploy.core.sites import site_name
from rsi_deploy.core.text import human_bytes as human_bytes
from rsi_deploy.core.text import share_kept, size_change
from rsi_deploy.planning.quality import OPTIONS, parse_quality
from rsi_deploy.report.table import Table, Tone, with_interval

if TYPE_CHECKING:  # a machine that only measures has no torch
    from rsi_deploy.calibration.record import CalibrationRecord, OutputQuality
    from rsi_deploy.core.sites import SiteRecord
    from rsi_deploy.onnx_models.inspection import SiteView
    from rsi_deploy.planning.record import PlanRecord
    from rsi_deploy.planning.settings import ExportSettings
    from rsi_deploy.precision.record import PrecisionPoint, PrecisionRecord
    from rsi_deploy.report.schema import Report

Row = tuple[str, str, str, str]

NORMALIZED = "Normalized error: spectral error divided by the smallest possible at this rank; 1.00 is optimal."

RESPONSE = (
    "Response error: share of the variance of a site's output that is lost, on calibration data left out of the fit. "
    "In-sample: the same on the samples that its factors are fitted to."
)
LOSS = "Loss: estimated change of the model's outputs by the split of this site alone."
JOINT = (
    "Sites split jointly share one right factor and the node that multiplies their input by it; its numbers and MACs "
    "count at the first of them. Together they hold fewer numbers than apart, and none has a larger error. Their "
    "normalized errors compare with the optimum of that rank for each site alone."
)

CHECKS = {
    "exporter": "the source against the dense ONNX model",
    "surgery": "a full-rank split against the dense model, pivoted splits against plain ones; only rounding may differ",
    "approximation": "the compressed against the dense model",
}
"""Check of `Verification` -> what is compared."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A value of `OutputQuality`, and how it is shown.

    Attributes:
        name: name for users.
        field: name of the field.
        form: format of the number.
        unit: unit with a space before it, or "".
        factor: factor from the field to the unit.
    """

    name: str
    field: str
    form: str
    unit: str = ""
    factor: float = 1

    def text(self, quality: "OutputQuality", *, interval: bool = True) -> str:
        """Return the value, and its interval if there is one; "" where the outputs do not have the value."""
        value, ends = self.value(quality), self.interval(quality) if interval else None
        return "" if value is None else with_interval(f"{value:{self.form}}{self.unit}", ends, self.form)

    def value(self, quality: "OutputQuality") -> float | None:
        """Return the value in its unit."""
        value = getattr(quality, self.field)
        return None if value is None else self.factor * value

    def interval(self, quality: "OutputQuality") -> tuple[float, float] | None:
        """Return the interval of the value in its unit."""
        ends = getattr(quality, f"{self.field}_interval")
        return None if ends is None else (self.factor * ends[0], self.factor * ends[1])


QUALITY = (
    Measure(name="perplexity, times dense's", field="perplexity_ratio", form=".4f"),
    Measure(name="perplexity", field="perplexity", form=",.2f"),
    Measure(name="agreement", field="agreement", form=".1f", unit=" %"),
    Measure(name="mean cosine", field="cosine", form=".4f"),
    Measure(name="1st percentile of the cosine", field="worst_cosine", form=".4f"),
    Measure(name="neighbours kept", field="neighbours", form=".1f", unit=" %"),
    Measure(name="output error", field="output_error", form=".2g", unit=" %", factor=100),
    Measure(name="KL divergence", field="divergence", form=".2g"),
)
"""The values of an `OutputQuality`, the most important one first."""


# -- the whole model


def verdict(report: "Report") -> str:
    """Return the changes of size, time and accuracy in one sentence."""
    parts = [size_change(report.dense.bytes, report.compressed.bytes)]
    if report.plan is not None and report.plan.delivers_dense:
        parts.insert(0, f"the DENSE model is delivered: no smaller one that was tried keeps {report.plan.limit}")
    parts.append(report.latency.arms[1].verdict if report.latency else "latency not measured")
    if report.accuracy and report.accuracy.dense.top1 is not None and report.accuracy.compressed.top1 is not None:
        parts.append(f"top-1 {report.accuracy.compressed.top1 - report.accuracy.dense.top1:+.2f} points")
    if c := report.calibration:
        kept = f"{quality_words(c.quality)[0]} {'in-sample' if c.checked is None else 'on the check part'}"
        if c.quality.is_broken:
            parts[0] = f"the outputs are broken ({kept}); {parts[0]}"
        elif report.accuracy is None:
            parts.append(kept)
    return ", ".join(parts) + "."


def request_text(settings: "ExportSettings") -> str:
    """Return method, rank or budget, and seed of an export in a few words."""
    q = f", q = {settings.power_iterations}" if settings.method == "rsi" else ""
    fitted = ", fitted to calibration data" if settings.factors == "response" else ""
    return f"{settings.method}{q}, {settings.budget or f'rank {settings.rank}'}{fitted}, seed {settings.seed}"


def comparison_table(report: "Report") -> Table:
    """Return size, accuracy and latency of the dense and of the compressed model."""
    return Table(
        caption="Accuracy, size and latency",
        columns=("", "#dense", "#compressed", "change"),
        rows=comparison_rows(report),
    )


def comparison_rows(report: "Report") -> list[Row]:
    """Return (quantity, dense, compressed, change) for accuracy, size and latency, as far as they were measured."""
    d, c = report.dense, report.compressed
    rows: list[Row] = [
        *_accuracy_rows(report),
        ("file", human_bytes(d.bytes), human_bytes(c.bytes), size_change(d.bytes, c.bytes)),
        ("parameters", f"{d.params:,}", f"{c.params:,}", share_kept(d.params, c.params)),
    ]
    if d.macs:  # unknown if the model could not be run
        rows.append(("MACs a sample", f"{d.macs:,}", f"{c.macs:,}", share_kept(d.macs, c.macs)))
    if report.latency:
        dense, compressed = report.latency.arms
        name = f"latency, batch {report.latency.batch}"
        rows.append((name, _milliseconds(dense), _milliseconds(compressed), compressed.verdict))
    return rows


def probe_inputs(report: "Report") -> str:
    """Return which inputs the checks of the export compare outputs on: they are not calibration data."""
    return "the inputs of --feeds" if report.probe_given else "random inputs"


def checks_table(report: "Report") -> Table:
    """Return the relative error of the outputs in each check of the export."""
    rows = []
    for name, compared in CHECKS.items():
        found = getattr(report.verification, name)
        if found is None:
            rows.append((name, compared, "not measured", "", ""))
            continue
        tolerance = "none" if found.tolerance is None else f"{found.tolerance:.0e}"
        result = "" if found.tolerance is None else "holds"
        result = result if found.informative else "not informative"
        error = f"{found.relative_l2:.1e}" if found.relative_l2 < 1e-3 else f"{found.relative_l2:.3f}"
        rows.append((name, compared, error, tolerance, result))
    return Table(
        caption=f"Relative error of the outputs on {probe_inputs(report)}",
        columns=("check", "compared", "#error", "#tolerance", "result"),
        rows=rows,
    )


def evidence_lines(report: "Report") -> list[str]:
    """Return what planning has tried, what limits the quality on the data, and the softmax bound, a line each."""
    lines = plan_lines(report)
    if report.calibration is not None:
        lines += quality_limits(report.calibration)
    if b := report.softmax_bound:
        lines.append(
            f"softmax bound, {site_name(b.site)} split alone: top-1 unchanged for at least "
            f"{b.guaranteed_unchanged:.1f} % of the samples, observed {b.observed_unchanged:.1f} % "
            f"({b.violations} violations)"
        )
    return lines


def plan_lines(report: "Report") -> list[str]:
    """Return what planning has foreseen and tried, a line each."""
    plan = report.plan
    if plan is None:
        return []
    lines = []
    if plan.trials:
        why = "no size was set, so this is the limit: " if plan.is_default else ""
        goal = "fastest" if plan.is_fastest else "smallest"
        found = "none but the dense one" if plan.delivers_dense else f"the {goal} of {len(plan.trials)} that were tried"
        lines.append(f"{why}{plan.limit}: {found}; at each share of the {plan.unit}: {_trials(plan)}")
    if plan.foreseen is not None and plan.shown is not None:
        worse = "" if plan.worse is None else f", {plan.worse:.2g} times as much"
        lines.append(
            f"the plan foresaw a loss of {plan.foreseen:.2g} (relative output distance and KL, site by site); the "
            f"check part shows {plan.shown:.2g}{worse}"
        )
    if plan.given_back:
        lines.append(
            f"{', '.join(plan.given_back)}: dense again, because the check part showed that the split costs more than "
            f"was foreseen; so the check part chose something, and its values are a little too good"
        )
    return lines


def _trials(plan: "PlanRecord") -> str:
    """Return the trials of a search in words, from the largest share; a lone value is a one-sided 95 % limit."""
    option = plan.limit.split()[0]

    def text(value: float) -> str:
        if option == "--max-drop":
            return f"{value:+.2f} points lost"
        if option == OPTIONS["perplexity"] and (budget := parse_quality(*plan.limit.split()[:2])) is not None:
            return f"at most {budget.text(value)}"
        sign = "at most " if option == "--max-output-error" else "at least "
        return f"{sign}{value:.4f}" if option == "--min-cosine" else f"{sign}{100 * value:.3g} %"

    words = [
        f"{trial.share:.1%} {'no finite outputs' if trial.value is None else text(trial.value)}"
        f"{'' if trial.holds else ' (missed)'}"
        for trial in sorted(plan.trials, key=lambda trial: -trial.share)
    ]
    return ", ".join(words)


def quality_table(report: "Report") -> Table:
    """Return the quality of the outputs on the check part, with intervals, and in-sample; empty without calibration."""
    c = report.calibration
    caption = "Outputs on calibration data, compressed against dense"
    if c is None:
        return Table(caption=caption, columns=("",), rows=[])
    checked = c.quality
    name = "--calib-check" if c.is_separate else "check part"
    columns = ("", f"#{name}", "#in-sample")
    counts = ("samples", f"{checked.samples:,}", f"{c.in_sample.samples:,}")
    table = Table(caption=caption, columns=columns, rows=[counts, *quality_rows(checked, c.in_sample)])
    return table.without(columns[1:2]) if c.checked is None else table


def quality_words(quality: "OutputQuality") -> list[str]:
    """Return the values of a quality, each with its name, the most important one first."""
    words = [f"{name} {value}" for name, _, value in quality_rows(quality, quality)]
    return words or ["the dense outputs are all zero"]


def quality_rows(checked: "OutputQuality", in_sample: "OutputQuality") -> list[tuple[str, str, str]]:
    """Return (quantity, value with interval on the check part, value in-sample), the most important one first."""
    return [
        (measure.name, measure.text(checked), measure.text(in_sample, interval=False))
        for measure in QUALITY
        if measure.value(checked) is not None
    ]


def quality_limits(record: "CalibrationRecord") -> list[str]:
    """Return what the quality on calibration data cannot show, a sentence each."""
    lines = []
    if record.quality.output_error is None:
        lines.append("all outputs of the dense model are zero on the calibration data: nothing can be compared")
    if record.checked is None:
        lines.append("no check part: every calibration sample is in the fit, so the values are in-sample")
    if record.needed is not None:
        option = "--calib-check" if record.is_separate else "--calib"
        lines.append(
            f"too few samples for a verdict: the check part has {record.check_samples}; {option} with {record.needed} "
            f"samples would do"
        )
    if record.quality.is_sure:
        lines.append(
            f"the dense model is {record.quality.confidence:.1%} sure of its answers on these samples, as models are "
            f"on training samples; if they are, new samples keep less than stated: add --calib-check with new ones"
        )
    return lines


# -- the choice of a precision


def points_table(report: "Report") -> Table:
    """Return size, quality and speed-up of every model that might be delivered; empty without a choice."""
    record, caption = report.precision, "Models that were compared; intervals: 95 % for outputs, 99 % for speed-ups"
    if record is None:
        return Table(caption=caption, columns=("",), rows=[])
    measure, rows, dense = point_measure(record), [], record.points[0].bytes
    for number, point in enumerate(record.points, 1):
        quality = "" if point.quality is None or measure is None else measure.text(point.quality)
        speed = "" if point.speedup is None else with_interval(f"{point.speedup:.2f}x", point.speedup_interval)
        size = "" if point.bytes is None else human_bytes(point.bytes)
        kept = "" if point.bytes is None or dense is None else share(point.bytes, dense)
        rows.append((f"{number}. {point.name}", size, kept, quality, speed, point_state(point)))
    name = "quality" if measure is None else measure.name
    columns = ("model", "#bytes", "#of dense", f"#{name}", "#speed-up", "result")
    tones: list[Tone] = [
        "good" if point.is_delivered else "bad" if point.error else "neutral" for point in record.points
    ]
    table = Table(caption=caption, columns=columns, rows=rows, details=("#of dense",), tones=tones)
    return table.without_empty((f"#{name}", "#speed-up"))


def point_state(point: "PrecisionPoint") -> str:
    """Return whether a model is delivered, misses the limit, or could not be made."""
    if point.error:
        return point.error
    return "delivered" if point.is_delivered else "" if point.keeps_limit else "misses the limit"


def precision_lines(report: "Report") -> list[str]:
    """Return what was delivered and why, and the bits of the weights, a line each."""
    record = report.precision
    if record is None:
        return []
    delivered = record.delivered
    target = f" for {record.target}" if record.target else ""
    lines = [f"--precision {record.request} delivers {delivered.name}{target}: {record.rule}"]
    if delivered.is_rival and delivered.scheme == "float32":
        lines.append("the dense model is delivered as it is")
    elif delivered.is_rival:
        lines.append(
            f"the delivered model, {delivered.name}, is the dense model as onnxruntime's own tools quantize it: no "
            "weight is split"
        )
    for what, bits in (("weights", record.bits), ("embedding tables", record.tables)):
        if bits:
            counts = [f"{count} in {width} bits" for width, count in sorted(Counter(bits.values()).items())]
            lines.append(f"{what}: {', '.join(counts)}")
    if record.operators:
        lines.append(f"onnxruntime runs {_operators_text(record.operators)}")
    return lines


CONVERSIONS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
"""Operators that turn numbers into codes or back, and cost time of their own."""


def _operators_text(operators: Mapping[str, int]) -> str:
    """Return how many products run as which operator, and how many conversions between types remain."""
    from graph_passes import multiplies_by_weights  # loads onnx

    products = [f"{count} {name}" for name, count in operators.items() if multiplies_by_weights(name)]
    conversions = [f"{operators[name]} {name}" for name in CONVERSIONS if name in operators]
    others = sum(operators.values()) - sum(int(text.split()[0]) for text in (*products, *conversions))
    between = ", ".join(conversions) or "no conversion between types"
    return f"{', '.join(products) or 'no product'}; {between}; {others} other nodes"


def point_measure(record: "PrecisionRecord") -> Measure | None:
    """Return the most important value that the outputs of the compared models have; None where they have none."""
    qualities = [point.quality for point in record.points if point.quality is not None]
    known = (measure for measure in QUALITY if any(measure.value(quality) is not None for quality in qualities))
    return next(known, None)


# -- sites


def site_table(sites: "Sequence[SiteRecord]", bits: Mapping[str, int] = MappingProxyType({})) -> Table:
    """Return operation, shape, rank, size, errors and decision of each site; columns without values are left out.

    Args:
        sites: the sites.
        bits: name of a site or of its node -> bits in which its weight is stored, where they are known.
    """
    errors = ("#normalized error", "#spectral error", "#response error", "#in-sample")
    rows = [
        (
            s.name,
            operation(s),
            shape(s),
            str(s.rank or ""),
            next((str(bits[name]) for name in (s.name, *s.nodes) if name in bits), ""),
            share(s.params_compressed, s.params_dense),
            macs_kept(s),
            normalized_error(s),
            "" if s.spectral_error is None else f"{s.spectral_error:.3f}",
            response_error(s),
            in_sample_error(s),
            s.outcome if s.reason == s.outcome else f"{s.outcome}: {s.reason}",
        )
        for s in sites
    ]
    columns = ("site", "operation", "#out x in", "#rank", "#bits", "#kept", "#MACs kept", *errors, "decision")
    table = Table(caption="Sites", columns=columns, rows=rows, details=("#kept", "#spectral error", "#in-sample"))
    return table.without_empty(("#bits", "#MACs kept", *errors))


def site_notes(sites: "Sequence[SiteRecord]") -> list[str]:
    """Return the explanations of the columns and decisions of `site_table`."""
    notes = {
        NORMALIZED: any(map(normalized_error, sites)),
        RESPONSE: any(map(response_error, sites)),
        LOSS: any(s.reason.startswith("loss ") for s in sites),
        JOINT: any(s.joint for s in sites),
    }
    return [note for note, applies in notes.items() if applies]


def operation(site: "SiteRecord") -> str:
    """Return the operation of a site, with the form of the split for a Conv."""
    return site.kind if site.form in (None, "matmul", "gemm") else f"{site.kind} {site.form}"


def shape(site: "SiteRecord | SiteView") -> str:
    """Return "out x in" of a weight, and the number of its groups."""
    if not site.out_features:
        return ""
    return f"{site.out_features} x {site.in_features}" + f" x {site.groups} groups" * (site.groups > 1)


def macs_kept(site: "SiteRecord") -> str:
    """Return the share of a site's MACs that is left; "" if unknown."""
    return "" if site.macs_compressed is None else share(site.macs_compressed, site.macs_dense or 0)


def normalized_error(site: "SiteRecord") -> str:
    """Return the error divided by the optimum, after "≤" for an upper bound; "" if it was not measured."""
    if site.normalized_error is None:
        return ""
    return f"{'≤ ' if site.normalized_error_kind != 'exact' else ''}{site.normalized_error:.2f}"


def response_error(site: "SiteRecord") -> str:
    """Return the held-out response error in percent, or the in-sample one; "" for factors that fit no data."""
    error = site.response_error if site.held_out_error is None else site.held_out_error
    return "" if error is None else f"{100 * error:.2g} %"


def in_sample_error(site: "SiteRecord") -> str:
    """Return the in-sample response error in percent beside a held-out one; "" without."""
    if site.held_out_error is None or site.response_error is None:
        return ""
    return f"{100 * site.response_error:.2g} %"


def share(after: int, before: int) -> str:
    """Return `after` in percent of `before`; "" if that is 0."""
    return f"{100 * after / before:.1f} %" if before else ""


def _milliseconds(arm: VariantResult) -> str:
    return with_interval(f"{arm.median_ms:.3f} ms", arm.median_interval_ms, ".3f")


def _accuracy_rows(report: "Report") -> list[Row]:
    if report.accuracy is None:
        return []
    dense, compressed = report.accuracy.dense, report.accuracy.compressed
    rows: list[Row] = []
    for name, a, b in (("top-1", dense.top1, compressed.top1), ("top-5", dense.top5, compressed.top5)):
        if a is not None and b is not None:
            tested = compressed.paired if name == "top-1" else None
            ends = None if tested is None else tested.change_interval
            rows.append((name, f"{a:.2f} %", f"{b:.2f} %", with_interval(f"{b - a:+.2f} points", ends, "+.2f")))
    if compressed.agreement is not None:
        rows.append(("same answer as dense", "", f"{compressed.agreement:.2f} %", f"of {compressed.samples} samples"))
    return rows
