"""Use the first samples of evaluation data as the inputs for timing, in place of random ones."""

from collections.abc import Iterator
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
    return next(sample_batches(dataset, model, provider, batch, batch, preprocessing=preprocessing))


def sample_batches(
    dataset: Dataset,
    model: Path,
    provider: str,
    batch: int,
    limit: int,
    *,
    preprocessing: Preprocessing | None = None,
    option: str = "--data",
) -> Iterator[Feeds]:
    """Yield the first `limit` samples as the model's inputs, `batch` at a time.

    Args:
        dataset: data.
        model: model with the inputs and the stored preprocessing.
        provider: provider that can load the model.
        batch: samples of a batch.
        limit: most samples in all.
        preprocessing: settings for pictures; unset fields come from the model.
        option: command-line option of the data, for messages.

    Raises:
        UsageError: The data do not fit the model's inputs.
    """
    arm = Predictor(model, provider)
    dataset = for_inputs(dataset, arm.specs)
    else_do = f"store ready inputs in the data, or time it without {option}"
    steps, _ = picture_steps(dataset, [arm], preprocessing, else_do)
    is_empty = True
    for feeds, _ in Feeding(dataset, arm.specs, steps, option=option, model=str(model)).batches(batch, limit):
        is_empty = False
        yield feeds
    if is_empty:
        raise UsageError(f"the data have no samples for {model}", hint=f"give other data, or leave out {option}")
