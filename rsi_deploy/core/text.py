"""Text for people: formatted numbers, and names from files made safe to show."""

import re

LONGEST = 1000
"""Most characters of one text on a page; report.json has the whole text."""

# Control characters, surrogates, and characters that are invisible or change the direction of text.
_UNFIT = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\ufffe\uffff\U000e0000-\U000e007f]"
)
_MARKDOWN = str.maketrans({"|": "\\|", "<": "&lt;", "`": "'", "\n": "\\n", "\t": " "})


def plain(text: str) -> str:
    r"""Escape characters that are unsafe on a page, and shorten a very long text in the middle.

    Example:
        >>> plain("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return shortened(_UNFIT.sub(lambda found: f"\\x{ord(found[0]):02x}", text), LONGEST)


def on_terminal(text: str) -> str:
    r"""Escape characters that control a terminal; lines and tabs stay, and nothing is shortened.

    Example:
        >>> on_terminal("layer\x1b[31m")
        'layer\\x1b[31m'
    """
    return _UNFIT.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def in_markdown(text: str) -> str:
    r"""Escape a name from a file so that it cannot begin or end a cell, code, link or tag in Markdown.

    Example:
        >>> in_markdown("a|b\n<img>`")
        "a\\|b\\n&lt;img>'"
    """
    return plain(text).translate(_MARKDOWN).replace("](", "]\\(")


def shortened(text: str, most: int) -> str:
    """Shorten a text to `most` characters by leaving out its middle, as beginning and end distinguish names.

    Example:
        >>> shortened("encoder.layer.11.attention.self.query", 20)
        'encode...self.query'
    """
    if len(text) <= most:
        return text
    end = (most - 3) * 2 // 3
    return f"{text[: most - 3 - end]}...{text[-end:]}"


def human_bytes(count: int) -> str:
    """Format bytes in powers of ten.

    Example:
        >>> human_bytes(2_390_000)
        '2.39 MB'
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def human_count(count: int) -> str:
    """Format a count in powers of ten.

    Example:
        >>> human_count(11_679_912)
        '11.7 M'
    """
    for unit, size in ((" G", 10**9), (" M", 10**6), (" k", 10**3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def size_change(before: int, after: int) -> str:
    """Describe how a size changed.

    Example:
        >>> size_change(300, 150), size_change(150, 300), size_change(7, 7)
        ('2.00x smaller', '2.00x larger', 'same size')
    """
    if before == after:
        return "same size"
    return f"{before / after:.2f}x smaller" if after < before else f"{after / before:.2f}x larger"


def share_kept(before: int, after: int) -> str:
    """Describe what is left of a count, or by how much it grew; "" if it was 0.

    Example:
        >>> share_kept(200, 50), share_kept(200, 350)
        ('25.0% kept', '1.75x as many')
    """
    if not before:
        return ""
    return f"{after / before:.1%} kept" if after <= before else f"{after / before:.2f}x as many"
