"""Options of sites and embedding tables in few bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
from onnx import numpy_helper

from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.exporting.results import DenseModel
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.planning.knapsack import Option, SiteOptions
from rsi_deploy.precision.embedding_tables import EmbeddingTable, stored_table_bytes, table_values

OUT_OF_REACH = 2**50
"""Bytes of an option that no size has room for."""


def bits_of(site: CalibratedSite) -> tuple[int, ...]:
    """Return the bits that a site's weight may be stored in."""
    if site.groups > 1 and not site.kernel:
        return (32, 8)
    return (32, 8, 5, 4, 3)


def in_bits(site: SiteOptions, allowed: tuple[int, ...], *, with_repairs: bool) -> SiteOptions:
    """Return the options in these bits; the dense weight as it is stays first, out of reach where it is not one."""
    exact = site.options[0]
    others = [o for o in site.options[1:] if o.bits in allowed and (with_repairs or not o.repair)]
    if others and 32 not in allowed:
        exact = replace(exact, bytes=OUT_OF_REACH)
    return replace(site, options=(exact, *others))


def table_options(table: EmbeddingTable, dense: DenseModel, path: Path, loss_of: Callable[[], float]) -> SiteOptions:
    """Return an embedding table as a site: as it is, in eight bits and in four. Its losses are measured.

    Args:
        table: the table.
        dense: the dense model.
        path: file of the model with the rounded table; written for each number of bits, and deleted.
        loss_of: function that returns the loss of the model at `path`.
    """
    size = 4 * table.rows * table.width
    whole = Option(form="dense", rank=None, params=size // 4, macs=0, bytes=size, loss=0.0)
    options = [whole]
    for bits in (8, 4):
        model = read_proto(dense.path, with_data=True)
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == table.name)
        tensor.CopyFrom(numpy_helper.from_array(table_values(numpy_helper.to_array(tensor), bits), table.name))
        onnx.save(model, str(path))
        loss = loss_of()
        path.unlink()
        size = stored_table_bytes(table, bits)
        options.append(replace(whole, bits=bits, bytes=size, loss=max(loss, 1e-12), error=loss))
    return SiteOptions(name=table.name, options=tuple(options))
