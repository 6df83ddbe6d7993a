"""onnxruntime alone, for `bench.serving`: one process that runs a model at one batch in a loop and prints the number of
rows.

    python -m bench.serving_offline MODEL.onnx DATA.npz --batch 16 --threads 1 --seconds 10

Waits for a line on stdin before it starts, so that several of them start together.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from rsi_deploy.runtime.sessions import make_session


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", type=Path)
    options.add_argument("data", type=Path)
    options.add_argument("--batch", type=int, required=True)
    options.add_argument("--threads", type=int, required=True)
    options.add_argument("--seconds", type=float, default=10.0)
    args = options.parse_args()
    session = make_session(args.model, threads=args.threads, spin_between_runs=False)
    data = dict(np.load(args.data))
    data.pop("expected")
    rows = np.arange(args.batch) % len(next(iter(data.values())))
    feeds = {name: array[rows] for name, array in data.items()}
    session.run(None, feeds)
    print("ready", flush=True)
    sys.stdin.readline()
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < args.seconds:
        session.run(None, feeds)
        done += args.batch
    seconds = time.perf_counter() - start
    print(json.dumps({"rows": done, "seconds": seconds, "cpu": time.process_time() - cpu}))


if __name__ == "__main__":
    main()
