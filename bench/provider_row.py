"""Dense against compressed on one provider at one batch, in a process of its own and of that provider's environment.

Prints the `BenchResult` as JSON. It imports only what measuring needs, so that an environment without torch can run it.
"""

import argparse
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench import common

if TYPE_CHECKING:
    from rsi_deploy.benchmark.latency import BenchResult


def main(arguments: Sequence[str]) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.provider_row", description=__doc__)
    options.add_argument("dense")
    options.add_argument("compressed")
    options.add_argument("--provider", default="cpu")
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--seconds", type=float, default=30.0)
    options.add_argument("--patience", type=float, default=0.0, help="seconds to take where --seconds are too few")
    options.add_argument("--threads", type=int)
    options.add_argument("--tokens", type=int, help="length of inputs whose second axis is open")
    args = options.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from rsi_deploy.benchmark.latency import bench
    from rsi_deploy.runtime.feeds.inputs import model_inputs

    shapes = {
        spec.name: (args.batch, args.tokens)
        for spec in model_inputs(args.dense)
        if args.tokens and len(spec.shape) == 2 and not isinstance(spec.shape[1], int)
    }
    from rsi_deploy.benchmark.statistics import MIN_BLOCKS

    def measured(seconds: float) -> "BenchResult":
        return bench(
            [args.dense, args.compressed],
            batch=args.batch,
            provider=args.provider,
            threads=args.threads,
            seconds=seconds,
            input_shape=shapes or None,
            labels=["dense", "compressed"],
        )

    result = measured(args.seconds)
    blocks = result.arms[0].blocks
    if blocks < MIN_BLOCKS and args.patience > args.seconds:
        common.progress(f"{blocks} blocks in {args.seconds:g} s are too few: measuring again, for longer")
        result = measured(min(args.patience, 1.5 * args.seconds * MIN_BLOCKS / blocks))
    print(json.dumps(result.model_dump(mode="json")))
    return 0


if __name__ == "__main__":
    common.run(main)
