"""Who computes on weights: this process, one after another, or others that are told ahead what will be asked.

    FactorSource --Call(compute, weights, how)--> Here        loads the weights and computes, when it is asked
                                              --> RayCrew     has workers compute ahead of the asking (`ray_executor`)

A call is a function of weights and settings alone, its random numbers drawn from (seed, site name): so who computes it,
in what order and how often changes nothing in its result.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """One computation.

    Attributes:
        compute: a function of a module, called `compute(*weights, **how)`.
        weights: how each is loaded, `(groups, out, in)`, by a key that is the same wherever the same weight is meant.
        how: the other arguments.
        announced: whether it was among those told ahead.
    """

    compute: Callable[..., Any]
    weights: Mapping[Hashable, Callable[[], Tensor]]
    how: Mapping[str, Any]
    announced: bool = True

    @property
    def key(self) -> Hashable:
        """What is computed of which weights: how depends on nothing else in one run."""
        return self.compute.__name__, *self.weights


class Executor(Protocol):
    """What computes calls."""

    def ahead(self, calls: Iterator[Task]) -> None:
        """Be told what will be asked, about in this order; each call holds its weights until it is taken."""

    def made(self, call: Task) -> Any:
        """The call's result.

        Raises:
            ValueError, ModelError: as the function raises them.
        """

    def done(self, *weights: Hashable) -> None:
        """Be told that these weights will not be asked for again."""


class LocalExecutor:
    """This process."""

    def ahead(self, calls: Iterator[Task]) -> None:
        """Nothing is computed ahead."""

    def made(self, call: Task) -> Any:
        """The call's result, computed now."""
        return call.compute(*(load() for load in call.weights.values()), **call.how)

    def done(self, *weights: Hashable) -> None:
        """Nothing is kept."""
