"""The contents of a page before it is drawn: tiles, remarks, and sections of text, pictures and tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rsi_deploy.report.pages.plots import Axis, Bar, Bars, Plot
from rsi_deploy.report.table import Table, Tone


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number at the top of the page: what it is, its values before and after, and the change in words."""

    label: str
    after: str
    before: str = ""
    change: str = ""
    tone: Tone = "neutral"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A plot with its title and a sentence that describes it; `name` is the prefix of its ids."""

    name: str
    title: str
    description: str
    plot: Plot


def bar_chart(
    name: str, title: str, description: str, bars: Sequence[Bar], axis: str, *, form: str = ".4~g", **more: Any
) -> Picture:
    """Return a picture of bars on an axis from 0; `more` are further fields of `Bars`."""
    plot = Bars(bars=bars, axis=Axis(title=axis, zero=True, form=form), **more)
    return Picture(name=name, title=title, description=description, plot=plot)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A picture with its table beside it, or below it if it is `wide`; either may be missing.

    A `folded` table is below it, hidden until the reader opens it. On a desktop, a picture without a table beside it
    takes the width of the content.
    """

    words: Sequence[str] = ()
    picture: Picture | None = None
    table: Table | None = None
    folded: bool = False
    wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with text, blocks, and small print. A section without blocks is not shown."""

    name: str
    title: str
    blocks: Sequence[Block]
    words: Sequence[str] = ()
    small: Sequence[str] = ()


def block_of(
    table: Table, picture: Picture | None = None, *, words: Sequence[str] = (), wide: bool = False
) -> list[Block]:
    """Return a block in a list, or an empty list if the table has no rows."""
    return [Block(table=table, picture=picture, words=words, wide=wide)] if table.rows else []


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page.

    Attributes:
        title: the first heading.
        kind: kind of page and the tool, above the heading.
        verdict: the result in one sentence.
        facts: (name, value) pairs, such as the request, the machine and the date.
        tiles: the most important numbers.
        remarks: warnings and notes, before all sections.
        sections: the sections, in order.
        source: sha256 of the document that the page shows; "" if it is in no file.
    """

    title: str
    kind: str
    verdict: str
    facts: Sequence[tuple[str, str]]
    tiles: Sequence[Tile]
    remarks: Sequence[str]
    sections: Sequence[Section]
    source: str = ""
