"""What unseen data keep of a model, as `inspect --calib` finds it: site by site, and for the whole at several sizes."""

import pydantic

from rsi_deploy.calibration.record import OutputQuality
from rsi_deploy.planning.quality import DEFAULTS, QualityBudget
from rsi_deploy.report.summary import quality_words
from rsi_deploy.report.table import Table


class SiteOutlook(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A site that is split at half of its break-even rank, where the split halves its parameters.

    Attributes:
        name: name of the site.
        form: form of the split.
        rank: rank of the split.
        held_out: response error on samples that the factors are not fitted to; None if it is not known.
        in_sample: response error on the samples of the fit.
    """

    name: str
    form: str
    rank: int
    held_out: float | None
    in_sample: float


class PointOutlook(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A fitted model of a size.

    Attributes:
        share: share of the dense model's parameters.
        quality: quality on the check part; None if the outputs are not finite.
    """

    share: float
    quality: OutputQuality | None


class Outlook(pydantic.BaseModel, frozen=True, extra="forbid"):
    """What unseen data keep.

    Attributes:
        samples: number of samples of the fit part.
        check_samples: number of samples of the check part.
        sites: every site that calibration reaches and a split makes smaller.
        points: fitted models, from the largest; sizes that no plan reaches are left out.
    """

    samples: int
    check_samples: int
    sites: tuple[SiteOutlook, ...]
    points: tuple[PointOutlook, ...]

    @property
    def verdict(self) -> str:
        """The smallest size tried that keeps the quality of an export without a size, in words."""
        if not self.points:
            return "no plan makes this model smaller by a tenth: it cannot be compressed so"
        kept = [point for point in self.points if _keeps(point.quality)]
        if kept:
            smallest = min(kept, key=lambda point: point.share)
            return f"about {smallest.share:.0%} of the parameters keep {_limit(smallest.quality)} on unseen data"
        largest = max(self.points, key=lambda point: point.share)
        words = "no finite outputs" if largest.quality is None else quality_words(largest.quality)[0]
        return (
            f"this model can hardly be compressed with these data: at {largest.share:.0%} of the parameters unseen "
            f"data keep {words}"
        )


def site_outlook(outlook: Outlook) -> Table:
    """Return the response errors of every site."""
    rows = [
        (
            site.name,
            site.form,
            str(site.rank),
            "" if site.held_out is None else f"{100 * site.held_out:.2g} %",
            f"{100 * site.in_sample:.2g} %",
        )
        for site in outlook.sites
    ]
    columns = ("site", "form", "#rank", "#response error, held out", "#in-sample")
    return Table(
        caption="Sites at half of their parameters, fitted one after another", columns=columns, rows=rows
    ).without_empty(columns[3:4])


def point_outlook(outlook: Outlook) -> Table:
    """Return the quality of the whole model at every size."""
    rows = []
    for point in outlook.points:
        words = ["no finite outputs"] if point.quality is None else quality_words(point.quality)
        rows.append((f"{point.share:.0%}", ", ".join(words)))
    caption = f"The whole model on {outlook.check_samples:,} samples that fit nothing"
    return Table(caption=caption, columns=("#parameters", "outputs"), rows=rows)


def _budget(quality: OutputQuality) -> QualityBudget:
    measures = ("perplexity_ratio", "agreement", "cosine", "output_error")
    return QualityBudget.default(next(m for m in measures if m in DEFAULTS and getattr(quality, m) is not None))


def _keeps(quality: OutputQuality | None) -> bool:
    """Return whether the value itself, without its interval, keeps the default quality."""
    if quality is None or quality.output_error is None:
        return False
    budget = _budget(quality)
    value = getattr(quality, budget.measure)
    return budget.holds(value / 100 if budget.measure == "agreement" else value)


def _limit(quality: OutputQuality | None) -> str:
    """Return the default quality in words."""
    assert quality is not None
    budget = _budget(quality)
    words = {"agreement": "an agreement of", "cosine": "a mean cosine of", "output_error": "an output error of at most"}
    if budget.measure == "perplexity_ratio":
        return f"a perplexity of at most {budget.text(budget.limit)}"
    return f"{words[budget.measure]} {budget.text(budget.limit)}"
