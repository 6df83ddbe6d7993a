"""A whole model with zero-filled factors: as fast as the real one, and written at once, without torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

import graph_passes as gp
from rsi_deploy.core.sites import site_name
from rsi_deploy.io.onnx_file import release_weights_, write_onnx
from rsi_deploy.io.onnx_reader import load_model

Splits = Mapping[str, tuple[str, int]]
"""Site name -> (form, rank) of the split sites."""


def write_zero_filled(dense: Path, target: Path, splits: Splits) -> None:
    """Write the model at `dense` to `target` with these splits, whose factors are zero.

    Random factors could give denormal activations in a deep model, which are slow.
    """
    model = load_model(dense)

    def source(site: gp.Site) -> gp.SplitFactors | gp.Dense:
        if site.members or site_name(site.weight) not in splits:
            return gp.Dense(reason="stays")
        planned, rank = splits[site_name(site.weight)]
        form = site.forms[0] if planned == "first" else next(form for form in site.forms if form == planned)
        return gp.drawn_factors(site, form, rank, lambda shape: np.zeros(shape, site.load(form).dtype))

    gp.split(model, source)
    gp.fold_splits(model)
    write_onnx(model, target)
    release_weights_(model)
