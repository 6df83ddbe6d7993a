"""Output sensitivity: the effect of errors in a site's response on the output, from gradients of random projections.

    y_site --> ... --> z,   s = u . z   with E[u u^T] = I,   g = ds / dy, one row per position

    G = sum g g^T   over positions, samples and probes u           (groups, out, out), of no particular scale

To first order an error e of the response moves the output by `|J e|^2`, whose mean over independent positions is
`e^T G e` for `G = E[J^T J] = E[g g^T]`. This is the output-side factor of K-FAC (Martens and Grosse 2015, section 3)
with the identity in the output space in place of the Fisher matrix of a likelihood.

Of a language model the output holds scores of the next token. Its probes are those of the Fisher matrix: u is the
gradient of the log likelihood of a token that is drawn from the scores. Then G is in nats: errors e of independent
positions change the distribution of a token by a KL divergence of `E[e^T G e] / 2`, to second order.

ONNX graphs and torch modules share this accumulator: the same samples get the same probes, however they are cut into
batches. Batches are cut to bound the memory. A site has no sensitivity if no gradient reaches it or memory is short.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from rsi_deploy.calibration.activations import CalibratedSite, OutputSensitivity, RowCounts
from rsi_deploy.linalg.solver import stream_seed

logger = logging.getLogger(__name__)

PROBES = 4
"""Largest number of random output directions per sample."""

BACKWARDS = 512
"""Number of samples from which one direction per sample suffices: more samples help more than more directions."""

SAMPLES = 1024
"""Largest number of samples that get gradients, evenly spaced over the data, which may be sorted. With 256, cnn_cifar10
at 0.3 of its parameters had 1.4 times the KL divergence on images that no fit used."""

POSITIONS = 1024
"""Largest number of positions of a convolution's response that count for a sample, evenly spaced."""

ROWS_AT_ONCE = 512
"""Rows of a site that are added to its sensitivity together: a product of few rows takes as long as one of many."""

TOKENS = 4096
"""Largest number of tokens of a language model that get gradients."""

LEAST_VOCABULARY = 4096
"""Smallest last axis of an output `(samples, tokens, scores)` that counts as scores of the next token."""

OUT_LIMIT = 4096
"""Widest response with a sensitivity: the matrix root of a wider one would dominate the cost."""

COUNT_FLOOR = 0.5
"""Share of a row's weight that is the same for all rows, because one probe says little about one row. On held-out texts
0.5 did better for a sentence encoder than 0.1, and both better than 1."""

MEMORY = 2 * 2**30
"""Bytes of weights, sensitivities and values kept for a backward pass."""

PIECE = 32 * 2**20
"""Bytes kept for one backward pass over several samples; larger passes save no time."""


class NoSensitivityError(Exception):
    """Signals that a model has no output sensitivities; the message is the reason."""


def sensitivities_or_empty(compute: Callable[[], dict[str, OutputSensitivity]]) -> dict[str, OutputSensitivity]:
    """Return the result of `compute`, or log the reason and return an empty dictionary if it fails."""
    try:
        return compute()
    except NoSensitivityError as reason:
        logger.info("responses are fitted without output sensitivity: %s", reason)
    except Exception as error:  # a model's own code and torch's kernels raise anything
        logger.warning("responses are fitted without output sensitivity: %s: %s", type(error).__name__, error)
    return {}


def are_token_scores(shape: Sequence[object]) -> bool:
    """Return whether an output of this shape holds scores of the next token.

    Examples:
        >>> are_token_scores((2, 128, 49152)), are_token_scores((2, 128, 384)), are_token_scores((2, 49152))
        (True, False, False)
    """
    return len(shape) == 3 and isinstance(shape[2], int) and shape[2] >= LEAST_VOCABULARY


class SensitivityAccumulator:
    """An accumulator of output sensitivities, fed with the samples in order, in pieces of any size.

    Args:
        sites: sites by name.
        samples: number of samples in the data.
        seed: random seed of the probes.
        memory: bound in bytes, see `MEMORY`.
        most: largest number of samples that get gradients.

    Attributes:
        sites: sites that can have a sensitivity.
        seen: number of samples so far.

    Raises:
        NoSensitivityError: the sensitivities alone exceed the memory.
    """

    def __init__(
        self,
        sites: Mapping[str, CalibratedSite],
        samples: int,
        *,
        seed: int,
        memory: int = MEMORY,
        most: int = SAMPLES,
    ) -> None:
        # One feature has no directions to compare.
        self.sites = {name: site for name, site in sites.items() if 1 < site.out_features <= OUT_LIMIT}
        for name in (name for name, site in sites.items() if site.out_features > OUT_LIMIT):
            logger.info(
                "site %r is fitted without output sensitivity: its response has over %d features", name, OUT_LIMIT
            )
        self._samples, self._most, self.seen = samples, min(most, samples), 0
        self._tokens = 0  # tokens whose scores were probed, once for each probe
        probes = min(PROBES, max(1, BACKWARDS // max(samples, 1)))
        self._generators = [np.random.default_rng(stream_seed(seed, f"probe/{n}")) for n in range(probes)]
        self._sums: dict[str, Tensor] = {}
        self._waiting: dict[str, list[Tensor]] = {}
        self._energy: dict[str, dict[int, Tensor]] = {}  # site -> sample -> mean square gradient of its rows
        self._left, self._cut = memory, 2
        self.reserve(sum(4 * site.groups * site.out_features**2 for site in self.sites.values()))

    def reserve(self, size: int) -> None:
        """Reserve bytes of the bound.

        Raises:
            NoSensitivityError: fewer bytes are left.
        """
        self._left -= size
        if self._left < 0:
            raise NoSensitivityError(f"it would need {-self._left} bytes more than the bound")

    def choose(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return which of the next `count` samples get gradients."""
        number = self.seen + np.arange(count + 1)
        self.seen += count
        return np.flatnonzero(np.diff(number * self._most // max(self._samples, 1)))

    def pieces(self, count: int) -> Iterator[slice]:
        """Cut a batch of `count` samples into pieces that fit into memory, judged by the pieces before."""
        begin = 0
        while begin < count:
            end = min(count, begin + self._cut)
            yield slice(begin, end)
            begin = end

    @contextmanager
    def bounded_gradients(self, samples: int, fixed: Iterable[Tensor] = ()) -> Iterator[None]:
        """Turn gradients on within a `with` block, and bound the memory kept for the backward pass.

        Args:
            samples: number of samples that run in the block.
            fixed: weights, which are in memory anyway and are not counted.

        Raises:
            NoSensitivityError: the bound is exceeded, or the model overwrites a kept value (torch does not check this
                for values behind hooks).
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
                raise NoSensitivityError(f"gradients of {samples} samples need more than {self._left} bytes")
            return tensor.detach(), tensor._version  # an attached output would keep its graph alive

        def unpack(kept: tuple[Tensor, int]) -> Tensor:
            tensor, version = kept
            if tensor._version != version:
                raise NoSensitivityError("the model overwrites a value that its gradients need")
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        self._cut = max(1, int(samples * min(self._left, PIECE) / max(2 * size, 1)))

    def add_gradients(
        self,
        z: Tensor,
        taps: Sequence[tuple[str, Tensor]],
        samples: Sequence[int],
        *,
        are_scores: bool = False,
    ) -> None:
        """Add gradients of an output with respect to the responses of sites.

        Args:
            z: output `(N, ...)`.
            taps: site name and response y of every call of a site.
            samples: indices of these samples in the data.
            are_scores: the last axis of z holds scores of the next token.

        Raises:
            NoSensitivityError: no gradient reaches any site.
        """
        values = [y for name, y in taps if name in self.sites]
        if not values or not z.requires_grad:
            raise NoSensitivityError("no gradient passes from the output to a site")
        generators = self._generators[:1] if are_scores else self._generators  # every token has a probe of its own
        for number, generator in enumerate(generators):
            if are_scores:
                u = _fisher_probe(z.detach(), generator)
                self._tokens += u.shape[:-1].numel()
            else:
                u = torch.from_numpy(generator.standard_normal(z.shape, dtype=np.float32)).to(z)
            last = number == len(generators) - 1
            gradients = torch.autograd.grad((z * u).sum(), values, retain_graph=not last, allow_unused=True)
            names = (name for name, _ in taps if name in self.sites)
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    rows = gradient_rows(gradient.detach(), self.sites[name])
                    rows = rows[:, :: max(1, rows.shape[1] // (POSITIONS * max(len(samples), 1)))]
                    self._waiting.setdefault(name, []).append(rows.clone())
                    if sum(part.shape[1] for part in self._waiting[name]) >= ROWS_AT_ONCE:
                        self._add_waiting(name)
                    self._add_row_energy(name, gradient.detach(), samples)

    def _add_waiting(self, name: str) -> None:
        rows = torch.cat(self._waiting.pop(name), dim=1)
        if name not in self._sums:
            self._sums[name] = rows.new_zeros(len(rows), rows.shape[-1], rows.shape[-1])
        self._sums[name].baddbmm_(rows.mT, rows)  # in place, against fragmented memory

    def _add_row_energy(self, name: str, gradient: Tensor, samples: Sequence[int]) -> None:
        """Add the mean squared gradient of each row of a matrix product."""
        rows = math.prod(gradient.shape[1:-1])
        if self.sites[name].kernel or self.sites[name].groups > 1 or len(gradient) != len(samples) or not rows:
            return
        energy = gradient.float().square().mean(dim=-1).reshape(len(samples), rows).cpu()
        so_far = self._energy.setdefault(name, {})
        if not so_far:
            self.reserve(4 * self._most * rows)
        for sample, more in zip(samples, energy, strict=True):
            before = so_far.get(sample)
            so_far[sample] = more if before is None or before.shape != more.shape else before + more

    def result(self) -> dict[str, OutputSensitivity]:
        """Return the sensitivities by name, without sites whose gradients are not finite or all zero."""
        for name in [*self._waiting]:
            self._add_waiting(name)
        traces = {name: float(G.diagonal(dim1=-2, dim2=-1).sum()) for name, G in self._sums.items()}
        for name, trace in traces.items():
            if not np.isfinite(trace):
                logger.info("site %r is fitted without output sensitivity: its gradients are not finite", name)
        return {
            name: OutputSensitivity(
                directions=G.div_(self._tokens or 1),  # in place: all together take much memory
                rows=counts_of(self._energy.get(name, {})),
                in_nats=bool(self._tokens),
            )
            for name, G in self._sums.items()
            if np.isfinite(traces[name]) and traces[name] > 0
        }


def counts_of(energy: Mapping[int, Tensor]) -> RowCounts | None:
    """Return row weights from the gradient energy of every sample's rows, float32 `(positions,)`; padding has none."""
    positive = torch.cat([rows[rows > 0] for rows in energy.values()]) if energy else torch.empty(0)
    if not len(positive):
        return None
    size = float(positive.mean())
    return RowCounts(by_sample={n: COUNT_FLOOR + (1 - COUNT_FLOOR) / size * rows for n, rows in energy.items()})


def _fisher_probe(scores: Tensor, generator: np.random.Generator) -> Tensor:
    """Return the gradient of the log likelihood of tokens that are drawn from scores `(..., vocabulary)`."""
    probe = torch.softmax(scores.float(), dim=-1)
    below = torch.from_numpy(generator.random((*scores.shape[:-1], 1), dtype=np.float32)).to(probe)
    drawn = torch.searchsorted(probe.cumsum(dim=-1), below).clamp_max(scores.shape[-1] - 1)
    return probe.neg_().scatter_add_(-1, drawn, torch.ones_like(below)).to(scores)


def gradient_rows(gradient: Tensor, site: CalibratedSite) -> Tensor:
    """Reshape a gradient `(..., groups * out)`, of a Conv `([N,] groups * out, *size)`, to `(groups, rows, out)`."""
    if site.kernel:
        gradient = gradient.movedim(-1 - len(site.kernel), -1)
    return gradient.float().reshape(-1, site.groups, site.out_features).movedim(1, 0)
