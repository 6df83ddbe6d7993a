"""Use the first samples of evaluation data as the inputs for timing, in place of random ones."""

from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.dataset import Dataset, for_inputs
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.accuracy import picture_steps
from rsi_deploy.evaluation.predictor import Predictor


def sample_feeds(
    dataset: Dataset, model: Path, provider: str, batch: int, preprocessing: Preprocessing | None = None
) -> Feeds:
    """Return the first `batch` samples as the model's inputs; fewer if the data have fewer.

    Args:
        dataset: data.
        model: model with the inputs and the stored preprocessing.
        provider: provider that can load the model.
        batch: batch size of the largest configuration.
        preprocessing: settings for pictures; unset fields come from the model.

    Raises:
        UsageError: The data do not fit the model's inputs.
    """
    arm = Predictor(model, provider)
    dataset = for_inputs(dataset, arm.specs)
    else_do = "store ready inputs in the data, or time it without --data"
    steps, _ = picture_steps(dataset, [arm], preprocessing, else_do)
    for feeds, _ in Feeding(dataset, arm.specs, steps, model=str(model)).batches(batch, batch):
        return feeds
    raise UsageError(f"the data have no samples for {model}", hint="give other data, or leave out --data")
