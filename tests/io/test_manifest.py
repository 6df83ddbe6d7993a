import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from nets import mlp_onnx

from rsi_deploy import export, verify
from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.io.manifest import check_manifest, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A folder with a subfolder, an empty file and a manifest."""
    (tmp_path / "f" / "deep" / "er").mkdir(parents=True)
    (tmp_path / "f" / "a").write_bytes(b"first")
    (tmp_path / "f" / "deep" / "er" / "b").write_bytes(b"second")
    (tmp_path / "f" / ".hidden").write_bytes(b"")
    write_manifest(tmp_path / "f")
    return tmp_path / "f"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exported")
    export(str(mlp_onnx(root / "m.onnx")), root / "b", rank=4, measure=False)
    return root / "b"


@pytest.fixture
def bundle(tmp_path, exported):
    return shutil.copytree(exported, tmp_path / "b")


# -- the document


def test_it_lists_every_file_with_size_and_hash(folder):
    document = json.loads((folder / "manifest.json").read_text())
    assert document == {
        "schema_version": 1,
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in ((".hidden", b""), ("a", b"first"), ("deep/er/b", b"second"))
        },
    }
    assert read_manifest(folder).model_dump() == document


def test_the_same_files_give_the_same_bytes(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    write_manifest(again)
    assert (again / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()


def test_a_link_is_refused(folder):
    (folder / "link").symlink_to(folder / "a")
    with pytest.raises(UsageError, match="cannot list links"):
        write_manifest(folder)


def test_it_may_be_read_without_torch_or_a_runtime(folder):
    code = (
        "import sys; from rsi_deploy.io.manifest import check_manifest; "
        f"assert check_manifest({str(folder)!r}).ok; print({{'torch', 'onnx', 'onnxruntime'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- what it notices


def test_an_untouched_folder_holds(folder):
    check = check_manifest(folder)
    assert (check.present, check.ok, check.summary) == (True, True, "size and sha256 of 3 files as listed")


def test_what_python_leaves_is_passed_over(folder):
    (folder / "deep" / "__pycache__").mkdir()
    (folder / "deep" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"x")
    assert check_manifest(folder).ok
    (folder / "deep" / "__pycache__" / "more").write_bytes(b"x")
    assert check_manifest(folder).summary == "not in the manifest: deep/__pycache__/more"


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "summary"),
    [
        (lambda f: flip(f / "a"), "changed: a"),
        (lambda f: (f / "deep" / "er" / "b").write_bytes(b"secon"), "changed: deep/er/b"),
        (lambda f: (f / ".hidden").write_bytes(b"x"), "changed: .hidden"),
        (lambda f: (f / "a").unlink(), "missing: a"),
        (lambda f: ((f / "a").unlink(), (f / "a").mkdir()), "missing: a"),
        (lambda f: shutil.rmtree(f / "deep"), "missing: deep/er/b"),
        (lambda f: (f / "deep" / "c").write_bytes(b""), "not in the manifest: deep/c"),
        (lambda f: (f / "linked").symlink_to(f / "deep"), "not in the manifest: linked"),
        (lambda f: (f / "a").rename(f / "z"), "missing: a; not in the manifest: z"),
        (lambda f: (flip(f / "a"), (f / ".hidden").unlink()), "changed: a; missing: .hidden"),
    ],
    ids=["bit", "cut", "grown", "gone", "folder", "tree", "more", "link", "renamed", "two"],
)
def test_a_change_is_named(folder, change, summary):
    change(folder)
    check = check_manifest(folder)
    assert (check.ok, check.summary) == (False, summary)


def test_a_folder_without_one_says_so(folder):
    (folder / "manifest.json").unlink()
    check = check_manifest(folder)
    assert not check.present
    assert "written before bundles had one; export" in check.summary


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"schema_version": 2, "files": {}}',
        b'{"schema_version": 1, "files": {"a": {"bytes": 1, "sha256": "00"}}}',
        b'{"schema_version": 1, "files": {"../a": {"bytes": 1, "sha256": "' + b"0" * 64 + b'"}}}',
        b'{"schema_version": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": "' + b"0" * 64 + b'"}}}',
    ],
)
def test_a_damaged_manifest_is_a_failed_gate(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(GateError, match=r"manifest\.json is not a manifest of schema version 1"):
        check_manifest(folder)


# -- in a bundle


def test_every_file_of_a_bundle_is_in_it(bundle):
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert read_manifest(bundle).files.keys() == there - {"manifest.json"}
    assert {"model.onnx", "report.json", "report.html", "plan.json", "README.md"} <= there
    assert run(["verify", str(bundle)]) == 0


@pytest.mark.parametrize("name", ["model.onnx", "report.json", "report.html", "plan.json", "README.md"])
def test_verify_notices_any_file_that_changed(bundle, name, capsys):
    path = bundle / name
    path.write_bytes(path.read_bytes() + b"\n")
    assert run(["verify", str(bundle)]) == 4
    out, err = capsys.readouterr()
    assert f"changed: {name}" in out
    assert "manifest" in err


def test_verify_notices_what_is_missing_or_added(bundle, capsys):
    (bundle / "plan.json").unlink()
    (bundle / "notes.txt").write_text("mine")
    assert run(["verify", str(bundle)]) == 4
    assert "missing: plan.json; not in the manifest: notes.txt" in " ".join(capsys.readouterr().out.split())
    (bundle / "report.json").unlink()  # then the manifest is all there is
    (claim,) = verify(bundle).claims
    assert (claim.name, claim.status) == ("manifest", "broken")
    assert "report.json" in claim.detail


def test_an_older_bundle_is_verified_without(bundle):
    (bundle / "manifest.json").unlink()
    claims = {claim.name: claim for claim in verify(bundle).claims}
    assert claims["manifest"].status == "not checked"
    assert "written before bundles had one" in claims["manifest"].detail
    assert run(["verify", str(bundle)]) == 0


def test_a_damaged_manifest_ends_verify_with_4(bundle, capsys):
    (bundle / "manifest.json").write_text("{")
    assert run(["verify", str(bundle)]) == 4
    assert "not a manifest" in " ".join(capsys.readouterr().out.split())
