"""The steps of one export, with the settings they share and the times they took.

    export_dense -> dense_facts -> compress -> verify -> accuracy -> latency

Each takes paths and what the steps before it found; nothing large is kept between them.
"""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch

from graph_passes import Factors, FoldBatchNormPass, Form, Split, count_parameters
from rsi_deploy import __version__
from rsi_deploy.benchmark.latency import BenchResult, bench
from rsi_deploy.benchmark.variants import make_feeds
from rsi_deploy.calibration.calibration_data import example_shapes
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError, RsiDeployError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.progress import at_samples, step
from rsi_deploy.core.types import Feeds
from rsi_deploy.data.feeding import Feeding
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.data.sources import Dataset
from rsi_deploy.evaluation.accuracy import AccuracyResult, evaluate
from rsi_deploy.evaluation.softmax_bound import Head, SoftmaxBound, find_head, softmax_bound
from rsi_deploy.execution.executor import Executor, LocalExecutor
from rsi_deploy.execution.ray_executor import ray_executor
from rsi_deploy.execution.result_store import ResultStore, StoringExecutor
from rsi_deploy.exporting.dense_size import dense_size
from rsi_deploy.io.onnx_file import (
    name_nodes_,
    read_onnx,
    release_weights_,
    remove_unused_,
    weights_hash,
    write_external,
)
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.opset import check_conversion, convert_opset
from rsi_deploy.onnx_models.rewrite import split_and_write
from rsi_deploy.onnx_models.split import SplitModel
from rsi_deploy.planning.decide import Planned
from rsi_deploy.planning.settings import ExportSettings
from rsi_deploy.report.schema import Accuracy, ProbeOutput, Stage, Verification
from rsi_deploy.runtime.batch_independence import count_samples
from rsi_deploy.runtime.feeds.batch_axes import BatchAxes
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.feeds.probe import probe_feeds
from rsi_deploy.runtime.feeds.shapes import unsettled_inputs
from rsi_deploy.runtime.feeds.values import Value, arrays_of_outputs
from rsi_deploy.runtime.parity import (
    EXPORTER_TOLERANCE,
    OutputComparison,
    check_repeatable,
    compare_outputs,
    explain_random_models,
    random_nodes,
    surgery_check,
    tolerance_for,
)
from rsi_deploy.runtime.sessions import make_session, run_session
from rsi_deploy.runtime.shape_trace import UncountedNode, trace_run, uncounted_nodes, unknown_operators
from rsi_deploy.torch_models.model_source import Source
from rsi_deploy.torch_models.to_onnx import to_onnx

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class DenseFacts:
    """What is known of the dense model before it is compressed: size, probe inputs, outputs on them, MACs a sample.

    `attention_macs` are the part of `macs` that no factorization changes; `uncounted` are nodes whose MACs are unknown.
    """

    size: Size
    feeds: Feeds
    outputs: list[Value] | None
    macs: dict[str, int]
    batch: int
    attention_macs: dict[str, int] = field(default_factory=dict)
    uncounted: tuple[UncountedNode, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """The written model, and what only its making knew."""

    split: SplitModel
    head: Head | None
    head_factors: Factors | None
    params: int
    biased: bool


@dataclass(kw_only=True)
class ExportSteps:
    """The steps of one export, with the settings they share and the times they took.

    `finished` is what an earlier run has finished before it was killed, and where this one keeps its own; None where
    the model is not large. `sources` are data, --calib before --data, whose first sample gives the open
    shapes.
    """

    settings: ExportSettings
    solver: Solver
    device: torch.device
    provider: str
    progress: Progress | None
    shapes: Mapping[str, Sequence[int]]
    given: Feeds | None
    assume_constant: bool
    sources: Mapping[str, Any] = field(default_factory=dict)
    ray: str | None = None
    finished: ResultStore | None = None
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    source_hash: str = ""
    _examples: dict[str, tuple[int, ...]] | None = None

    def probe(self, model: Path, steps: Preprocessing | None) -> Feeds:
        """Probe inputs for the dense model at `model`; what nobody gives a shape takes that of the data."""
        if self._examples is None:
            specs = model_inputs(model)
            known = self.given is not None or not unsettled_inputs(specs, self.shapes)
            self._examples = {} if known else example_shapes(self.sources, specs, steps)
        return probe_feeds(model, self.settings.seed, self.shapes, self.given, self._examples)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one step."""
        started = time.perf_counter()
        with step(name):
            yield
        self.stages.append(Stage(name=name, seconds=time.perf_counter() - started))

    def export_dense(
        self, source: Source, path: Path, steps: Preprocessing | None, opset: int | None
    ) -> OutputComparison | None:
        """Write the dense ONNX model, and hold it against the source where it was made anew.

        A torch source is let go then; an ONNX file is made anew in another opset.
        """
        if source.onnx is not None:
            with self.stage("read"):
                model = read_onnx(source.onnx, assume_constant=self.assume_constant)
                if unused := remove_unused_(model):
                    self.notes.append(unused)
                before = model.opset_imports.get("", 0)
                if opset is not None:
                    model = convert_opset(model, opset, source.name)
                FoldBatchNormPass()(model)
                self._write_dense(model, path, steps)
            if opset is None or opset == before:
                return None
            with self.stage("verify opset"):
                try:
                    feeds = self.probe(path, steps)
                except ModelError:  # an input that cannot be fed: `dense_facts` says so
                    return None
                with explain_random_models(path, feeds, source.name):
                    return check_conversion(source.onnx, path, (before, opset), feeds)
        with self.stage("export dense"):
            exported = to_onnx(source, opset=opset)
            self.notes.extend(exported.notes)
            self._write_dense(exported.model, path, steps)
        with self.stage("verify exporter"):
            feeds = self.probe(path, steps)
            expected = _torch_outputs(source, list(feeds.values()))
            source.module = source.program = None
            del exported
            gc.collect()
            session = make_session(path, optimize="disabled", prepack=False)
            outputs = run_session(session, feeds, "the dense model")
        tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
        with explain_random_models(path, feeds, source.name):
            return compare_outputs(
                expected, outputs, what="exporter gate (torch against dense ONNX)", tolerance=tolerance
            )

    def dense_facts(
        self,
        source: Source,
        dense: Path,
        dataset: Dataset | None,
        steps: Preprocessing | None,
        known: AccuracyResult | None = None,
        size: Size | None = None,
    ) -> tuple[DenseFacts, AccuracyResult | None]:
        """Trace the dense model on the probe inputs, and measure its accuracy where there are data, unless `known`.

        `size` is that of the user's model where it is known already, as in a sweep, whose source is a copy of it.
        """
        with self.stage("read dense"):
            model = load_model(dense)
            self.source_hash = weights_hash(model)
            random = random_nodes(model)
            release_weights_(model)
            size = size or dense_size(source.onnx, dense)
        with self.stage("trace"):
            feeds: Feeds = {}
            try:
                feeds = self.probe(dense, steps)
                trace = trace_run(dense, feeds)
            except ModelError as error:
                if source.onnx is None or dataset is not None:
                    raise
                reason = str(error).replace(str(dense), source.name).replace(f"{dense.name}:", f"{source.name}:")
                hint = ": pass --input-shape or --feeds" if feeds else ""
                self.notes.append(f"nothing could be verified or measured: {reason}{hint}")
                unknown = unknown_operators(dense)
                self.notes += [f"the MACs leave out {uncounted_nodes(unknown)}"] if unknown else []
                return DenseFacts(size=size, feeds=feeds, outputs=None, macs={}, batch=1, uncounted=unknown), None
            check_repeatable(dense, feeds, source.name, trace.outputs)
            if random:
                self.notes.append(
                    f"the model draws random numbers ({', '.join(random)}): its outputs were compared in the "
                    "first run of a session, where onnxruntime draws the same ones"
                )
            batch = count_samples(dense, feeds)
            macs = {node: count // batch for node, count in trace.macs.items()}
            attention = {node: count // batch for node, count in trace.attention_macs.items()}
            size = size.model_copy(update={"macs": sum(macs.values())})
            if trace.uncounted:
                self.notes.append(f"the MACs leave out {uncounted_nodes(trace.uncounted)}")
        accuracy = known
        if dataset is not None and known is None:  # first of all the long work: data that do not fit must say so now
            with self.stage("accuracy dense"):
                try:
                    accuracy = evaluate(
                        dense,
                        dataset,
                        preprocessing=_applied(steps, dataset),
                        provider=self.provider,
                        progress=at_samples,
                    )
                except RsiDeployError as error:  # the user knows the model by another name
                    raise type(error)(str(error).replace(str(dense), source.name)) from error
        facts = DenseFacts(
            size=size,
            feeds=feeds,
            outputs=trace.outputs,
            macs=macs,
            batch=batch,
            attention_macs=attention,
            uncounted=trace.uncounted,
        )
        return facts, accuracy

    def compress(
        self,
        dense: Path,
        path: Path,
        made: Planned,
        *,
        with_head: bool,
        may_be_dense: bool = False,
        joint: bool = True,
    ) -> Compressed:
        """Factorize what is not fitted already, split and write the model at `path`.

        Args:
            dense: the dense model.
            path: of the model to be.
            made: what decides every site, and what is fitted.
            with_head: keep the factors of the head for its softmax bound.
            may_be_dense: with no split at all, too.
            joint: split jointly what the settings let be.
        """
        with self.stage("factorize, split, save"):
            head = find_head(load_model(dense)) if with_head else None
            with self._executor() as executor:
                keep = [head.weight] if head else []
                split, params = self._split(dense, path, made, keep, self.progress, executor, joint=joint)
        if not may_be_dense and not any(site.rank for site in split.sites):
            raise ModelError(f"nothing to split: {_reasons(split)}; rsi-deploy inspect shows every site")
        return Compressed(
            split=split,
            head=head,
            head_factors=split.kept.get(head.weight) if head else None,
            params=params,
            biased=bool(made.fitted),
        )

    def write(self, dense: Path, path: Path, made: Planned) -> None:
        """Write the model that `made` gives as `compress` would, for a look at it."""
        self._split(dense, path, made, [], None, LocalExecutor())

    def _split(
        self,
        dense: Path,
        path: Path,
        made: Planned,
        keep: Sequence[str],
        progress: Progress | None,
        executor: Executor,
        *,
        joint: bool = True,
    ) -> tuple[SplitModel, int]:
        """Write the split model; its records and its number of parameters."""
        model = load_model(dense)
        split = split_and_write(
            model,
            path,
            made.planner,
            self.solver,
            fitted=made.fitted,
            joint=joint and self.settings.joint,
            progress=progress,
            keep=keep,
            device=self.device,
            metadata={
                "rsi_deploy.version": __version__,
                "rsi_deploy.settings": self.settings.model_dump_json(),
                "rsi_deploy.source_hash": self.source_hash,
            },
            executor=executor,
        )
        params = count_parameters(model)
        release_weights_(model)
        return split, params

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        """Who factorizes; workers are held no longer than that, so that nothing is measured beside them."""
        found: AbstractContextManager[Executor] = (
            nullcontext(LocalExecutor()) if self.ray is None else ray_executor(self.ray, self.notes)
        )
        with found as executor:
            yield executor if self.finished is None else StoringExecutor(executor, self.finished)

    def verify(
        self,
        dense: Path,
        path: Path,
        result: Compressed,
        facts: DenseFacts,
        exporter: OutputComparison | None,
        max_output_error: float | None,
    ) -> tuple[Verification, tuple[ProbeOutput, ...]]:
        """Hold the surgery and the compressed model against the dense one."""
        if facts.outputs is None:
            return Verification(exporter=None, surgery=None, approximation=None), ()
        split = [node for node in result.split.nodes if isinstance(node, Split)]
        weights: dict[str, Form] = {node.weight: node.form for node in reversed(split)}  # of the first that is asked
        joint = {node.joint for node in split if node.joint}
        with self.stage("verify surgery"), explain_random_models(dense, facts.feeds, "the dense model"):
            surgery = surgery_check(dense, weights, facts.feeds, facts.outputs, joint=joint, bias=result.biased)
        with self.stage("verify approximation"):
            session = make_session(path)
            outputs = run_session(session, facts.feeds, path.name)
            names = [output.name for output in session.get_outputs()]
            del session
            approximation = compare_outputs(
                facts.outputs,
                outputs,
                what="approximation gate (compressed against dense, --max-output-error)",
                tolerance=max_output_error,
            )
        if not approximation.informative:
            self.notes.append("the dense model's probe outputs are all zero: the gates on them show little")
        probe = tuple(ProbeOutput.of(name, array) for name, array in arrays_of_outputs(names, outputs).items())
        return Verification(exporter=exporter, surgery=surgery, approximation=approximation), probe

    def accuracy(
        self,
        dense: Path,
        path: Path,
        result: Compressed,
        dataset: Dataset | None,
        steps: Preprocessing | None,
        before: AccuracyResult | None,
    ) -> tuple[Accuracy | None, SoftmaxBound | None]:
        """Accuracy of the compressed model, and the softmax bound of a factorized head."""
        if dataset is None or before is None:
            return None, None
        with self.stage("accuracy compressed"):
            after = evaluate(
                path,
                dataset,
                preprocessing=_applied(steps, dataset),
                provider=self.provider,
                reference=dense,
                progress=at_samples,
            )
        bound = None
        if result.head is not None and result.head_factors is not None:
            with self.stage("softmax bound"):
                feeding = Feeding(dataset, model_inputs(dense), steps)
                size, count = feeding.axes.fixed or 64, len(feeding.dataset)
                # The tapped model takes whole batches only where its batch is fixed; samples left over are left out.
                whole = count // size * size if feeding.axes.fixed else count
                if not whole:
                    self.notes.append(f"no softmax bound: {count} samples are less than the model's batch, {size}")
                    return Accuracy(dense=before, compressed=after), None
                batches = (feeds for feeds, _ in feeding.batches(size, whole))
                bound = softmax_bound(dense, result.head, result.head_factors, batches)
        return Accuracy(dense=before, compressed=after), bound

    def macs(self, path: Path, facts: DenseFacts) -> dict[str, int]:
        """MACs a sample of every node of the compressed model, counted on the probe inputs."""
        if facts.outputs is None:
            return {}
        with self.stage("trace compressed"):
            return {node: count // facts.batch for node, count in trace_run(path, facts.feeds).macs.items()}

    def timing_feeds(self, dense: Path, facts: DenseFacts, batch: int) -> Feeds:
        """What `latency` feeds the models."""
        told = facts.feeds if self.given is not None or self.shapes else None
        shapes = None if told else self._example_shapes(dense, batch)
        feeds, _ = make_feeds(
            model_inputs(dense), batch=0 if told else batch, seed=self.settings.seed, given=told, shapes=shapes
        )
        return feeds

    def _example_shapes(self, dense: Path, batch: int) -> dict[str, tuple[int, ...]] | None:
        """The shapes of the data with a batch of this size, where inputs are left open; None where they are not."""
        axes = BatchAxes.of({spec.name: spec.shape for spec in model_inputs(dense)})
        return axes.with_batch(self._examples, axes.fixed or batch) if self._examples else None

    def latency(
        self, dense: Path, path: Path, facts: DenseFacts, batch: int, seconds: float, threads: int | None
    ) -> BenchResult:
        """Dense and compressed side by side."""
        # Where the user told shapes or arrays, those are what the model is for; else any batch will do.
        told = facts.feeds if self.given is not None or self.shapes else None
        with self.stage("latency"):
            result = bench(
                [dense, path],
                batch=batch,
                feeds=told,
                input_shape=None if told else self._example_shapes(dense, batch),
                provider=self.provider,
                threads=threads,
                seconds=seconds,
                seed=self.settings.seed,
                labels=["dense", "compressed"],
            )
        arms = tuple(arm.model_copy(update={"model": Path(arm.model).name}) for arm in result.arms)
        return result.model_copy(update={"arms": arms})

    def _write_dense(self, model: ir.Model, path: Path, steps: Preprocessing | None) -> None:
        if steps is not None:
            model.metadata_props[METADATA_KEY] = steps.to_metadata()
        self.settings = self.settings.model_copy(update={"opset": model.opset_imports.get("", 0)})
        name_nodes_(model)
        write_external(model, path)
        release_weights_(model)


def _applied(steps: Preprocessing | None, dataset: Dataset) -> Preprocessing | None:
    """The steps, where the data are pictures; ready inputs go through none."""
    return steps if dataset.kind == "images" else None


def _torch_outputs(source: Source, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    module: Any = source.module if source.module is not None else source.program.module()  # type: ignore[union-attr]
    with torch.inference_mode():
        outputs = module(*(as_torch(array) for array in inputs))
    # What is no tensor (None, a number) is no output of the ONNX model either.
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [leaf.float().numpy() if leaf.dtype == torch.bfloat16 else leaf.numpy() for leaf in leaves]


def _reasons(split: SplitModel) -> str:
    """Why nothing is split: each reason with the sites it holds for."""
    by_reason: dict[str, list[str]] = {}
    for site in split.sites:
        by_reason.setdefault(site.reason, []).append(site.name)
    listed = [f"{reason} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for reason, names in by_reason.items()]
    if any(reason.startswith("overridable") for reason in by_reason):
        listed.append("add --assume-constant if nobody feeds those weights")
    return "; ".join(listed) or "the graph has no weight-bearing node"
