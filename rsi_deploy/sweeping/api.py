"""`sweep`: many models from one calibration, the whole trade-off at a glance.

    dense ONNX once --> options of every site once --> for each share: plan, fit, write, verify, measure --> a bundle
                                                   --> all bundles measured in one run

Results that depend on the dense model and the data alone are computed once and cached: costs and losses of each form
and rank, sensitivities of the outputs, the cost table. Factors are fitted for each point: the regression of a site
depends on the compressed sites before it, so factors of a lower rank are no slice of those of a higher rank.
An interrupted sweep resumes with the same command; finished points are not made again.
"""

import datetime
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from rsi_deploy import __version__
from rsi_deploy.core.errors import RsiDeployError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.progress import step
from rsi_deploy.core.settings.groups import SourceConfig
from rsi_deploy.core.settings.recipe import RECIPE, recipe_text
from rsi_deploy.core.settings.verbs import ExportConfig, SweepConfig
from rsi_deploy.data.picture_settings import picture_settings, preprocessing_of
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.dense_size import dense_size
from rsi_deploy.exporting.timing.profile import write_dense
from rsi_deploy.io.atomic import OutputClaim, claim_output, write_text
from rsi_deploy.io.bundle import check_target, is_sweep
from rsi_deploy.io.folders.config import TOKENIZER
from rsi_deploy.io.locks import remove
from rsi_deploy.io.manifest import fingerprint
from rsi_deploy.io.model_folder import folder_of, model_file
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.io.onnx_file import model_hash
from rsi_deploy.report.pages.sweep import sweep_page
from rsi_deploy.report.schema import read_report
from rsi_deploy.report.sweep_schema import Sweep, SweepPoint, point_of, read_sweep, rivals_of
from rsi_deploy.runtime.feeds.shapes import input_shapes
from rsi_deploy.runtime.machine import environment
from rsi_deploy.runtime.ray_connection import check_ray
from rsi_deploy.sweeping.keywords import SweepKeywords
from rsi_deploy.sweeping.making import MadePoint, PointJob, place
from rsi_deploy.sweeping.ray_points import made_by_workers
from rsi_deploy.sweeping.rival_accuracy import with_rival_accuracy
from rsi_deploy.sweeping.side_by_side import side_by_side

Progress = Callable[[str, int, int], None]

KEYWORDS = {"macs": "keep_macs", "params": "keep_params", "latency": "keep_latency", "size": "max_size"}
OF_A_POINT = ExportConfig.model_fields.keys() - {"checkpoint", "weights", "ray"}
"""Settings that a point's export shares with its sweep; the dense model is written once, and workers know no others."""


@explains_broken_models
def sweep(
    model: str | Any,
    output: str | Path,
    config: SweepConfig | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    force: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    **settings: Unpack[SweepKeywords],
) -> Sweep:
    """Make a model at each of several shares, and show what accuracy costs in time, bytes and MACs.

    Args:
        model: MODEL of `export`.
        output: folder of the sweep; an unfinished sweep with the same settings resumes.
        config: settings of the sweep.
        preprocessing: steps from 8-bit pictures to inputs, in place of the settings `mean`, `std`, `resize`, ...
        force: replace what is in `output`.
        progress: function that is called with (point, index, count).
        command: command line for the document.
        settings: fields of `SweepConfig` by name; they win over `config`.

    Raises:
        UsageError: a request that cannot be meant, or a folder with something else in it.
        ModelError: the model cannot be handled.
    """
    config = SweepConfig.of(config, **settings, **picture_settings(preprocessing))
    shares = shares_of(config)
    if config.ray is not None:
        check_ray(config.ray)
    values = config.keywords() | config.spelled()
    points = ExportConfig.of({name: value for name, value in values.items() if name in OF_A_POINT}, allow_broken=True)
    plain, _ = input_shapes(config.input_shape)
    folder = Path(output)
    _check_folder(
        folder, force, (model, config.weights, config.checkpoint, config.calib, config.calib_check, config.data)
    )
    with claim_output(folder) as claim:
        claim.new.mkdir()
        dense = claim.new / "dense.onnx"
        steps = preprocessing_of(config)
        name = write_dense(model, dense, config.weights, config.checkpoint, plain, config.seed, steps)
        tokenizer = None if (place := folder_of(model)) is None else place / TOKENIZER
        read = [fingerprint(data) for data in (config.calib, config.calib_check, config.data, tokenizer)]
        document = Sweep(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command or "rsi_deploy.sweep(...)",
            recipe=recipe_text("sweep", model, config),
            model=name,
            source_hash=model_hash(dense),
            settings=json.dumps({"points": recipe_text("export", None, points), "read": read}, sort_keys=True),
            by=config.by,
            shares=shares,
            environment=environment(),
        )
        file = model_file(model)
        size = dense_size(Path(file) if isinstance(file, str) and file.endswith(".onnx") else None, dense)
        if force and folder.exists():
            claim.set_aside()
        begun = _begun(document, folder)
        jobs = [
            _job(number, share, size, model, config, points, f"{begun.command} (point {number})")
            for number, share in enumerate(shares, start=1)
        ]
        with _noting_what_is_kept(claim.target, len(shares), force=force):
            return _resumed(begun, claim, jobs[len(begun.points) :], points, size, ray=config.ray, progress=progress)


def _job(
    number: int, share: float, size: Size, model: object, config: SweepConfig, points: ExportConfig, command: str
) -> PointJob:
    """Return the job of a point; its recipe starts from the user's model, whose size is `size`."""
    limit = int(share * size.bytes) if config.by == "size" else share
    point = ExportConfig.of(points, **{KEYWORDS[config.by]: limit})
    source = {name: getattr(config, name) for name in SourceConfig.model_fields}
    whole = ExportConfig.of(point, **source)
    named = tuple(text for text in config.input_shape if "=" in text)
    recipe = recipe_text("export", model, whole)
    return PointJob(
        number=number,
        config=ExportConfig.of(point, input_shape=named),
        command=command,
        recipe=recipe,
        original=str(Path(model).resolve()) if isinstance(model, str) and Path(model).exists() else None,
    )


def _resumed(
    document: Sweep,
    claim: OutputClaim,
    jobs: Sequence[PointJob],
    points: ExportConfig,
    size: Size,
    *,
    ray: str | None,
    progress: Progress | None,
) -> Sweep:
    """Make the points that the sweep lacks; the claim's new folder holds the dense model, `size` is the user's."""
    folder, shares = claim.target, document.shares
    work = folder / "work"
    kept = SweepCache.of(work, f"{document.source_hash} {document.settings}")
    kept.keep_size(size)
    remove(claim.old)
    for path in claim.new.iterdir():
        os.replace(path, work / path.name)
    results = _made(jobs, folder, work / "dense.onnx", kept, ray, exclusive=points.measure)
    for job in jobs:
        if progress is not None:
            progress(f"{shares[job.number - 1]:.0%} of {document.by}", job.number - 1, len(shares))
        with step(f"point {job.number} of {len(shares)}, {shares[job.number - 1]:.0%} of {document.by}"):
            made = next(results)
        document = _with_point(document, job.number, made, folder)
        document = with_rival_accuracy(document, work / "dense.onnx", kept.rivals(), points)
        _write(document, folder)
    if points.measure and ray is None and not document.side_by_side:
        with step("side by side"):
            document = side_by_side(document, folder, work / "dense.onnx", kept.rivals(), points)
        _write(document, folder)
    shutil.rmtree(work)
    return document


@contextmanager
def _noting_what_is_kept(folder: Path, count: int, *, force: bool) -> Iterator[None]:
    """Add to an interrupt, or to any other error that ends the sweep early, what is kept and how to continue."""
    try:
        yield
    except RsiDeployError:
        raise
    except BaseException as error:
        done = len(read_sweep(folder).points) if (folder / "sweep.json").is_file() else 0
        calibration = " and the calibration" * (folder / "work" / "options.json").is_file()
        error.add_note(
            f"{folder} keeps {done} of {count} points{calibration}: run the same command{' without --force' * force} "
            f"to continue, rm -r {folder} to drop them"
        )
        raise


def _made(
    jobs: Sequence[PointJob], folder: Path, dense: Path, kept: SweepCache, ray: str | None, *, exclusive: bool
) -> Iterator[MadePoint]:
    """Yield the points in order; workers make them once the calibration is cached."""
    left = list(jobs)
    while left and (ray is None or kept.options() is None):
        job = left.pop(0)
        yield job.made_in(folder / place(job.number), dense, kept)
    if left and ray is not None:
        yield from made_by_workers(ray, left, folder, dense, kept, exclusive=exclusive)


def _with_point(document: Sweep, number: int, made: MadePoint, folder: Path) -> Sweep:
    """Return the sweep with one more point, made or found impossible."""
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
    rivals = document.rivals or rivals_of(report)
    made_so_far = {"points": (*document.points, point), "notes": tuple(shared), "rivals": rivals}
    return document.model_copy(update=made_so_far | {"dense": report.dense, "dense_top1": top1})


def _in_words_of_sweep(problem: str) -> str:
    """Return an export's message without the budget options, which the sweep sets.

    Example:
        >>> _in_words_of_sweep("no plan can meet --keep-macs 30% (9 of 30); type --keep-macs 40% or more, or add sites")
        'no plan can meet 30% of the macs (9 of 30); add sites'
    """
    problem = re.sub(r"type --(keep-\w+|max-size) \S+ or more, or ", "", problem)
    return re.sub(r"--keep-(\w+) (\S+%)", r"\2 of the \1", problem)


def _begun(new: Sweep, folder: Path) -> Sweep:
    """Return the sweep that the folder holds, or a new one.

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
    check_target(folder, force=True, inputs=inputs if force else ())
    if folder.is_dir() and any(folder.iterdir()) and not is_sweep(folder) and not force:
        raise UsageError(f"{folder} is not empty and holds no sweep; choose another folder, or add --force")


def _write(document: Sweep, folder: Path) -> None:
    """Write the sweep's files, each whole or not at all."""
    text = document.model_dump_json(indent=1) + "\n"
    for name, content in (("sweep.json", text), ("report.html", sweep_page(document, text)), (RECIPE, document.recipe)):
        write_text(folder / name, content)


def shares_of(config: SweepConfig) -> tuple[float, ...]:
    """Return the shares of the points, from the highest to the lowest.

    Raises:
        UsageError: they do not rise.
    """
    if not config.lowest < config.highest < 1:
        raise UsageError(
            f"shares must rise from --lowest to --highest within 0 and 1, but got {config.lowest} and {config.highest}"
        )
    return tuple(round(float(share), 4) for share in np.linspace(config.highest, config.lowest, config.points))


def request_text(model: str, config: SweepConfig) -> str:
    """Return the recipe of a sweep, with what it would make as a comment.

    Raises:
        UsageError: shares that do not rise.
    """
    shares = ", ".join(f"{share:.1%}" for share in shares_of(config))
    return f"{recipe_text('sweep', model, config)}\n# Nothing was done yet. Shares of the {config.by}: {shares}\n"
