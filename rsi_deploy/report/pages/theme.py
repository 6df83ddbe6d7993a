"""The colours of pages and pictures, each for light and dark mode.

The colours of the series differ for people with any colour vision (after Okabe and Ito, 2008, darkened for a white
background) and have a contrast of at least 3 to the background in both modes.
"""

from typing import NamedTuple


class Colour(NamedTuple):
    """A colour in light and in dark mode."""

    light: str
    dark: str


TEXT = Colour("#1c2733", "#e3e8ee")
MUTED = Colour("#566473", "#a3b0bd")
GRID = Colour("#d9dfe6", "#36424f")
WARN = Colour("#b4470b", "#ff9d5c")

# The first is always the dense model, the second the compressed one.
SERIES = (
    Colour("#75818e", "#93a1af"),
    Colour("#0068a8", "#5ab4f0"),
    Colour("#c4590d", "#f2954a"),
    Colour("#007a58", "#3cc79d"),
    Colour("#9c3f87", "#dd92cb"),
    Colour("#786600", "#d3c04c"),
)

ALL = (TEXT, MUTED, GRID, WARN, *SERIES)
