"""`--ray`: sites are factorized as Ray tasks, on this machine or on a cluster.

    driver: weight --put once--> object store --> task on a worker --> factors, record --> driver, in graph order

Some more calls than there are workers are always on their way, so that memory stays bounded by a few weights. A task
whose worker is lost runs again, from the weight that is in the store. It computes with the driver's number of threads
(and takes as many CPUs), by the driver's rates (`kernel.rates`), and draws from (seed, site): on processors like the
driver's the bytes are those of a run without Ray. A worker on another kind of processor is told of in a note.
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
AHEAD = 2  # calls on their way, for each worker

OTHER = "--ray: some sites were factorized on another kind of processor, so the bytes may be others than without it"
CPU = torch.device("cpu")


class RayExecutor:
    """Workers of a Ray cluster; see `ray_executor`."""

    def __init__(self, ray: Any, notes: list[str]):
        self._ray, self._notes = ray, notes
        threads = torch.get_num_threads()
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        if max(nodes, default=0) < threads:
            most = max(nodes, default=0)
            raise UsageError(
                f"--ray: a task takes as many CPUs of one machine as there are threads here, {threads}, but none there "
                f"has more than {most}; type OMP_NUM_THREADS={most or 1} before the command"
            )
        self._window = AHEAD * max(1, sum(count // threads for count in nodes))
        self._task = ray.remote(num_cpus=threads, max_retries=RETRIES)(_work)
        self._settings = settings_of_driver()
        self._calls: Iterator[Task] = iter(())
        self._asked: dict[Hashable, Any] = {}
        self._held: dict[Hashable, Any] = {}

    def ahead(self, calls: Iterator[Task]) -> None:
        """Have workers begin with these."""
        self._calls = calls
        self._fill()

    def made(self, call: Task) -> Any:
        """The call's result, waited for; whoever computes it has begun long ago, if it was announced.

        Raises:
            ValueError, ModelError: as the function raises them.
            UsageError: a worker with other versions than here.
            ModelError: every worker that tried it was lost.
        """
        while call.announced and call.key not in self._asked and self._next():
            pass
        if call.key not in self._asked:
            self._ask(call)
        self._fill()
        exceptions = self._ray.exceptions
        try:
            result, like = self._ray.get(self._asked.pop(call.key))
        except exceptions.RayTaskError as error:
            raise error.cause from error
        except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
            names = ", ".join(str(key[0]) if isinstance(key, tuple) else str(key) for key in call.weights)
            raise ModelError(
                f"{names}: the workers that tried it were lost, {1 + RETRIES} in all, as by too little memory; "
                f"leave out --ray, or give workers more: {str(error).splitlines()[0]}"
            ) from error
        self._look(like)
        self._fill()
        return result

    def done(self, *weights: Hashable) -> None:
        """Let the store have the room of these weights."""
        for key in weights:
            self._held.pop(key, None)

    def _fill(self) -> None:
        while len(self._asked) < self._window and self._next():
            pass

    def _next(self) -> bool:
        """Ask for the next call that was announced; False where there is none."""
        call = next(self._calls, None)
        if call is not None and call.key not in self._asked:
            self._ask(call)
        return call is not None

    def _ask(self, call: Task) -> None:
        for key, load in call.weights.items():
            if key not in self._held:
                self._held[key] = self._ray.put(_packed(load()))
        references = [self._held[key] for key in call.weights]
        self._asked[call.key] = self._task.remote(call.compute, dict(call.how), self._settings, *references)

    def _look(self, like: Mapping[str, str]) -> None:
        """Refuse other versions, and note other processors."""
        here = self._settings[2]
        check_versions(like, here)
        if like["processor"] != here["processor"] and OTHER not in self._notes:
            self._notes.append(OTHER)


@contextlib.contextmanager
def ray_executor(address: str, notes: list[str]) -> Iterator[RayExecutor]:
    """Workers at `address`, for as long as the block lasts.

    Args:
        address: as for `connect_to_ray`.
        notes: where to say what a reader of the report must know.

    Raises:
        UsageError: as `connect_to_ray`; or a machine there has too few CPUs.
    """
    with connect_to_ray(address) as ray:
        yield RayExecutor(ray, notes)


def settings_of_driver() -> tuple[int, dict[str, float], dict[str, str]]:
    """What a worker needs to compute as this process would: see `like_driver`."""
    return torch.get_num_threads(), asdict(rates(CPU)), _like()


def like_driver(settings: tuple[int, dict[str, float], dict[str, str]]) -> dict[str, str]:
    """On a worker: compute with the driver's threads and by its rates; what this worker is like."""
    threads, measured, _ = settings
    torch.set_num_threads(threads)
    set_rates(CPU, Rates(**measured))
    return _like()


def check_versions(like: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Refuse a worker with other versions than the driver's.

    Raises:
        UsageError: which, and what to install.
    """
    for what in ("rsi-deploy", "torch", "numpy"):
        if like[what] != here[what]:
            raise UsageError(f"--ray: a worker has {what} {like[what]}, and here is {here[what]}; install the same")


def _work(compute: Any, how: Mapping[str, Any], settings: Any, *weights: Any) -> tuple[Any, dict[str, str]]:
    """On a worker: the result, and what the worker is like."""
    like = like_driver(settings)
    return compute(*(_unpacked(*weight) for weight in weights), **how), like


def _packed(weight: torch.Tensor) -> tuple[Any, tuple[int, ...]]:
    """An array in one piece, and the order of its axes: a transposed weight stays one, for products round by layout."""
    strides = weight.stride()
    order = tuple(sorted(range(weight.ndim), key=lambda axis: -strides[axis]))
    return as_numpy(weight.permute(order).contiguous()), order


def _unpacked(array: Any, order: tuple[int, ...]) -> torch.Tensor:
    return as_torch(array).permute(tuple(order.index(axis) for axis in range(len(order))))


def _like() -> dict[str, str]:
    """What results may hang on."""
    return {
        "rsi-deploy": rsi_deploy.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
    }
