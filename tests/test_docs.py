"""The reference pages hold what the code says: every error, every field of a report, every verb and public name."""

import importlib.util
import re
from pathlib import Path

import pytest

import rsi_deploy
from rsi_deploy.core.error_table import read_errors
from rsi_deploy.report.schema import Report

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def hooks():
    """`docs/hooks.py`, which MkDocs loads by its path."""
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_errors_has_a_row_for_each(hooks):
    text = hooks.on_page_markdown((DOCS / "reference" / "errors.md").read_text(encoding="utf-8"))
    table = text[text.index("| ends with |") : text.index("## What each class means")].strip().splitlines()
    errors = read_errors().errors
    assert len(table) == 2 + len(errors) > 200
    for line, error in zip(table[2:], errors, strict=True):
        cells = re.split(r"(?<!\\)\|", line)
        assert len(cells) == 5, line
        assert cells[1].startswith(f" {hooks._cell(error.ends)} "), line


def test_the_tables_of_the_report_have_every_field(hooks):
    text = hooks.on_page_markdown((DOCS / "reference" / "report.md").read_text(encoding="utf-8"))
    for name in Report.model_fields:
        assert re.search(rf"^\| `{name}` \| `[^`]+` \| [^|]+ \|$", text, re.M), name
    assert "| `no_such_field` |" not in text


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "integer or null"),
        ({"$ref": "#/$defs/Size"}, "Size"),
        ({"enum": ["a", "b"]}, '"a" or "b"'),
        ({"type": "array", "items": {"$ref": "#/$defs/Stage"}}, "list of Stage"),
    ],
)
def test_types_in_words(hooks, field, words):
    assert hooks._type_of(field) == words


@pytest.mark.parametrize(
    ("text", "cell"), [("a|b {x}", r"a\|b &#123;x}"), ("`a_b` <c>", "`a_b` &lt;c&gt;"), ("a`b", "a'b")]
)
def test_names_in_cells_are_no_markup(hooks, text, cell):
    assert hooks._cell(text) == cell


def test_every_public_name_is_on_the_page_of_the_api():
    named = set(re.findall(r"^::: rsi_deploy\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.M))
    assert named == set(rsi_deploy.__all__) - {"__version__"}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r": ([\w/-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"), re.M))
    assert listed == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
