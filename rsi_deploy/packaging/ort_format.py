"""`--target ort`: the model in ORT format, for onnxruntime's minimal builds on phones and boards.

    DIR/model.ort                              weights and optimized graph
    DIR/required_operators.config              the operators that a minimal build needs
    DIR/required_operators_and_types.config    the operators and their types, for the smallest build

onnxruntime's converter writes them. The bytes of model.ort may differ between runs, because the order of its tables
does. The written model is loaded, run and compared with the bundle's model.
"""

import contextlib
import io
import logging
from pathlib import Path
from typing import Literal

from rsi_deploy.core.errors import ModelError
from rsi_deploy.packaging.result import tensor_lines
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.runtime.parity import EXPORTER_TOLERANCE, compare_outputs, tolerance_for
from rsi_deploy.runtime.sessions import make_session, run_session, tools_log_errors_only

Platform = Literal["arm", "amd64"]

log = logging.getLogger(__name__)


def write_ort(folder: Path, model: Servable, platform: Platform) -> None:
    """Write the model in ORT format and its configs into `folder`, and compare it with the bundle's model.

    Args:
        folder: folder of the package.
        model: the model to convert.
        platform: "arm" runs on every CPU; "amd64" also stores layouts that only x86-64 can run.

    Raises:
        ModelError: onnxruntime cannot convert the model, or cannot load the result.
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
    """Write model.ort and both configs; return the path of model.ort."""
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort
    from onnxruntime.tools.ort_format_model import create_config_from_models

    printed = io.StringIO()
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it logs at INFO
    try:
        with contextlib.redirect_stdout(printed), tools_log_errors_only():
            convert_onnx_models_to_ort(
                model.model, folder, optimization_styles=[OptimizationStyle.Fixed], target_platform=platform
            )
            (path,), (config,) = folder.glob("*.ort"), folder.glob("*.config")
            path, config = path.rename(folder / "model.ort"), config.rename(folder / "required_operators.config")
            create_config_from_models([path], typed := folder / "required_operators_and_types.config", True)
    except Exception as error:  # the base class of onnxruntime's exceptions
        raise ModelError(
            f"{model.model}: onnxruntime cannot write it in ORT format: {str(error).strip()}; choose another --target"
        ) from error
    finally:
        log.info("%s", printed.getvalue())
    for listed in (config, typed):  # they name the path of the model on this machine
        listed.write_text(listed.read_text(encoding="utf-8").replace(str(path), path.name), encoding="utf-8")
    return path


def _readme(model: Servable, platform: Platform) -> str:
    import onnxruntime

    return "\n".join(
        [
            f"# {model.facts.source.model}, compressed, in ORT format",
            "",
            f"`model.ort` is for {'x86-64 only' if platform == 'amd64' else 'every CPU'}. Its outputs are those of the "
            "bundle, up to rounding. onnxruntime's full build runs it:",
            "",
            "```python",
            "import onnxruntime",
            "",
            'session = onnxruntime.InferenceSession("model.ort", providers=["CPUExecutionProvider"])',
            "```",
            "",
            *tensor_lines(model),
            "",
            "A minimal build from onnxruntime's sources has only the operators of this model:",
            "",
            "```sh",
            "./build.sh --config MinSizeRel --build_shared_lib --minimal_build --disable_ml_ops --skip_tests \\",
            '    --include_ops_by_config "$PWD/required_operators.config"',
            "```",
            "",
            "`required_operators_and_types.config` with `--enable_reduced_operator_type_support` makes it smaller.",
            f"Build onnxruntime {onnxruntime.__version__}, which wrote the file, or a later version.",
            "",
        ]
    )
