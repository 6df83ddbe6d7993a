"""Quantities as users type them. Every option of every verb reads them here, and every message says what to type.

share      0.5, 50%                      fraction in (0, 1]
percent    5%                            number of percent
size       20MB, 512mb, 1.5GiB, 4096     bytes; kB MB GB are powers of 1000, KiB MiB GiB of 1024
duration   25ms, 240s, 2m, 1h            seconds, or nanoseconds of a call
"""

import math
import re
from decimal import Decimal
from fractions import Fraction

from rsi_deploy.core.errors import UsageError

SIZES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
"""Bytes of each unit; its case does not matter."""
DURATIONS = {"us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
"""Nanoseconds of each unit."""
BARE_BYTES = 1024
"""A text without a unit is a number of bytes from here on; below, the unit was probably forgotten."""
_NUMBER = r"(?:\d+\.?\d*|\.\d+)"


def parse_share(text: str | float, option: str) -> float:
    """Read a share: `0.5` or `50%`.

    Raises:
        UsageError: anything else, with the spelling to use; `50` could be meant as a percentage and is refused.

    Examples:
        >>> parse_share("0.5", "--keep-params"), parse_share("12.5%", "--keep-macs")
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
        raise UsageError(f"{option} must lie in (0, 1], but got {text!r}", hint="write for example 0.5 or 50%")
    return float(value)


def parse_percent(text: str, option: str) -> float:
    """Read a number of percent: `5%`.

    Raises:
        UsageError: a bare number, which could mean 5 % or five times.

    Example:
        >>> parse_percent("5%", "--max-slowdown")
        5.0
    """
    number, percent, rest = text.strip().partition("%")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not percent or rest or not 0 <= value < math.inf:
        hint = f"; write {text.strip()}%" if not percent and value >= 1 else ""
        raise UsageError(f"{option} takes a percentage such as 5%, but got {text!r}{hint}")
    return value


def parse_perplexity(text: str | float, option: str) -> str:
    """Read a limit on the perplexity: `+5%` over another model's, or `25`; return its shortest spelling.

    Raises:
        UsageError: anything else, with the spelling to use; `5%` could be meant as a share of the perplexity.

    Examples:
        >>> parse_perplexity("+5.0%", "--max-perplexity"), parse_perplexity(25, "--max-perplexity")
        ('+5%', '25')
    """
    text = str(text).strip()
    number = re.fullmatch(rf"(\+?)({_NUMBER})\s*(%?)", text)
    if not number or bool(number[1]) != bool(number[3]):
        hint = f"write {option} +{text}" if number and number[3] else f"write {option} +5%, or {option} 25"
        raise UsageError(f"{option} takes a rise such as +5%, or a perplexity such as 25, but got {text!r}", hint=hint)
    if not number[3] and float(number[2]) < 1:
        raise UsageError(f"{option}: no perplexity is below 1, but got {text!r}", hint=f"write {option} +5%")
    return f"{number[1]}{float(number[2]):.10g}{number[3]}"


def parse_size(text: str | int, option: str) -> int:
    """Read a number of bytes; part of a byte is dropped.

    Raises:
        UsageError: anything else, with the spelling to use.

    Examples:
        >>> parse_size("20MB", "--max-size"), parse_size("1.5 kib", "--max-size"), parse_size(4096, "--max-size")
        (20000000, 1536, 4096)
    """
    is_text = isinstance(text, str)
    text = str(text).strip()
    number = re.fullmatch(rf"({_NUMBER})\s*([A-Za-z]*)", text)
    if not number:
        raise UsageError(f"{option} takes a size such as 20MB, 20MiB or 20000000 (bytes), but got {text!r}")
    digits = number[1]
    unit = next((unit for unit in SIZES if unit.lower() == (number[2] or "B").lower()), None)
    if unit is None:
        near = [known for known in SIZES if known.lower().startswith(number[2][0].lower())]
        hint = " or ".join(f"{digits}{known}" for known in near) or "20MB or 20MiB"
        raise UsageError(f"{option} takes a size in {', '.join(SIZES)}, but got {text!r}: write {option} {hint}")
    if unit == "B" and not digits.isdigit():
        raise UsageError(
            f"{option} takes a whole number of bytes, but got {text!r}", hint=f"write for example {digits}MB"
        )
    size = math.floor(Fraction(digits) * SIZES[unit])
    if size < 1:
        raise UsageError(f"{option} must be at least 1 byte, but got {text!r}", hint="write for example 20MB")
    if is_text and not number[2] and size < BARE_BYTES:
        raise UsageError(
            f"{option} takes a size such as 512MB, but got {text!r}", hint=f"write {digits}MB, or {digits}B"
        )
    return size


def parse_nanoseconds(text: str, option: str) -> int:
    """Read a duration with its unit, as nanoseconds.

    Raises:
        UsageError: anything else, with the spelling to use; a bare number could be of any unit.

    Examples:
        >>> parse_nanoseconds("25ms", "--max-latency"), parse_nanoseconds("1.5 us", "--max-latency")
        (25000000, 1500)
    """
    number = re.fullmatch(rf"({_NUMBER})\s*([a-z]*)", str(text).strip().lower())
    if not number or number[2] not in DURATIONS:
        hint = f": write {option} {number[1]}ms or {number[1]}s" if number and not number[2] else ""
        raise UsageError(f"{option} takes a time such as 25ms, 60s or 2m, but got {str(text)!r}{hint}")
    nanoseconds = math.floor(Fraction(number[1]) * DURATIONS[number[2]])
    if nanoseconds < 1:
        raise UsageError(f"{option} must be at least 1 nanosecond, but got {text!r}", hint="write for example 25ms")
    return nanoseconds


def parse_seconds(text: str | float, option: str) -> float:
    """Read a duration as seconds, which is also the unit of a bare number.

    Raises:
        UsageError: anything else, with the spelling to use.

    Examples:
        >>> parse_seconds("2m", "--budget"), parse_seconds("200ms", "--bursts"), parse_seconds(0.5, "--budget")
        (120.0, 0.2, 0.5)
    """
    try:
        seconds = float(text)
    except ValueError:
        return parse_nanoseconds(str(text), option) / 1e9
    if not 0 < seconds < math.inf or isinstance(text, bool):
        raise UsageError(f"{option} takes a time such as 25ms, 60s or 2m, but got {str(text)!r}")
    return seconds


def share_text(share: float) -> str:
    """Return a share as it is typed.

    Example:
        >>> share_text(0.125)
        '12.5%'
    """
    return f"{(Decimal(repr(share)) * 100).normalize():f}%"


def size_text(size: int) -> str:
    """Return the shortest spelling of exactly so many bytes.

    Example:
        >>> size_text(20_000_000), size_text(1536)
        ('20MB', '1536')
    """
    spellings = [f"{size // factor}{unit}" for unit, factor in SIZES.items() if size % factor == 0]
    return min([*spellings, *([str(size)] if size >= BARE_BYTES else [])], key=len)


def duration_text(nanoseconds: int) -> str:
    """Return the shortest spelling of exactly so many nanoseconds, in us, ms or s.

    Example:
        >>> duration_text(25_000_000), duration_text(240 * 10**9)
        ('25ms', '240s')
    """
    for unit in ("s", "ms"):
        if nanoseconds % DURATIONS[unit] == 0:
            return f"{nanoseconds // DURATIONS[unit]}{unit}"
    return f"{(Decimal(nanoseconds) / 1000).normalize():f}us"
