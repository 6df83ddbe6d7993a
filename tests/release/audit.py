"""Known vulnerabilities of the versions in constraints.txt: `python -m tests.release.audit`, run by `make audit`.

pip-audit asks PyPI's advisories. Exit 0: every version was audited, and what is known is explained in explained.txt.
Exit 1: a vulnerability that is not explained. Exit 2: nothing is known, because the service did not answer for some.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXPLAINED = ROOT / "tests" / "release" / "explained.txt"


def explained(text: str) -> dict[str, str]:
    """Reason by vulnerability: lines `ID reason`; those that begin with # are comments."""
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {name: (reason[0] if reason else "") for name, *reason in lines}


def verdict(document: dict[str, Any], reasons: dict[str, str]) -> tuple[int, str]:
    """Exit code and what to say of pip-audit's JSON document."""
    versions = document["dependencies"]
    skipped = [one["name"] for one in versions if "skip_reason" in one]
    known = [(one["name"], one["version"], bug) for one in versions for bug in one.get("vulns", [])]
    names = {name for _, _, bug in known for name in (bug["id"], *bug.get("aliases", []))}
    open_ = [
        (name, version, bug)
        for name, version, bug in known
        if not {bug["id"], *bug.get("aliases", [])} & reasons.keys()
    ]
    said = [
        f"{name} {version}: {bug['id']}, mended in {', '.join(bug.get('fix_versions', [])) or 'no version'}; raise it "
        f"in constraints.txt, or say in tests/release/explained.txt why it does not matter here"
        for name, version, bug in open_
    ]
    said += [
        f"tests/release/explained.txt: {name} is not known of any version here; take it out"
        for name in reasons.keys() - names
    ]
    audited = len(versions) - len(skipped)
    said.append(
        f"{audited} of {len(versions)} versions audited, {len(known)} known vulnerabilities, {len(open_)} unexplained"
    )
    if skipped:
        said.append(
            f"NOT AUDITED: the vulnerability service gave no answer for {len(skipped)} ({', '.join(skipped[:3])}, ...)"
            f"; run make audit where PyPI's own service can be reached"
        )
    return (1 if open_ else 2 if skipped or not versions else 0), "\n".join(said)


def main() -> int:
    """Run pip-audit of this environment over constraints.txt and judge what it says."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        document = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"NOT AUDITED: pip-audit ended with {done.returncode}: {last}")
        return 2
    code, said = verdict(document, explained(EXPLAINED.read_text(encoding="utf-8")))
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main())
