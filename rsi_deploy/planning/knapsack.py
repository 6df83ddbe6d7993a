"""Choose one option per site, with the least total loss under a limit on the total cost.

    minimise  sum_i loss_i(o_i)   subject to   sum_i cost_i(o_i) <= limit        (multiple-choice knapsack)

1. *Frontiers.* Options that another one beats in cost and loss are dropped. The loss of the remaining options of a site
   falls as their cost rises. Their lower convex hull is a chain of steps with a slope: loss saved per unit of cost.
   A site that reads hidden units and the sites that make them have one frontier: the hull of the sums of their options,
   and the options that change them together.
2. *Lagrangian sweep.* Starting from the cheapest options, the hull steps are taken in the order of falling slope. After
   each step the choice is optimal for its own cost. The sweep stops before the first step that does not fit. By
   duality no choice within the limit is better by more than the loss of that step.
3. *Core.* With `price` the slope of that step, every other option has a regret
   `(loss + price * cost) - (loss + price * cost of the choice) >= 0`. A set of changes improves the choice only if its
   regrets add up to less than the loss of the step. The changes of least regret (upgrades, and swaps of an upgrade for
   downgrades elsewhere) are combined by a dynamic program over Pareto-optimal states. It is exact unless there are
   more than `CORE` changes or `STATES` states.

The changes in 3 depend on the step and not on the limit, so a larger limit never gives a larger loss.
(Sinha and Zoltners 1979 for the hulls, Pisinger 1995 for the core.)
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from graph_passes.forms import FOLDED

Cost: TypeAlias = Literal["params", "macs", "bytes", "nanoseconds"]
Array: TypeAlias = npt.NDArray[Any]

CORE = 192  # largest number of changes to combine, by least regret
STATES = 1024  # largest number of states kept after each site, by least regret


class UnreachableLimitError(ValueError):
    """Signals that even the cheapest options together cost more than the limit.

    Attributes:
        limit: limit on the total cost.
        smallest: smallest total cost of any choice.
    """

    def __init__(self, limit: int, smallest: int) -> None:
        super().__init__(f"no choice costs {limit} or less; the smallest costs {smallest}")
        self.limit = limit
        self.smallest = smallest


@dataclass(frozen=True, kw_only=True)
class Option:
    """One choice for a site.

    Attributes:
        form: "dense", or the form of a split: "matmul", "gemm", "channel", "input", "separable", "pivoted", "units",
            "heads".
        rank: rank of the split; None for dense.
        params: number of parameters of the weight or of both factors. In the last two, costs are less what goes
            with the units besides the sites that make them, which may be more.
        macs: multiply-accumulates per sample.
        bytes: stored bytes.
        loss: loss of the model's outputs, finite and at least 0; 0 for dense.
        nanoseconds: time of one call by the cost table; 0 without a table. In folded forms it is less what the
            sites that make the units save.
        error: response error that the loss was computed from; 0 for dense.
        bits: bits in which each number is stored.
        repair: rank of the repair of a dense weight in few bits; 0 for none.
        share: share of the hidden units that is kept; 1 in forms that are not folded.
    """

    form: str
    rank: int | None
    params: int
    macs: int
    bytes: int
    loss: float
    nanoseconds: int = 0
    error: float = 0.0
    bits: int = 32
    repair: int = 0
    share: float = 1.0

    def __post_init__(self) -> None:
        if (self.form == "dense") != (self.rank is None) or (self.rank is not None and self.rank < 1):
            raise ValueError(f"expected a rank of at least 1 for a split and None for dense, but got {self}")
        if min(self.params, self.macs, self.bytes, self.nanoseconds) < 0 and self.form not in FOLDED:
            raise ValueError(f"expected params, macs, bytes and nanoseconds of at least 0, but got {self}")
        if not 0 <= self.loss < math.inf or (self.is_exact and self.loss != 0):
            raise ValueError(f"expected a finite loss of at least 0, and 0 for dense, but got {self}")

    @property
    def is_exact(self) -> bool:
        """Return whether the option is the dense weight as it is."""
        return self.form == "dense" and self.bits == 32


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """The options of one site. The first one is the dense weight as it is; all others change it.

    Attributes:
        name: name of the site.
        options: its options.
        noise: response error that white noise of variance 1 on its inputs causes; 0 where it is not known.
        makers: sites that make its hidden units: they have no split if it has a folded form. Each belongs to one
            site.
    """

    name: str
    options: tuple[Option, ...]
    noise: float = 0.0
    makers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if [option.is_exact for option in self.options] != [True] + [False] * (len(self.options) - 1):
            found = [(option.form, option.bits) for option in self.options]
            raise ValueError(f"site {self.name}: expected dense first and then changes, but got {found}")


def smallest_cost(sites: Sequence[SiteOptions], *, cost: Cost) -> int:
    """Return the smallest total cost of any choice."""
    return sum(min(point.cost for point in _points(group, cost)) for group in _groups(sites))


def total_cost(sites: Sequence[SiteOptions], choice: Mapping[str, Option], *, cost: Cost) -> int:
    """Return the total cost of a choice, an option for each site by name."""
    return sum(_cost_of([choice[site.name] for site in group], cost) for group in _groups(sites))


def choose(sites: Sequence[SiteOptions], *, cost: Cost, limit: int) -> dict[str, Option]:
    """Choose an option for every site with a total cost of at most `limit`.

    All sites stay dense if the limit allows it, even if a cheaper option has no loss. Otherwise the result does not
    depend on the order of the sites (ties are broken by name). Of a site's options with equal cost and loss, the first
    is taken. The total loss exceeds the optimum by less than the largest hull step, and is the optimum if the core is
    complete (see the module docstring).

    Args:
        sites: sites with their options; names are unique.
        cost: field of an option that the limit applies to.
        limit: largest total cost over the sites.

    Returns:
        The option of every site by name, in the order of `sites`.

    Raises:
        UnreachableLimitError: no choice is within the limit.
        ValueError: two sites have the same name, or the sites that make hidden units are missing or shared.

    Example:
        >>> dense = Option(form="dense", rank=None, params=100, macs=100, bytes=400, loss=0.0)
        >>> split = Option(form="gemm", rank=2, params=40, macs=40, bytes=160, loss=0.5)
        >>> options = [SiteOptions(name=name, options=(dense, split)) for name in ("a", "b")]
        >>> [option.form for option in choose(options, cost="params", limit=150).values()]
        ['dense', 'gemm']
    """
    ordered = sorted(sites, key=lambda site: site.name)
    for one, other in itertools.pairwise(ordered):
        if one.name == other.name:
            raise ValueError(f"expected every site once, but got {one.name} twice")
    if sum(getattr(site.options[0], cost) for site in sites) <= limit:
        return {site.name: site.options[0] for site in sites}
    smallest = smallest_cost(sites, cost=cost)
    if smallest > limit:
        raise UnreachableLimitError(limit, smallest)
    groups = _groups(ordered)
    frontiers = [_Frontier.of(_points(group, cost)) for group in groups]
    chosen = _solve(frontiers, limit - smallest)
    picks = {
        site.name: site.options[index]
        for group, frontier, at in zip(groups, frontiers, chosen, strict=True)
        for site, index in zip(group, frontier.picks[at], strict=True)
    }
    return {site.name: picks[site.name] for site in sites}


class _Point(NamedTuple):
    """A joint choice for a group of sites, which names an option of each."""

    cost: int
    loss: float
    picks: tuple[int, ...]


def _groups(sites: Sequence[SiteOptions]) -> list[tuple[SiteOptions, ...]]:
    """Return each site alone, or in front of the sites that make its hidden units."""
    known = {site.name: site for site in sites}
    makers = [name for site in sites for name in site.makers]
    if len(set(makers)) < len(makers) or any(name not in known or known[name].makers for name in makers):
        raise ValueError(f"expected sites that make hidden units once, beside the sites that read them: {makers}")
    return [(site, *(known[name] for name in site.makers)) for site in sites if site.name not in makers]


def _points(group: Sequence[SiteOptions], cost: Cost) -> list[_Point]:
    """Return the joint choices: of several sites, those on the hull of their sum, and all with hidden units."""
    alone = [
        [_Point(getattr(o, cost), o.loss, (n,)) for n, o in enumerate(s.options) if o.form not in FOLDED] for s in group
    ]
    if len(group) == 1:
        return alone[0]
    hulls = [(frontier := _Frontier.of(points)).only(frontier.hull()) for points in alone]
    steps = sorted((-hull.slope(at, at + 1), which) for which, hull in enumerate(hulls) for at in hull.steps)
    at = [0] * len(hulls)
    points = [_joined(hulls, at)]
    for _, which in steps:
        at[which] += 1
        points.append(_joined(hulls, at))
    reader, *makers = group
    allowed = [[n for n, o in enumerate(reader.options) if o.form in FOLDED]]
    for maker, known in zip(makers, alone[1:], strict=True):
        dense = [point for point in known if maker.options[point.picks[0]].form == "dense"]
        allowed.append([n for (n,) in _Frontier.of(dense).picks])
    for picks in [(0,) * len(group), *itertools.product(*allowed)]:
        options = [site.options[n] for site, n in zip(group, picks, strict=True)]
        points.append(_Point(_cost_of(options, cost), sum(option.loss for option in options), picks))
    return points


def _cost_of(options: Sequence[Option], cost: Cost) -> int:
    """Return the cost of the options of a group; those behind the first make its hidden units."""
    reader, *makers = options
    total = sum(getattr(option, cost) for option in makers)
    if cost != "nanoseconds" and reader.share < 1:
        total = round(reader.share * total)
    return int(getattr(reader, cost) + total)


def _joined(frontiers: "Sequence[_Frontier]", places: Sequence[int]) -> _Point:
    at = list(zip(frontiers, places, strict=True))
    picks = tuple(pick for frontier, place in at for pick in frontier.picks[place])
    return _Point(sum(f.costs[p] for f, p in at), sum(f.losses[p] for f, p in at), picks)


@dataclass(frozen=True, kw_only=True)
class _Frontier:
    """The choices for a group that no other one beats: costs rise and losses fall strictly. Places index these lists.

    Attributes:
        picks: index of the option of every site of the group.
        costs: costs.
        losses: losses.
    """

    picks: list[tuple[int, ...]]
    costs: list[int]
    losses: list[float]

    @classmethod
    def of(cls, points: Sequence[_Point]) -> "_Frontier":
        kept: list[_Point] = []
        for point in sorted(points):
            if not kept or point.loss < kept[-1].loss:
                kept.append(point)
        return cls(picks=[p.picks for p in kept], costs=[p.cost for p in kept], losses=[p.loss for p in kept])

    def only(self, places: Sequence[int]) -> "_Frontier":
        """Return the frontier of these places."""
        return _Frontier(
            picks=[self.picks[p] for p in places],
            costs=[self.costs[p] for p in places],
            losses=[self.losses[p] for p in places],
        )

    @property
    def steps(self) -> range:
        """The places from which a step leads to the next one."""
        return range(len(self.costs) - 1)

    def hull(self) -> list[int]:
        """Return the places on the lower convex hull from the cheapest on, including points on its edges."""
        places: list[int] = []
        for place in range(len(self.costs)):
            while len(places) > 1 and self.slope(places[-2], places[-1]) < self.slope(places[-1], place):
                places.pop()
            places.append(place)
        return places

    def slope(self, start: int, end: int) -> float:
        return (self.losses[start] - self.losses[end]) / (self.costs[end] - self.costs[start])


def _solve(frontiers: Sequence[_Frontier], room: int) -> list[int]:
    """Return the chosen place on every frontier, for `room` above the cost of the cheapest options."""
    steps: list[tuple[float, int, int, int]] = []  # (-slope, site, number of the hull step, place after it)
    for site, frontier in enumerate(frontiers):
        hull, slope = frontier.hull(), math.inf
        for number, (start, end) in enumerate(itertools.pairwise(hull)):
            slope = min(slope, frontier.slope(start, end))  # rounding must not reorder the steps of a site
            steps.append((-slope, site, number, end))
    chosen = [0] * len(frontiers)
    for negative_slope, site, _, place in sorted(steps):
        frontier, at = frontiers[site], chosen[site]
        step = frontier.costs[place] - frontier.costs[at]
        if step > room:
            gap = frontier.losses[at] - frontier.losses[place]
            return _improved(frontiers, chosen, price=-negative_slope, step=step, gap=gap, room=room)
        chosen[site] = place
        room -= step
    return chosen


def _improved(
    frontiers: Sequence[_Frontier], chosen: list[int], *, price: float, step: int, gap: float, room: int
) -> list[int]:
    """Improve `chosen` by the best set of changes of least regret.

    Args:
        frontiers: frontiers of all sites.
        chosen: place on each frontier at the end of the sweep.
        price: slope of the step that did not fit.
        step: cost of that step, above `room`.
        gap: loss of that step, the largest possible improvement.
        room: remaining cost; only the last selection depends on it.
    """
    sites, places, costs, losses = _changes(frontiers, chosen)
    regrets = losses + price * costs
    core = np.argsort(regrets, kind="stable")[:CORE]
    core = core[regrets[core] < gap]
    groups: dict[int, list[int]] = {}
    for change in core.tolist():
        groups.setdefault(int(sites[change]), []).append(change)
    states = _States(cost=np.zeros(1, np.int64), loss=np.zeros(1))
    lowest = [min(0, int(costs[group].min())) for group in groups.values()]
    highest = [max(0, int(costs[group].max())) for group in groups.values()]
    for number, group in enumerate(groups.values(), start=1):
        states.extend_(
            np.concatenate([[0], costs[group]]),
            np.concatenate([[0.0], losses[group]]),
            window=(-sum(highest[number:]), step - 1 - sum(lowest[number:])),
            price=price,
            gap=gap,
        )
    result = list(chosen)
    for (site, group), move in zip(groups.items(), states.best_within(room), strict=True):
        if move:
            result[site] = int(places[group[move - 1]])
    return result


def _changes(frontiers: Sequence[_Frontier], chosen: Sequence[int]) -> tuple[Array, Array, Array, Array]:
    """Return (site, place, cost, loss) of every other option; cost and loss are differences to the chosen option."""
    sizes = [len(frontier.costs) for frontier in frontiers]
    sites = np.repeat(np.arange(len(frontiers)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes])
    costs = np.concatenate([np.array(f.costs, np.int64) - f.costs[at] for f, at in zip(frontiers, chosen, strict=True)])
    losses = np.concatenate([np.array(f.losses) - f.losses[at] for f, at in zip(frontiers, chosen, strict=True)])
    others = places != np.array(chosen)[sites]
    return sites[others], places[others], costs[others], losses[others]


@dataclass(kw_only=True)
class _States:
    """Pareto-optimal sums of changes: `cost (n,)` rises, `loss (n,)` falls, and `moves` records the changes."""

    cost: Array
    loss: Array

    def __post_init__(self) -> None:
        self.moves: list[tuple[Array, Array]] = []  # per site: (previous state, number of the change; 0 for none)

    def extend_(self, costs: Array, losses: Array, *, window: tuple[int, int], price: float, gap: float) -> None:
        """Add the changes of one site, the first of which is none, and drop states that can no longer improve."""
        cost = np.add.outer(self.cost, costs).ravel()
        loss = np.add.outer(self.loss, losses).ravel()
        (keep,) = np.nonzero((cost >= window[0]) & (cost <= window[1]) & (loss + price * cost < gap))
        keep = keep[np.lexsort((loss[keep], cost[keep]))]
        least = np.minimum.accumulate(np.concatenate([[np.inf], loss[keep]]))[:-1]
        keep = keep[loss[keep] < least]
        if len(keep) > STATES:
            regret = loss[keep] + price * cost[keep]
            keep = keep[np.sort(np.argsort(regret, kind="stable")[:STATES])]
        self.cost, self.loss = cost[keep], loss[keep]
        self.moves.append(np.divmod(keep, len(costs)))

    def best_within(self, room: int) -> list[int]:
        """Return the number of the change at every site (0 for none) in the state of least loss that fits."""
        at = int(np.searchsorted(self.cost, room, side="right")) - 1
        if at < 0 or self.loss[at] >= 0:
            return [0] * len(self.moves)
        moves = []
        for before, move in reversed(self.moves):
            moves.append(int(move[at]))
            at = int(before[at])
        return moves[::-1]
