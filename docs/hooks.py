"""Tables of the reference pages that are made from the code whenever the documentation is built.

A page holds a line `{{ error_table }}`, `{{ report_schema }}` or `{{ settings }}`; this hook puts the tables there.
"""

import html
import json
from typing import Any

from rsi_deploy.cli.derived import help_of
from rsi_deploy.core.error_table import read_errors
from rsi_deploy.core.settings.base import option_name
from rsi_deploy.core.settings.verbs import CONFIGS
from rsi_deploy.report.schema import Report


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The Markdown of a page with its tables."""
    for marker, make in MAKERS.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """The HTML of a page; mkdocs-click shows click's own word for an option without default, which says nothing."""
    return content.replace("<code>Sentinel.UNSET</code>", "")


def error_table() -> str:
    """Every error: how it ends, when it comes, what to type; then what each class of errors means."""
    listing = read_errors()
    rows = [[f"{row.ends} {row.kind}", row.when, row.to_type] for row in listing.errors]
    kinds = [[f"`{kind}`", meaning] for kind, meaning in listing.kinds.items()]
    errors = _table(["ends with", "when", "what to type, or what was expected"], rows)
    return f"{errors}\n\n## What each class means\n\n{_table(['class', 'meaning'], kinds)}"


def report_schema() -> str:
    """One table of fields for each object of report.json, and the JSON schema in full."""
    schema = Report.model_json_schema()
    objects = {"report.json": schema, **schema["$defs"]}
    parts = [f"## {name}\n\n{_fields(definition)}" for name, definition in objects.items()]
    text = json.dumps(schema, indent=2)
    return "\n\n".join([*parts, "## The JSON schema", f"```json\n{text}\n```"])


def settings() -> str:
    """One table of settings for each verb that has an object of them."""
    parts = []
    for verb, config in CONFIGS.items():
        rows = [
            [f"`{name}`", panel, f"`{option_name(name, field)}`", help_of(field)]
            for panel, names in config.panels().items()
            for name, field in ((name, config.model_fields[name]) for name in names)
        ]
        parts.append(f"### Settings of {verb}\n\n{_table(['setting', 'group', 'option', 'meaning'], rows)}")
    return "\n\n".join(parts)


def _fields(definition: dict[str, Any]) -> str:
    described = _described(definition.get("description", ""))
    rows = [
        [f"`{name}`", f"`{_type_of(field)}`", described.get(name, "")]
        for name, field in definition.get("properties", {}).items()
    ]
    summary = definition.get("description", "").split("\n")[0]
    return f"{_cell(summary)}\n\n{_table(['field', 'type', 'meaning'], rows)}" if rows else _cell(summary)


def _described(docstring: str) -> dict[str, str]:
    """Meaning of each attribute in a Google docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.partition("Attributes:")[2].splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        key, colon, meaning = text.partition(":")
        if colon and indent <= 4 and all(part.strip().isidentifier() for part in key.split(",")):
            name = key
            for part in key.split(","):
                found[part.strip()] = meaning.strip()
        elif text and name:
            for part in name.split(","):
                found[part.strip()] += f" {text}"
    return found


def _type_of(field: dict[str, Any]) -> str:
    """A JSON schema's type in a few words.

    >>> _type_of({"anyOf": [{"type": "integer"}, {"type": "null"}]})
    'integer or null'
    """
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if "anyOf" in field:
        return " or ".join(_type_of(part) for part in field["anyOf"])
    if "enum" in field or "const" in field:
        return " or ".join(json.dumps(value) for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type_of(field['items'])}" if "items" in field else "list"
    return str(field.get("type", "any"))


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """Text for a cell of a table: one line, no bars, and no markup but code (`{name}` would be an attribute list)."""
    flat = " ".join(text.split()).replace("|", "\\|")
    pieces = flat.split("`")
    if len(pieces) % 2 == 0:  # an odd backtick opens nothing
        return html.escape(flat.replace("`", "'"), quote=False).replace("{", "&#123;")
    plain = [
        html.escape(piece, quote=False).replace("*", "\\*").replace("_", "\\_").replace("{", "&#123;")
        for piece in pieces[::2]
    ]
    code = [f"`{piece}`" for piece in pieces[1::2]]
    return "".join(part for pair in zip(plain, [*code, ""], strict=True) for part in pair)


MAKERS = {"{{ error_table }}": error_table, "{{ report_schema }}": report_schema, "{{ settings }}": settings}
