"""Text for people: numbers in words, and names from files, which may hold anything, made fit for a page."""

import re

LONGEST = 1000
"""Characters of one text that a page shows; report.json has it whole."""

# Controls, halves of surrogate pairs, and marks that turn the direction of what follows them or are not seen at all.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\U000e0000-\U000e007f]"
)
_MARKDOWN = str.maketrans({"|": "\\|", "<": "&lt;", "`": "'", "\n": "\\n", "\t": " "})


def plain(text: str) -> str:
    r"""The text with what no page may hold shown as its code, and shortened in the middle where it is endless.

    Example:
        >>> plain("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return shortened(_UNFIT.sub(lambda found: f"\\x{ord(found[0]):02x}", text), LONGEST)


def on_terminal(text: str) -> str:
    r"""The text with what would steer a terminal shown as its code; lines and tabs stay, and nothing is left out.

    Example:
        >>> on_terminal("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return _UNFIT.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def in_markdown(text: str) -> str:
    r"""A name from a file in one line of Markdown: no cell, code, link or tag ends or begins in it.

    Example:
        >>> in_markdown("a|b\n<img>`")
        "a\\|b\\n&lt;img>'"
    """
    return plain(text).translate(_MARKDOWN).replace("](", "]\\(")


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


def size_change(before: int, after: int) -> str:
    """How a size changed; what grew is never called smaller.

    Example:
        >>> size_change(300, 150), size_change(150, 300), size_change(7, 7)
        ('2.00x smaller', '2.00x larger', 'same size')
    """
    if before == after:
        return "same size"
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def share_kept(before: int, after: int) -> str:
    """What is left of a count, or how often it is there now; "" where there was none.

    Example:
        >>> share_kept(200, 50), share_kept(200, 350)
        ('25.0% kept', '1.75x as many')
    """
    if not before:
        return ""
    return f"{after / before:.1%} kept" if after <= before else f"{after / before:.2f}x as many"
