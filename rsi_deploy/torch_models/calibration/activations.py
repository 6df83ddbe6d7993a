"""`Streams` of a torch module: calibration data run through it with hooks, as it is and as it is becoming.

    survey     dense runs, each up to the last site whose moments fit in memory beside the others'
    sequence   a stage of neighbouring sites at a time: dense run, run with the stages before replaced, both up to it
    distance   whole runs of some samples

A replaced layer computes with another `forward` for the time of a run; between runs the module is as it was.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from rsi_deploy.torch_models.compress import ModuleSite, find_module_sites, low_rank_layer

Forwards = Mapping[nn.Module, Callable[..., Any]]

GATHERED_LIMIT = 512 * 2**20
NEVER = "never executed on the calibration data"


class TorchActivations:
    """The streams of `module`, in evaluation mode, its BatchNorms behind Convs folded already (or else seen as layers).

    Args:
        module: runs on its own device.
        batches: gives a fresh iterator over the calibration data, a tuple of positional arguments at a time.
        wanted: says by name which sites may be split; the others stay dense and are not looked at.
        rows: how many rows a site with so many inputs gets of all the data, at most.
        seed: of the choice of rows.
        stages: in how many a sequence is run; a site does not feel those of its own stage.
        mask: index of the argument that is a padding mask `(N, L)`, 0 for padding; None finds the mask of data padded
            at the end by its shape and values. Its padding is no row of a product over `(N, L, ...)`.
        compensate: let a branch make up for what the stream it is added to has lost.
        memory: bytes that a survey gathers at a time, if more than one site.

    Raises:
        UsageError: a module in training mode, or data that are empty or do not fit it.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[], Iterable[Arguments]],
        *,
        wanted: Callable[[str], bool] = lambda name: True,
        rows: Callable[[int], int] = row_limit,
        seed: int = 0,
        stages: int = 16,
        mask: int | None = None,
        compensate: bool = True,
        memory: int = GATHERED_LIMIT,
    ) -> None:
        if module.training:
            raise UsageError("calibration needs the module in evaluation mode: call module.eval() first")
        if stages < 1:
            raise UsageError(f"stages must be at least 1, but got {stages!r}")
        self._module, self._seed, self._memory = module, seed, memory
        self._attentions = attentions_of(module)
        self._runs = Runs(module, batches, mask)
        found = [site for site in find_module_sites(module) if wanted(site.name)]
        self.unreachable = {site.name: site.obstacle for site in found if site.obstacle}
        reachable = {site.name: site for site in found if not site.obstacle}
        self._layers = layers_of(module, reachable.values(), self._attentions)
        trace = BatchTrace(self._layers)
        with opened(self._attentions):
            self._runs.run(self._runs.first, trace)
        self.unreachable |= {name: _why_never(site) for name, site in reachable.items() if name not in trace.inputs}
        samples = samples_of(self._runs.first)
        self._sites = {name: _stream_site(reachable[name], module, trace.rows[name] / samples) for name in trace.inputs}
        self._stages = staged(trace.inputs, stages)
        self._calls = {name: [LayerCall(name, number) for number in range(trace.calls[name])] for name in trace.inputs}
        self._added = trace.added if compensate else set()
        self._quotas = {
            name: max(1, rows(site.in_features) // (self._runs.count * trace.calls[name]))
            for name, site in self._sites.items()
        }
        self._dense: tuple[list[Arguments], Tensor] | None = None
        self._sensitivities: Mapping[str, OutputSensitivity] | None = None

    @property
    def sites(self) -> tuple[CalibratedSite, ...]:
        """See `Streams`; those that a survey found no rows of are no longer among them."""
        return tuple(site for site in self._sites.values() if site.name not in self.unreachable)

    def survey(self, visit: Callable[[CalibratedSite, Moments | Samples], None]) -> None:
        """See `Streams`; in execution order.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
        """
        for group in self._groups():
            names = [site.name for site in group]
            gathered = {site.name: SiteAccumulator(site) for site in group}
            wide = {site.name: site.load().float() for site in group if site.in_features > GRAM_LIMIT}
            with opened(self._attentions):
                layers, calls = self._layers_of(names), self._calls_of(names)
                for number, batch in enumerate(self._runs.batches()):
                    choosing = self._choosing(number, batch)
                    self._runs.run(batch, SurveyRun(layers, calls, choosing, wide, gathered))
            for site in group:
                moments = gathered.pop(site.name).result()
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
        """See `Streams`; a site without rows is not visited.

        Raises:
            ModelError: NaN or infinite values, with the site's name.
            ValueError: a replacement that does not fit its site.
        """
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for names in self._stages:
            gathered = self._gathered_stage(names, forwards, counts or {})
            became = {}
            for name in names:
                moments = gathered.pop(name).result()
                replacement = None if moments is None else visit(self._sites[name], moments)
                if replacement is not None:
                    became[name] = replacement
            forwards |= self._forwards(became)

    def distance(self, replacements: Mapping[str, Replacement]) -> Distance:
        """See `Streams`; of some samples from all over the data; padding is left out.

        Raises:
            ModelError: an output with NaN or infinite values where nothing is replaced, or no floating output.
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
        none = output_distance(dense, dense)
        return Distance(relative=math.inf, kl=None if none.kl is None else math.inf)

    def sensitivities(self) -> Mapping[str, OutputSensitivity]:
        """See `Streams`; asked for once. None where autograd does not pass."""

        def ask() -> dict[str, OutputSensitivity]:
            sites = {site.name: site for site in self.sites}
            layers = self._layers_of(list(sites))
            return output_sensitivities(self._module, self._runs, layers, sites, seed=self._seed)

        if self._sensitivities is None:
            with opened(self._attentions):
                self._sensitivities = sensitivities_or_empty(ask)
        return self._sensitivities

    # --- runs ---------------------------------------------------------------------------------------------------

    def _gathered_stage(
        self, names: Sequence[str], forwards: Forwards, counts: Mapping[str, RowCounts]
    ) -> dict[str, SiteAccumulator]:
        gathered = {name: SiteAccumulator(self._sites[name]) for name in names}
        weights = {name: self._sites[name].load().float() for name in names}
        layers, calls = self._layers_of(names), self._calls_of(names)
        begin = 0
        with opened(self._attentions):
            for number, batch in enumerate(self._runs.batches()):
                dense = DenseRun(layers, calls, self._added, self._choosing(number, batch), weights)
                self._runs.run(batch, dense)
                counted = BatchRowCounts(counts=counts, begin=begin, samples=samples_of(batch))
                compressed = CompressedRun(layers, dense.answers, self._added, gathered, counted)
                begin += samples_of(batch)
                with overridden(forwards):
                    self._runs.run(batch, compressed)
                compressed.finish()
        return gathered

    def _choosing(self, number: int, batch: Arguments) -> Choosing:
        return Choosing(seed=self._seed, batch=number, quotas=self._quotas, kept=self._runs.kept(batch))

    # --- sites --------------------------------------------------------------------------------------------------

    def _groups(self) -> Iterator[list[CalibratedSite]]:
        """The sites, as many at a time as may be gathered together."""
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
        """What the layers of replaced sites compute."""
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


def _stream_site(site: ModuleSite, module: nn.Module, rows: float) -> CalibratedSite:
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
        forms=site.forms,
        macs=round(rows * site.parameter.numel()),
        item_bytes=site.parameter.dtype.itemsize,
        load=site.matrix,
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
