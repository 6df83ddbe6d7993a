"""Options of the command line, made from the fields of a verb's settings.

    @click.command(cls=Verb)
    @settings_options(ExportConfig)
    def export(settings: ExportConfig, ...): ...

`--help` shows the options that everybody needs, in panels; `--help-all` shows all.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import click
from click.core import ParameterSource
from pydantic.fields import FieldInfo

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.base import Settings, annotations, flag_of, option_of, quantity_of
from rsi_deploy.core.settings.recipe import read_recipe

F = TypeVar("F", bound=Callable[..., Any])
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
WIDTH, COLUMN = 120, 32
"""Widest help text, and its widest column of options, in characters."""


class VerbOption(click.Option):
    """An option that has a panel.

    Attributes:
        panel: heading in the help.
        first: whether `--help` shows it.
        unless: name of a parameter without which this option is required; "" for an option that never is.
    """

    def __init__(self, *args: Any, panel: str = "Output", first: bool = True, unless: str = "", **how: Any):
        super().__init__(*args, **how)
        self.panel, self.first, self.unless = panel, first, unless

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Return the row of the help; an on/off pair shows the half that changes something."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts:
            return record
        return ", ".join(self.secondary_opts if self.default else self.opts), record[1]


class Verb(click.Command):
    """A command whose help has panels, and whose options may be required together."""

    def __init__(self, *args: Any, **how: Any):
        how.setdefault("context_settings", {"max_content_width": WIDTH})
        super().__init__(*args, **how)
        if any(not getattr(option, "first", True) for option in self.params):
            self.params.append(
                VerbOption(
                    ["--help-all"],
                    is_flag=True,
                    expose_value=False,
                    is_eager=True,
                    callback=_show_all,
                    panel="Help",
                    help="Show every option, and exit.",
                )
            )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and refuse one that lacks a required option."""
        rest = super().parse_args(ctx, args)
        for param in self.params:
            is_needed = isinstance(param, VerbOption) and param.unless and not ctx.params.get(param.unless)
            if is_needed and ctx.params.get(param.name or "") is None and not ctx.resilient_parsing:
                ctx.fail(f"Missing option {' / '.join(map(repr, param.opts))}; add it to the command")
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, panel by panel."""
        shows_all = ctx.meta.get(__name__, False)
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record is not None and (shows_all or getattr(param, "first", True)):
                panels.setdefault(getattr(param, "panel", "Help"), []).append(record)
        panels["Help"] = panels.pop("Help")
        width = min(COLUMN, max(len(name) for records in panels.values() for name, _ in records))
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), words) for name, words in records], col_max=COLUMN)


def _show_all(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[__name__] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def option(*names: str, **how: Any) -> Callable[[F], F]:
    """Declare an option that is no setting, such as where the output goes."""
    return click.option(*names, cls=VerbOption, **how)


def settings_options(config: type[Settings], *, recipe: bool = False) -> Callable[[F], F]:
    """Give a verb the options of its settings; it is called with `settings`, an object of `config`.

    Args:
        config: settings of the verb.
        recipe: also read them from `--recipe FILE`; the verb's MODEL may stand there.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def verb(*args: Any, **given: Any) -> Any:
            context = click.get_current_context()
            values = {name: given.pop(name) for name in config.model_fields if name in given}
            typed = {n: value for n, value in values.items() if _is_typed(context, n)}
            file = given.pop("recipe", None)
            written = {} if file is None else read_recipe(file, context.command.name or "")
            model = written.pop("model", None)
            if given.get("model", "") is None:
                given["model"] = model
            return function(*args, settings=_settings(config, file, written, typed), **given)

        made: Any = verb
        if recipe:
            made = option(
                "--recipe",
                metavar="FILE.toml",
                help="Read MODEL and settings from a recipe, such as a bundle's recipe.toml. Options here win over it.",
            )(made)
        for name, field in reversed(list(_fields(config))):
            made = _option(name, field, _panel(config, name))(made)
        return made  # type: ignore[no-any-return]

    return decorate


def _settings(
    config: type[Settings], file: str | None, written: Mapping[str, Any], typed: Mapping[str, Any]
) -> Settings:
    """Return the settings of a recipe and of the options, which win.

    Raises:
        UsageError: a setting that cannot be meant; the message names the recipe if the fault is there.
    """
    try:
        return config.of(written, **typed)
    except UsageError as error:
        if file is None:
            raise
        try:
            config.of({name: value for name, value in written.items() if name not in typed})
        except UsageError as fault:
            if str(fault) == str(error):
                raise type(error)(f"--recipe {file}: {error}") from None
        raise


def _is_typed(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not ParameterSource.DEFAULT


def _fields(config: type[Settings]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the settings, panel by panel."""
    for names in config.panels().values():
        yield from ((name, config.model_fields[name]) for name in names)


def _panel(config: type[Settings], name: str) -> str:
    return next(panel for panel, names in config.panels().items() if name in names)


def help_of(field: FieldInfo) -> str:
    """Return the help of a field's option, with its default and its bounds."""
    quantity, default = quantity_of(field), field.default
    notes = [f"{words} {_bound(field, key):g}" for key, words in BOUNDS.items() if _bound(field, key) is not None]
    if field.is_required():
        notes.insert(0, "required")
    elif default not in (None, (), "") and not isinstance(default, bool):
        notes.insert(0, f"default: {quantity.to_text(default) if quantity else default}")
    words = option_of(field)["off"] if default is True else field.description
    return f"{words} ({'; '.join(notes)})" if notes else str(words)


def _option(name: str, field: FieldInfo, panel: str) -> Callable[[F], F]:
    """Make the option of one field."""
    how, quantity, default = option_of(field), quantity_of(field), field.default
    kind = _type_of(field)
    names = [*([how["short"]] if "short" in how else []), how.get("flag", flag_of(name)), name]
    kept: dict[str, Any] = {"help": help_of(field), "first": how.get("first", False)}
    if kind is bool:
        names[-2] = f"{names[-2]}/--no-{names[-2].removeprefix('--')}"
    else:
        metavar = how.get("metavar") or (quantity.example if quantity else None)
        kept |= {"type": kind, "metavar": metavar, "multiple": default == ()}
    if field.is_required():
        kept["unless"] = "recipe"
    elif default not in (None, ()):
        kept["default"] = default
    return option(*names, panel=panel, **kept)


def _bound(field: FieldInfo, key: str) -> float | None:
    return next((getattr(found, key) for found in annotations(field) if getattr(found, key, None) is not None), None)


def _type_of(field: FieldInfo) -> Any:
    """Return click's type of a field. The settings themselves check its bounds."""
    if quantity_of(field) is not None:
        return click.STRING
    is_union = get_origin(field.annotation) in (Union, UnionType)
    kinds = [kind for kind in (get_args(field.annotation) if is_union else (field.annotation,)) if kind is not NoneType]
    words = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())
    if words:
        return click.Choice(words) if len(kinds) == 1 else _NumberOrWord(words)
    return {int: click.INT, float: click.FLOAT, bool: bool}.get(kinds[0], click.STRING)


class _NumberOrWord(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A number, or one of some words; the settings check the number."""

    def __init__(self, words: tuple[str, ...]):
        self.name = "|".join(["number", *words])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number or the word as it is."""
        return value
