"""The main job, `export`: a model goes in, a compressed, verified, measured bundle comes out.

    load -> dense ONNX -> trace -> plan and factorize -> split -> verify -> accuracy -> latency -> report

The dense model is written to disk once; from then on everything reads it memory-mapped and the torch model is gone,
so the peak memory is about that of exporting alone.
"""

import datetime
import gc
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn

from graph_passes import Factors, Split
from rsi_deploy import __version__
from rsi_deploy.accuracy import AccuracyResult, evaluate
from rsi_deploy.bound import Head, SoftmaxBound, find_head, softmax_bound
from rsi_deploy.bundle import file_bytes, file_hash, parameters, save_model, weight_bytes, whole_folder
from rsi_deploy.card import model_card
from rsi_deploy.data import Dataset, open_data
from rsi_deploy.errors import ModelError, UsageError
from rsi_deploy.gates import EXPORTER_TOLERANCE, Comparison, compare_outputs, surgery_check, tolerance_for
from rsi_deploy.inputs import model_inputs, random_feeds
from rsi_deploy.machine import environment, peak_memory
from rsi_deploy.measure import BenchResult, bench
from rsi_deploy.onnx_split import SplitModel, rewrite, with_macs
from rsi_deploy.plan import Planner, RankSpec
from rsi_deploy.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.providers import make_session, resolve, run_session
from rsi_deploy.report import Accuracy, ProbeOutput, Report, Settings, Size, SourceRecord, Stage, Verification
from rsi_deploy.rsi import Method, Solver
from rsi_deploy.source import Source, load_source, source_of_module
from rsi_deploy.to_onnx import forget_weights_, save_dense, to_onnx
from rsi_deploy.trace import Trace, traced_run

Progress = Callable[[str, int, int], None]
PROBE_BATCH = 2
Feeds = Mapping[str, npt.NDArray[Any]]


def export(
    model: str | nn.Module,
    output: str | Path,
    *,
    rank: str | int | RankSpec,
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | tuple[int, ...] | None = None,
    preprocessing: Preprocessing | None = None,
    data: str | Path | Dataset | None = None,
    method: Method = "rsi",
    power_iterations: int = 4,
    oversampling: int = 0,
    seed: int = 0,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    always_split: bool = False,
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
        input_shape: `1x3x32x32`, where the model does not tell; the first number is the batch and stays dynamic.
        preprocessing: from 8-bit pictures to inputs; fields that are not set come from the model.
        data: labelled evaluation data (`.npz` or a tree of class folders); it chooses nothing.
        method: "rsi", or a baseline: "rsvd", "svd".
        power_iterations: the paper's q.
        oversampling: extra sketch columns.
        seed: of sketches, probe inputs, and of random weights.
        include: globs on site names; empty means all.
        exclude: globs on site names that stay dense.
        always_split: split where nothing is saved, too.
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
    )
    dataset = open_data(data) if isinstance(data, str | Path) else data
    if dataset is not None and dataset.labels is None:
        raise UsageError("--data has no labels; evaluation data need them (`labels` or `y`, or class folders)")
    with whole_folder(Path(output), force=force) as folder:
        with job.stage("load"):
            source = (
                load_source(model, weights=weights, checkpoint=checkpoint, input_shape=input_shape, seed=seed)
                if isinstance(model, str)
                else source_of_module(model, input_shape, seed)
            )
        steps = preprocessing.over(source.preprocessing) if preprocessing else source.preprocessing
        # Apart from the bundle, so that a compressed model that still leans on the dense one's data cannot load.
        work = folder / "work"
        work.mkdir()
        dense = work / "dense.onnx"
        exporter = job.export_dense(source, dense, steps, opset)
        before, accuracy = job.dense_facts(dense, dataset, steps)
        result = job.compress(dense, folder / "model.onnx", steps, with_head=dataset is not None)
        verification, probe = job.verify(dense, folder / "model.onnx", result, before, exporter, max_output_error)
        scores, bound = job.accuracy(dense, folder / "model.onnx", result, dataset, steps, accuracy)
        latency = job.latency(dense, folder / "model.onnx", bench_batch, bench_seconds, threads) if measure else None
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
            probe_batch=before.batch,
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
    outputs: list[npt.NDArray[Any]]
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
                model = _read_onnx(source.onnx)
                _describe_(model, {METADATA_KEY: steps.to_metadata()} if steps else {})
                self._set_opset(model)
                save_dense(model, path)
            return None
        with self.stage("export dense"):
            exported = to_onnx(source, opset=opset)
            self.notes.extend(exported.notes)
            _describe_(exported.model, {METADATA_KEY: steps.to_metadata()} if steps else {})
            self._set_opset(exported.model)
            save_dense(exported.model, path)
            forget_weights_(exported.model)
        with self.stage("verify exporter"):
            feeds = random_feeds(model_inputs(path), PROBE_BATCH, self.settings.seed)
            expected = _torch_outputs(source, list(feeds.values()))
            source.module = source.program = None
            del exported
            gc.collect()
            session = make_session(path, optimize="disabled", prepack=False)
            outputs = run_session(session, feeds, "the dense model")
        tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
        return compare_outputs(expected, outputs, what="exporter gate (torch against dense ONNX)", tolerance=tolerance)

    def dense_facts(
        self, dense: Path, dataset: Dataset | None, steps: Preprocessing | None
    ) -> tuple[_DenseFacts, AccuracyResult | None]:
        with self.stage("trace"):
            feeds = random_feeds(model_inputs(dense), PROBE_BATCH, self.settings.seed)
            trace: Trace = traced_run(dense, feeds)
            batch = next((len(a) for a in feeds.values() if a.ndim), 1)
            macs = {node: count // batch for node, count in trace.macs.items()}
            self.dense_macs = sum(macs.values())
        accuracy = None
        if dataset is not None:  # first of all the long work: data that do not fit must say so now
            with self.stage("accuracy dense"):
                accuracy = evaluate(dense, dataset, preprocessing=steps, provider=self.provider)
        return _DenseFacts(feeds=feeds, outputs=trace.outputs, macs=macs, batch=batch), accuracy

    def compress(self, dense: Path, path: Path, steps: Preprocessing | None, *, with_head: bool) -> _Compressed:
        with self.stage("read dense"):
            model = ir.load(dense)
            source_hash = weights_hash(model)
            before = Size(
                bytes=dense.stat().st_size + weight_bytes(model), params=parameters(model), macs=self.dense_macs
            )
            head = find_head(model) if with_head else None
        with self.stage("factorize and split"):
            keep = [head.weight] if head else []
            split = rewrite(model, self.planner, self.solver, progress=self.progress, keep=keep, device=self.device)
        if not any(site.rank for site in split.sites):
            reasons = sorted({f"{s.name}: {s.reason}" for s in split.sites}) or ["the graph has no weight-bearing node"]
            raise ModelError("nothing to split; " + "; ".join(reasons[:8]) + ("; ..." if len(reasons) > 8 else ""))
        with self.stage("save"):
            _describe_(
                model,
                {
                    "rsi_deploy.version": __version__,
                    "rsi_deploy.settings": json.dumps(self.settings.model_dump(), sort_keys=True),
                    "rsi_deploy.source_hash": source_hash,
                },
            )
            save_model(model, path)
            params = parameters(model)
            forget_weights_(model)
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
            after = evaluate(path, dataset, preprocessing=steps, provider=self.provider, reference=dense)
        bound = None
        if result.head is not None and result.head_factors is not None:
            with self.stage("softmax bound"):
                spec = model_inputs(dense)[0]
                fixed = spec.shape[0] if spec.shape and isinstance(spec.shape[0], int) else 64
                whole = len(dataset) - len(dataset) % fixed if isinstance(spec.shape[0], int) else None
                batches = (x.astype(spec.dtype, copy=False) for x, _ in dataset.batches(fixed, steps, whole))
                bound = softmax_bound(dense, result.head, result.head_factors, batches, spec.name)
        return Accuracy(dense=before, compressed=after), bound

    def latency(self, dense: Path, path: Path, batch: int, seconds: float, threads: int | None) -> BenchResult:
        with self.stage("latency"):
            result = bench(
                [dense, path],
                batch=batch,
                provider=self.provider,
                threads=threads,
                seconds=seconds,
                seed=self.settings.seed,
                labels=["dense", "compressed"],
            )
        arms = tuple(arm.model_copy(update={"model": Path(arm.model).name}) for arm in result.arms)
        return result.model_copy(update={"arms": arms})

    def _set_opset(self, model: ir.Model) -> None:
        self.settings = self.settings.model_copy(update={"opset": model.opset_imports.get("", 0)})


def weights_hash(model: ir.Model) -> str:
    """sha256 over the names, types, shapes and bytes of all initializers, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(np.ascontiguousarray(tensor.numpy()).view(np.uint8).data if tensor.size else b"")
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()  # unmap: pages that were read would count as ours
    return digest.hexdigest()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; type --device cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, but got {name!r}")
    return torch.device(name)


def _read_onnx(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # a damaged file can fail in protobuf, in onnx or in onnx_ir
        raise ModelError(f"{path.name} is not a readable ONNX model: {error}") from error


def _describe_(model: ir.Model, metadata: dict[str, str]) -> None:
    model.metadata_props.update(metadata)
    model.producer_name, model.producer_version = "rsi-deploy", __version__


def _torch_outputs(source: Source, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    module: Any = source.module if source.module is not None else source.program.module()  # type: ignore[union-attr]
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(array) for array in inputs))
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf.float().numpy() if leaf.dtype == torch.bfloat16 else leaf.numpy() for leaf in leaves]


def _finish(folder: Path, *, keep_dense: bool) -> dict[str, str]:
    """Drop what does not belong into the bundle and hash what stays."""
    work = folder / "work"
    if keep_dense:
        for path in work.glob("dense.onnx*"):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.onnx*"))}
