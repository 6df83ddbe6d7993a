"""A model in memory. It runs one request, or several requests joined along the first axis.

Requests are joined only if their rows do not affect each other. This is proved on the graph and tested by runs when
the model is loaded (`rsi_deploy.runtime.batch_independence`).
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
"""Number of samples that batching is tested with; each takes the time of four rows before the server is ready."""


class LoadedModel:
    """An onnxruntime session of a bundle.

    Args:
        bundle: the bundle, already checked.
        provider: onnxruntime provider, as in `--provider`.
        threads: threads inside one operator.
        try_batches: whether to test if requests can be joined; this takes the time of eight rows.

    Attributes:
        signature: the inputs and outputs.
        alone: reason why requests cannot be joined; "" if they can be, or if it was not tested.

    Raises:
        ModelError: the model cannot be loaded, or the protocol has no datatype for one of its tensors.
        GateError: the files have changed since they were checked.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", *, threads: int = 1, try_batches: bool = True):
        self._name = str(bundle.path)
        # Idle threads must not spin: other workers and the front process need the cores.
        self._session = make_session(bundle.model, provider, threads=threads, spin_between_runs=False)
        if stamps(bundle.path) != bundle.stamps:
            raise GateError(f"{bundle.path} has been replaced since it was checked; start again when it is complete")
        self.signature = Signature.of(self._session, self._name)
        self._outputs = [spec.name for spec in self.signature.outputs]
        self.alone = why_not_batchable(bundle.model, self._session, bundle.probe_shapes, SAMPLES) if try_batches else ""

    def infer(self, feeds: Feeds) -> Outputs:
        """Return the outputs of one request.

        Raises:
            ModelError: onnxruntime failed; the message has its text.
        """
        return dict(zip(self._outputs, run_session(self._session, feeds, self._name), strict=True))

    def infer_batch(self, requests: Sequence[Feeds]) -> list[Outputs]:
        """Return the outputs of several requests from one run; their shapes may differ in the first axis alone.

        Raises:
            ModelError: onnxruntime failed, or the rows of an output are not as many as the rows of the inputs.
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
        return [{name: part[index] for name, part in parts.items()} for index in range(len(requests))]
