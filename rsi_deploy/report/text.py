"""Text for people: numbers in words, and names from files, which may hold anything, made fit for a page."""

import re

LONGEST = 1000
"""Characters of one text that a page shows; report.json has it whole."""

# Controls, halves of surrogate pairs, and marks that turn the direction of what follows them.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def plain(text: str) -> str:
    r"""The text with what no page may hold shown as its code, and shortened in the middle where it is endless.

    Example:
        >>> plain("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return shortened(_UNFIT.sub(lambda found: f"\\x{ord(found[0]):02x}", text), LONGEST)


def shortened(text: str, most: int) -> str:
    """At most so many characters, the middle left out: beginnings and ends of names tell them apart.

    Example:
        >>> shortened("encoder.layer.11.attention.self.query", 20)
        'encode...self.query'
    """
    if len(text) <= most:
        return text
    end = (most - 3) * 2 // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def human_bytes(count: int) -> str:
    """Bytes for people, in powers of ten.

    Example:
        >>> human_bytes(2_390_000)
        '2.39 MB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def human_count(count: int) -> str:
    """Numbers for people, in powers of ten.

    Example:
        >>> human_count(11_679_912)
        '11.7 M'
    """
    for unit, size in ((" G", 10**9), (" M", 10**6), (" k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)
