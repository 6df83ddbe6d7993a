"""The first steps of an export: load the model, write it as dense ONNX, and find out what later steps need to know.

    torch model --to_onnx-------------> dense.onnx --parse, survey, run on probe inputs, evaluate--> DenseModel
    ONNX file ----opset, BatchNorms--->

The torch model is released before the dense model runs.
"""

import gc
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx import ModelProto

import graph_passes as gp
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError, RsiDeployError, UsageError
from rsi_deploy.core.model_size import Size
from rsi_deploy.core.progress import at_samples
from rsi_deploy.data.dataset import for_inputs
from rsi_deploy.data.feeding import errors_for_option
from rsi_deploy.data.preprocess import METADATA_KEY, Preprocessing
from rsi_deploy.data.sources import Dataset
from rsi_deploy.evaluation.accuracy import AccuracyResult, evaluate
from rsi_deploy.evaluation.softmax_bound import find_head
from rsi_deploy.exporting.dense_size import dense_size
from rsi_deploy.exporting.inputs import Origin
from rsi_deploy.exporting.results import DenseModel, dense_file, new_graph
from rsi_deploy.exporting.step_settings import Probe, StepSettings
from rsi_deploy.exporting.timing.stage_clock import StageClock
from rsi_deploy.io.onnx_file import (
    bytes_in_one_file,
    name_nodes_,
    read_onnx,
    release_weights_,
    remove_unused_,
    weights_hash,
    write_external,
)
from rsi_deploy.io.onnx_reader import read_proto, with_small_data
from rsi_deploy.onnx_models.opset import check_conversion, convert_opset
from rsi_deploy.onnx_models.requantize import dequantize_, quantized_products, quantized_tables
from rsi_deploy.onnx_models.site_records import record_name
from rsi_deploy.runtime.batch_independence import count_samples
from rsi_deploy.runtime.feeds.caches import is_cache
from rsi_deploy.runtime.feeds.inputs import model_inputs
from rsi_deploy.runtime.parity import (
    EXPORTER_TOLERANCE,
    OutputComparison,
    check_repeatable,
    compare_outputs,
    explain_random_models,
    random_nodes,
    tolerance_for,
)
from rsi_deploy.runtime.probe_runs import run_probe
from rsi_deploy.runtime.sessions import make_session, run_session
from rsi_deploy.runtime.shape_trace import ShapeTrace, trace_run, uncounted_nodes, unknown_operators
from rsi_deploy.torch_models.model_source import Source
from rsi_deploy.torch_models.to_onnx import to_onnx


class _Written(NamedTuple):
    """The dense model's parsed file, and what its making has found."""

    proto: ModelProto
    preprocessing: Preprocessing | None
    exporter: OutputComparison | None
    probe: Probe | None
    notes: list[str]
    reference: Path


def dense_model(
    settings: StepSettings,
    origin: Origin,
    source: Source,
    folder: Path,
    clock: StageClock,
    data: Dataset | None,
    known_size: Size | None,
    known_accuracy: AccuracyResult | None,
) -> DenseModel:
    """Write the dense model of `source` and return what is known of it.

    Args:
        settings: the export's.
        origin: where the model comes from.
        source: the model, loaded; its torch module is released.
        folder: folder of the bundle in the making.
        clock: times the stages.
        data: evaluation data, opened.
        known_size: size of the user's model, where it is known: in a sweep, whose source is a copy of it.
        known_accuracy: accuracy on the data, where it is known.

    Raises:
        UsageError: data, shapes or arrays that do not fit the model.
        ModelError: the model cannot be read, converted or run.
        GateError: the dense model differs from its source.
    """
    path = dense_file(folder)
    path.parent.mkdir()
    write = _from_torch if source.onnx is None else _from_onnx
    written = write(settings, origin, source, path, clock)
    proto, notes = written.proto, written.notes
    with errors_for_option("--data"):
        dataset = None if data is None else for_inputs(data, model_inputs(proto, path.name))
    with clock.stage("read dense"):
        graph = new_graph(proto, path)
        digest, random = weights_hash(graph), random_nodes(graph)
        quantized = tuple(quantized_products(graph))
        entries = gp.find_sites(graph)
        sites = [entry for entry in entries if isinstance(entry, gp.Site)]
        unsplit = tuple(record_name(entry) for entry in entries if isinstance(entry, gp.Skip))
        head = None if dataset is None else find_head(graph)
        size = known_size
        if size is None and source.onnx is None:
            size = Size(bytes=bytes_in_one_file(path, proto), params=gp.count_parameters(graph), macs=0)
        elif size is None:
            size = dense_size(source.onnx, path, requantized=settings.requantize)
    with clock.stage("trace"):
        probe, trace, batch = written.probe or Probe({}, {}), None, 1
        try:
            probe = written.probe or settings.probe(path, proto, written.preprocessing)
            trace = trace_run(path, probe.feeds, proto)
        except ModelError as error:
            if source.onnx is None or dataset is not None:
                raise
            notes += _not_run(error, path, source.name, proto, has_feeds=bool(probe.feeds))
        if trace is not None:
            check_repeatable(path, probe.feeds, source.name, trace.outputs)
            notes += _about_trace(trace, random)
            batch = count_samples(_with_small_data(proto, path), probe.feeds)
    outputs = expected = None if trace is None else trace.outputs
    if outputs is not None and (quantized or written.reference != path):  # fused operators of codes round otherwise
        expected = run_probe(make_session(written.reference), probe.feeds, source.name)
    if outputs is not None and expected is not None and written.reference != path:
        change = compare_outputs(expected, outputs, what="the float model", tolerance=None).relative_l2
        notes.append(f"on the probe inputs, the float model differs from {source.name} by {change:.2g}, relative")
    counts = {} if trace is None else trace.macs
    macs = {node: count // batch for node, count in counts.items()}
    accuracy = known_accuracy
    if dataset is not None and known_accuracy is None:  # before all long work: data that do not fit must fail now
        with clock.stage("accuracy dense"):
            accuracy = _accuracy(written.reference, dataset, written.preprocessing, settings.provider, source.name)
    return DenseModel(
        source=source,
        folder=folder,
        proto=proto,
        opset=graph.opset_imports.get("", 0),
        sites=sites,
        unsplit=unsplit,
        head=head,
        preprocessing=written.preprocessing,
        reference=written.reference,
        quantized=quantized,
        exporter=written.exporter,
        weights_hash=digest,
        size=size if trace is None else size.model_copy(update={"macs": sum(macs.values())}),
        feeds=probe.feeds,
        examples=probe.examples,
        outputs=outputs,
        expected=expected,
        batch=batch,
        macs=macs,
        attention_macs={} if trace is None else {node: n // batch for node, n in trace.attention_macs.items()},
        uncounted=unknown_operators(proto) if trace is None else trace.uncounted,
        dataset=dataset,
        accuracy=accuracy,
        notes=tuple(notes),
    )


def _from_onnx(settings: StepSettings, origin: Origin, source: Source, path: Path, clock: StageClock) -> _Written:
    """Write an ONNX file's model; in another opset it is compared with the file."""
    assert source.onnx is not None
    with clock.stage("read"):
        model = read_onnx(source.onnx, assume_constant=settings.assume_constant)
        preprocessing = origin.over(Preprocessing.stored(model.metadata_props))
        notes = [unused] if (unused := remove_unused_(model)) else []
        before = model.opset_imports.get("", 0)
        if origin.opset is not None:
            model = convert_opset(model, origin.opset, source.name)
        reference = source.onnx if settings.requantize else path
        if settings.requantize:
            notes.append(_requantized_(model, source.name))
        _settle_widths_(model, source.onnx)
        gp.FoldBatchNormPass()(model)
        proto = _write(model, path, preprocessing)
    probe = exporter = None
    if origin.opset not in (None, before) and not settings.requantize:
        with clock.stage("verify opset"):
            try:
                probe = settings.probe(path, proto, preprocessing)
            except ModelError:  # an input that cannot be fed: the trace reports it
                return _Written(proto, preprocessing, None, None, notes, reference)
            with explain_random_models(path, probe.feeds, source.name):
                exporter = check_conversion(source.onnx, path, (before, origin.opset or 0), probe.feeds)
    return _Written(proto, preprocessing, exporter, probe, notes, reference)


def _settle_widths_(model: ir.Model, path: Path) -> None:
    """Fix the widths of caches that the file leaves open, so that they are known in every model made of this one."""
    outer = [*model.graph.inputs, *model.graph.outputs]
    named = {
        value.name: str(value.shape[-1]) for value in outer if value.shape and not isinstance(value.shape[-1], int)
    }
    if not any(is_cache(name or "") for name in named):
        return
    specs = {spec.name: spec.shape[-1] for spec in model_inputs(path) if is_cache(spec.name) and spec.name in named}
    widths = {named[name]: width for name, width in specs.items() if isinstance(width, int)}
    for value in outer:
        width = specs.get(value.name or "", widths.get(named.get(value.name, "")))
        if isinstance(width, int) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:-1], width])


def _requantized_(model: ir.Model, name: str) -> str:
    """Turn the weights of a quantized model into float weights, and return a note.

    Raises:
        UsageError: it has no weights of few bits.
    """
    before, tables = quantized_products(model), quantized_tables(model)
    if not before and not tables:
        raise UsageError(f"{name} has no weights of few bits", hint="leave out --requantize")
    dequantize_(model)
    left = [*quantized_products(model), *quantized_tables(model)]
    stay = f"; {len(left)} stay as they are: {', '.join(left[:3])}{', ...' * (len(left) > 3)}" if left else ""
    return (
        f"{name} is quantized: its {len(before)} products and {len(tables)} tables of few bits were turned into float"
        f"{stay}. The compressed model is compared with {name} as it is"
    )


def _from_torch(settings: StepSettings, origin: Origin, source: Source, path: Path, clock: StageClock) -> _Written:
    """Export a torch model, compare the result with it, and release it."""
    if settings.requantize:
        raise UsageError(f"{source.name} is no ONNX file", hint="leave out --requantize")
    preprocessing = origin.over(source.preprocessing)
    with clock.stage("export dense"):
        exported = to_onnx(source, opset=origin.opset)
        notes = list(exported.notes)
        proto = _write(exported.model, path, preprocessing)
    with clock.stage("verify exporter"):
        probe = settings.probe(path, proto, preprocessing)
        expected = _torch_outputs(source, list(probe.feeds.values()))
        source.module = source.program = None
        del exported
        gc.collect()
        session = make_session(path, optimize="disabled", prepack=False)
        outputs = run_session(session, probe.feeds, "the dense model")
    tolerance = tolerance_for(expected, EXPORTER_TOLERANCE)
    with explain_random_models(path, probe.feeds, source.name):
        what = "exporter gate (torch against dense ONNX)"
        exporter = compare_outputs(expected, outputs, what=what, tolerance=tolerance)
    return _Written(proto, preprocessing, exporter, probe, notes, path)


def _write(model: ir.Model, path: Path, preprocessing: Preprocessing | None) -> ModelProto:
    """Write the dense model with all its weights beside it, and parse its file, without them."""
    if preprocessing is not None:
        model.metadata_props[METADATA_KEY] = preprocessing.to_metadata()
    name_nodes_(model)
    write_external(model, path)
    release_weights_(model)
    return read_proto(path)


def _with_small_data(proto: ModelProto, path: Path) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return with_small_data(copy, path.parent)


def _torch_outputs(source: Source, inputs: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    module: Any = source.module if source.module is not None else source.program.module()  # type: ignore[union-attr]
    with torch.inference_mode():
        outputs = module(*(as_torch(array) for array in inputs))
    # What is no tensor (None, a number) is no output of the ONNX model either.
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [leaf.float().numpy() if leaf.dtype == torch.bfloat16 else leaf.numpy() for leaf in leaves]


def _not_run(error: ModelError, path: Path, name: str, proto: ModelProto, *, has_feeds: bool) -> list[str]:
    """Notes on a model that cannot be run."""
    reason = str(error).replace(str(path), name).replace(f"{path.name}:", f"{name}:")
    hint = ": pass --input-shape or --feeds" if has_feeds else ""
    unknown = unknown_operators(proto)
    notes = [f"nothing could be verified or measured: {reason}{hint}"]
    return notes + ([f"the MACs leave out {uncounted_nodes(unknown)}"] if unknown else [])


def _about_trace(trace: ShapeTrace, random: list[str]) -> list[str]:
    """Notes on a model that draws random numbers, and on nodes whose MACs are unknown."""
    notes = []
    if random:
        notes.append(
            f"the model draws random numbers ({', '.join(random)}): its outputs were compared in the first run of a "
            f"session, where onnxruntime draws the same ones"
        )
    if trace.uncounted:
        notes.append(f"the MACs leave out {uncounted_nodes(trace.uncounted)}")
    return notes


def _accuracy(
    path: Path, dataset: Dataset, preprocessing: Preprocessing | None, provider: str, name: str
) -> AccuracyResult:
    """The dense model's accuracy; errors name the user's model."""
    steps = preprocessing if dataset.kind == "images" else None
    try:
        return evaluate(path, dataset, preprocessing=steps, provider=provider, progress=at_samples)
    except RsiDeployError as error:
        raise type(error)(str(error).replace(str(path), name)) from error
