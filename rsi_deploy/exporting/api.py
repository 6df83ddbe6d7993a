"""The main job, `export`: a model goes in, a compressed, verified, measured bundle comes out.

    load -> dense ONNX -> trace -> plan and factorize -> split -> verify -> accuracy -> latency -> report

The dense model is written to disk once; from then on everything reads it memory-mapped and the torch model is gone,
so the peak memory is about that of exporting alone.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from torch import nn

from rsi_deploy.calibration.calibration_data import CHECK_OPTION, OPTION, check_source
from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import option_name
from rsi_deploy.core.settings.recipe import recipe_text
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.costing.cost_table import read_cost_table
from rsi_deploy.data.feeding import errors_for_option
from rsi_deploy.data.picture_settings import picture_settings, preprocessing_of
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.text_data import TextOptions, with_text
from rsi_deploy.exporting.cache import SweepCache
from rsi_deploy.exporting.inputs import (
    Origin,
    device_named,
    evaluation_data,
    input_feeds,
)
from rsi_deploy.exporting.keywords import ExportKeywords
from rsi_deploy.exporting.run import ExportRun
from rsi_deploy.exporting.step_settings import StepSettings
from rsi_deploy.exporting.timing.latency_options import check_time_settings
from rsi_deploy.exporting.timing.profile import Costing
from rsi_deploy.io.model_folder import folder_of
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.planning.planner import Filters
from rsi_deploy.planning.request import RankRequest
from rsi_deploy.precision.targets import target_named
from rsi_deploy.report.schema import Report
from rsi_deploy.report.sweep_schema import deliver
from rsi_deploy.runtime.feeds.shapes import input_shapes
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.ray_connection import check_ray

Progress = Callable[[str, int, int], None]


def export(
    model: str | nn.Module | None,
    output: str | Path,
    config: ExportConfig | None = None,
    *,
    preprocessing: Preprocessing | None = None,
    force: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
    from_sweep: str | Path | None = None,
    point: int | None = None,
    **settings: Unpack[ExportKeywords],
) -> Report:
    """Compress a model and write the bundle `output` (model.onnx, report.json, report.html, recipe.toml, README.md).

    `export(model, output, keep_macs=0.5, calib="images/")`, the same settings in an `ExportConfig`, on the command line
    and in a recipe are one request, which the bundle's recipe.toml holds.

    Args:
        model: `torchvision:NAME`, `package.module:factory`, `FILE.pt2`, `FILE.onnx`, the folder of an ONNX model, or a
            torch module.
        output: folder to make.
        config: settings of the export.
        preprocessing: steps from 8-bit pictures to inputs, in place of the settings `mean`, `std`, `resize`, ...
        force: replace a bundle that is there.
        progress: function that is called with (site, index, count) before each factorization.
        command: command line for the report; by default the name of the Python call.
        from_sweep: folder of a sweep, one point of which is delivered; nothing is computed, so `model` is None, and
            settings are refused.
        point: number of that point.
        settings: fields of `ExportConfig` by name; they win over `config`.

    Raises:
        UsageError: a request that cannot be meant (exit 2).
        ModelError: the model cannot be handled (exit 3).
        GateError: a verification gate failed (exit 4).
    """
    config = ExportConfig.of(config, **settings, **picture_settings(preprocessing))
    if from_sweep is not None or point is not None:
        return _of_sweep(model, from_sweep, point, output, config, force=force)
    if model is None:
        raise UsageError("export takes a MODEL, or --from-sweep DIR --point N")
    run = export_run(model, config, progress=progress, command=command or "rsi_deploy.export(...)")
    return run.write_bundle(Path(output), force=force)


def export_run(
    model: str | nn.Module,
    config: ExportConfig,
    *,
    progress: Progress | None = None,
    command: str = "",
    recipe: str = "",
    kept: SweepCache | None = None,
    original: str | None = None,
) -> ExportRun:
    """Prepare an export: read what the settings name, and refuse what contradicts itself, before any work.

    Args:
        model: see `export`; like `config`, `progress` and `command`.
        config: settings.
        progress: progress callback.
        command: command line for the report.
        recipe: recipe for the bundle, where it is not that of `model` and `config`.
        kept: cache of what earlier exports of the same model, data and settings have found (for `sweep`).
        original: path of the user's MODEL, if `model` is a copy of it (for `sweep`).

    Raises:
        UsageError: says what to type.
    """
    target = target_named(config.target)
    target.check_precision(config.precision)
    request = RankRequest.of(config).with_least_rank(target.least_rank)
    request.check_against(data=config.data, always_split=config.always_split)
    _check_ray(config.ray, request, config.device)
    check_time_settings(request, config)
    provider = str(parse_provider(config.provider))
    if config.cost is not None:
        read_cost_table(config.cost)
    check_source(config.calib)
    check_source(config.calib_check, CHECK_OPTION)
    request = _with_text(request, config, model, folder_of(original))
    filters = Filters(include=config.include, exclude=config.exclude)
    solver = Solver(
        method=config.method,
        power_iterations=config.power_iterations,
        oversampling=config.oversampling,
        seed=config.seed,
        route=config.route,
        mixed_precision=config.mixed_precision,
    )
    plain, shapes = input_shapes(config.input_shape)
    preprocessing = preprocessing_of(config)
    dataset = evaluation_data(config.data, preprocessing)
    return ExportRun(
        job=StepSettings(
            settings=request.settings(
                filters, solver, always_split=config.always_split, joint=config.joint, opset=config.opset
            ),
            solver=solver,
            device=device_named("cpu" if config.ray is not None else config.device),
            ray=config.ray,
            provider=provider,
            progress=progress,
            shapes=shapes,
            own_feeds=input_feeds(config.feeds),
            assume_constant=config.assume_constant,
            requantize=config.requantize,
            sources={"--calib": request.calib, "--data": dataset},
        ),
        origin=Origin(
            model=model,
            weights=config.weights,
            checkpoint=config.checkpoint,
            shape=plain,
            seed=config.seed,
            preprocessing=preprocessing,
            opset=config.opset,
            folder=folder_of(original) if original is not None and Path(original).is_dir() else None,
        ),
        request=request,
        costing=Costing(provider=provider, threads=config.threads, seconds=config.cost_budget, seed=config.seed),
        filters=filters,
        dataset=dataset,
        max_output_error=None if request.is_limited_by_error else config.max_output_error,
        command=command,
        config=config,
        recipe=recipe or recipe_text("export", model, config),
        kept=kept,
    )


def _with_text(request: RankRequest, config: ExportConfig, model: str | nn.Module, folder: Path | None) -> RankRequest:
    """Return the request with its calibration data opened where they are text."""
    options = TextOptions.of(config)
    with errors_for_option(OPTION):
        calib = with_text(request.calib, options, model, folder)
    with errors_for_option(CHECK_OPTION):
        return replace(request, calib=calib, calib_check=with_text(request.calib_check, options, model, folder))


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
    model: object,
    folder: str | Path | None,
    point: int | None,
    output: str | Path,
    config: ExportConfig,
    *,
    force: bool,
) -> Report:
    """A point of a sweep, delivered."""
    if folder is None or point is None:
        raise UsageError("--from-sweep DIR and --point N go together")
    if model is not None:
        raise UsageError("--from-sweep delivers a model that is made already: leave out MODEL")
    fields = ExportConfig.model_fields
    changed = [option_name(n, fields[n]) for n, value in config.chosen().items() if value != fields[n].default]
    if changed:
        raise UsageError(
            f"--from-sweep delivers a model that is made already, which {', '.join(changed)} cannot change",
            hint="leave such options out, or type rsi-deploy export MODEL without --from-sweep",
        )
    return deliver(folder, point, output, force=force)
