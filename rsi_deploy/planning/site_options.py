"""Calibrate a model: compute the options of every site for the planner, and fit factors in execution order.

    survey    --> options (form, rank, cost, loss) of every site, from which the planner chooses
    sequence  --> factors and bias of every site, fitted in the network whose earlier sites are already compressed

A form and rank has a response error e at its site. Its effect on the model's outputs is measured: the site alone is
replaced at two levels of e, and the distance of the outputs is interpolated between the levels by a power law. The
loss of a site therefore rises steeply where its error destroys the outputs, and no site gets too low a rank. Of a
language model the loss is the KL divergence a token that follows from the output sensitivity, without a run.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from graph_passes.forms import FOLDED, Form, rank_limit
from graph_passes.records import Units
from rsi_deploy.calibration.activations import (
    CalibratedSite,
    FittedSite,
    ModelActivations,
    OutputSensitivity,
    Replacement,
)
from rsi_deploy.calibration.als import TwoKernelProblem, product_of, two_kernel_problem
from rsi_deploy.calibration.cross_validation import (
    ResponseCurves,
    Trust,
    has_folds,
    held_out_error,
    judged_folds,
    parted,
    tried_ridges,
    trust_of,
)
from rsi_deploy.calibration.head_bases import head_counts, head_factors
from rsi_deploy.calibration.moments import FOLDS, GRAM_LIMIT, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    EXACT_LIMIT,
    RIDGE,
    ResponseProblem,
    dense_errors,
    dense_response_error,
    noise_response_error,
    response_error,
    response_problem,
    sensitivity_root,
)
from rsi_deploy.calibration.repair import repair_bytes, repair_ranks, repairs
from rsi_deploy.calibration.rounded_factors import normal_equations, rounded_factors
from rsi_deploy.calibration.rounding import keep_second_moments_, rounded_weight, second_moments, stored_bytes
from rsi_deploy.calibration.unit_selection import eliminated, unit_counts, unit_factors, unit_readers
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import Spectrum
from rsi_deploy.linalg.solver import Solver, singular_values
from rsi_deploy.linalg.spectra import thin_spectrum
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.losses import PowerLaw, filled
from rsi_deploy.planning.rank_grid import rank_grid

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

SCARCITY = 1.0
"""Extra ridge per input feature and row of data where there are no folds to choose it by."""

NODE_BYTES = 1024
"""Largest number of bytes that one more node and its names add to a file."""

PIVOT_BYTES = 4
"""Bytes of an output's place in the order of a pivoted split."""

CONSTANT = "its inputs do not vary on the calibration data"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The settings of a calibration, and its two steps: `options` and `fit`.

    Attributes:
        solver: solver for the singular subspaces.
        ridge: ridge towards the weight, in mean input variances.
        scarcity: extra ridge of the regression per input feature and row of data, where it is not cross-validated.
        use_gradients: weight response errors by the output sensitivity, if gradients give one.
        cross_validate: choose ridges and judge ranks on folds that are left out, where the moments have folds.
        measure_losses: measure the effect of each site's error on the outputs; otherwise the loss is the squared
            response error.
        min_rank: smallest rank of a split.
        rank_multiple: number that divides every rank.
        forms: forms that may be chosen.
        bits_of: function that returns the bits in which a site's weight may be stored; 32 is as it is.
        with_repairs: whether weights in few bits may have a low-rank repair.
        inputs: second moments of sites that may be stored in fewer than eight bits, by name; `options` adds them.
        declined: sites that stay dense because their inputs are constant, name -> reason; set by `options` and `fit`.
    """

    solver: Solver
    ridge: float = RIDGE
    scarcity: float = SCARCITY
    use_gradients: bool = True
    cross_validate: bool = True
    measure_losses: bool = True
    min_rank: int = 1
    rank_multiple: int = 1
    forms: tuple[Form, ...] = FORMS
    bits_of: Callable[[CalibratedSite], tuple[int, ...]] = lambda site: (32,)
    with_repairs: bool = False
    inputs: dict[str, Tensor] | None = None
    declined: dict[str, str] = field(default_factory=dict, init=False, compare=False)

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

    def fit(
        self,
        activations: ModelActivations,
        plan: Mapping[str, tuple[Form, int]],
        progress: Progress | None = None,
        bits: Mapping[str, int] = MappingProxyType({}),
    ) -> dict[str, FittedSite]:
        """Fit the sites in `plan`, name -> (form, rank), in the network whose earlier sites are already replaced.

        The factors of sites in fewer than eight `bits` are rounded, and so are what the later sites are fitted to.
        Sites with constant inputs are skipped and recorded in `declined`.
        """
        made: dict[str, FittedSite] = {}
        sensitivities = activations.sensitivities() if self.use_gradients else {}
        counts = {name: sensitivity.rows for name, sensitivity in sensitivities.items() if sensitivity.rows is not None}

        def visit(site: CalibratedSite, moments: Moments | Samples) -> Replacement | None:
            if site.name not in plan:
                return None
            if progress:
                progress(site.name, len(made), len(plan))
            if self._declines(site, moments):
                return None
            sensitivity = sensitivities[site.name].directions if site.name in sensitivities else None
            made[site.name] = self._fitted(site, moments, *plan[site.name], sensitivity, bits.get(site.name, 32))
            return made[site.name].replacement

        activations.sequence(visit, counts)
        return made

    def replacement(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        form: Form,
        rank: int,
        *,
        ridge: float | None = None,
        extra_ridge: float = 0.0,
        sensitivity: Tensor | None = None,
        look: Callable[[Tensor], None] | None = None,
        bits: int = 32,
    ) -> Replacement:
        """Return the factors of a site in a form and rank.

        Args:
            site: site to split.
            moments: moments of the site.
            form: form of the split.
            rank: rank of the split.
            ridge: ridge of the subspace, in mean input variances; None for that of the class.
            extra_ridge: extra ridge of the regression.
            sensitivity: output sensitivity G; None for the identity.
            look: function that is called with the matrix whose leading directions the factors keep.
            bits: bits that both factors are stored in; those of fewer than eight are rounded.

        Raises:
            ModelError: the input is too wide to fit a form whose second node has a kernel.
        """
        weight, ridge = site.load(), self.ridge if ridge is None else ridge
        if form in FOLDED:
            left, right, product = self._folded(site, weight, moments, rank, ridge + extra_ridge, sensitivity)
        elif site.first_axes(form) == len(site.kernel):
            problem: ResponseProblem | TwoKernelProblem = response_problem(
                weight, moments, ridge=ridge, extra_ridge=extra_ridge, sensitivity=sensitivity
            )
            left, right = problem.factors(rank, self.solver, site=site.name)
            if bits < 8:
                second = second_moments(moments, centred=True)
                normal = partial(normal_equations, weight, moments, ridge=ridge + extra_ridge)
                left, right = rounded_factors(left, right, second, normal, is_product=not site.kernel, bits=bits)
            product = left @ right
        else:
            if isinstance(moments, Samples):
                raise ModelError(
                    f"site {site.name!r}: form {form!r} is fitted to at most {GRAM_LIMIT} inputs, but it has "
                    f"{site.in_features}; plan it as {site.forms[0]!r}"
                )
            first = site.first_axes(form)
            problem = two_kernel_problem(
                weight, moments, site.kernel, first, ridge=ridge + extra_ridge, sensitivity=sensitivity
            )
            left, right = problem.factors(rank, self.solver, site=site.name)
            if bits < 8:
                second = problem.root @ problem.root.mT
                left, right = rounded_factors(left, right, second, problem.normal, is_product=False, bits=bits)
            product = problem.product(left, right)
        if look is not None and form not in FOLDED:
            look(problem.whitened)
        bias = moments.mean_y - (product @ moments.mean_x.unsqueeze(-1)).squeeze(-1)
        return Replacement(form, left.float(), right.float(), bias.float())

    def _folded(
        self,
        site: CalibratedSite,
        weight: Tensor,
        moments: Moments | Samples,
        rank: int,
        ridge: float,
        sensitivity: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of a site that reads fewer hidden units or values of heads, and their product."""
        units = site.units
        if units is None or isinstance(moments, Samples):
            raise ModelError(
                f"site {site.name!r}: forms 'units' and 'heads' are fitted to at most {GRAM_LIMIT} inputs; plan it as "
                f"{site.forms[0]!r}"
            )
        best = response_problem(weight, moments, ridge=ridge).target[0]
        fits = _folded_fits(
            units,
            best,
            moments.xx[0],
            [rank // units.run],
            math.prod(site.kernel),
            ridge=ridge,
            sensitivity=sensitivity,
        )
        return next(fits)

    def _fitted(
        self,
        site: CalibratedSite,
        moments: Moments | Samples,
        form: Form,
        rank: int,
        sensitivity: Tensor | None,
        bits: int,
    ) -> FittedSite:
        """Fit a site; where its moments have folds, the ridges and the trust in the regression are cross-validated."""
        started = time.perf_counter()
        plain = form not in FOLDED and site.first_axes(form) == len(site.kernel)
        trust, ridge = Trust(extra_ridge=self.scarcity * site.in_features / moments.rows), self.ridge
        validated = self._validates(moments)
        if isinstance(moments, Moments) and validated:
            weight = site.load()
            trust = trust_of(weight, moments, rank if plain else site.out_features, sensitivity=sensitivity)
            if plain and len(ridges := tried_ridges(moments)) > 1:
                ridge = ResponseCurves(weight, moments, sensitivity).held_out_curve(ridges).ridges[rank]
        spectra: list[Spectrum | None] = []

        def fit(some: Moments | Samples, look: Callable[[Tensor], None] | None = None) -> Replacement:
            some = trust.applied(some, site.load()) if isinstance(some, Moments) else some
            return self.replacement(
                site,
                some,
                form,
                rank,
                ridge=ridge,
                extra_ridge=trust.extra_ridge,
                sensitivity=sensitivity,
                look=look,
                bits=bits,
            )

        replacement = fit(moments, look=lambda response: spectra.append(_spectrum(response, rank)))
        held_out = None
        if isinstance(moments, Moments) and validated:
            held_out = held_out_error(lambda part: product_of(site, fit(part)), moments, folds=FOLDS if plain else 1)
        return FittedSite(
            replacement=replacement,
            response_error=response_error(product_of(site, replacement), moments),
            held_out_error=held_out,
            seconds=time.perf_counter() - started,
            macs=(site.macs, site.split_macs(form, rank)) if site.macs else None,
            spectrum=spectra[0] if spectra else None,
        )

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
        if self._declines(site, moments):
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
        if bits < 8 and isinstance(moments, Moments) and self._validates(moments):
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

    def _declines(self, site: CalibratedSite, moments: Moments | Samples) -> bool:
        if moments.varies:
            self.declined.pop(site.name, None)
        else:
            self.declined[site.name] = CONSTANT
        return site.name in self.declined

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
                others, judged = next(judged_folds(moments)) if self._validates(moments) else (moments, moments)
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
        others, judged = next(judged_folds(moments)) if self._validates(moments) else (moments, moments)
        error_of = dense_errors(weight, judged, sensitivity)
        if units.form == "heads":
            counts = head_counts(units.count, units.run, self.rank_multiple)
        else:
            counts = unit_counts(units.count, self.rank_multiple)
        counts = [count for count in counts if count * units.run >= self.min_rank]
        fits = _folded_fits(
            units, weight[0], others.xx[0], counts, math.prod(site.kernel), ridge=self.ridge, sensitivity=sensitivity
        )
        for count, (*_, product) in zip(counts, fits, strict=True):
            yield (units.form, count * units.run), error_of(product)

    def _curve(
        self, site: CalibratedSite, moments: Moments | Samples, response: ResponseCurves, sensitivity: Tensor | None
    ) -> Tensor:
        """Return the response error of the plain form at every rank, held out where the moments have folds."""
        if not self._validates(moments):
            return response_problem(site.load(), moments, ridge=self.ridge, sensitivity=sensitivity).errors()
        ridges = tried_ridges(moments) if isinstance(moments, Moments) else (self.ridge,)
        return response.held_out_curve(ridges).errors

    def _validates(self, moments: Moments | Samples) -> bool:
        return self.cross_validate and has_folds(moments)

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


def _folded_fits(
    units: Units,
    weight: Tensor,
    xx: Tensor,
    counts: Sequence[int],
    points: int,
    *,
    ridge: float,
    sensitivity: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield left, right and weight of a site for each number of units, in falling order."""
    G = None if sensitivity is None else sensitivity[0]
    if units.form == "heads":
        for left, right in head_factors(weight, xx, units.run, counts, ridge=ridge, sensitivity=G):
            yield left[None], right[None], (left @ right)[None]
    else:
        for kept, fitted in eliminated(weight, xx, units.count, counts, ridge=ridge, sensitivity=G):
            yield *unit_factors(kept, fitted, units.count, points), fitted[None]


def _tied(site: SiteOptions, makers: tuple[str, ...], found: Mapping[str, SiteOptions]) -> SiteOptions:
    """Return a site's options with the sites that make its hidden units, or without units where one is missing."""
    plain = tuple(option for option in site.options if option.form not in FOLDED)
    if len(plain) == len(site.options) or not all(name in found for name in makers):
        return replace(site, options=plain)
    return replace(site, makers=makers)


def _spectrum(response: Tensor, rank: int) -> Spectrum | None:
    """Return the singular values of the response, or None if they take long to compute."""
    full = min(response.shape[-2:])
    return thin_spectrum(singular_values(response), full, rank, of="response") if full <= EXACT_LIMIT else None
