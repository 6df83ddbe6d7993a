"""A whole model split with factors of no content: as fast as the real one, made in a moment, without torch."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

import graph_passes as gp
from rsi_deploy.core.sites import site_name
from rsi_deploy.io.onnx_file import release_weights_, write_onnx
from rsi_deploy.io.onnx_reader import load_model

Splits = Mapping[str, tuple[str, int]]
"""Site name -> (form, rank) of those that are split."""


def write_zero_filled(dense: Path, target: Path, splits: Splits) -> None:
    """Write the model at `dense` with these splits, all their factors zeros, as `target`.

    Zeros and not random numbers: what random factors make of a deep model may be denormal, and slow.
    """
    model = load_model(dense)

    def source(site: gp.Site) -> gp.Factors | gp.Dense:
        if site.members or site_name(site.weight) not in splits:
            return gp.Dense(reason="stays")
        told, rank = splits[site_name(site.weight)]
        form = site.forms[0] if told == "first" else next(own for own in site.forms if own == told)
        rows, columns = site.shape(form)
        dtype = site.load(form).dtype
        left, right = np.zeros((site.groups, rows, rank), dtype), np.zeros((site.groups, rank, columns), dtype)
        return gp.Factors(left=left, right=right, form=form, bias=np.zeros(site.bias_size, dtype))

    gp.split(model, source)
    write_onnx(model, target)
    release_weights_(model)
