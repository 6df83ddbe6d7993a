"""Choose the rows of a batch from which the moments of a site are computed, and the taps that read them.

The total of `moments.row_limit` is spread evenly over the samples. Rows are chosen once a batch from (seed, site,
batch): both streams, the response and the value to which it is added are read at the same places. Padding under a mask
input is no row.

    x   input of the site; the columns of a Conv's patches are sorted by point, then by channel: see `in_order`
    y   output of the node minus its bias; onnxruntime has computed the product
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibration.activations import RowCounts
from rsi_deploy.calibration.moments import GRAM_LIMIT, ROWS, Moments, Samples, row_limit
from rsi_deploy.calibration.output_sensitivity import are_token_scores
from rsi_deploy.linalg.solver import stream_seed
from rsi_deploy.onnx_models.calibration.reachable_sites import Reached, row_sizes
from rsi_deploy.onnx_models.calibration.rows import Taps, all_patches, chosen, output_size, patch_index
from rsi_deploy.onnx_models.calibration.segment import Segment
from rsi_deploy.onnx_models.calibration.stages import Program
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import dim_of

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]


_WHOLE = {TensorProto.INT32, TensorProto.INT64}


class Readings:
    """Reads the rows of the sites of a program.

    Args:
        program: the dense model.
        path: its file.
        reached: the sites.
        samples: number of calibration samples.
        seed: random seed for the choice of rows.
        provider: execution provider of onnxruntime.

    Attributes:
        axes: batch axes of the model's inputs.
    """

    def __init__(
        self, program: Program, path: Path, reached: Iterable[Reached], *, samples: int, seed: int, provider: str
    ) -> None:
        self._program, self._path, self._provider = program, path, provider
        self._reached = list(reached)
        self._samples, self._seed = samples, seed
        self.axes = axes_of(program.model)
        ends = (value.type.tensor_type.shape.dim for value in program.model.graph.output)
        self._is_language_model = any(are_token_scores([dim.dim_value or None for dim in dims]) for dims in ends)
        self._known: dict[tuple[tuple[str, tuple[int, ...]], ...], Shapes] = {}

    def index(self, group: Iterable[Reached], batch: Feeds, number: int, *, survey: bool = False) -> dict[str, Array]:
        """Return the inputs of the taps of these sites for batch `number`; a survey takes fewer rows."""
        shapes = self._shapes(batch)
        feeds: dict[str, Array] = {}
        for r in group:
            shape = shapes[r.graph.data]
            rows = (survey_rows if survey else row_limit)(r.site.in_features, r.site.groups)
            ran = max(self._samples, 1) * self.share(batch, survey=survey)
            quota = rows * self.axes.samples(batch) / ran
            if r.graph.window is not None:
                at, where, inside = self._patches(
                    r, r.graph.window, number, _whole(quota / max(shape[0], 1)), shape[2:]
                )
                feeds[f"{r.tag}/index"], feeds[f"{r.tag}/inside"] = where, inside
            else:
                shape = _row_shape(r, shape)
                at = chosen(math.prod(shape[:-1]), _whole(quota), self._generator(r, number), _tokens(batch, shape))
                feeds[f"{r.tag}/index"] = at
            feeds[f"{r.tag}/response/index"] = feeds[f"{r.tag}/beside/index"] = at
        return feeds

    def share(self, batch: Feeds, *, survey: bool = False) -> float:
        """Return the share of the data that runs: below 1 for text with more tokens than any site has rows."""
        if not self._is_language_model:
            return 1.0
        rows = survey_rows if survey else row_limit
        enough = max((rows(r.site.in_features, r.site.groups) for r in self._reached), default=0)
        tokens = token_count(batch) / max(self.axes.samples(batch), 1) * self._samples
        return min(1.0, enough / max(tokens, 1.0))

    def _generator(self, r: Reached, number: int) -> np.random.Generator:
        return np.random.default_rng(stream_seed(self._seed, f"{r.site.name}/{number}"))

    def _patches(
        self, r: Reached, window: gp.Window, number: int, limit: int, size: tuple[int, ...]
    ) -> tuple[Array, Array, Array]:
        """Choose output positions of a Conv, and return them with `patch_index` of them."""
        count = math.prod(output_size(window, size))
        if limit >= count:
            return all_patches(window, size)
        at = chosen(count, limit, self._generator(r, number))
        return (at, *patch_index(window, size, at))

    def counts(self, counts: RowCounts, r: Reached, batch: Feeds, begin: int, index: Feeds) -> Tensor | None:
        """Return the weights of a product's rows in a batch that begins with sample `begin`; None for 1 each."""
        at = torch.from_numpy(index[f"{r.tag}/response/index"])
        return counts.of(begin, self.axes.samples(batch), _row_shape(r, self._shapes(batch)[r.graph.data]), at)

    def alone(self, batch: Feeds) -> set[str]:
        """Return the outputs of sites that are added to nothing, or to a value of another shape."""
        shapes = self._shapes(batch)
        return {r.graph.output for r in self._reached if not r.beside or shapes[r.beside] != shapes[r.graph.output]}

    def _shapes(self, batch: Feeds) -> Shapes:
        """Return the shapes of all values at the sites for a batch of these shapes."""
        key = tuple((name, array.shape) for name, array in sorted(batch.items()))
        if key not in self._known:
            is_cut = self._is_language_model and self.axes.fixed is None and takes_any_length(self._program.model)
            few = first_tokens(self.axes.cut(batch, slice(0, 1)), 8) if is_cut else batch
            shapes = self._measured(few)
            if few is not batch and self._declared(few) == shapes:
                shapes = self._declared(batch)
            elif few is not batch:
                shapes = self._measured(batch)
            self._known[key] = shapes
        return self._known[key]

    @functools.cached_property
    def _values(self) -> list[str]:
        """The values at the sites."""
        values = ((r.graph.data, r.graph.output, r.beside) for r in self._reached)
        return sorted(set(itertools.chain.from_iterable(values)) - {""})

    def _measured(self, batch: Feeds) -> Shapes:
        """Run a batch, and return the shapes of the values."""
        taps = Taps()
        for value in self._values:
            taps.shape(value, f"rsi_deploy/{value}")
        nodes = self._program.model.graph.node
        with Segment(self._program, self._path, nodes, taps, provider=self._provider) as run:
            found = run(batch)
        return {value: tuple(int(n) for n in found[f"rsi_deploy/{value}/shape"]) for value in self._values}

    def _declared(self, batch: Feeds) -> Shapes:
        """Return the shapes that the model declares for the values, for a batch; without those that it does not."""
        graph = self._program.model.graph
        sizes: dict[str, int] = {}
        for value in graph.input:
            dims = value.type.tensor_type.shape.dim
            sizes |= {dim.dim_param: n for dim, n in zip(dims, np.shape(batch.get(value.name, ())), strict=False)}
        found = {}
        for value in (*graph.input, *graph.value_info):
            dims = value.type.tensor_type.shape.dim
            shape = tuple(dim.dim_value or sizes.get(dim.dim_param, 0) for dim in dims)
            if all(shape):
                found[value.name] = shape
        return {value: found[value] for value in self._values if value in found}


def _row_shape(r: Reached, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape `(*rows, in)` of a product's data of this shape."""
    ordered = [shape[axis] for axis in r.order.data or range(len(shape))]
    return (*row_sizes(ordered, r.site.in_features), r.site.in_features)


def takes_any_length(model: ModelProto) -> bool:
    """Return whether the inputs `(samples, tokens)` of whole numbers have an open number of tokens."""
    weights = {tensor.name for tensor in model.graph.initializer}
    types = [value.type.tensor_type for value in model.graph.input if value.name not in weights]
    texts = [each.shape.dim for each in types if each.elem_type in _WHOLE and len(each.shape.dim) == 2]
    return bool(texts) and not any(dims[1].dim_value for dims in texts)


def first_tokens(batch: Feeds, count: int) -> Feeds:
    """Return the first tokens of texts: inputs `(samples, tokens)` of whole numbers are cut."""
    return {
        name: array[:, :count] if array.ndim == 2 and array.dtype.kind in "iu" else array
        for name, array in batch.items()
    }


def token_count(batch: Feeds) -> int:
    """Return the most numbers in an input `(samples, tokens)` of whole numbers; 0 without one."""
    return max((a.size for a in batch.values() if a.ndim == 2 and a.dtype.kind in "iu"), default=0)


def survey_rows(in_features: int, groups: int) -> int:
    """Return how many rows suffice for a choice of ranks: y = W x holds no noise."""
    return min(row_limit(in_features, groups), max(ROWS, 8 * in_features))


def taps_of(
    group: Iterable[Reached],
    *,
    data: Callable[[Reached], bool] = lambda r: True,
    biases: Mapping[str, tuple[str, float]] | None = None,
    beside: Collection[str] = (),
) -> Taps:
    """Return taps of the sites' inputs where `data` is true, of the outputs in `biases`, and of values in `beside`."""
    taps = Taps()
    for r in group:
        site = r.site
        width = site.groups * site.out_features
        outputs = taps.positions if site.kernel else functools.partial(taps.rows, order=r.order.output)
        if data(r) and site.kernel:
            points = math.prod(site.kernel)
            taps.patches(r.graph.data, r.tag, site.groups * site.in_features // points, points)
        elif data(r):
            taps.rows(r.graph.data, r.tag, site.in_features, r.order.data)
        if biases and r.graph.output in biases:
            outputs(r.graph.output, f"{r.tag}/response", width)
            if bias := biases[r.graph.output][0]:
                taps.constant(bias, f"{r.tag}/bias")
        if r.beside in beside:
            outputs(r.beside, f"{r.tag}/beside", width)
    return taps


def inputs_of(r: Reached, rows: Array) -> Tensor:
    """Return gathered data as `(groups, rows, in)`; a Conv's columns are sorted by point and channel."""
    groups, points = r.site.groups, math.prod(r.site.kernel)
    x = torch.from_numpy(rows).reshape(len(rows), points, groups, rows.shape[1] // (points * groups))
    x = x.movedim(2, 0).reshape(groups, len(rows), -1).contiguous()
    return x[..., _by_channel(r)] if _wide(r) else x


def weight_of(r: Reached) -> Tensor:
    """Return the weight, float32 `(groups, out, in)`, with its columns in the order of `inputs_of`.

    Raises:
        ModelError: the weight holds NaN or infinite values.
    """
    weight, points = r.weight(), math.prod(r.site.kernel)
    if points == 1 or _wide(r):
        return weight
    return weight.reshape(*weight.shape[:-1], -1, points).mT.reshape(weight.shape)


def response_of(r: Reached, values: Mapping[str, Array], scale: float) -> Tensor:
    """Return the response `(groups, rows, out)` of gathered outputs, without the bias in them."""
    y = r.grouped(values[f"{r.tag}/response/rows"])
    if (bias := values.get(f"{r.tag}/bias")) is not None:
        y -= scale * torch.from_numpy(bias).reshape(r.site.groups if bias.size > 1 else 1, 1, -1)
    return y


def in_order(r: Reached, moments: Moments | Samples | None) -> Moments | Samples | None:
    """Return moments with a Conv's columns in the order of the weight, by channel and point; `Samples` have it."""
    if not isinstance(moments, Moments) or math.prod(r.site.kernel) == 1:
        return moments
    n, points = r.site.in_features, math.prod(r.site.kernel)
    apart = moments.xx.reshape(-1, points, n // points, points, n // points)
    order = _by_channel(r)
    return replace(
        moments,
        mean_x=moments.mean_x[:, order],
        xx=apart.permute(0, 2, 1, 4, 3).reshape(moments.xx.shape),
        yx=moments.yx[..., order],
        folds=tuple(fold for part in moments.folds if isinstance(fold := in_order(r, part), Moments)),
    )


def _wide(r: Reached) -> bool:
    return r.site.in_features > GRAM_LIMIT and math.prod(r.site.kernel) > 1


def _by_channel(r: Reached) -> Tensor:
    """Return, for each column by channel and point, its place by point and channel."""
    points = math.prod(r.site.kernel)
    return torch.arange(r.site.in_features).reshape(points, -1).T.reshape(-1)


def own_biases(model: ModelProto) -> dict[str, tuple[str, float]]:
    """Return, by output that is response + scale * constant, the constant's name (or "") and the scale."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        bias = node.input[2] if len(node.input) > 2 else ""
        scale = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        splitter = gp.find_pass(node.domain, node.op_type)
        if splitter is None or not splitter.linear:
            continue
        is_conv = splitter.contraction is gp.Contraction.CONV
        if not bias or is_conv or math.prod(sizes.get(bias, (2, 0))[:-1]) == 1:
            found[node.output[0]] = bias, scale
    return found


def padding_mask(batch: Feeds) -> Array | None:
    """Return the padding mask among the inputs, bool `(N, L)`, False for padding; None where there is none.

    Its name contains "mask", it holds zeros and ones alone, and every row begins (or every row ends) with a token. A
    mask that marks the padding itself is not accepted.
    """
    for name, array in batch.items():
        if "mask" in name.lower() and array.ndim == 2 and array.size and np.isin(array, (0, 1)).all():
            mask: Array = array == 1
            if mask[:, 0].all() or mask[:, -1].all():
                return mask
    return None


def axes_of(model: ModelProto) -> BatchAxes:
    """Return the batch axes of a model's inputs."""
    stored = {tensor.name for tensor in model.graph.initializer}
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input if value.name not in stored}
    return BatchAxes.of({name: tuple(map(dim_of, dims)) for name, dims in shapes.items()})


def _tokens(batch: Feeds, shape: Sequence[int]) -> Array | None:
    """Return the flat positions of the rows that are no padding; None where no mask fits the shape."""
    mask = padding_mask(batch)
    if mask is None:
        return None
    if tuple(shape[:2]) == mask.shape and len(shape) > 2:
        return np.flatnonzero(np.repeat(mask, math.prod(shape[2:-1])))
    return np.flatnonzero(mask) if tuple(shape[:-1]) == (mask.size,) and mask.shape[1] > 1 else None


def _whole(rows: float) -> int:
    return max(1, round(rows))
