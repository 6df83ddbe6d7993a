"""Find the BatchNormalizations that can be folded into the Convs before them, and which of them together.

weight of one Conv                                           folded
weight of several Convs with an equal BatchNormalization     folded once, for all of them
weight that another node needs as it is                      not folded: a folded copy would grow the file
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from graph_passes.cleanup import other_consumers
from graph_passes.constants import INTEGER_CONSTANT_OPSET
from graph_passes.names import Names, name_of
from graph_passes.weights import Weight

_Users: TypeAlias = Mapping[ir.Value, Sequence[tuple[ir.Node | None, int]]]


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The constants of a fold; the bias is None where the Conv has none."""

    weight: Weight
    scale: Weight
    shift: Weight
    mean: Weight
    var: Weight
    bias: Weight | None


@dataclass(frozen=True, kw_only=True)
class ConstantPlace:
    """The model's opset, and how it stores constants: as nodes or initializers, and in place of graph inputs or not."""

    names: Names
    opset: int
    as_nodes: bool
    overridable: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A BatchNormalization that could be folded, if its constants are not needed elsewhere."""

    node: ir.Node
    conv: ir.Node
    constants: Constants

    @property
    def vectors(self) -> tuple[Weight, ...]:
        """Statistics and bias, which a fold makes superfluous."""
        c = self.constants
        return tuple(v for v in (c.scale, c.shift, c.mean, c.var, c.bias) if v is not None)

    @property
    def roots(self) -> tuple[ir.Value, ...]:
        """All values that are stored for it."""
        return (self.constants.weight.root, *(vector.root for vector in self.vectors))

    @property
    def epsilon(self) -> float:
        """The addend of the variance."""
        return self.node.attributes.get_float("epsilon", 1e-5)

    def is_equal(self, other: Candidate) -> bool:
        """Return whether both have the same folded weight and bias."""
        mine, others = self.constants, other.constants
        return (
            mine.weight.steps == others.weight.steps
            and self.epsilon == other.epsilon
            and len(self.vectors) == len(other.vectors)
            and all(
                a.root is b.root or np.array_equal(a.numpy(), b.numpy())
                for a, b in zip(self.vectors, other.vectors, strict=True)
            )
        )


def foldable_groups(
    candidates: Sequence[Candidate], place: ConstantPlace
) -> dict[ir.Node, tuple[Candidate, ...] | str]:
    """Return, by the Conv of every candidate, all that are folded with it, or why it is not folded."""
    by_conv = {entry.conv: entry for entry in candidates}
    users = {root: tuple(other_consumers(root)) for entry in candidates for root in entry.roots}
    groups = {conv: _group(entry, by_conv, users, place) for conv, entry in by_conv.items()}
    able = [entry for conv, entry in by_conv.items() if not isinstance(groups[conv], str)]
    return {
        conv: group if isinstance(group, str) else _growth(group, able, users) or group
        for conv, group in groups.items()
    }


def _group(
    entry: Candidate, candidates: Mapping[ir.Node, Candidate], users: _Users, place: ConstantPlace
) -> tuple[Candidate, ...] | str:
    """Return all users of the weight, each with an equal BatchNormalization, or why the weight must stay."""
    group = []
    for user, index in users[entry.constants.weight.root]:
        if user is not None and user.op_type == "Shape" and place.opset >= INTEGER_CONSTANT_OPSET:
            continue  # a fold does not change it
        other = None if user is None or index != 1 else candidates.get(user)
        is_same = other is entry or (other is not None and not place.as_nodes and entry.is_equal(other))
        if other is None or not is_same or other.conv.graph is not entry.conv.graph:
            who = "the caller" if user is None else f"{user.op_type} {name_of(user)!r}"
            return f"the Conv's weight is needed as it is by {who}: a folded copy would grow the file"
        group.append(other)
    return tuple(group)


def _growth(group: Sequence[Candidate], able: Sequence[Candidate], users: _Users) -> str:
    """Return why a fold would grow the file, or "".

    A fold adds a bias, and frees its part of every vector whose other users can be folded too.
    """
    size = group[0].constants.weight.shape[0]
    nodes, foldable = (_nodes(entries) for entries in (group, able))
    freed = 0.0
    for root in {vector.root for entry in group for vector in entry.vectors}:
        who = [user for user, _ in users[root]]
        if foldable.issuperset(who):
            freed += size * sum(user in nodes for user in who) / len(who)
    return "" if size <= freed else "its statistics are used elsewhere too: a folded bias would grow the file"


def _nodes(entries: Sequence[Candidate]) -> set[ir.Node | None]:
    return {node for entry in entries for node in (entry.node, entry.conv)}
