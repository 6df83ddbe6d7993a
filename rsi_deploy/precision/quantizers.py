"""Quantize a model with onnxruntime's own tools, each in a call that says what went wrong."""

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from graph_passes.constants import OVERRIDABLE_IR_VERSION
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.limits import first_line
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.precision.schemes import PRODUCTS, Scheme
from rsi_deploy.runtime.float16 import float16_file
from rsi_deploy.runtime.sessions import tools_log_errors_only

Feeds = Mapping[str, npt.NDArray[Any]]
FeedsSource = Callable[[], Iterator[Feeds]]

LEAST_OPSET = 13
"""First opset whose QuantizeLinear has a scale per channel."""
BATCHES = {"minmax": 16, "percentile": 6, "entropy": 4}
"""Most batches that ranges are found on; histograms keep every value in memory."""
SHADOWED = ("Attention", "LayerNormalization")
"""Operators that onnxruntime's tools take for their own older ones of the same name, or that lose much in uint8."""


def quantize(
    source: Path, target: Path, scheme: Scheme, feeds: FeedsSource | None = None, excluded: Collection[str] = ()
) -> None:
    """Write a quantized copy of a float model.

    Args:
        source: model of float32 weights.
        target: file to write; large weights go beside it.
        scheme: how to quantize.
        feeds: function that returns calibration batches, for static ranges.
        excluded: names of nodes that stay in float32.

    Raises:
        UsageError: static ranges without data.
        ModelError: onnxruntime cannot quantize the model; its own words are in the message.
    """
    if scheme.kind == "static int8" and feeds is None:
        raise UsageError(f"{scheme.name} needs calibration data for the ranges of activations; add --calib")
    try:
        with _quiet(), tempfile.TemporaryDirectory(dir=target.parent, prefix="quantize-") as folder:
            model = _of_opset(source, Path(folder))
            _run(model, target, scheme, feeds, Path(folder), list(excluded))
    except (ModelError, UsageError):
        raise
    except Exception as error:  # onnxruntime's tools raise what they like
        raise ModelError(
            f"onnxruntime cannot make {scheme.name} of {source.name}: {first_line(error)}; type another --precision"
        ) from error
    _check(target, scheme, source)


def _check(target: Path, scheme: Scheme, source: Path) -> None:
    """Refuse a model that onnxruntime's tools broke: they put an If before what its branches read."""
    try:
        read_proto(target)
    except ModelError as error:
        target.unlink(missing_ok=True)
        raise ModelError(
            f"onnxruntime cannot make {scheme.name} of {source.name}: {first_line(error)}; type another --precision"
        ) from error


def _run(
    source: Path, target: Path, scheme: Scheme, feeds: FeedsSource | None, folder: Path, excluded: list[str]
) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry

    operators = sorted(set(QDQRegistry) - set(SHADOWED))
    if scheme.kind == "static int8":
        assert scheme.ranges is not None
        assert feeds is not None
        methods = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
        options: dict[str, Any] = {}
        if scheme.is_symmetric:
            options |= {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        if scheme.uint8_products:
            weights = _product_weights(read_proto(source))
            options["TensorQuantOverrides"] = {name: [{"quant_type": QuantType.QUInt8}] for name in weights}
        quantize_static(
            source,
            target,
            _Reader(feeds, BATCHES[scheme.ranges], of_one_shape=scheme.ranges != "minmax"),
            per_channel=True,
            op_types_to_quantize=operators,
            nodes_to_exclude=excluded,
            activation_type=QuantType.QInt8 if scheme.is_symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[methods[scheme.ranges]],
            extra_options=options,
        )
    elif scheme.kind == "dynamic int8":
        quantize_dynamic(
            source,
            target,
            per_channel=True,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            nodes_to_exclude=[*excluded, *(f"{name}_MatMul" for name in excluded)],  # the product of a Gemm
            weight_type=QuantType.QInt8,
        )
    elif scheme.kind == "int4 weights":
        _in_blocks(source, target, scheme)
    elif scheme.kind == "float16":
        float16_file(source, folder).replace(target)
    else:
        raise ValueError(f"{scheme.name} is no quantization")


def _product_weights(model: onnx.ModelProto) -> set[str]:
    """Return the names of the initializers that products read as weights."""
    known = {tensor.name for tensor in model.graph.initializer}
    return {name for node in model.graph.node if node.op_type in PRODUCTS for name in node.input[:2] if name in known}


def _in_blocks(source: Path, target: Path, scheme: Scheme) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    config = DefaultWeightOnlyQuantConfig(
        block_size=scheme.block, accuracy_level=4, op_types_to_quantize=("MatMul", "Gather")
    )
    quantizer = MatMulNBitsQuantizer(read_proto(source, with_data=True), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


class _Reader:
    """Calibration batches, as onnxruntime's tools read them: its histograms take no batch of another shape."""

    def __init__(self, feeds: FeedsSource, most: int, *, of_one_shape: bool) -> None:
        self._batches = islice(feeds(), most)
        self._of_one_shape = of_one_shape
        self._shapes: dict[str, tuple[int, ...]] = {}

    def get_next(self) -> dict[str, Any] | None:
        """Return the next batch; None at the end."""
        for batch in self._batches:
            shapes = {name: array.shape for name, array in batch.items()}
            self._shapes = self._shapes or shapes
            if shapes == self._shapes or not self._of_one_shape:
                return dict(batch)
        return None

    def set_range(self, start_index: int, end_index: int) -> None:
        """Accept a range, which one pass over few batches does not need."""


def _of_opset(source: Path, folder: Path) -> Path:
    """Return a file of the model with an opset that has scales per channel, and initializers that are no inputs.

    onnxruntime's tools add initializers without inputs, which a model before IR version 4 must not have.
    """
    proto = read_proto(source)
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)
    if opset >= LEAST_OPSET and proto.ir_version >= OVERRIDABLE_IR_VERSION:
        return source
    converted = read_proto(source, with_data=True)
    try:
        if opset < LEAST_OPSET:
            converted = onnx.version_converter.convert_version(converted, LEAST_OPSET)
    except Exception as error:
        raise ModelError(
            f"{source.name} has opset {opset}, but quantization needs {LEAST_OPSET}, and onnx cannot convert it: "
            f"{first_line(error)}; type --opset 17 or --precision float32"
        ) from error
    if converted.ir_version < OVERRIDABLE_IR_VERSION:
        known = {tensor.name for tensor in converted.graph.initializer}
        inputs = [value for value in converted.graph.input if value.name not in known]
        del converted.graph.input[:]
        converted.graph.input.extend(inputs)
        converted.ir_version = OVERRIDABLE_IR_VERSION
    path = folder / "converted.onnx"
    onnx.save(converted, str(path))
    return path


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what onnxruntime's tools print and log off the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), tools_log_errors_only():
            yield
    finally:
        logging.disable(before)
