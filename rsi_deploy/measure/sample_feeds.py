"""The first samples of evaluation data as the inputs that are timed, in place of random ones."""

from pathlib import Path

import numpy as np

from rsi_deploy.errors import UsageError
from rsi_deploy.measure.answers import Answers
from rsi_deploy.measure.dataset import Dataset, for_inputs
from rsi_deploy.measure.feeding import Feeding, Feeds


def sample_feeds(dataset: Dataset, model: Path, provider: str, batch: int) -> Feeds:
    """The first `batch` samples as the model takes them; fewer where the data have no more.

    Args:
        dataset: the data.
        model: whose inputs and stored preprocessing count.
        provider: that can load it.
        batch: of the largest configuration.

    Raises:
        UsageError: the data do not hold what the model takes.
    """
    arm = Answers(model, provider)
    dataset = for_inputs(dataset, arm.specs)
    steps = arm.stored_preprocessing() if dataset.kind == "images" else None
    if dataset.kind == "images" and steps is None and not all(spec.dtype == np.uint8 for spec in arm.specs):
        raise UsageError(
            f"{model} does not say how 8-bit images become {arm.specs[0]}; store ready inputs in the data, or time it "
            "without --data"
        )
    for feeds, _ in Feeding(dataset, arm.specs, steps, model=str(model)).batches(batch, batch):
        return feeds
    raise UsageError(f"the data hold no samples to feed {model} with; give other data, or leave out --data")
