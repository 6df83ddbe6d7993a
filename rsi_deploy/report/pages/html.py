"""report.html: one file that opens from disk; it loads nothing, runs nothing, and reads on a phone and in the dark.

    Page (words, numbers, plots) --> page.html.jinja + page.css + pictures

`page_report` makes one of a bundle's report, `page_bench` one of a benchmark's document, and that without torch.

Whatever comes from a file is escaped by the template. Where the drawing libraries are missing the page has its tables
and says so.
"""

import logging
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from rsi_deploy.core.text import plain
from rsi_deploy.report.pages.page import Page, Picture
from rsi_deploy.report.pages.theme import ALL, GRID, MUTED, SERIES, TEXT, WARN

_log = logging.getLogger(__name__)
_SOURCE = re.compile(r'<meta name="source-sha256" content="([0-9a-f]{64})">')
_NO_PICTURES = (
    "This page has no pictures: {}. Every number is in its tables. pip install vl-convert-python, then make it again."
)


def source_of(page: Path) -> str | None:
    """The sha256 of the document that a page was made from; None where it does not tell."""
    with page.open("rb") as file:
        found = _SOURCE.search(file.read(4096).decode("utf-8", errors="replace"))
    return found[1] if found else None


def render(page: Page) -> str:
    """The page as HTML."""
    import jinja2
    import markupsafe

    draw, obstacle = _artist()
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_fit,
        loader=jinja2.FunctionLoader(_resource),
    )

    def breaks(name: str) -> Any:
        """A name that may be broken after a dot, a slash or an underscore."""
        return markupsafe.Markup(re.sub(r"(?<=[^\W\d][./_])(?=\w)", "<wbr>", str(markupsafe.escape(plain(name)))))

    environment.filters["breaks"] = breaks

    def picture(wanted: Picture) -> Any:
        return markupsafe.Markup(draw(wanted)) if draw else None

    remarks = [*page.remarks, *([_NO_PICTURES.format(obstacle)] if obstacle else [])]
    return environment.get_template("page.html.jinja").render(
        page=page,
        remarks=remarks,
        picture=picture,
        style=markupsafe.Markup(_resource("page.css")),
        colours=ALL,
        named={"text": TEXT, "muted": MUTED, "grid": GRID, "warn": WARN, "accent": SERIES[1]},
    )


def _artist() -> tuple[Callable[[Picture], str] | None, str]:
    """What draws pictures, or None and why not."""
    try:
        from rsi_deploy.report.pages.charts import svg
    except ImportError as error:
        _log.warning("report.html gets no pictures: %s", error)
        return None, str(error)
    return lambda p: svg(p.plot, name=p.name, title=p.title, description=p.description), ""


def _fit(value: Any) -> Any:
    """Texts without what no page may hold; markup of our own as it is."""
    return plain(value) if type(value) is str else value


def _resource(name: str) -> str:
    return resources.files("rsi_deploy.report.pages").joinpath(name).read_text(encoding="utf-8")
