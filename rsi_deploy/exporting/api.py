"""The main job, `export`: a model goes in, a compressed, verified, measured bundle comes out.

    load -> dense ONNX -> trace -> plan and factorize -> split -> verify -> accuracy -> latency -> report

The dense model is written to disk once; from then on everything reads it memory-mapped and the torch model is gone,
so the peak memory is about that of exporting alone.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt
from torch import nn

from rsi_deploy.benchmark.request import parse_seconds
from rsi_deploy.calibration.calibration_data import check_source
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import Dataset
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.inputs import Origin, device_named, evaluation_data, told_shapes, uniform
from rsi_deploy.exporting.latency_options import Timed
from rsi_deploy.exporting.profile import BUDGET, Costing
from rsi_deploy.exporting.run import ExportRun
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.io.bundle import whole_folder
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.linalg.solver import Method, PowerIterations, Route, Solver
from rsi_deploy.planning.plan_file import read_plan
from rsi_deploy.planning.planner import Filters, MaxError, RankSpec
from rsi_deploy.planning.request import RankRequest, given_budget
from rsi_deploy.report.schema import Report
from rsi_deploy.report.sweep_schema import deliver
from rsi_deploy.runtime.feeds.probe import read_feeds
from rsi_deploy.runtime.provider_spec import parse
from rsi_deploy.runtime.ray_connection import check_ray

Progress = Callable[[str, int, int], None]


@explains_broken_models
def export(
    model: str | nn.Module | None,
    output: str | Path,
    *,
    rank: str | int | RankSpec | None = None,
    max_error: str | MaxError | None = None,
    calib: str | Path | Dataset | Mapping[str, npt.NDArray[Any]] | None = None,
    calib_size: int = 1024,
    factors: Literal["response", "weights"] = "response",
    keep_params: str | float | None = None,
    keep_macs: str | float | None = None,
    max_size: str | int | None = None,
    keep_latency: str | float | None = None,
    max_latency: str | None = None,
    max_drop: float | None = None,
    plan: str | Path | None = None,
    min_rank: int = 1,
    rank_multiple: int = 1,
    allow_shared_data: bool = False,
    cost: str | Path | None = None,
    foreign_cost: bool = False,
    cost_budget: str | float = BUDGET,
    smaller_is_enough: bool = False,
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | tuple[int, ...] | Sequence[str] | None = None,
    feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None,
    preprocessing: Preprocessing | None = None,
    data: str | Path | Dataset | None = None,
    method: Method = "rsi",
    power_iterations: PowerIterations = 4,
    oversampling: int = 0,
    route: Route = "auto",
    mixed_precision: bool = True,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    always_split: bool = False,
    joint: bool = True,
    assume_constant: bool = False,
    opset: int | None = None,
    device: str = "auto",
    ray: str | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    measure: bool = True,
    bench_batch: int = 1,
    bench_seconds: float = 10.0,
    max_output_error: float | None = None,
    keep_dense: bool = False,
    allow_larger: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    kept: SweepCache | None = None,
    from_sweep: str | Path | None = None,
    point: int | None = None,
) -> Report:
    """Compress a model and write the bundle `output` (model.onnx, report.json, report.html, README.md).

    Args:
        model: `torchvision:NAME`, `package.module:factory`, `FILE.pt2`, `FILE.onnx`, or a torch module.
        output: the folder to make.
        rank: a rank (`64`) or the paper's ratio (`"40%"`); or exactly one of an error, the budgets, or a plan.
        max_error: at every site the smallest rank with at most this error of the weight: "5%" of its norm, or "1.1x"
            times the best error of that rank.
        calib: unlabelled calibration data: as `data`, or input name -> array.
        calib_size: at most so many samples, evenly spaced.
        factors: "response" fits the factors to the calibration data, "weights" is the paper's plain method.
        keep_params: share of the whole model's parameters to keep: 0.5 or "50%".
        keep_macs: share of its multiply-accumulates.
        max_size: bytes of the compressed model, "20MB".
        keep_latency: share of the dense model's time for a call, as measured here or told by `cost`.
        max_latency: time of a call, "25ms".
        max_drop: the smallest model that loses at most so many points of top-1 on `data`.
        plan: a plan file (`plan.json` of a bundle, perhaps edited).
        min_rank: no planned rank below it.
        rank_multiple: planned ranks are multiples of it.
        allow_shared_data: let calibration and evaluation data share samples.
        cost: a cost table (`profile`) to plan with; without it one is measured where a budget needs it.
        foreign_cost: take a `cost` of another machine, onnxruntime or provider: planned for there, measured nowhere.
        cost_budget: time for a table that is measured: seconds, or `"240s"`.
        smaller_is_enough: split also where it was not measured faster, and deliver the model however fast it is.
        weights: torchvision's: "DEFAULT", "none" (random, seeded) or a file.
        checkpoint: a factory's state dict.
        input_shape: `1x3x32x32`, where a torch model does not tell; the first number is the batch and stays dynamic.
            For an ONNX file with more dynamic dimensions: `NAME=1x128`, or several of them.
        feeds: input name -> array, or an `.npz` of them, to verify and measure with in place of random inputs.
        preprocessing: from 8-bit pictures to inputs; fields that are not set come from the model.
        data: labelled evaluation data (see `rsi_deploy.data.sources`); it chooses nothing.
        method: "rsi", or a baseline: "rsvd", "svd".
        power_iterations: the paper's q; "auto" iterates until another pass would gain less than 1 %.
        oversampling: extra sketch columns.
        route: of the kernel: "auto" (the cheapest by its cost model), "direct", "chebyshev", "gram", "krylov" or
            "exact".
        mixed_precision: iterations in bfloat16 where that is faster and does no harm.
        seed: of sketches, probe inputs, and of random weights.
        include: globs on site names; empty means all.
        exclude: globs on site names that stay dense.
        always_split: split where nothing is saved, too; nothing is then split jointly.
        joint: let weights that multiply the same input (q, k, v; gate and up) share one right factor where that holds
            fewer numbers at no larger error of any of them.
        assume_constant: for an ONNX file: weights that are graph inputs too are constants, and no inputs any more.
        opset: of the ONNX model; by default 23 with attention, else 20; of an ONNX file its own.
        device: where factors are computed: "cpu", "cuda" or "auto".
        ray: address of a Ray cluster whose workers factorize the sites, on their CPUs, or "local" for one on this
            machine; the model's bytes are those of a run without it.
        provider: onnxruntime provider to measure on.
        threads: of onnxruntime while measuring.
        measure: whether to measure latency.
        bench_batch: samples a run while measuring.
        bench_seconds: time budget of the measurement.
        max_output_error: gate on the approximation error (relative L2 on probe inputs); None only reports it.
        keep_dense: keep the dense model as `dense.onnx` in the bundle, so that `verify` can compare again.
        allow_larger: deliver a compressed model that is larger than the dense one, too; `always_split` does so anyway.
        force: replace a bundle that is there.
        progress: called with (site, index, count) before each factorization.
        command: for the report; by default the Python call's name.
        kept: what earlier exports of the same model, data and settings have found (`sweep` makes many).
        from_sweep: the folder of a sweep: nothing is computed, one of its points is delivered; without a model.
        point: which.

    Raises:
        UsageError: a request that cannot be meant (exit 2).
        ModelError: the model cannot be handled (exit 3).
        GateError: a verification gate failed (exit 4).
    """
    if from_sweep is not None or point is not None:
        return _of_sweep(model, from_sweep, point, output, force=force)
    if model is None:
        raise UsageError("export takes a MODEL, or --from-sweep DIR --point N")
    plain, shapes = told_shapes(input_shape)
    request = RankRequest(
        rank=uniform(rank, max_error),
        budget=given_budget(keep_params, keep_macs, max_size, keep_latency, max_latency),
        max_drop=max_drop,
        plan=None if plan is None else read_plan(plan),
        plan_name="" if plan is None else Path(plan).name,
        calib=calib,
        calib_size=calib_size,
        factors=factors,
        min_rank=min_rank,
        rank_multiple=rank_multiple,
        allow_shared_data=allow_shared_data,
    )
    request.check_against(data=data, always_split=always_split)
    _check_ray(ray, request, device)
    timed = Timed(
        request=request, cost=cost, foreign=foreign_cost, smaller_is_enough=smaller_is_enough, measure=measure
    )
    provider, seconds = str(parse(provider)), parse_seconds(str(cost_budget), "--cost-budget")
    check_source(calib)
    filters = Filters(include=tuple(include), exclude=tuple(exclude))
    solver = Solver(
        method=method,
        power_iterations=power_iterations,
        oversampling=oversampling,
        seed=seed,
        route=route,
        mixed_precision=mixed_precision,
    )
    dataset = evaluation_data(data, preprocessing)
    job = StepSettings(
        settings=request.settings(filters, solver, always_split=always_split, joint=joint, opset=opset),
        solver=solver,
        device=device_named("cpu" if ray is not None else device),
        ray=ray,
        provider=provider,
        progress=progress,
        shapes=shapes,
        given=None if feeds is None else read_feeds(feeds) if isinstance(feeds, str | Path) else dict(feeds),
        assume_constant=assume_constant,
        sources={"--calib": calib, "--data": dataset},
    )
    origin = Origin(
        model=model,
        weights=weights,
        checkpoint=checkpoint,
        shape=plain,
        seed=seed,
        preprocessing=preprocessing,
        opset=opset,
    )
    run = ExportRun(
        job=job,
        origin=origin,
        timed=timed,
        costing=Costing(provider=provider, threads=threads, seconds=seconds, seed=seed),
        filters=filters,
        dataset=dataset,
        bench_batch=bench_batch,
        bench_seconds=bench_seconds,
        max_output_error=max_output_error,
        keep_dense=keep_dense,
        allow_larger=allow_larger,
        command=command or "rsi_deploy.export(...)",
        kept=kept,
    )
    read = (model, weights, checkpoint, data, calib, feeds, plan, cost)
    with whole_folder(Path(output), force=force, inputs=read) as folder:
        return run.made_in(folder)


def _check_ray(ray: str | None, request: RankRequest, device: str) -> None:
    if ray is None:
        return
    if request.is_fitted:
        raise UsageError(
            "--ray factorizes weights, each apart; with --calib a layer is fitted to what those before it have become, "
            "one after another: leave out --ray, or add --factors weights"
        )
    if device == "cuda":
        raise UsageError("--ray factorizes on the workers' CPUs: leave out --device cuda, or --ray")
    check_ray(ray)


def _of_sweep(
    model: object, folder: str | Path | None, point: int | None, output: str | Path, *, force: bool
) -> Report:
    """A point of a sweep, delivered."""
    if folder is None or point is None:
        raise UsageError("--from-sweep DIR and --point N go together")
    if model is not None:
        raise UsageError("--from-sweep delivers a model that is made already: leave out MODEL")
    return deliver(folder, point, output, force=force)
