"""`rewrite`: from an ONNX file to a compressed ONNX file, without measurement and without a bundle.

Weights stay on disk and are factorized one at a time: see `rsi_deploy.onnx_models.split`.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import graph_passes as gp
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.execution.executor import Executor
from rsi_deploy.execution.result_store import ResultStore, StoringExecutor, key_of
from rsi_deploy.io import onnx_file
from rsi_deploy.io.atomic import claim_output, sync_tree
from rsi_deploy.io.manifest import stat_hash
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.io.onnx_file import external_files
from rsi_deploy.linalg.solver import Method, PowerIterations, Route, Solver
from rsi_deploy.onnx_models.split import CPU, LOCAL, Progress, SplitModel, split_model
from rsi_deploy.planning.planner import MaxError, Planner, RankSpec, rank_spec


@explains_broken_models
def rewrite(
    source: str | Path,
    target: str | Path,
    *,
    rank: str | int | RankSpec | None = None,
    max_error: str | MaxError | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    method: Method = "rsi",
    power_iterations: PowerIterations = 4,
    oversampling: int = 0,
    route: Route = "auto",
    mixed_precision: bool = True,
    seed: int = 0,
    always_split: bool = False,
    joint: bool = True,
    assume_constant: bool = False,
    allow_larger: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> SplitModel:
    """Compress the ONNX file `source` into `target` (and `target.data`, where the weights are too many for one file).

    Where `force` replaces a model with such data, the new ones are called `target.data2` (and next time `.data` again):
    so the model that stands there is whole at any moment.

    Args:
        source: an ONNX file; its external data must lie in its folder.
        target: the file to make.
        rank: a rank (`64`) or a ratio (`"40%"`).
        max_error: instead of a rank, the smallest one with at most this error: "5%" or "1.1x" (see `MaxError`).
        include: globs on site names; empty means all.
        exclude: globs on site names that stay dense.
        method: "rsi", or a baseline: "rsvd", "svd".
        power_iterations: the paper's q; "auto" iterates until another pass would gain less than 1 %.
        oversampling: extra sketch columns.
        route: of the kernel: "auto" (the cheapest by its cost model), "direct", "chebyshev", "gram", "krylov" or
            "exact".
        mixed_precision: iterations in bfloat16 where that is faster and does no harm.
        seed: of the sketches.
        always_split: split where nothing is saved, too; nothing is then split jointly.
        joint: let weights that multiply the same input share one right factor where that costs less (see
            `rsi_deploy.planning.shared_right`).
        assume_constant: weights that are graph inputs too are constants, and no inputs any more.
        allow_larger: write a model that is larger than the source, too; `always_split` does so anyway.
        force: replace `target` if it is there.
        resume: keep finished sites beside `target` until it is there, and go on from those that a killed run has kept:
            the factors are written once more for it.
        progress: called with (site, index, count) before each factorization.

    Raises:
        UsageError: no such file, a target that is there, or a request that cannot be meant.
        ModelError: a file that cannot be read, NaN in a weight, or splits that make the model larger.
    """
    if max_error is not None and always_split:
        raise UsageError("--always-split goes with --rank alone; leave it out with --max-error")
    source, target = Path(source), Path(target).resolve()
    if not source.is_file():
        raise UsageError(f"no such file: {source}; expected an .onnx file")
    read = [source, *external_files(source)]
    if target.exists() and any(target.samefile(file) for file in read):
        raise UsageError(f"{target} is the model that is read, or its data; choose another name")
    for path in (target, target.with_name(f"{target.name}.data")):
        if path.exists() and not force:
            raise UsageError(f"{path} exists; choose another name, or pass force (--force)")
    planner = Planner(
        spec=rank_spec(rank, max_error), include=tuple(include), exclude=tuple(exclude), always_split=always_split
    )
    solver = Solver(
        method=method,
        power_iterations=power_iterations,
        oversampling=oversampling,
        seed=seed,
        route=route,
        mixed_precision=mixed_precision,
    )
    model = onnx_file.read_onnx(source, assume_constant=assume_constant)
    onnx_file.remove_unused_(model)
    gp.FoldBatchNormPass()(model)
    with claim_output(target) as claim:
        claim.new.mkdir()
        path, before = claim.new / target.name, _data_of(target)
        taken = before | {file.name for file in read}
        name = next(name for name in _data_names(target) if name not in taken)
        executor: Executor = LOCAL
        if resume:
            executor = StoringExecutor(LOCAL, ResultStore(folder=claim.kept, key=key_of(stat_hash(read), CPU)))
        result = split_model(
            model, planner, solver, path=path, data_name=name, joint=joint, progress=progress, executor=executor
        )
        if any(site.rank for site in result.sites) and not (allow_larger or always_split):
            onnx_file.refuse_growth(
                onnx_file.bytes_with_external_files(path), onnx_file.bytes_with_external_files(source), source.name
            )
        sync_tree(claim.new)
        data = path.with_name(name)
        if data.exists() and data.stat().st_size:  # the data first: a model never stands without them
            os.replace(data, target.with_name(name))
        os.replace(path, target)
        for old in before:
            target.with_name(old).unlink(missing_ok=True)
    return result


def _data_of(target: Path) -> set[str]:
    """Names of the data files of what a forced `rewrite` replaces: those that it wrote itself."""
    try:
        names = {path.name for path in external_files(target)} if target.is_file() else set()
    except ModelError:
        return set()
    return names & set(_data_names(target))


def _data_names(target: Path) -> list[str]:
    """What a data file may be called: one name is free beside those of an input and of what is replaced."""
    return [f"{target.name}.data{number}" for number in ("", 2, 3)]
