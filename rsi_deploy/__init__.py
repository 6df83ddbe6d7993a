"""rsi-deploy: a trained network in, a compressed and measurably faster ONNX model out, with an honest report.

Every verb of the command line is a function here, with the same options. Nothing heavy is imported until it is used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# From 1.29 on, onnxruntime sends telemetry when it is initialized, unless this variable is set before.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from rsi_deploy.benchmark.latency import BenchResult as BenchResult
    from rsi_deploy.benchmark.latency import bench as bench
    from rsi_deploy.core.errors import GateError as GateError
    from rsi_deploy.core.errors import ModelError as ModelError
    from rsi_deploy.core.errors import RsiDeployError as RsiDeployError
    from rsi_deploy.core.errors import UsageError as UsageError
    from rsi_deploy.core.settings.verbs import ExportConfig as ExportConfig
    from rsi_deploy.core.settings.verbs import SweepConfig as SweepConfig
    from rsi_deploy.core.sites import SiteRecord as SiteRecord
    from rsi_deploy.costing.cost_table import CostTable as CostTable
    from rsi_deploy.data.preprocess import Preprocessing as Preprocessing
    from rsi_deploy.evaluation.accuracy import AccuracyResult as AccuracyResult
    from rsi_deploy.evaluation.accuracy import evaluate as evaluate
    from rsi_deploy.exporting.api import export as export
    from rsi_deploy.exporting.timing.profile import profile as profile
    from rsi_deploy.onnx_models.inspection import inspect as inspect
    from rsi_deploy.onnx_models.rewrite import rewrite as rewrite
    from rsi_deploy.packaging.packing import package as package
    from rsi_deploy.packaging.result import PackageResult as PackageResult
    from rsi_deploy.report.schema import Report as Report
    from rsi_deploy.report.schema import read_report as read_report
    from rsi_deploy.runtime.doctor import doctor as doctor
    from rsi_deploy.serving.server import serve as serve
    from rsi_deploy.sweeping.api import sweep as sweep
    from rsi_deploy.torch_models.compress import compress_ as compress_
    from rsi_deploy.verifying.api import verify as verify

_HOMES = {
    "AccuracyResult": "evaluation.accuracy",
    "BenchResult": "benchmark.latency",
    "CostTable": "costing.cost_table",
    "ExportConfig": "core.settings.verbs",
    "GateError": "core.errors",
    "ModelError": "core.errors",
    "PackageResult": "packaging.result",
    "Preprocessing": "data.preprocess",
    "Report": "report.schema",
    "RsiDeployError": "core.errors",
    "SiteRecord": "core.sites",
    "SweepConfig": "core.settings.verbs",
    "UsageError": "core.errors",
    "bench": "benchmark.latency",
    "compress_": "torch_models.compress",
    "doctor": "runtime.doctor",
    "evaluate": "evaluation.accuracy",
    "export": "exporting.api",
    "inspect": "onnx_models.inspection",
    "package": "packaging.packing",
    "profile": "exporting.timing.profile",
    "read_report": "report.schema",
    "rewrite": "onnx_models.rewrite",
    "serve": "serving.server",
    "sweep": "sweeping.api",
    "verify": "verifying.api",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
