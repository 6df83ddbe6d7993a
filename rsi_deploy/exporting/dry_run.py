"""`export --dry-run`: the request as it is understood, and what would be done; nothing is factorized or written."""

import pydantic

from rsi_deploy.core.errors import UsageError
from rsi_deploy.core.settings.groups import SourceConfig
from rsi_deploy.core.settings.verbs import ExportConfig
from rsi_deploy.core.text import plain
from rsi_deploy.exporting.api import export_run
from rsi_deploy.onnx_models.inspection import SiteView, inspect


class DryRunSite(pydantic.BaseModel, frozen=True, extra="forbid"):
    """A site of the model.

    Attributes:
        name: name of the site.
        shape: `(out, in)` of its weight.
        decision: what becomes of it, in words; a rank, a reason to stay dense, or who decides.
    """

    name: str
    shape: tuple[int, int]
    decision: str


class DryRun(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The plan of an export that is not run.

    Attributes:
        recipe: the request as recipe.toml would hold it.
        rule: what decides the ranks.
        factors: what the factors are computed from.
        sites: every site of the model.
    """

    recipe: str
    rule: str
    factors: str
    sites: tuple[DryRunSite, ...]

    def text(self) -> str:
        """Return the recipe, with the rest as comments: the text as a whole is a recipe."""
        lines = [f"ranks: {self.rule}", f"factors: {self.factors}", f"{len(self.sites)} sites:"]
        lines += [f"  {site.name}  {site.shape[0]} x {site.shape[1]}  {site.decision}" for site in self.sites]
        return self.recipe + "\n# Nothing was done yet. This would be:\n" + "".join(f"# {plain(x)}\n" for x in lines)


def dry_run(model: str | None, config: ExportConfig) -> DryRun:
    """Return what `export` would do.

    Raises:
        UsageError: what `export` refuses before any work, or ranks that no site has.
        ModelError: the model cannot be read.
    """
    if model is None:
        raise UsageError("export takes a MODEL, or --from-sweep DIR --point N")
    run = export_run(model, config)
    request = run.request
    rank = run.job.settings.rank
    rule = request.decided_by or f"--rank {rank}"
    return DryRun(
        recipe=run.recipe,
        rule=rule + (", on calibration data" if request.is_searched else ""),
        factors="fitted to calibration data" if request.is_fitted else "of the weights alone",
        sites=_sites(model, config, rank, rule),
    )


def _sites(model: str, config: ExportConfig, rank: str, rule: str) -> tuple[DryRunSite, ...]:
    """Return the sites; those of a .pt2 program are known only once it is exported."""
    if model.endswith(".pt2"):
        return ()
    found = inspect(
        model,
        rank=rank or "100%",
        **{name: getattr(config, name) for name in (*SourceConfig.model_fields, "include", "exclude", "seed")},
        joint=config.joint,
        assume_constant=config.assume_constant,
        spectra=False,
    )
    return tuple(
        DryRunSite(name=site.name, shape=(site.out_features, site.in_features), decision=_decision(site, rank, rule))
        for site in found.sites
    )


def _decision(site: SiteView, rank: str, rule: str) -> str:
    if site.rank:
        return f"rank {site.rank}"
    is_settled = rank or site.reason.startswith("excluded") or not site.out_features
    return f"dense: {site.reason}" if is_settled else f"decided by {rule}"
