"""Jointly or apart: weights of one input with one right factor, or each with its own, whichever is measured faster.

    jointly    1 product, shared, of rank R, then one for each weight        fewer numbers, fewer nodes
    apart      2 products for each weight, of ranks r_1, r_2 ...             smaller ones

Both are written whole and run side by side. Jointly holds fewer numbers, so that a tie is its; apart is taken where it
is shown faster.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rsi_deploy.benchmark.result import BenchResult
from rsi_deploy.benchmark.statistics import MIN_BLOCKS, direction
from rsi_deploy.exporting.steps import Compressed


@dataclass(kw_only=True)
class JointOrApart:
    """The choice for one model.

    Attributes:
        compress: writes the model at a path, split apart.
        measure: two models side by side; the first is what the second is compared with.
        apart: where a model that is split apart may lie.
        words: what came of it; "" where nothing is joint.
    """

    compress: Callable[[Path], Compressed]
    measure: Callable[[Path, Path], BenchResult]
    apart: Path
    words: str = ""

    def is_joint(self, path: Path, result: Compressed) -> bool:
        """Whether the model at `path`, whose making gave `result`, is to stay joint; True where nothing is joint."""
        joint = [site.name for site in result.split.sites if site.joint]
        if not joint:
            return True
        try:
            self.compress(self.apart)
            arm = self.measure(path, self.apart).arms[1]
        finally:
            for file in (self.apart, self.apart.with_name(f"{self.apart.name}.data")):
                file.unlink(missing_ok=True)
        assert arm.speedup is not None
        assert arm.speedup_interval is not None
        faster = arm.blocks >= MIN_BLOCKS and direction(arm.speedup_interval) > 0
        low, high = arm.speedup_interval
        self.words = (
            f"{len(joint)} sites that may share a right factor are split {'apart' if faster else 'jointly'}: apart, "
            f"the model takes {1 / arm.speedup:.3g} times as long [{1 / high:.3g}, {1 / low:.3g}]"
        )
        return not faster
