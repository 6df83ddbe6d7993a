"""Files and folders appear complete or not at all; leftovers are removed only if no running process locks them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from rsi_deploy.core.errors import GateError, UsageError
from rsi_deploy.io import atomic, locks
from rsi_deploy.io.atomic import atomic_file, claim_output, exchange, write_text
from rsi_deploy.io.bundle import atomic_folder, finished_results_folder
from rsi_deploy.io.locks import ScratchFolder, deferred_signals, remove_if_stale
from rsi_deploy.io.manifest import write_manifest


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


HOLDER = """
import sys, time
from pathlib import Path
from rsi_deploy.io.bundle import atomic_folder
with atomic_folder(Path(sys.argv[1]), force=True) as work:
    (work / "x").write_text("half")
    print("holding", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that is writing the folder `b`, killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "b"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.communicate()


# -- two at a time


def test_the_second_run_is_refused_before_it_begins(tmp_path, holder):
    words = f"another run \\(process {holder.pid}\\) is writing {tmp_path / 'b'} now"
    with pytest.raises(UsageError, match=words), atomic_folder(tmp_path / "b"):
        pytest.fail("both are at work")
    assert (tmp_path / ".b.partial" / "new" / "x").read_text() == "half"  # the first one's work is whole


def test_what_a_killed_run_has_left_is_removed_by_the_next(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".b.partial" / "new" / "x").exists()
    with atomic_folder(tmp_path / "b") as work:
        assert not (work / "x").exists()
        (work / "y").write_text("whole")
    assert names(tmp_path) == ["b", "b/y"]


def test_one_claim_at_a_time_in_one_process_too(tmp_path):
    with claim_output(tmp_path / "b"), pytest.raises(UsageError, match="is writing"), claim_output(tmp_path / "b"):
        pytest.fail("both are at work")
    with claim_output(tmp_path / "b"), claim_output(tmp_path / "c"):
        pass
    assert names(tmp_path) == []


def _race(path, number, queue):
    won, other = 0, []
    while won < 15:
        try:
            with atomic_folder(path, force=True) as work:
                (work / "who").write_text(str(number))
                other += [names(work)] if names(work) != ["who"] else []
                write_manifest(work)  # only folders of rsi-deploy are replaced
            won += 1
        except UsageError as error:
            other += [] if "is writing" in str(error) else [str(error)]
    queue.put((won, other))


def test_processes_that_race_never_share_a_folder(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    racers = [context.Process(target=_race, args=(tmp_path / "b", n, queue)) for n in range(3)]
    for racer in racers:
        racer.start()
    won = [queue.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0, 0]
    assert [count for count, _ in won] == [15, 15, 15]
    assert [other for _, other in won] == [[], [], []]
    assert names(tmp_path) == ["b", "b/manifest.json", "b/who"]


@pytest.mark.parametrize("there", [False, True])
def test_without_locks_a_folder_that_is_there_is_not_taken(tmp_path, monkeypatch, there):
    monkeypatch.setattr(locks, "fcntl", None)
    if there:
        (tmp_path / ".b.partial" / "new").mkdir(parents=True)
        with (
            pytest.raises(UsageError, match=r"has no locks .* remove it if no other run"),
            claim_output(tmp_path / "b"),
        ):
            pytest.fail("it is taken")
        assert (tmp_path / ".b.partial" / "new").exists()
    else:
        with atomic_folder(tmp_path / "b") as work:
            (work / "x").write_text("1")
        assert names(tmp_path) == ["b", "b/x"]


# -- replaced in one step


def _look(path, stop, queue):
    seen = set()
    while not stop.is_set():
        try:
            seen.add((path / "x").read_text())
        except FileNotFoundError:
            seen.add("nothing")
    queue.put(seen)


def _looked_at(tmp_path):
    """What another process sees under the name while it is replaced again and again."""
    context = multiprocessing.get_context("fork")
    stop, queue = context.Event(), context.Queue()
    looker = context.Process(target=_look, args=(tmp_path / "b", stop, queue))
    with atomic_folder(tmp_path / "b") as work:
        (work / "x").write_text("whole")
        write_manifest(work)
    looker.start()
    for _ in range(300):
        with atomic_folder(tmp_path / "b", force=True) as work:
            (work / "x").write_text("whole")
            write_manifest(work)
    stop.set()
    seen = queue.get(timeout=60)
    looker.join()
    return seen


def test_at_no_moment_is_nothing_there(tmp_path):
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    if not exchange(tmp_path / "1", tmp_path / "2"):
        pytest.skip("this system cannot exchange two folders")
    assert _looked_at(tmp_path) == {"whole"}


def test_the_look_sees_where_two_renames_leave_a_gap(tmp_path, monkeypatch):
    """What the test above must reject."""
    real = os.rename

    def slow(a, b):
        real(a, b)
        time.sleep(0.001)

    monkeypatch.setattr(atomic, "exchange", lambda *paths: False)
    monkeypatch.setattr(os, "rename", slow)
    assert _looked_at(tmp_path) == {"whole", "nothing"}


def test_a_crash_between_two_renames_restores_the_old_folder(tmp_path):
    """As a run leaves it that was killed there, where folders cannot be exchanged."""
    (tmp_path / ".b.partial" / "old").mkdir(parents=True)
    (tmp_path / ".b.partial" / "old" / "x").write_text("old")
    (tmp_path / ".b.partial" / "new").mkdir()
    with pytest.raises(UsageError, match="is not empty"), atomic_folder(tmp_path / "b"):
        pytest.fail("the old one is lost")
    assert names(tmp_path) == ["b", "b/x"]


# -- finished work outlives a crash, and no request that cannot be done


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ZeroDivisionError])
def test_finished_results_survive_crashes_but_not_refusals(tmp_path, error):
    with pytest.raises(error) as caught, atomic_folder(tmp_path / "b") as work:
        finished_results_folder(work).mkdir()
        (finished_results_folder(work) / "site").write_text("1")
        raise error
    assert names(tmp_path / ".b.partial") == ["kept", "kept/site", "lock"]
    (note,) = caught.value.__notes__
    assert f"rm -r {tmp_path / '.b.partial'}" in note
    with atomic_folder(tmp_path / "b") as work:
        assert (finished_results_folder(work) / "site").read_text() == "1"
    assert names(tmp_path) == ["b"]


def test_finished_work_goes_with_a_request_that_cannot_be_done(tmp_path):
    with pytest.raises(GateError), atomic_folder(tmp_path / "b") as work:
        finished_results_folder(work).mkdir()
        raise GateError("no")
    assert names(tmp_path) == []


# -- signals wait where nothing could clean up after them


def test_a_signal_waits_until_the_block_has_ended():
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_signals():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("after it")
    assert done == ["after it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with deferred_signals():
        pass


@pytest.mark.parametrize("step", ["_locked", "_locked_file"])
def test_a_signal_while_the_lock_is_taken_leaves_nothing(tmp_path, monkeypatch, step):
    real = getattr(atomic, step)

    def struck(*args):
        result = real(*args)
        os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(atomic, step, struck)
    with pytest.raises(KeyboardInterrupt):
        if step == "_locked":
            with claim_output(tmp_path / "b"):
                pytest.fail("the signal is lost")
        else:
            write_text(tmp_path / "b", "lost")
    assert names(tmp_path) == []


# -- files


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_whole_or_as_it_was(tmp_path, error):
    write_text(tmp_path / "f.json", "old")
    with pytest.raises(error), atomic_file(tmp_path / "f.json") as work:
        work.write_text("hal")
        assert (tmp_path / "f.json").read_text() == "old"
        raise error
    assert names(tmp_path) == ["f.json"]
    assert (tmp_path / "f.json").read_text() == "old"
    write_text(tmp_path / "f.json", "new\n")
    assert (tmp_path / "f.json").read_bytes() == b"new\n"


def test_a_files_leftover_is_removed_and_a_living_one_is_not(tmp_path):
    with atomic_file(tmp_path / "f") as living:
        living.write_text("living")
        stale = tmp_path / ".f.partial-00000000"
        stale.write_text("stale")
        (tmp_path / ".fg.partial-00000000").write_text("of another file")
        write_text(tmp_path / "f", "second")
        assert not stale.exists()
        assert living.read_text() == "living"
    assert names(tmp_path) == [".fg.partial-00000000", "f"]
    assert (tmp_path / "f").read_text() == "living"


def test_a_link_is_replaced_and_what_it_points_to_is_not_touched(tmp_path):
    (tmp_path / "input").write_text("input")
    (tmp_path / "hard").hardlink_to(tmp_path / "input")
    (tmp_path / "soft").symlink_to(tmp_path / "input")
    for name in ("hard", "soft"):
        write_text(tmp_path / name, "output")
    assert (tmp_path / "input").read_text() == "input"
    assert [(tmp_path / name).read_text() for name in ("hard", "soft")] == ["output", "output"]


# -- scratch folders


def test_a_scratch_folder_of_a_killed_process_is_removed_by_the_next(tmp_path):
    code = "import os; from rsi_deploy.io.locks import ScratchFolder\nf = ScratchFolder(); print(f.name, flush=True)\n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def left(ending):
        done = subprocess.run([sys.executable, "-c", code + ending], env=environment, capture_output=True, text=True)
        return done.stdout.strip()

    killed = left("os.kill(os.getpid(), 9)")
    assert names(tmp_path) == [os.path.basename(killed)]
    ended = left("f.cleanup()")
    assert ended != killed
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["before it is opened", "before it is locked"])
def test_a_new_scratch_folder_that_another_run_takes_for_a_leftover_is_made_again(monkeypatch, moment):
    """Two runs start together: one looks for leftovers while the other has created its folder but not locked it yet."""
    taken, really = [], os.open

    def opened(path, *flags):
        late = moment == "before it is locked"
        handle = really(path, *flags) if late or taken else None
        if not taken:
            taken.append(path)
            os.rmdir(path)
        return handle if handle is not None else really(path, *flags)

    monkeypatch.setattr(locks.os, "open", opened)
    with ScratchFolder() as folder:
        monkeypatch.undo()
        assert taken
        assert taken != [folder]
        remove_if_stale(atomic.Path(folder))
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)


def test_a_scratch_folder_in_use_is_not_removed():
    with ScratchFolder() as folder:
        remove_if_stale(atomic.Path(folder))
        assert os.path.isdir(folder)
    assert not os.path.exists(folder)
