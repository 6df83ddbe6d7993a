"""Real runs, really killed: never a partial bundle under the final name, never a damaged input, and the next run mends.

The moments are drawn by a seed from all those at which a run changes files; `bench.kills` does the same at random
times, fifty of each.
"""

import hashlib
import random
import signal
import subprocess

import numpy as np
import pytest
from nets import SIZES, labelled, mlp_onnx

from bench.killing import Runner
from rsi_deploy.io.manifest import check_manifest
from rsi_deploy.report.sweep_schema import read_sweep

EXPORT = ["export", "in/m.onnx", "--rank", "25%", "--data", "in/d.npz", "-o", "out/b", "--no-bench", "--force"]
SWEEP = ["sweep", "in/m.onnx", "--calib", "in/c.npz", "-o", "out/s", "--no-bench", "--allow-larger", "--points", "2"]
BUNDLE = ["README.md", "manifest.json", "model.onnx", "plan.json", "recipe.toml", "report.html", "report.json"]
KILLS = 5


@pytest.fixture(scope="module")
def runner():
    with Runner() as runner:
        yield runner


@pytest.fixture
def place(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    labelled(tmp_path / "in" / "d.npz", mlp_onnx(tmp_path / "in" / "m.onnx"))
    x = np.random.default_rng(3).standard_normal((64, SIZES[0])).astype(np.float32)
    np.savez(tmp_path / "in" / "c.npz", x=x)
    return tmp_path


def hashes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_whole(bundle):
    """Nothing is there, or all of a bundle and nothing else."""
    if bundle.exists():
        checked = check_manifest(bundle)
        assert checked.present
        assert checked.ok, checked.summary
        assert sorted(path.name for path in bundle.iterdir()) == BUNDLE


def test_an_export_killed_at_any_moment(place, runner):
    inputs = hashes(place / "in")
    whole = runner.run(EXPORT, place)
    assert whole.code == 0, whole.said
    model = (place / "out" / "b" / "model.onnx").read_bytes()
    last = [whole.events - n for n in range(3)]  # where the names change hands
    moments = [*random.Random(9).sample(range(1, whole.events - 3), KILLS), *last]
    left = 0
    for at in moments:
        killed = runner.run(EXPORT, place, at=at)
        assert killed.code == -signal.SIGKILL, (at, killed.said)
        assert_whole(place / "out" / "b")
        assert (place / "out" / "b").exists()  # the old one, or the new one: --force leaves no gap
        left += (place / "out" / ".b.partial").exists()
        assert hashes(place / "in") == inputs
    assert left >= KILLS
    again = runner.run(EXPORT, place)
    assert again.code == 0, again.said
    assert [path.name for path in (place / "out").iterdir()] == ["b"]
    assert (place / "out" / "b" / "model.onnx").read_bytes() == model
    assert hashes(place / "in") == inputs


def test_a_first_export_killed_leaves_nothing_under_the_name(place, runner):
    whole = runner.run(EXPORT, place)
    subprocess.run(["rm", "-r", place / "out" / "b"], check=True)
    for at in random.Random(1).sample(range(1, whole.events - 8), 2):
        assert runner.run(EXPORT, place, at=at).code == -signal.SIGKILL
        assert not (place / "out" / "b").exists()
    assert runner.run(EXPORT, place).code == 0
    assert [path.name for path in (place / "out").iterdir()] == ["b"]


def test_a_sweep_killed_at_any_moment_goes_on(place, runner):
    inputs = hashes(place / "in")
    whole = runner.run(SWEEP, place)
    assert whole.code == 0, whole.said
    models = {n: (place / "out" / "s" / f"point-{n:02d}" / "model.onnx").read_bytes() for n in (1, 2)}
    for at in random.Random(9).sample(range(1, whole.events + 1), 3):
        subprocess.run(["rm", "-rf", place / "out"], check=True)
        (place / "out").mkdir()
        killed = runner.run(SWEEP, place, at=at)
        assert killed.code == -signal.SIGKILL, (at, killed.said)
        for folder in (place / "out").glob("s/point-*"):
            assert_whole(folder)
        if (place / "out" / "s" / "sweep.json").exists():
            for point in read_sweep(place / "out" / "s").points:
                assert (place / "out" / "s" / point.folder).is_dir()
        again = runner.run(SWEEP, place)
        assert again.code == 0, (at, again.said)
        there = sorted(path.name for path in (place / "out").rglob("*") if path.parent.name in ("out", "s"))
        assert there == ["point-01", "point-02", "recipe.toml", "report.html", "s", "sweep.json"], at
        for number, model in models.items():
            assert (place / "out" / "s" / f"point-{number:02d}" / "model.onnx").read_bytes() == model, at
        assert hashes(place / "in") == inputs


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "rsi-deploy: interrupted; nothing partial was left under the final name"),
        (signal.SIGTERM, 143, "rsi-deploy: ended by SIGTERM; nothing partial was left under the final name"),
        (signal.SIGHUP, 129, "rsi-deploy: ended by SIGHUP; nothing partial was left under the final name"),
    ],
)
def test_signals_leave_nothing_at_all(place, runner, number, code, words):
    whole = runner.run(EXPORT, place)
    subprocess.run(["rm", "-r", place / "out" / "b"], check=True)
    for at in random.Random(int(number)).sample(range(1, whole.events - 8), 2):
        ended = runner.run(EXPORT, place, at=at, number=number)
        assert (ended.code, ended.said.strip()) == (code, words), at
        assert list((place / "out").iterdir()) == []


def test_two_exports_to_one_folder(place, runner):
    """The first is at work (stopped there); the second says so and touches nothing."""
    whole = runner.run(EXPORT, place)
    with runner.stopped(EXPORT, place, at=whole.events // 2) as first, Runner() as other:
        second = other.run(EXPORT, place)
        assert second.code == 2
        assert f"another run (process {first}) is writing {place / 'out' / 'b'} now: wait for it" in second.said
        assert (place / "out" / ".b.partial").exists()
    assert_whole(place / "out" / "b")
    assert [path.name for path in (place / "out").iterdir()] == ["b"]


# -- no room, no right


@pytest.fixture
def mounted(place):
    """Mounts things on `out` for a test; skips where that is not allowed."""
    done = []

    def mount(*options):
        if subprocess.run(["mount", *options, place / "out"], capture_output=True).returncode:
            pytest.skip("this user may not mount")
        done.append(place / "out")

    yield mount
    for folder in done:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk(place, runner, mounted):
    mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs")
    for argv in (EXPORT, SWEEP):
        ended = runner.run(argv, place)
        assert ended.code == 3, ended.said
        assert "no space left on the disk" in ended.said
        assert "MB are free there: free some space, or choose another disk" in ended.said
        assert "Traceback" not in ended.said
        assert not [path for path in (place / "out").iterdir() if path.name != "s"]
        assert not list((place / "out").rglob("point-*"))


def test_a_disk_that_will_not_do_is_refused_before_the_long_work(place, runner, mounted):
    """The dense model fits; what will certainly be written beside it does not."""
    mounted("-t", "tmpfs", "-o", "size=512k", "tmpfs")
    mlp_onnx(place / "in" / "wide.onnx", sizes=(64, 256, 256, 10))  # 0.34 MB
    argv = ["in/wide.onnx" if a == "in/m.onnx" else a for a in EXPORT if a not in ("--data", "in/d.npz")]
    early = runner.run(
        argv, place, constants={"rsi_deploy.onnx_models.site_factorizer:factorize_site": None}
    )  # never called
    assert early.code == 3, early.said
    assert "no space left on the disk" in early.said
    assert "an export of this model writes up to 1.7 MB there" in early.said
    assert list((place / "out").iterdir()) == []


def test_a_disk_that_filled_up_while_an_old_bundle_stood_there(place, runner, mounted):
    mounted("-t", "tmpfs", "-o", "size=300k", "tmpfs")
    assert runner.run(EXPORT, place).code == 0
    before = hashes(place / "out")
    with pytest.raises(OSError, match="No space left"), open(place / "out" / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    ended = runner.run(EXPORT, place)
    assert (ended.code, "no space left" in ended.said) == (3, True), ended.said
    (place / "out" / "filler").unlink()
    assert hashes(place / "out") == before
    assert runner.run(EXPORT, place).code == 0


def test_a_limit_on_files(place, runner):
    ended = runner.run(EXPORT, place, limits={"RLIMIT_FSIZE": 20_000})
    assert ended.code == 3, ended.said
    assert "largest size that this process may write (ulimit -f)" in ended.said
    assert list((place / "out").iterdir()) == []


def test_a_read_only_disk(place, runner, mounted):
    mounted("-t", "tmpfs", "-o", "ro,size=1m", "tmpfs")
    ended = runner.run(EXPORT, place)
    assert ended.code == 2, ended.said
    assert f"cannot write into {place / 'out'}; choose another folder for -o" in ended.said


def test_a_mount_point_is_refused_before_the_work(place, runner, mounted):
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs")
    ended = runner.run(["out" if a == "out/b" else a for a in EXPORT], place)
    assert ended.code == 2, ended.said
    assert "is a mount point, which cannot be replaced" in ended.said


def test_no_room_for_temporary_files(place, runner, mounted):
    mounted("-t", "tmpfs", "-o", "size=4k", "tmpfs")
    argv = ["b" if a == "out/b" else a for a in EXPORT]
    ended = runner.run(argv, place, constants={"tempfile:tempdir": str(place / "out")})
    assert ended.code == 3, ended.said
    assert "no space left on the disk" in ended.said
    assert not (place / "b").exists()
    assert "Traceback" not in ended.said
