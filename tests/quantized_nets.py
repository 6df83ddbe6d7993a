"""The nets of `calibrated_nets` as onnxruntime's own tools quantize them, which several test files share."""

import contextlib
import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from calibrated_nets import conv_net, text_net
from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

IMAGES = {"input": np.random.default_rng(3).standard_normal((8, 3, 8, 8)).astype(np.float32)}
TEXTS = {"ids": np.arange(12).reshape(2, 6), "attention_mask": np.ones((2, 6), np.int64)}
NETS = {"images": (conv_net, IMAGES), "texts": (text_net, TEXTS)}
PRODUCTS = {"images": 4, "texts": 2}


class Batches:
    """One batch, as onnxruntime's calibration reads it."""

    def __init__(self, batch):
        self._batches = iter([batch])

    def get_next(self):
        return next(self._batches, None)

    def set_range(self, start_index, end_index):
        """Accept any range."""


def quantized_net(path, net="images", way="QDQ", excluded=()):
    """Write a net quantized in one way: QDQ, QOperator, dynamic, dynamic uint8, blocks, symmetric blocks."""
    write, batch = NETS[net]
    source = write(path.with_name(f"float-{path.name}"))
    excluded = list(excluded)
    with contextlib.redirect_stdout(io.StringIO()):
        if way in ("QDQ", "QOperator"):
            per_channel = way == "QDQ" or net == "images"
            quantize_static(
                source,
                path,
                Batches(batch),
                quant_format=QuantFormat[way],
                per_channel=per_channel,
                nodes_to_exclude=excluded,
            )
        elif way.startswith("dynamic"):
            kind = QuantType.QUInt8 if way.endswith("uint8") else QuantType.QInt8
            quantize_dynamic(source, path, per_channel=kind == QuantType.QInt8, weight_type=kind)
        else:
            config = DefaultWeightOnlyQuantConfig(
                block_size=16, is_symmetric=way.startswith("symmetric"), op_types_to_quantize=("MatMul", "Gather")
            )
            quantizer = MatMulNBitsQuantizer(onnx.load(source), algo_config=config)
            quantizer.process()
            quantizer.model.save_model_to_file(str(path))
    return Path(path)


def answers(path, batch, level=ort.GraphOptimizationLevel.ORT_ENABLE_ALL):
    """Return the first output of a model file."""
    options = ort.SessionOptions()
    options.log_severity_level, options.graph_optimization_level = 4, level
    options.intra_op_num_threads = 1
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, batch)[0]


def distance(came, expected):
    """Return the relative L2 distance."""
    return np.linalg.norm(came - expected) / np.linalg.norm(expected)
