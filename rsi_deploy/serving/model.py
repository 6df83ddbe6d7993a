"""A model in memory: one request at a time, or several joined along their first axis where that is the batch.

Whether the first axis is a batch is not believed but tried, once, when the model is loaded: on made-up inputs, rows
that are run together must give what they give alone. A time-major recurrent net, a softmax over the batch or a
quantizer that looks at the whole batch fail that, and get their requests one by one.
"""

import logging
from collections.abc import Mapping, Sequence

import numpy as np

from rsi_deploy.errors import GateError, ModelError, RsiDeployError
from rsi_deploy.measure.inputs import InputSpec, random_feeds
from rsi_deploy.measure.sessions import make_session, run_session
from rsi_deploy.serving.bundles import Bundle, stamps
from rsi_deploy.serving.signature import Feeds, Signature, rows
from rsi_deploy.serving.tensors import Array

logger = logging.getLogger(__name__)

Outputs = dict[str, Array]

OPEN_SIZE = 16
"""Of a dimension that is dynamic and whose size nothing tells, where batching is tried."""
TOLERANCE = {2: 5e-3, 4: 1e-3, 8: 1e-6}
"""Item size of a floating output -> how far rows may move in a batch, as a share of the largest value."""


class LoadedModel:
    """A session of a bundle.

    Args:
        bundle: whose files were checked.
        provider: of onnxruntime, as `--provider` takes it.
        threads: inside one operator.
        try_batches: whether it is to be found out if requests can be joined; it takes four rows' time.

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
        self.alone = self._why_alone(bundle.probe_shapes) if try_batches else ""

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

    def _why_alone(self, known: Mapping[str, tuple[int, ...]]) -> str:
        for spec in self.signature.inputs:
            if not spec.shape or isinstance(spec.shape[0], int):
                return f"input {spec} has no dynamic first axis"
        sizes = _open_sizes(self.signature.inputs, known)
        try:
            one, two = (_made_up(self.signature.inputs, sizes, seed) for seed in (1, 2))
            alone, together = [self.infer(feeds) for feeds in (one, two)], self.infer_together([one, two])
        except RsiDeployError as error:
            return f"it does not run on made-up inputs, so that batches cannot be tried: {error}"[:300]
        for name in self._outputs:
            if any(not _same(a[name], b[name]) for a, b in zip(alone, together, strict=True)):
                return f"rows of output {name} depend on the other rows of their batch"
        return ""


def _open_sizes(specs: Sequence[InputSpec], known: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Input name -> sizes of its axes but the first."""
    found = {}
    for spec in specs:
        told = known.get(spec.name, ())
        fits = len(told) == len(spec.shape)
        found[spec.name] = tuple(
            dim if isinstance(dim, int) else told[axis] if fits else OPEN_SIZE
            for axis, dim in enumerate(spec.shape)
            if axis
        )
    return found


def _made_up(specs: Sequence[InputSpec], sizes: Mapping[str, tuple[int, ...]], seed: int) -> Feeds:
    """One row of each input."""
    return random_feeds(specs, 1, seed, {name: (1, *rest) for name, rest in sizes.items()})


def _same(alone: Array, together: Array) -> bool:
    if alone.shape != together.shape:
        return False
    if alone.dtype.kind != "f":
        return bool((alone == together).all())
    scale = float(np.abs(alone.astype(np.float64)).max(initial=0.0))
    return bool(np.allclose(together, alone, rtol=0, atol=TOLERANCE[alone.itemsize] * scale + 1e-12, equal_nan=True))
