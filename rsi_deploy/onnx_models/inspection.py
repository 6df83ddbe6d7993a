"""`inspect`: the sites of a model, their spectra, and what `export` would do, without an export.

A torch model is read through its modules (weights used only as bare functions show up in ONNX alone); an ONNX file
through its graph. The spectrum is that of the weight: what fraction of it a rank keeps on data is another question.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pydantic
import torch

import graph_passes as gp
from rsi_deploy.core.arrays import as_torch
from rsi_deploy.core.errors import ModelError
from rsi_deploy.core.progress import at, step
from rsi_deploy.core.sites import break_even_rank, site_name
from rsi_deploy.io.onnx_checks.broken_models import explains_broken_models
from rsi_deploy.io.onnx_file import read_onnx
from rsi_deploy.linalg.solver import singular_values
from rsi_deploy.onnx_models.requantize import quantized_products
from rsi_deploy.onnx_models.split import joint_groups
from rsi_deploy.planning.planner import Planner, RankSpec
from rsi_deploy.torch_models.model_source import load_source
from rsi_deploy.torch_models.module_sites import find_module_sites

# A larger spectrum takes minutes on two cores, so inspect leaves it out unless an option requests it.
SPECTRUM_LIMIT = 2048

Found = tuple[str, str, tuple[int, int], int, str, Callable[[], torch.Tensor] | None]
"""(name, kind, (out, in), groups, obstacle or "", loader of the weight `(groups, out, in)`)."""


class SiteView(pydantic.BaseModel, frozen=True, extra="forbid"):
    """One site as it is, and what export would do with it.

    Attributes:
        name, kind, out_features, in_features, groups, break_even_rank: as in `SiteRecord`.
        params: numbers in the weight.
        rank: that export would split at; None for dense.
        reason: of that decision.
        joint: names of the sites that multiply the same input, this one too, where export would have them share one
            right factor if that costs less for the same errors, which only their factors tell; else empty.
        rank_90, rank_99: smallest rank that keeps 90 / 99 % of the squared singular values (of the worst group);
            None where the spectrum was not computed.
        stable_rank: `||W||_F^2 / ||W||_2^2`.
    """

    name: str
    kind: str
    out_features: int
    in_features: int
    groups: int
    break_even_rank: float
    params: int
    rank: int | None
    reason: str
    joint: tuple[str, ...] = ()
    rank_90: int | None = None
    rank_99: int | None = None
    stable_rank: float | None = None


class Inspection(pydantic.BaseModel, frozen=True, extra="forbid"):
    """All sites of a model at one `--rank`.

    Attributes:
        model: name of the model.
        rank: value of `--rank`.
        sites: its sites.
        quantized_products: number of nodes that multiply by weights of few bits already.
        notes: notes for users.
    """

    model: str
    rank: str
    sites: tuple[SiteView, ...]
    quantized_products: int = 0
    notes: tuple[str, ...] = ()


@explains_broken_models
def inspect(
    model: str,
    *,
    rank: str | int | RankSpec = "25%",
    weights: str = "DEFAULT",
    checkpoint: str | Path | None = None,
    input_shape: str | tuple[int, ...] | Sequence[str] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    joint: bool = True,
    assume_constant: bool = False,
    spectra: bool = True,
    spectrum_limit: int = SPECTRUM_LIMIT,
    seed: int = 0,
) -> Inspection:
    """List the sites of MODEL (as for `export`) and what export would do at `rank`.

    Args:
        model: `torchvision:NAME`, `package.module:factory`, `FILE.pt2` (through its parameters), `FILE.onnx`.
        rank: as for export.
        weights: as for export.
        checkpoint: as for export.
        input_shape: not needed here; accepted, so that the same options work.
        include: as for export.
        exclude: as for export.
        joint: as for export; shown for an ONNX file alone, as modules do not tell what multiplies the same input.
        assume_constant: as for export.
        spectra: compute singular values.
        spectrum_limit: largest `min(out, in)` whose spectrum is computed.
        seed: of random weights.

    Raises:
        UsageError, ModelError: as for export.
    """
    spec = RankSpec.parse(rank)
    planner = Planner(spec=spec, include=tuple(include), exclude=tuple(exclude))
    is_factory = ":" in model and not model.startswith("torchvision:") and not model.endswith((".onnx", ".pt2"))
    shape = (1,) if is_factory else None  # no input is run
    source = load_source(
        model,
        weights=weights,
        checkpoint=checkpoint,
        input_shape=shape,
        seed=seed,
    )
    together: list[tuple[str, ...]] = []
    quantized: list[str] = []
    if source.onnx is not None:
        graph = read_onnx(source.onnx, assume_constant=assume_constant)
        gp.FoldBatchNormPass()(graph)
        found, quantized = _graph_sites(graph), quantized_products(graph)
        if joint:
            together = [tuple(site_name(site.weight) for site in members) for members in joint_groups(graph)]
    elif source.module is not None:
        found = _module_sites(source.module)
    else:
        raise ModelError(f"{model}: a .pt2 program has no modules to list; export it and inspect the dense ONNX file")
    views, notes = [], list(source.notes)
    skipped = 0
    for name, kind, (out_features, in_features), groups, obstacle, load in _in_turn(list(found)):
        decision = planner.decide(name, out_features, in_features) if out_features else None
        rank_ = None if obstacle or decision is None else decision.rank
        extra: dict[str, float | int] = {}
        if spectra and load is not None and min(out_features, in_features) <= spectrum_limit:
            extra = _spectrum(load())
        elif spectra and load is not None:
            skipped += 1
        views.append(
            SiteView(
                name=name,
                kind=kind,
                out_features=out_features,
                in_features=in_features,
                groups=groups,
                break_even_rank=break_even_rank(out_features, in_features) if out_features else 0.0,
                params=groups * out_features * in_features,
                rank=rank_,
                reason=obstacle or (decision.reason if decision else ""),
                **extra,
            )
        )
    planner.check([(v.name, v.out_features, v.in_features) for v in views if v.out_features])
    if quantized:
        notes.append(
            f"{len(quantized)} products are in low precision already: they stay as they are, or become float first "
            f"with export --requantize"
        )
    if skipped:
        notes.append(
            f"no spectrum of {skipped} sites with min(out, in) above {spectrum_limit}: --spectrum-limit raises it"
        )
    return Inspection(
        model=source.name,
        rank=str(spec),
        sites=_grouped(views, together),
        quantized_products=len(quantized),
        notes=tuple(notes),
    )


def _in_turn(found: Sequence[Found]) -> Iterator[Found]:
    """The sites, each said before its spectrum is computed."""
    with step("spectra"):
        for number, site in enumerate(found):
            at(site[0], number, len(found))
            yield site


def _module_sites(module: torch.nn.Module) -> Iterator[Found]:
    for site in find_module_sites(module):
        yield site.name, site.kind, site.shape, site.groups, site.obstacle, site.matrix


def _graph_sites(model: ir.Model) -> Iterator[Found]:
    """Every weight once, as its first node uses it."""
    first: dict[str, gp.Site | gp.Skip] = {}
    for site in gp.find_sites(model):
        first.setdefault(site.weight or f"node {site.node}", site)
    for site in first.values():
        shape, name = (site.out_features, site.in_features), site_name(site.weight or site.node)
        if isinstance(site, gp.Site):
            yield name, site.op_type, shape, site.groups, "", partial(_loaded, site)
        else:
            yield name, site.op_type, shape, max(site.groups, 1), site.reason, None


def _grouped(views: Sequence[SiteView], groups: Sequence[tuple[str, ...]]) -> tuple[SiteView, ...]:
    """The views with the groups all of whose members would be split."""
    split = {view.name for view in views if view.rank}
    joint = {name: names for names in groups if split.issuperset(names) for name in names}
    return tuple(view.model_copy(update={"joint": joint.get(view.name, ())}) for view in views)


def _loaded(site: gp.Site) -> torch.Tensor:
    return as_torch(site.load())


def _spectrum(weight: torch.Tensor) -> dict[str, float | int]:
    if not torch.isfinite(weight).all():
        return {}
    energy = singular_values(weight).square()
    total = energy.sum(-1, keepdim=True).clamp_min(1e-300)
    kept = energy.cumsum(-1) / total
    return {
        "rank_90": int((kept < 0.9).sum(-1).max()) + 1,
        "rank_99": min(int((kept < 0.99).sum(-1).max()) + 1, energy.shape[-1]),
        "stable_rank": float((total.squeeze(-1) / energy[..., 0].clamp_min(1e-300)).max()),
    }
