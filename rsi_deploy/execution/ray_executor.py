"""`--ray`: sites are factorized as Ray tasks, on this machine or on a cluster.

    driver: weight --put once--> object store --> task on a worker --> factors, record --> driver, in graph order

A few more tasks than there are workers are in progress at any time, so memory is bounded by a few weights. A task whose
worker is lost runs again, from the weight in the store. A task computes with the driver's number of threads (and takes
as many CPUs), uses the driver's rates (`linalg.products.rates`), and draws from (seed, site). On processors like the
driver's the bytes equal those of a run without Ray. A note names the case of another kind of processor.
"""

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy
import torch

import rsi_deploy
from rsi_deploy.core.arrays import as_numpy, as_torch
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.execution.executor import Task
from rsi_deploy.linalg.products.rates import Rates, processor, rates, set_rates
from rsi_deploy.runtime.ray_connection import connect_to_ray

RETRIES = 5  # of a task whose worker is lost
AHEAD = 2  # tasks in progress, for each worker

OTHER = "--ray: some sites were factorized on another kind of processor: the bytes may differ from a run without it"
CPU = torch.device("cpu")


class RayExecutor:
    """Runs tasks on the workers of a Ray cluster; see `ray_executor`."""

    def __init__(self, ray: Any, notes: list[str]):
        self._ray, self._notes = ray, notes
        threads = torch.get_num_threads()
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(nodes, default=0) < threads:
            most = max(nodes, default=0)
            raise UsageError(
                f"--ray: a task needs as many CPUs of one machine as there are threads here, {threads}, but no machine "
                f"of the cluster has more than {most}; type OMP_NUM_THREADS={most or 1} before the command"
            )
        self._window = AHEAD * max(1, sum(count // threads for count in nodes))
        self._task = ray.remote(num_cpus=threads, max_retries=RETRIES)(_work)
        self._settings = settings_of_driver()
        self._tasks: Iterator[Task] = iter(())
        self._running: dict[Hashable, Any] = {}
        self._stored: dict[Hashable, Any] = {}

    def announce(self, tasks: Iterator[Task]) -> None:
        """Start the first of these tasks; the others follow as workers become free."""
        self._tasks = tasks
        self._fill()

    def result(self, task: Task) -> Any:
        """Wait for the task's result; an announced task was started long before.

        Raises:
            ValueError, ModelError: as the function raises them.
            UsageError: a worker has other versions than the driver.
            ModelError: every worker that tried the task was lost.
        """
        while task.announced and task.key not in self._running and self._start_next():
            pass
        if task.key not in self._running:
            self._start(task)
        self._fill()
        exceptions = self._ray.exceptions
        try:
            result, worker = self._ray.get(self._running.pop(task.key))
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            names = ", ".join(str(key[0]) if isinstance(key, tuple) else str(key) for key in task.weights)
            raise ModelError(
                f"{names}: all {1 + RETRIES} workers that tried it were lost, perhaps for lack of memory; "
                f"leave out --ray, or give workers more: {str(error).splitlines()[0]}"
            ) from error
        self._check(worker)
        self._fill()
        return result

    def release(self, *weights: Hashable) -> None:
        """Free these weights' room in the object store."""
        for key in weights:
            self._stored.pop(key, None)

    def _fill(self) -> None:
        while len(self._running) < self._window and self._start_next():
            pass

    def _start_next(self) -> bool:
        """Start the next announced task; False when none is left."""
        task = next(self._tasks, None)
        if task is not None and task.key not in self._running:
            self._start(task)
        return task is not None

    def _start(self, task: Task) -> None:
        for key, load in task.weights.items():
            if key not in self._stored:
                self._stored[key] = self._ray.put(_packed(load()))
        references = [self._stored[key] for key in task.weights]
        self._running[task.key] = self._task.remote(task.compute, dict(task.how), self._settings, *references)

    def _check(self, worker: Mapping[str, str]) -> None:
        """Refuse other versions, and note other processors."""
        here = self._settings[2]
        check_versions(worker, here)
        if worker["processor"] != here["processor"] and OTHER not in self._notes:
            self._notes.append(OTHER)


@contextlib.contextmanager
def ray_executor(address: str, notes: list[str]) -> Iterator[RayExecutor]:
    """Connect to the workers at `address` for as long as the block lasts.

    Args:
        address: as for `connect_to_ray`.
        notes: list that receives notes for the report.

    Raises:
        UsageError: as for `connect_to_ray`, or no machine of the cluster has enough CPUs.
    """
    with connect_to_ray(address) as ray:
        yield RayExecutor(ray, notes)


def settings_of_driver() -> tuple[int, dict[str, float], dict[str, str]]:
    """Return what a worker needs to compute as this process would: threads, rates, and `_environment`."""
    return torch.get_num_threads(), asdict(rates(CPU)), _environment()


def like_driver(settings: tuple[int, dict[str, float], dict[str, str]]) -> dict[str, str]:
    """Set up a worker with the driver's threads and rates; return the worker's `_environment`."""
    threads, measured, _ = settings
    torch.set_num_threads(threads)
    set_rates(CPU, Rates(**measured))
    return _environment()


def check_versions(worker: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse a worker with other versions than the driver's.

    Raises:
        UsageError: names the package and both versions.
    """
    for what in ("rsi-deploy", "torch", "numpy"):
        if worker[what] != here[what]:
            raise UsageError(f"--ray: a worker has {what} {worker[what]}, the driver {here[what]}; install the same")


def _work(compute: Any, how: Mapping[str, Any], settings: Any, *weights: Any) -> tuple[Any, dict[str, str]]:
    """Run on a worker: return the result and the worker's `_environment`."""
    worker = like_driver(settings)
    return compute(*(_unpacked(*weight) for weight in weights), **how), worker


def _packed(weight: torch.Tensor) -> tuple[Any, tuple[int, ...]]:
    """Return a contiguous array and the order of its axes: rounding depends on the layout, so it is restored."""
    strides = weight.stride()
    order = tuple(sorted(range(weight.ndim), key=lambda axis: -strides[axis]))
    return as_numpy(weight.permute(order).contiguous()), order


def _unpacked(array: Any, order: tuple[int, ...]) -> torch.Tensor:
    return as_torch(array).permute(tuple(order.index(axis) for axis in range(len(order))))


def _environment() -> dict[str, str]:
    """Return the versions and the processor, on which results may depend."""
    return {
        "rsi-deploy": rsi_deploy.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
    }
