"""The checks of a release refuse what they are for: a wrong licence, a vulnerability, a service that is silent."""

import importlib.metadata

import pytest

from tests.release.audit import explained, verdict
from tests.release.licences import ALLOWED, EXTRAS, PROJECT, SPELLINGS, allowed, closure, judged


def installed(folder, name, *metadata, requires=()):
    """A distribution's metadata, as pip leaves them."""
    (folder / f"{name}-1.0.dist-info").mkdir()
    lines = ["Metadata-Version: 2.4", f"Name: {name}", "Version: 1.0", *metadata]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (folder / f"{name}-1.0.dist-info" / "METADATA").write_text("\n".join(lines))


def find_in(folder):
    def find(name):
        for found in importlib.metadata.distributions(name=name, path=[str(folder)]):
            return found
        raise importlib.metadata.PackageNotFoundError(name)

    return find


def test_what_is_installed_here_is_allowed():
    found = closure(PROJECT, EXTRAS, importlib.metadata.distribution)
    assert [problem for name, text in found.items() if (problem := judged(name, text).problem)] == []
    assert {"torch", "onnx", "onnxruntime", "numpy", "pydantic"} <= found.keys()


def test_a_gpl_three_steps_down_is_found(tmp_path):
    installed(tmp_path, "ours", "License-Expression: MIT", requires=["friend[fast]"])
    installed(
        tmp_path, "friend", "Classifier: License :: OSI Approved :: BSD License", requires=["turbo; extra == 'fast'"]
    )
    installed(tmp_path, "turbo", "License: GPL-3.0-or-later", requires=["absent; extra == 'never'"])
    found = closure("ours", ["cpu"], find_in(tmp_path))
    assert found == {"ours": "MIT", "friend": "BSD License", "turbo": "GPL-3.0-or-later"}
    problems = [problem for name, text in found.items() if (problem := judged(name, text).problem)]
    assert len(problems) == 1
    assert problems[0].startswith("turbo: its licence is 'GPL-3.0-or-later', which is not allowed; replace it")


@pytest.mark.parametrize(
    "text",
    ["GPL-2.0-only", "MIT AND AGPL-3.0-only", "GNU General Public License v3 (GPLv3)", "LGPL-3.0", "", "Proprietary"],
)
def test_what_is_not_allowed(text):
    assert not allowed(text)
    assert judged("nvidia-x" if "GPL" in text else "x", text).problem


@pytest.mark.parametrize("text", ["Apache-2.0 OR GPL-2.0-only", "(MIT OR Apache-2.0) AND BSD-3-Clause", "MIT License"])
def test_what_is_allowed(text):
    assert allowed(text)


def test_spellings_lead_to_what_is_allowed():
    assert set(SPELLINGS.values()) <= ALLOWED
    assert not any("gpl" in name for name in ALLOWED)


def audited(*vulnerabilities, skipped=0):
    """A document of pip-audit: one version with these, and some that were not answered."""
    bugs = [{"id": name, "aliases": [f"CVE-{name}"], "fix_versions": ["2.0"]} for name in vulnerabilities]
    rest = [{"name": f"quiet{i}", "skip_reason": "not found"} for i in range(skipped)]
    return {"dependencies": [{"name": "lib", "version": "1.0", "vulns": bugs}, *rest]}


@pytest.mark.parametrize(
    ("document", "reasons", "code", "words"),
    [
        (audited(), {}, 0, "1 of 1 versions audited, 0 known vulnerabilities, 0 unexplained"),
        (audited("PYSEC-1"), {}, 1, "lib 1.0: PYSEC-1, fixed in 2.0"),
        (audited("PYSEC-1"), {"CVE-PYSEC-1": "not reachable"}, 0, "1 known vulnerabilities, 0 unexplained"),
        (audited("PYSEC-1", "PYSEC-2"), {"PYSEC-1": "not reachable"}, 1, "PYSEC-2"),
        (
            audited(skipped=4),
            {},
            2,
            "NOT AUDITED: the vulnerability service did not answer for 4 (quiet0, quiet1, quiet2",
        ),
        (audited(), {"PYSEC-9": "old"}, 0, "PYSEC-9 affects no version of constraints.txt; remove it"),
        ({"dependencies": []}, {}, 2, "0 of 0"),
    ],
)
def test_the_verdict_of_an_audit(document, reasons, code, words):
    got, said = verdict(document, reasons)
    assert got == code
    assert words in said


def test_explanations_have_reasons():
    assert explained("# comment\nPYSEC-1 only for servers\n\nPYSEC-2\n") == {
        "PYSEC-1": "only for servers",
        "PYSEC-2": "",
    }
    from tests.release.audit import EXPLAINED

    assert all(explained(EXPLAINED.read_text(encoding="utf-8")).values())
