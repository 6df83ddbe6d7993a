"""`sweep --ray`: Ray tasks make the points, one bundle each; the dense model is sent once.

    driver: dense model, kept options --put once--> task on a worker: export in a folder of its own --> the bundle

The first point is made by the driver: its calibration serves all. A point whose model is measured has a machine for
itself while it is made, for two measurements on one machine would measure each other; others take as many CPUs as the
driver has threads. A point whose worker or machine is lost is made again. Where a cost table decides, it is the
worker's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.execution.ray_executor import RETRIES, check_versions, like_driver, settings_of_driver
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.io.bundle import atomic_folder
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.runtime.ray_connection import connect_to_ray
from rsi_deploy.sweeping.making import MadePoint, PointJob, place

Files = Mapping[str, npt.NDArray[np.uint8]]


def made_by_workers(
    address: str, jobs: Sequence[PointJob], folder: Path, dense: Path, kept: SweepCache, *, exclusive: bool
) -> Iterator[MadePoint]:
    """Make the points on workers, and yield them in order; each bundle is in `folder` then.

    Args:
        address: of the cluster, or "local".
        jobs: the points.
        folder: of the sweep.
        dense: the dense model.
        kept: what the first point has found.
        exclusive: whether a point must share its machine with no other.

    Raises:
        UsageError: nobody at the address, other versions there, or a request that does not fit.
        ModelError: every worker that tried a point was lost.
    """
    settings = settings_of_driver()
    with connect_to_ray(address) as ray:
        inputs = ray.put({path.name: _content(path) for path in sorted(dense.parent.glob("dense.onnx*"))})
        found = ray.put({path.name: _content(path) for path in sorted(kept.folder.glob("*.json"))})
        remote = ray.remote(max_retries=RETRIES)(_made)

        def begin(job: PointJob, **where: Any) -> Any:
            task = remote.options(**where)
            return task.remote(_with_whole_paths(job), settings, inputs, found)

        if exclusive:
            results = _one_a_machine(ray, jobs, begin)
        else:
            asked = {job.number: begin(job, num_cpus=settings[0]) for job in jobs}
            results = ((job.number, _got(ray, job.number, asked[job.number])) for job in jobs)
        waiting: dict[int, Any] = {}
        for job in jobs:
            while job.number not in waiting:
                number, result = next(results)
                waiting[number] = result
            made, files, like = waiting.pop(job.number)
            check_versions(like, settings[2])
            if made.problem is None:
                _write(files, folder / place(job.number))
            yield made


def _one_a_machine(ray: Any, jobs: Sequence[PointJob], begin: Any) -> Iterator[tuple[int, Any]]:
    """Yield points as they finish, never two at a time on one machine; a lost machine's point goes to another."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    free = {node["NodeID"]: node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]}
    free = {node: cpus for node, cpus in free.items() if cpus >= 1}
    left = list(jobs)
    running: dict[Any, tuple[str, float, PointJob]] = {}
    exceptions = ray.exceptions
    while left or running:
        while left and free:
            (node, cpus), job = free.popitem(), left.pop(0)
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            running[begin(job, num_cpus=cpus, scheduling_strategy=where)] = node, cpus, job
        if not running:
            raise UsageError("--ray: the cluster has no machine with a CPU; add one, or leave out --ray")
        (done, *_), _ = ray.wait(list(running), num_returns=1)
        node, cpus, job = running.pop(done)
        try:
            result = _got(ray, job.number, done)
        except (exceptions.NodeDiedError, exceptions.TaskUnschedulableError):
            left.insert(0, job)  # the machine is not free again: it is gone
            continue
        free[node] = cpus
        yield job.number, result


def _got(ray: Any, number: int, reference: Any) -> Any:
    exceptions = ray.exceptions
    try:
        return ray.get(reference)
    except exceptions.RayTaskError as error:
        raise error.cause from error
    except (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.ObjectLostError) as error:
        raise ModelError(
            f"point {number}: the workers that tried it were lost, {1 + RETRIES} in all, as by too little memory; "
            "leave out --ray, or give workers more"
        ) from error


def _made(job: PointJob, settings: Any, inputs: Files, found: Files) -> tuple[MadePoint, Files, dict[str, str]]:
    """Make a point on a worker; return it, the files of its bundle, and the worker's versions."""
    like = like_driver(settings)
    with ScratchFolder() as temporary:
        work, target = Path(temporary) / "work", Path(temporary) / "bundle"
        for folder, files in ((work, inputs), (work / "kept", found)):
            folder.mkdir()
            _fill(files, folder)
        made = job.made_in(target, work / "dense.onnx", SweepCache(folder=work / "kept"))
        paths = [path for path in sorted(target.rglob("*")) if path.is_file()]
        return made, {path.relative_to(target).as_posix(): _content(path) for path in paths}, like


def _with_whole_paths(job: PointJob) -> PointJob:
    """Return the job with absolute paths of its data, for workers in other folders."""
    whole = {}
    for key in ("calib", "calib_check", "data"):
        name, mark, choice = str(getattr(job.config, key) or "").partition("#")
        if name and Path(name).exists():
            whole[key] = f"{Path(name).resolve()}{mark}{choice}"
    return replace(job, config=ExportConfig.of(job.config, **whole))


def _content(path: Path) -> npt.NDArray[np.uint8]:
    return np.fromfile(path, np.uint8)


def _fill(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content.tofile(path)


def _write(files: Files, folder: Path) -> None:
    with atomic_folder(folder, force=True) as work:
        _fill(files, work)
