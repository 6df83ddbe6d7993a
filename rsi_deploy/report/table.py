"""A table of texts. Its rows are built once and drawn by each renderer: terminal, HTML page and Markdown card."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rsi_deploy.core.text import in_markdown

Tone = Literal["good", "bad", "neutral", "missing"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; the first column names the row.

    Attributes:
        caption: what the rows are.
        columns: heads; "#" in front marks a column of numbers, which is aligned to the right. The "#" is not shown.
        rows: as many texts each as columns.
        details: columns that a narrow terminal leaves out.
        tones: tone of the last cell of each row, such as "bad" for a slowdown; empty for none.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    details: Collection[str] = ()
    tones: Sequence[Tone] = ()

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Each column's head, and whether it holds numbers."""
        return [(column.removeprefix("#"), column.startswith("#")) for column in self.columns]

    def without(self, columns: Collection[str]) -> "Table":
        """Return the table without some columns."""
        kept = [index for index, column in enumerate(self.columns) if column not in columns]
        return replace(
            self,
            columns=[self.columns[index] for index in kept],
            rows=[[row[index] for index in kept] for row in self.rows],
        )

    def without_empty(self, optional: Collection[str] = ()) -> "Table":
        """Return the table without the columns (of `optional`, by default of all) that are empty in every row.

        Example:
            >>> Table(caption="", columns=("site", "#rank"), rows=[("fc1", ""), ("fc2", "")]).without_empty().columns
            ['site']
        """
        empty = [c for index, c in enumerate(self.columns) if not any(row[index] for row in self.rows)]
        return self.without([column for column in empty if not optional or column in optional])

    def transposed(self) -> "Table":
        """Return the table with a column of numbers for each row."""
        return Table(
            caption=self.caption,
            columns=("", *(f"#{row[0]}" for row in self.rows)),
            rows=[(head, *(row[i] for row in self.rows)) for i, (head, _) in enumerate(self.heads) if i],
        )

    def markdown(self) -> list[str]:
        """Return the lines of the table in Markdown."""
        lines = [[head for head, _ in self.heads], ["---"] * len(self.columns)]
        lines += [[in_markdown(text) for text in row] for row in self.rows]
        return [f"| {' | '.join(line)} |" for line in lines]


def range_text(ends: tuple[float, float], form: str = ".3f") -> str:
    """Return an interval as text.

    Example:
        >>> range_text((0.5, 1.25), ".2f")
        '0.50 to 1.25'
    """
    return f"{ends[0]:{form}} to {ends[1]:{form}}"


def with_interval(text: str, ends: tuple[float, float] | None, form: str = ".2f") -> str:
    """Return a text followed by an interval in brackets, if there is one.

    Example:
        >>> with_interval("85.00 %", (80.0, 90.0))
        '85.00 % [80.00, 90.00]'
    """
    return text if ends is None else f"{text} [{ends[0]:{form}}, {ends[1]:{form}}]"
