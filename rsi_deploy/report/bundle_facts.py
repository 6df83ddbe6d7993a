"""The few fields of report.json that `serve` and `package` need. Reading them needs no torch."""

from pathlib import Path
from typing import Annotated, Literal

import pydantic

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.io.manifest import check_inner_name
from rsi_deploy.report.json_files import read_json


class _Part(pydantic.BaseModel, frozen=True, extra="ignore"):
    pass


class BundleSource(_Part):
    """The dense model: its name as the user typed it."""

    model: str = "model"


class BundleSettings(_Part):
    """The settings of the export: the random seed of the probe inputs."""

    seed: int = 0


class BundleFacts(_Part):
    """Fields of `rsi_deploy.report.schema.Report`, with the same meaning."""

    schema_version: Literal[1]
    source: BundleSource = BundleSource()
    settings: BundleSettings = BundleSettings()
    files: dict[Annotated[str, pydantic.AfterValidator(check_inner_name)], str]
    preprocessing: Preprocessing | None = None
    probe_shapes: dict[str, tuple[int, ...]] = pydantic.Field(default_factory=dict)


def read_bundle_facts(folder: str | Path) -> BundleFacts:
    """Return the facts of the bundle in `folder`.

    Raises:
        UsageError: `folder` is no bundle.
        ModelError: this version cannot read the report.
    """
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no bundle: it has no report.json; type the folder that export wrote")
    return read_json(path, BundleFacts, "report of schema version 1")
