"""All operators together: the sites of a model, and splitting them in graph order."""

import onnx_ir as ir

from graph_passes.collector import paused_collector
from graph_passes.joint import joint_members
from graph_passes.operators import PASSES, UNSPLIT
from graph_passes.records import FactorSource, Keep, Record, Site, Skip, in_memory
from graph_passes.split_pass import Splitter, run
from graph_passes.survey import Found, survey


def find_sites(model: ir.Model, *, overridable: bool = False) -> list[Site | Skip]:
    """Return every weight-bearing node in graph order: a site, or the reason why it is none. Reads no weight.

    Args:
        model: The model; not changed.
        overridable: Treat weights that are graph inputs too as constants.
    """
    entries = survey(model, PASSES, UNSPLIT, overridable=overridable)
    return [entry.site if isinstance(entry, Found) else entry for entry in entries]


def joint_groups(model: ir.Model, *, overridable: bool = False) -> list[tuple[Site, ...]]:
    """Return groups of sites that multiply the same data (q, k, v; gate and up) and can share one right factor.

    Args:
        model: The model; not changed, no weight is read.
        overridable: As for `find_sites`.
    """
    groups = joint_members(survey(model, PASSES, UNSPLIT, overridable=overridable))
    return [tuple(member.site for member in members) for members in groups]


def split(
    model: ir.Model,
    factors: FactorSource,
    *,
    keep: Keep = in_memory,
    overridable: bool = False,
    joint: bool = False,
) -> list[Record]:
    """Split in place every node for which the source returns factors.

    The source is called once a weight and orientation, in graph order; nodes that share a weight share its factors.

    Args:
        model: Changed in place. Its opset, its inputs (but see `overridable`) and its outputs stay.
        factors: Returns `SplitFactors` (in the stored dtype, of any rank) or `Dense` for a site.
        keep: Stores each factor; by default in memory. One that writes to disk bounds the memory by one weight.
        overridable: Split weights that are graph inputs too, and drop those inputs. Always so before IR version 4,
            where every initializer must be an input.
        joint: Call the source first with the joint site of each group of `joint_groups`. `SplitFactors` split the whole
            group with one shared right factor; after `Dense` the source is called for each node.

    Returns:
        One record for every weight-bearing node, in graph order; those inside model functions last.

    Raises:
        ValueError: When factors do not fit the site, have another dtype, or hold NaN; nodes before it are split.
    """
    with paused_collector():
        return list(run(model, PASSES, factors, UNSPLIT, keep, overridable=overridable, joint=joint).records)


def split_by_site(
    model: ir.Model, *, keep: Keep = in_memory, overridable: bool = False, joint: bool = False
) -> Splitter:
    """Return a `Splitter`, for a caller that iterates over the sites itself; arguments as for `split`."""
    return Splitter(model, PASSES, UNSPLIT, keep, overridable=overridable, joint=joint)
