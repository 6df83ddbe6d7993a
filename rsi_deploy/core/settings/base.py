"""What a setting is: a field of a frozen pydantic model, made by `setting`.

class KernelConfig(Settings, panel="Kernel"):
    oversampling: int = setting(0, "Extra sketch columns.", ge=0)

--oversampling INTEGER RANGE    on the command line, in the panel "Kernel"
oversampling=8                  in Python, and in a recipe
"""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, get_args

import pydantic

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.units import (
    duration_text,
    parse_nanoseconds,
    parse_percent,
    parse_perplexity,
    parse_seconds,
    parse_share,
    parse_size,
    share_text,
    size_text,
)


class Quantity:
    """A kind of value that users type as text.

    Attributes:
        example: metavar on the command line.
        keyword: type of the Python keyword.
        to_text: function that spells a value as `parse` reads it.
    """

    def __init__(self, example: str, keyword: str, to_text: Any = str):
        self.example, self.keyword, self.to_text = example, keyword, to_text


def _reader(parse: Any) -> pydantic.BeforeValidator:
    """A validator that gives a parser the value and the name of its option."""
    return pydantic.BeforeValidator(lambda value, info: parse(value, flag_of(info.field_name)))


def _path(value: Any, _: str) -> Any:
    """A path as text; objects in memory stay as they are."""
    return str(value) if isinstance(value, Path) else value


def _texts(value: Any, option: str) -> Any:
    """One text is a list of one; a shape in numbers becomes a text."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        raise UsageError(f"{option} takes texts, but got {value!r}")
    sizes = tuple(value)
    return ("x".join(map(str, sizes)),) if sizes and all(isinstance(size, int) for size in sizes) else sizes


def _numbers(value: Any, option: str) -> Any:
    """Read `0.485,0.456,0.406`."""
    try:
        return tuple(float(part) for part in (value.split(",") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        raise UsageError(
            f"{option} takes numbers joined by commas, such as 0.485,0.456,0.406, but got {value!r}"
        ) from None


def _counts(value: Any, option: str) -> Any:
    """Read `1,8`."""
    parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else [str(part) for part in value]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} takes numbers of 1 or more joined by commas, such as 1,8, but got {value!r}")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _pixels(value: Any, option: str) -> Any:
    """Read `224`, `224x224` or `none`."""
    parts = str(value).lower().split("x") if isinstance(value, str | int) else [str(part) for part in value]
    if parts == ["none"]:
        return "none"
    if not 1 <= len(parts) <= 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} takes pixels such as 224 or 224x224, or none, but got {value!r}")
    sizes = tuple(int(part) for part in parts)
    return sizes[0] if len(sizes) == 1 else sizes


def _has_unit(value: Any) -> bool:
    return isinstance(value, str) and value.strip()[-1:].isalpha()


def _pixels_text(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


Share = Annotated[float, _reader(parse_share), Quantity("0.5|50%", "str | float", share_text)]
"""A fraction in (0, 1]."""
Size = Annotated[int, _reader(parse_size), Quantity("SIZE", "str | int", size_text)]
"""Bytes."""
Latency = Annotated[int, _reader(parse_nanoseconds), Quantity("25ms", "str", duration_text)]
"""Nanoseconds of a call."""
Seconds = Annotated[
    float, _reader(parse_seconds), Quantity("TIME", "str | float", lambda value: duration_text(round(1e9 * value)))
]
SecondsOrOff = Annotated[
    float,
    _reader(lambda value, option: 0.0 if value in (0, "0", "off") else parse_seconds(value, option)),
    Quantity("TIME|off", "str | float", lambda value: duration_text(round(1e9 * value)) if value else "off"),
]
"""Seconds; 0 turns off what they are for."""
Percent = Annotated[
    float,
    _reader(lambda value, option: parse_percent(value, option) if isinstance(value, str) else value),
    Quantity("5%", "str | float", lambda value: f"{value:g}%"),
]
"""A number of percent."""
OutputError = Annotated[
    float,
    _reader(
        lambda value, option: (
            parse_percent(value, option) / 100 if isinstance(value, str) and value.strip().endswith("%") else value
        )
    ),
    Quantity("0.03|3%", "str | float", lambda value: f"{100 * value:.10g}%"),
]
"""A fraction of 0 or more."""
Perplexity = Annotated[str, _reader(parse_perplexity), Quantity("+5%|25", "str | float")]
"""A share by which the perplexity may rise, or the largest perplexity, as text."""
Milliseconds = Annotated[
    float,
    _reader(lambda value, option: parse_nanoseconds(value, option) / 1e6 if _has_unit(value) else value),
    Quantity("MS", "str | float", lambda value: f"{value:g}ms"),
]
"""Milliseconds, which are also the unit of a bare number."""
Text = Annotated[str, pydantic.BeforeValidator(str)]
"""A text that the planner reads, such as a rank."""
FileName = Annotated[str, _reader(_path), Quantity("FILE", "str | Path")]
"""A path as the user wrote it; relative paths start at the working directory."""
DataSource = Annotated[Any, _reader(_path), Quantity("DATA", "Any")]
"""A path, or an object in memory, which a recipe cannot hold."""
Texts = Annotated[tuple[str, ...], _reader(_texts), Quantity("TEXT", "str | Sequence[str]", list)]
Shapes = Annotated[tuple[str, ...], _reader(_texts), Quantity("1x3x32x32", "str | Sequence[str] | Sequence[int]", list)]
Counts = Annotated[
    tuple[int, ...], _reader(_counts), Quantity("1,8", "str | Sequence[int]", lambda value: ",".join(map(str, value)))
]
"""Numbers of 1 or more."""
Numbers = Annotated[tuple[float, ...], _reader(_numbers), Quantity("M,M,M", "str | Sequence[float]", list)]
Pixels = Annotated[Any, _reader(_pixels), Quantity("N|HxW|none", "str | int | tuple[int, int]", _pixels_text)]


def setting(default: Any, help_text: str, *, option: Mapping[str, Any] | None = None, **bounds: Any) -> Any:
    """Declare a setting.

    Args:
        default: its value where nobody sets it; `...` makes it required.
        help_text: one line for `--help`, the schema and the reference page.
        option: what the command line cannot derive: `flag`, `short`, `metavar`, `keyword` (type of the Python keyword),
            `first` (shown by `--help`, not only by `--help-all`), `off` (help of the negated flag).
        bounds: `ge`, `gt`, `le` or `lt`.
    """
    extra: Any = {"option": dict(option)} if option else None
    return pydantic.Field(default, description=help_text, json_schema_extra=extra, **bounds)


class Settings(pydantic.BaseModel, frozen=True, extra="forbid"):
    """Settings that belong together.

    Attributes:
        panel: heading of their options in `--help`.
        exclusive: settings of which one replaces the others.
    """

    panel: ClassVar[str] = ""
    exclusive: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, panel: str = "", **options: Any) -> None:
        """Keep the panel of this class."""
        super().__init_subclass__(**options)
        cls.panel = panel

    @classmethod
    def of(cls, start: "Self | Mapping[str, Any] | None" = None, /, **changes: Any) -> Self:
        """Return settings made of a base and of changes, which win.

        Raises:
            UsageError: an unknown name, or a value that cannot be meant.
        """
        base = {} if start is None else start.spelled() if isinstance(start, Settings) else dict(start)
        if any(name in changes for name in cls.exclusive):
            base = {name: value for name, value in base.items() if name not in cls.exclusive}
        values = {name: value for name, value in (base | changes).items() if value is not None or name in changes}
        for name in values:
            if name not in cls.model_fields:
                near = difflib.get_close_matches(name, (*cls.model_fields, "model", "verb"), n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(cls.model_fields)}"
                raise UsageError(f"unknown setting {name!r}; {hint}")
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except pydantic.ValidationError as error:
            problem = error.errors()[0]
            option = flag_of(str(problem["loc"][0]))
            if problem["type"] == "missing":
                raise UsageError(f"Missing option '{option}'; add {option} VALUE") from None
            raise UsageError(f"{option} must be {_expected(problem)}, but got {problem['input']!r}") from None

    def chosen(self) -> dict[str, Any]:
        """Return the values that were set, without defaults."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}

    def spelled(self) -> dict[str, Any]:
        """Return the values that were set, numbers with their units: `parse` may refuse a bare number."""
        found = self.chosen()
        for name, value in found.items():
            quantity = quantity_of(type(self).model_fields[name])
            if quantity is not None and isinstance(value, int | float):
                found[name] = quantity.to_text(value)
        return found

    def keywords(self, *, without: type["Settings"] | None = None) -> dict[str, Any]:
        """Return every value by name, but those that `without` knows, too."""
        left_out = () if without is None else without.model_fields
        return {name: getattr(self, name) for name in type(self).model_fields if name not in left_out}

    def part(self, other: type["Settings"]) -> dict[str, Any]:
        """Return the values that were set and that `other` knows, too."""
        return {name: value for name, value in self.chosen().items() if name in other.model_fields}

    @classmethod
    def panels(cls) -> dict[str, list[str]]:
        """Return the names of the settings by panel, in order."""
        found: dict[str, list[str]] = {}
        bases = [base for base in (*cls.__bases__, cls) if issubclass(base, Settings)]
        for base in bases:
            for name in base.model_fields:
                if all(name not in names for names in found.values()):
                    found.setdefault(base.panel, []).append(name)
        return found


def flag_of(name: str | None) -> str:
    """Return the option of a setting as it is typed.

    Example:
        >>> flag_of("keep_macs")
        '--keep-macs'
    """
    return "--" + (name or "").replace("_", "-")


def option_name(name: str, field: pydantic.fields.FieldInfo) -> str:
    """Return the option that changes a setting: of an on/off pair the one that is not the default.

    Example:
        >>> from rsi_deploy.core.settings.verbs import ExportConfig
        >>> option_name("measure", ExportConfig.model_fields["measure"])
        '--no-bench'
    """
    plain = str(option_of(field).get("flag", flag_of(name)))
    return f"--no-{plain.removeprefix('--')}" if field.default is True else plain


def option_of(field: pydantic.fields.FieldInfo) -> dict[str, Any]:
    """Return what `setting` declares for the command line."""
    extra = field.json_schema_extra
    return dict(extra.get("option", {})) if isinstance(extra, dict) else {}  # type: ignore[arg-type]


def quantity_of(field: pydantic.fields.FieldInfo) -> Quantity | None:
    """Return the kind of quantity that a field holds; None for plain types."""
    return next((found for found in annotations(field) if isinstance(found, Quantity)), None)


def annotations(field: pydantic.fields.FieldInfo) -> Iterator[Any]:
    """Yield the metadata of a field's type: bounds and quantities, also within `X | None`."""
    yield from field.metadata
    for part in (field.annotation, *get_args(field.annotation)):
        yield from getattr(part, "__metadata__", ())


def _expected(problem: Any) -> str:
    """Return what was expected, in words."""
    words = {
        "greater_than_equal": "at least {ge:g}",
        "greater_than": "above {gt:g}",
        "less_than_equal": "at most {le:g}",
        "less_than": "below {lt:g}",
        "literal_error": "{expected}",
    }.get(problem["type"])
    found = words.format(**problem.get("ctx", {})) if words else problem["msg"].removeprefix("Input should be ")
    return str(found).replace("'", "")
