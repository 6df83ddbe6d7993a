"""Compute the options of every site for the planner; `rsi_deploy.planning.site_fits` fits what it chooses.

    survey    --> options (form, rank, cost, loss) of every site
    sequence  --> factors and bias of every site, fitted in the network whose earlier sites are already compressed

A form and rank has a response error e at its site. Its effect on the model's outputs is measured: the site alone is
replaced at two levels of e, and the distance of the outputs is interpolated between the levels by a power law. The
loss of a site therefore rises steeply where its error destroys the outputs, and no site gets too low a rank. Of a
language model the loss is the KL divergence a token that follows from the output sensitivity, without a run.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graph_passes.forms import FOLDED, Form, rank_limit
from rsi_deploy.calibration.activations import (
    CalibratedSite,
    ModelActivations,
    OutputSensitivity,
    Replacement,
)
from rsi_deploy.calibration.als import two_kernel_problem
from rsi_deploy.calibration.cross_validation import (
    ResponseCurves,
    judged_folds,
    parted,
    tried_ridges,
)
from rsi_deploy.calibration.head_bases import head_counts
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    dense_errors,
    dense_response_error,
    noise_response_error,
    response_problem,
    sensitivity_root,
)
from rsi_deploy.calibration.repair import repair_bytes, repair_ranks, repairs
from rsi_deploy.calibration.rounding import keep_second_moments_, rounded_weight, second_moments, stored_bytes
from rsi_deploy.calibration.unit_selection import unit_counts, unit_readers
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.losses import PowerLaw, filled
from rsi_deploy.planning.rank_grid import rank_grid
from rsi_deploy.planning.site_fits import Progress, SiteFits, folded_fits

PLAIN_FORMS: tuple[Form, ...] = ("matmul", "gemm", "channel", "input", "separable")
LOW_FORMS: tuple[Form, ...] = (*PLAIN_FORMS, "units", "heads")
"""Forms of weights in few bits: a pivoted split multiplies what was rounded once more."""
FORMS: tuple[Form, ...] = (*LOW_FORMS, "pivoted")
LEVELS = (0.05, 0.3)
"""Response errors at which the distance of the outputs is measured."""
GRID_POINTS = 8
"""Number of ranks that are tried for a form with alternating least squares."""
TRIAL_STEPS, TRIAL_GRADIENT_STEPS = 2, 6
"""Steps of such a trial. On ResNet-20 its errors are those of 20 gradient steps, to about 1 %."""

NODE_BYTES = 1024
"""Largest number of bytes that one more node and its names add to a file."""

PIVOT_BYTES = 4
"""Bytes of an output's place in the order of a pivoted split."""


@dataclass(frozen=True, kw_only=True)
class Calibration(SiteFits):
    """The settings of a calibration, and its two steps: `options`, and `fit` of `SiteFits`.

    Attributes:
        measure_losses: measure the effect of each site's error on the outputs; otherwise the loss is the squared
            response error.
        min_rank: smallest rank of a split.
        rank_multiple: number that divides every rank.
        forms: forms that may be chosen.
        bits_of: function that returns the bits in which a site's weight may be stored; 32 is as it is.
        with_repairs: whether weights in few bits may have a low-rank repair.
        inputs: second moments of sites that may be stored in fewer than eight bits, by name; `options` adds them.
    """

    measure_losses: bool = True
    min_rank: int = 1
    rank_multiple: int = 1
    forms: tuple[Form, ...] = FORMS
    bits_of: Callable[[CalibratedSite], tuple[int, ...]] = lambda site: (32,)
    with_repairs: bool = False
    inputs: dict[str, Tensor] | None = None

    def options(self, activations: ModelActivations, progress: Progress | None = None) -> list[SiteOptions]:
        """Return the options of every reachable site, dense first."""
        found: dict[str, SiteOptions] = {}
        sites = activations.sites
        readers = unit_readers([site for site in sites if site.units is None or site.units.form in self.forms])
        sensitivities = activations.sensitivities() if self.use_gradients else {}

        def visit(site: CalibratedSite, moments: Moments | Samples) -> None:
            if progress:
                progress(site.name, len(found), len(sites))
            sensitivity = sensitivities.get(site.name)
            if self.inputs is not None and any(bits < 8 for bits in self.bits_of(site)):
                keep_second_moments_(self.inputs, site.name, moments)
            own = site if site.name in readers else replace(site, units=None)
            found[site.name] = self._options_of(own, moments, activations, sensitivity)

        activations.survey(visit)
        kept = [found[site.name] for site in sites if site.name in found]
        return [_tied(site, readers.get(site.name, ()), found) for site in kept]

    def _options_of(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        activations: ModelActivations,
        effect: OutputSensitivity | None,
    ) -> SiteOptions:
        sensitivity = None if effect is None else effect.directions
        params = site.groups * site.out_features * site.in_features
        dense = Option(form="dense", rank=None, params=params, macs=site.macs, bytes=params * site.item_bytes, loss=0.0)
        if self.declines(site, moments):
            return SiteOptions(name=site.name, options=(dense,))
        response = ResponseCurves(site.load(), moments, sensitivity)
        errors = dict(self._errors(site, moments, response, sensitivity))
        if self.measure_losses and effect is not None and effect.in_nats and isinstance(moments, Moments):
            loss = _divergence_of(site.load(), moments, effect.directions)
        else:
            loss = self._loss(site, moments, response, activations, has_splits=bool(errors))
        changed = []
        is_product, rows = not site.kernel, site.groups * site.out_features
        for bits in self.bits_of(site):
            roundings = self._rounding_errors(site, moments, sensitivity, bits)
            rounding = roundings[0]
            for repair, error in roundings.items() if bits < 32 else ():
                size = stored_bytes(params, rows, bits, is_product=is_product)
                size += repair_bytes(repair, rows, site.in_features) if repair else 0
                changed.append(replace(dense, bits=bits, repair=repair, bytes=size, loss=loss(error), error=error))
            for (form, rank), error in errors.items():
                # The corrected bias counts in full, because some dense sites have no bias.
                numbers = site.split_params(form, rank) + rows
                size = numbers * site.item_bytes
                if bits < 32:
                    scales = rows + (0 if form in FOLDED else site.groups * rank)
                    size = stored_bytes(numbers - rows, scales, bits, is_product=is_product)
                    size += rows * site.item_bytes
                if form == "pivoted":
                    size += NODE_BYTES + PIVOT_BYTES * rows
                    if size + NODE_BYTES >= dense.bytes:
                        continue
                # Of both factors: in the median of sites 1.2 to 2.2 times.
                total = error + (1 if form in FOLDED else 2) * rounding
                changed.append(
                    Option(
                        form=form,
                        rank=rank,
                        params=numbers,
                        macs=site.split_macs(form, rank),
                        bytes=size + NODE_BYTES,
                        loss=loss(total),
                        error=total,
                        bits=bits,
                        share=rank / (site.units.count * site.units.run) if form in FOLDED and site.units else 1.0,
                    )
                )
        noise = noise_response_error(site.load(), moments, sensitivity)
        return SiteOptions(name=site.name, options=(dense, *changed), noise=noise)

    def _rounding_errors(
        self, site: CalibratedSite, moments: Moments | Samples, sensitivity: Tensor | None, bits: int
    ) -> dict[int, float]:
        """Return rank of a repair (0: none) -> response error of the dense weight in so few bits.

        It is held out where the moments have folds.
        """
        if bits == 32:
            return {0: 0.0}
        weight, judged = site.load().float(), moments
        if bits < 8 and isinstance(moments, Moments) and self.validates(moments):
            moments, judged = next(parted(moments))
        second = second_moments(moments) if bits < 8 else None
        fitted = rounded_weight(weight, second, is_product=not site.kernel, bits=bits)
        near = fitted.weight().reshape(weight.shape)
        errors = {0: dense_response_error(weight, near, judged, sensitivity)}
        if self.with_repairs and second is not None and site.groups == 1:
            ranks = repair_ranks(*weight.shape[1:])
            for made in repairs(weight[0], near[0], second[0], ranks, self.solver, site=site.name):
                errors[made.rank] = dense_response_error(weight, near + made.product(), judged, sensitivity)
        return errors

    def _errors(
        self, site: CalibratedSite, moments: Moments | Samples, response: ResponseCurves, sensitivity: Tensor | None
    ) -> Iterator[tuple[tuple[Form, int], float]]:
        """Yield ((form, rank), weighted response error) of every option below break-even."""
        weight, curve = site.load(), None
        for form in site.forms:
            if form not in self.forms:
                continue
            if form in FOLDED:
                yield from self._unit_errors(site, weight, moments, sensitivity)
                continue
            rows, columns = site.shape(form)
            plain = site.first_axes(form) == len(site.kernel)
            ranks = rank_grid(
                min(rows, columns),
                rank_limit(form, rows, columns) if plain else site.out_features * site.in_features / (rows + columns),
                min_rank=self.min_rank,
                multiple=self.rank_multiple,
                points=None if plain else GRID_POINTS,
            )
            if not ranks:
                continue
            if plain:
                curve = self._curve(site, moments, response, sensitivity) if curve is None else curve
                yield from (((form, rank), float(curve[rank])) for rank in ranks)
            elif isinstance(moments, Moments):
                others, judged = next(judged_folds(moments)) if self.validates(moments) else (moments, moments)
                problem = two_kernel_problem(
                    weight,
                    Moments.dense(others, weight),
                    site.kernel,
                    site.first_axes(form),
                    ridge=self.ridge,
                    sensitivity=sensitivity,
                )
                error_of = dense_errors(weight, judged, sensitivity)
                known = {}
                for rank in ranks:
                    factors = problem.factors(
                        rank, self.solver, site=site.name, steps=TRIAL_STEPS, gradient_steps=TRIAL_GRADIENT_STEPS
                    )
                    known[rank] = error_of(problem.product(*factors))
                yield from (((form, rank), error) for rank, error in filled(known, self.rank_multiple).items())

    def _unit_errors(
        self, site: CalibratedSite, weight: Tensor, moments: Moments | Samples, sensitivity: Tensor | None
    ) -> Iterator[tuple[tuple[Form, int], float]]:
        units = site.units
        if units is None or isinstance(moments, Samples):
            return
        others, judged = next(judged_folds(moments)) if self.validates(moments) else (moments, moments)
        error_of = dense_errors(weight, judged, sensitivity)
        if units.form == "heads":
            counts = head_counts(units.count, units.run, self.rank_multiple)
        else:
            counts = unit_counts(units.count, self.rank_multiple)
        counts = [count for count in counts if count * units.run >= self.min_rank]
        fits = folded_fits(
            units, weight[0], others.xx[0], counts, math.prod(site.kernel), ridge=self.ridge, sensitivity=sensitivity
        )
        for count, (*_, product) in zip(counts, fits, strict=True):
            yield (units.form, count * units.run), error_of(product)

    def _curve(
        self, site: CalibratedSite, moments: Moments | Samples, response: ResponseCurves, sensitivity: Tensor | None
    ) -> Tensor:
        """Return the response error of the plain form at every rank, held out where the moments have folds."""
        if not self.validates(moments):
            return response_problem(site.load(), moments, ridge=self.ridge, sensitivity=sensitivity).errors()
        ridges = tried_ridges(moments) if isinstance(moments, Moments) else (self.ridge,)
        return response.held_out_curve(ridges).errors

    def _loss(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        response: ResponseCurves,
        activations: ModelActivations,
        *,
        has_splits: bool,
    ) -> Callable[[float], float]:
        """Return the function from a response error of this site, of any form, to its loss at the outputs.

        The outputs' distance is measured for projections of the response, which cost no fit, on the data that they
        are made from, and so is their error.
        """
        if not self.measure_losses:
            return lambda error: error * error
        law = PowerLaw()
        errors = response.errors[1:-1].clamp_min(1e-12)
        if not has_splits or not len(errors):  # too small to try; few such sites are as sensitive as the outputs
            return lambda error: error
        for level in LEVELS:
            rank = 1 + int((errors / level).log().abs().argmin())
            error = float(response.errors[rank])
            if not law.has_near(error):
                left, right = response.projection(rank)
                bias = moments.mean_y - (left @ (right @ moments.mean_x.to(right).unsqueeze(-1))).squeeze(-1)
                replacement = Replacement(site.forms[0], left.float(), right.float(), bias.float())
                law.learn(error, activations.distance({site.name: replacement}))
        return law


def _divergence_of(weight: Tensor, moments: Moments, directions: Tensor) -> Callable[[float], float]:
    """Return the function from a response error to the KL divergence a token that it causes, in nats, as far as the
    sensitivity foresees: it is mixed with the identity, see `sensitivity_root`.

    Args:
        weight: W `(groups, out, in)`.
        moments: moments of the site in the dense network.
        directions: output sensitivity in nats, `(groups, out, out)`.
    """
    scale = directions.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    SW = sensitivity_root(directions).mT @ weight.to(torch.float64)
    whole = float((scale * (SW @ moments.xx.to(SW.dtype) * SW).sum(dim=(-2, -1)).to(scale)).sum()) / 2
    return lambda error: whole * error


def _tied(site: SiteOptions, makers: tuple[str, ...], found: Mapping[str, SiteOptions]) -> SiteOptions:
    """Return a site's options with the sites that make its hidden units, or without units where one is missing."""
    plain = tuple(option for option in site.options if option.form not in FOLDED)
    if len(plain) == len(site.options) or not all(name in found for name in makers):
        return replace(site, options=plain)
    return replace(site, makers=makers)
