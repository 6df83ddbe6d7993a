"""The keywords of the verbs' functions, for editors and type checkers: `python -m tests.release.keywords`

Writes `keywords.py` into the room of each verb, from the fields of its settings. tests/core/test_settings.py holds the
files to them.
"""

import re
import sys
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from rsi_deploy.core.settings.base import Settings, option_of, quantity_of
from rsi_deploy.core.settings.verbs import ExportConfig, SweepConfig

ROOT = Path(__file__).resolve().parents[2]
HEAD = '''"""The keywords of `{verb}`, made from the fields of `{config}` by `python -m tests.release.keywords`."""

'''
IMPORTS = {
    "Mapping": "from collections.abc import Mapping",
    "Sequence": "from collections.abc import Sequence",
    "Path": "from pathlib import Path",
    "Any": "from typing import Any",
    "Literal": "from typing import Literal",
    "TypedDict": "from typing import TypedDict",
    "npt": "import numpy.typing as npt",
    "Dataset": "from rsi_deploy.data.sources import Dataset",
    "MaxError": "from rsi_deploy.planning.planner import MaxError",
    "RankSpec": "from rsi_deploy.planning.planner import RankSpec",
}
FILES: dict[str, tuple[str, type[Settings]]] = {
    "rsi_deploy/exporting/keywords.py": ("export", ExportConfig),
    "rsi_deploy/sweeping/keywords.py": ("sweep", SweepConfig),
}


def keywords(verb: str, config: type[Settings]) -> str:
    """Return the module with the keywords of one verb."""
    lines = [f"class {verb.title()}Keywords(TypedDict, total=False):"]
    lines += [f'    """See `rsi_deploy.core.settings.verbs.{config.__name__}`."""', ""]
    for names in config.panels().values():
        lines += [f"    {name}: {_keyword(config, name)}" for name in names]
    return (
        HEAD.format(verb=verb, config=config.__name__) + _imports("\n".join(lines)) + "\n\n\n" + "\n".join(lines) + "\n"
    )


def _keyword(config: type[Settings], name: str) -> str:
    """Return the type of a keyword, as Python code."""
    field = config.model_fields[name]
    if "keyword" in (how := option_of(field)):
        return str(how["keyword"])
    if (quantity := quantity_of(field)) is not None:
        return quantity.keyword + (" | None" if field.default is None else "")
    return _code(field.annotation)


def _code(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _code(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return f"Literal[{', '.join(chr(34) + word + chr(34) for word in get_args(annotation))}]"
    if annotation in (int, float, bool, str):
        return str(annotation.__name__)
    if annotation is NoneType:
        return "None"
    return " | ".join(_code(part) for part in get_args(annotation))


def _imports(code: str) -> str:
    """Return the imports that the code needs, in ruff's order."""
    needed = [line for name, line in IMPORTS.items() if re.search(rf"\b{name}\b", code)]
    groups: dict[int, dict[str, list[str]]] = {0: {}, 1: {}, 2: {}}
    for line in needed:
        module, _, name = line.removeprefix("from ").partition(" import ")
        place = 2 if module.startswith("rsi_deploy") else 1 if line.startswith("import") else 0
        groups[place].setdefault(line if line.startswith("import") else module, []).append(name)
    texts = [
        "\n".join(
            key if key.startswith("import") else f"from {key} import {', '.join(sorted(names))}"
            for key, names in sorted(group.items())
        )
        for group in groups.values()
        if group
    ]
    return "\n\n".join(texts)


def main() -> int:
    """Write the files."""
    for file, (verb, config) in FILES.items():
        (ROOT / file).write_text(keywords(verb, config), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
