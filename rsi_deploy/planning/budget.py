"""The budget of the whole model, and the limit that it leaves for the sites.

--keep-params 0.5     half of all parameters of the model                      fraction in (0, 1], or 50%
--keep-macs 0.5       half of its multiply-accumulates per sample              fraction in (0, 1], or 50%
--max-size 20MB       bytes of the compressed model: kB MB GB are powers of 1000, KiB MiB GiB of 1024
--keep-latency 0.6    share of the dense model's time for one call             fraction in (0, 1], or 60%
--max-latency 25ms    time of one call: us, ms, s
"""

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.planning.knapsack import Cost

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
TIMES = {"us": 10**3, "ms": 10**6, "s": 10**9}
"""Nanoseconds per unit."""
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"


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
        given = {
            "--keep-params": self.keep_params,
            "--keep-macs": self.keep_macs,
            "--max-size": self.max_size,
            "--keep-latency": self.keep_latency,
            "--max-latency": self.max_latency,
        }
        values = {option: value for option, value in given.items() if value is not None}
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
            keep_params=None if keep_params is None else parse_share("--keep-params", keep_params),
            keep_macs=None if keep_macs is None else parse_share("--keep-macs", keep_macs),
            max_size=None if max_size is None else parse_size("--max-size", max_size),
            keep_latency=None if keep_latency is None else parse_share("--keep-latency", keep_latency),
            max_latency=None if max_latency is None else parse_latency("--max-latency", max_latency),
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
            return f"--keep-latency {(Decimal(repr(self._share)) * 100).normalize():f}%"
        if self.max_size is not None:
            return f"--max-size {_exact(self.max_size)}"
        return f"--keep-{self.cost} {(Decimal(repr(self._share)) * 100).normalize():f}%"


def parse_share(option: str, text: str | float) -> float:
    """Parse a share of the whole model: `0.5` or `50%`.

    Raises:
        UsageError: anything else; the message gives the spelling to use. `50` is refused because it may mean 50 %.

    Examples:
        >>> parse_share("--keep-params", "0.5"), parse_share("--keep-macs", "12.5%")
        (0.5, 0.125)
    """
    text = str(text).strip()
    number = re.fullmatch(rf"([+-]?{_NUMBER}(?:[eE][+-]?\d+)?)\s*(%?)", text)
    if not number:
        raise UsageError(f"{option} must be a fraction such as 0.5 or 50%, but got {text!r}")
    value = Decimal(number[1])
    if number[2]:
        if not 0 < value <= 100:
            raise UsageError(f"{option} as a percentage must lie in (0 %, 100 %], but got {text!r}")
        return float(value / 100)
    if 1 < value <= 100:
        raise UsageError(f"{option} as a fraction must lie in (0, 1], but got {text!r}: write {option} {value:f}%")
    if not 0 < value <= 1:
        raise UsageError(f"{option} must lie in (0, 1], but got {text!r}; write for example 0.5 or 50%")
    return float(value)


def parse_size(option: str, text: str | int) -> int:
    """Parse a number of bytes, rounded down: `20MB`, `1.5GiB`, `20000000`.

    Raises:
        UsageError: anything else; the message gives the spelling to use.

    Examples:
        >>> parse_size("--max-size", "20MB"), parse_size("--max-size", "1.5 KiB"), parse_size("--max-size", 4096)
        (20000000, 1536, 4096)
    """
    text = str(text).strip()
    number = re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]*)", text)
    if not number:
        raise UsageError(f"{option} must be a size such as 20MB, 20MiB or 20000000 (bytes), but got {text!r}")
    digits, unit = number[1], number[2]
    if unit not in UNITS:
        near = [known for known in UNITS if known.lower().startswith(unit[0].lower()) and known != "KB"]
        hint = f"write {option} " + " or ".join(f"{digits}{known}" for known in near) if near else "write 20MB or 20MiB"
        raise UsageError(f"{option} takes B, kB, MB, GB, KiB, MiB or GiB, but got {text!r}: {hint}")
    if UNITS[unit] == 1 and not digits.isdigit():
        raise UsageError(f"{option} in bytes must be a whole number, but got {text!r}; write for example {digits}MB")
    size = math.floor(Fraction(digits) * UNITS[unit])
    if size < 1:
        raise UsageError(f"{option} must be at least 1 byte, but got {text!r}; write for example 20MB")
    return size


def parse_latency(option: str, text: str) -> int:
    """Parse a time with its unit, and return nanoseconds.

    Raises:
        UsageError: anything else; the message gives the spelling to use. A number without a unit is refused.

    Examples:
        >>> parse_latency("--max-latency", "25ms"), parse_latency("--max-latency", "1.5 us")
        (25000000, 1500)
    """
    number = re.fullmatch(rf"({_NUMBER})\s*([a-z]*)", str(text).strip())
    if not number or number[2] not in ("us", "ms", "s"):
        hint = f": write {option} {number[1]}ms" if number and not number[2] else ""
        raise UsageError(f"{option} must be a time such as 25ms, 800us or 1s, but got {str(text)!r}{hint}")
    nanoseconds = math.floor(Fraction(number[1]) * TIMES[number[2]])
    if nanoseconds < 1:
        raise UsageError(f"{option} must be at least 1 nanosecond, but got {text!r}; write for example 25ms")
    return nanoseconds


def _time(nanoseconds: int, *, up: bool = False) -> str:
    """Format a time in ms with four digits, optionally rounded up."""
    if up:
        digits = max(0, len(str(nanoseconds)) - 3)
        nanoseconds = -(-nanoseconds // 10**digits) * 10**digits
    return f"{float(f'{nanoseconds / 1e6:.4g}'):.10g}ms"


def _exact(size: int) -> str:
    """Return the shortest exact spelling of a number of bytes."""
    spellings = [f"{size // factor}{unit}" for unit, factor in UNITS.items() if size % factor == 0 and unit != "B"]
    return min(spellings, key=len)


def _rounded_up(size: int) -> str:
    """Format a number of bytes, rounded up to a tenth of a decimal unit."""
    unit = next((unit for unit in ("GB", "MB", "kB") if size >= UNITS[unit]), "")
    return f"{math.ceil(Fraction(10 * size, UNITS[unit])) / 10:.10g}{unit}"
