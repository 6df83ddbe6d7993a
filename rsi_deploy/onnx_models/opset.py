"""Another opset for an ONNX file: onnx's own version converter, with what it does not carry put back.

    model --stubs for weights--> small proto --onnx.version_converter--> proto --weights, functions, metadata--> model

onnx's converter goes up and down, from any opset, into subgraphs, and stops at an operator that it cannot say in the
other opset. (onnxscript's, the other one that is kept up, only goes up, only from opset 18, and what it cannot convert
it skips with a warning.) It drops model functions and the metadata of nodes; and a protobuf cannot hold 2 GiB, so
weights stay where they are and stubs go through. It is not always right (Resize from opset 10 to 11, GroupNormalization
from 20 to 21): `check_conversion` runs both models.
"""

import re
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import version_converter
from onnx_ir.passes.common import InlinePass

from graph_passes.constants import OVERRIDABLE_IR_VERSION
from graph_passes.names import Names
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_checks.broken_models import checker_error
from rsi_deploy.io.onnx_maps import map_types, remove_map_types_, restore_map_types_, store_map_types_
from rsi_deploy.runtime.parity import EXPORTER_TOLERANCE, OutputComparison, compare_outputs, tolerance_for
from rsi_deploy.runtime.probe_runs import run_probe
from rsi_deploy.runtime.sessions import make_session

# Up to so many numbers, constants go through the converter: it reads axes, shapes and scales, and never a weight.
STUB_NUMBERS = 1024
_REMEDY = "leave out --opset to keep the file's, or give another"


def convert_opset(model: ir.Model, opset: int, name: str) -> ir.Model:
    """Return the model in another opset of ONNX's own operators; weights are neither read nor copied.

    The IR version rises to the one that came with the opset, where it is older. Operators of other domains stay as
    they are. Functions stay too, unless an operator in one of them means something else in the other opset: then all
    are put into the graph.

    Args:
        model: as read; it is used up.
        opset: of the domain "".
        name: of the file, for the error.

    Raises:
        UsageError: no such opset.
        ModelError: the converter cannot, with its reason.
    """
    before, newest = model.opset_imports.get("", 0), onnx.defs.onnx_opset_version()
    if opset == before:
        return model
    if not 1 <= opset <= newest:
        raise UsageError(f"--opset must be between 1 and {newest} for an ONNX file, but got {opset}")
    try:
        if any(_changes(node, before, opset) for function in model.functions.values() for node in function.all_nodes()):
            InlinePass()(model)
        weights = _stub_(model)
        proto = ir.to_proto(model)
        restore_map_types_(proto, model)  # the converter crashes on an input without a type
        converted = version_converter.convert_version(proto, opset)
        remove_map_types_(converted)
        made = ir.from_proto(converted)
    except Exception as error:  # the converter's own errors have no common base, and protobuf and onnx_ir raise theirs
        raise ModelError(
            f"{name} cannot be converted from opset {before} to {opset}: {_reason(error)}; {_REMEDY}"
        ) from error
    for value in _constants(made):
        if isinstance(stub := _tensor(value), ir.ExternalTensor):
            _put_(value, weights[int(str(stub.location))])
    _carry_over_(model, made, opset)
    _drop_defaults_(made, before)
    return made


def check_conversion(
    source: Path, converted: Path, opsets: tuple[int, int], feeds: Mapping[str, npt.NDArray[Any]]
) -> OutputComparison | None:
    """Hold a converted model against the file it comes from: onnx's checker, and the outputs on the probe inputs.

    Args:
        source: the file.
        converted: the model in the other opset.
        opsets: of the file, and the other one.
        feeds: probe inputs.

    Returns:
        The comparison; None where onnxruntime cannot run the file itself, so that there is nothing to compare with.

    Raises:
        ModelError: the converted model is no valid ONNX, or onnxruntime cannot run it, where the file is and can.
        GateError: its outputs are others, by more than rounding.
    """
    what = f"{source.name} converted from opset {opsets[0]} to {opsets[1]}"
    if (against := checker_error(converted)) and not checker_error(source):
        raise ModelError(f"{what} is not valid: {_reason(against)}; {_REMEDY}")
    try:
        expected = _outputs(source, feeds)
    except ModelError:
        return None
    try:
        outputs = _outputs(converted, feeds)
    except ModelError as error:
        raise ModelError(f"{what}: {str(error).replace(f'{converted}: ', '')}; {_REMEDY}") from error
    tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
    return compare_outputs(expected, outputs, what=f"exporter gate ({what}, against itself)", tolerance=tolerance)


def _outputs(path: Path, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    return run_probe(make_session(path, optimize="disabled", prepack=False), feeds, path.name)


def _changes(node: ir.Node, before: int, after: int) -> bool:
    """Whether an operator of ONNX's own has another definition in the other opset."""
    if node.domain not in ("", "ai.onnx"):
        return False
    old, new = _schema(node, before), _schema(node, after)
    return old is None or new is None or old.since_version != new.since_version


def _stub_(model: ir.Model) -> list[ir.TensorProtocol]:
    """Put a reference to nowhere in the place of every large constant, and return the constants in its order."""
    weights: list[ir.TensorProtocol] = []
    for value in _constants(model):
        tensor = _tensor(value)
        if tensor.size > STUB_NUMBERS and tensor.dtype != ir.DataType.STRING:
            shape = ir.Shape(tensor.shape.numpy())
            stub = ir.ExternalTensor(
                str(len(weights)), 0, tensor.nbytes, tensor.dtype, shape=shape, name=tensor.name or ""
            )
            weights.append(tensor)
            _put_(value, stub)
        elif isinstance(tensor, ir.ExternalTensor):  # the converter reads it, and does not look beside the model
            _put_(value, ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name))
    return weights


def _constants(model: ir.Model) -> Iterator[ir.Value]:
    """Initializers and the outputs of Constant nodes, in subgraphs too."""
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value for value in graph.initializers.values() if value.const_value is not None)
    for node in model.graph.all_nodes():
        if node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
            yield node.outputs[0]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    node = value.producer()
    tensor = value.const_value if node is None else node.attributes["value"].as_tensor()
    assert tensor is not None
    return tensor


def _put_(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes["value"] = ir.AttrTensor("value", tensor)


def _carry_over_(model: ir.Model, made: ir.Model, opset: int) -> None:
    """Give the converted model what the converter drops."""
    with_own = onnx.helper.OP_SET_ID_VERSION_MAP.get(("ai.onnx", opset), 0)
    if model.ir_version < OVERRIDABLE_IR_VERSION <= with_own:  # there, initializers had to be inputs
        for value in [value for value in made.graph.inputs if value.is_initializer()]:
            made.graph.inputs.remove(value)
    made.ir_version = max(model.ir_version, with_own)
    for function in model.functions.values():
        if "" in function.opset_imports:
            function.opset_imports[""] = opset
        made.functions[function.identifier()] = function
    made.graph.metadata_props.update(model.graph.metadata_props)
    store_map_types_(made, map_types(model))
    names = Names(made)
    nodes: dict[tuple[str | None, str | None], deque[ir.Node]] = defaultdict(deque)  # branches may use the same names
    for node in model.graph.all_nodes():
        nodes[_known_by(node)].append(node)
    for node in made.graph.all_nodes():
        if (same := nodes[_known_by(node)]) and same[0].op_type == node.op_type:
            node.metadata_props.update(same.popleft().metadata_props)
        node.name = node.name or names.fresh_node(node.outputs[0].name or node.op_type)
    values = {value.name: value for value in _values(model)}
    for value in _values(made):
        if value.name in values:
            value.metadata_props.update(values[value.name].metadata_props)


def _drop_defaults_(model: ir.Model, before: int) -> None:
    """Drop attributes that the new opset does not know, where they only said the old one's default.

    The torch exporter writes `noop_with_empty_axes=0` at every ReduceMean, which opset 17 has never heard of.
    """
    for node in model.graph.all_nodes():
        old, new = _schema(node, before), _schema(node, model.opset_imports[""])
        if node.domain != "" or old is None or new is None:
            continue
        for name in [name for name in node.attributes if name in old.attributes and name not in new.attributes]:
            default = ir.serde.deserialize_attribute(old.attributes[name].default_value)
            if default.value is not None and default.value == node.attributes[name].value:
                del node.attributes[name]


def _schema(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return None


def _known_by(node: ir.Node) -> tuple[str | None, str | None]:
    return node.name, node.outputs[0].name if node.outputs else None


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (*graph.inputs, *graph.initializers.values())
    for node in model.graph.all_nodes():
        yield from node.outputs


def _reason(error: Exception) -> str:
    r"""The converter's words without its source's file and line.

    >>> _reason(RuntimeError("/onnx/a.h:66: lookup: Assertion `false` failed: No Adapter From Version $15 for If"))
    'No Adapter From Version 15 for If'
    """
    text = re.sub(r"^\S+:\d+: \w+: Assertion .*? failed: ", "", str(error).strip())
    return (text.replace("$", "").splitlines() or [type(error).__name__])[0][:300].rstrip(".")
