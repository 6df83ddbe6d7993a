"""Decoders with caches: inputs that hold the keys and values of past tokens, and outputs that hold those to feed next.

made by                       input -> output                                       layout
onnxruntime-genai, optimum    past_key_values.N.key -> present.N.key (and value)    (batch, heads, past, width)
optimum of transformers.js    likewise, with a flag use_cache_branch                likewise
older exporters               past_N -> present_N                                   (2, batch, heads, past, width)

prefill    n tokens, empty pasts (0 long), a mask of n
decode     1 token, pasts of n, a mask of n + 1, position n
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rsi_deploy.core.types import Array, Feeds, Shape
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import InputSpec

ID_INPUTS = ("input_ids", "input_word_ids")
"""Names of the input with the token ids `(batch, tokens)`."""
MASK_INPUTS = ("attention_mask", "input_mask")
"""Names of the input that is 1 at tokens to look at: of the past ones, then of the new ones."""
POSITION_INPUTS = ("position_ids",)
"""Names of the input with the position of each new token."""
FLAG_INPUTS = ("use_cache_branch",)
"""Names of the input that is true where the past is not empty."""
PROBE_TOKENS = 16
"""Number of tokens of random inputs; few, as the outputs have a score of every token of the vocabulary for each."""
_PAST = "past"
_PRESENT = {"past_key_values": ("present", "present_key_values"), _PAST: ("present",)}
"""Beginning of a cache's input -> beginnings of its output."""


@dataclass(frozen=True, kw_only=True)
class CacheInput:
    """An input for the keys or values of past tokens.

    Attributes:
        spec: the input.
        batch: axis of the samples.
        past: axis of the past tokens.
    """

    spec: InputSpec
    batch: int
    past: int

    def shape(self, batch: int, past: int) -> Shape:
        """Return the shape for these numbers of samples and past tokens."""
        sizes = {self.batch: batch, self.past: past}
        return tuple(dim if isinstance(dim, int) else sizes[axis] for axis, dim in enumerate(self.spec.shape))


@dataclass(frozen=True, kw_only=True)
class Caches:
    """The inputs of a decoder with caches.

    Attributes:
        ids: the input with the token ids.
        others: mask, positions and flag, as far as the model has them.
        inputs: the caches.
    """

    ids: InputSpec
    others: tuple[InputSpec, ...]
    inputs: tuple[CacheInput, ...]

    @classmethod
    def of(cls, specs: Sequence[InputSpec]) -> "Caches | None":
        """Find the caches among the inputs of a model; None without any, and where an input is not known.

        Example:
            >>> ids, mask = (
            ...     InputSpec(name=name, dtype=np.dtype(np.int64), shape=("batch", size))
            ...     for name, size in (("input_ids", "tokens"), ("attention_mask", "total"))
            ... )
            >>> key = InputSpec(name="past_0", dtype=np.dtype(np.float32), shape=(2, "batch", 3, "past", 64))
            >>> found = Caches.of([ids, mask, key])
            >>> {name: array.shape for name, array in found.prefill(np.ones((4, 9), np.int64)).items()}
            {'input_ids': (4, 9), 'attention_mask': (4, 9), 'past_0': (2, 4, 3, 0, 64)}
            >>> Caches.of([ids, mask]) is None
            True
        """
        axes = BatchAxes.of({spec.name: spec.shape for spec in specs}).axes
        ids = next((spec for spec in specs if spec.name in ID_INPUTS and len(spec.shape) == 2), None)
        others = tuple(spec for spec in specs if _is_other(spec))
        inputs = tuple(cache for spec in specs if (cache := _cache(spec, axes[spec.name])) is not None)
        if ids is None or not inputs or 1 + len(others) + len(inputs) != len(specs):
            return None
        return cls(ids=ids, others=others, inputs=inputs)

    def presents(self, outputs: Collection[str]) -> dict[str, str] | None:
        """Return cache input -> output to feed it with next; None if an output is missing.

        Args:
            outputs: names of the model's outputs.
        """
        found = {}
        for cache in self.inputs:
            name = cache.spec.name
            begins = next(begin for begin in _PRESENT if name.startswith(begin))
            names = (present + name.removeprefix(begins) for present in _PRESENT[begins])
            if (partner := next((each for each in names if each in outputs), None)) is None:
                return None
            found[name] = partner
        return found

    def prefill(self, tokens: Array) -> dict[str, Array]:
        """Return the feeds of a first run, without a past.

        Args:
            tokens: token ids, `(n, tokens)`.
        """
        shapes = self.shapes(len(tokens), {self.ids.name: tokens.shape})
        caches = {cache.spec.name: np.zeros(shapes[cache.spec.name], cache.spec.dtype) for cache in self.inputs}
        others = {spec.name: np.ones(shapes[spec.name], spec.dtype) for spec in self.others}
        return {self.ids.name: tokens.astype(self.ids.dtype), **others, **self.places(shapes), **caches}

    def decode(self, feeds: Feeds, outputs: Feeds, tokens: Array) -> dict[str, Array]:
        """Return the feeds of the run after another one.

        Args:
            feeds: feeds of that run.
            outputs: its outputs by name.
            tokens: token ids that come next, `(n, tokens)`.
        """
        presents = self.presents(outputs) or {}
        caches = {name: outputs[output] for name, output in presents.items()}
        known = {self.ids.name: tokens.shape} | {name: array.shape for name, array in caches.items()}
        places = self.places(self.shapes(len(tokens), known))
        masks = {
            spec.name: np.concatenate([feeds[spec.name], np.ones(tokens.shape, spec.dtype)], axis=1)
            for spec in self.others
            if spec.name in MASK_INPUTS
        }
        return {self.ids.name: tokens.astype(self.ids.dtype), **masks, **places, **caches}

    def empty_rows(self, name: str, count: int) -> Array | None:
        """Return an empty cache with samples first `(count, ...)`, or the flag for it; None for any other input."""
        for spec in self.others:
            if spec.name == name and name in FLAG_INPUTS:
                return np.zeros((count, *_settled(spec, (1, 1))), spec.dtype)
        cache = next((cache for cache in self.inputs if cache.spec.name == name), None)
        if cache is None:
            return None
        empty = np.zeros(cache.shape(1, 0), cache.spec.dtype)
        return np.repeat(np.moveaxis(empty, cache.batch, 0), count, axis=0)

    def shapes(self, batch: int, known: Mapping[str, Sequence[int]]) -> dict[str, Shape]:
        """Return the shapes of all inputs: `PROBE_TOKENS` tokens after an empty past, where nothing else is known.

        Args:
            batch: number of samples.
            known: input name -> whole shape, of inputs whose shapes are known.
        """
        ranks = {spec.name: len(spec.shape) for spec in (self.ids, *self.others, *(each.spec for each in self.inputs))}
        fitting = {name: tuple(shape) for name, shape in known.items() if len(shape) == ranks.get(name)}
        caches = [(cache, fitting[cache.spec.name]) for cache in self.inputs if cache.spec.name in fitting]
        past = next((shape[cache.past] for cache, shape in caches), 0)
        batch = next((shape[cache.batch] for cache, shape in caches), batch)
        masks = (fitting[spec.name] for spec in self.others if spec.name in MASK_INPUTS and spec.name in fitting)
        length = next((max(mask[1] - past, 1) for mask in masks), PROBE_TOKENS)
        ids = fitting.get(self.ids.name) or _settled(self.ids, (batch, length))
        found: dict[str, Shape] = {self.ids.name: ids}
        for spec in self.others:
            total = ids[1] + past if spec.name in MASK_INPUTS else ids[1]
            found[spec.name] = _settled(spec, (ids[0], total))
        found |= {cache.spec.name: cache.shape(ids[0], past) for cache in self.inputs}
        return found | fitting

    def places(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Return the positions and the flag, as far as the model has them, for shapes of all inputs."""
        first = self.inputs[0]
        past, found = shapes[first.spec.name][first.past], {}
        for spec in self.others:
            if spec.name in POSITION_INPUTS:
                positions = past + np.arange(shapes[spec.name][-1], dtype=spec.dtype)
                found[spec.name] = np.broadcast_to(positions, shapes[spec.name]).copy()
            elif spec.name in FLAG_INPUTS:
                found[spec.name] = np.full(shapes[spec.name], past > 0, spec.dtype)
        return found


def is_cache(name: str) -> bool:
    """Return whether an input holds keys or values of past tokens, by its name.

    Example:
        >>> is_cache("past_key_values.0.key"), is_cache("input_ids")
        (True, False)
    """
    return name.startswith(_PAST)


def _cache(spec: InputSpec, batch: int | None) -> CacheInput | None:
    """Return an input of past keys or values; None if its layout is not known."""
    left = [axis for axis, dim in enumerate(spec.shape) if not isinstance(dim, int) and axis != batch]
    if not is_cache(spec.name) or batch is None or len(left) != 1 or len(spec.shape) < 4:
        return None
    return CacheInput(spec=spec, batch=batch, past=left[0])


def _is_other(spec: InputSpec) -> bool:
    """Return whether an input is a mask, positions or a flag."""
    return spec.name in FLAG_INPUTS or (spec.name in (*MASK_INPUTS, *POSITION_INPUTS) and len(spec.shape) == 2)


def _settled(spec: InputSpec, sizes: Shape) -> Shape:
    """Return the shape of an input, with sizes for its open dimensions."""
    return tuple(dim if isinstance(dim, int) else size for dim, size in zip(spec.shape, (*sizes, 1, 1), strict=False))
