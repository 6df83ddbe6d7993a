"""Shapes and small contents of values that no sample reaches, for every trial size of the batch.

    x (7, 3, 4) -> Shape -> Gather 0 -> Concat with -1 -> [7, -1] -> Reshape      7: of this trial size
    x (9, 3, 4) -> ...                                 -> [9, -1]

ONNX's own shape inference and reference operators compute them, a node at a time.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference
from onnx.reference.ops import load_op

from graph_passes.axis_rules.values import MOST_NUMBERS, Array, Dims, NodeCall, Value

T = TypeVar("T")

_SHAPE_ARITHMETIC = """
Abs Add And BitwiseAnd BitwiseOr Cast CastLike Ceil Clip Concat ConstantOfShape Div Equal Exp Expand Flatten Floor
Gather GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual Log Max Min Mod Mul Neg Not Or Pow
Reciprocal ReduceMax ReduceMin ReduceProd ReduceSum Reshape Round ScatterElements ScatterND Sign Slice Sqrt
Squeeze Sub Sum Tile Transpose Trilu Unsqueeze Where Xor
"""
FOLDED = frozenset(_SHAPE_ARITHMETIC.split())
"""Operators that are computed where all their inputs are known."""

KINDS = frozenset(
    (
        onnx.TensorProto.BOOL,
        onnx.TensorProto.INT32,
        onnx.TensorProto.INT64,
        onnx.TensorProto.UINT8,
        onnx.TensorProto.INT8,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.DOUBLE,
    )
)


def constant(tensor: onnx.TensorProto, trials: int) -> Value:
    """Return the value of a stored tensor, with its content where it is small and stored in the model itself."""
    dims = tuple(int(dim) for dim in tensor.dims)
    data = None
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    if not external and tensor.data_type in KINDS and math.prod(dims) <= MOST_NUMBERS:
        data = (numpy_helper.to_array(tensor),) * trials
    return Value(kind=tensor.data_type, shapes=(dims,) * trials, data=data)


def of_arrays(arrays: Sequence[Array], kind: int) -> Value:
    """Return a value of known content; it is counted where the content differs between the trial sizes."""
    same = all(np.array_equal(array, arrays[0]) for array in arrays)
    return Value(kind=kind, shapes=tuple(array.shape for array in arrays), data=tuple(arrays), counted=not same)


def inferred(call: NodeCall, op_type: str = "", domain: str = "") -> list[tuple[int, tuple[Dims, ...] | None]]:
    """Return element type and shapes of every output as ONNX infers them; (0, None) where it infers none.

    Args:
        call: the node.
        op_type: operator of ONNX whose shapes the node has; by default the node's own.
        domain: of the operator.
    """
    unknown: list[tuple[int, tuple[Dims, ...] | None]] = [(0, None)] * len(call.node.output)
    schema = _schema(op_type or call.node.op_type, call.opset, domain)
    if schema is None:
        return unknown
    trials = _for_each_trial(call, lambda trial: _inferred_once(call, schema, trial))
    found = []
    for name in call.node.output:
        each = [trial.get(name, (0, None)) for trial in trials]
        shapes = tuple(dims for _, dims in each if dims is not None)
        complete = len(shapes) == len(each) and len({len(dims) for dims in shapes}) == 1
        found.append((each[0][0], shapes if complete else None))
    return found


def folded(call: NodeCall, kind: int, shapes: tuple[Dims, ...] | None) -> Value | None:
    """Compute the content of the node's one output where its inputs are known and it is small; else None."""
    if call.node.op_type not in FOLDED or call.node.domain not in ("", "ai.onnx") or len(call.node.output) != 1:
        return None
    if shapes is None or any(None in dims or math.prod(dims) > MOST_NUMBERS for dims in shapes):  # type: ignore[arg-type]
        return None
    contents = []
    for value in call.inputs:
        if value is not None and value.data is None:
            return None
        contents.append(None if value is None else value.data)
    attributes = {name: call.attribute(name) for name in call.attributes}
    try:
        operator = load_op("", call.node.op_type, call.opset)

        def computed(trial: int) -> Array:
            made = operator.eval(*(None if data is None else data[trial] for data in contents), **attributes)
            return np.asarray(made[0] if isinstance(made, tuple) else made)

        arrays = _for_each_trial(call, computed)
    except Exception:  # the reference operators raise any exception; the content stays unknown
        return None
    return of_arrays(arrays, kind)


def _for_each_trial(call: NodeCall, made: Callable[[int], T]) -> list[T]:
    """Call `made` for every trial size; only once where no input depends on the size."""
    if all(value is None or value.free for value in call.inputs):
        return [made(0)] * len(call.sizes)
    return [made(trial) for trial in range(len(call.sizes))]


@functools.lru_cache(maxsize=1024)
def _schema(op_type: str, opset: int, domain: str) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op_type, opset, domain)
    except Exception:  # onnx raises SchemaError, which some versions do not export
        return None


def _inferred_once(call: NodeCall, schema: defs.OpSchema, trial: int) -> dict[str, tuple[int, Dims | None]]:
    """Return (element type, shape) by output name for one size of the batch; {} where the inference fails."""
    types, contents = {}, {}
    for name, value in zip(call.node.input, call.inputs, strict=True):
        if value is None:
            continue
        dims = None if value.shapes is None else value.shapes[trial]
        types[name] = helper.make_tensor_type_proto(value.kind, dims)
        if value.data is not None:
            contents[name] = numpy_helper.from_array(np.ascontiguousarray(value.data[trial]), name)
    try:
        node = call.node
        if node.op_type != schema.name or node.domain not in (
            "",
            "ai.onnx",
        ):  # shaped like another operator
            node = onnx.NodeProto()
            node.CopyFrom(call.node)
            node.op_type, node.domain = schema.name, ""
            del node.input[schema.max_input :]
            del node.attribute[:]
            node.attribute.extend(each for each in call.node.attribute if each.name in schema.attributes)
        opsets = [helper.make_opsetid("", call.opset)]
        found = shape_inference.infer_node_outputs(schema, node, types, contents, opset_imports=opsets)
    except Exception:  # of sizes that do not fit, or attributes that are missing; the shape stays unknown
        return {}
    return {name: (kind.tensor_type.elem_type, _dims(kind)) for name, kind in found.items()}


def _dims(kind: onnx.TypeProto) -> Dims | None:
    if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    return tuple(int(dim.dim_value) if dim.HasField("dim_value") else None for dim in kind.tensor_type.shape.dim)
