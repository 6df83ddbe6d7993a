"""Shared parts of the latency benchmarks: cost tables of dense models, and plans for time alone.

Factors are zeros (`rsi_deploy.costing.zero_filled`): values change no time. Without calibration, a plan's loss is the
squared share of full rank that a site loses, which spreads the cuts over all sites.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch

import graph_passes as gp
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.calibration.activations import FittedSite, Replacement
from rsi_deploy.core.sites import break_even_rank, site_name
from rsi_deploy.core.types import Feeds
from rsi_deploy.costing.cost_table import CostTable
from rsi_deploy.exporting.timing.profile import Costing, fed_with
from rsi_deploy.exporting.timing.slowdown_rollback import SlowdownRollback
from rsi_deploy.exporting.timing.slowdown_rollback import splits_of as left_of
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.split import SplitModel, split_model
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.planning.planner import Decision, FixedPlanner, SitePlanner
from rsi_deploy.planning.site_options import PLAIN_FORMS
from rsi_deploy.runtime.shape_trace import trace_run

TORCHVISION = ("mobilenet_v2", "resnet50", "vit_b_32", "vgg19", "convnext_tiny")
NETS = ("cnn_cifar10", "resnet20", "resnet56", "minilm", *TORCHVISION)
"""Nets of a usual run; every one of `bench.untrained` can be named."""

Splits = dict[str, tuple[str, int]]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One net at one batch and number of threads, with its cost table.

    Attributes:
        net: name of the net.
        dense: the dense ONNX file.
        feeds: input name -> array.
        table: cost table of this machine.
        sites: all that can be split, by name, those that several nodes share left out.
        macs: multiply-accumulates of a batch, by site.
        params: parameters of the whole model.
        total_macs: multiply-accumulates of the whole model.
    """

    net: str
    dense: Path
    feeds: Feeds
    table: CostTable
    sites: Mapping[str, gp.Site]
    macs: Mapping[str, int]
    params: int
    total_macs: int

    @property
    def threads(self) -> int:
        """The threads inside one operator."""
        return self.table.conditions.threads or 0

    def options(self) -> list[SiteOptions]:
        """Every site's options in the plain forms; see the module for their loss."""
        return [self._options(name, site) for name, site in self.sites.items()]

    def _options(self, name: str, site: gp.Site) -> SiteOptions:
        numbers, macs = site.groups * site.out_features * site.in_features, self.macs[name]
        dense = Option(form="dense", rank=None, params=numbers, macs=macs, bytes=4 * numbers, loss=0.0)
        splits = []
        for form in (form for form in site.forms if form in PLAIN_FORMS):
            rows, columns = site.shape(form)
            strides = site.window.strides if site.window else ()
            denser = {"input": 0, "separable": 1}.get(form, len(strides))
            extra = 1
            for stride in strides[denser:]:
                extra *= stride
            full = min(rows, columns)
            for rank in range(1, full + 1):
                if rank >= min(site.out_features * site.in_features / (rows + columns), break_even_rank(rows, columns)):
                    break
                kept = site.groups * rank * (rows + columns)
                work = round(macs * rank * (rows + columns * extra) / (site.out_features * site.in_features))
                loss = float((1 - rank / full) ** 2)
                splits.append(Option(form=form, rank=rank, params=kept, macs=work, bytes=4 * kept, loss=loss))
        return SiteOptions(name=name, options=(dense, *splits))

    def measured(self, paths: Sequence[Path], labels: Sequence[str], seconds: float) -> BenchResult:
        """Measure the dense model and others in one run."""
        return bench(
            [self.dense, *paths],
            feeds=self.feeds,
            provider=self.table.conditions.provider,
            threads=self.threads,
            seconds=seconds,
            labels=["dense", *labels],
        )


def setting(net: str, dense: Path, batch: int, threads: int, seconds: float, provider: str = "cpu") -> Setting:
    """The net at a batch and number of threads; its table is measured within `seconds`, or known from the cache."""
    feeds = fed_with(dense, batch, 0, None, None)
    table = Costing(provider=provider, threads=threads, seconds=seconds).table(dense, feeds, name=net)
    model, counted = ir.load(dense), trace_run(dense, feeds).macs
    sites = {site_name(s.weight): s for s in gp.find_sites(model) if isinstance(s, gp.Site)}
    known = {name: site for name, site in sites.items() if name in table.sites and site.node in counted}
    return Setting(
        net=net,
        dense=dense,
        feeds=feeds,
        table=table,
        sites=known,
        macs={name: counted[site.node] for name, site in known.items()},
        params=gp.count_parameters(model),
        total_macs=sum(counted.values()),
    )


def splits_of(choice: Mapping[str, Option]) -> Splits:
    """Site name -> (form, rank) of what is chosen to be split."""
    return {name: (option.form, option.rank) for name, option in choice.items() if option.rank is not None}


def after_rollback(here: Setting, splits: Splits, path: Path, seconds: float) -> Splits:
    """Return the splits that the rollback of an export keeps; factors are zeros, and the model is written to `path`."""
    sites = {name: here.sites[name] for name in splits}

    def planned(planner: SitePlanner) -> Planned:
        kept = {name: split for name, split in splits.items() if planner.decide(name, 0, 0).rank is not None}
        return Planned(planner=planner, fitted={n: blank_factors(sites[n], *split) for n, split in kept.items()})

    def compress(made: Planned) -> SplitModel:
        return split_model(ir.load(here.dense), made.planner, Solver(), path=path, fitted=made.fitted)

    decisions = {
        name: Decision(rank=rank, reason="planned", form=site.form_of(form))
        for (name, (form, rank)), site in zip(splits.items(), sites.values(), strict=True)
    }
    made = planned(FixedPlanner(decisions=decisions))
    rollback = SlowdownRollback(
        compress=compress,
        measure=lambda: here.measured([path], ["delivered"], seconds),
        refit=planned,
        dense=here.dense,
        feeds=here.feeds,
        costing=Costing(provider=here.table.conditions.provider, threads=here.threads),
        table=here.table,
    )
    return left_of(rollback.outcome(made, compress(made)).split)


def blank_factors(site: gp.Site, form: str, rank: int) -> FittedSite:
    """Return factors of zeros in the form of calibration's results."""
    rows, columns = site.shape(own := site.form_of(form))
    left, right = torch.zeros(site.groups, rows, rank), torch.zeros(site.groups, rank, columns)
    replacement = Replacement(own, left, right, torch.zeros(site.bias_size))
    return FittedSite(replacement=replacement, response_error=0.0, seconds=0.0)
