"""Fold a BatchNormalization into the Conv in front of it.

    X --> Conv W, b --> BatchNormalization scale, B, mean, var --> Y      becomes      X --> Conv W', b' --> Y

    s = scale / sqrt(var + epsilon),   W' = s W (by output channel),   b' = s (b - mean) + B

The arithmetic is float64, the result has the weight's dtype. Fold before a Conv is split: the statistics are those
of the dense output.

A weight that several Convs share (heads of a detector) is folded once where their BatchNorms are equal:

    X1 --> Conv W --> BatchNormalization --> Y1               X1 --> Conv W', b' --> Y1
    X2 --> Conv W --> BatchNormalization --> Y2    becomes    X2 --> Conv W', b' --> Y2

Different ones stay: each would need a copy of W.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import numpy as np
import onnx_ir as ir

from graph_passes.batch_norm_groups import Candidate, ConstantPlace, Constants, foldable_groups
from graph_passes.cleanup import freeze_shapes, other_consumers, remove_unused
from graph_passes.constants import INTEGER_CONSTANT_OPSET, OVERRIDABLE_IR_VERSION, add_constant, is_zeros
from graph_passes.names import Names, name_of
from graph_passes.records import Array, Skip
from graph_passes.weights import NoWeight, Weight, resolve


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The record of a BatchNormalization that was folded.

    Attributes:
        node: Name of the BatchNormalization.
        conv: Name of the Conv that has taken it in.
        weight: Name of the folded weight.
        bias: Name of the folded bias.
    """

    node: str
    conv: str
    weight: str
    bias: str


FoldRecord: TypeAlias = Fold | Skip


@dataclass
class FoldResult(ir.passes.PassResult):
    """A pass result with one record for every BatchNormalization, in graph order."""

    records: tuple[FoldRecord, ...] = ()


class FoldBatchNormPass(ir.passes.InPlacePass):
    """Folds an inference BatchNormalization into the Conv in front of it.

    1. Nothing else uses the Conv's output, and its weight, its bias and the statistics are constant.
    2. Only Convs with an equal BatchNormalization use the weight, and the new bias holds no more numbers than the
       constants that go: a fold never grows the model.
    3. The folded weight and bias keep their names unless other nodes use them; a new bias takes the name of B.
    4. The output keeps its name.

    Args:
        overridable: Fold constants that are graph inputs too, and drop those inputs.
    """

    def __init__(self, *, overridable: bool = False) -> None:
        super().__init__()
        self.overridable = overridable

    def call(self, model: ir.Model) -> FoldResult:
        """Fold wherever it is possible."""
        place = ConstantPlace(
            names=Names(model),
            opset=model.opset_imports.get("", 7),
            as_nodes=model.ir_version < OVERRIDABLE_IR_VERSION,
            overridable=self.overridable or model.ir_version < OVERRIDABLE_IR_VERSION,
        )
        nodes = [n for n in model.graph.all_nodes() if n.op_type == "BatchNormalization" and n.domain == ""]
        entries = [_read(node, place) for node in nodes]
        groups = foldable_groups([entry for entry in entries if isinstance(entry, Candidate)], place)
        records: dict[ir.Node, FoldRecord] = {}
        for entry in entries:
            if isinstance(entry, Skip) or entry.node in records:
                continue
            group = groups[entry.conv]
            reason = group if isinstance(group, str) else _fold(group, place)
            for member in (entry,) if isinstance(group, str) else group:
                records[member.node] = _record(member, reason)
        found = tuple(entry if isinstance(entry, Skip) else records[entry.node] for entry in entries)
        return FoldResult(model, any(isinstance(record, Fold) for record in found), found)

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> FoldResult:
        """Run the pass; the result carries the records."""
        return cast(FoldResult, super().__call__(model_or_result))


def _read(node: ir.Node, place: ConstantPlace) -> Candidate | Skip:
    """Return the Conv and the constants of a fold, or why there is none."""
    conv = _conv_in_front(node, place.opset)
    constants = conv if isinstance(conv, str) else _constants(node, conv, place)
    if isinstance(conv, str) or isinstance(constants, str):
        return Skip(node=name_of(node), op_type=node.op_type, reason=str(constants))
    return Candidate(node=node, conv=conv, constants=constants)


def _fold(group: Sequence[Candidate], place: ConstantPlace) -> tuple[str, str] | str:
    """Fold the BatchNormalizations of Convs that share a weight; return the names of weight and bias, or why not."""
    constants = group[0].constants
    weight, bias = _folded(constants, group[0].epsilon)
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        return f"the folded numbers do not fit {weight.dtype.name}"
    for entry in group:
        statistics = tuple(entry.node.inputs[1:5])
        _take_over_output(entry.node, entry.conv)
        for value in statistics:
            remove_unused(value, overridable=place.overridable)
        if _bias(entry.conv) is None and len(entry.conv.inputs) > 2:
            zeros = entry.conv.inputs[2]
            entry.conv.replace_input_with(2, None)
            remove_unused(zeros, overridable=place.overridable)
    convs = [entry.conv for entry in group]
    return (
        _replace_constant(convs, 1, weight, constants.weight.root, place),
        _replace_constant(convs, 2, bias, (constants.bias or constants.shift).root, place),
    )


def _record(entry: Candidate, folded: tuple[str, str] | str) -> FoldRecord:
    """Return the record of one BatchNormalization."""
    if isinstance(folded, str):
        weight = entry.constants.weight.name
        return Skip(node=name_of(entry.node), op_type=entry.node.op_type, weight=weight, reason=folded)
    return Fold(node=name_of(entry.node), conv=name_of(entry.conv), weight=folded[0], bias=folded[1])


def _folded(constants: Constants, epsilon: float) -> tuple[Array, Array]:
    """Return the new weight in the Conv's shape and the new bias `(out,)`; infinite where they overflow the dtype."""
    scale, shift, mean, var = (
        vector.numpy().astype(np.float64)
        for vector in (constants.scale, constants.shift, constants.mean, constants.var)
    )
    old_bias = np.zeros_like(mean) if constants.bias is None else constants.bias.numpy().astype(np.float64)
    weight = constants.weight.numpy()
    s = scale / np.sqrt(var + epsilon)
    with np.errstate(over="ignore"):
        new_weight = (s.reshape(-1, *(1,) * (weight.ndim - 1)) * weight.astype(np.float64)).astype(weight.dtype)
        new_bias = (s * (old_bias - mean) + shift).astype(weight.dtype)
    return new_weight, new_bias


def _conv_in_front(node: ir.Node, opset: int) -> ir.Node | str:
    """Return the Conv to fold into, or why there is none."""
    attributes = node.attributes
    learns = not attributes.get_int("is_test", 0) if opset < 7 else attributes.get_int("training_mode", 0)
    if learns or any(output.name for output in node.outputs[1:]):
        return "training mode: the statistics are computed from the batch"
    data = node.inputs[0]
    conv = None if data is None else data.producer()
    if data is None or conv is None or conv.op_type != "Conv" or conv.domain != "" or conv.graph is not node.graph:
        return "input does not come from a Conv"
    if len(data.uses()) > 1 or data.is_graph_output():
        return f"the output of Conv {name_of(conv)!r} is also used elsewhere"
    return conv


def _bias(conv: ir.Node) -> ir.Value | None:
    """Return the Conv's bias; None also where it is computed zeros."""
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    return None if bias is None or is_zeros(bias) else bias


def _constants(node: ir.Node, conv: ir.Node, place: ConstantPlace) -> Constants | str:
    """Return the constants of the fold, or why it cannot be done."""
    weight = resolve(conv.inputs[1])
    if isinstance(weight, NoWeight):
        return weight.reason
    if weight is None or weight.dtype != weight.stored_dtype:
        return "the Conv's weight is not a stored constant"
    if len(weight.shape) < 3:
        return "the Conv's weight has too few axes"
    bias = _bias(conv)
    values = (*node.inputs[1:5], bias) if bias is not None else node.inputs[1:5]
    vectors = [vector for value in values if isinstance(vector := resolve(value), Weight)]
    if len(vectors) < len(values) or any(vector.shape != weight.shape[:1] for vector in vectors):
        return "statistics or bias are not constant vectors with one number an output channel"
    if not place.overridable and any(constant.is_overridable for constant in (weight, *vectors)):
        return "overridable: the weight, the bias or a statistic is a graph input too"
    scale, shift, mean, var, *rest = vectors
    return Constants(weight=weight, scale=scale, shift=shift, mean=mean, var=var, bias=rest[0] if rest else None)


def _take_over_output(node: ir.Node, conv: ir.Node) -> None:
    """Replace the node's output by the Conv's, under the same name, and remove the node."""
    old, new = node.outputs[0], conv.outputs[0]
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if node.graph is not None:
        node.graph.remove(node, safe=True)
    new.name = old.name
    new.type = old.type or new.type
    new.shape = new.shape if old.shape is None else old.shape


def _replace_constant(convs: Sequence[ir.Node], index: int, array: Array, root: ir.Value, place: ConstantPlace) -> str:
    """Give the Convs a new constant, under the name of `root` unless other nodes still use that one."""
    wanted = root.name or "folded"
    for conv in convs:
        old = conv.inputs[index] if index < len(conv.inputs) else None
        conv.resize_inputs(max(len(conv.inputs), index + 1))
        conv.replace_input_with(index, None)
        remove_unused(old, overridable=place.overridable)
    if place.opset >= INTEGER_CONSTANT_OPSET:
        freeze_shapes(root)
    is_gone = not any(other_consumers(root))
    name = wanted if is_gone else place.names.fresh_value(wanted)
    constant = add_constant(array, name, convs[0], as_node=place.as_nodes)
    for conv in convs:
        conv.replace_input_with(index, constant)
    return name
