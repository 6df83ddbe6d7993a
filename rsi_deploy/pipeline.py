"""The main job, `export`: a model goes in, a compressed, verified, measured bundle comes out.

    load -> dense ONNX -> trace -> plan and factorize -> split -> verify -> accuracy -> latency -> report

The dense model is written to disk once; from then on everything reads it memory-mapped and the torch model is gone,
so the peak memory is about that of exporting alone.
"""

import datetime
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from graph_passes import Factors, FoldBatchNormPass, Split
from rsi_deploy import __version__
from rsi_deploy.accuracy import AccuracyResult, evaluate
from rsi_deploy.bound import Head, SoftmaxBound, find_head, softmax_bound
from rsi_deploy.bundle import whole_folder
from rsi_deploy.card import model_card
from rsi_deploy.data import Dataset, open_data
from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.gates import EXPORTER_TOLERANCE, Comparison, compare_outputs, surgery_check, tolerance_for
from rsi_deploy.inputs import model_inputs
from rsi_deploy.machine import environment, peak_memory
from rsi_deploy.measure import BenchResult, bench
from rsi_deploy.onnx_file import (
    file_bytes,
    file_hash,
    forget_weights_,
    parameters,
    read_onnx,
    weight_bytes,
    weights_hash,
    write_external,
)
from rsi_deploy.onnx_split import SplitModel, as_torch, with_macs
from rsi_deploy.plan import Planner, RankSpec
from rsi_deploy.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.probe import Feeds, named_shapes, probe_feeds, read_feeds
from rsi_deploy.providers import make_session, resolve, run_session
from rsi_deploy.report import Accuracy, ProbeOutput, Report, Settings, Size, SourceRecord, Stage, Verification
from rsi_deploy.rewriting import split_and_write
from rsi_deploy.rsi import Method, Solver
from rsi_deploy.source import Source, load_source, source_of_module
from rsi_deploy.to_onnx import to_onnx
from rsi_deploy.trace import traced_run

Progress = Callable[[str, int, int], None]


def export(
    model: str | nn.Module,
    output: str | Path,
    *,
    rank: str | int | RankSpec,
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | tuple[int, ...] | Sequence[str] | None = None,
    feeds: str | Path | Mapping[str, npt.NDArray[Any]] | None = None,
    preprocessing: Preprocessing | None = None,
    data: str | Path | Dataset | None = None,
    method: Method = "rsi",
    power_iterations: int = 4,
    oversampling: int = 0,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    always_split: bool = False,
    assume_constant: bool = False,
    opset: int | None = None,
    device: str = "auto",
    provider: str = "cpu",
    threads: int | None = None,
    measure: bool = True,
    bench_batch: int = 1,
    bench_seconds: float = 10.0,
    max_output_error: float | None = None,
    keep_dense: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Compress a model and write the bundle `output` (model.onnx, report.json, README.md).

    Args:
        model: `torchvision:NAME`, `package.module:factory`, `FILE.pt2`, `FILE.onnx`, or a torch module.
        output: the folder to make.
        rank: a rank (`64`) or the paper's ratio (`"40%"`).
        weights: torchvision's: "DEFAULT", "none" (random, seeded) or a file.
        checkpoint: a factory's state dict.
        input_shape: `1x3x32x32`, where a torch model does not tell; the first number is the batch and stays dynamic.
            For an ONNX file with more dynamic dimensions: `NAME=1x128`, or several of them.
        feeds: input name -> array, or an `.npz` of them, to verify and measure with in place of random inputs.
        preprocessing: from 8-bit pictures to inputs; fields that are not set come from the model.
        data: labelled evaluation data (`.npz` or a tree of class folders); it chooses nothing.
        method: "rsi", or a baseline: "rsvd", "svd".
        power_iterations: the paper's q.
        oversampling: extra sketch columns.
        seed: of sketches, probe inputs, and of random weights.
        include: globs on site names; empty means all.
        exclude: globs on site names that stay dense.
        always_split: split where nothing is saved, too.
        assume_constant: for an ONNX file: weights that are graph inputs too are constants, and no inputs any more.
        opset: of the ONNX model; by default 23 with attention, else 20.
        device: where factors are computed: "cpu", "cuda" or "auto".
        provider: onnxruntime provider to measure on.
        threads: of onnxruntime while measuring.
        measure: whether to measure latency.
        bench_batch: samples a run while measuring.
        bench_seconds: time budget of the measurement.
        max_output_error: gate on the approximation error (relative L2 on probe inputs); None only reports it.
        keep_dense: keep the dense model as `dense.onnx` in the bundle, so that `verify` can compare again.
        force: replace a bundle that is there.
        progress: called with (site, index, count) before each factorization.
        command: for the report; by default the Python call's name.

    Raises:
        UsageError: a request that cannot be meant (exit 2).
        ModelError: the model cannot be handled (exit 3).
        GateError: a verification gate failed (exit 4).
    """
    texts = [input_shape] if isinstance(input_shape, str) else [s for s in input_shape or () if isinstance(s, str)]
    sizes = tuple(s for s in input_shape or () if isinstance(s, int))
    plain: str | tuple[int, ...] | None = next((t for t in texts if "=" not in t), None) or sizes or None
    job = _Job(
        settings=Settings(
            rank=str(RankSpec.parse(rank)),
            method=method,
            power_iterations=1 if method == "rsvd" else power_iterations,
            oversampling=oversampling,
            seed=seed,
            include=tuple(include),
            exclude=tuple(exclude),
            always_split=always_split,
            opset=opset or 0,
        ),
        planner=Planner(
            spec=RankSpec.parse(rank), include=tuple(include), exclude=tuple(exclude), always_split=always_split
        ),
        solver=Solver(method=method, power_iterations=power_iterations, oversampling=oversampling, seed=seed),
        device=_device(device),
        provider=resolve(provider),
        progress=progress,
        shapes=named_shapes([text for text in texts if "=" in text]),
        given=None if feeds is None else read_feeds(feeds) if isinstance(feeds, str | Path) else dict(feeds),
        assume_constant=assume_constant,
    )
    dataset = open_data(data) if isinstance(data, str | Path) else data
    if dataset is not None and dataset.labels is None:
        raise UsageError("--data has no labels; evaluation data need them (`labels` or `y`, or class folders)")
    with whole_folder(Path(output), force=force) as folder:
        with job.stage("load"):
            source = (
                load_source(model, weights=weights, checkpoint=checkpoint, input_shape=plain, seed=seed)
                if isinstance(model, str)
                else source_of_module(model, plain, seed)
            )
        told = source.preprocessing if source.onnx is None else _stored_preprocessing(source.onnx)
        steps = preprocessing.over(told) if preprocessing else told
        if dataset is not None and dataset.kind == "inputs" and preprocessing is not None:
            raise UsageError(
                "--data are ready model inputs: no preprocessing applies; leave out --mean, --std, --resize, --crop "
                "and --layout, or give 8-bit images"
            )
        # Apart from the bundle, so that a compressed model that still leans on the dense one's data cannot load.
        work = folder / "work"
        work.mkdir()
        dense = work / "dense.onnx"
        exporter = job.export_dense(source, dense, steps, opset)
        before, accuracy = job.dense_facts(source, dense, dataset, steps)
        result = job.compress(dense, folder / "model.onnx", steps, with_head=dataset is not None)
        verification, probe = job.verify(dense, folder / "model.onnx", result, before, exporter, max_output_error)
        scores, bound = job.accuracy(dense, folder / "model.onnx", result, dataset, steps, accuracy)
        latency = (
            job.latency(dense, folder / "model.onnx", before, bench_batch, bench_seconds, threads)
            if measure and before.outputs is not None
            else None
        )
        sites = with_macs(result.split.sites, before.macs)
        report = Report(
            tool=f"rsi-deploy {__version__}",
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            command=command or "rsi_deploy.export(...)",
            source=SourceRecord(model=source.name, hash=result.source_hash, notes=tuple(source.notes)),
            settings=job.settings,
            preprocessing=steps,
            dense=result.dense,
            compressed=Size(
                bytes=file_bytes(folder / "model.onnx"),
                params=result.params,
                macs=result.dense.macs - sum((s.macs_dense or 0) - (s.macs_compressed or 0) for s in sites),
            ),
            sites=tuple(sites),
            verification=verification,
            softmax_bound=bound,
            accuracy=scores,
            latency=latency,
            probe_shapes={name: array.shape for name, array in before.feeds.items()},
            probe_given=job.given is not None,
            probe=probe,
            files=_finish(folder, keep_dense=keep_dense),
            stages=tuple(job.stages),
            peak_memory=peak_memory(),
            environment=environment(),
            notes=tuple(dict.fromkeys([*source.notes, *job.notes])),
        )
        (folder / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(report, folder / "model.onnx"), encoding="utf-8")
    return report


@dataclass(frozen=True, kw_only=True)
class _DenseFacts:
    """What is known of the dense model before it is compressed: probe inputs, outputs on them, MACs a sample."""

    feeds: Feeds
    outputs: list[npt.NDArray[Any]] | None
    macs: dict[str, int]
    batch: int


@dataclass(frozen=True, kw_only=True)
class _Compressed:
    """The written model, and what only its making knew."""

    split: SplitModel
    head: Head | None
    head_factors: Factors | None
    dense: Size
    params: int
    source_hash: str


@dataclass(kw_only=True)
class _Job:
    """The steps of one export, with the settings they share and the times they took."""

    settings: Settings
    planner: Planner
    solver: Solver
    device: torch.device
    provider: str
    progress: Progress | None
    shapes: Mapping[str, Sequence[int]]
    given: Feeds | None
    assume_constant: bool
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    dense_macs: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.stages.append(Stage(name=name, seconds=time.perf_counter() - started))

    def export_dense(
        self, source: Source, path: Path, steps: Preprocessing | None, opset: int | None
    ) -> Comparison | None:
        """Write the dense ONNX model; for a torch source, hold it against torch and let the torch model go."""
        if source.onnx is not None:
            with self.stage("read"):
                model = read_onnx(source.onnx, assume_constant=self.assume_constant)
                if opset is not None and opset != model.opset_imports.get(""):
                    raise UsageError(
                        f"--opset {opset}: {source.name} keeps its opset {model.opset_imports.get('')}; --opset is for "
                        f"torch models"
                    )
                FoldBatchNormPass()(model)
                self._write_dense(model, path, steps)
            return None
        with self.stage("export dense"):
            exported = to_onnx(source, opset=opset)
            self.notes.extend(exported.notes)
            self._write_dense(exported.model, path, steps)
        with self.stage("verify exporter"):
            feeds = probe_feeds(path, self.settings.seed, self.shapes, self.given)
            expected = _torch_outputs(source, list(feeds.values()))
            source.module = source.program = None
            del exported
            gc.collect()
            session = make_session(path, optimize="disabled", prepack=False)
            outputs = run_session(session, feeds, "the dense model")
        tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
        return compare_outputs(expected, outputs, what="exporter gate (torch against dense ONNX)", tolerance=tolerance)

    def dense_facts(
        self, source: Source, dense: Path, dataset: Dataset | None, steps: Preprocessing | None
    ) -> tuple[_DenseFacts, AccuracyResult | None]:
        with self.stage("trace"):
            feeds = probe_feeds(dense, self.settings.seed, self.shapes, self.given)
            try:
                trace = traced_run(dense, feeds)
            except ModelError as error:
                if source.onnx is None or dataset is not None:
                    raise
                reason = str(error).replace(str(dense), source.name)
                self.notes.append(f"nothing could be verified or measured: {reason}")
                return _DenseFacts(feeds=feeds, outputs=None, macs={}, batch=1), None
            batch = next((len(a) for a in feeds.values() if a.ndim), 1)
            macs = {node: count // batch for node, count in trace.macs.items()}
            self.dense_macs = sum(macs.values())
        accuracy = None
        if dataset is not None:  # first of all the long work: data that do not fit must say so now
            with self.stage("accuracy dense"):
                accuracy = evaluate(dense, dataset, preprocessing=_applied(steps, dataset), provider=self.provider)
        return _DenseFacts(feeds=feeds, outputs=trace.outputs, macs=macs, batch=batch), accuracy

    def compress(self, dense: Path, path: Path, steps: Preprocessing | None, *, with_head: bool) -> _Compressed:
        with self.stage("read dense"):
            model = ir.load(dense)
            source_hash = weights_hash(model)
            before = Size(
                bytes=dense.stat().st_size + weight_bytes(model), params=parameters(model), macs=self.dense_macs
            )
            head = find_head(model) if with_head else None
        with self.stage("factorize, split, save"):
            keep = [head.weight] if head else []
            split = split_and_write(
                model,
                path,
                self.planner,
                self.solver,
                progress=self.progress,
                keep=keep,
                device=self.device,
                metadata={
                    "rsi_deploy.version": __version__,
                    "rsi_deploy.settings": json.dumps(self.settings.model_dump(), sort_keys=True),
                    "rsi_deploy.source_hash": source_hash,
                },
            )
            params = parameters(model)
            forget_weights_(model)
        if not any(site.rank for site in split.sites):
            raise ModelError(f"nothing to split: {_reasons(split)}")
        return _Compressed(
            split=split,
            head=head,
            head_factors=split.kept.get(head.weight) if head else None,
            dense=before,
            params=params,
            source_hash=source_hash,
        )

    def verify(
        self,
        dense: Path,
        path: Path,
        result: _Compressed,
        facts: _DenseFacts,
        exporter: Comparison | None,
        max_output_error: float | None,
    ) -> tuple[Verification, tuple[ProbeOutput, ...]]:
        if facts.outputs is None:
            return Verification(exporter=None, surgery=None, approximation=None), ()
        split = {node.weight for node in result.split.nodes if isinstance(node, Split)}
        with self.stage("verify surgery"):
            surgery = surgery_check(dense, split, facts.feeds, facts.outputs)
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
        probe = tuple(ProbeOutput.of(name, array) for name, array in zip(names, outputs, strict=True))
        return Verification(exporter=exporter, surgery=surgery, approximation=approximation), probe

    def accuracy(
        self,
        dense: Path,
        path: Path,
        result: _Compressed,
        dataset: Dataset | None,
        steps: Preprocessing | None,
        before: AccuracyResult | None,
    ) -> tuple[Accuracy | None, SoftmaxBound | None]:
        if dataset is None or before is None:
            return None, None
        with self.stage("accuracy compressed"):
            after = evaluate(
                path, dataset, preprocessing=_applied(steps, dataset), provider=self.provider, reference=dense
            )
        bound = None
        if result.head is not None and result.head_factors is not None:
            with self.stage("softmax bound"):
                spec = model_inputs(dense)[0]
                size = spec.shape[0] if isinstance(spec.shape[0], int) else 64
                # The tapped model takes whole batches only where its batch is fixed; samples left over are left out.
                whole = len(dataset) // size * size if isinstance(spec.shape[0], int) else len(dataset)
                if not whole:
                    self.notes.append(
                        f"no softmax bound: {len(dataset)} samples are less than the model's batch, {size}"
                    )
                    return Accuracy(dense=before, compressed=after), None
                batches = (x.astype(spec.dtype, copy=False) for x, _ in dataset.batches(size, steps, whole))
                bound = softmax_bound(dense, result.head, result.head_factors, batches, spec.name)
        return Accuracy(dense=before, compressed=after), bound

    def latency(
        self, dense: Path, path: Path, facts: _DenseFacts, batch: int, seconds: float, threads: int | None
    ) -> BenchResult:
        # Where the user told shapes or arrays, those are what the model is for; else any batch will do.
        told = facts.feeds if self.given is not None or self.shapes else None
        with self.stage("latency"):
            result = bench(
                [dense, path],
                batch=batch,
                feeds=told,
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
        write_external(model, path)
        forget_weights_(model)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; type --device cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, but got {name!r}")
    return torch.device(name)


def _applied(steps: Preprocessing | None, dataset: Dataset) -> Preprocessing | None:
    """The steps, where the data are pictures; ready inputs go through none."""
    return steps if dataset.kind == "images" else None


def _stored_preprocessing(path: Path) -> Preprocessing | None:
    """What an ONNX source's metadata tell."""
    stored = read_onnx(path).metadata_props.get(METADATA_KEY)
    return None if stored is None else Preprocessing.from_metadata(stored)


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


def _finish(folder: Path, *, keep_dense: bool) -> dict[str, str]:
    """Drop what does not belong into the bundle and hash what stays."""
    work = folder / "work"
    if keep_dense:
        for path in work.glob("dense.onnx*"):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.onnx*"))}
