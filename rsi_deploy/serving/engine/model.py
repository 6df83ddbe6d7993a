"""A model in memory: one request at a time, or several joined along their first axis where that is the batch.

Whether the first axis is a batch is proved on the graph and tried, once, when the model is loaded
(`measure.batch_independence`): models whose rows depend on each other get their requests one by one.
"""

import logging
from collections.abc import Sequence

import numpy as np

from rsi_deploy.core.errors import GateError, ModelError
from rsi_deploy.runtime.batch_independence import why_not_batchable
from rsi_deploy.runtime.sessions import make_session, run_session
from rsi_deploy.serving.bundles import Bundle, stamps
from rsi_deploy.serving.protocol.signature import Feeds, Outputs, Signature, rows

logger = logging.getLogger(__name__)


SAMPLES = 2
"""That batching is tried with: each costs four rows' time before the server is ready."""


class LoadedModel:
    """A session of a bundle.

    Args:
        bundle: whose files were checked.
        provider: of onnxruntime, as `--provider` takes it.
        threads: inside one operator.
        try_batches: whether it is to be found out if requests can be joined; it takes eight rows' time.

    Attributes:
        signature: what it takes and gives.
        alone: why requests cannot be joined; "" where they can, or where it was not tried.

    Raises:
        ModelError: it cannot be loaded, or has tensors that the protocol does not carry here.
        GateError: its files are not those that were checked.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", *, threads: int = 1, try_batches: bool = True):
        self._name = str(bundle.path)
        # Idle threads must not spin: other workers and the front process want the cores.
        self._session = make_session(bundle.model, provider, threads=threads, spin_between_runs=False)
        if stamps(bundle.path) != bundle.stamps:
            raise GateError(f"{bundle.path} has been replaced since it was checked; start again when it is whole")
        self.signature = Signature.of(self._session, self._name)
        self._outputs = [spec.name for spec in self.signature.outputs]
        self.alone = why_not_batchable(bundle.model, self._session, bundle.probe_shapes, SAMPLES) if try_batches else ""

    def infer(self, feeds: Feeds) -> Outputs:
        """The outputs of one request.

        Raises:
            ModelError: onnxruntime failed, with its words.
        """
        return dict(zip(self._outputs, run_session(self._session, feeds, self._name), strict=True))

    def infer_together(self, requests: Sequence[Feeds]) -> list[Outputs]:
        """The outputs of requests of equal shapes but for the first axis, from one run.

        Raises:
            ModelError: onnxruntime failed, or an output has not one row for each row of the inputs.
        """
        if len(requests) == 1:
            return [self.infer(requests[0])]
        ends = np.cumsum([rows(feeds) for feeds in requests])
        joined = self.infer({name: np.concatenate([feeds[name] for feeds in requests]) for name in requests[0]})
        for name, array in joined.items():
            if not array.ndim or len(array) != ends[-1]:
                raise ModelError(
                    f"{self._name}: output {name} has the shape {array.shape} for {ends[-1]} rows"
                    f"; serve it with --max-batch 1"
                )
        parts = {name: np.split(array, ends[:-1]) for name, array in joined.items()}
        return [{name: part[place] for name, part in parts.items()} for place in range(len(requests))]
