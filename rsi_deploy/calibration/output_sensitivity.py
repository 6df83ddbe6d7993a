"""What errors of a site's response do to the output: a metric, by gradients of random projections of the output.

    y_site --> ... --> z,   s = u . z   with E[u u^T] = I,   g = ds / dy, a row at every position

    G = sum g g^T   over positions, samples and probes u           (groups, out, out), of no particular scale

To first order an error e of the response moves the output by `|J e|^2`, whose mean over independent positions is
`e^T G e` for `G = E[J^T J] = E[g g^T]`: the factor of the output's side in K-FAC (Martens and Grosse 2015, section 3),
for the identity in the output's space in place of the Fisher matrix of a likelihood.

Both kinds of streams ask the same questions here: the same samples, and the same probes for them however they are cut
into batches. Memory is bounded by cutting them; what cannot be told within the bound, or at all, is no metric.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite, Metric, RowCounts
from rsi_deploy.linalg.solver import stream_seed

logger = logging.getLogger(__name__)

PROBES = 4
"""Random directions of the output a sample is asked for, at the most."""

BACKWARDS = 512
"""With so many samples one direction each is asked for: more samples tell more than more directions."""

SAMPLES = 1024
"""How many samples are asked, at the most; from all over the data, which may be sorted."""

OUT_LIMIT = 4096
"""A wider response gets no metric: its roots would cost more than all else."""

COUNT_FLOOR = 0.5
"""Of what a row counts, the share that is the same for all: one probe tells little of one row. On held-out texts 0.5
did better for a sentence encoder than 0.1, and both better than 1."""

MEMORY = 2 * 2**30
"""Bytes of weights, metrics and values kept for a backward pass."""

PIECE = 32 * 2**20
"""Bytes of values kept for the backward pass of some samples, where one sample needs less: more save no time."""


class NoMetricError(Exception):
    """There is no metric for a model, for the reason that the message tells."""


def metrics_or_none(ask: Callable[[], dict[str, Metric]]) -> dict[str, Metric]:
    """What `ask` finds; nothing, and a line in the log, where it finds no way."""
    try:
        return ask()
    except NoMetricError as reason:
        logger.info("responses are fitted without a metric of the output: %s", reason)
    except Exception as error:  # a model's own code and torch's kernels raise anything; the fit can do without
        logger.warning("responses are fitted without a metric of the output: %s: %s", type(error).__name__, error)
    return {}


class OutputMetric:
    """The metrics of some sites, added up over pieces of the data, sample behind sample.

    Args:
        sites: by name.
        samples: how many the data have.
        seed: of the probes.
        memory: bytes, as `MEMORY`.

    Attributes:
        sites: those that can have one.
        seen: how many samples have come.

    Raises:
        NoMetricError: the metrics alone would take more memory.
    """

    def __init__(self, sites: Mapping[str, CalibratedSite], samples: int, *, seed: int, memory: int = MEMORY) -> None:
        self.sites = {name: site for name, site in sites.items() if site.out_features <= OUT_LIMIT}
        for name in sites.keys() - self.sites.keys():
            logger.info("site %r is fitted without a metric: it answers with more than %d numbers", name, OUT_LIMIT)
        self._samples, self.seen = samples, 0
        probes = min(PROBES, max(1, BACKWARDS // max(samples, 1)))
        self._generators = [np.random.default_rng(stream_seed(seed, f"probe/{n}")) for n in range(probes)]
        self._found: dict[str, Tensor] = {}
        self._energy: dict[str, dict[int, Tensor]] = {}  # of a product: mean square of the gradients of a sample's rows
        self._left, self._cut = memory, 2
        self.take(sum(4 * site.groups * site.out_features**2 for site in self.sites.values()))

    def take(self, size: int) -> None:
        """Set aside bytes of the bound.

        Raises:
            NoMetricError: so many are not left.
        """
        self._left -= size
        if self._left < 0:
            raise NoMetricError(f"it would need {-self._left} bytes more than the bound")

    def chosen(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Which of the next `count` samples are asked."""
        share = min(SAMPLES, self._samples)
        number = self.seen + np.arange(count + 1)
        self.seen += count
        return np.flatnonzero(np.diff(number * share // max(self._samples, 1)))

    def pieces(self, count: int) -> Iterator[slice]:
        """Cuts a batch of `count` samples: as many at a time as memory allows by what the pieces before have kept."""
        begin = 0
        while begin < count:
            end = min(count, begin + self._cut)
            yield slice(begin, end)
            begin = end

    @contextmanager
    def keeping(self, samples: int, fixed: Iterable[Tensor] = ()) -> Iterator[None]:
        """Within it gradients are on, and what is kept for the backward pass of these samples is bounded.

        Args:
            samples: how many are run.
            fixed: weights, which are there anyhow and not counted.

        Raises:
            NoMetricError: it is more than the bound, or was written over before the backward pass (torch itself leaves
                that unnoticed behind hooks).
        """
        seen = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        size = 0

        def pack(tensor: Tensor) -> tuple[Tensor, int]:
            nonlocal size
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                size += storage.nbytes()
            if size > self._left:
                raise NoMetricError(f"gradients of {samples} samples need more than {self._left} bytes")
            return tensor.detach(), tensor._version  # the tensor itself, where it is an output, would keep its graph

        def unpack(kept: tuple[Tensor, int]) -> Tensor:
            tensor, version = kept
            if tensor._version != version:
                raise NoMetricError("the model writes over what its gradients need")
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self._cut = max(1, int(samples * min(self._left, PIECE) / max(2 * size, 1)))

    def listen(
        self,
        z: Tensor,
        taps: Sequence[tuple[str, Tensor]],
        samples: Sequence[int],
    ) -> None:
        """Ask for gradients of an output where the responses of sites were tapped.

        Args:
            z: the output, `(N, ...)`.
            taps: `(name, y)` of every call of a site.
            samples: the numbers, in all of the data, of the samples that were run.

        Raises:
            NoMetricError: no gradient reaches any of them.
        """
        values = [y for name, y in taps if name in self.sites]
        if not values or not z.requires_grad:
            raise NoMetricError("no gradient passes from the output to a site")
        for number, generator in enumerate(self._generators):
            u = torch.from_numpy(generator.standard_normal(z.shape, dtype=np.float32)).to(z)
            last = number == len(self._generators) - 1
            gradients = torch.autograd.grad((z * u).sum(), values, retain_graph=not last, allow_unused=True)
            names = (name for name, _ in taps if name in self.sites)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    rows = gradient_rows(gradient.detach(), self.sites[name])
                    if name not in self._found:
                        self._found[name] = rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1])
                    self._found[name].baddbmm_(rows.mT, rows)  # in place: memory that comes and goes falls to pieces
                    self._note(name, gradient.detach(), samples)

    def _note(self, name: str, gradient: Tensor, samples: Sequence[int]) -> None:
        """Take down how large the gradients of a product's rows are."""
        rows = math.prod(gradient.shape[1:-1])
        if self.sites[name].kernel or self.sites[name].groups > 1 or len(gradient) != len(samples) or not rows:
            return
        energy = gradient.float().square().mean(dim=-1).reshape(len(samples), rows).cpu()
        so_far = self._energy.setdefault(name, {})
        if not so_far:
            self.take(4 * min(SAMPLES, self._samples) * rows)
        for sample, more in zip(samples, energy, strict=True):
            before = so_far.get(sample)
            so_far[sample] = more if before is None or before.shape != more.shape else before + more

    def result(self) -> dict[str, Metric]:
        """What was found, by name; none where a gradient was not finite, or all were 0."""
        traces = {name: float(G.diagonal(dim1=-2, dim2=-1).sum()) for name, G in self._found.items()}
        for name, trace in traces.items():
            if not np.isfinite(trace):
                logger.info("site %r is fitted without a metric: its gradients are not finite", name)
        return {
            name: Metric(directions=G, rows=counts_of(self._energy.get(name, {})))
            for name, G in self._found.items()
            if np.isfinite(traces[name]) and traces[name] > 0
        }


def counts_of(energy: Mapping[int, Tensor]) -> RowCounts | None:
    """What rows count by the energy of their gradients, float32 `(places,)` of every sample; padding has none."""
    asked = torch.cat([rows[rows > 0] for rows in energy.values()]) if energy else torch.empty(0)
    if not len(asked):
        return None
    size = float(asked.mean())
    return RowCounts(by_sample={n: COUNT_FLOOR + (1 - COUNT_FLOOR) / size * rows for n, rows in energy.items()})


def gradient_rows(gradient: Tensor, site: CalibratedSite) -> Tensor:
    """Float32 `(groups, rows, out)` of a gradient `(..., groups * out)` or, of a Conv, `([N,] groups * out, *size)`."""
    if site.kernel:
        gradient = gradient.movedim(-1 - len(site.kernel), -1)
    return gradient.float().reshape(-1, site.groups, site.out_features).movedim(1, 0)
