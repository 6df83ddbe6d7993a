"""The work on each site of a graph: decide it, name the task that factorizes it, and record what became of it.

    site --> SitePlanner.decide --> dense, with the reason
                                --> factors that were fitted to calibration data
                                --> a task: RSI of the weight alone, in any form
                                --> a task: one right factor for a group of weights that multiply the same input

An executor (`rsi_deploy.execution.executor`) runs the tasks; all tasks but those of groups are known in advance.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

import graph_passes as gp
from graph_passes.forms import FOLDED, break_even_rank, split_numbers
from rsi_deploy.calibration.activations import FittedSite, Replacement
from rsi_deploy.core.arrays import as_numpy, as_torch
from rsi_deploy.core.sites import SiteRecord, site_name, unmeasured_record
from rsi_deploy.execution.executor import Executor, Task
from rsi_deploy.linalg.pivoting import RUN_BOUND, pivoted
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Factors, Solver, balanced
from rsi_deploy.planning.planner import Decision, SitePlanner
from rsi_deploy.planning.shared_right import factorize_with_shared_right

Progress = Callable[[str, int, int], None]
AnyForm = gp.Form | Literal["first"]


@dataclass(kw_only=True)
class SiteFactorizer:
    """Decides the sites of one graph, names their tasks, and keeps a record of each weight that is split.

    Attributes:
        planner: decides each site.
        solver: computes factors.
        executor: runs the tasks of a group of sites.
        fitted: site name -> factors fitted to calibration data.
        progress: called with (site, index, count) before each factorization.
        keep: names of weights whose factors are kept.
        device: where factors are computed.
        order: names of all weights, in graph order.
        groups: names of the weights of a group -> its sites.
        records: name of a split weight -> its record.
        kept: name of a weight in `keep` -> its factors.
    """

    planner: SitePlanner
    solver: Solver
    executor: Executor
    fitted: Mapping[str, FittedSite]
    progress: Progress | None
    keep: frozenset[str]
    device: torch.device
    order: list[str]
    groups: dict[tuple[str, ...], tuple[gp.Site, ...]]
    records: dict[str, SiteRecord] = field(default_factory=dict)
    kept: dict[str, gp.SplitFactors] = field(default_factory=dict)
    _waiting: dict[str, gp.SplitFactors] = field(
        default_factory=dict
    )  # of members of a group that is not split jointly
    _remarks: dict[str, str] = field(default_factory=dict)  # why a member is not split jointly

    def tasks(self, sites: Iterable[gp.Site]) -> Iterator[Task]:
        """Yield the tasks of these sites, one for each weight; a site is released when its turn has come."""
        first: dict[str, gp.Site] = {}
        for site in sites:
            first.setdefault(site.weight, site)
        left = deque(first.values())
        del sites, first
        while left:
            if (task := self._task(left.popleft())) is not None:
                yield task

    def started(self, site: gp.Site) -> Task | None:
        """Return the task that factorizes the site, and report progress; None where `without_task` has the answer."""
        task = None if site.members or site.weight in self._waiting else self._task(site)
        if task is not None:
            self._report(site_name(site.weight), site)
        return task

    def finished(self, site: gp.Site, result: tuple[Factors, SiteRecord]) -> gp.SplitFactors:
        """Record the result of a site's task and return the factors for the graph."""
        factors, record = result
        decision = self._decision(site)
        reason = self._remarks.get(site.weight, decision.reason)
        record = record.model_copy(update={"reason": f"{reason}{record.reason}"})
        return self._recorded(site, _arrays(factors, site.form_of(decision.form)), record)

    def without_task(self, site: gp.Site) -> gp.SplitFactors | gp.Dense:
        """Return the answer for a site without a task of its own: dense, fitted, or one of a group's."""
        if site.members:
            return self._jointly(site) or gp.Dense(reason="alone")
        if site.weight in self._waiting:
            return self._waiting.pop(site.weight)
        decision = self._decision(site)
        if decision.rank is None:
            return gp.Dense(reason=decision.reason)
        fit = self.fitted[site_name(site.weight)]
        factors = graph_factors(fit.replacement, site)
        record = unmeasured_record(  # the distance from the weight says little about factors that fit the data
            site_name(site.weight),
            site.op_type,
            (site.groups, site.out_features, site.in_features),
            factors.rank,
            site.groups * split_numbers(factors.form, *site.shape(factors.form), factors.rank),
            reason=decision.reason,
            seconds=fit.seconds,
        )
        update = {name: getattr(fit, name) for name in ("response_error", "held_out_error", "spectrum")}
        return self._recorded(site, factors, record.model_copy(update=update))

    def _decision(self, site: gp.Site) -> Decision:
        return self.planner.decide(site_name(site.weight), site.out_features, site.in_features)

    def _task(self, site: gp.Site) -> Task | None:
        """The factorization of the weight alone; None where it stays dense or is fitted."""
        decision, name = self._decision(site), site_name(site.weight)
        if decision.rank is None or name in self.fitted:
            return None
        form: AnyForm = "first" if decision.form in ("first", site.forms[0]) else decision.form
        # The reason of the decision comes first in the record's, and may still change.
        how = {"name": name, "kind": site.op_type, "rank": decision.rank, "solver": self.solver, "reason": ""}
        return Task(compute=factorize_site, weights=self._weight(site, form), how=how)

    def _weight(self, site: gp.Site, form: AnyForm) -> dict[Hashable, Callable[[], torch.Tensor]]:
        return {weight_key(site, form): lambda: as_torch(site.load(form)).to(self.device)}

    def _recorded(self, site: gp.Site, factors: gp.SplitFactors, record: SiteRecord) -> gp.SplitFactors:
        """Keep the record, with the weight's own shape, and the numbers and the break-even rank of the form."""
        rows, columns = site.shape(factors.form)
        self.records[site.weight] = record.model_copy(
            update={
                "out_features": site.out_features,
                "in_features": site.in_features,
                "params_compressed": site.groups * split_numbers(factors.form, rows, columns, factors.rank),
                "break_even_rank": break_even_rank(factors.form, rows, columns),
            }
        )
        return self._kept(site, factors)

    def _kept(self, site: gp.Site, factors: gp.SplitFactors) -> gp.SplitFactors:
        if site.weight in self.keep and not site.both_ways:  # else it is unknown which of its nodes is meant
            self.kept[site.weight] = factors
        return factors

    def _jointly(self, site: gp.Site) -> gp.SplitFactors | None:
        """Factors for all members of a group; None where each has its own, which then wait for their turn."""
        members = self.groups.pop(site.members, ())
        if dense := [site_name(member.weight) for member in members if self._decision(member).rank is None]:
            self._remark(members, f"{', '.join(dense)} stays dense")
        if dense or not members:
            return None
        alone = []
        for member in members:  # their weights are not released: the group needs them once more
            task = self.started(member)
            assert task is not None
            alone.append(self.finished(member, self.executor.result(task)))
        self._report(" + ".join(site_name(member.weight) for member in members), members[-1])
        task = Task(
            compute=jointly,
            weights={key: load for member in members for key, load in self._weight(member, "first").items()},
            how={"alone": [self.records[member.weight] for member in members], "solver": self.solver},
            announced=False,
        )
        result = self.executor.result(task)
        self.executor.release(*task.weights)
        if result is None:
            self._remark(members, "it costs no less for the same errors")
            self._waiting |= {member.weight: factors for member, factors in zip(members, alone, strict=True)}
            return None
        factors = _arrays(result[0], site.forms[0])
        ends = np.cumsum([member.out_features for member in members])[:-1]
        for member, left, record in zip(members, np.split(factors.left, ends, axis=1), result[1], strict=True):
            self.records[member.weight] = record
            self._kept(member, gp.SplitFactors(left=left, right=factors.right))
        return factors

    def _report(self, name: str, site: gp.Site) -> None:
        if self.progress:
            self.progress(name, self.order.index(site.weight), len(self.order))

    def _remark(self, members: Iterable[gp.Site], why: str) -> None:
        """Put into the records of a group's members why each is split alone."""
        names = {member.weight: site_name(member.weight) for member in members}
        for weight in names:
            others = ", ".join(name for other, name in names.items() if other != weight)
            self._remarks[weight] = f"not jointly with {others}: {why}"
            if weight in self.records:
                self.records[weight] = self.records[weight].model_copy(update={"reason": self._remarks[weight]})


def jointly(
    *weights: torch.Tensor, alone: Sequence[SiteRecord], solver: Solver
) -> tuple[Factors, list[SiteRecord]] | None:
    """Compute `factorize_with_shared_right` as a task."""
    return factorize_with_shared_right(weights, alone, solver)


def weight_key(site: gp.Site, form: AnyForm) -> Hashable:
    """Return a key that is equal for the same weight in the same orientation."""
    return site.weight, site.shape(form), site.form_of(form)


def graph_factors(replacement: Replacement, site: gp.Site) -> gp.SplitFactors:
    """Return a replacement in the dtype in which the graph stores the site."""
    dtype = getattr(torch, site.dtype)
    left, right = replacement.left, replacement.right
    if dtype.itemsize < 4 and replacement.form not in {"pivoted", *FOLDED}:
        left, right = balanced(left, right)
    factors = _arrays(Factors(left.detach(), right.detach()), replacement.form, dtype)
    return replace(factors, bias=as_numpy(replacement.bias.detach().cpu().reshape(-1).to(dtype).contiguous()))


def _arrays(factors: Factors, form: gp.Form, dtype: torch.dtype | None = None) -> gp.SplitFactors:
    """Return factors for the graph in a form, in their own dtype or another one."""
    pivots = None
    if form == "pivoted":
        bound = RUN_BOUND if (dtype or factors.left.dtype).itemsize >= 4 else 0.0
        *factors_, rows = pivoted(*factors, run_bound=bound)
        factors, pivots = Factors(*factors_), as_numpy(rows.cpu())
    left, right = (as_numpy(t.cpu().to(dtype or t.dtype).contiguous()) for t in factors)
    return gp.SplitFactors(left=left, right=right, form=form, pivots=pivots)
