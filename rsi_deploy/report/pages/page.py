"""A page before it is drawn: tiles, remarks, and sections of words, one picture and one table each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rsi_deploy.report.pages.plots import Plot

Tone = Literal["good", "bad", "neutral", "missing"]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the headline: what it is, before and after, the change in words."""

    label: str
    after: str
    before: str = ""
    change: str = ""
    tone: Tone = "neutral"


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """Rows of texts; the first column names the row.

    Attributes:
        caption: what the rows are.
        columns: their heads; one that begins with "#" holds numbers and stands to the right, the sign is not shown.
        rows: as many texts each as columns.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's head, and whether it holds numbers."""
        return [(column.removeprefix("#"), column.startswith("#")) for column in self.columns]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What to draw, its title in a few words, and what it shows in a sentence."""

    name: str
    title: str
    description: str
    plot: Plot


@dataclass(frozen=True, kw_only=True)
class Block:
    """A picture with its table beside it, or below it where that is `wide`; either may be missing.

    `folded` hides a long table until it is asked for.
    """

    words: Sequence[str] = ()
    picture: Picture | None = None
    table: PageTable | None = None
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, what is to be said, its blocks, and small print."""

    name: str
    title: str
    blocks: Sequence[Block]
    words: Sequence[str] = ()
    small: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: the first heading.
        kind: what sort of page it is, in a few words above it.
        verdict: one sentence, the result.
        facts: (what, value) pairs below it: what was asked, the machine, when.
        tiles: the numbers of the headline.
        remarks: what must be known before any number is believed.
        sections: the rest, in order.
        source: sha256 of the document it shows; "" where that is in no file.
    """

    title: str
    kind: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    remarks: Sequence[str]
    sections: Sequence[Section]
    source: str = ""
