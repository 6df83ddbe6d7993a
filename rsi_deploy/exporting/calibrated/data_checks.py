"""Open the calibration data of an export, refuse qualities that they cannot show, and note where they are scarce."""

import math
from collections.abc import Mapping
from typing import Any

from rsi_deploy.calibration.calibration_data import BATCH, CalibrationData
from rsi_deploy.calibration.output_agreement import dense_outputs, measures_of
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.text_data import TextRows
from rsi_deploy.evaluation.intervals import share_at_least
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.planning.quality import KINDS, OPTIONS, Measure, QualityBudget
from rsi_deploy.planning.request import RankRequest

ENOUGH_ROWS = 4
"""Rows of calibration data for every input of a site below which the report warns."""


def opened_data(request: RankRequest, dense: DenseModel, seed: int, provider: str) -> CalibrationData:
    """Return the calibration data of a request, with a check part that is large enough for its quality.

    Raises:
        UsageError: data that do not fit the model, check data that share samples with the fit part, or a quality that
            the outputs do not have or that the check part cannot show.
    """

    def opened(source: Any, check_size: int | None) -> CalibrationData:
        return CalibrationData(
            source,
            dense.inputs,
            dense.preprocessing,
            request.calib_size,
            check_size=check_size,
            check_source=request.calib_check,
            seed=seed,
        )

    data, quality = opened(request.calib, request.check_size), request.quality
    if quality is None:
        return data
    if request.check_size is None and request.calib_check is None and not _are_windows(data):
        check_size = quality.check_size(data.available - request.calib_size)
        data = data if check_size is None else opened(data.fit.feeding.dataset, check_size)
    fits: tuple[Measure, ...] = ("output_error",)
    if quality.measure != "output_error":
        fits = fitting_measures(request, dense, provider)
    if quality.measure not in fits:
        found = KINDS[fits[0]] if fits[0] != "output_error" else "neither class scores nor embeddings"
        fitting = " or ".join(dict.fromkeys(OPTIONS[measure] for measure in fits))
        raise UsageError(
            f"{OPTIONS[quality.measure]} is for {KINDS[quality.measure]}, but this model's outputs are {found}; "
            f"type {fitting}"
        )
    _refuse_small_check(quality, data)
    return data


def fitting_measures(request: RankRequest, dense: DenseModel, provider: str) -> tuple[Measure, ...]:
    """Return the measures of quality that the model's outputs have, the best first, from some of the fit part."""
    whole = CalibrationData(request.calib or {}, dense.inputs, dense.preprocessing, request.calib_size)
    count = whole.axes.fixed or (1 if _are_windows(whole) else BATCH)
    some = CalibrationData(whole.fit.feeding.dataset, dense.inputs, dense.preprocessing, count, check_size=0)
    return measures_of(dense_outputs(dense.reference, some.fit, provider, dense.proto))


def _are_windows(data: CalibrationData) -> bool:
    """Return whether the samples are windows of text, each of which predicts many tokens."""
    text = data.fit.feeding.dataset
    return isinstance(text, TextRows) and text.is_decoder


def _refuse_small_check(quality: QualityBudget, data: CalibrationData) -> None:
    """Refuse a quality that the check part has too few samples to show."""
    samples = 0 if data.check is None else data.check.samples
    option = "--calib-check" if data.is_separate else "--calib"
    is_share = quality.measure == "agreement" and not _are_windows(data)
    if is_share and not quality.holds(highest := share_at_least(samples, samples) / 100):
        needed = quality.needed
        would_do = "no number of samples shows 100 %"
        if needed is not None:
            would_do = f"{option} with {needed if data.is_separate else 2 * needed:,} samples would do"
        raise UsageError(
            f"{quality}: the check part has {samples:,} samples, which can show {100 * highest:.1f} % at most; "
            f"{would_do}, or --min-agreement {_floor(100 * highest)}%"
        )
    if data.needed is not None:
        raise UsageError(
            f"{quality}: the check part has {samples:,} samples, too few to judge by; {option} with {data.needed} "
            f"samples would do"
        )


def _floor(percent: float) -> str:
    """Return a number of percent, rounded down to a tenth.

    Example:
        >>> _floor(95.42), _floor(98.0)
        ('95.4', '98')
    """
    return f"{math.floor(10 * percent) / 10:g}"


def remarks(streams: OnnxStreams, data: CalibrationData) -> list[str]:
    """Return notes on sites out of reach and on scarce data."""
    found = []
    if streams.unreachable:
        found.append(f"not calibrated: {listed(streams.unreachable)}")
    if streams.run_share < 1:
        found.append(
            f"factors are fitted to {round(streams.run_share * data.samples):,} of the {data.samples:,} samples, "
            "evenly spaced: they hold as many tokens as the widest site has rows"
        )
    rows = {site: count for site in streams.sites if (count := streams.rows_of(site.name))}
    scarce = [site for site, count in rows.items() if count < ENOUGH_ROWS * site.in_features]
    if scarce:
        site = min(scarce, key=lambda site: rows[site] / site.in_features)
        enough = data.samples_for(-(-ENOUGH_ROWS * site.in_features * data.samples // max(rows[site], 1)))
        there_are = f" (--calib-size; there are {data.available:,})" if data.has_more else ""
        found.append(
            f"{data.samples} samples of the fit{there_are} give {len(scarce)} sites fewer than {ENOUGH_ROWS} rows an "
            f"input ({site.name}: {rows[site]} rows for {site.in_features}); about {enough:,} samples would do"
        )
    return found


def listed(reasons: Mapping[str, str]) -> str:
    """Return the names by reason, a few of each.

    Example:
        >>> listed({"a": "shared", "b": "shared", "c": "nested"})
        'a, b (shared); c (nested)'
    """
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(who[:3])}{', ...' * (len(who) > 3)} ({why})" for why, who in names.items())
