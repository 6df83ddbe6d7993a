"""Find the sites of an ONNX graph that calibration can observe, and the values to which their outputs are added.

data --> [ site ] --> output --> (Add a constant) --> Add --> ...
                                         beside -------'
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

import graph_passes as gp
from rsi_deploy.calibration.activations import CalibratedSite
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.sites import site_name
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.onnx_models.calibration.stages import reads


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A site that calibration observes; `beside` is the value to which its output is added, or ""."""

    site: CalibratedSite
    graph: gp.Site
    beside: str

    @property
    def tag(self) -> str:
        """The prefix of the names of its taps."""
        return f"rsi_deploy/{self.graph.output}"

    @property
    def order(self) -> gp.RowOrder:
        """The orders of the axes of data and output."""
        return self.graph.row_order or gp.RowOrder()

    def weight(self) -> Tensor:
        """Return the weight, float32 `(groups, out, in)`.

        Raises:
            ModelError: the weight holds NaN or infinite values.
        """
        weight = self.site.load().float()
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            name = self.site.name
            raise ModelError(
                f"site {name!r}: its weight holds NaN or infinite values (type --exclude {name!r} to leave it dense)"
            )
        return weight

    def grouped(self, rows: npt.NDArray[Any]) -> Tensor:
        """Return gathered rows `(rows, groups * features)` as `(groups, rows, features)`."""
        groups = self.site.groups
        return torch.from_numpy(rows).reshape(len(rows), groups, rows.shape[1] // groups).movedim(1, 0)


def row_sizes(sizes: Sequence[int], width: int) -> list[int]:
    """Return the sizes in front of the last axes that make a row of `width` numbers.

    Example:
        >>> row_sizes((8, 5, 2, 3), 6)
        [8, 5]
    """
    rows, columns = list(sizes), 1
    while rows and columns < width:
        columns *= rows.pop()
    return rows


def reach(
    model: ModelProto,
    sites: Sequence[gp.Site],
    *,
    may_split: Callable[[str], bool],
    macs: Mapping[str, int],
    compensate: bool,
) -> tuple[dict[str, Reached], dict[str, str]]:
    """Return the sites that calibration can observe, by output name, and the reasons of the others, by site name.

    Args:
        model: the model without its external data.
        sites: all sites of the model.
        may_split: function from a site name to whether the site may be split; other sites are left out.
        macs: multiply-accumulates a sample, by node name.
        compensate: find the values to which the outputs are added.
    """
    uses = Counter(site.weight for site in sites)
    made = {name for node in model.graph.node for name in node.output}
    beside = added_to(model) if compensate else {}
    found: dict[str, Reached] = {}
    unreachable: dict[str, str] = {}
    for site in sites:
        name = site_name(site.weight)
        if not may_split(name):
            continue
        if reason := _out_of_reach(site, uses[site.weight], made):
            unreachable[name] = reason
        else:
            near = beside.get(site.output, "") if site.linear else ""
            found[site.output] = Reached(site=_stream_site(site, macs), graph=site, beside=near)
    return found, unreachable


def found_sites(path: Path) -> list[gp.Site]:
    """Return the sites of the model at `path`."""
    return [entry for entry in gp.find_sites(load_model(path)) if isinstance(entry, gp.Site)]


def added_to(model: ModelProto) -> dict[str, str]:
    """Return, by value, what its only reader adds to it, directly or behind the addition of a constant."""
    readers = _readers(model.graph.node)
    fixed = {tensor.name for tensor in model.graph.initializer}
    fixed |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    ends = {value.name for value in model.graph.output}
    found = {}
    for value in readers:
        end = value
        for _ in range(2):
            users = readers.get(end, [])
            if len(users) != 1 or (users[0].domain, users[0].op_type) not in _ADDITIONS or end in ends:
                break
            others = [name for name in users[0].input[:2] if name != end]
            if len(others) != 1:  # to itself
                break
            if others[0] not in fixed:
                found[value] = others[0]
                break
            end = users[0].output[0]
    return found


_ADDITIONS = {
    ("", "Add"),
    ("com.microsoft", "SkipLayerNormalization"),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"),
}
"""Operators that add their first two inputs."""


def _readers(nodes: Iterable[NodeProto]) -> dict[str, list[NodeProto]]:
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    return readers


def _out_of_reach(site: gp.Site, uses: int, made: set[str]) -> str:
    """Return why calibration cannot observe a site, or ""."""
    if site.nested or site.output not in made:
        return "it stands in a subgraph or function, which calibration cannot observe"
    if uses > 1:
        return f"{uses} nodes share its weight"
    if site.window is not None and not site.plain:
        return f"calibration does not know the rows of a {site.op_type}"
    return "" if site.plain else "its data are transposed or scaled, or the weight is the first operand"


def _macs_between(units: gp.Units | None, macs: Mapping[str, int]) -> int:
    """Return the multiply-accumulates of the nodes between those that make hidden units and the one that reads them."""
    return 0 if units is None else sum(macs.get(node, 0) for node in units.nodes[len(units.makers) :])


def _stream_site(site: gp.Site, macs: Mapping[str, int]) -> CalibratedSite:
    window = site.window
    return CalibratedSite(
        name=site_name(site.weight),
        kind=site.op_type,
        groups=site.groups,
        out_features=site.out_features,
        in_features=site.in_features,
        kernel=window.kernel if window else (),
        strides=window.strides if window else (),
        forms=site.forms,
        macs=macs.get(site.node, 0),
        item_bytes=np.dtype(site.dtype).itemsize if site.dtype != "bfloat16" else 2,
        load=lambda: as_torch(site.load()),
        units=None if site.units is None else replace(site.units, makers=tuple(map(site_name, site.units.makers))),
        unit_macs=_macs_between(site.units, macs),
    )
