"""No telemetry, and no network but for a hub model that the user names: with sockets blocked every verb does its work.

Two blocks, each shown to see an attempt: Python's audit events, which name it, and a network namespace without any
route, whose kernel counts what libraries try that are not written in Python.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from nets import SIZES, labelled, mlp_onnx

from rsi_deploy.cli import cli

HERE = Path(__file__).parent
FACTORY = f"""
from torch import nn

def make():
    net = nn.Sequential(nn.Linear({SIZES[0]}, 32), nn.ReLU(), nn.Linear(32, {SIZES[-1]}))
    net.input_shape = (1, {SIZES[0]})
    return net
"""
SHORT = ["--bench-seconds", "0.05"]
VERBS = [
    ["doctor"],
    ["inspect", "m.onnx"],
    ["export", "m.onnx", "--rank", "6", "--data", "d.npz", "-o", "b", *SHORT],
    ["export", "privacy_factory:make", "--rank", "6", "-o", "t", *SHORT],
    ["export", "m.onnx", "--calib", "d.npz", "--keep-params", "0.6", "-o", "c", "--no-bench"],
    ["sweep", "m.onnx", "--calib", "d.npz", "--points", "2", "-o", "s", "--no-bench"],
    ["profile", "m.onnx", "-o", "cost.json", "--budget", "1s"],
    ["bench", "m.onnx", "b/model.onnx", "--data", "d.npz", "--seconds", "0.1", "--cold-start", "--html", "bench.html"],
    ["eval", "b", "--data", "d.npz"],
    ["verify", "b"],
    ["package", "b", "--target", "ort", "-o", "p"],
    ["package", "b", "--target", "triton", "-o", "q"],
]
HUB = [["inspect", "torchvision:squeezenet1_1"]]
RUN = """
import json, sys
from rsi_deploy.cli import run
print(json.dumps([run(verb) for verb in json.loads(sys.argv[1])]), file=sys.stderr)
"""
COUNT = 'status=$?; grep "^Ip:" /proc/net/snmp > routes; exit $status'


def has_namespaces():
    """Whether this user may make a network namespace here."""
    command = ["unshare", "--net", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def blocked(folder, code, *arguments):
    """Run Python code with sockets blocked, in a namespace without routes where there are namespaces.

    Returns the finished process, the attempts that Python made, and the datagrams and connections that found no route
    (0 where there are no namespaces).
    """
    record = folder / "attempts"
    record.touch()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE / "no_network"), os.environ.get("PYTHONPATH", "")]),
        "RSI_NO_NETWORK": str(record),
        "TORCH_HOME": str(folder / "torch"),
    }
    command = [sys.executable, "-c", code, *arguments]
    if has_namespaces():
        command = ["unshare", "--net", "sh", "-c", f'"$@"; {COUNT}', "sh", *command]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    attempts = record.read_text(encoding="utf-8").splitlines()
    routes = folder / "routes"
    names, counts = (line.split() for line in routes.read_text().splitlines()) if routes.exists() else ([], [])
    return done, attempts, int(dict(zip(names, counts, strict=True)).get("OutNoRoutes", 0))


@pytest.fixture
def here(tmp_path):
    mlp_onnx(tmp_path / "m.onnx")
    labelled(tmp_path / "d.npz", tmp_path / "m.onnx")
    (tmp_path / "privacy_factory.py").write_text(FACTORY)
    return tmp_path


def test_no_verb_reaches_for_the_network(here):
    done, attempts, unrouted = blocked(here, RUN, json.dumps(VERBS))
    assert json.loads(done.stderr.splitlines()[-1]) == [0] * len(VERBS), done.stderr
    assert attempts == []
    assert unrouted == 0


def test_a_hub_model_that_is_named_does_and_says_so(here):
    """The check of the check: what is blocked is what a download needs."""
    done, attempts, _ = blocked(here, RUN, json.dumps(HUB))
    assert json.loads(done.stderr.splitlines()[-1]) == [3]
    assert "cannot be downloaded" in done.stderr
    assert any("download.pytorch.org" in attempt for attempt in attempts), attempts


@pytest.mark.skipif(not has_namespaces(), reason="no network namespaces for this user")
def test_an_attempt_past_python_is_counted(here):
    """libc's own connect(), as a library in C would call it."""
    code = """
import ctypes, socket, struct
address = struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", 80, bytes([192, 0, 2, 1]))
assert ctypes.CDLL(None).connect(ctypes.CDLL(None).socket(socket.AF_INET, socket.SOCK_STREAM, 0), address, 16) == -1
"""
    done, attempts, unrouted = blocked(here, code)
    assert done.returncode == 0, done.stderr
    assert attempts == []
    assert unrouted >= 1


def test_every_verb_is_looked_at():
    looked_at = {verb for verb, *_ in VERBS}
    assert set(cli.commands) - looked_at == {"serve", "schema"}


def addresses(process):
    """Where a process listens; `connections` is psutil's name for it before 6.0."""
    found = getattr(process, "net_connections", None) or process.connections
    return [one.laddr.ip.removeprefix("::ffff:") for one in found("inet") if one.status == psutil.CONN_LISTEN]


def test_serve_listens_on_this_machine_alone(here):
    served = pytest.importorskip("served")
    with served.Server(here / "m.onnx") as server:
        process = psutil.Process(server.process.pid)
        listening = [ip for one in (process, *process.children(recursive=True)) for ip in addresses(one)]
    assert set(listening) == {"127.0.0.1"}, "HTTP and gRPC, on loopback"
    assert len(listening) >= 2
    with served.Server(here / "m.onnx", "--host", "0.0.0.0") as server:
        listening = addresses(psutil.Process(server.process.pid))
    assert "0.0.0.0" in listening, "only where it is asked for; and the check sees it"
