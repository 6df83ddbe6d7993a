"""Servers in processes of their own: there once they answer, gone at the end of the block."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request

from rsi_deploy.serving.ports import quiet_port

SERVED_WITHIN = 120  # s: Triton's Python backend starts an interpreter for every instance


def free_port():
    """Of those that nobody gets who asks for any: Ray does so, many times, before it listens where it was told to."""
    return quiet_port("127.0.0.1", 0, "--http-port")


@contextlib.contextmanager
def running(command, url, log, *, within=SERVED_WITHIN, **options):
    """A server in a process group of its own: there once `url` answers, gone at the end."""
    with log.open("wb") as out:
        options |= {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        server = subprocess.Popen(command, preexec_fn=_hear_interrupts, **options)
        try:
            _wait(server, url, log, within)
            yield
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _hear_interrupts():
    """In the background of a shell SIGINT is ignored, and so it would be by what is started there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _wait(server, url, log, within):
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        with contextlib.suppress(OSError, urllib.error.URLError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"not ready within {within} s: {log.read_text(errors='replace')[-4000:]}")
