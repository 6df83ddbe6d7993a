"""YAML for configs. Values are written as JSON, which all YAML parsers read in the same way."""

import json
from collections.abc import Mapping
from typing import Any


def yaml_text(value: Mapping[str, Any], depth: int = 0) -> str:
    """Return nested mappings and lists of mappings as YAML, with other values as JSON.

    Example:
        >>> print(yaml_text({"a": {"b": 1, "c": "no"}, "d": [{"e": [1, 2]}]}), end="")
        a:
          b: 1
          c: "no"
        d:
          - e: [1, 2]
    """
    lines, pad = [], "  " * depth
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            lines.append(f"{pad}{key}:\n{yaml_text(item, depth + 1)}")
        elif isinstance(item, list) and item and isinstance(item[0], Mapping):
            blocks = [yaml_text(block, depth + 2) for block in item]
            lines.append(f"{pad}{key}:\n" + "".join(f"{pad}  - {block.lstrip()}" for block in blocks))
        else:
            lines.append(f"{pad}{key}: {json.dumps(item)}\n")
    return "".join(lines)
