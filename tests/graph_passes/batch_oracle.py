"""Whether samples of a model are independent, found by running it: the oracle of the proof's tests."""

# ruff: noqa: E501 (tables of models in text form)

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

MAGNITUDES = (1.0, 1e3, 1e-3)
HEADER = 'ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1, "local": 1]'
STORED = """
int64[1] c0 = {0}, int64[1] c1 = {1}, int64[1] c2 = {2}, int64[1] c3 = {3}, int64[2] flat = {-1, 6}, int64[1] minus = {-1}, int64[1] far = {9223372036854775807},
int64[1] back = {-9223372036854775807}, int64 s0 = {0}, int64 s1 = {1}, int64 s2 = {2}, int64 s4 = {4}, int64 s6 = {6}, int64 s24 = {24},
int64[2] rows = {-1, 6}, int64[2] column = {-1, 1}, int64[3] rank3 = {-1, 4, 6}, int64[3] time = {4, -1, 6}, int64[3] long = {-1, 1, 1},
int64[6] pads = {0, 1, 0, 0, 1, 0}, int64[2] c46 = {4, 6}, int64[2] c16 = {1, 6}, int64[2] c12 = {1, 2},
float[6] six = {1, 2, 3, 4, 5, 6}, float[6] ones = {1, 1, 1, 1, 1, 1}, float[6,3] w = {0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8},
float[2,4,3] kernel = {1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3}, float tenth = {0.1}, uint8 zero_point = {128},
float[2] off_on = {0, 1}, bool yes = {1}
"""
"""Constants that the bodies of models name."""


def parsed(body, inputs="float[n, 4, 6] x", outputs="y", *, opset=18, functions=""):
    """A model from ONNX's text form, which may name the constants of `STORED`."""
    outputs = ", ".join(f"float {name}" for name in outputs.split())
    text = f"<{HEADER.format(opset=opset)}> g ({inputs}) => ({outputs}) <{STORED}> {{ {body} }} {functions}"
    model = onnx.parser.parse_model(text)
    for value in model.graph.output:
        value.type.ClearField("value")  # what the operators give
    for node in model.graph.node:
        node.name = node.name or node.output[0]
    return model


def session_of(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def shapes_of(model, batch, axis=0, open_size=5):
    """Input name -> shape with `batch` samples at the axis."""
    shapes = {}
    for value in model.graph.input:
        dims = [dim.dim_value if dim.HasField("dim_value") else open_size for dim in value.type.tensor_type.shape.dim]
        if dims:
            dims[axis] = batch
        shapes[value.name] = tuple(dims)
    return shapes


def drawn(model, batch, seed, axis=0):
    """Inputs whose samples have different magnitudes, each of them once."""
    rng, feeds = np.random.default_rng(seed), {}
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    for name, shape in shapes_of(model, batch, axis).items():
        if kinds[name] in (TensorProto.INT64, TensorProto.INT32):
            feeds[name] = rng.integers(0, 4, shape).astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
            continue
        scale = np.array([MAGNITUDES[(at + seed) % 3] for at in range(batch)], np.float32)
        form = [1] * len(shape)
        form[axis] = batch
        values = rng.standard_normal(shape) * scale.reshape(form)
        feeds[name] = values.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
    return feeds


def depends(model, axes=None, batches=(3, 2), axis=0):
    """What shows that samples are not independent, from runs of batches and of each sample alone; "" where nothing does.

    Args:
        model: all its inputs have their batch at `axis`.
        axes: output name -> its batch axis; 0 by default.
        batches: sizes.
    """
    session = session_of(model)
    names = [output.name for output in session.get_outputs()]
    for seed, batch in enumerate(batches):
        feeds = drawn(model, batch, seed, axis)
        try:
            together = session.run(None, feeds)
        except Exception as error:
            return f"a batch of {batch} does not run: {str(error)[:200]}"
        for at in range(batch):
            one = {name: array.take([at], axis=axis) for name, array in feeds.items()}
            for name, whole, alone in zip(names, together, session.run(None, one), strict=True):
                along = 0 if axes is None else axes[name]
                if whole.ndim <= along or whole.shape[along] != batch or alone.shape[along] != 1:
                    return f"{name} has the shape {whole.shape} for {batch} samples, {alone.shape} for one"
                own = whole.take([at], axis=along)
                if own.shape != alone.shape:
                    return f"{name} has the shape {whole.shape} for {batch} samples, {alone.shape} for one"
                if own.dtype.kind != "f":
                    same = bool((own == alone).all())
                else:
                    finite = np.abs(alone[np.isfinite(alone)])
                    same = np.allclose(own, alone, rtol=1e-4, atol=1e-5 * finite.max(initial=0) + 1e-30, equal_nan=True)
                if not same:
                    return f"sample {at} of {name} differs in a batch of {batch}"
    return ""
