"""Lower a float model: quantize it by a scheme, store some weights in four bits, and shorten the file.

    float model --> embedding tables --> onnxruntime's quantizer --> 4-bit weights --> short names --> file

The 4-bit weights are fitted to the inputs that they have in the float model (`rounding`). Both factors of a split
follow the bits of its site.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import ModelProto, numpy_helper

import graph_passes as gp
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.calibration.moments import Moments, Samples
from rsi_deploy.calibration.rounding import Rounded, rounded_weight, second_moments
from rsi_deploy.core.sites import site_name
from rsi_deploy.io import onnx_file
from rsi_deploy.io.onnx_checks.parts import all_graphs
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.calibration.reachable_sites import found_sites
from rsi_deploy.onnx_models.opset import convert_opset
from rsi_deploy.precision.compact import compact_
from rsi_deploy.precision.float_nodes import stay_float_
from rsi_deploy.precision.four_bit import IR_VERSION, OPSET, store_in_4_bits_, store_table_, tables
from rsi_deploy.precision.quantizers import FeedsSource, quantize
from rsi_deploy.precision.schemes import Scheme

Array = npt.NDArray[Any]

SUFFIXES = ("/right", "/left")
FACTOR = re.compile(r".+\.(right|left)(_\d+)?")


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """The precision of a model's weights.

    Attributes:
        scheme: how the model is quantized.
        bits: name of a site -> 4 to store it in four bits, 32 to leave it as it is. Other sites are stored as the
            scheme stores them.
        tables: name of an embedding table -> 4, 8 or 32 bits; others are stored in eight.
    """

    scheme: Scheme
    bits: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, int] = field(default_factory=dict)

    @property
    def uses_4_bits(self) -> bool:
        """Return whether a site is stored in four bits."""
        return 4 in self.bits.values()


@dataclass(frozen=True, kw_only=True)
class CalibrationFeeds:
    """The samples of the fit part, as batches.

    Attributes:
        feeds: function that returns the batches.
        samples: number of samples.
        provider: onnxruntime provider.
        seed: random seed for the choice of rows.
    """

    feeds: FeedsSource
    samples: int
    provider: str = "cpu"
    seed: int = 0


RENAMES = ("_quant", "_MatMul_quant", "_MatMul", "_Q4")
"""Suffixes that onnxruntime's quantizers append to the name of a node; they turn a Gemm into MatMul and Add."""


def lower(source: Path, target: Path, lowering: Lowering, data: CalibrationFeeds | None) -> dict[str, int]:
    """Write a model in low precision.

    Args:
        source: float32 model; splits are marked as `split_model` marks them.
        target: file to write.
        lowering: precision of the weights.
        data: calibration data; None where neither static ranges nor 4-bit weights need any.

    Returns:
        Name of each weight's node -> bits it is stored in, for those in four bits.

    Raises:
        UsageError: static ranges without data.
        ModelError: onnxruntime cannot quantize the model.
    """
    work = target.with_name(f"{target.name}.work.onnx")
    try:
        marks, kept_float = _prepared(source, work, lowering)
        small = _rounded_sites(work, lowering, data) if lowering.uses_4_bits else {}
        kept_float += [node for node in marks if lowering.bits.get(_site_node(node)) == 32]
        quantize(work, target, lowering.scheme, None if data is None else data.feeds, kept_float)
        made = read_proto(target, with_data=True)
        stored = store_in_4_bits_(made, {name: entry.rounded for name, entry in small.items()})
        sources = {f"{name}{suffix}": name for suffix in RENAMES for name in marks} | {name: name for name in marks}
        for node in made.graph.node:
            node.name = sources.get(node.name, node.name)
            for entry in marks.get(node.name, ()):
                node.metadata_props.add(key=entry[0], value=entry[1])
        stay_float_(made, frozenset(kept_float))
        compact_(made, frozenset(marks))
        _write(made, target)
    finally:
        for path in (work, work.with_name(f"{work.name}.data")):
            path.unlink(missing_ok=True)
    return {small[name].node: 4 for name in stored}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    node: str
    rounded: Rounded


def _site_node(node: str) -> str:
    """Return the name of the dense node that a node comes from."""
    for suffix in SUFFIXES:
        node = node.removesuffix(suffix)
    return node


def _prepared(source: Path, work: Path, lowering: Lowering) -> tuple[dict[str, tuple[tuple[str, str], ...]], list[str]]:
    """Write the float model with its tables lowered.

    Returns:
        Name of each node -> its metadata, and the names of the Gathers whose tables stay in float.
    """
    model = onnx_file.read_onnx(source)
    if lowering.uses_4_bits and model.opset_imports.get("", OPSET) < OPSET:
        model = convert_opset(model, OPSET, source.name)
        model.ir_version = max(model.ir_version or IR_VERSION, IR_VERSION)
    onnx_file.write_onnx(model, work)
    marks = {str(node.name): tuple(node.metadata_props.items()) for node in model.graph.all_nodes()}
    proto = read_proto(work, with_data=True)
    known = {tensor.name: tensor for tensor in proto.graph.initializer}
    factors = {name: name.replace(".", "_") for name in known if FACTOR.fullmatch(name)}
    changed = bool(factors)
    kept_float: list[str] = []
    for table in tables(proto):
        bits = lowering.tables.get(table.name, 8)
        if bits == 32:
            kept_float += [node.name for node in proto.graph.node if table.name in node.input]
        else:
            store_table_(proto, table, numpy_helper.to_array(known[table.name]), bits)
            changed = True
    for tensor in proto.graph.initializer:
        tensor.name = factors.get(tensor.name, tensor.name)
    for node in proto.graph.node:  # factors of known names or marked nodes would not be found as sites
        changed = changed or bool(node.metadata_props)
        del node.metadata_props[:]
    for node in (node for graph in all_graphs(proto) for node in graph.node):
        node.input[:] = [factors.get(name, name) for name in node.input]
    if changed:
        _write(proto, work)
    return marks, kept_float


def _rounded_sites(path: Path, lowering: Lowering, data: CalibrationFeeds | None) -> dict[str, _Entry]:
    """Round the weights that are stored in four bits, each fitted to its inputs where there are data."""
    sites = {site_name(s.weight): s for s in found_sites(path) if lowering.bits.get(_site_node(s.node)) == 4}
    sites = {name: s for name, s in sites.items() if s.op_type in ("Conv", "MatMul", "Gemm") and not s.both_ways}
    found: dict[str, _Entry] = {}

    def keep(site: gp.Site, second: torch.Tensor | None) -> None:
        found[site.weight] = _Entry(node=site.node, rounded=_site_rounded(site, second))

    def visit(calibrated: CalibratedSite, moments: Moments | Samples) -> None:
        keep(sites[calibrated.name], second_moments(moments))

    if data is not None:
        streams = OnnxStreams(
            path,
            data.feeds,
            data.samples,
            may_split=sites.__contains__,
            provider=data.provider,
            seed=data.seed,
            before_ids=True,
        )
        streams.survey(visit)
    for site in sites.values():
        if site.weight not in found:
            keep(site, None)
    return found


def _site_rounded(site: gp.Site, second: torch.Tensor | None) -> Rounded:
    weight = torch.from_numpy(np.array(site.load(), np.float32))
    return rounded_weight(weight, second, is_product=site.window is None)


def _write(model: ModelProto, path: Path) -> None:
    """Write a model; weights above the limit of a protobuf go beside it."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > onnx_file.INLINE_LIMIT
    onnx.save(model, str(path), save_as_external_data=large, location=data.name if large else None)
