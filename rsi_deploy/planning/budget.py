"""The budget of the whole model, and the limit that it leaves for the sites.

--keep-params 0.5     half of all parameters of the model                      fraction in (0, 1], or 50%
--keep-macs 0.5       half of its multiply-accumulates per sample              fraction in (0, 1], or 50%
--max-size 20MB       bytes of the compressed model: kB MB GB are powers of 1000, KiB MiB GiB of 1024
--keep-latency 0.6    share of the dense model's time for one call             fraction in (0, 1], or 60%
--max-latency 25ms    time of one call: us, ms, s
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.units import SIZES, parse_nanoseconds, parse_share, parse_size, share_text, size_text
from rsi_deploy.planning.knapsack import Cost


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Exactly one of five limits on the compressed model as a whole.

    Attributes:
        keep_params: share in (0, 1] of the model's parameters, including those outside the sites.
        keep_macs: share in (0, 1] of the model's multiply-accumulates per sample.
        max_size: bytes of the compressed model, at least 1.
        keep_latency: share in (0, 1] of the dense model's time for one call.
        max_latency: nanoseconds of one call of the compressed model, at least 1.
    """

    keep_params: float | None = None
    keep_macs: float | None = None
    max_size: int | None = None
    keep_latency: float | None = None
    max_latency: int | None = None

    def __post_init__(self) -> None:
        limits = {
            "--keep-params": self.keep_params,
            "--keep-macs": self.keep_macs,
            "--max-size": self.max_size,
            "--keep-latency": self.keep_latency,
            "--max-latency": self.max_latency,
        }
        values = {option: value for option, value in limits.items() if value is not None}
        if len(values) != 1:
            came = " and ".join(values) or "none of them"
            raise UsageError(
                f"a budget is exactly one of --keep-params, --keep-macs, --max-size, --keep-latency and --max-latency, "
                f"but got {came}"
            )
        ((option, value),) = values.items()
        if self.max_size is not None and value < 1:
            raise UsageError(f"--max-size must be at least 1 byte, but got {value}; write for example 20MB")
        if self.max_latency is not None and value < 1:
            raise UsageError(f"--max-latency must be at least 1 nanosecond, but got {value}; write for example 25ms")
        if self.max_size is None and self.max_latency is None and not 0 < value <= 1:
            raise UsageError(f"{option} must lie in (0, 1], but got {value}; write for example 0.5 or 50%")

    @classmethod
    def parse(
        cls,
        *,
        keep_params: str | float | None = None,
        keep_macs: str | float | None = None,
        max_size: str | int | None = None,
        keep_latency: str | float | None = None,
        max_latency: str | None = None,
    ) -> "Budget":
        """Parse the command-line options; None for those that are absent.

        Raises:
            UsageError: not exactly one option, or one that cannot be parsed; the message gives the spelling to use.

        Examples:
            >>> Budget.parse(keep_params="50%").keep_params, Budget.parse(max_size="20MB").max_size
            (0.5, 20000000)
            >>> Budget.parse(max_latency="25ms").max_latency
            25000000
        """
        return cls(
            keep_params=None if keep_params is None else parse_share(keep_params, "--keep-params"),
            keep_macs=None if keep_macs is None else parse_share(keep_macs, "--keep-macs"),
            max_size=None if max_size is None else parse_size(max_size, "--max-size"),
            keep_latency=None if keep_latency is None else parse_share(keep_latency, "--keep-latency"),
            max_latency=None if max_latency is None else parse_nanoseconds(max_latency, "--max-latency"),
        )

    @property
    def cost(self) -> Cost:
        """Field of `Option` that the budget applies to."""
        if self.keep_latency is not None or self.max_latency is not None:
            return "nanoseconds"
        return "params" if self.keep_params is not None else "macs" if self.keep_macs is not None else "bytes"

    def total(self, dense_total: int) -> int:
        """Return the largest cost of the compressed model, rounded down. `dense_total` is the cost of the dense model.

        Example:
            >>> Budget(keep_params=0.29).total(100)  # 0.29 * 100 is 28.999999999999996
            29
        """
        exact = self.max_size if self.max_size is not None else self.max_latency
        if exact is not None:
            return exact
        return math.floor(Fraction(repr(self._share)) * dense_total)

    def at(self, share: float, dense_total: int) -> "Budget":
        """Return the budget of the same kind for a share of the dense model's cost `dense_total`.

        Example:
            >>> str(Budget(max_size=500).at(0.75, 1000)), str(Budget(keep_macs=0.5).at(0.75, 1000))
            ('--max-size 750B', '--keep-macs 75%')
        """
        if self.max_size is not None:
            return Budget(max_size=math.floor(share * dense_total))
        if self.max_latency is not None:
            return Budget(max_latency=math.floor(share * dense_total))
        if self.keep_latency is not None:
            return Budget(keep_latency=share)
        return Budget(keep_params=share) if self.keep_macs is None else Budget(keep_macs=share)

    def limit(self, dense_total: int, fixed: int, *, smallest: int = 0) -> int:
        """Return the limit for the sites: the budget of the whole model minus the fixed cost.

        Args:
            dense_total: cost of the whole dense model (parameters, MACs per sample, or bytes), including `fixed`.
            fixed: cost outside the sites' weights (biases, names, graph), which no plan changes.
            smallest: smallest total cost of the sites (`knapsack.smallest_cost`); smaller limits are refused.

        Raises:
            ModelError: no plan can meet the budget; the message names the nearest budget and what to type.
        """
        left = self.total(dense_total) - fixed
        if left < smallest:
            raise self.unreachable(dense_total, fixed + smallest)
        return left

    def unreachable(self, dense_total: int, nearest: int) -> ModelError:
        """Return the error for a budget that no plan can meet.

        Args:
            dense_total: cost of the whole dense model.
            nearest: smallest cost of the whole compressed model.
        """
        if self.cost == "nanoseconds":
            return self._too_fast(dense_total, nearest)
        noun = {"params": "parameters", "macs": "MACs a sample", "bytes": "bytes"}[self.cost]
        if self.max_size is not None:
            limit, to_type = f"{self.max_size:,}", f"--max-size {_rounded_up(nearest)}"
        else:
            limit = f"{self.total(dense_total):,} of {dense_total:,}"
            to_type = f"--keep-{self.cost} {math.ceil(Fraction(1000 * nearest, max(dense_total, 1))) / 10:g}%"
        return ModelError(
            f"no plan can meet {self} ({limit} {noun}): the smallest comes to {nearest:,} {noun}; "
            f"type {to_type} or more, or let more sites be split (--include, --exclude)"
        )

    def _too_fast(self, dense_total: int, fastest: int) -> ModelError:
        """Return the error for a latency budget that no plan can meet."""
        share = math.ceil(Fraction(1000 * fastest, max(dense_total, 1))) / 10
        to_type = (
            f"--keep-latency {share:g}%" if self.max_latency is None else f"--max-latency {_time(fastest, up=True)}"
        )
        return ModelError(
            f"no plan can meet {self}: the fastest takes {_time(fastest)} of the dense model's {_time(dense_total)} "
            f"({share:g} %); type {to_type} or more, or let more sites be split (--include, --exclude)"
        )

    @property
    def _share(self) -> float | None:
        shares = (self.keep_params, self.keep_macs, self.keep_latency)
        return next((share for share in shares if share is not None), None)

    def __str__(self) -> str:
        if self.max_latency is not None:
            return f"--max-latency {_time(self.max_latency)}"
        if self.keep_latency is not None:
            return f"--keep-latency {share_text(self.keep_latency)}"
        if self.max_size is not None:
            return f"--max-size {size_text(self.max_size)}"
        return f"--keep-{self.cost} {share_text(self._share or 0.0)}"


def _time(nanoseconds: int, *, up: bool = False) -> str:
    """Format a time in ms with four digits, optionally rounded up."""
    if up:
        digits = max(0, len(str(nanoseconds)) - 3)
        nanoseconds = -(-nanoseconds // 10**digits) * 10**digits
    return f"{float(f'{nanoseconds / 1e6:.4g}'):.10g}ms"


def _rounded_up(size: int) -> str:
    """At least so many bytes, to a tenth of a decimal unit."""
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= SIZES[unit]), "B")
    return f"{math.ceil(Fraction(10 * size, SIZES[unit])) / 10:.10g}{unit}"
