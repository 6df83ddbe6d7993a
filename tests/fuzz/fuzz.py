"""Fuzz one target by coverage: `python tests/fuzz/fuzz.py TARGET --seconds 60 [--corpus DIR]`.

Needs atheris (`pip install "rsi-deploy[fuzz]"`), which instruments the bytecode of rsi_deploy and graph_passes.
Ends with 0 where nothing was found. A finding is an exception that is none of `rsi_deploy.core.errors`, a crash of
native code, 10 s without an answer, or 2 GB of memory; its bytes are left in a file that the last lines name, and
`python tests/fuzz/fuzz.py TARGET FILE` shows it again.
"""

import argparse
import sys
import tempfile
from pathlib import Path

HANG_S = 10
MEMORY_MB = 2048


def main() -> None:
    """Read the options, write the seeds into the corpus, and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("file", nargs="?", help="bytes of a finding: run them once")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", help="a folder that keeps what was found to be new; a temporary one by default")
    options = parser.parse_args()
    import atheris

    sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # shared test modules; samples
    with atheris.instrument_imports(include=["rsi_deploy", "graph_passes"]):
        from fuzz_targets import TARGETS, seeds

    target = TARGETS[options.target]
    if options.file:
        target(Path(options.file).read_bytes())
        return
    corpus = Path(options.corpus or tempfile.mkdtemp(prefix="rsi-fuzz-corpus-"))
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(options.target)):
        (corpus / f"seed-{number}").write_bytes(seed)
    target(next(seeds(options.target)))  # late imports must not count as a hang
    limits = [f"-max_total_time={options.seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, "-max_len=16384", "-print_final_stats=1"], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
