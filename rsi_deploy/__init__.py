"""rsi-deploy: a trained network in, a compressed and measurably faster ONNX model out, with an honest report.

Every verb of the command line is a function here, with the same options. Nothing heavy is imported until it is used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# From 1.29 on onnxruntime calls its maker as soon as it is initialized; told so before, it sends nothing.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from rsi_deploy.compress import compress_ as compress_
    from rsi_deploy.compress_to_data import compress_to_data_ as compress_to_data_
    from rsi_deploy.core_sites import SiteRecord as SiteRecord
    from rsi_deploy.diagnosis import doctor as doctor
    from rsi_deploy.errors import GateError as GateError
    from rsi_deploy.errors import ModelError as ModelError
    from rsi_deploy.errors import RsiDeployError as RsiDeployError
    from rsi_deploy.errors import UsageError as UsageError
    from rsi_deploy.inspection import inspect as inspect
    from rsi_deploy.measure.accuracy import AccuracyResult as AccuracyResult
    from rsi_deploy.measure.accuracy import evaluate as evaluate
    from rsi_deploy.measure.cost_table import CostTable as CostTable
    from rsi_deploy.measure.latency import BenchResult as BenchResult
    from rsi_deploy.measure.latency import bench as bench
    from rsi_deploy.measure.preprocess import Preprocessing as Preprocessing
    from rsi_deploy.packaging.packing import package as package
    from rsi_deploy.packaging.result import PackageResult as PackageResult
    from rsi_deploy.pipeline import export as export
    from rsi_deploy.report.schema import Report as Report
    from rsi_deploy.report.schema import read_report as read_report
    from rsi_deploy.rewriting import rewrite as rewrite
    from rsi_deploy.serving.server import serve as serve
    from rsi_deploy.sweeps.sweeping import sweep as sweep
    from rsi_deploy.timing.costing import profile as profile
    from rsi_deploy.verification import verify as verify

_HOMES = {
    "AccuracyResult": "measure.accuracy",
    "BenchResult": "measure.latency",
    "CostTable": "measure.cost_table",
    "GateError": "errors",
    "ModelError": "errors",
    "PackageResult": "packaging.result",
    "Preprocessing": "measure.preprocess",
    "Report": "report.schema",
    "RsiDeployError": "errors",
    "SiteRecord": "sites",
    "UsageError": "errors",
    "bench": "measure.latency",
    "compress_": "compress",
    "compress_to_data_": "compress_to_data",
    "doctor": "diagnosis",
    "evaluate": "measure.accuracy",
    "export": "pipeline",
    "inspect": "inspection",
    "package": "packaging.packing",
    "profile": "timing.costing",
    "read_report": "report.schema",
    "rewrite": "rewriting",
    "serve": "serving.server",
    "sweep": "sweeps.sweeping",
    "verify": "verification",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
