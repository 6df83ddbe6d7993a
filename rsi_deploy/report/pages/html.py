"""The renderer for HTML: one file that opens from disk, loads nothing and runs no script.

    Page (texts, tables, plots) --> page.html.jinja + page.css + pictures

The template escapes all texts, because they may come from files of strangers. Without the drawing library the page has
its tables and a remark.
"""

import functools
import logging
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsi_deploy.core.text import plain
from rsi_deploy.report.pages.page import Page, Picture
from rsi_deploy.report.pages.theme import ALL, GRID, MUTED, SERIES, TEXT, WARN

if TYPE_CHECKING:
    import jinja2

_log = logging.getLogger(__name__)
_SOURCE = re.compile(r'<meta name="source-sha256" content="([0-9a-f]{64})">')
_NO_PICTURES = (
    "This page has no pictures: {}. Its tables have every number. For pictures, pip install vl-convert-python and make "
    "the page again."
)


def source_of(page: Path) -> str | None:
    """Return the sha256 of the document that a page was made from, or None if the page does not have it."""
    with page.open("rb") as file:
        found = _SOURCE.search(file.read(4096).decode("utf-8", errors="replace"))
    return found[1] if found else None


def render(page: Page) -> str:
    """Return the page as HTML."""
    import markupsafe

    draw, problem = _drawing()

    def picture(of: Picture, *, is_wide: bool = False) -> Any:
        return markupsafe.Markup(draw(of, is_wide)) if draw else None

    remarks = [*page.remarks, *([_NO_PICTURES.format(problem)] if problem else [])]
    return _template().render(
        page=page,
        remarks=remarks,
        picture=picture,
        style=markupsafe.Markup(_resource("page.css")),
        colours=ALL,
        named={"text": TEXT, "muted": MUTED, "grid": GRID, "warn": WARN, "accent": SERIES[1]},
    )


@functools.cache
def _template() -> "jinja2.Template":
    """Return the compiled template."""
    import jinja2
    import markupsafe

    def breaks(name: str) -> Any:
        """Allow line breaks in a name after a dot, a slash or an underscore."""
        return markupsafe.Markup(re.sub(r"(?<=[^\W\d][./_])(?=\w)", "<wbr>", str(markupsafe.escape(plain(name)))))

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_without_controls,
        loader=jinja2.FunctionLoader(_resource),
    )
    environment.filters["breaks"] = breaks
    return environment.get_template("page.html.jinja")


def _drawing() -> tuple[Callable[[Picture, bool], str] | None, str]:
    """Return the function that draws a picture, narrow or wide, or None and the reason."""
    try:
        from rsi_deploy.report.pages.charts import NARROW, WIDE, svg
    except ImportError as error:
        _log.warning("report.html has no pictures: %s", error)
        return None, str(error)

    def draw(of: Picture, is_wide: bool) -> str:
        name, canvas = (f"{of.name}-wide", WIDE) if is_wide else (of.name, NARROW)
        return svg(of.plot, name=name, title=of.title, description=of.description, canvas=canvas)

    return draw, ""


def _without_controls(value: Any) -> Any:
    """Return a text without control characters; markup of the template itself is kept."""
    return plain(value) if type(value) is str else value


def _resource(name: str) -> str:
    return resources.files("rsi_deploy.report.pages").joinpath(name).read_text(encoding="utf-8")
