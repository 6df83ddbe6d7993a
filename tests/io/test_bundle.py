import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from nets import SIZES, initializers, mlp_onnx, run_onnx

from graph_passes import count_parameters
from rsi_deploy import export
from rsi_deploy.cli import run
from rsi_deploy.core.errors import UsageError
from rsi_deploy.io import atomic, onnx_file
from rsi_deploy.io.bundle import atomic_folder, check_target
from rsi_deploy.io.manifest import write_manifest
from rsi_deploy.io.onnx_file import file_bytes, weight_bytes, write_onnx
from rsi_deploy.onnx_models import site_factorizer


def tree(folder):
    """Every path under the folder, hidden ones too, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def old_bundle(folder):
    """A folder that rsi-deploy wrote, with one file beside the manifest; its tree."""
    folder.mkdir(parents=True)
    (folder / "old").write_text("old")
    write_manifest(folder)
    return tree(folder.parent)


@pytest.fixture
def model(tmp_path):
    (tmp_path / "in").mkdir()
    return mlp_onnx(tmp_path / "in" / "m.onnx")


@pytest.fixture
def place(tmp_path):
    """A folder where only bundles are."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


# -- atomic_folder: all or nothing


def test_a_folder_appears_whole(place):
    with atomic_folder(place / "a" / "b") as work:
        assert not (place / "a" / "b").exists()
        assert work.parent.parent == place / "a"  # the same file system: the last step is a rename
        (work / "x").write_text("1")
    assert tree(place) == {"a": None, "a/b": None, "a/b/x": b"1"}
    assert (place / "a" / "b").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_error_leaves_nothing(place, error):
    with pytest.raises(error), atomic_folder(place / "b") as work:
        (work / "x").write_text("1")
        raise error
    assert tree(place) == {}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_keeps_what_was_there(place, error):
    before = old_bundle(place / "b")
    with pytest.raises(error), atomic_folder(place / "b", force=True) as work:
        (work / "x").write_text("1")
        raise error
    assert tree(place) == before


def test_force_replaces_the_whole_folder(place):
    old_bundle(place / "b")
    (place / "b" / "deep").mkdir()
    (place / "b" / "deep" / "old").write_text("old")
    with atomic_folder(place / "b", force=True) as work:
        (work / "x").write_text("1")
        assert (place / "b" / "deep" / "old").exists()
    assert tree(place) == {"b": None, "b/x": b"1"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_brings_the_old_folder_back(place, monkeypatch, failing):
    before = old_bundle(place / "b")
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) == failing:
            raise OSError(errno.EIO, "broken disk")
        real(a, b)

    monkeypatch.setattr(atomic, "exchange", lambda *paths: False)  # a system without
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="broken disk"), atomic_folder(place / "b", force=True) as work:
        (work / "x").write_text("1")
    assert tree(place) == before


def test_the_old_folder_is_never_deleted_where_it_cannot_come_back(place, monkeypatch):
    before = old_bundle(place / "b")
    real, calls = os.rename, []

    def rename(a, b):
        calls.append(a)
        if len(calls) > 1:
            raise OSError(errno.EIO, "broken disk")
        real(a, b)

    monkeypatch.setattr(atomic, "exchange", lambda *paths: False)
    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(OSError, match="broken disk"), atomic_folder(place / "b", force=True):
        pass
    assert b"old" in tree(place).values()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="later"), atomic_folder(place / "b", force=True):
        raise ValueError("later")
    assert tree(place) == before  # the next run has brought it back


def test_an_empty_folder_is_taken_and_a_link_is_followed(place):
    (place / "b").mkdir()
    (place / "link").symlink_to(place / "b")
    with atomic_folder(place / "link") as work:
        (work / "x").write_text("1")
    assert (place / "link").is_symlink()
    assert (place / "b" / "x").read_text() == "1"


def test_a_folder_that_filled_up_meanwhile_is_not_replaced(place):
    with pytest.raises(UsageError, match="not empty"), atomic_folder(place / "b") as work:
        (work / "x").write_text("1")
        (place / "b").mkdir()
        (place / "b" / "other").write_text("theirs")
    assert tree(place) == {"b": None, "b/other": b"theirs"}


# -- refusals before any work


def test_targets_that_are_refused(place):
    (place / "file").write_text("")
    old_bundle(place / "full")
    for target, words in (
        (place / "file", "is a file; -o takes a folder"),
        (place / "full", "is not empty; choose another folder, or add --force"),
        (place / "file" / "b", "cannot write into"),
    ):
        with pytest.raises(UsageError, match=words):
            check_target(target, force=False)
    with pytest.raises(UsageError, match="is a mount point"):
        check_target(Path("/"), force=True)
    check_target(place / "full", force=True)
    with pytest.raises(UsageError, match="is a file"):
        check_target(place / "file", force=True)


def test_folders_of_others_are_never_replaced(place):
    web_page = {"name": "a web page", "icons": []}
    contents = {
        "one": {"notes.txt": "mine"},
        "two": {"manifest.json": json.dumps(web_page)},
        "three": {"sweep.json": "{}", "notes.txt": "mine"},
        "four": {"work/thesis.tex": "mine"},
    }
    for folder, files in contents.items():
        for name, content in files.items():
            (place / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (place / folder / name).write_text(content)
        before = tree(place)
        for force in (False, True):
            with (
                pytest.raises(UsageError, match="another folder for -o, or delete"),
                atomic_folder(place / folder, force=force),
            ):
                pytest.fail("the files would be gone")
        assert tree(place) == before


def test_sweeps_are_replaced_even_if_interrupted_early(place):
    for moment in range(3):
        folder = place / str(moment)
        (folder / "work").mkdir(parents=True)
        if moment > 0:
            (folder / "work" / "key.txt").write_text("key")
            (folder / "point-01").mkdir()
        if moment > 1:
            (folder / "sweep.json").write_text('{\n "schema_version": 1,\n "tool": "rsi-deploy 0.1.0"}')
        check_target(folder, force=True)
        with pytest.raises(UsageError, match="add --force"):
            check_target(folder, force=False)


def test_a_target_whose_replacing_would_take_an_input_is_refused(place):
    (place / "full" / "deep").mkdir(parents=True)
    (place / "full" / "deep" / "m.onnx").write_text("model")
    (place / "link.onnx").symlink_to(place / "full" / "deep" / "m.onnx")
    (place / "same").symlink_to(place / "full")
    for target in (place / "full", place / "same", place / "full" / "deep"):
        for given in (place / "full" / "deep" / "m.onnx", place / "link.onnx", str(place / "link.onnx")):
            with pytest.raises(UsageError, match="--force would remove it"):
                check_target(target, force=True, inputs=(given,))
    with pytest.raises(UsageError, match="--force would remove it"):  # a part of a data set
        check_target(place / "full" / "deep", force=True, inputs=(f"{place / 'full'}#split=test",))
    elsewhere = ("torchvision:vgg19", None, 3, "", place / "nowhere", place / "link.onnx")
    check_target(place / "new", force=True, inputs=elsewhere)
    old_bundle(place / "other")
    check_target(place / "other", force=True, inputs=elsewhere)


def test_an_export_over_its_own_input_is_refused(model, capsys):
    before = tree(model.parent)
    assert run(["export", str(model), "--rank", "4", "-o", str(model.parent), "--no-bench", "--force"]) == 2
    assert "is an input: --force would remove it" in capsys.readouterr().err
    assert tree(model.parent) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_parent_that_cannot_be_written_is_refused(place):
    place.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="cannot write into"):
            check_target(place / "a" / "b", force=False)
    finally:
        place.chmod(0o755)


def test_export_refuses_a_full_folder_before_it_loads_the_model(place, monkeypatch):
    (place / "b").mkdir()
    (place / "b" / "mine").write_text("mine")
    monkeypatch.setattr("rsi_deploy.exporting.inputs.load_source", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="is not empty"):
        export("m.onnx", place / "b", rank=4)
    assert tree(place) == {"b": None, "b/mine": b"mine"}


# -- export, ended early in every way


@pytest.fixture(params=[False, True], ids=["new", "over_an_old_bundle"])
def target(request, place, model):
    """Where the next export goes: nothing there, or a bundle."""
    if request.param:
        export(str(model), place / "b", rank=2, measure=False)
    return place / "b"


def arguments(model, target):
    return ["export", str(model), "--rank", "4", "-o", str(target), "--no-bench", "--force"]


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "no space left on the disk"), (errno.EDQUOT, "the disk quota is used up")]
)
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_full_disk(model, place, target, monkeypatch, capsys, code, words, failing):
    before = tree(place)
    real, calls = ir.save, []

    def save(*args, **kwargs):
        calls.append(args)
        if len(calls) == failing:
            raise OSError(code, os.strerror(code), str(args[1]))
        return real(*args, **kwargs)

    monkeypatch.setattr(ir, "save", save)
    assert run(arguments(model, target)) == 3
    assert tree(place) == before
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert "MB are free there" in err


def test_no_permission(model, place, target, monkeypatch, capsys):
    before = tree(place)
    monkeypatch.setattr(ir, "save", lambda *a, **k: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no", "x")))
    assert run(arguments(model, target)) == 3
    assert tree(place) == before
    assert "no permission" in capsys.readouterr().err


def test_an_interrupt_in_the_middle(model, place, target, monkeypatch, capsys):
    before = tree(place)
    real, calls = site_factorizer.factorize_site, []

    def factorize_site(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            assert [p for p in place.iterdir() if p.name == ".b.partial"]
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(site_factorizer, "factorize_site", factorize_site)
    assert run(arguments(model, target)) == 130
    assert tree(place) == before
    out, err = capsys.readouterr()
    assert (out, err.strip()) == ("", "rsi-deploy: interrupted; nothing partial was left under the final name")


def test_a_gate_that_fails(model, place, target, capsys):
    before = tree(place)
    assert run([*arguments(model, target), "--max-output-error", "1e-6"]) == 4
    assert tree(place) == before
    assert "--max-output-error" in capsys.readouterr().err


def test_success_replaces_the_old_bundle_whole(model, place, target):
    if target.exists():
        (target / "left over").write_text("from another time")
    assert run(arguments(model, target)) == 0
    names = ["README.md", "manifest.json", "model.onnx", "plan.json", "recipe.toml", "report.html", "report.json"]
    assert list(tree(place)) == ["b", *(f"b/{name}" for name in names)]
    assert initializers(target / "model.onnx")["fc1.right"].shape == (SIZES[0], 4)


# -- how weights are stored


def test_a_small_model_is_a_single_file(model, tmp_path):
    export(str(model), tmp_path / "b", rank=4, measure=False)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "b" / "model.onnx", tmp_path / "elsewhere" / "renamed.onnx")
    shutil.rmtree(tmp_path / "b")
    model.unlink()
    (y,) = run_onnx(tmp_path / "elsewhere" / "renamed.onnx", np.zeros((3, SIZES[0]), np.float32))
    assert y.shape == (3, SIZES[-1])


def test_above_the_limit_weights_are_in_a_file_beside_the_model(model, tmp_path, monkeypatch):
    inline = export(str(model), tmp_path / "inline", rank=4, measure=False)
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", 1000)
    report = export(str(model), tmp_path / "b", rank=4, measure=False)
    assert set(report.files) == {"model.onnx", "model.onnx.data"}
    assert report.compressed.bytes == sum((tmp_path / "b" / n).stat().st_size for n in report.files)
    assert report.compressed.params == inline.compressed.params
    x = np.ones((3, SIZES[0]), np.float32)
    shutil.move(tmp_path / "b", tmp_path / "moved")  # the path inside is relative
    np.testing.assert_array_equal(
        run_onnx(tmp_path / "moved" / "model.onnx", x)[0], run_onnx(tmp_path / "inline" / "model.onnx", x)[0]
    )


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_save_model_leans_on_no_other_file(model, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(onnx_file, "INLINE_LIMIT", limit)
    first, second = tmp_path / "one" / "a.onnx", tmp_path / "two" / "b.onnx"
    first.parent.mkdir()
    second.parent.mkdir()
    ir.save(ir.load(model), first, external_data="weights.bin")
    write_onnx(ir.load(first), second)
    shutil.rmtree(first.parent)
    x = np.ones((2, SIZES[0]), np.float32)
    np.testing.assert_array_equal(run_onnx(second, x)[0], run_onnx(model, x)[0])
    assert (second.parent / "b.onnx.data").exists() == (limit == 0)


def test_counts(model):
    loaded, arrays = ir.load(model), initializers(model)
    assert count_parameters(loaded) == sum(a.size for a in arrays.values())
    assert weight_bytes(loaded) == sum(a.nbytes for a in arrays.values())
    assert file_bytes(model) == model.stat().st_size
