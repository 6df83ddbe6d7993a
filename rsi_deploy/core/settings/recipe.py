"""Recipes: the settings of one run as a TOML file, which makes it again.

    rsi-deploy export --recipe recipe.toml -o DIR

    verb = "export"
    model = "samples.digits:cnn"
    # Size
    rank = "25%"

Keys are the names of the settings. Paths stay as the user wrote them: relative ones start at the working directory, as
on the command line. Options on the command line win over the recipe.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import Settings, quantity_of

RECIPE = "recipe.toml"
"""Name of the recipe in a bundle."""
VERBS = ("export", "sweep")
"""Verbs that take a recipe."""
LARGEST = 1 << 20
"""Bytes of a recipe; written ones have some thousand."""


def read_recipe(path: str | Path, verb: str) -> dict[str, Any]:
    """Read the settings of a recipe, with "model" among them where it names one.

    Raises:
        UsageError: no such file, no TOML, a recipe of another verb, or a MODEL that is no text.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UsageError(f"--recipe {path} has more than {LARGEST >> 20} MiB; expected a TOML file of settings")
        found = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise UsageError(
            f"--recipe {path}: {error.strerror}; expected a TOML file such as a bundle's {RECIPE}"
        ) from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f'--recipe {path} is not TOML: {error}; write for example rank = "25%"') from None
    recipe_verb = found.pop("verb", verb)
    if recipe_verb not in (verb, *VERBS):
        raise UsageError(
            f'--recipe {path}: verb must be {" or ".join(VERBS)}, but got {recipe_verb!r}; write verb = "{verb}"'
        )
    if recipe_verb != verb:
        raise UsageError(f"--recipe {path} is for {recipe_verb}; type rsi-deploy {recipe_verb} --recipe {path}")
    if not isinstance(model := found.get("model", ""), str):
        raise UsageError(
            f'--recipe {path}: model must be a text, but got {model!r}; write for example model = "net.onnx"'
        )
    return {name.replace("-", "_"): value for name, value in found.items()}


def recipe_text(verb: str, model: object, settings: Settings) -> str:
    """Return the recipe of a run: every setting that has a value, by panel.

    Args:
        verb: the verb.
        model: its MODEL; an object in memory becomes a comment.
        settings: its settings.
    """
    lines = [f"# Run it again: rsi-deploy {verb} --recipe {RECIPE} -o DIR", f'verb = "{verb}"', *_line("model", model)]
    for panel, names in type(settings).panels().items():
        entries = [line for name in names for line in _line(name, _shown(settings, name))]
        lines += ["", f"# {panel}", *entries] if entries else []
    return "\n".join(lines) + "\n"


def _shown(settings: Settings, name: str) -> Any:
    """Return a value as users type it."""
    value = getattr(settings, name)
    quantity = quantity_of(type(settings).model_fields[name])
    return value if quantity is None or not isinstance(value, str | int | float | tuple) else quantity.to_text(value)


def _line(name: str, value: Any) -> list[str]:
    if value is None or (isinstance(value, list) and not value):
        return []
    text = _toml(value)
    return [f"{name} = {text}" if text else f"# {name} was an object in memory: name a file here"]


def _toml(value: Any) -> str:
    """Return a value in TOML; "" for an object that TOML cannot hold."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return ""
