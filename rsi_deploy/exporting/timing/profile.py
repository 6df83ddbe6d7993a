"""`profile`: what every split of every site of a model costs in time on this machine.

    model --> dense ONNX --> pieces of one site --> timed (or known from the cache) --> whole model held against the sum

For an ONNX file no torch is loaded: an edge box needs none.
"""

import datetime
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from graph_passes import FoldBatchNormPass
from rsi_deploy import __version__
from rsi_deploy.benchmark.variants import Runtime, make_feeds
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.core.progress import step
from rsi_deploy.core.sites import site_name
from rsi_deploy.core.types import Feeds
from rsi_deploy.core.units import parse_seconds
from rsi_deploy.costing.cost_cache import CostCache, conditions_here
from rsi_deploy.costing.cost_table import NOISY, Conditions, CostTable, ModelTime, SiteCost
from rsi_deploy.costing.site_models import Piece, pieces
from rsi_deploy.costing.site_timing import TimedShape, shapes_of, time_sites
from rsi_deploy.costing.trial_plans import trial_plans, with_model_time
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.io.atomic import write_text
from rsi_deploy.io.locks import ScratchFolder
from rsi_deploy.io.model_folder import model_file
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.io.onnx_file import model_hash, read_onnx, write_external
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.precision.quantizers import quantize
from rsi_deploy.precision.schemes import DYNAMIC, FLOAT32, Scheme, static
from rsi_deploy.runtime.batch_independence import count_samples
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.shapes import input_shapes, refuse_nameless
from rsi_deploy.runtime.feeds.user_feeds import read_feeds
from rsi_deploy.runtime.feeds.values import describe_array
from rsi_deploy.runtime.shape_trace import trace_run

Progress = Callable[[str, int, int], None]

BUDGET = 240.0
"""Default time for a table, in seconds."""
PRECISION = 0.05
MODEL_SHARE = 0.2
"""Of the time, for the whole model."""
SCHEMES = {"float32": FLOAT32, "static-int8": static("minmax"), "dynamic-int8": DYNAMIC}
"""Value of `--scheme` -> scheme."""


@explains_broken_models
def profile(
    model: str | Any,
    output: str | Path | None = None,
    *,
    batch: int = 1,
    provider: str = "cpu",
    threads: int | None = None,
    budget: str | float = BUDGET,
    precision: float = PRECISION,
    scheme: str = "float32",
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | Sequence[str] | None = None,
    feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None,
    preprocessing: Preprocessing | None = None,
    assume_constant: bool = False,
    fresh: bool = False,
    force: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    command: str | None = None,
) -> CostTable:
    """Measure a cost table on this machine, for `export(cost=...)` here or anywhere else.

    Args:
        model: as for `export`; for an ONNX file no torch is needed.
        output: the JSON file to write; None writes none.
        batch: samples a call; the table holds for this one.
        provider: with options.
        threads: inside one operator; None is onnxruntime's default.
        budget: of time: seconds, or `"240s"`.
        precision: relative half width of the speedups' intervals that is narrow enough.
        scheme: precision of the products: "float32", "static-int8" or "dynamic-int8".
        weights: torchvision's.
        checkpoint: a factory's.
        input_shape: as for `export`.
        feeds: input name -> array, or an `.npz` of them, in place of random inputs; they tell the batch.
        preprocessing: as for `export`, which with the same one finds this table in the cache.
        assume_constant: as for `export`.
        fresh: measure again what the cache has.
        force: replace `output`.
        seed: of random inputs and the order of turns.
        progress: called with (shape, index, count).
        command: for the table.

    Raises:
        UsageError: a request that cannot be meant, or a provider that is not here.
        ModelError: the model cannot be run.
    """
    target = None if output is None else _free(Path(output), force)
    if scheme not in SCHEMES:
        raise UsageError(f"scheme {scheme!r} is unknown; type one of {', '.join(SCHEMES)}")
    seconds = parse_seconds(budget, "--budget")
    plain, shapes = input_shapes([input_shape] if isinstance(input_shape, str) else list(input_shape or ()))
    own_feeds = None if feeds is None else read_feeds(feeds) if isinstance(feeds, str | Path) else dict(feeds)
    with ScratchFolder() as folder:
        dense = Path(folder) / "dense.onnx"
        with step("load"):
            name = write_dense(
                model, dense, weights, checkpoint, plain, seed, preprocessing, assume_constant=assume_constant
            )
        fed = fed_with(dense, batch, seed, own_feeds, shapes)
        costing = Costing(
            provider=provider,
            threads=threads,
            seconds=seconds,
            precision=precision,
            seed=seed,
            scheme=SCHEMES[scheme],
        )
        with step("cost table"):
            table = costing.table(dense, fed, name=name, fresh=fresh, progress=progress, command=command)
    if target is not None:
        write_text(target, table.model_dump_json(indent=1) + "\n")
    return table


def fed_with(
    dense: Path,
    batch: int,
    seed: int,
    own_feeds: Mapping[str, npt.NDArray[Any]] | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Feeds:
    """Return the inputs that a model is timed on: as `bench` feeds it, so that whole times are those of `bench`."""
    feeds, _ = make_feeds(
        model_inputs(dense), batch=0 if own_feeds else batch, seed=seed, given=own_feeds, shapes=shapes
    )
    return feeds


@dataclass(frozen=True, kw_only=True)
class Costing:
    """Settings of cost tables.

    Attributes:
        provider: with options.
        threads: inside one operator.
        seconds: for a table.
        precision: relative half width of the intervals that is narrow enough.
        seed: of the order of turns.
        scheme: precision that the small models and the whole model are timed in.
    """

    provider: str = "cpu"
    threads: int | None = None
    seconds: float = BUDGET
    precision: float = PRECISION
    seed: int = 0
    scheme: Scheme = FLOAT32

    @property
    def conditions(self) -> Conditions:
        """The conditions of times that are measured here."""
        return conditions_here(self.provider, self.threads, self.scheme.name)

    def table(
        self,
        dense: Path,
        feeds: Feeds,
        *,
        name: str,
        fresh: bool = False,
        progress: Progress | None = None,
        command: str | None = None,
    ) -> CostTable:
        """Return the table of the dense model at `dense` on these inputs, from the cache or measured.

        Raises:
            UsageError: the provider is not here, or does not run the model.
            ModelError: the model cannot be run.
        """
        started = time.monotonic()
        conditions = self.conditions
        cache = CostCache.of(conditions)
        inputs = {key: describe_array(array) for key, array in feeds.items()}
        digest = model_hash(dense)
        key = f"{digest} {inputs}"
        if not fresh and (known := cache.table(key)) is not None:
            return known
        found, untimed = self.pieces(dense, feeds)
        shapes = shapes_of(found)
        costs = {} if fresh else cache.costs(list(shapes))
        missing = [shape for signature, shape in shapes.items() if signature not in costs]
        left = self.seconds * (1 - MODEL_SHARE) - (time.monotonic() - started)
        made = self._timed(missing, left, progress)
        cache.keep(made)
        costs |= {cost.signature: cost for cost in made}
        by_key = costs_by_key(found.values(), costs)
        table = CostTable(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC),
            command=command or "rsi_deploy.profile(...)",
            conditions=conditions,
            model=ModelTime(
                name=name, hash=digest, batch=count_samples(dense, feeds), inputs=inputs, dense_nanoseconds=1
            ),
            sites={site: piece.key for site, piece in found.items() if piece.key in by_key},
            untimed=untimed,
            costs=tuple(by_key.values()),
            seconds=0.0,
            precision=self.precision,
            notes=tuple(_notes(costs, self.precision)),
        )
        table = self._with_model(table, dense, feeds)
        table = table.model_copy(update={"seconds": time.monotonic() - started})
        cache.keep_table(key, table)
        return table

    def _timed(self, missing: Sequence[TimedShape], seconds: float, progress: Progress | None) -> list[SiteCost]:
        runtime = Runtime(provider=self.provider, threads=self.threads)
        return time_sites(
            missing, runtime, seconds=max(seconds, 1.0), precision=self.precision, seed=self.seed, progress=progress
        )

    def _with_model(self, table: CostTable, dense: Path, feeds: Feeds) -> CostTable:
        plans = trial_plans(table.by_site())
        lower = None if self.scheme is FLOAT32 else partial(quantize, scheme=self.scheme, feeds=lambda: iter([feeds]))
        return with_model_time(table, dense, feeds, plans, max(self.seconds * MODEL_SHARE, 1.0), lower)

    def pieces(self, dense: Path, feeds: Feeds) -> tuple[dict[str, Piece], dict[str, str]]:
        """Site name -> its piece, and site name -> why it has none."""
        trace = trace_run(dense, feeds)
        model = load_model(dense)
        entries = list(pieces(model, trace.inputs, trace.macs))
        uses = Counter(site.weight for site, _ in entries)
        found: dict[str, Piece] = {}
        untimed: dict[str, str] = {}
        for site, piece in entries:
            name = site_name(site.weight)
            if uses[site.weight] > 1:
                untimed[name] = "several nodes share its weight"
            elif isinstance(piece, str):
                untimed[name] = piece
            else:
                found[name] = piece if self.scheme is FLOAT32 else piece.lowered(self._lowered)
        return found, untimed

    def _lowered(self, model: bytes, feeds: Feeds) -> bytes:
        """Return a small model in the scheme."""
        with ScratchFolder() as folder:
            source, target = Path(folder) / "site.onnx", Path(folder) / "lowered.onnx"
            source.write_bytes(model)
            quantize(source, target, self.scheme, lambda: iter([feeds]))
            return target.read_bytes()


def costs_by_key(pieces: Iterable[Piece], costs: Mapping[str, SiteCost]) -> dict[str, SiteCost]:
    """Return key of a piece -> its times, with those of its hidden units.

    Args:
        pieces: pieces of sites.
        costs: times by signature.
    """
    found: dict[str, SiteCost] = {}
    for piece in pieces:
        cost = costs.get(piece.signature)
        if cost is None or piece.key in found:
            continue
        if piece.group is None:
            found[piece.key] = cost
        elif piece.group.signature in costs:
            found[piece.key] = cost.with_units(costs[piece.group.signature], piece.key)
    return found


def _notes(costs: Mapping[str, SiteCost], precision: float) -> list[str]:
    """What a reader must know of the times."""
    wide = [cost for cost in costs.values() if cost.half_width is None or cost.half_width > precision]
    notes = []
    if wide:
        widest = max((cost.half_width for cost in wide if cost.half_width is not None), default=None)
        width = "" if widest is None else f" (the widest interval is +-{100 * widest:.0f} %)"
        notes.append(
            f"{len(wide)} of {len(costs)} shapes were not measured to {100 * precision:g} %{width}: the machine was "
            f"busy, or the time short (--budget)"
        )
    noisy = [cost for cost in costs.values() if any(cost.is_noisy(s.form, s.rank) for s in cost.splits)]
    if noisy:
        notes.append(
            f"{len(noisy)} shapes have splits that are too noisy to tell (+-{100 * NOISY:g} % or more): those are not "
            f"taken for faster"
        )
    return notes


def _free(path: Path, force: bool) -> Path:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; -o takes a file such as cost.json")
    if path.exists() and not force:
        raise UsageError(f"{path} exists; choose another name, or add --force to replace it")
    if not path.resolve().parent.is_dir():
        raise UsageError(f"the folder of {path} does not exist: make it first")
    return path


def write_dense(
    model: str | Any,
    dense: Path,
    weights: str,
    checkpoint: str | Path | None,
    shape: str | None,
    seed: int,
    preprocessing: Preprocessing | None = None,
    *,
    assume_constant: bool = False,
) -> str:
    """Write the dense model that an export would compress, with the same preprocessing stored in it; its name.

    Raises:
        UsageError: no such model, or options that do not belong to it.
        ModelError: it cannot be read or exported.
    """
    file = model_file(model)
    if isinstance(file, str) and file.endswith(".onnx"):
        path = Path(file)
        if not path.is_file():
            raise UsageError(f"no such file: {model}; expected an .onnx file, or another MODEL")
        if checkpoint is not None or weights != "DEFAULT":
            raise UsageError("--checkpoint and --weights go with PyTorch models, not with an ONNX file; leave them out")
        refuse_nameless(shape, path)
        graph = read_onnx(path, assume_constant=assume_constant)
        name = path.name if file == model else Path(model).resolve().name
        own = Preprocessing.stored(graph.metadata_props)
    else:
        from rsi_deploy.torch_models.model_source import load_source, source_of_module
        from rsi_deploy.torch_models.to_onnx import to_onnx

        source = (
            load_source(model, weights=weights, checkpoint=checkpoint, input_shape=shape, seed=seed)
            if isinstance(model, str)
            else source_of_module(model, shape, seed)
        )
        graph, name, own = to_onnx(source).model, source.name, source.preprocessing
    if (steps := own if preprocessing is None else preprocessing.over(own)) is not None:
        graph.metadata_props[METADATA_KEY] = steps.to_metadata()
    FoldBatchNormPass()(graph)
    if not list(graph.graph):
        raise ModelError(f"{name} has no nodes; give a model that computes something")
    write_external(graph, dense)
    return name
