"""The first samples of evaluation data as the inputs that are timed, in place of random ones."""

from pathlib import Path

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.dataset import Dataset, for_inputs
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.evaluation.accuracy import picture_steps
from rsi_deploy.evaluation.predictor import Answers


def sample_feeds(
    dataset: Dataset, model: Path, provider: str, batch: int, preprocessing: Preprocessing | None = None
) -> Feeds:
    """The first `batch` samples as the model takes them; fewer where the data have no more.

    Args:
        dataset: the data.
        model: whose inputs and stored preprocessing count.
        provider: that can load it.
        batch: of the largest configuration.
        preprocessing: for pictures; fields that are not set come from the model.

    Raises:
        UsageError: the data do not hold what the model takes.
    """
    arm = Answers(model, provider)
    dataset = for_inputs(dataset, arm.specs)
    else_do = "store ready inputs in the data, or time it without --data"
    steps, _ = picture_steps(dataset, [arm], preprocessing, else_do)
    for feeds, _ in Feeding(dataset, arm.specs, steps, model=str(model)).batches(batch, batch):
        return feeds
    raise UsageError(f"the data hold no samples to feed {model} with; give other data, or leave out --data")
