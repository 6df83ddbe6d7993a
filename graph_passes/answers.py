"""Check the answer of a factor source: finite `SplitFactors` in the form, shape and dtype of the site, or `Dense`."""

import numpy as np

from graph_passes.records import Array, Dense, Site, SplitFactors


def checked(answer: SplitFactors | Dense | None, site: Site) -> SplitFactors | Dense:
    """Return the answer.

    Raises:
        ValueError: The answer does not fit the site; the message names the site, what came and what was expected.
    """
    if isinstance(answer, Dense):
        return answer
    where = f"{site.op_type} {site.node!r}, weight {site.weight!r}"
    if not isinstance(answer, SplitFactors):
        raise ValueError(f"{where}: expected Factors or Dense from the factor source, but got {answer!r}")
    groups, rank, (rows, columns) = site.groups, answer.rank, site.shape(answer.form)
    if answer.left.shape != (groups, rows, rank) or answer.right.shape != (groups, rank, columns):
        raise ValueError(
            f"{where}: expected left ({groups}, {rows}, rank) and right ({groups}, rank, {columns}), "
            f"but got left {answer.left.shape} and right {answer.right.shape}"
        )
    if answer.bias is not None and answer.bias.shape != (site.bias_size,):
        raise ValueError(f"{where}: expected a bias ({site.bias_size},), but got {answer.bias.shape}")
    if answer.bias is not None and site.both_ways:
        raise ValueError(f"{where}: expected no bias, for other nodes use the weight transposed, but got one")
    if answer.left.dtype.name != site.dtype:
        raise ValueError(f"{where}: expected factors in {site.dtype}, but got {answer.left.dtype}")
    if not (_finite(answer.left) and _finite(answer.right)):
        raise ValueError(f"{where}: expected finite factors, but got NaN or infinity")
    if answer.bias is not None and not np.isfinite(answer.bias).all():
        raise ValueError(f"{where}: expected a finite bias, but got NaN or infinity")
    return answer


def _finite(array: Array) -> bool:
    """Whether all values are finite; blocks of rows keep the mask small."""
    return all(np.isfinite(array[:, i : i + 256]).all() for i in range(0, array.shape[1], 256))
