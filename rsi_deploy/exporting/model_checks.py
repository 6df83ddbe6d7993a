"""Refusals of models that the settings do not fit: quantized sources, and operators that a target does not run."""

from pathlib import Path

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.io.onnx_reader import read_graph
from rsi_deploy.precision.targets import target_named
from rsi_deploy.runtime.provider_spec import parse_provider
from rsi_deploy.runtime.providers import short_name


def refuse_quantized(dense: DenseModel, config: ExportConfig) -> None:
    """Refuse a quantized model without any float weight, or together with a precision.

    Raises:
        UsageError: a precision for a model that has one.
        ModelError: no weight of the model is float.
    """
    count, name = len(dense.quantized), dense.source.name
    if not count:
        return
    found = f"{name} is quantized already: {count} of its products use weights of few bits"
    if config.precision not in (None, "float32"):
        raise UsageError(
            f"{found}, but --precision {config.precision} plans for float weights",
            hint="type --precision float32" if config.requantize else "add --requantize, or leave it out",
        )
    if not dense.sites:
        raise ModelError(f"{found}, and no float weight can be split", hint="type export --requantize")


def check_target(target: str | None, path: Path, name: str) -> None:
    """Refuse a model that `--target` does not run.

    Args:
        target: value of `--target`; None for any provider.
        path: file of the model.
        name: name of the model for messages.

    Raises:
        ModelError: names what the target does not run.
    """
    if target is not None:
        model = read_graph(path)
        target_named(target).check_shapes(model, name)
        target_named(target).check_model(model)


def target_notes(target: str | None, provider: str) -> list[str]:
    """Return the report's note on `--target`; none without."""
    if target is None:
        return []
    here = short_name(parse_provider(provider).name)
    other = f"; outputs and times are those of {here}" if here != target else ""
    return [f"--target {target}: the model has no operator that this provider is known to refuse{other}"]
