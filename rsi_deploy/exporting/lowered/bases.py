"""The schemes that ranks and bits are planned in, and the dense model in each scheme that is tried."""

from dataclasses import dataclass, field

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.exporting.lowered.maker import Base, PointMaker
from rsi_deploy.exporting.lowered.points import CLOSE_LOSS, CLOSE_RATIO, Point
from rsi_deploy.planning.plan_file import Plan
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, FLOAT16, PRODUCTS, Scheme

MOST_BYTES = 1.3
"""Bytes of an int8 model over those of the smallest one; a larger one leaves much of the net in float."""


@dataclass(kw_only=True)
class Bases:
    """The bases of one export, and the dense model in their schemes.

    Attributes:
        maker: makes the models.
        dense: scheme -> the dense model in it, with weights in eight bits, for the schemes that were tried and made.
    """

    maker: PointMaker
    dense: dict[Scheme, Point] = field(default_factory=dict, init=False)

    def chosen(self) -> list[Base]:
        """Return the bases that ranks and bits are planned in.

        Raises:
            UsageError: the plan names an unknown scheme.
        """
        precision, plan = self.maker.precision, self.maker.request.plan
        if plan is not None and plan.has_bits:
            self._check_bits(plan)
        if precision == "float16":
            return [Base(scheme=FLOAT16)]
        if plan is not None and plan.scheme is not None:
            in_float = frozenset(name for name, site in plan.sites.items() if site.products is not None)
            return [Base(scheme=self._scheme_named(plan.scheme), in_float=in_float)]
        best = self._best_int8()
        schemes = [] if best is None else [best]
        if precision in ("auto", "int4"):
            self.dense_in(FEW_BITS)
            schemes.append(FEW_BITS)
        return [Base(scheme=scheme) for scheme in schemes]

    def dense_in(self, scheme: Scheme) -> Point | None:
        """Return the dense model in a scheme, with weights in eight bits; None where it cannot be made."""
        if scheme not in self.dense:
            with step(f"try {scheme.name}"):
                try:
                    self.dense[scheme] = self.maker.eight_bits(Base(scheme=scheme))
                except ModelError as error:
                    self.maker.notes.append(str(error))
        return self.dense.get(scheme)

    def _check_bits(self, plan: Plan) -> None:
        """Refuse a precision beside the plan's own, and tables that the model does not have."""
        precision, plan_name = self.maker.precision, self.maker.request.plan_name
        if precision != "auto":
            raise UsageError(f"{plan_name} has bits of its own, but got --precision {precision}; leave --precision out")
        known = {table.name for table in self.maker.tables}
        if unknown := sorted(plan.tables.keys() - known):
            raise UsageError(
                f"{plan_name}: table {unknown[0]!r} is not in the model; known are {', '.join(sorted(known)) or 'none'}"
            )

    def _scheme_named(self, name: str) -> Scheme:
        """Return the scheme of a plan."""
        target, plan_name = self.maker.target, self.maker.request.plan_name
        schemes = (target.static("minmax"), target.static("percentile"), DYNAMIC, FEW_BITS, FLOAT16)
        known = {scheme.name: scheme for scheme in schemes}
        if name not in known:
            raise UsageError(f'{plan_name}: "scheme" is {name!r}; write {", ".join(map(repr, known))}, or remove it')
        return known[name]

    def _best_int8(self) -> Scheme | None:
        """Return the int8 scheme whose outputs are best, or a faster one whose outputs are about as good."""
        target = self.maker.target
        tried = [target.static("minmax")]
        if any(site.op_type == "Conv" for site in self.maker.dense.sites):
            tried.append(target.static("percentile"))
        if self._has_mostly_products and DYNAMIC.kind in target.kinds:
            tried.append(DYNAMIC)
        found = [point for point in map(self.dense_in, tried) if point is not None]
        if not found:
            return None
        smallest = min(point.bytes for point in found)
        found = [point for point in found if point.bytes <= MOST_BYTES * smallest]
        least = min(point.loss for point in found)
        near = [point for point in found if point.loss <= CLOSE_RATIO * least + CLOSE_LOSS]
        if len({point.scheme.kind for point in near}) > 1 and self.maker.times.is_measured:
            near, _ = self.maker.measured(near)
            fastest = max(point.speedup for point in near)
            near = [point for point in near if point.speedup >= 0.9 * fastest]
        return min(near, key=lambda point: point.loss).scheme

    @property
    def _has_mostly_products(self) -> bool:
        """Whether most MACs or numbers are those of products: dynamic int8 leaves convolutions in float32."""
        sites, macs = self.maker.dense.sites, self.maker.dense.macs
        costs = [(macs.get(site.node, 0), site.out_features * site.in_features) for site in sites]
        of_products = [cost for cost, site in zip(costs, sites, strict=True) if site.op_type in PRODUCTS]
        return any(2 * sum(cost[i] for cost in of_products) > sum(cost[i] for cost in costs) for i in (0, 1))
