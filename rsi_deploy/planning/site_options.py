"""What calibration makes of a model: options for the planner, and factors site by site in execution order.

    survey    --> for every site: (form, rank, cost, loss)     the planner chooses one each
    sequence  --> for every site: factors and bias, fitted to what the sites before it have become

A form and rank leaves a response error e of its site. What that does to the model's outputs is measured, not assumed:
the site alone is replaced at three levels of e, the outputs' distance read off, and between the levels it is a power
law. So a site whose error destroys the outputs is steep where it destroys them, and no single site is starved.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite, Distance, Fitted, Form, ModelActivations, Replacement
from rsi_deploy.calibration.als import STEPS, TwoKernels, two_kernels
from rsi_deploy.calibration.moments import GRAM_LIMIT, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    EXACT_LIMIT,
    RIDGE,
    Response,
    lost_response,
    respond,
    response_error,
)
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import Spectrum, break_even_rank
from rsi_deploy.linalg.solver import Solver, singular_values
from rsi_deploy.linalg.spectra import thinned
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.rank_grid import rank_grid

LEVELS = (0.03, 0.15, 0.5)
"""Response errors at which the outputs' distance is measured."""
GRID_POINTS = 10
"""Ranks at which a form that takes alternating steps is tried."""

SCARCITY = 1.0
"""The rows of a text are correlated and tell less than as many others. For a sentence encoder with 14,000 rows a ridge
of 0.1 did better on held-out texts than 0.01 and 0.3; this gives it to inputs 1,536 wide, and to images hardly any."""

NODE_BYTES = 1024
"""What one more node and its names add to a file, at the most."""

CONSTANT = "its inputs do not vary on the calibration data"
FARTHEST = 1e9
"""The distance of outputs that are not finite, or nearly so."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How sites are fitted.

    Attributes:
        solver: of the singular subspaces.
        ridge: towards the weight, in mean input variances.
        scarcity: what the ridge of a regression rises by for one input a row of data: fewer rows are trusted less.
        metric: count a response's errors by what they do to the outputs, where gradients tell.
        sensitivity: measure what each site's error does to the outputs; else the loss is the squared response error.
        min_rank: no option below it.
        rank_multiple: ranks are multiples of it.
        forms: which forms may be chosen, where a site can take them.
        declined: sites that the data say nothing of, name -> reason; `options` and `fit` fill it, and leave them dense.
    """

    solver: Solver
    ridge: float = RIDGE
    scarcity: float = SCARCITY
    metric: bool = True
    sensitivity: bool = True
    min_rank: int = 1
    rank_multiple: int = 1
    forms: tuple[Form, ...] = ("matmul", "gemm", "channel", "input", "separable")
    declined: dict[str, str] = field(default_factory=dict, init=False, compare=False)

    def options(self, streams: ModelActivations, progress: Progress | None = None) -> list[SiteOptions]:
        """Every reachable site's options, dense first."""
        found: dict[str, SiteOptions] = {}
        sites = streams.sites
        metrics = streams.metrics() if self.metric else {}

        def visit(site: CalibratedSite, moments: Moments | Samples) -> None:
            if progress:
                progress(site.name, len(found), len(sites))
            metric = metrics[site.name].directions if site.name in metrics else None
            found[site.name] = self._options_of(site, moments, streams, metric)

        streams.survey(visit)
        return [found[site.name] for site in sites if site.name in found]

    def fit(
        self, streams: ModelActivations, plan: Mapping[str, tuple[Form, int]], progress: Progress | None = None
    ) -> dict[str, Fitted]:
        """Factors of the sites in `plan`, name -> (form, rank), each fitted to what those before it have become.

        Those of constant inputs are left out, and stand in `declined`.
        """
        made: dict[str, Fitted] = {}
        metrics = streams.metrics() if self.metric else {}
        counts = {name: metric.rows for name, metric in metrics.items() if metric.rows is not None}

        def visit(site: CalibratedSite, moments: Moments | Samples) -> Replacement | None:
            if site.name not in plan:
                return None
            if progress:
                progress(site.name, len(made), len(plan))
            if self._declines(site, moments):
                return None
            started = time.perf_counter()
            form, rank = plan[site.name]
            spectra: list[Spectrum | None] = []
            replacement, error = self.replacement(
                site,
                moments,
                form,
                rank,
                metric=metrics[site.name].directions if site.name in metrics else None,
                scarcity=self.scarcity,
                look=lambda response: spectra.append(_spectrum(response, rank)),
            )
            made[site.name] = Fitted(
                replacement=replacement,
                response_error=error,
                seconds=time.perf_counter() - started,
                macs=(site.macs, site.split_macs(form, rank)) if site.macs else None,
                spectrum=spectra[0] if spectra else None,
            )
            return replacement

        streams.sequence(visit, counts)
        return made

    def replacement(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        form: Form,
        rank: int,
        *,
        steps: int = STEPS,
        metric: Tensor | None = None,
        scarcity: float = 0.0,
        look: Callable[[Tensor], None] | None = None,
    ) -> tuple[Replacement, float]:
        """The site's factors in a form, and the response error they leave.

        A `metric` counts where the second node has no kernel; `scarcity` as in the class, for a regression. `look` is
        shown the matrix whose leading directions the factors keep.

        Raises:
            ModelError: a form that moments of so many inputs cannot be fitted in.
        """
        weight, held = site.load(), scarcity * site.in_features / moments.rows
        if site.first_axes(form) == len(site.kernel):
            problem: Response | TwoKernels = respond(weight, moments, ridge=self.ridge, held=held, metric=metric)
            left, right = problem.factors(rank, self.solver, site=site.name)
            product = left @ right
        else:
            if isinstance(moments, Samples):
                raise ModelError(
                    f"site {site.name!r}: form {form!r} is fitted to at most {GRAM_LIMIT} inputs, but it has "
                    f"{site.in_features}; plan it as {site.forms[0]!r}"
                )
            first = site.first_axes(form)
            problem = two_kernels(weight, moments, site.kernel, first, ridge=self.ridge + held, metric=metric)
            left, right = problem.factors(rank, self.solver, site=site.name, steps=steps)
            product = problem.product(left, right)
        if look is not None:
            look(problem.whitened)
        bias = moments.mean_y - (product @ moments.mean_x.unsqueeze(-1)).squeeze(-1)
        replacement = Replacement(form, left.float(), right.float(), bias.float())
        return replacement, response_error(product, moments)

    def _options_of(
        self, site: CalibratedSite, moments: Moments | Samples, streams: ModelActivations, metric: Tensor | None
    ) -> SiteOptions:
        params = site.groups * site.out_features * site.in_features
        dense = Option(form="dense", rank=None, params=params, macs=site.macs, bytes=params * site.item_bytes, loss=0.0)
        if self._declines(site, moments):
            return SiteOptions(name=site.name, options=(dense,))
        errors = dict(self._errors(site, moments, metric))
        loss = self._loss(site, moments, errors, streams, metric)
        split = []
        for (form, rank), error in errors.items():
            # The corrected bias counts too: some sites have had none.
            numbers = site.split_params(form, rank) + site.groups * site.out_features
            split.append(
                Option(
                    form=form,
                    rank=rank,
                    params=numbers,
                    macs=site.split_macs(form, rank),
                    bytes=numbers * site.item_bytes + NODE_BYTES,
                    loss=loss(error),
                )
            )
        return SiteOptions(name=site.name, options=(dense, *split))

    def _declines(self, site: CalibratedSite, moments: Moments | Samples) -> bool:
        if moments.varies:
            self.declined.pop(site.name, None)
        else:
            self.declined[site.name] = CONSTANT
        return site.name in self.declined

    def _errors(
        self, site: CalibratedSite, moments: Moments | Samples, metric: Tensor | None
    ) -> Iterator[tuple[tuple[Form, int], float]]:
        """((form, rank), response error) of every option below break-even, in the metric."""
        weight = site.load()
        for form in site.forms:
            if form not in self.forms:
                continue
            rows, columns = site.shape(form)
            limit = site.out_features * site.in_features / (rows + columns)
            plain = site.first_axes(form) == len(site.kernel)
            ranks = rank_grid(
                min(rows, columns),
                min(limit, break_even_rank(rows, columns)) if plain else limit,
                min_rank=self.min_rank,
                multiple=self.rank_multiple,
                points=None if plain else GRID_POINTS,
            )
            if not ranks:
                continue
            if plain:
                curve = respond(weight, moments, ridge=self.ridge, metric=metric).errors()
                yield from (((form, rank), float(curve[rank])) for rank in ranks)
            elif isinstance(moments, Moments):
                problem = two_kernels(
                    weight, moments, site.kernel, site.first_axes(form), ridge=self.ridge, metric=metric
                )
                known = {}
                for rank in ranks:
                    left, right = problem.factors(rank, self.solver, site=site.name, steps=2)
                    known[rank] = lost_response(weight, problem.product(left, right), moments, metric)
                yield from (((form, rank), error) for rank, error in filled(known, self.rank_multiple).items())

    def _loss(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        errors: Mapping[tuple[Form, int], float],
        streams: ModelActivations,
        metric: Tensor | None,
    ) -> Callable[[float], float]:
        """What a response error of this site costs at the outputs."""
        if not self.sensitivity or not errors:
            return lambda error: error * error
        law = PowerLaw()
        for level in LEVELS:
            form, rank = min(errors, key=lambda key: abs(math.log(max(errors[key], 1e-12) / level)))
            if law.knows(errors[form, rank]):
                continue
            replacement, _ = self.replacement(site, moments, form, rank, steps=2, metric=metric)
            law.learn(errors[form, rank], streams.distance({site.name: replacement}))
        return law


def _spectrum(response: Tensor, rank: int) -> Spectrum | None:
    """Singular values of the response, where they cost little beside the factors."""
    full = min(response.shape[-2:])
    return thinned(singular_values(response), full, rank, of="response") if full <= EXACT_LIMIT else None


def filled(known: Mapping[int, float], multiple: int) -> dict[int, float]:
    """Errors at all ranks between those of some, straight in their logarithms.

    Example:
        >>> {rank: round(error, 6) for rank, error in filled({2: 0.16, 6: 0.01}, 2).items()}
        {2: 0.16, 4: 0.04, 6: 0.01}
    """
    ranks = sorted(known)
    every = range(ranks[0], ranks[-1] + 1, multiple)
    logs = np.interp(every, ranks, [math.log(max(known[rank], 1e-30)) for rank in ranks])
    return {rank: known.get(rank, float(math.exp(log))) for rank, log in zip(every, logs, strict=True)}


@dataclass
class PowerLaw:
    """A loss as a function of the response error: through the measured points, straight in their logarithms.

    Below the first point it is proportional to the error; beyond the last one it rises with its 1.5th power.
    """

    points: dict[float, float] = field(default_factory=dict)

    def knows(self, error: float) -> bool:
        """Whether a point lies so near that another one would tell nothing."""
        return any(abs(math.log(max(error, 1e-12) / known)) < 0.2 for known in self.points)

    def learn(self, error: float, distance: Distance) -> None:
        """Take in a measured distance: the outputs' relative one, and the KL divergence where it is one's."""
        self.points[max(error, 1e-12)] = min(max(distance.relative + (distance.kl or 0.0), 1e-9), FARTHEST)

    def __call__(self, error: float) -> float:
        """The loss of a response error."""
        known = sorted(self.points)
        x = math.log(max(error, 1e-12))
        xs, ys = [math.log(e) for e in known], [math.log(self.points[e]) for e in known]
        if x <= xs[0]:
            return math.exp(ys[0] + x - xs[0])
        if x >= xs[-1]:
            return math.exp(ys[-1] + 1.5 * (x - xs[-1]))
        return math.exp(float(np.interp(x, xs, ys)))
