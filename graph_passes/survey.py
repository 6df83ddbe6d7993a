"""Find every weight-bearing node of a model: a site, or the reason why it cannot be split.

    node --resolve--> constant operand --canonical--> (groups, out, in) --split already? shared?--> Found | Skip

Reads shapes, never a weight.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import onnx_ir as ir

from graph_passes.cleanup import other_consumers
from graph_passes.constants import (
    INTEGER_CONSTANT_OPSET,
    OVERRIDABLE_IR_VERSION,
    computed_constants,
    constant_arguments,
    layout_chain,
)
from graph_passes.head_values import head_values
from graph_passes.hidden_units import READERS, NoUnitsError, hidden_units
from graph_passes.marks import MARK
from graph_passes.names import name_of
from graph_passes.records import Site, Skip
from graph_passes.sharing import low_rank_pairs, shared_with_others, used_in_other_ways
from graph_passes.weights import NoWeight, Weight, refuse_computed, resolve

if TYPE_CHECKING:
    from graph_passes.split_pass import SplitPass

OLDEST_OPSET = 6
PIVOTED_OPSET = 11
"""Before, Concat and Gather did not count axes from the end."""

Unsplit: TypeAlias = Mapping[tuple[str, str], tuple[int, ...]]  # (domain, op_type) -> inputs that may hold a weight
WeightKey: TypeAlias = tuple[ir.Value, Hashable]


@dataclass(frozen=True, kw_only=True)
class Found:
    """One node that its pass can split.

    Attributes:
        splitter: The pass of its operator.
        node: The node.
        operand: Which input holds the weight.
        shape: Shape of that input, as the operator sees it.
        weight: The weight, canonical: `(groups, out_features, in_features)`.
        site: The site for the factor source.
        in_function: Whether the node stands in a model function, which holds no initializers and no types.
    """

    splitter: type[SplitPass]
    node: ir.Node
    operand: int
    shape: tuple[int, ...]
    weight: Weight
    site: Site
    in_function: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, where it has more than one point; else ()."""
        window = self.site.window
        return () if window is None or math.prod(window.kernel) == 1 else window.kernel

    @property
    def is_turned(self) -> bool | None:
        """Return whether the weight is the stored matrix transposed; None where it is no single matrix."""
        return None if self.kernel or self.site.groups > 1 else self.weight.is_turned

    @property
    def key(self) -> WeightKey:
        """Equal for nodes that share a pair of factors: a matrix and its transpose do, others in the same layout."""
        if self.is_turned is not None:
            return self.weight.root, "matrix"
        return self.weight.root, (self.weight.steps, self.kernel, self.operand)

    @property
    def data(self) -> ir.Value | None:
        """The other operand."""
        return self.node.inputs[1 - self.operand]


def survey(
    model: ir.Model,
    passes: Sequence[type[SplitPass]],
    unsplit: Unsplit = MappingProxyType({}),
    *,
    overridable: bool = False,
) -> list[Found | Skip]:
    """Find every weight-bearing node of the passes' operators, in graph order; nodes inside model functions last.

    Args:
        model: The model; not changed, no weight is read.
        passes: The passes whose operators are looked for.
        unsplit: Other operators to report, with the inputs where they hold a weight.
        overridable: Treat initializers that are graph inputs too as constants.
    """
    by_operator = {(splitter.domain, splitter.op_type): splitter for splitter in passes}
    overridable = overridable or model.ir_version < OVERRIDABLE_IR_VERSION
    arguments = constant_arguments(model)
    entries: list[Found | Skip] = []
    entries += _in_scope(model.graph, None, by_operator, unsplit, arguments, overridable)
    for function in model.functions.values():
        entries += _in_scope(function.graph, function, by_operator, unsplit, arguments, overridable)
    found = {entry.node: entry for entry in entries if isinstance(entry, Found)}
    reasons = low_rank_pairs({node: (entry.site.weight, entry.data) for node, entry in found.items()})
    operands = {node: (entry.operand, entry.weight.root) for node, entry in found.items() if node not in reasons}
    opset = model.opset_imports.get("", OLDEST_OPSET)
    reasons |= shared_with_others(operands, keep_shapes=opset < INTEGER_CONSTANT_OPSET)
    found = {node: entry for node, entry in found.items() if node not in reasons}
    reasons |= used_in_other_ways(
        {
            node: (entry.weight.root, _way(entry, reshape=opset >= INTEGER_CONSTANT_OPSET))
            for node, entry in found.items()
        }
    )
    turned = {(entry.weight.root, entry.is_turned) for entry in found.values()}
    judged = [_judged(entry, reasons, turned) for entry in entries]
    if opset < PIVOTED_OPSET:
        return judged
    return [
        _with_units(_with_pivoted_form(entry), overridable) if isinstance(entry, Found) else entry for entry in judged
    ]


def _way(found: Found, *, reshape: bool) -> Hashable:
    """Return a key of the use of a weight, equal for nodes that can share one pair of factors."""
    return found.key if reshape else (found.weight.steps, found.kernel, found.operand, found.site.op_type)


def _judged(
    entry: Found | Skip, reasons: Mapping[ir.Node, str], turned: Collection[tuple[ir.Value, bool | None]]
) -> Found | Skip:
    """Skip an entry that has a reason, and mark a site whose weight is used transposed too."""
    if isinstance(entry, Skip):
        return entry
    if entry.node in reasons:
        return skipped(entry, reasons[entry.node])
    both_ways = all((entry.weight.root, way) in turned for way in (False, True))
    return replace(entry, site=replace(entry.site, both_ways=True)) if both_ways else entry


def _with_pivoted_form(found: Found) -> Found:
    """Add the pivoted form where the node can take it."""
    site = found.site
    takes = found.splitter.linear and not site.both_ways and site.out_features > 1
    if not takes or not found.splitter.can_pivot(found.node, found.operand, found.weight):
        return found
    return replace(found, site=replace(site, forms=(*site.forms, "pivoted")))


def _with_units(found: Found, overridable: bool) -> Found:
    """Add the form "units" or "heads" where the node reads hidden units or values of attention heads."""
    site, splitter = found.site, found.splitter
    is_plain = site.plain and site.linear and site.groups == 1 and splitter.domain == "" and found.operand == 1
    if not is_plain or site.nested or site.both_ways or splitter.op_type not in READERS:
        return found
    if [use for use in other_consumers(found.weight.root) if use[0] is not found.node]:
        return found
    columns = site.in_features // (1 if site.window is None else math.prod(site.window.kernel))
    for find in (hidden_units, head_values)[: 1 if site.window is not None else 2]:
        try:
            units = find(found.node, columns, overridable=overridable).facts()
        except NoUnitsError:
            continue
        return replace(found, site=replace(site, forms=(*site.forms, units.form), units=units))
    return found


def _in_scope(
    graph: ir.Graph,
    function: ir.Function | None,
    by_operator: Mapping[tuple[str, str], type[SplitPass]],
    unsplit: Unsplit,
    arguments: Collection[ir.Value],
    overridable: bool,
) -> Iterator[Found | Skip]:
    """Yield the entries of the main graph or of a function's graph, with their subgraphs."""
    computed = computed_constants(graph.all_nodes())
    for node in graph.all_nodes():
        operator = node.domain, node.op_type
        splitter = by_operator.get(operator)
        operands = unsplit.get(operator, ()) if splitter is None else splitter.operands
        if not operands:
            continue
        operands = tuple(operand for operand in operands if operand < len(node.inputs))
        if (entry := _already_split(node)) is not None:
            yield entry
        elif function is not None and any(_root(node.inputs[operand]) in arguments for operand in operands):
            where = f"inside the model function {function.name!r}"
            reason = f"{where}, which takes the weight as an argument: inline functions first"
            yield Skip(node=name_of(node), op_type=node.op_type, reason=reason)
        elif splitter is None:
            yield from _no_pass(node, operands, computed)
        else:
            nested = function is not None or node.graph is not graph
            try:
                read = list(_read(node, splitter, operands, computed, nested=nested, in_function=function is not None))
            except TypeError:  # of an attribute: a model without a known opset is not checked against a schema
                reason = "an attribute of the node is of another type than its operator takes"
                yield Skip(node=name_of(node), op_type=node.op_type, reason=reason)
                continue
            for found in read:
                reason = _out_of_reach(found, graph.opset_imports, overridable) if isinstance(found, Found) else ""
                yield skipped(found, reason) if reason and isinstance(found, Found) else found


def _root(value: ir.Value | None) -> ir.Value | None:
    return None if value is None else layout_chain(value)[0]


def _out_of_reach(found: Found, opsets: Mapping[str, int], overridable: bool) -> str:
    """Return why a node that its pass could split must stay, or ""."""
    if found.weight.is_overridable and not overridable:
        return "overridable: the weight is a graph input too, remove it from the inputs"
    if "" not in opsets:
        return "the model imports no opset of ONNX itself"
    return f"opset {opsets['']}: older than {OLDEST_OPSET}" if opsets[""] < OLDEST_OPSET else ""


def _constant(value: ir.Value | None, computed: Collection[ir.Value]) -> Weight | NoWeight | None:
    """Return the weight behind an operand, a refusal, or None for one that depends on the model's inputs."""
    weight = resolve(value)
    return refuse_computed(value) if weight is None and value is not None and value in computed else weight


def _read(
    node: ir.Node,
    splitter: type[SplitPass],
    operands: Sequence[int],
    computed: Collection[ir.Value],
    *,
    nested: bool,
    in_function: bool,
) -> Iterator[Found | Skip]:
    """Yield the entry of one node; nothing where no operand is constant."""
    resolved = [(operand, _constant(node.inputs[operand], computed)) for operand in operands]
    constant = [(operand, weight) for operand, weight in resolved if weight is not None]
    if not constant:
        return
    operand, weight = constant[0]
    if len(constant) > 1:
        weight = NoWeight(reason="both operands are constant: fold constants first")
    if isinstance(weight, Weight) and len(node.inputs) < 2:
        weight = NoWeight(reason="the node has no input beside its weight", weight=weight.name)
    if isinstance(weight, Weight) and any(attribute.is_ref() for attribute in node.attributes.values()):
        reason = "the node takes an attribute of the model function: inline functions first"
        weight = NoWeight(reason=reason, weight=weight.name)
    shape: tuple[int, ...] = ()
    if isinstance(weight, Weight):
        shape, name = weight.shape, weight.name
        if 0 in shape:
            weight = NoWeight(reason=f"weight of shape {shape} is empty")
        else:
            weight = splitter.canonical(node, operand, weight)
        if isinstance(weight, NoWeight):
            weight = NoWeight(reason=weight.reason, weight=name)
    if isinstance(weight, NoWeight):
        yield Skip(node=name_of(node), op_type=node.op_type, weight=weight.weight, reason=weight.reason)
        return
    site = _site(node, splitter, operand, shape, weight, nested)
    yield Found(
        splitter=splitter,
        node=node,
        operand=operand,
        shape=shape,
        weight=weight,
        site=site,
        in_function=in_function,
    )


def _site(
    node: ir.Node, splitter: type[SplitPass], operand: int, shape: tuple[int, ...], weight: Weight, nested: bool
) -> Site:
    """The site of a canonical weight."""
    groups, out_features, in_features = weight.shape
    data = node.inputs[1 - operand]
    return Site(
        node=name_of(node),
        op_type=node.op_type,
        weight=weight.name,
        out_features=out_features,
        in_features=in_features,
        groups=groups,
        dtype=weight.stored_dtype.numpy().name,
        loader=weight.numpy,
        forms=splitter.forms(shape),
        data="" if data is None else data.name or "",
        output=node.outputs[0].name or "",
        nested=nested,
        row_order=splitter.row_order(node, operand, weight),
        linear=splitter.linear,
        window=splitter.window(node, shape),
    )


def _already_split(node: ir.Node) -> Skip | None:
    if MARK not in node.metadata_props:
        return None
    reason = f"already split: this is the {node.metadata_props[MARK]} factor"
    return Skip(node=name_of(node), op_type=node.op_type, reason=reason)


def _no_pass(node: ir.Node, operands: Sequence[int], computed: Collection[ir.Value]) -> Iterator[Skip]:
    """Yield the record of an operator that holds a weight but has no pass."""
    for operand in operands:
        weight = _constant(node.inputs[operand], computed)
        if isinstance(weight, Weight) and len(weight.shape) > 1:
            weight = NoWeight(reason=f"no pass splits {node.op_type}", weight=weight.name)
        elif node.op_type == "Gather":  # of integers, or of a vector: shape arithmetic
            continue
        if isinstance(weight, NoWeight):
            yield Skip(node=name_of(node), op_type=node.op_type, weight=weight.weight, reason=weight.reason)
            return


def skipped(found: Found, reason: str) -> Skip:
    """Return the record of a node that could be split and is not."""
    site = found.site
    return Skip(
        node=site.node,
        op_type=site.op_type,
        reason=reason,
        weight=site.weight,
        out_features=site.out_features,
        in_features=site.in_features,
        groups=site.groups,
    )
