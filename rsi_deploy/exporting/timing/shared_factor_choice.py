"""Choose between a shared right factor for weights of one input and a right factor for each, by measurement.

    jointly    1 product, shared, of rank R, then one for each weight        fewer numbers, fewer nodes
    apart      2 products for each weight, of ranks r_1, r_2 ...             smaller ones

Both models are written and measured side by side. The shared factor holds fewer numbers, so ties favour it.
"""

from collections.abc import Callable
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.onnx_models.split import SplitModel


def stays_joint(
    path: Path,
    apart: Path,
    split: SplitModel,
    write_apart: Callable[[Path], object],
    measure: Callable[[Path, Path], BenchResult],
) -> tuple[bool, list[str]]:
    """Return whether a model keeps its shared right factors, and a note on the measurement; True without any.

    Args:
        path: the model's file.
        apart: file for the model with a right factor for each weight, for a while.
        split: what its split did.
        write_apart: writes that model.
        measure: measures two models side by side.
    """
    joint = [site.name for site in split.sites if site.joint]
    if not joint:
        return True, []
    try:
        write_apart(apart)
        arm = measure(path, apart).arms[1]
    finally:
        for file in (apart, apart.with_name(f"{apart.name}.data")):
            file.unlink(missing_ok=True)
    assert arm.speedup is not None
    assert arm.speedup_interval is not None
    faster = arm.blocks >= MIN_BLOCKS and direction(arm.speedup_interval) > 0
    low, high = arm.speedup_interval
    return not faster, [
        f"{len(joint)} sites that may share a right factor are split {'apart' if faster else 'jointly'}: apart, "
        f"the model takes {1 / arm.speedup:.3g} times as long [{1 / high:.3g}, {1 / low:.3g}]"
    ]
