"""Who runs tasks on weights: this process, one after another, or workers that start before a result is needed.

    split_model --Task(compute, weights, how)--> LocalExecutor    loads the weights and computes, on request
                                             --> RayExecutor      workers compute announced tasks in advance

A task is a function of weights and settings alone, and its random numbers depend on (seed, site name). Who runs it, in
what order and how often changes nothing in its result.
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
        weights: key -> loader of the weight `(groups, out, in)`; the same weight has the same key in every task.
        how: the other arguments.
        announced: whether the task is among those that were announced.
    """

    compute: Callable[..., Any]
    weights: Mapping[Hashable, Callable[[], Tensor]]
    how: Mapping[str, Any]
    announced: bool = True

    @property
    def key(self) -> Hashable:
        """Return a key of the function and its weights; the other arguments follow from that within one run."""
        return self.compute.__name__, *self.weights


class Executor(Protocol):
    """Runs tasks."""

    def announce(self, tasks: Iterator[Task]) -> None:
        """Take note of the tasks to come, roughly in order; a task holds its weights until it is taken."""

    def result(self, task: Task) -> Any:
        """Return the task's result.

        Raises:
            ValueError, ModelError: as the function raises them.
        """

    def release(self, *weights: Hashable) -> None:
        """Forget these weights: no task needs them again."""


class LocalExecutor:
    """Runs tasks in this process."""

    def announce(self, tasks: Iterator[Task]) -> None:
        """Do nothing: tasks run on request."""

    def result(self, task: Task) -> Any:
        """Run the task and return its result."""
        return task.compute(*(load() for load in task.weights.values()), **task.how)

    def release(self, *weights: Hashable) -> None:
        """Do nothing: no weight is held."""
