"""The `ModelActivations` of a torch module, read by hooks while calibration data run through it.

    survey     dense runs, each for a group of sites whose moments fit in memory together
    sequence   for each stage of neighbouring sites a dense run, and a run with all earlier stages replaced
    distance   whole runs of some samples

Replaced layers have another `forward` during a run only; the module itself does not change.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rsi_deploy.calibration.accumulator import SiteAccumulator
from rsi_deploy.calibration.activations import (
    CalibratedSite,
    Distance,
    OutputSensitivity,
    Replacement,
    RowCounts,
    distance_samples,
    output_distance,
)
from rsi_deploy.calibration.moments import GRAM_LIMIT, Moments, Samples, moment_bytes, row_limit
from rsi_deploy.calibration.output_sensitivity import sensitivities_or_empty
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.torch_models.calibration.calls import Layer, LayerCall, opened, overridden
from rsi_deploy.torch_models.calibration.gradients import output_sensitivities
from rsi_deploy.torch_models.calibration.row_sampling import (
    BatchRowCounts,
    Choosing,
    CompressedRun,
    DenseRun,
    SurveyRun,
)
from rsi_deploy.torch_models.calibration.runs import Arguments, Runs, samples_of, stacked
from rsi_deploy.torch_models.calibration.trace import BatchTrace, attentions_of, layers_of, staged
from rsi_deploy.torch_models.module_sites import ModuleSite, find_module_sites, low_rank_layer
from rsi_deploy.torch_models.module_units import ModuleUnits

Forwards = Mapping[nn.Module, Callable[..., Any]]

MOMENT_LIMIT = 512 * 2**20
NEVER = "never executed on the calibration data"


class TorchActivations:
    """The activations of `module` on calibration data.

    Args:
        module: module in evaluation mode, on any device. BatchNorms behind Convs should be folded already.
        batches: function that returns a fresh iterator over the data, one tuple of positional arguments per call.
        may_split: function from a site name to whether the site may be split; other sites are ignored.
        rows: function from the number of inputs to the largest number of rows per site.
        seed: random seed for the choice of rows and for probes.
        stages: number of stages of a sequence; replacements take effect in later stages only.
        mask: index of the argument that is a padding mask `(N, L)`, 0 for padding. None finds the mask of data padded
            at the end by its shape and values. Padding gives no rows for a product over `(N, L, ...)`.
        compensate: whether a branch is fitted to correct the errors of the residual stream that it is added to.
        memory: bytes of moments that a survey keeps at a time; one site may exceed it.
        units: hidden units, by the name of the site that reads them.

    Raises:
        UsageError: a module in training mode, or data that are empty or do not fit it.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[], Iterable[Arguments]],
        *,
        may_split: Callable[[str], bool] = lambda name: True,
        rows: Callable[[int, int], int] = row_limit,
        seed: int = 0,
        stages: int = 16,
        mask: int | None = None,
        compensate: bool = True,
        memory: int = MOMENT_LIMIT,
        units: Mapping[str, ModuleUnits] = MappingProxyType({}),
    ) -> None:
        if module.training:
            raise UsageError("calibration needs the module in evaluation mode: call module.eval() first")
        if stages < 1:
            raise UsageError(f"stages must be at least 1, but got {stages!r}")
        self._module, self._seed, self._memory = module, seed, memory
        self._attentions = attentions_of(module)
        self._runs = Runs(module, batches, mask)
        found = [site for site in find_module_sites(module) if may_split(site.name)]
        self.unreachable = {site.name: site.obstacle for site in found if site.obstacle}
        reachable = {site.name: site for site in found if not site.obstacle}
        self._layers = layers_of(module, reachable.values(), self._attentions)
        trace = BatchTrace(self._layers)
        with opened(self._attentions):
            self._runs.run(self._runs.first, trace)
        self.unreachable |= {name: _why_never(site) for name, site in reachable.items() if name not in trace.inputs}
        samples = samples_of(self._runs.first)
        self._sites = {
            name: _calibrated_site(reachable[name], module, trace.rows[name] / samples, units.get(name))
            for name in trace.inputs
        }
        self._stages = staged(trace.inputs, stages)
        self._calls = {name: [LayerCall(name, number) for number in range(trace.calls[name])] for name in trace.inputs}
        self._added = trace.summands if compensate else set()
        self._quotas = {
            name: max(1, rows(site.in_features, site.groups) // (self._runs.count * trace.calls[name]))
            for name, site in self._sites.items()
        }
        self._dense: tuple[list[Arguments], Tensor] | None = None
        self._sensitivities: Mapping[str, OutputSensitivity] | None = None

    @property
    def first(self) -> Arguments:
        """The first batch, on the device of the module."""
        return self._runs.first

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """The sites that can be calibrated. Sites without rows in a survey are excluded after it."""
        return tuple(site for site in self._sites.values() if site.name not in self.unreachable)

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """See `ModelActivations`; the order is that of execution.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        for group in self._groups():
            names = [site.name for site in group]
            accumulators = {site.name: SiteAccumulator(site) for site in group}
            wide = {site.name: site.load().float() for site in group if site.in_features > GRAM_LIMIT}
            with opened(self._attentions):
                layers, calls = self._layers_of(names), self._calls_of(names)
                for number, batch in enumerate(self._runs.batches()):
                    choosing = self._choosing(number, batch)
                    self._runs.run(batch, SurveyRun(layers, calls, choosing, wide, accumulators))
            for site in group:
                moments = accumulators.pop(site.name).result()
                if isinstance(moments, Moments):
                    moments = Moments.dense(moments, site.load())
                if moments is None:
                    self.unreachable[site.name] = NEVER
                elif not torch.isfinite(moments.yy if isinstance(moments, Moments) else moments.y).all():
                    raise ModelError(
                        f"site {site.name!r}: its weight holds NaN or infinite values "
                        f"(type --exclude {site.name!r} to leave it dense)"
                    )
                else:
                    visit(site, moments)

    def sequence(
        self,
        visit: Callable[[CalibratedSite, Moments | Samples], Replacement | None],
        counts: Mapping[str, RowCounts] | None = None,
    ) -> None:
        """See `ModelActivations`; a site without rows is not visited.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
            ValueError: a replacement that does not fit its site.
        """
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for names in self._stages:
            accumulators = self._run_stage(names, forwards, counts or {})
            replacements = {}
            for name in names:
                moments = accumulators.pop(name).result()
                replacement = None if moments is None else visit(self._sites[name], moments)
                if replacement is not None:
                    replacements[name] = replacement
            forwards |= self._forwards(replacements)

    def distance(self, replacements: Mapping[str, Replacement]) -> Distance:
        """See `ModelActivations`; measured on samples evenly spaced over the data, without padding.

        Raises:
            ModelError: the dense output holds NaN or infinite values, or is not floating.
            ValueError: a replacement that does not fit its site.
        """
        with opened(self._attentions):
            if self._dense is None:
                self._dense = self._runs.spread_outputs(distance_samples(self._runs.samples), self._memory)
            batches, dense = self._dense
            with overridden(self._forwards(replacements)):
                other = stacked([self._runs.output(batch) for batch in batches])
        if torch.isfinite(other).all():
            return output_distance(dense, other)
        has_kl = output_distance(dense, dense).kl is not None
        return Distance(relative=math.inf, kl=math.inf if has_kl else None)

    def sensitivities(self) -> Mapping[str, OutputSensitivity]:
        """See `ModelActivations`; computed once, and empty if autograd fails."""

        def compute() -> dict[str, OutputSensitivity]:
            sites = {site.name: site for site in self.sites}
            layers = self._layers_of(list(sites))
            return output_sensitivities(self._module, self._runs, layers, sites, seed=self._seed)

        if self._sensitivities is None:
            with opened(self._attentions):
                self._sensitivities = sensitivities_or_empty(compute)
        return self._sensitivities

    # --- runs ---------------------------------------------------------------------------------------------------

    def _run_stage(
        self, names: Sequence[str], forwards: Forwards, counts: Mapping[str, RowCounts]
    ) -> dict[str, SiteAccumulator]:
        accumulators = {name: SiteAccumulator(self._sites[name]) for name in names}
        weights = {name: self._sites[name].load().float() for name in names}
        layers, calls = self._layers_of(names), self._calls_of(names)
        begin = 0
        with opened(self._attentions):
            for number, batch in enumerate(self._runs.batches()):
                dense = DenseRun(layers, calls, self._added, self._choosing(number, batch), weights)
                self._runs.run(batch, dense)
                row_counts = BatchRowCounts(counts=counts, batch=number, begin=begin, samples=samples_of(batch))
                compressed = CompressedRun(layers, dense.responses, self._added, accumulators, row_counts)
                begin += samples_of(batch)
                with overridden(forwards):
                    self._runs.run(batch, compressed)
                compressed.finish()
        return accumulators

    def _choosing(self, number: int, batch: Arguments) -> Choosing:
        return Choosing(seed=self._seed, batch=number, quotas=self._quotas, kept=self._runs.kept(batch))

    # --- sites --------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[list[CalibratedSite]]:
        """Yield groups of sites whose moments fit in memory together."""
        group: list[CalibratedSite] = []
        total = 0
        for site in self.sites:
            wide = site.out_features if site.in_features > GRAM_LIMIT else 0
            quota = self._quotas[site.name] * self._runs.count * len(self._calls[site.name])
            size = moment_bytes(site.in_features, wide, site.groups, quota)
            if group and total + size > self._memory:
                yield group
                group, total = [], 0
            group.append(site)
            total += size
        if group:
            yield group

    def _layers_of(self, names: Sequence[str]) -> list[Layer]:
        return [layer for layer in self._layers if layer.site in names]

    def _calls_of(self, names: Sequence[str]) -> list[LayerCall]:
        return [call for name in names for call in self._calls[name]]

    def _forwards(self, replacements: Mapping[str, Replacement]) -> dict[nn.Module, Callable[..., Any]]:
        """Return the new `forward` of every layer of replaced sites."""
        for name, replacement in replacements.items():
            if name not in self._sites:
                raise ValueError(
                    f"site {name!r}: it cannot be replaced here ({self.unreachable.get(name, 'no such site')})"
                )
            _check_fits(replacement, self._sites[name])
        return {
            layer.module: low_rank_layer(layer.module, replacements[layer.site]).forward
            for layer in self._layers
            if layer.site in replacements
        }


def _calibrated_site(site: ModuleSite, module: nn.Module, rows: float, units: ModuleUnits | None) -> CalibratedSite:
    out_features, in_features = site.shape
    layer = module.get_submodule(site.paths[0])
    return CalibratedSite(
        name=site.name,
        kind=site.kind,
        groups=site.groups,
        out_features=out_features,
        in_features=in_features,
        kernel=site.kernel,
        strides=layer.stride if isinstance(layer, nn.modules.conv._ConvNd) else (),
        forms=site.forms if units is None else (*site.forms, units.units.form),
        macs=round(rows * site.parameter.numel()),
        item_bytes=site.parameter.dtype.itemsize,
        load=site.matrix,
        units=None if units is None else units.units,
        unit_macs=0 if units is None else units.macs,
    )


def _why_never(site: ModuleSite) -> str:
    if site.kind == "MultiheadAttention":
        return f"{NEVER}, or only with query, key and value that are not one tensor"
    return NEVER


def _check_fits(replacement: Replacement, site: CalibratedSite) -> None:
    form, left, right, bias = replacement
    if form not in site.forms:
        raise ValueError(f"site {site.name!r}: its forms are {', '.join(site.forms)}, but got {form!r}")
    rows, columns = site.shape(form)
    found = tuple(tuple(t.shape) for t in (left, right, bias))
    rank = left.shape[-1]
    expected = (site.groups, rows, rank), (site.groups, rank, columns), (site.groups, site.out_features)
    if found != expected:
        raise ValueError(f"site {site.name!r}: left, right and bias must be {expected}, but got {found}")
