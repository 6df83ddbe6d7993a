"""Servers in their own processes, which end with the block."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request

from rsi_deploy.serving.ports import uncontended_port

SERVED_WITHIN = 120  # s: Triton's Python backend starts an interpreter for every instance


def free_port():
    """Return a port that Ray does not take for itself before it listens on the ports of its options."""
    return uncontended_port("127.0.0.1", 0, "--http-port")


@contextlib.contextmanager
def running(command, url, log, *, within=SERVED_WITHIN, **options):
    """Run a server in its own process group; enter the block once `url` answers."""
    with log.open("wb") as out:
        options |= {"stdout": out, "stderr": subprocess.STDOUT, "start_new_session": True}
        server = subprocess.Popen(command, preexec_fn=_restore_sigint, **options)
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


def _restore_sigint():
    """Restore SIGINT, which a shell's background processes ignore, and so would their children."""
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
