"""What exports of one model with the same data have in common, kept in a folder between them: `sweep` makes many.

    options.json     every site's options: what each form and rank costs and loses, from one calibration
    accuracy.json    of the dense model
    size.json        of the dense model as the user has it
    in memory        what every site's errors do to the outputs, by gradients; the dense model's answers on the data

They hold for one key: what they were found for, model, data and settings, in one text (`key.txt`). What was kept for
another is dropped.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from rsi_deploy.calibration.activations import OutputSensitivity
from rsi_deploy.core.model_size import Size
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.io.atomic import write_text
from rsi_deploy.io.documents import read_document
from rsi_deploy.planning.knapsack import Option, SiteOptions


@dataclass(kw_only=True)
class SweepCache:
    """A folder of what was found before.

    Attributes:
        folder: where it lies.
        metrics: of the sites; None before any were found.
        answers: float32, of the dense model on the first samples of the calibration data; None before it was asked.
    """

    folder: Path
    sensitivities: Mapping[str, OutputSensitivity] | None = None
    answers: npt.NDArray[Any] | None = None

    @classmethod
    def of(cls, folder: Path, key: str) -> "SweepCache":
        """What `folder` keeps for this key; the folder is made where it is not there."""
        folder.mkdir(parents=True, exist_ok=True)
        told = folder / "key.txt"
        if not told.is_file() or told.read_text(encoding="utf-8") != key:
            for name in ("options.json", "accuracy.json", "size.json"):
                (folder / name).unlink(missing_ok=True)
            write_text(told, key)
        return cls(folder=folder)

    def options(self) -> tuple[list[SiteOptions], dict[str, str]] | None:
        """The sites' options, and site name -> why it was declined; None where none are kept."""
        path = self.folder / "options.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        sites = [
            SiteOptions(name=site["name"], options=tuple(Option(**option) for option in site["options"]))
            for site in stored["sites"]
        ]
        return sites, dict(stored["declined"])

    def keep_options(self, sites: Sequence[SiteOptions], declined: Mapping[str, str]) -> None:
        """Keep them."""
        self._write("options.json", json.dumps({"sites": [asdict(s) for s in sites], "declined": dict(declined)}))

    def accuracy(self) -> AccuracyResult | None:
        """The dense model's; None where it is not kept."""
        path = self.folder / "accuracy.json"
        return AccuracyResult.model_validate_json(read_document(path)) if path.is_file() else None

    def keep_accuracy(self, accuracy: AccuracyResult | None) -> None:
        """Keep it, where there is one."""
        if accuracy is not None:
            self._write("accuracy.json", accuracy.model_dump_json())

    def size(self) -> Size | None:
        """The dense model's, as the user has it; None where it is not kept."""
        path = self.folder / "size.json"
        return Size.model_validate_json(read_document(path)) if path.is_file() else None

    def keep_size(self, size: Size) -> None:
        """Keep it."""
        self._write("size.json", size.model_dump_json())

    def _write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)
