"""`sweep`: many models from one calibration, the whole trade-off at a glance.

    dense ONNX once --> options of every site once --> for each share: plan, fit, write, verify, measure --> a bundle
                                                   --> all bundles measured in one run

What depends on the dense model and the data alone is found once and kept: what a site's forms and ranks cost and lose,
what its errors do to the outputs, the cost table. The factors of a point are fitted for it: a site's matrix is a
regression from what the sites before it have become *there* (`rsi_deploy.calibrate`), so that those of a lower rank are
no slice of those of a higher one. They would be where nothing but the weight counts and its SVD is exact; no point of a
sweep is such. A sweep that was interrupted goes on with the same command: what is whole is not made again.
"""

import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy import __version__
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.progress import step
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.dense_size import dense_size
from rsi_deploy.exporting.profile import write_dense
from rsi_deploy.io.atomic import OutputClaim, claim_output, write_text
from rsi_deploy.io.bundle import check_target
from rsi_deploy.io.locks import remove
from rsi_deploy.io.manifest import fingerprint
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.io.onnx_file import model_hash
from rsi_deploy.report.pages.sweep import sweep_page
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.sweep_schema import By, Sweep, SweepPoint, point_of, read_sweep
from rsi_deploy.runtime.machine import environment
from rsi_deploy.runtime.ray_connection import check_ray
from rsi_deploy.sweeping.making import MadePoint, PointJob, place
from rsi_deploy.sweeping.ray_points import made_by_workers
from rsi_deploy.sweeping.side_by_side import side_by_side

Progress = Callable[[str, int, int], None]

POINTS, HIGHEST, LOWEST = 12, 0.95, 0.3
KEYWORDS = {"macs": "keep_macs", "params": "keep_params", "latency": "keep_latency"}


@explains_broken_models
def sweep(
    model: str | Any,
    output: str | Path,
    *,
    calib: str | Path,
    data: str | Path | None = None,
    by: By = "macs",
    points: int = POINTS,
    highest: float = HIGHEST,
    lowest: float = LOWEST,
    calib_size: int = 512,
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    feeds: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    smaller_is_enough: bool = False,
    allow_larger: bool = False,
    cost_budget: str | float = "120s",
    provider: str = "cpu",
    threads: int | None = None,
    measure: bool = True,
    bench_batch: int = 1,
    bench_seconds: float = 4.0,
    seed: int = 0,
    force: bool = False,
    ray: str | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Sweep:
    """Make a model at every one of some shares, and show what accuracy costs in time, bytes and MACs.

    Args:
        model: as for `export`.
        output: the folder; one with an unfinished sweep of the same settings is gone on with.
        calib: unlabelled calibration data.
        data: labelled evaluation data; without them the points are told apart by their answers on `calib`.
        by: what the shares are of: "macs", "params" or "latency".
        points: how many shares.
        highest: the first of them, in (0, 1).
        lowest: the last.
        calib_size: at most so many samples.
        weights: torchvision's.
        checkpoint: a factory's.
        input_shape: as for `export`.
        preprocessing: as for `export`.
        feeds: an `.npz` of inputs, as for `export`.
        include: globs on site names.
        exclude: globs on site names.
        smaller_is_enough: as for `export`.
        allow_larger: as for `export`; without it a point that is larger than the dense model has no bundle.
        cost_budget: time for the cost table, as for `export`.
        provider: with options.
        threads: inside one operator.
        measure: whether to measure latency.
        bench_batch: samples a call.
        bench_seconds: for each point.
        seed: of everything.
        force: replace what is in `output`.
        ray: address of a Ray cluster whose workers make the points after the first, or "local" (see
            `rsi_deploy.sweeping.ray_points`); calibration and evaluation data must be theirs under the same names.
        progress: called with (point, index, count).
        command: for the document.

    Raises:
        UsageError: a request that cannot be meant, or a folder with something else in it.
        ModelError: the model cannot be handled.
    """
    shares = _shares(points, highest, lowest)
    if by not in KEYWORDS:
        raise UsageError(f"--by must be {', '.join(KEYWORDS)}, but got {by!r}")
    if ray is not None:
        check_ray(ray)
    options: dict[str, Any] = {
        "calib": str(calib),
        "data": None if data is None else str(data),
        "calib_size": calib_size,
        "include": list(include),
        "exclude": list(exclude),
        "allow_slower": smaller_is_enough,
        "allow_larger": allow_larger,
        "cost_budget": cost_budget,
        "provider": provider,
        "threads": threads,
        "measure": measure,
        "bench_batch": bench_batch,
        "bench_seconds": bench_seconds,
        "seed": seed,
    }
    if feeds is not None:
        options["feeds"] = str(feeds)
    named = [input_shape] if isinstance(input_shape, str) else list(input_shape or ())
    options["input_shape"] = [text for text in named if "=" in text]
    folder = Path(output)
    _check_folder(folder, force, (model, weights, checkpoint, calib, data))
    with claim_output(folder) as claim:
        claim.new.mkdir()
        dense = claim.new / "dense.onnx"
        plain = next((text for text in named if "=" not in text), None)
        name = write_dense(model, dense, weights, checkpoint, plain, seed, preprocessing)
        document = Sweep(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command or "rsi_deploy.sweep(...)",
            model=name,
            source_hash=model_hash(dense),
            settings=json.dumps(options | {"read": [fingerprint(calib), fingerprint(data)]}, sort_keys=True),
            by=by,
            shares=shares,
            environment=environment(),
        )
        size = dense_size(Path(model) if isinstance(model, str) and model.endswith(".onnx") else None, dense)
        if force and folder.exists():
            claim.set_aside()
        options["preprocessing"] = preprocessing  # in the settings it is part of the model's hash
        return _gone_on(_begun(document, folder), claim, options, size, ray=ray, progress=progress)


def _gone_on(
    document: Sweep,
    claim: OutputClaim,
    options: dict[str, Any],
    size: Size,
    *,
    ray: str | None,
    progress: Progress | None,
) -> Sweep:
    """The sweep with the points that it lacks; the claim's new folder holds the dense model, `size` is the user's."""
    folder, shares = claim.target, document.shares
    work = folder / "work"
    kept = SweepCache.of(work, f"{document.source_hash} {document.settings}")
    kept.keep_size(size)
    remove(claim.old)
    for path in claim.new.iterdir():
        os.replace(path, work / path.name)
    jobs = [
        PointJob(number=number, asked=_asked(document, share, options, number))
        for number, share in list(enumerate(shares, start=1))[len(document.points) :]
    ]
    results = _made(jobs, folder, work / "dense.onnx", kept, ray, exclusive=options["measure"])
    for job in jobs:
        if progress is not None:
            progress(f"{shares[job.number - 1]:.0%} of {document.by}", job.number - 1, len(shares))
        with step(f"point {job.number} of {len(shares)}, {shares[job.number - 1]:.0%} of {document.by}"):
            made = next(results)
        document = _with_point(document, job.number, made, folder)
        _write(document, folder)
    if options["measure"] and ray is None and not document.side_by_side:
        with step("side by side"):
            document = side_by_side(document, folder, work / "dense.onnx", options)
        _write(document, folder)
    shutil.rmtree(work)
    return document


def _asked(document: Sweep, share: float, options: dict[str, Any], number: int) -> dict[str, Any]:
    """The options of the export that makes a point."""
    return {KEYWORDS[document.by]: share, **options, "command": f"{document.command} (point {number})"}


def _made(
    jobs: Sequence[PointJob], folder: Path, dense: Path, kept: SweepCache, ray: str | None, *, exclusive: bool
) -> Iterator[MadePoint]:
    """The points, one after another; by workers from the moment that the one calibration is there."""
    left = list(jobs)
    while left and (ray is None or kept.options() is None):
        job = left.pop(0)
        yield job.made_in(folder / place(job.number), dense, kept)
    if left and ray is not None:
        yield from made_by_workers(ray, left, folder, dense, kept, exclusive=exclusive)


def _with_point(document: Sweep, number: int, made: MadePoint, folder: Path) -> Sweep:
    """The sweep with one more point, made or found impossible."""
    share = document.shares[number - 1]
    if made.problem is not None:
        problem = _in_words_of_sweep(str(made.problem))
        if document.dense is None and number == len(document.shares):  # no point at all: the model cannot be handled
            raise type(made.problem)(problem) from made.problem
        point = SweepPoint(number=number, share=share, problem=problem, seconds=made.seconds)
        return document.model_copy(update={"points": (*document.points, point)})
    report = read_report(folder / place(number))
    point = point_of(number, share, place(number), report, made.seconds)
    top1 = None if report.accuracy is None else report.accuracy.dense.top1
    shared = [note for note in report.notes if document.dense is None or note in document.notes]
    made_so_far = {"points": (*document.points, point), "notes": tuple(shared)}
    return document.model_copy(update=made_so_far | {"dense": report.dense, "dense_top1": top1})


def _in_words_of_sweep(problem: str) -> str:
    """An export's message without the budget options of export, which the sweep sets.

    Example:
        >>> _in_words_of_sweep("no plan can meet --keep-macs 30% (9 of 30); type --keep-macs 40% or more, or add sites")
        'no plan can meet 30% of the macs (9 of 30); add sites'
    """
    problem = re.sub(r"type --keep-\w+ \S+ or more, or ", "", problem)
    return re.sub(r"--keep-(\w+) (\S+%)", r"\2 of the \1", problem)


def _begun(new: Sweep, folder: Path) -> Sweep:
    """The sweep that is in the folder already, or a new one.

    Raises:
        UsageError: it is another one.
    """
    if not (folder / "sweep.json").is_file():
        return new
    old = read_sweep(folder)
    for name in ("source_hash", "settings", "by", "shares"):
        if getattr(old, name) != getattr(new, name):
            raise UsageError(
                f"{folder} holds a sweep with other {name.replace('_', ' ')}; choose another folder, or add --force"
            )
    return old


def _check_folder(folder: Path, force: bool, inputs: Sequence[object]) -> None:
    """Refuse a folder with something else in it.

    Raises:
        UsageError: which, and what to type.
    """
    is_sweep = (folder / "sweep.json").is_file() or (folder / "work").is_dir()
    if folder.is_dir() and any(folder.iterdir()) and not is_sweep and not force:
        raise UsageError(f"{folder} is not empty and holds no sweep; choose another folder, or add --force")
    check_target(folder, force=True, inputs=inputs if force else ())


def _write(document: Sweep, folder: Path) -> None:
    """Both files, so that neither ever stands there half."""
    text = document.model_dump_json(indent=1) + "\n"
    for name, content in (("sweep.json", text), ("report.html", sweep_page(document, text))):
        write_text(folder / name, content)


def _shares(points: int, highest: float, lowest: float) -> tuple[float, ...]:
    if points < 2:
        raise UsageError(f"--points must be at least 2, but got {points}")
    if not 0 < lowest < highest < 1:
        raise UsageError(f"shares must rise from --lowest to --highest within 0 and 1, but got {lowest} and {highest}")
    return tuple(round(float(share), 4) for share in np.linspace(highest, lowest, points))
