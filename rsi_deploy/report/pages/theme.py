"""The colours of a page and its pictures, each with its value in the dark.

Series are told apart by people with any colour vision (after Okabe and Ito, 2008, darkened for white paper) and have a
contrast of at least 3 to the background in both.
"""

from typing import NamedTuple


class Colour(NamedTuple):
    """One colour, on light and on dark ground."""

    light: str
    dark: str


TEXT = Colour("#1c2733", "#e3e8ee")
MUTED = Colour("#566473", "#a3b0bd")
GRID = Colour("#d9dfe6", "#36424f")
WARN = Colour("#b4470b", "#ff9d5c")

# The first is the dense model everywhere, the second the compressed one.
SERIES = (
    Colour("#75818e", "#93a1af"),
    Colour("#0068a8", "#5ab4f0"),
    Colour("#c4590d", "#f2954a"),
    Colour("#007a58", "#3cc79d"),
    Colour("#9c3f87", "#dd92cb"),
    Colour("#786600", "#d3c04c"),
)

ALL = (TEXT, MUTED, GRID, WARN, *SERIES)
