"""Every weight-bearing node of a model: what could be split, and what cannot and why.

    node --resolve--> constant operand --canonical--> (groups, out, in) --split already? shared?--> Found | Skip

Reads shapes, never a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, TypeAlias

import onnx_ir as ir

from graph_passes.cleanup import other_consumers
from graph_passes.names import name_of
from graph_passes.records import Site, Skip
from graph_passes.weights import Refusal, Step, Weight, resolve

MARK = "rsi_deploy.split"
OLDEST_OPSET = 7
_FACTOR_NAME = re.compile(r"(.+)\.(right|left)(?:_\d+)?")

Unsplit: TypeAlias = Mapping[tuple[str, str], tuple[int, ...]]  # (domain, op_type) -> inputs that may hold a weight
WeightKey: TypeAlias = tuple[ir.Value, tuple[Step, ...]]


class Family(Protocol):
    """What the survey asks of a split pass."""

    @property
    def op_type(self) -> str:
        """The operator."""

    @property
    def operands(self) -> tuple[int, ...]:
        """Inputs where the weight may stand, likeliest first."""

    def canonical(self, node: ir.Node, operand: int, weight: Weight, /) -> Weight | Refusal:
        """The operand turned to `(groups, out, in)`, or why it cannot be."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """One node that its pass can split.

    Attributes:
        node: The node.
        operand: Which input holds the weight.
        shape: Shape of that input, as the operator sees it.
        weight: The weight, canonical: `(groups, out_features, in_features)`.
        site: What the factor source is told.
    """

    node: ir.Node
    operand: int
    shape: tuple[int, ...]
    weight: Weight
    site: Site

    @property
    def key(self) -> WeightKey:
        """Equal for nodes that share the weight in the same orientation."""
        return self.weight.root, self.weight.steps


def survey(model: ir.Model, families: Sequence[Family], unsplit: Unsplit = MappingProxyType({})) -> list[Found | Skip]:
    """Every weight-bearing node of the families, in graph order; nodes inside model functions last.

    Args:
        model: The model; not changed, no weight is read.
        families: The passes whose operators are looked for.
        unsplit: Other operators to report, with the inputs where they hold a weight.
    """
    by_op_type = {family.op_type: family for family in families}
    opset = model.graph.opset_imports.get("", OLDEST_OPSET)
    entries: list[Found | Skip] = []
    for node in model.graph.all_nodes():
        family = by_op_type.get(node.op_type) if node.domain == "" else None
        if family is None:
            entry: Found | Skip | None = _no_pass(node, unsplit.get((node.domain, node.op_type), ()))
        else:
            entry = _already_split(node) or _read(node, family)
        if isinstance(entry, Found) and entry.weight.is_overridable:
            entry = skipped(entry, "overridable: the weight is a graph input too, remove it from the inputs")
        elif isinstance(entry, Found) and opset < OLDEST_OPSET:
            entry = skipped(entry, f"opset {opset}: older than {OLDEST_OPSET}")
        elif isinstance(entry, Found) and model.ir_version < 4:
            entry = skipped(
                entry, f"IR version {model.ir_version}: every initializer would be an input, save as 4 or later"
            )
        if entry is not None:
            entries.append(entry)
    found = {entry.node: entry for entry in entries if isinstance(entry, Found)}
    reasons = _low_rank_pairs(found)
    reasons |= _shared_with_others({node: entry for node, entry in found.items() if node not in reasons})
    for i, entry in enumerate(entries):
        if isinstance(entry, Found) and entry.node in reasons:
            entries[i] = skipped(entry, reasons[entry.node])
    return [*entries, *_in_functions(model, by_op_type)]


def _read(node: ir.Node, family: Family) -> Found | Skip | None:
    """What one node is: found, refused, or (None) without a constant operand."""
    resolved = [(operand, resolve(node.inputs[operand])) for operand in family.operands if operand < len(node.inputs)]
    constant = [(operand, weight) for operand, weight in resolved if weight is not None]
    if not constant:
        return None
    operand, weight = constant[0]
    if len(constant) > 1:
        weight = Refusal(reason="both operands are constant: fold constants first")
    shape: tuple[int, ...] = ()
    if isinstance(weight, Weight):
        shape, name, weight = weight.shape, weight.name, family.canonical(node, operand, weight)
        if isinstance(weight, Refusal):
            weight = Refusal(reason=weight.reason, weight=name)
    if isinstance(weight, Refusal):
        return Skip(node=name_of(node), op_type=node.op_type, weight=weight.weight, reason=weight.reason)
    groups, out_features, in_features = weight.shape
    site = Site(
        node=name_of(node),
        op_type=node.op_type,
        weight=weight.name,
        out_features=out_features,
        in_features=in_features,
        groups=groups,
        dtype=weight.stored_dtype.numpy().name,
        loader=weight.numpy,
    )
    return Found(node=node, operand=operand, shape=shape, weight=weight, site=site)


def _already_split(node: ir.Node) -> Skip | None:
    if MARK not in node.metadata_props:
        return None
    reason = f"already split: this is the {node.metadata_props[MARK]} factor"
    return Skip(node=name_of(node), op_type=node.op_type, reason=reason)


def _no_pass(node: ir.Node, operands: tuple[int, ...]) -> Skip | None:
    """A record for an operator that holds a weight but has no pass."""
    for operand in operands:
        weight = resolve(node.inputs[operand]) if operand < len(node.inputs) else None
        if isinstance(weight, Weight) and len(weight.shape) > 1:
            reason = f"no pass splits {node.op_type}"
            return Skip(node=name_of(node), op_type=node.op_type, weight=weight.name, reason=reason)
        if isinstance(weight, Refusal) and node.op_type != "Gather":  # a Gather of integers is shape arithmetic
            return Skip(node=name_of(node), op_type=node.op_type, weight=weight.weight, reason=weight.reason)
    return None


def _low_rank_pairs(found: dict[ir.Node, Found]) -> dict[ir.Node, str]:
    """Our own pairs after a tool dropped the marks: two products with nothing between, factors of one weight by name.

    The names are asked for, because networks hold such pairs by design: MobileNetV2's linear bottlenecks are two 1x1
    Convs with nothing between, and each of them is a site like any other.
    """
    reasons: dict[ir.Node, str] = {}
    for node, second in found.items():
        data = node.inputs[1 - second.operand]
        producer = None if data is None else data.producer()
        first = None if producer is None else found.get(producer)
        if data is None or producer is None or first is None or first.operand != second.operand:
            continue
        right, left = (_FACTOR_NAME.fullmatch(entry.site.weight) for entry in (first, second))
        if right and left and (right[1], right[2], left[2]) == (left[1], "right", "left"):
            reasons[producer] = f"already low-rank together with {name_of(node)!r}"
            reasons[node] = f"already low-rank together with {name_of(producer)!r}"
    return reasons


def _shared_with_others(found: dict[ir.Node, Found]) -> dict[ir.Node, str]:
    """Nodes whose weight somebody else needs dense."""
    reasons: dict[ir.Node, str] = {}
    for node, entry in found.items():
        for consumer, index in other_consumers(entry.weight.root):
            if consumer is None:
                who = "is a graph output"
            elif consumer.op_type == "Shape" or (consumer in found and found[consumer].operand == index):
                continue
            else:
                who = f"is also used by {consumer.op_type} {name_of(consumer)!r}"
            reasons[node] = f"weight {who}: splitting would keep it and grow the file"
            break
    return reasons


def _in_functions(model: ir.Model, by_op_type: dict[str, Family]) -> Iterator[Skip]:
    """Weights in functions stand in Constants or in arguments; a function cannot hold initializers."""
    for function in model.functions.values():
        for node in function.all_nodes():
            if node.op_type not in by_op_type or node.domain != "" or len(node.inputs) < 2 or node.inputs[1] is None:
                continue
            argument = node.inputs[1].is_graph_input()
            if argument or resolve(node.inputs[1]) is not None:
                reason = f"inside the model function {function.name!r}: inline functions first"
                yield Skip(node=name_of(node), op_type=node.op_type, reason=reason)


def skipped(found: Found, reason: str) -> Skip:
    """The record of a node that could be split and is not."""
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
