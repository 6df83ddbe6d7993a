"""What `graph_passes.split` asks for factors: decide each weight, factorize it once, and keep the record of it.

site --> SitePlanner.decide --> dense, with the reason
                            --> as fitted to calibration data
                            --> Solver (RSI) on the weight alone, in any form
                            --> one right factor for a group of weights that multiply the same input

Who factorizes is the executor's business (`rsi_deploy.execution.executor`); which sites will be asked for, and how, is
known ahead.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

import graph_passes as gp
from rsi_deploy.calibration.activations import FittedSite, Replacement
from rsi_deploy.core.arrays import as_numpy, as_torch
from rsi_deploy.core.sites import SiteRecord, break_even_rank, site_name, unmeasured_record
from rsi_deploy.execution.executor import Executor, Task
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Factors, Solver, balanced
from rsi_deploy.planning.planner import Decision, SitePlanner
from rsi_deploy.planning.shared_right import factorize_with_shared_right

Progress = Callable[[str, int, int], None]


@dataclass(kw_only=True)
class FactorSource:
    """What `graph_passes.split` asks for factors: decides, factorizes, and keeps the record of each weight."""

    planner: SitePlanner
    solver: Solver
    executor: Executor
    fitted: Mapping[str, FittedSite]
    progress: Progress | None
    wanted: frozenset[str]
    device: torch.device
    order: list[str]
    groups: dict[tuple[str, ...], tuple[gp.Site, ...]]
    records: dict[str, SiteRecord] = field(default_factory=dict)
    kept: dict[str, gp.Factors] = field(default_factory=dict)
    waiting: dict[str, gp.Factors] = field(default_factory=dict)  # of members of a group that is not joint
    remarks: dict[str, str] = field(default_factory=dict)  # why a member is not split jointly

    def __call__(self, site: gp.Site) -> gp.Factors | gp.Dense:
        """The answer for one site, or for one group of them."""
        if site.members:
            return self._jointly(site) or gp.Dense(reason="alone")
        if site.weight in self.waiting:
            return self.waiting.pop(site.weight)
        decision = self._decision(site)
        if decision.rank is None:
            return gp.Dense(reason=decision.reason)
        if fit := self.fitted.get(site_name(site.weight)):
            return self._as_fitted(site, fit, decision)
        if decision.form not in ("first", site.forms[0]):
            return self._in_form(site, decision)
        return self._alone(site, decision.rank, self.remarks.get(site.weight, decision.reason))

    def _as_fitted(self, site: gp.Site, fit: FittedSite, decision: Decision) -> gp.Factors:
        """What calibration has made of it; the distance from the weight says little then, and is not measured."""
        factors = graph_factors(fit.replacement, site)
        record = unmeasured_record(
            site_name(site.weight),
            site.op_type,
            (site.groups, site.out_features, site.in_features),
            factors.rank,
            factors.left.size + factors.right.size,
            reason=decision.reason,
            seconds=fit.seconds,
        )
        fitted = {"response_error": fit.response_error, "spectrum": fit.spectrum}
        self._keep_record(site, factors, record.model_copy(update=fitted))
        return self._kept(site, factors)

    def _in_form(self, site: gp.Site, decision: Decision) -> gp.Factors:
        """Factors of the weight alone, in another form than the usual one."""
        pair, record = self._factorized(site, decision.form, decision.rank or 0, decision.reason)
        factors = replace(_arrays(pair), form=site.form_of(decision.form))
        self._keep_record(site, factors, record)
        return self._kept(site, factors)

    def _keep_record(self, site: gp.Site, factors: gp.Factors, record: SiteRecord) -> None:
        """The record with the weight's own shape, and the break-even rank of the form."""
        self.records[site.weight] = record.model_copy(
            update={
                "out_features": site.out_features,
                "in_features": site.in_features,
                "break_even_rank": break_even_rank(*site.shape(factors.form)),
            }
        )

    def _alone(self, site: gp.Site, rank: int, reason: str, *, again: bool = False) -> gp.Factors:
        """Factors of the weight alone; `again` where the weight is needed once more."""
        pair, record = self._factorized(site, "first", rank, reason, again=again)
        self.records[site.weight] = record
        return self._kept(site, _arrays(pair))

    def _factorized(
        self, site: gp.Site, form: gp.Form | Literal["first"], rank: int, reason: str, *, again: bool = False
    ) -> tuple[Factors, SiteRecord]:
        self._tell(site_name(site.weight), site)
        call = self._call(site, form, rank)
        factors, record = self.executor.made(call)
        if not again:
            self.executor.done(*call.weights)
        return factors, record.model_copy(update={"reason": f"{reason}{record.reason}"})

    def _call(self, site: gp.Site, form: gp.Form | Literal["first"], rank: int) -> Task:
        """What factorizes a site; why it is split stands before what the record says, once that is known."""
        how = {"name": site_name(site.weight), "kind": site.op_type, "rank": rank, "solver": self.solver}
        return Task(compute=factorized, weights={weight_key(site, form): self._loader(site, form)}, how=how)

    def ahead(self, sites: Iterable[gp.Site]) -> Iterator[Task]:
        """The calls that these sites will come to, one a weight; a site is let go when its turn has come."""
        first: dict[str, gp.Site] = {}
        for site in sites:
            first.setdefault(site.weight, site)
        left = deque(first.values())
        del sites, first
        while left:
            site = left.popleft()
            decision = self._decision(site)
            if decision.rank is not None and site_name(site.weight) not in self.fitted:
                form = "first" if decision.form in ("first", site.forms[0]) else decision.form
                yield self._call(site, form, decision.rank)

    def _jointly(self, site: gp.Site) -> gp.Factors | None:
        """Factors for all members of a group, or None where they stay apart: then theirs alone wait for their turn."""
        members = self.groups.pop(site.members, ())
        decisions = [self._decision(member) for member in members]
        if dense := [site_name(m.weight) for m, d in zip(members, decisions, strict=True) if d.rank is None]:
            self._remark(members, f"{', '.join(dense)} stays dense")
        if dense or not members:
            return None
        alone = [self._alone(m, d.rank or 0, d.reason, again=True) for m, d in zip(members, decisions, strict=True)]
        self._tell(" + ".join(site_name(member.weight) for member in members), members[-1])
        call = Task(
            compute=jointly,
            weights={weight_key(member, "first"): self._loader(member, "first") for member in members},
            how={"alone": [self.records[member.weight] for member in members], "solver": self.solver},
            announced=False,
        )
        result = self.executor.made(call)
        self.executor.done(*call.weights)
        if result is None:
            self._remark(members, "it costs no less for the same errors")
            self.waiting |= {member.weight: factors for member, factors in zip(members, alone, strict=True)}
            return None
        factors = _arrays(result[0])
        ends = np.cumsum([member.out_features for member in members])[:-1]
        for member, left, record in zip(members, np.split(factors.left, ends, axis=1), result[1], strict=True):
            self.records[member.weight] = record
            self._kept(member, gp.Factors(left=left, right=factors.right))
        return factors

    def _decision(self, site: gp.Site) -> Decision:
        return self.planner.decide(site_name(site.weight), site.out_features, site.in_features)

    def _loader(self, site: gp.Site, form: gp.Form | Literal["first"]) -> Callable[[], torch.Tensor]:
        return lambda: as_torch(site.load(form)).to(self.device)

    def _kept(self, site: gp.Site, factors: gp.Factors) -> gp.Factors:
        if site.weight in self.wanted and not site.both_ways:  # else nobody knows which of its nodes is meant
            self.kept[site.weight] = factors
        return factors

    def _tell(self, name: str, site: gp.Site) -> None:
        if self.progress:
            self.progress(name, self.order.index(site.weight), len(self.order))

    def _remark(self, members: Iterable[gp.Site], why: str) -> None:
        """Have the records of a group's split members say why they are split alone."""
        names = {member.weight: site_name(member.weight) for member in members}
        for weight in names:
            others = ", ".join(name for other, name in names.items() if other != weight)
            self.remarks[weight] = f"not jointly with {others}: {why}"
            if weight in self.records:
                self.records[weight] = self.records[weight].model_copy(update={"reason": self.remarks[weight]})


def factorized(weight: torch.Tensor, *, name: str, kind: str, rank: int, solver: Solver) -> tuple[Factors, SiteRecord]:
    """`factorize_site` as a call; the record's reason is "", or "; " and what came otherwise than asked."""
    return factorize_site(weight, rank, solver, name=name, kind=kind, reason="")


def jointly(
    *weights: torch.Tensor, alone: Sequence[SiteRecord], solver: Solver
) -> tuple[Factors, list[SiteRecord]] | None:
    """`factorize_with_shared_right` as a call."""
    return factorize_with_shared_right(weights, alone, solver)


def weight_key(site: gp.Site, form: gp.Form | Literal["first"]) -> Hashable:
    """The same for the same weight in the same orientation."""
    return site.weight, site.shape(form), site.form_of(form)


def graph_factors(replacement: Replacement, site: gp.Site) -> gp.Factors:
    """A replacement in the dtype in which the graph stores the site."""
    dtype = getattr(torch, site.dtype)
    left, right = replacement.left, replacement.right
    if dtype.itemsize < 4:
        left, right = balanced(left, right)
    stored = [as_numpy(t.detach().cpu().to(dtype).contiguous()) for t in (left, right, replacement.bias.reshape(-1))]
    return gp.Factors(left=stored[0], right=stored[1], form=replacement.form, bias=stored[2])


def _arrays(factors: Factors) -> gp.Factors:
    return gp.Factors(left=as_numpy(factors.left.cpu()), right=as_numpy(factors.right.cpu()))
