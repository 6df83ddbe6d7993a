"""Sites that int8 models compute in float32: those first whose rounded inputs cost most at the outputs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from rsi_deploy.core.sites import site_name
from rsi_deploy.exporting.lowered.activation_losses import activation_losses, activation_steps
from rsi_deploy.exporting.lowered.base_planners import BasePlanners
from rsi_deploy.exporting.lowered.maker import Base
from rsi_deploy.exporting.lowered.points import Point

HALVINGS = 4
"""Most models that are written to find how many sites need float32."""


@dataclass(frozen=True, kw_only=True)
class FloatSites:
    """The order of the sites of one export, and bases with the first ones in float32.

    Attributes:
        planners: planners with the losses of the sites, and the dense model in each scheme.
    """

    planners: BasePlanners

    def leaving(self, base: Base, most: float) -> Base | None:
        """Return a base with the fewest sites in float32 whose others lose at most `most`; None for none or all."""
        rest, count = sum(self._losses.values()), 0
        for loss in self._losses.values():
            if rest <= most:
                break
            rest, count = rest - loss, count + 1
        return self._first(base, count) if 0 < count < len(self._losses) else None

    def fewest(self, base: Base, keeps: Callable[[Point], bool]) -> Point | None:
        """Return the dense model in eight bits with the fewest sites in float32 that passes; None where none does."""
        dense = self.planners.bases.dense[base.scheme]
        if keeps(dense):
            return dense
        kept = filter(keeps, self.halved(base, lambda point: not keeps(point)))
        return min(kept, key=lambda point: len(point.in_float), default=None)

    def halved(self, base: Base, takes_more: Callable[[Point], bool]) -> Iterator[Point]:
        """Yield dense models in eight bits, with a number of sites in float32 that bisection finds.

        Args:
            base: the base.
            takes_more: whether more sites than those of a model are to be computed in float32.
        """
        low, high = 0, len(self._losses)
        for _ in range(HALVINGS):
            middle = (low + high) // 2
            if middle == low:
                break
            point = self.planners.maker.eight_bits(self._first(base, middle))
            yield point
            low, high = (middle, high) if takes_more(point) else (low, middle)

    def _first(self, base: Base, count: int) -> Base:
        return replace(base, in_float=frozenset(list(self._losses)[:count]))

    @cached_property
    def _losses(self) -> dict[str, float]:
        """Name of each site -> loss of its rounded inputs, the largest first."""
        dense = self.planners.bases.dense
        ranged = next((point for scheme, point in dense.items() if scheme.kind == "static int8"), None)
        if ranged is None or ranged.path is None:
            return {}
        names = {site.node: site_name(site.weight) for site in self.planners.maker.dense.sites}
        steps = {names[node]: size for node, size in activation_steps(ranged.path).items() if node in names}
        losses = activation_losses(self.planners.whole.options, steps)
        return dict(sorted(losses.items(), key=lambda item: (-item[1], item[0])))
