"""Known vulnerabilities of the versions in constraints.txt: `python -m tests.release.audit`, run by `make audit`.

pip-audit queries the advisories of PyPI. Exit code 0: every version was audited, and explained.txt explains each known
vulnerability. 1: a vulnerability is not explained. 2: some versions were not audited, as the service did not answer.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = ROOT / "tests" / "release" / "explained.txt"


def explained(text: str) -> dict[str, str]:
    """Return vulnerability -> reason from lines `ID reason`; lines that begin with # are comments."""
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {name: (reason[0] if reason else "") for name, *reason in lines}


def verdict(document: dict[str, Any], reasons: dict[str, str]) -> tuple[int, str]:
    """Return the exit code and the message for pip-audit's JSON document."""
    versions = document["dependencies"]
    skipped = [one["name"] for one in versions if "skip_reason" in one]
    known = [(one["name"], one["version"], bug) for one in versions for bug in one.get("vulns", [])]
    names = {name for _, _, bug in known for name in (bug["id"], *bug.get("aliases", []))}
    open_ = [
        (name, version, bug)
        for name, version, bug in known
        if not {bug["id"], *bug.get("aliases", [])} & reasons.keys()
    ]
    lines = [
        f"{name} {version}: {bug['id']}, fixed in {', '.join(bug.get('fix_versions', [])) or 'no version'}; raise it "
        f"in constraints.txt, or explain in tests/release/explained.txt why it does not matter"
        for name, version, bug in open_
    ]
    lines += [
        f"tests/release/explained.txt: {name} affects no version of constraints.txt; remove it"
        for name in reasons.keys() - names
    ]
    audited = len(versions) - len(skipped)
    lines.append(
        f"{audited} of {len(versions)} versions audited, {len(known)} known vulnerabilities, {len(open_)} unexplained"
    )
    if skipped:
        lines.append(
            f"NOT AUDITED: the vulnerability service did not answer for {len(skipped)} ({', '.join(skipped[:3])}, ...)"
            f"; run make audit where PyPI's own service can be reached"
        )
    return (1 if open_ else 2 if skipped or not versions else 0), "\n".join(lines)


def main() -> int:
    """Run pip-audit on constraints.txt, print the result and return the exit code."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"NOT AUDITED: pip-audit ended with {done.returncode}: {last}")
        return 2
    code, message = verdict(document, explained(EXPLAINED.read_text(encoding="utf-8")))
    print(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
