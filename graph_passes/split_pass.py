"""What every split pass shares: find the weights, ask for factors once a weight, rewrite, clean up, record.

            operand = constant                          right      left
    data --> [ op ] --> output      becomes   data --> [ first ] --> [ op ] --> output

The original node stays and becomes the second one, so its output value (name, type, shape, graph output) is untouched.
Both nodes carry the mark `rsi_deploy.split` in metadata_props, which survives saving, and are never split again.
"""

from __future__ import annotations

import abc
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal, cast

import numpy as np
import onnx_ir as ir

from graph_passes.cleanup import freeze_shapes, other_consumers, remove_unused
from graph_passes.names import Names, name_of, stem
from graph_passes.records import (
    Array,
    Dense,
    Factors,
    FactorSource,
    Form,
    Keep,
    Record,
    Skip,
    Split,
    SplitResult,
    in_memory,
)
from graph_passes.survey import MARK, Found, Unsplit, WeightKey, skipped, survey
from graph_passes.weights import Refusal, Weight


class SplitPass(ir.passes.InPlacePass, abc.ABC):
    """Base of the split passes. A pass says where the weight stands, how it turns, and what replaces the node.

    Args:
        factors: Gives the factors of a site, or says why to leave it dense. Called once a weight, in graph order.
    """

    op_type: ClassVar[str]
    form: ClassVar[Form]
    operands: ClassVar[tuple[int, ...]]  # inputs where the weight may stand, likeliest first

    def __init__(self, factors: FactorSource) -> None:
        super().__init__()
        self.factors = factors

    @staticmethod
    @abc.abstractmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | Refusal:
        """The operand turned to `(groups, out, in)`, or why it cannot be."""

    @staticmethod
    @abc.abstractmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Put `parts.first(...)` in front of the node, turn the node into the second one, and return the first."""

    def call(self, model: ir.Model) -> SplitResult:
        """Split every node of this family."""
        return run(model, (type(self),), self.factors)

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> SplitResult:
        """Run the pass; the result carries the records."""
        return cast(SplitResult, super().__call__(model_or_result))


def run(
    model: ir.Model,
    families: Sequence[type[SplitPass]],
    factors: FactorSource,
    unsplit: Unsplit = MappingProxyType({}),
    keep: Keep = in_memory,
) -> SplitResult:
    """Split in place every node of the families for which the source gives factors; `keep` stores them."""
    entries = deque(survey(model, families, unsplit))
    uses_left = Counter(entry.key for entry in entries if isinstance(entry, Found))
    answers: dict[WeightKey, Factors | Dense] = {}
    splitters = {splitter.op_type: splitter for splitter in families}
    store, names = _Store(keep), Names(model)
    records: list[Record] = []
    while entries:  # popped, so that a dense weight can be freed as soon as it is split
        entry = entries.popleft()
        if isinstance(entry, Skip):
            records.append(entry)
            continue
        key = entry.key
        if key not in answers:
            answers[key] = _checked(factors(entry.site), entry)
        answer = answers[key]
        if isinstance(answer, Factors):
            records.append(_split(entry, splitters[entry.site.op_type], answer, names, store))
        else:
            records.append(skipped(entry, answer.reason))
        uses_left[key] -= 1
        if not uses_left[key]:
            del answers[key], uses_left[key]
            store.forget(key)
        del entry, key, answer
    return SplitResult(model, any(isinstance(record, Split) for record in records), tuple(records))


class _Store:
    """The factor initializers made so far, so that nodes that share a weight share its factors."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep
        self._values: dict[tuple[WeightKey, str, bool, tuple[int, ...]], ir.Value] = {}

    def value(self, parts: Parts, side: Literal["left", "right"], shape: tuple[int, ...], turned: bool) -> ir.Value:
        weight = parts.found.weight
        key = (parts.found.key, side, turned, shape)
        if key not in self._values:
            factor: Array = getattr(parts.factors, side)
            array = np.ascontiguousarray((factor.swapaxes(-1, -2) if turned else factor).reshape(shape))
            name = parts.names.fresh_value(f"{stem(weight.name)}.{side}")
            tensor = self._keep(array, name)
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
            graph = weight.root.graph
            if graph is None:
                raise ValueError(f"weight {weight.name!r} belongs to no graph")
            graph.register_initializer(value)
            self._values[key] = value
        return self._values[key]

    def forget(self, weight: WeightKey) -> None:
        for key in [key for key in self._values if key[0] == weight]:
            del self._values[key]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a rewrite builds with: the factors as operands, and the first node."""

    found: Found
    factors: Factors
    names: Names
    store: _Store

    def operand(self, side: Literal["left", "right"], shape: Sequence[int], *, turned: bool = False) -> ir.Value:
        """A factor as a node input: stored in `shape`, with its last two axes swapped first if `turned`."""
        weight, node = self.found.weight, self.found.node
        value = self.store.value(self, side, tuple(shape), turned)
        if weight.dtype == weight.stored_dtype:
            return value
        cast_node = ir.node("Cast", [value], {"to": weight.dtype}, name=self.names.fresh_node(f"{name_of(node)}/cast"))
        cast_node.outputs[0].name = self.names.fresh_value(f"{value.name}/cast")
        cast_node.outputs[0].type = ir.TensorType(weight.dtype)
        cast_node.outputs[0].shape = ir.Shape(shape)
        node.prepend(cast_node)
        return cast_node.outputs[0]

    def first(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: Sequence[ir.Attr], axis: int
    ) -> ir.Node:
        """Insert the first node; its output is shaped like the node's, with groups * rank along `axis`."""
        node, output = self.found.node, self.found.node.outputs[0]
        value = ir.Value(
            name=self.names.fresh_value(f"{output.name}/right"), type=ir.TensorType(self.found.weight.dtype)
        )
        if output.shape is not None:
            dims = list(output.shape)
            dims[axis] = self.found.site.groups * self.factors.rank
            value.shape = ir.Shape(dims)
        first = ir.Node(
            "",
            op_type,
            inputs,
            attributes,
            outputs=[value],
            version=node.version,
            name=self.names.fresh_node(f"{name_of(node)}/right"),
            doc_string=node.doc_string,
            metadata_props={**node.metadata_props, MARK: "right"},
        )
        node.prepend(first)
        return first


def _checked(answer: Factors | Dense, found: Found) -> Factors | Dense:
    """The source's answer, or a ValueError that names the site, what came and what was expected."""
    if isinstance(answer, Dense):
        return answer
    site = found.site
    where = f"{site.op_type} {site.node!r}, weight {site.weight!r}"
    if not isinstance(answer, Factors):
        raise ValueError(f"{where}: expected Factors or Dense from the factor source, but got {answer!r}")
    groups, out_features, in_features, rank = site.groups, site.out_features, site.in_features, answer.rank
    if answer.left.shape != (groups, out_features, rank) or answer.right.shape != (groups, rank, in_features):
        raise ValueError(
            f"{where}: expected left ({groups}, {out_features}, rank) and right ({groups}, rank, {in_features}), "
            f"but got left {answer.left.shape} and right {answer.right.shape}"
        )
    if answer.left.dtype != found.weight.stored_dtype.numpy():
        raise ValueError(f"{where}: expected factors in {site.dtype}, but got {answer.left.dtype}")
    if not (_finite(answer.left) and _finite(answer.right)):
        raise ValueError(f"{where}: expected finite factors, but got NaN or infinity")
    return answer


def _finite(array: Array) -> bool:
    """Whether all values are finite, a row block at a time: a mask of a large factor's size is memory for nothing."""
    return all(np.isfinite(array[:, i : i + 256]).all() for i in range(0, array.shape[1], 256))


def _split(found: Found, splitter: type[SplitPass], factors: Factors, names: Names, store: _Store) -> Split:
    """Rewrite one node and drop its dense weight if nobody else uses it."""
    node, site = found.node, found.site
    dense = node.inputs[found.operand]
    parts = Parts(found=found, factors=factors, names=names, store=store)
    first = splitter.rewrite(found, parts)
    node.name = names.fresh_node(f"{site.node}/left")
    node.metadata_props[MARK] = "left"
    if all(consumer is not None and consumer.op_type == "Shape" for consumer, _ in other_consumers(found.weight.root)):
        freeze_shapes(found.weight.root)
    remove_unused(dense)
    return Split(
        node=site.node,
        op_type=site.op_type,
        weight=site.weight,
        out_features=site.out_features,
        in_features=site.in_features,
        groups=site.groups,
        rank=factors.rank,
        form=splitter.form,
        first_node=name_of(first),
        second_node=name_of(node),
    )
