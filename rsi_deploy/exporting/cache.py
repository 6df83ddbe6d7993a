"""Results that exports of one model with the same data share, kept in a folder: `sweep` makes many such exports.

    options.json     the options of every site: cost and loss of each form and rank, from one calibration
    accuracy.json    accuracy of the dense model
    size.json        size of the dense model as the user has it
    made-N.onnx      the dense model in a precision
    in memory        effect of every site's errors on the outputs, by gradients; the dense model's outputs on the data

They hold for one key, a text that identifies model, data and settings (`key.txt`). Results of another key are deleted.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rsi_deploy.calibration.activations import OutputSensitivity
from rsi_deploy.calibration.output_agreement import PartOutputs
from rsi_deploy.core.model_size import Size
from rsi_deploy.evaluation.accuracy import AccuracyResult
from rsi_deploy.io.atomic import write_text
from rsi_deploy.io.documents import read_document
from rsi_deploy.io.onnx_file import move_model
from rsi_deploy.planning.knapsack import Option, SiteOptions


@dataclass(kw_only=True)
class SweepCache:
    """A folder of results that exports share.

    Attributes:
        folder: the folder.
        sensitivities: effect of every site's errors on the outputs; None before any were found.
        outputs: outputs of the dense model on each part of the calibration data; empty before the first run.
        inputs: second moments of the sites' inputs in the dense model; empty before the first run.
        points: the dense model in each precision that was tried, and as onnxruntime quantizes it.
    """

    folder: Path
    sensitivities: Mapping[str, OutputSensitivity] | None = None
    outputs: dict[str, PartOutputs] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    points: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, key: str) -> "SweepCache":
        """Return the results in `folder` for this key; the folder is created where it is missing."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "key.txt"
        if not file.is_file() or file.read_text(encoding="utf-8") != key:
            for name in ("options.json", "accuracy.json", "size.json"):
                (folder / name).unlink(missing_ok=True)
            write_text(file, key)
        return cls(folder=folder)

    def options(self) -> tuple[list[SiteOptions], dict[str, str]] | None:
        """Return the sites' options, and site name -> reason why it was declined; None without any."""
        path = self.folder / "options.json"
        if not path.is_file():
            return None
        stored = json.loads(path.read_text(encoding="utf-8"))
        sites = [
            SiteOptions(
                **site
                | {"options": tuple(Option(**option) for option in site["options"]), "makers": tuple(site["makers"])}
            )
            for site in stored["sites"]
        ]
        return sites, dict(stored["declined"])

    def keep_options(self, sites: Sequence[SiteOptions], declined: Mapping[str, str]) -> None:
        """Keep the sites' options and the reasons of declined sites."""
        self._write("options.json", json.dumps({"sites": [asdict(s) for s in sites], "declined": dict(declined)}))

    def point(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the `Point` of a key; the first time it is made, and its file is kept."""
        if key not in self.points:
            made = make()
            if made.path is not None:
                path = self.folder / f"made-{len(self.points)}.onnx"
                move_model(made.path, path)
                made = replace(made, path=path)
            self.points[key] = made
        return self.points[key]

    def rivals(self) -> dict[str, Path]:
        """Return name -> file of each model that onnxruntime's own tools have quantized."""
        return {point.name: point.path for point in self.points.values() if point.is_rival and point.path is not None}

    def accuracy(self) -> AccuracyResult | None:
        """Return the dense model's accuracy; None where it is not kept."""
        path = self.folder / "accuracy.json"
        return AccuracyResult.model_validate_json(read_document(path)) if path.is_file() else None

    def keep_accuracy(self, accuracy: AccuracyResult | None) -> None:
        """Keep the dense model's accuracy, where there is one."""
        if accuracy is not None:
            self._write("accuracy.json", accuracy.model_dump_json())

    def size(self) -> Size | None:
        """Return the size of the dense model as the user has it; None where it is not kept."""
        path = self.folder / "size.json"
        return Size.model_validate_json(read_document(path)) if path.is_file() else None

    def keep_size(self, size: Size) -> None:
        """Keep the size of the dense model."""
        self._write("size.json", size.model_dump_json())

    def _write(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)
