"""`--target ort`: the model in ORT format, for onnxruntime's minimal builds on phones and boards.

    DIR/model.ort                              weights and graph, optimized already
    DIR/required_operators.config              the operators that a minimal build must have
    DIR/required_operators_and_types.config    with the types of each: for the smallest build

onnxruntime's own converter writes them; model.ort not with the same bytes every time, for its tables come in any order.
It is loaded and run beside the bundle's model before it is delivered.
"""

import contextlib
import io
import logging
from pathlib import Path
from typing import Literal

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging.result import described
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.runtime.parity import EXPORTER_TOLERANCE, compare_outputs, tolerance_for
from rsi_deploy.runtime.sessions import make_session, run_session

Platform = Literal["arm", "amd64"]

log = logging.getLogger(__name__)


def write_ort(folder: Path, model: Servable, platform: Platform) -> None:
    """Write the ORT-format model and its configs into `folder`, and hold it against the bundle's model.

    Args:
        folder: of the package.
        model: what is converted.
        platform: "arm" runs everywhere; "amd64" also stores layouts that only x86-64 runs.

    Raises:
        ModelError: onnxruntime cannot convert it, or cannot load what it wrote.
        GateError: the converted model's outputs differ by more than rounding.
    """
    path = _converted(folder, model, platform)
    expected = run_session(make_session(model.model), model.feeds, "model.onnx")
    outputs = run_session(make_session(path), model.feeds, path.name)
    tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
    what = "ORT-format gate (model.ort against model.onnx)"
    compare_outputs(expected, outputs, what=what, tolerance=tolerance, remedy="choose another --target")
    (folder / "README.md").write_text(_readme(model, platform), encoding="utf-8")


def _converted(folder: Path, model: Servable, platform: Platform) -> Path:
    """The written model.ort, with both configs beside it."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort
    from onnxruntime.tools.ort_format_model import create_config_from_models

    said = io.StringIO()
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it says INFO to whoever listens
    try:
        with contextlib.redirect_stdout(said):
            convert_onnx_models_to_ort(
                model.model, folder, optimization_styles=[OptimizationStyle.Fixed], target_platform=platform
            )
            (path,), (config,) = folder.glob("*.ort"), folder.glob("*.config")
            path, config = path.rename(folder / "model.ort"), config.rename(folder / "required_operators.config")
            create_config_from_models([path], typed := folder / "required_operators_and_types.config", True)
    except Exception as error:  # onnxruntime's exceptions derive from nothing narrower
        raise ModelError(
            f"{model.model}: onnxruntime cannot write it in ORT format: {str(error).strip()}; choose another --target"
        ) from error
    finally:
        log.info("%s", said.getvalue())
    for listed in (config, typed):  # each tells the path that the model had here
        listed.write_text(listed.read_text(encoding="utf-8").replace(str(path), path.name), encoding="utf-8")
    return path


def _readme(model: Servable, platform: Platform) -> str:
    import onnxruntime

    return "\n".join(
        [
            f"# {model.report.source.model}, compressed, in ORT format",
            "",
            f"`model.ort` is for {'x86-64 only' if platform == 'amd64' else 'every CPU'}. When it was written its "
            "outputs were the bundle's within rounding. onnxruntime's full build runs it as it is:",
            "",
            "```python",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.ort", providers=["CPUExecutionProvider"])',
            "```",
            "",
            *described(model),
            "",
            "A minimal build, from onnxruntime's sources, with nothing but what this model needs:",
            "",
            "```sh",
            "./build.sh --config MinSizeRel --build_shared_lib --minimal_build --disable_ml_ops --skip_tests \\",
            '    --include_ops_by_config "$PWD/required_operators.config"',
            "```",
            "",
            "Smaller still, with the types of each operator: `required_operators_and_types.config` and",
            "`--enable_reduced_operator_type_support`. Build the onnxruntime that wrote the file "
            f"({onnxruntime.__version__}), or a later one.",
            "",
        ]
    )
