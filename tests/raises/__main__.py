"""Run pytest and name the raise statements that no test reached.

    python -m tests.raises                          the whole suite; exit 1 where one is unreached that is not listed
    python -m tests.raises --record FILE tests/...  a part of it; what several parts reach adds up in FILE
    python -m tests.raises --record FILE --list     run nothing: what FILE leaves unreached

unreached.txt lists those that stay unreached here, each with its reason.
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
    """Reason by statement: a line `# reason` holds for the statements under it."""
    reasons, reason = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line.strip():
            reasons[line.strip()] = reason
    return reasons


def unreached(record: Path, found: list[Statement]) -> list[Statement]:
    """The statements that the record does not hold."""
    reached = set(record.read_text(encoding="utf-8").splitlines()) if record.exists() else set()
    return [one for one in found if one.key not in reached]


def run_pytest(record: Path, arguments: list[str]) -> int:
    """Pytest's exit code; it and all that it starts note their raise statements."""
    path = os.pathsep.join(filter(None, [str(HERE / "hook"), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "RSI_RAISES": str(record)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], env=environment, cwd=ROOT, check=False
    ).returncode


def judge(record: Path, *, whole: bool) -> int:
    """Print what is unreached; 1 where the whole suite leaves one that is not listed, or a listed one is gone."""
    found = list(statements(ROOT))
    known = listed(LIST.read_text(encoding="utf-8"))
    left = unreached(record, found)
    new = [one for one in left if one.key not in known]
    gone = known.keys() - {one.key for one in found}
    for one in new:
        print(f"unreached, line {one.line}: {one.key}")
    for key in sorted(gone):
        print(f"listed in {LIST.name}, but not in the code: {key}")
    print(
        f"{len(found)} raise statements, {len(found) - len(left)} reached, {len(left) - len(new)} unreached and listed"
    )
    return int(whole and bool(new or gone))


def main() -> int:
    """Pytest's exit code, or 1 where statements are unreached that should not be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="Where places are noted; a file that is there is added to.")
    parser.add_argument("--list", action="store_true", help="Run nothing.")
    told, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        record = (told.record or Path(folder) / "record").resolve()
        code = 0 if told.list else run_pytest(record, arguments)
        return code or judge(record, whole=told.list or not arguments)


if __name__ == "__main__":
    sys.exit(main())
