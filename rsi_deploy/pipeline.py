"""The main job, `export`: a model goes in, a compressed, verified, measured bundle comes out.

    load -> dense ONNX -> trace -> plan and factorize -> split -> verify -> accuracy -> latency -> report

The dense model is written to disk once; from then on everything reads it memory-mapped and the torch model is gone,
so the peak memory is about that of exporting alone.
"""

import datetime
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from rsi_deploy import __version__
from rsi_deploy.bundle import whole_folder
from rsi_deploy.card import model_card
from rsi_deploy.data import Dataset, open_data
from rsi_deploy.errors import UsageError
from rsi_deploy.machine import environment, peak_memory
from rsi_deploy.onnx_file import (
    file_bytes,
    file_hash,
    read_onnx,
)
from rsi_deploy.onnx_split import with_macs
from rsi_deploy.plan import Planner, RankSpec
from rsi_deploy.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.probe import named_shapes, read_feeds
from rsi_deploy.providers import resolve
from rsi_deploy.report import Report, Settings, Size, SourceRecord
from rsi_deploy.rsi import Method, Solver
from rsi_deploy.source import load_source, source_of_module
from rsi_deploy.stages import Job

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
    job = Job(
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no CUDA device here; type --device cpu")
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda, but got {name!r}")
    return torch.device(name)


def _stored_preprocessing(path: Path) -> Preprocessing | None:
    """What an ONNX source's metadata tell."""
    stored = read_onnx(path).metadata_props.get(METADATA_KEY)
    return None if stored is None else Preprocessing.from_metadata(stored)


def _finish(folder: Path, *, keep_dense: bool) -> dict[str, str]:
    """Drop what does not belong into the bundle and hash what stays."""
    work = folder / "work"
    if keep_dense:
        for path in work.glob("dense.onnx*"):
            path.rename(folder / path.name)
    shutil.rmtree(work)
    return {path.name: file_hash(path) for path in sorted(folder.glob("*.onnx*"))}
