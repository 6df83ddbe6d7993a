"""Fit the factors of sites to calibration data, in execution order.

    moments --> trust in the regression, ridge --> factors and bias, response error, held-out error

Each site is fitted in the network whose earlier sites are already compressed. The options that forms and ranks are
chosen from are those of `rsi_deploy.planning.site_options`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

from torch import Tensor

from graph_passes.forms import FOLDED, Form
from graph_passes.records import Units
from rsi_deploy.calibration.activations import (
    CalibratedSite,
    FittedSite,
    ModelActivations,
    Replacement,
)
from rsi_deploy.calibration.als import TwoKernelProblem, product_of, two_kernel_problem
from rsi_deploy.calibration.cross_validation import (
    ResponseCurves,
    Trust,
    has_folds,
    held_out_error,
    tried_ridges,
    trust_of,
)
from rsi_deploy.calibration.head_bases import head_factors
from rsi_deploy.calibration.moments import FOLDS, GRAM_LIMIT, Moments, Samples
from rsi_deploy.calibration.reduced_rank_regression import (
    EXACT_LIMIT,
    RIDGE,
    ResponseProblem,
    response_error,
    response_problem,
)
from rsi_deploy.calibration.rounded_factors import normal_equations, rounded_factors
from rsi_deploy.calibration.rounding import second_moments
from rsi_deploy.calibration.unit_selection import eliminated, unit_factors
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import Spectrum
from rsi_deploy.linalg.solver import Solver, singular_values
from rsi_deploy.linalg.spectra import thin_spectrum

SCARCITY = 1.0
"""Extra ridge per input feature and row of data where there are no folds to choose it by."""
CONSTANT = "its inputs do not vary on the calibration data"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class SiteFits:
    """The settings of fits, and `fit` itself.

    Attributes:
        solver: solver for the singular subspaces.
        ridge: ridge towards the weight, in mean input variances.
        scarcity: extra ridge of the regression per input feature and row of data, where it is not cross-validated.
        use_gradients: weight response errors by the output sensitivity, if gradients give one.
        cross_validate: choose ridges and judge ranks on folds that are left out, where the moments have folds.
        declined: sites that stay dense because their inputs are constant, name -> reason; set by `declines`.
    """

    solver: Solver
    ridge: float = RIDGE
    scarcity: float = SCARCITY
    use_gradients: bool = True
    cross_validate: bool = True
    declined: dict[str, str] = field(default_factory=dict, init=False, compare=False)

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
            if self.declines(site, moments):
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
        fits = folded_fits(
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
        validated = self.validates(moments)
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

    def declines(self, site: CalibratedSite, moments: Moments | Samples) -> bool:
        """Return whether a site stays dense because its inputs are constant, and record it in `declined`."""
        if moments.varies:
            self.declined.pop(site.name, None)
        else:
            self.declined[site.name] = CONSTANT
        return site.name in self.declined

    def validates(self, moments: Moments | Samples) -> bool:
        """Return whether fits to the moments are judged on folds that are left out."""
        return self.cross_validate and has_folds(moments)


def folded_fits(
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


def _spectrum(response: Tensor, rank: int) -> Spectrum | None:
    """Return the singular values of the response, or None if they take long to compute."""
    full = min(response.shape[-2:])
    return thin_spectrum(singular_values(response), full, rank, of="response") if full <= EXACT_LIMIT else None
