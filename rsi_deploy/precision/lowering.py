"""Lower a float model: quantize it by a scheme, store weights in few bits, and shorten the file.

    float model --> embedding tables --> onnxruntime's quantizer --> weights in few bits --> short names --> file

Weights of fewer than eight bits are fitted to the inputs that they have in the float model (`rounding`). Both factors
of a split follow the bits of its site; those that were rounded in their fit stay as they are.
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
from rsi_deploy.calibration.repair import Repair, repairs
from rsi_deploy.calibration.rounding import Rounded, rounded_weight, second_moments
from rsi_deploy.core.sites import site_name
from rsi_deploy.io import onnx_file
from rsi_deploy.io.onnx_checks.parts import all_graphs
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.calibration.activations import OnnxStreams
from rsi_deploy.onnx_models.calibration.reachable_sites import found_sites
from rsi_deploy.onnx_models.opset import convert_opset
from rsi_deploy.precision.compact import compact_
from rsi_deploy.precision.embedding_tables import store_table_, tables
from rsi_deploy.precision.few_bits import IR_VERSION, OPSET, store_float_weights_, store_int8_weights_
from rsi_deploy.precision.float_nodes import stay_float_
from rsi_deploy.precision.quantizers import FeedsSource, quantize
from rsi_deploy.precision.schemes import DYNAMIC, FEW_BITS, PRODUCTS, Scheme

Array = npt.NDArray[Any]

SUFFIXES = ("/right", "/left")
FACTOR = re.compile(r".+\.(right|left)(_\d+)?")


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """The precision of a model's weights.

    Attributes:
        scheme: how the model is quantized.
        bits: name of a site's node -> bits that its weight is stored in: 3, 4, 5, 8, or 32 to leave it as it is. Others
            are stored in eight.
        tables: name of an embedding table -> 4, 8 or 32 bits; others are stored in `table_bits`.
        table_bits: 8, or 32 to leave embedding tables in float.
        in_float: names of the nodes of sites that are computed in float32, with weights in their bits. So are all sites
            of "few bits, float32 products", and the convolutions of "dynamic int8".
        repairs: name of the node of such a site, in fewer than eight bits -> rank of the repair of its weight.
    """

    scheme: Scheme
    bits: Mapping[str, int] = field(default_factory=dict)
    tables: Mapping[str, int] = field(default_factory=dict)
    table_bits: int = 8
    in_float: frozenset[str] = frozenset()
    repairs: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_packed(self) -> bool:
        """Return whether a site is stored in fewer than eight bits."""
        return any(bits < 8 for bits in self.bits.values())

    def computes_in_float(self, site: gp.Site) -> bool:
        """Return whether the products of a site are those of float32."""
        if self.scheme is FEW_BITS or _site_node(site.node) in self.in_float:
            return True
        return self.scheme is DYNAMIC and site.op_type not in PRODUCTS


@dataclass(frozen=True, kw_only=True)
class CalibrationFeeds:
    """The samples of the fit part, as batches.

    Attributes:
        feeds: function that returns the batches.
        samples: number of samples.
        provider: onnxruntime provider.
        seed: random seed for the choice of rows.
        inputs: second moments of inputs by name of the weight, where they are known; those of other weights are found
            by a run of the model.
    """

    feeds: FeedsSource
    samples: int
    provider: str = "cpu"
    seed: int = 0
    inputs: Mapping[str, torch.Tensor] = field(default_factory=dict)


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
        Name of the node of each weight that is stored in few bits by nodes that unpack it -> its bits.

    Raises:
        UsageError: static ranges without data.
        ModelError: onnxruntime cannot quantize the model.
    """
    work = target.with_name(f"{target.name}.work.onnx")
    try:
        marks, kept_float = _prepared(source, work, lowering)
        entries = _rounded_sites(work, lowering, data)
        if lowering.scheme is FEW_BITS:
            made = read_proto(work, with_data=True)
        else:
            kept_float += [node for node in marks if lowering.bits.get(_site_node(node)) == 32]
            kept_float += [node for node in marks if _site_node(node) in lowering.in_float]
            quantize(work, target, lowering.scheme, None if data is None else data.feeds, kept_float)
            made = read_proto(target, with_data=True)
        small = {name: entry.rounded for name, entry in entries.items()}
        repaired = {name: entry.repair for name, entry in entries.items() if entry.repair is not None}
        stored = store_float_weights_(made, small, lambda name: np.asarray(entries[name].site.load()), repaired)
        stored += store_int8_weights_(made, {name: rounded for name, rounded in small.items() if rounded.bits < 8})
        sources = {f"{name}{suffix}": name for suffix in RENAMES for name in marks} | {name: name for name in marks}
        for node in made.graph.node:
            node.name = sources.get(node.name, node.name)
            for key, value in marks.get(node.name, ()):
                node.metadata_props.add(key=key, value=value)
        stay_float_(made, frozenset(kept_float))
        compact_(made, frozenset(marks))
        _write(made, target)
    finally:
        for path in (work, work.with_name(f"{work.name}.data")):
            path.unlink(missing_ok=True)
    return {entries[name].site.node: entries[name].rounded.bits for name in stored}


@dataclass(frozen=True, kw_only=True)
class _Entry:
    site: gp.Site
    rounded: Rounded
    repair: Repair | None

    @property
    def is_exact(self) -> bool:
        """Return whether rounding changed nothing, because the weight was rounded in its fit."""
        weight = torch.from_numpy(np.array(self.site.load(), np.float32)).reshape(self.rounded.codes.shape)
        step = self.rounded.scales.max()
        return bool((self.rounded.weight() - weight).abs().max() <= 1e-3 * step)


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
    if lowering.is_packed and model.opset_imports.get("", OPSET) < OPSET:
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
        bits = lowering.tables.get(table.name, lowering.table_bits)
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
    """Round the weights that nodes will unpack; those of fewer than eight bits are fitted to the data."""
    found: dict[str, _Entry] = {}
    sites: dict[str, tuple[gp.Site, int]] = {}
    for site in found_sites(path):
        bits = lowering.bits.get(_site_node(site.node), 8)
        if bits == 32 or site.both_ways or not (bits < 8 or lowering.computes_in_float(site)):
            continue
        if bits == 8 or site.op_type in ("Conv", "MatMul", "Gemm"):
            sites[site_name(site.weight)] = (site, bits)

    def keep(name: str, second: torch.Tensor | None) -> None:
        site, bits = sites[name]
        weight = torch.from_numpy(np.array(site.load(), np.float32))
        rounded = rounded_weight(weight, second, is_product=site.window is None, bits=bits)
        rank, repair = lowering.repairs.get(_site_node(site.node), 0), None
        if rank and second is not None:
            (repair,) = repairs(weight[0], rounded.weight(), second[0], [rank], Solver(), site=name)
        found[site.weight] = _Entry(site=site, rounded=rounded, repair=repair)

    def visit(calibrated: CalibratedSite, moments: Moments | Samples) -> None:
        keep(calibrated.name, second_moments(moments))

    inputs = {} if data is None else data.inputs
    known = {  # other inputs are those of hidden units that are gone
        name: inputs[name].double()
        for name, (site, _) in sites.items()
        if name in inputs and inputs[name].shape[-1] == site.in_features
    }
    for name in sites:
        keep(name, known.get(name))
    unknown = {
        name
        for name, (site, bits) in sites.items()
        if bits < 8 and name not in known and not found[site.weight].is_exact
    }
    if data is not None and unknown:
        streams = OnnxStreams(
            path,
            data.feeds,
            data.samples,
            may_split=lambda name: name in unknown,
            provider=data.provider,
            seed=data.seed,
            before_ids=True,
        )
        streams.survey(visit)
    return {site.weight: found[site.weight] for site, _ in sites.values()}


def _write(model: ModelProto, path: Path) -> None:
    """Write a model; weights above the limit of a protobuf go beside it."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)
    large = sum(tensor.ByteSize() for tensor in model.graph.initializer) > onnx_file.INLINE_LIMIT
    onnx.save(model, str(path), save_as_external_data=large, location=data.name if large else None)
