"""Commands in processes of their own, ended by a signal at a chosen moment: for `bench.kills` and the tests.

    with Runner() as runner:
        runner.run(["export", ...], folder)                        runs to its end and counts the events
        runner.run(["export", ...], folder, after=1.3)             killed after so many seconds
        runner.run(["export", ...], folder, at=17)                 killed before its 17th event

An event changes files: a file is opened for writing, renamed or removed, or a folder is made. The runner's process
imports everything once and forks for each command, so that a moment lies within the command's own work.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import rsi_deploy

EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod"}
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit code; negative for the signal that ended it.
        events: number of events; None for a killed command.
        seconds: wall-clock time.
        said: stdout and stderr.
    """

    code: int
    events: int | None
    seconds: float
    said: str


class Runner:
    """A process that forks for each command. Use it in a `with`."""

    def __enter__(self) -> Self:
        root = Path(rsi_deploy.__file__).parents[1]
        path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.killing"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        *,
        at: int | None = None,
        after: float | None = None,
        number: int = signal.SIGKILL,
        constants: Mapping[str, Any] | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> Ended:
        """Run a command of `rsi-deploy`.

        Args:
            argv: arguments of `rsi-deploy`.
            folder: working folder.
            at: number of the event, from 1, before which the command is ended.
            after: seconds after which the command is ended.
            number: number of the signal.
            constants: "module:NAME" -> value, for limits such as the size of a large model.
            limits: name in `resource` -> a soft limit, as "RLIMIT_FSIZE".
        """
        how = {"at": at, "after": after, "number": int(number), "constants": constants or {}, "limits": limits or {}}
        with tempfile.TemporaryDirectory() as place:
            self._begin(argv, folder, Path(place), how)
            return self._end(Path(place))

    @contextlib.contextmanager
    def stopped(self, argv: Sequence[str], folder: Path, *, at: int) -> Iterator[int]:
        """Stop a command before an event while the block runs, then let it end.

        Raises:
            RuntimeError: the command fails.
        """
        how = {"at": at, "after": None, "number": int(signal.SIGSTOP), "constants": {}, "limits": {}}
        with tempfile.TemporaryDirectory() as place:
            child = self._begin(argv, folder, Path(place), how)
            while not _is_stopped(child):
                time.sleep(0.01)
            try:
                yield child
            finally:
                os.kill(child, signal.SIGCONT)
                ended = self._end(Path(place))
            if ended.code:
                raise RuntimeError(ended.said)

    def _begin(self, argv: Sequence[str], folder: Path, place: Path, how: Mapping[str, Any]) -> int:
        """Start a command and return its process id."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {**how, "argv": list(argv), "folder": str(folder), "place": str(place)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def _end(self, place: Path) -> Ended:
        """Wait for a command."""
        assert self._process.stdout is not None
        code, seconds = json.loads(self._process.stdout.readline())
        count = place / "count"
        events = int(count.read_text()) if count.is_file() else None
        return Ended(code=code, events=events, seconds=seconds, said=(place / "said").read_text())


def _is_stopped(child: int) -> bool:
    """Return whether a process is stopped."""
    return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def _serve() -> None:
    """Serve as the runner's process: fork for each line of stdin and answer with one line."""
    _import_all()
    for line in sys.stdin:
        job = json.loads(line)
        started = time.monotonic()
        child = os.fork()
        if not child:
            _child(job)
        print(child, flush=True)
        status = _watched(child, job["after"], job["number"])
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps([code, time.monotonic() - started]), flush=True)


def _watched(child: int, after: float | None, number: int) -> int:
    """Wait for the child, and end it after `after` seconds."""
    if after is None:
        return os.waitpid(child, 0)[1]
    end = time.monotonic() + after
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return os.waitpid(child, 0)[1]


def _child(job: dict[str, Any]) -> None:
    """Run one command in the forked process, and end it."""
    import importlib
    import resource

    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a shell, and nohup, have them ignored
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        said = os.open(f"{job['place']}/said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["folder"])
        for name, value in job["constants"].items():
            module, _, constant = name.partition(":")
            setattr(importlib.import_module(module), constant, value)
        for name, limit in job["limits"].items():
            which = getattr(resource, name)
            resource.setrlimit(which, (limit, resource.getrlimit(which)[1]))
        events = _counted(job["at"], job["number"])
        from rsi_deploy.cli import run

        code = run(job["argv"])
        Path(job["place"], "count").write_text(str(events[0]))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _counted(at: int | None, number: int) -> list[int]:
    """Count events in a list of one, and end this process before event `at`."""
    events = [0]

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(args[2], int) and args[2] & WRITING):
            events[0] += 1
            if events[0] == at:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    return events


def _import_all() -> None:
    """Import what commands import, without computing: a fork would lose threads."""
    import onnxruntime  # noqa: F401
    import onnxscript  # noqa: F401
    import torch

    import rsi_deploy.sweeping.api  # noqa: F401

    torch.set_num_threads(1)


if __name__ == "__main__":
    _serve()
