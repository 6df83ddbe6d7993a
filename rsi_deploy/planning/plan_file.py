"""plan.json: what becomes of every site, written by a planner, read, edited and checked again.

{
  "schema_version": 1,
  "tool": "rsi-deploy 0.2.0",
  "source_hash": "3f1c...",                                   optional: of the model it was made for
  "sites": {
    "features.3": {"form": "channel", "rank": 24},            "reason" may be added
    "classifier": {"form": "dense", "reason": "excluded by --exclude classifier"}
  }
}
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import pydantic

from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.atomic import FULL_DISK, write_text
from rsi_deploy.io.documents import read_document

SCHEMA_VERSION: Literal[1] = 1
SHOWN = 5  # problems that one message names

PlannedForm: TypeAlias = Literal["dense", "matmul", "gemm", "channel", "input", "separable"]


class PlannedSite(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """What becomes of one site.

    Attributes:
        form: "dense", or the form of its split.
        rank: of the split, at least 1; None for dense.
        reason: why, in words a user reads.
    """

    form: PlannedForm
    rank: int | None = pydantic.Field(default=None, ge=1)
    reason: str = ""

    @pydantic.model_validator(mode="after")
    def _rank_fits_form(self) -> Self:
        if self.form == "dense" and self.rank is not None:
            raise ValueError(f'form "dense" has no rank, but got {self.rank}; take the rank away or name a form')
        if self.form != "dense" and self.rank is None:
            raise ValueError(f'form "{self.form}" needs a rank; add "rank": N with N of at least 1')
        return self


class Plan(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """A whole plan, as plan.json holds it.

    Attributes:
        schema_version: of the file.
        tool: name and version of what wrote it.
        source_hash: the sha256 of the weights it was made for, as report.json has it; None where nobody said.
        sites: by name; those that are not named stay dense.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    source_hash: str | None = None
    sites: dict[str, PlannedSite]


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write `plan` to `path`: whole, or not at all. What stood there is replaced; whether it may be is the caller's.

    Raises:
        UsageError: a folder that cannot be written to.
        OSError: a full disk.
    """
    path = Path(path)
    document: dict[str, Any] = plan.model_dump(exclude_none=True)
    for site in document["sites"].values():
        if not site["reason"]:
            del site["reason"]
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    try:
        write_text(path, text)
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UsageError(f"cannot write {path}: {error.strerror}; choose another name") from error


def read_plan(path: str | Path) -> Plan:
    """Read a plan.

    Raises:
        UsageError: no such file, not JSON, another version, keys that are not known, or sites that make no sense; the
            first few problems are named, each with what came and what to write.
    """
    path = Path(path)
    try:
        document = json.loads(read_document(path), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}; expected a plan.json") from error
    except _DuplicateError as error:
        raise UsageError(f"plan {path} says {error} twice; keep one of them") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"plan {path} is not JSON: {error}; expected a plan.json") from error
    if not isinstance(document, dict):
        raise UsageError(f'plan {path} must be an object with "schema_version" and "sites", but got {_shown(document)}')
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        came = _shown(version) if "schema_version" in document else "none"
        raise UsageError(
            f'plan {path}: expected "schema_version": {SCHEMA_VERSION}, but got {came}; '
            "make the plan with this version of rsi-deploy"
        )
    try:
        # As JSON, so that the strict types are those of JSON.
        return Plan.model_validate_json(json.dumps(document))
    except pydantic.ValidationError as error:
        raise UsageError(f"plan {path}: " + _listed([_problem(detail) for detail in error.errors()])) from error


def check_plan(plan: Plan, sites: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, PlannedSite]:
    """Hold a plan against the sites of a model.

    Args:
        plan: as read.
        sites: `(name, {form: largest rank})` of every site, in graph order; no forms where a site can only be dense.

    Returns:
        What becomes of every site, in graph order, each with a reason; those that the plan leaves out stay dense.

    Raises:
        UsageError: sites that the model does not have, forms that a site cannot take, ranks above the form's full rank;
            the first few are named, each with what came and what is possible.
    """
    known = dict(sites)
    if problems := [problem for name, site in plan.sites.items() if (problem := _misfit(name, site, known))]:
        raise UsageError("the plan does not fit the model: " + _listed(problems))
    result = {}
    for name in known:
        site = plan.sites.get(name, PlannedSite(form="dense", reason="not in the plan"))
        result[name] = site if site.reason else site.model_copy(update={"reason": "as the plan says"})
    return result


def _misfit(name: str, site: PlannedSite, known: Mapping[str, Mapping[str, int]]) -> str:
    """What is wrong with one site of a plan, with what is possible; empty where nothing is."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:3]
        hint = f"near are {', '.join(near)}" if near else "it has none"
        return f"site {name!r} is not in the model ({hint}); take it out of the plan"
    if site.rank is None:
        return ""
    forms = known[name]
    if not forms:
        return f'site {name!r} cannot be split, but got form "{site.form}"; write "form": "dense" without a rank'
    possible = ", ".join(f'"{form}" up to rank {full}' for form, full in forms.items())
    if site.form not in forms:
        return f'site {name!r} cannot take the form "{site.form}"; possible are {possible}, or "dense"'
    if site.rank > forms[site.form]:
        return f'site {name!r} cannot have rank {site.rank} as "{site.form}"; possible are {possible}, or "dense"'
    return ""


class _DuplicateError(ValueError):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise _DuplicateError(json.dumps(key))
        result[key] = value
    return result


def _problem(detail: Any) -> str:
    """One of pydantic's findings in words: where, what came, what was expected."""
    where = [str(part) for part in detail["loc"]]
    of_site = len(where) > 1 and where[0] == "sites"
    place = ", ".join([f"site {where[1]!r}", *map(repr, where[2:])]) if of_site else repr(where[0])
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = ", ".join((PlannedSite if of_site else Plan).model_fields)
        return f"{place}: unknown key; known are {known}"
    if kind == "value_error":
        return f"{place}: {detail['ctx']['error']}"
    if kind == "missing":
        return f"{place}: missing; add it"
    return f"{place}: {detail['msg'].lower()}, but got {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more
