"""The accuracy of the rivals of a sweep on its evaluation data, as that of the points is found."""

from collections.abc import Mapping
from pathlib import Path

from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.progress import at_samples, step
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.report.sweep_schema import Sweep, SweepPoint


def with_rival_accuracy(document: Sweep, dense: Path, rivals: Mapping[str, Path], config: ExportConfig) -> Sweep:
    """Return the sweep with the top-1 accuracy of its rivals; unchanged without evaluation data.

    A rival whose accuracy is known is not evaluated again. One that gives no valid answers gets none.

    Args:
        document: document of the sweep.
        dense: the dense model, which holds the preprocessing.
        rivals: name -> file of a rival.
        config: settings of the points' exports.
    """

    def evaluated(rival: SweepPoint) -> SweepPoint:
        path = rivals.get(rival.precision)
        if path is None or rival.top1 is not None:
            return rival
        with step(f"accuracy of {rival.precision}"):
            try:
                found = evaluate(path, config.data, provider=config.provider, reference=dense, progress=at_samples)
            except ModelError:
                return rival
        return rival.model_copy(update={"top1": found.top1})

    if config.data is None:
        return document
    return document.model_copy(update={"rivals": tuple(map(evaluated, document.rivals))})
