"""Fold the first nodes of splits in the forms "units" and "heads" into the nodes before them.

    x --> op W --> ... --> op right --> op left      becomes      x --> op (right W) --> ... --> op left

Between are operators that `right` can pass: it selects inputs, and the operators work on each alone, or it takes fewer
numbers from every attention head, and the operators are linear.
"""

from dataclasses import dataclass
from typing import cast

import onnx_ir as ir

from graph_passes.cleanup import remove_unused
from graph_passes.constants import OVERRIDABLE_IR_VERSION
from graph_passes.head_values import head_values
from graph_passes.hidden_units import NoUnitsError, hidden_units
from graph_passes.marks import BASES, MARK, SELECTION
from graph_passes.names import name_of
from graph_passes.records import Skip
from graph_passes.weights import constant_of

_FIND = {SELECTION: hidden_units, BASES: head_values}


@dataclass
class FoldUnitsResult(ir.passes.PassResult):
    """A pass result with the names of the nodes that are gone, and a record for every one that stays."""

    folded: tuple[str, ...] = ()
    kept: tuple[Skip, ...] = ()


class FoldUnitsPass(ir.passes.InPlacePass):
    """Removes the first nodes of splits in the forms "units" and "heads", and what they leave out before them.

    A node stays where its units cannot be removed, for example because another node reads them. The model is right
    then too, but not faster. Weights in external files are not read: their rows are chosen when the model is saved.

    Args:
        overridable: Treat initializers that are graph inputs too as constants; always so before IR version 4.
    """

    def __init__(self, *, overridable: bool = False) -> None:
        super().__init__()
        self._overridable = overridable

    def call(self, model: ir.Model) -> FoldUnitsResult:
        """Remove wherever it is possible, in graph order."""
        overridable = self._overridable or model.ir_version < OVERRIDABLE_IR_VERSION
        folded: list[str] = []
        stay: list[Skip] = []
        for node in [node for node in model.graph.all_nodes() if node.metadata_props.get(MARK) in _FIND]:
            name, operator = name_of(node), node.op_type
            try:
                _fold(node, overridable=overridable)
            except NoUnitsError as reason:
                stay.append(Skip(node=name, op_type=operator, reason=str(reason)))
            else:
                folded.append(name)
        return FoldUnitsResult(model, bool(folded), tuple(folded), tuple(stay))

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> FoldUnitsResult:
        """Run the pass; the result names the nodes."""
        return cast(FoldUnitsResult, super().__call__(model_or_result))


def _fold(node: ir.Node, *, overridable: bool) -> None:
    """Let a node's readers read its data, without the units that it leaves out."""
    data, factor = node.inputs[:2]
    weight = constant_of(factor)
    if data is None or weight is None or node.graph is None:
        raise NoUnitsError("it has no data or no weight")
    array = weight.numpy()
    right = array.reshape(array.shape[:2]) if node.op_type == "Conv" else array.T  # (rank, columns)
    _FIND[node.metadata_props[MARK]](node, right.shape[1], overridable=overridable).keep_(right)
    node.outputs[0].replace_all_uses_with(data)
    node.graph.remove(node, safe=True)
    remove_unused(factor, overridable=True)
