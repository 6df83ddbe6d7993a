"""plan.json: the form, rank and bits of every site, written by a planner and editable by hand.

{
  "schema_version": 1,
  "tool": "rsi-deploy 0.2.0",
  "source_hash": "3f1c...",                                   optional: hash of the model's weights
  "sites": {
    "features.3": {"form": "channel", "rank": 24},            "reason" may be added
    "classifier": {"form": "dense", "reason": "excluded by --exclude classifier", "bits": 8}
  },
  "scheme": "static int8 (minmax)",                           with a precision: how onnxruntime computes the model
  "tables": {"word_embeddings": 4}                            bits of embedding tables
}
"""

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import pydantic

from graph_passes.forms import Form
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io.atomic import FULL_DISK, write_text
from rsi_deploy.io.documents import read_document

SCHEMA_VERSION: Literal[1] = 1
SHOWN = 5  # largest number of problems in one message

PlannedForm: TypeAlias = Literal["dense", Form]


class PlannedSite(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """The plan for one site.

    Attributes:
        form: "dense", or the form of the split.
        rank: rank of the split, at least 1; None for dense.
        bits: bits in which the weight, or both factors, are stored; None for float32.
        repair: rank of the low-rank repair of a weight in few bits; None for none.
        products: "float32" for a site that a model in int8 computes in float32; None otherwise.
        reason: reason for users.
    """

    form: PlannedForm
    rank: int | None = pydantic.Field(default=None, ge=1)
    bits: Literal[3, 4, 5, 8] | None = None
    repair: int | None = pydantic.Field(default=None, ge=1)
    products: Literal["float32"] | None = None
    reason: str = ""

    @pydantic.model_validator(mode="after")
    def _rank_fits_form(self) -> Self:
        if self.form == "dense" and self.rank is not None:
            raise ValueError(f'form "dense" has no rank, but got {self.rank}; remove the rank or name a form')
        if self.form != "dense" and self.rank is None:
            raise ValueError(f'form "{self.form}" needs a rank; add "rank": N with N of at least 1')
        return self


class Plan(pydantic.BaseModel, frozen=True, extra="forbid", strict=True):
    """The content of plan.json.

    Attributes:
        schema_version: version of the file format.
        tool: name and version of the program that wrote the file.
        source_hash: sha256 of the model's weights, as in report.json; None if unknown.
        sites: plans by site name; sites without one stay dense.
        scheme: name of the way in which onnxruntime computes the model; None if an export chooses it.
        tables: bits of embedding tables by name.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    tool: str
    source_hash: str | None = None
    sites: dict[str, PlannedSite]
    scheme: str | None = None
    tables: dict[str, Literal[4, 8]] = {}

    @property
    def has_bits(self) -> bool:
        """Return whether the plan is of a model in low precision."""
        return self.scheme is not None or any(site.bits is not None for site in self.sites.values())


def write_plan(path: str | Path, plan: Plan) -> None:
    """Write `plan` to `path` atomically, replacing any file there.

    Raises:
        UsageError: the file cannot be written.
        OSError: the disk is full.
    """
    path = Path(path)
    document: dict[str, Any] = plan.model_dump(exclude_none=True)
    for site in document["sites"].values():
        if not site["reason"]:
            del site["reason"]
    if not document["tables"]:
        del document["tables"]
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
        UsageError: a missing file, invalid JSON, another version, unknown keys or invalid sites. The message names the
            first few problems, each with the value found and what to write.
    """
    path = Path(path)
    try:
        document = json.loads(read_document(path), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise UsageError(f"cannot read the plan {path}: {error.strerror}; expected a plan.json") from error
    except _DuplicateError as error:
        raise UsageError(f"plan {path} has the key {error} twice; keep one of them") from error
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
        # From JSON, because pydantic's strict types accept a list as a tuple there.
        return Plan.model_validate_json(json.dumps(document))
    except pydantic.ValidationError as error:
        raise UsageError(f"plan {path}: " + _listed([_problem(detail) for detail in error.errors()])) from error


def check_plan(plan: Plan, sites: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, PlannedSite]:
    """Check a plan against the sites of a model.

    Args:
        plan: plan to check.
        sites: `(name, {form: full rank})` of every site, in graph order; no forms for a site that cannot be split.

    Returns:
        The plan of every site in graph order, each with a reason; sites that the plan does not name are dense.

    Raises:
        UsageError: unknown sites, forms that a site cannot take, or ranks above full rank. The message names the first
            few problems, each with the value found and the possible ones.
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
    """Describe what is wrong with the plan for one site, and what is possible; "" if it fits."""
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[:3]
        hint = f"similar names: {', '.join(near)}" if near else "it has no sites"
        return f"site {name!r} is not in the model ({hint}); remove it from the plan"
    if site.rank is None:
        return ""
    forms = known[name]
    if not forms:
        return f'site {name!r} cannot be split, but got form "{site.form}"; write "form": "dense" without a rank'
    possible = ", ".join(f'"{form}" up to rank {full}' for form, full in forms.items())
    if site.form not in forms:
        return f'site {name!r} cannot have the form "{site.form}"; possible are {possible}, or "dense"'
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
    """Describe a validation error of pydantic: the place, the value found and the expected one."""
    where = [str(part) for part in detail["loc"]]
    in_site = len(where) > 1 and where[0] == "sites"
    place = ", ".join([f"site {where[1]!r}", *map(repr, where[2:])]) if in_site else repr(where[0])
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = ", ".join((PlannedSite if in_site else Plan).model_fields)
        return f"{place}: unknown key; known keys are {known}"
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
