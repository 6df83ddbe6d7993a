"""What is known of a value: where its samples lie, its shape for every trial size of the batch, small contents.

    x (7, 3, 4)        Place(axis=0)                   sample b is x[b]
    x (5, 7, 3)        Place(axis=1)                   sample b is x[:, b]
    x (5*7*2, 3)       Place(axis=0, outer=5, inner=2) sample b is x.reshape(5, 7, 2, 3)[:, b]
    Shape(x)           counted                         it follows from the size of the batch, not from samples
    a weight           neither                         the same for every batch

A graph is followed for several sizes of the batch at once. What differs between them depends on the size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

Array: TypeAlias = npt.NDArray[Any]
Dims: TypeAlias = tuple[int | None, ...]

MOST_NUMBERS = 4096
"""Largest content that is followed: shapes, axes and ranges are small."""


@dataclass(frozen=True)
class BatchPlace:
    """The position of the samples in a value: one axis, laid out as `(outer, samples, inner)`."""

    axis: int
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Return whether the axis holds the samples and nothing else."""
        return self.outer == self.inner == 1


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Content that counts samples: of sample number b, `step * b` plus something from `low` to `high`.

    The addend is the same for all samples. A `step` of None stands for an unknown dependence on the number.
    """

    step: int | None = None
    low: int = 0
    high: int = 0


@dataclass(frozen=True, kw_only=True)
class Value:
    """One value of the graph.

    Attributes:
        kind: ONNX's number of the element type; 0 where it is no tensor or not known.
        shapes: its shape for every trial size of the batch; None where not even its rank is known.
        place: where its samples lie; None where it depends on no sample.
        data: its content for every trial size, where it is small and depends on constants and shapes alone.
        counted: whether it depends on the size of the batch.
        rows: how it counts samples, once or for each column of its last axis; None for a column that counts none.
    """

    kind: int = 0
    shapes: tuple[Dims, ...] | None = None
    place: BatchPlace | None = None
    data: tuple[Array, ...] | None = None
    counted: bool = False
    rows: tuple[Rows | None, ...] | None = None

    @property
    def rank(self) -> int | None:
        """Number of axes, where it is known."""
        return None if self.shapes is None else len(self.shapes[0])

    @property
    def free(self) -> bool:
        """Return whether it is the same for every batch."""
        return self.place is None and not self.counted


class MixesError(Exception):
    """An operator mixes samples, or is not known to keep them apart.

    Args:
        reason: which operator, and what it does.
        feature: whether the axis holds features, channels or time steps, so that it cannot be the batch.
    """

    def __init__(self, reason: str, *, feature: bool = False):
        super().__init__(reason)
        self.feature = feature


@dataclass(frozen=True, kw_only=True)
class NodeCall:
    """A node with the values that it is called with.

    Attributes:
        node: the node of the model, with the attributes of the function around it filled in.
        inputs: values of its inputs; None for one that is left out.
        opset: version of the operator's domain.
        sizes: the trial sizes of the batch.
    """

    node: onnx.NodeProto
    inputs: Sequence[Value | None]
    opset: int
    sizes: tuple[int, ...]
    attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The operator and the node's name, for messages."""
        name = self.node.name or next(iter(self.node.output), "")
        return f"{self.node.op_type} {name!r}"

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return the content of an attribute, or `default`."""
        found = self.attributes.get(name)
        return default if found is None else helper.get_attribute_value(found)

    def value(self, index: int) -> Value | None:
        """Return an input; None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def rank(self, index: int) -> int:
        """Return the rank of an input that must be there.

        Raises:
            MixesError: the rank is not known.
        """
        value = self.value(index)
        if value is None or value.rank is None:
            raise self.mixes(f"has an input of unknown rank ({self.input_name(index)})")
        return value.rank

    def constant(self, index: int) -> Array | None:
        """Return the content of an input that is the same for every size of the batch; None where it is not known."""
        value = self.value(index)
        return value.data[0] if value is not None and value.free and value.data is not None else None

    def axis(self, rank: int, name: str = "axis", default: int = -1) -> int:
        """Return an attribute that names an axis, counted from the front."""
        return int(self.attribute(name, default)) % max(rank, 1)

    def axes(self, index: int, name: str = "axes") -> tuple[int, ...] | None:
        """Return axes from an attribute or (since some opset) from an input, as they are written; None without any.

        Raises:
            MixesError: the axes are not constant.
        """
        written = self.attribute(name)
        if written is None and self.value(index) is not None:
            written = self.constant(index)
            if written is None:
                raise self.mixes("takes axes that are not constant")
        return None if written is None else tuple(int(axis) for axis in np.atleast_1d(written))

    def dims(self, index: int, trial: int) -> Dims:
        """Return the shape of an input for a trial size; () where it is not known."""
        value = self.value(index)
        return () if value is None or value.shapes is None else value.shapes[trial]

    def input_name(self, index: int) -> str:
        """Return the name of an input, quoted."""
        return repr(self.node.input[index]) if index < len(self.node.input) else "none"

    def mixes(self, what: str, *, feature: bool = False) -> MixesError:
        """Return the error to raise: `what` the node does, with its operator and name in front."""
        return MixesError(f"{self.label} {what}", feature=feature)
