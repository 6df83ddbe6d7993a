"""How well decoders continue texts: the probability of each next token, alone and compared with a reference.

surprisal     -log p(token i+1 | tokens 0..i), p = softmax(logits)                             (nats)
perplexity    exp(sum of surprisals / tokens)
ratio         perplexity / perplexity of the reference on the same tokens
divergence    mean over tokens of KL(p_reference || p_model)                                    (nats)
agreement     share of tokens where both find the same token most probable                      (percent)
greedy        share of equal tokens in 64 steps of greedy generation by both, place by place    (percent)

Each window of a text predicts its tokens but the first; padding neither predicts nor is predicted. Intervals (95 %) are
bootstrapped over documents, because the tokens of one document are alike. The softmax is computed a few positions at a
time, and the sums in float64.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.types import Array, Floats, Interval
from rsi_deploy.data.dataset import Labels, spaced_rows
from rsi_deploy.data.text_data import TextRows
from rsi_deploy.evaluation.accumulator import Batch, shown_positions
from rsi_deploy.evaluation.intervals import mean_interval, ratio_of_sums_interval

PROMPTS, PROMPT_TOKENS, STEPS = 16, 32, 64
"""Greedy generation: most prompts, tokens of each, and tokens that are generated."""
POSITIONS = 8
"""Positions whose softmax is computed at once."""


class TextQuality(BaseModel, frozen=True, extra="forbid"):
    """How well a decoder continues texts; 95 % intervals over documents, None for a single document.

    Attributes:
        tokens: number of predicted tokens.
        documents: number of documents.
        perplexity: perplexity of the next token.
        perplexity_interval: interval of `perplexity`.
        ratio: perplexity divided by the reference's; None without a reference.
        ratio_interval: interval of `ratio`, paired by documents.
        prompts: number of prompts that both models continued; 0 if a model takes no caches, or windows are shorter than
            a prompt and its continuation.
        greedy: percentage of the 64 greedy tokens after each prompt that equal the reference's at the same place.
        greedy_interval: interval of `greedy`, over prompts.
    """

    tokens: int
    documents: int
    perplexity: float
    perplexity_interval: Interval | None = None
    ratio: float | None = None
    ratio_interval: Interval | None = None
    prompts: int = 0
    greedy: float | None = None
    greedy_interval: Interval | None = None

    def with_greedy(self, reference: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> "TextQuality":
        """Return this quality with the share of equal greedy tokens, both `(prompts, steps)`."""
        shares = 100 * (reference == tokens).mean(axis=1)
        ends = mean_interval(shares) if len(shares) > 1 else None
        found = {"prompts": len(shares), "greedy": float(shares.mean()), "greedy_interval": ends}
        return self.model_copy(update=found)


def prompts_of(text: TextRows, rows: Labels) -> npt.NDArray[np.int64]:
    """Return the first tokens of a window of each of some documents, int64 `(prompts, tokens)`.

    No prompts if windows are too short: the model may not take more tokens than a window has.

    Args:
        text: windows.
        rows: numbers of the windows that may be chosen.
    """
    if text.width < PROMPT_TOKENS + STEPS:
        return np.empty((0, PROMPT_TOKENS), np.int64)
    firsts = rows[np.unique(text.documents[rows], return_index=True)[1]]
    chosen = firsts[spaced_rows(len(firsts), 1, PROMPTS)]
    return np.stack([text.rows[row].ids[:PROMPT_TOKENS] for row in chosen]).astype(np.int64)


def surprisals(logits: Array, tokens: npt.NDArray[Any]) -> Floats:
    """Return the surprisal of every token but the first, in nats, float64 `(n, t - 1)`.

    Args:
        logits: scores of the next token at each position, `(n, t, vocabulary)`.
        tokens: token ids, `(n, t)`, within the vocabulary.
    """
    found = np.empty((len(tokens), tokens.shape[1] - 1))
    for row, (scores, ids) in enumerate(zip(logits, tokens, strict=True)):
        for at in _chunks(len(ids) - 1):
            found[row, at] = _log_sums(scores[at]) - scores[at][np.arange(len(ids))[at] - at.start, ids[1:][at]]
    return found


def divergences(reference: Array, logits: Array) -> Floats:
    """Return KL(p_reference || p_logits) at each position in nats, at least 0, float64 `(n, t)`.

    Args:
        reference: logits of the reference, `(n, t, vocabulary)`.
        logits: logits of a model, of the same shape.
    """
    found = np.empty(logits.shape[:2])
    for row, pair in enumerate(zip(reference, logits, strict=True)):
        for at in _chunks(logits.shape[1]):
            x, y = (scores[at].astype(np.float32, copy=False) for scores in pair)
            shifted = np.exp(x - x.max(axis=1, keepdims=True))
            total = shifted.sum(axis=1, dtype=np.float64)
            moved = (shifted * (x - y)).sum(axis=1, dtype=np.float64) / total
            found[row, at] = moved - _log_sums(x) + _log_sums(y)
    return np.maximum(found, 0.0)


def predicted(logits: Array, feeds: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
    """Return which tokens but the first are predicted: they and the position before are no padding, `(n, t - 1)`."""
    shown = np.broadcast_to(shown_positions(logits, feeds), (*logits.shape[:2], 1))[..., 0]
    return np.asarray(shown[:, :-1] & shown[:, 1:], np.bool_)


@dataclass(frozen=True, kw_only=True)
class TokenAnswers:
    """What a decoder says of the next tokens of some windows, without its logits.

    Attributes:
        kept: which tokens but the first are predicted, `(n, t - 1)`.
        surprisal: surprisal of each in nats, `(n, t - 1)`.
        best: most probable token in the place of each, `(n, t - 1)`.
        vocabulary: number of tokens that the model knows.
    """

    kept: npt.NDArray[np.bool_]
    surprisal: Floats
    best: npt.NDArray[np.int64]
    vocabulary: int

    @classmethod
    def of(cls, logits: Array, ids: str, feeds: Mapping[str, Array]) -> "TokenAnswers":
        """Return the answers of logits `(n, t, vocabulary)`; `ids` names the input with the token ids."""
        return cls(
            kept=predicted(logits, feeds),
            surprisal=surprisals(logits, feeds[ids]),
            best=logits[:, :-1].argmax(axis=2),
            vocabulary=logits.shape[2],
        )

    def sums(
        self, documents: Labels, reference: "TokenAnswers | None" = None, divergence: Floats | None = None
    ) -> "TokenSums":
        """Return the sums over the tokens of each window.

        Args:
            documents: number of each window's document, `(n,)`.
            reference: answers of the reference to the same windows; None for itself.
            divergence: KL divergence from the reference in the place of each token, `(n, t - 1)`; None if not known.
        """
        nothing = np.empty(0)
        same = None if reference is None else self.kept & (self.best == reference.best)
        return TokenSums(
            documents=documents,
            tokens=self.kept.sum(axis=1, dtype=np.float64),
            surprisal=(self.kept * self.surprisal).sum(axis=1),
            divergence=nothing if divergence is None else (self.kept * divergence).sum(axis=1),
            same=nothing if same is None else same.sum(axis=1, dtype=np.float64),
            vocabulary=self.vocabulary,
        )


@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over the predicted tokens of each window.

    Attributes:
        documents: number of each window's document, `(n,)`.
        tokens: number of predicted tokens, `(n,)`.
        surprisal: sum of surprisals in nats, `(n,)`.
        divergence: sum of KL divergences from the reference in nats, `(n,)`; empty for the reference, or if not known.
        same: number of tokens where both find the same token most probable, `(n,)`; empty for the reference.
        vocabulary: number of tokens that the model knows.
    """

    documents: Labels
    tokens: Floats
    surprisal: Floats
    divergence: Floats
    same: Floats
    vocabulary: int

    @property
    def samples(self) -> int:
        """Number of windows."""
        return len(self.tokens)

    @classmethod
    def concatenate(cls, parts: Sequence["TokenSums"]) -> "TokenSums":
        """Concatenate the sums of batches."""
        names = ("documents", "tokens", "surprisal", "divergence", "same")
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        return cls(**joined, vocabulary=parts[0].vocabulary)

    def by_document(self) -> "TokenSums":
        """Return the sums of each document."""
        names = ("tokens", "surprisal", "divergence", "same")
        sums = {name: summed(self.documents, getattr(self, name)) for name in names}
        return TokenSums(documents=np.unique(self.documents), vocabulary=self.vocabulary, **sums)

    def statistics(self, reference: "TokenSums | None") -> dict[str, Any]:
        """Return means and intervals by the names in `AccuracyResult`; `reference` is None for itself."""
        own = self.by_document()
        perplexity, ends = own.perplexity()
        found: dict[str, Any] = {"samples": self.samples, "classes": self.vocabulary}
        found |= dict.fromkeys(("top1", "top1_interval", "top5", "agreement", "divergence"))
        ratio = ratio_ends = None
        if reference is not None:
            ratio, ratio_ends = own.ratio(reference.by_document())
            found["divergence"], found["divergence_interval"] = mean_over(own.divergence, own.tokens)
            found["agreement"], found["agreement_interval"] = mean_over(100 * own.same, own.tokens)
        found["text"] = TextQuality(
            tokens=int(own.tokens.sum()),
            documents=own.samples,
            perplexity=perplexity,
            perplexity_interval=ends,
            ratio=ratio,
            ratio_interval=ratio_ends,
        )
        return found

    def perplexity(self) -> tuple[float, Interval | None]:
        """Return the perplexity and its interval over the rows."""
        return _exponential(mean_over(self.surprisal, self.tokens))

    def ratio(self, reference: "TokenSums", level: float = 95.0) -> tuple[float, Interval | None]:
        """Return the perplexity over the reference's on the same rows, and its interval at a level in percent."""
        return _exponential(mean_over(self.surprisal - reference.surprisal, self.tokens, level))


def summed(documents: Labels, values: Floats) -> Floats:
    """Return the sum of the values `(n,)` of each document, `(documents,)` in ascending order; of none, none."""
    place = np.unique(documents, return_inverse=True)[1]
    return np.asarray(np.bincount(place, weights=values), np.float64) if len(values) else values


def mean_over(sums: Floats, tokens: Floats, level: float = 95.0) -> tuple[float, Interval | None]:
    """Return the mean over all tokens, and its bootstrap interval over the rows; None for a single row.

    Args:
        sums: sum over the tokens of each row, `(n,)`.
        tokens: number of tokens of each row, `(n,)`.
        level: level of the interval in percent.
    """
    ends = ratio_of_sums_interval(sums, tokens, level=level) if len(tokens) > 1 else None
    return float(sums.sum() / tokens.sum()), ends


class TokenScorer:
    """Scores the logits of several decoders, the first of which is the reference; see `accumulator.Scorer`.

    Args:
        names: names of the models.
        ids: input with the token ids.
        documents: document of each window, in the order in which they are scored.
    """

    kind: Literal["tokens"] = "tokens"

    def __init__(self, names: Sequence[str], ids: str, documents: Labels) -> None:
        self._names, self._ids, self._documents = list(names), ids, documents
        self._scored = 0

    def check(self, batch: Batch) -> None:
        """Check on the first batch that the models have the same vocabulary.

        Raises:
            UsageError: A model's logits have another shape than the reference's.
        """
        shapes = [first_logits(outputs).shape for outputs in batch]
        for name, shape in zip(self._names[1:], shapes[1:], strict=True):
            if shape != shapes[0]:
                raise UsageError(
                    f"{name} gives logits {shape}, but the reference {self._names[0]} {shapes[0]}",
                    hint="give the model that it was made from",
                )

    def score(self, batch: Batch, labels: Labels | None, feeds: Mapping[str, Array]) -> tuple[TokenSums, ...]:
        """Return the sums of one batch for each model.

        Raises:
            ModelError: Logits are not finite, or the text has tokens that the model does not know.
        """
        ids = feeds[self._ids]
        documents = self._documents[self._scored : self._scored + len(ids)]
        self._scored += len(ids)
        arrays = [first_logits(outputs) for outputs in batch]
        for name, logits in zip(self._names, arrays, strict=True):
            check_logits(name, logits, ids)
        dense, *others = (TokenAnswers.of(logits, self._ids, feeds) for logits in arrays)
        apart = [divergences(arrays[0][:, :-1], logits[:, :-1]) for logits in arrays[1:]]
        found = [own.sums(documents, dense, kl) for own, kl in zip(others, apart, strict=True)]
        return (dense.sums(documents), *found)


def first_logits(outputs: Mapping[str, Array]) -> Array:
    """Return the first output of three axes, `(n, t, vocabulary)`."""
    return next(array for array in outputs.values() if array.ndim == 3 and array.dtype.kind == "f")


def check_logits(name: str, logits: Array, ids: Array) -> None:
    """Check that logits are finite and have a score for every token of the text.

    Raises:
        ModelError: They are not.
    """
    if logits.shape[:2] != ids.shape or ids.max() >= logits.shape[2]:
        raise ModelError(
            f"{name}: its logits {logits.shape} do not fit token ids of the shape {ids.shape} up to {ids.max()}",
            hint="give the model's own tokenizer.json, or compare values: --outputs values --reference DENSE",
        )
    if not np.isfinite(logits).all():
        raise ModelError(f"{name}: its logits have NaN or infinite values", hint="the model or its inputs are invalid")


def _chunks(count: int) -> list[slice]:
    return [slice(start, min(start + POSITIONS, count)) for start in range(0, count, POSITIONS)]


def _log_sums(scores: Array) -> Floats:
    """Return log(sum(exp(scores))) of each row, float64 `(n,)`."""
    values = scores.astype(np.float32, copy=False)
    most = values.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(values - most).sum(axis=1, dtype=np.float64)) + most[:, 0], np.float64)


def _exponential(mean: tuple[float, Interval | None]) -> tuple[float, Interval | None]:
    """Return the exponential of a mean and of its interval; of surprisals beyond 700 nats, that of 700."""
    value, ends = np.exp(np.minimum(mean[0], 700)), mean[1]
    return float(value), None if ends is None else tuple(float(np.exp(min(end, 700))) for end in ends)  # type: ignore[return-value]
