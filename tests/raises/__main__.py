"""Run pytest and name the raise statements that no test reached.

    python -m tests.raises                          the whole suite; exit 1 where one is unreached that is not listed
    python -m tests.raises --record FILE tests/...  a part of it; FILE collects the statements of several runs
    python -m tests.raises --record FILE --list     run nothing; print the statements that are not in FILE

unreached.txt lists the statements that no test reaches, with reasons.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.raises.statements import Statement, statements

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIST = HERE / "unreached.txt"


def listed(text: str) -> dict[str, str]:
    """Return statement -> reason; a line `# reason` holds for the statements below it."""
    reasons, reason = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


def unreached(record: Path, found: list[Statement]) -> list[Statement]:
    """Return the statements that are not in the record."""
    reached = set(record.read_text(encoding="utf-8").splitlines()) if record.exists() else set()
    return [one for one in found if one.key not in reached]


def run_pytest(record: Path, arguments: list[str]) -> int:
    """Run pytest so that it and its child processes record their raise statements; return its exit code."""
    path = os.pathsep.join(filter(None, [str(HERE / "hook"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "RSI_RAISES": str(record)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], env=environment, cwd=ROOT, check=False
    ).returncode


def judge(record: Path, *, whole: bool) -> int:
    """Print the unreached statements; return 1 if the list does not match those of the whole suite."""
    found = list(statements(ROOT))
    known = listed(LIST.read_text(encoding="utf-8"))
    left = unreached(record, found)
    new = [one for one in left if one.key not in known]
    stale = known.keys() - {one.key for one in found}
    for one in new:
        print(f"unreached, line {one.line}: {one.key}")
    for key in sorted(stale):
        print(f"listed in {LIST.name}, but not in the code: {key}")
    print(
        f"{len(found)} raise statements, {len(found) - len(left)} reached, {len(left) - len(new)} unreached and listed"
    )
    return int(whole and bool(new or stale))


def main() -> int:
    """Return pytest's exit code, or 1 if the list does not match."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="File of the reached statements; an existing file is extended.")
    parser.add_argument("--list", action="store_true", help="Run nothing.")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        record = (options.record or Path(folder) / "record").resolve()
        code = 0 if options.list else run_pytest(record, arguments)
        return code or judge(record, whole=options.list or not arguments)


if __name__ == "__main__":
    sys.exit(main())
