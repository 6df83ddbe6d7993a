"""The base of the split passes: find the weights, get factors once a weight, rewrite, clean up, record.

            operand = constant                          right      left
    data --> [ op ] --> output      becomes   data --> [ first ] --> [ op ] --> output

The original node stays and becomes the second one, so its output value (name, type, shape, graph output) is untouched.
Both nodes carry the mark `rsi_deploy.split` in metadata_props, which survives saving, and are never split again.
"""

import abc
import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple, cast

import onnx_ir as ir

from graph_passes.answers import checked
from graph_passes.axis_rules.moves import Moves
from graph_passes.axis_rules.values import NodeCall, Value
from graph_passes.bias import add_to_input
from graph_passes.cleanup import freeze_shapes, remove_unused
from graph_passes.forms import FOLDED
from graph_passes.joint import cut, joint_members, joint_site
from graph_passes.macs.executed_node import ExecutedNode, Macs
from graph_passes.marks import BASES, MARK, SELECTION
from graph_passes.names import name_of
from graph_passes.parts import Parts, Store
from graph_passes.pivoted import rewrite_pivoted
from graph_passes.records import (
    Dense,
    FactorSource,
    Form,
    Keep,
    Record,
    Site,
    Skip,
    Split,
    SplitFactors,
    SplitResult,
    in_memory,
)
from graph_passes.response import Contraction, RowOrder
from graph_passes.survey import Found, Unsplit, WeightKey, skipped, survey
from graph_passes.weights import NoWeight, Weight
from graph_passes.window import Window

BROADCAST_OPSET = 7  # before, an Add broadcast only along the axis of its attribute


class SplitPass(ir.passes.InPlacePass, abc.ABC):
    """The pass that splits one operator, and all that the project knows of that operator.

    A subclass describes the operator by its class attributes and static methods, so callers ask the class itself;
    `graph_passes.operators.PASSES` lists the classes.

    Args:
        factors: Returns the factors of a site, or the reason to leave it dense. Called once a weight, in graph order.
        overridable: Split weights that are graph inputs too, and drop those inputs.

    Attributes:
        domain: Domain of the operator; "" is ONNX itself.
        op_type: Name of the operator.
        form: Form of the split.
        operands: Inputs that may hold the weight, the likeliest first.
        linear: Whether the output is the response plus a bias, with no activation or attention behind.
        bias_is_input: Whether the third input is a bias.
        contraction: Arithmetic of the operator for gradients; None where gradients do not pass it.
    """

    domain: ClassVar[str] = ""
    op_type: ClassVar[str]
    form: ClassVar[Form]
    operands: ClassVar[tuple[int, ...]]
    linear: ClassVar[bool] = True
    bias_is_input: ClassVar[bool] = False
    contraction: ClassVar[Contraction | None] = None

    def __init__(self, factors: FactorSource, *, overridable: bool = False) -> None:
        super().__init__()
        self.factors = factors
        self.overridable = overridable

    @staticmethod
    @abc.abstractmethod
    def canonical(node: ir.Node, operand: int, weight: Weight) -> Weight | NoWeight:
        """Return the operand as `(groups, out, in)`, or why it cannot be split."""

    @staticmethod
    @abc.abstractmethod
    def rewrite(found: Found, parts: Parts) -> ir.Node:
        """Put `parts.first(...)` in front of the node, turn the node into the second one, and return the first."""

    @staticmethod
    @abc.abstractmethod
    def macs(node: ExecutedNode, /) -> Macs:
        """Return the multiply-accumulates of one execution."""

    @staticmethod
    @abc.abstractmethod
    def axis_rule(call: NodeCall, /) -> Moves | Sequence[Moves] | Sequence[Value]:
        """Return how the operator moves axes, for proofs that samples do not mix."""

    @classmethod
    def forms(cls, shape: tuple[int, ...]) -> tuple[Form, ...]:
        """Return the forms that a weight of this shape can take, the default first."""
        return (cls.form,)

    @classmethod
    def read_form(cls, right: tuple[int, ...], left: tuple[int, ...]) -> tuple[Form, int]:
        """Return the form of a split, and the points of the kernel that are in the second node.

        Args:
            right: Shape of the factor in the first node.
            left: Shape of the factor in the second node, which has this operator.
        """
        return cls.form, 1

    @staticmethod
    def window(node: ir.Node, shape: tuple[int, ...]) -> Window | None:
        """Return how a convolution moves over its data; None for products."""
        return None

    @staticmethod
    def row_order(node: ir.Node, operand: int, weight: Weight) -> RowOrder | None:
        """Return where the rows of data and response lie; None where the site cannot be calibrated.

        A site can be calibrated where its response is `data @ weight^T`, or, with a window, an ordinary convolution.
        """
        return None

    @staticmethod
    def can_pivot(node: ir.Node, operand: int, weight: Weight) -> bool:
        """Return whether a node can take the pivoted form; asked of operators whose output is the response."""
        return False

    @staticmethod
    def shares_right(found: Found) -> bool:
        """Return whether the first node is `MatMul(data, right^T)`, with data and weight of two axes as stored."""
        return False

    @staticmethod
    def bias_shape(found: Found) -> tuple[int, ...] | NoWeight:
        """Return the shape in which a bias correction is added, or why it is not known; called before `rewrite`."""
        return (found.site.bias_size,)

    @staticmethod
    def add_bias(parts: Parts, shape: tuple[int, ...]) -> None:
        """Add the bias correction to the node that was rewritten: by default to its third input."""
        add_to_input(parts, 2, shape)

    def call(self, model: ir.Model) -> SplitResult:
        """Split every node of this operator."""
        return run(model, (type(self),), self.factors, overridable=self.overridable)

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> SplitResult:
        """Run the pass; the result carries the records."""
        return cast(SplitResult, super().__call__(model_or_result))


def run(
    model: ir.Model,
    passes: Sequence[type[SplitPass]],
    factors: FactorSource,
    unsplit: Unsplit = MappingProxyType({}),
    keep: Keep = in_memory,
    *,
    overridable: bool = False,
    joint: bool = False,
) -> SplitResult:
    """Split in place every node of the passes' operators for which the source returns factors; `keep` stores them."""
    splitter = Splitter(model, passes, unsplit, keep, overridable=overridable, joint=joint)
    for site in splitter:
        splitter.answer(factors(site))
    records = splitter.records
    return SplitResult(model, any(isinstance(record, Split) for record in records), tuple(records))


class Splitter(Iterator[Site]):
    """A split site by site: an iterator over the sites in graph order, whose `answer` splits the current one.

        splitter = Splitter(model, passes)
        for site in splitter:
            splitter.answer(factors(site))      Factors, or Dense

    It yields a site for each weight and orientation. With `joint` it first yields the joint site of each group; after
    the answer `Dense`, the members follow one by one. No answer and no dense weight is held longer than its nodes need.

    Args:
        model: Changed in place.
        passes: The passes that split.
        unsplit: Other operators to report, with the inputs where they hold a weight.
        keep: Stores each factor.
        overridable: Split weights that are graph inputs too, and drop those inputs.
        joint: Yield the joint sites of groups that multiply the same data.

    Attributes:
        records: One for every weight-bearing node, in graph order; complete after the last site.
    """

    def __init__(
        self,
        model: ir.Model,
        passes: Sequence[type[SplitPass]],
        unsplit: Unsplit = MappingProxyType({}),
        keep: Keep = in_memory,
        *,
        overridable: bool = False,
        joint: bool = False,
    ) -> None:
        self._store = Store(model, keep, overridable=overridable)
        self._entries = deque(survey(model, passes, unsplit, overridable=overridable))
        self._heads = {members[0].node: members for members in (joint_members(self._entries) if joint else ())}
        self._answer: SplitFactors | Dense | None = None
        self._steps = self._split_all()
        self.records: list[Record] = []

    def found(self) -> list[Site | Skip]:
        """Return every weight-bearing node that is not split yet, in graph order, as `find_sites` does."""
        return [entry.site if isinstance(entry, Found) else entry for entry in self._entries]

    def groups(self) -> list[tuple[Site, ...]]:
        """Return the members of each joint site that has not been yielded yet."""
        return [tuple(member.site for member in members) for members in self._heads.values()]

    def answer(self, factors: SplitFactors | Dense) -> None:
        """Set the factors of the current site, or the reason to leave it dense.

        The next step raises ValueError where the factors do not fit the site, have another dtype, or hold NaN.
        """
        self._answer = factors

    def __next__(self) -> Site:
        return next(self._steps)

    def _answered(self, site: Site) -> SplitFactors | Dense:
        """Return and drop the answer for a site."""
        answer, self._answer = self._answer, None
        return checked(answer, site)

    def _split_all(self) -> Iterator[Site]:
        entries, store = self._entries, self._store
        uses_left = Counter(entry.key for entry in entries if isinstance(entry, Found))
        last = {entry.weight.root: entry.node for entry in entries if isinstance(entry, Found)}
        done: dict[ir.Node, Record] = {}  # nodes split together with one before them
        answers: dict[WeightKey, _Answer] = {}
        while entries:  # popped, so that a dense weight can be freed as soon as it is split
            entry = entries.popleft()
            if isinstance(entry, Skip):
                self.records.append(entry)
                continue
            node, root, key = entry.node, entry.weight.root, entry.key
            if node in self._heads:
                members = self._heads.pop(node)
                site = joint_site(members)
                yield site
                answer = self._answered(site)
                if not isinstance(answer, Dense):
                    done |= _split_jointly(members, answer, site.members, store)
                del members, site, answer
            if node not in done and key not in answers:
                yield entry.site
                answers[key] = _Answer(self._answered(entry.site), entry.is_turned)
            if node in done:
                self.records.append(done.pop(node))
            else:
                self.records.append(_answered(entry, answers[key], store))
            uses_left[key] -= 1
            if not uses_left[key]:
                del uses_left[key]
                answers.pop(key, None)
                store.forget(key)
            if last[root] is node:
                del last[root]
                freeze_shapes(root)
            del entry, key, root


class _Answer(NamedTuple):
    """The source's answer for a weight, and whether the node of that site uses the stored matrix transposed."""

    factors: SplitFactors | Dense
    is_turned: bool | None


def _answered(found: Found, answer: _Answer, store: Store) -> Record:
    factors = answer.factors
    if isinstance(factors, Dense):
        return skipped(found, factors.reason)
    if found.is_turned == answer.is_turned:
        return _split(found, factors, store)
    return _split(found, factors.transposed(), store, transposed=True)


def _split_jointly(
    members: Sequence[Found],
    factors: SplitFactors,
    names: tuple[str, ...],
    store: Store,
) -> dict[ir.Node, Record]:
    """Split nodes that multiply the same data with one shared right factor; `names` are those of their weights."""
    records: dict[ir.Node, Record] = {}
    first: ir.Node | None = None
    for member, own in zip(members, cut(factors, members), strict=True):
        record = _split(member, own, store, first)
        if isinstance(record, Split):
            record, data = dataclasses.replace(record, joint=names), member.data
            first = None if data is None else data.producer()
        records[member.node] = record
        store.forget(member.key)
    return records


def _split(
    found: Found,
    factors: SplitFactors,
    store: Store,
    joined: ir.Node | None = None,
    *,
    transposed: bool = False,
) -> Record:
    """Rewrite one node and drop its dense weight if nobody else uses it."""
    node, site, splitter = found.node, found.site, found.splitter
    dense = node.inputs[found.operand]
    bias_shape = splitter.bias_shape(found)
    if factors.bias is not None and store.opset < BROADCAST_OPSET:
        bias_shape = NoWeight(reason=f"opset {store.opset}: older than {BROADCAST_OPSET}, which a bias needs")
    if factors.bias is not None and isinstance(bias_shape, NoWeight):
        return skipped(found, bias_shape.reason)
    parts = Parts(found=found, factors=factors, store=store, joined=joined, transposed=transposed)
    form, second = parts.form, node
    if form == "pivoted":
        first, second = rewrite_pivoted(parts)
    else:
        first = splitter.rewrite(found, parts)
        if factors.bias is not None and not isinstance(bias_shape, NoWeight):
            splitter.add_bias(parts, bias_shape)
    second.name = store.names.fresh_node(f"{site.node}/left")
    second.metadata_props[MARK] = form if form in FOLDED else "left"
    if form in FOLDED:
        first.metadata_props[MARK] = SELECTION if form == "units" else BASES
    remove_unused(dense, overridable=True)  # overridable weights are split only on the user's request
    rows, columns = site.shape(form)
    return Split(
        node=site.node,
        op_type=site.op_type,
        weight=site.weight,
        out_features=rows,
        in_features=columns,
        groups=site.groups,
        rank=factors.rank,
        form=form,
        first_node=name_of(first),
        second_node=name_of(second),
    )
