"""Serve a model and roll out its compressed version: `python -m samples.serve_and_roll_out`. Writes `served-bundle`."""

# %% The dense model and its compressed version, in one bundle.
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

import rsi_deploy

SAMPLES = Path(__file__).parent
weights, more = SAMPLES / "digits_cnn.safetensors", {"measure": False, "keep_dense": True, "force": True}
report = rsi_deploy.export("samples.digits:cnn", "served-bundle", checkpoint=weights, rank="25%", **more)
inputs = report.preprocessing.apply(np.load(SAMPLES / "digits_eval.npz")["images"][:40])


# %% A server in a process of its own, on a free port; and one request for each picture.
@contextmanager
def served(*options: str) -> Iterator[str]:
    """`rsi-deploy serve` for the model `m`, until the block ends; gives its address."""
    verb = ["serve", "m=served-bundle/dense.onnx", "--http-port", "0", "--no-grpc", "--access-log", "off", "--json"]
    command = [sys.executable, "-c", "from rsi_deploy.cli import main; main()", *verb, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield json.loads(process.stdout.readline())["http"]
        finally:
            process.terminate()


def ask(address: str, path: str, body: dict | None = None) -> dict:
    """The JSON answer to a GET, or to a POST of `body`."""
    connection = HTTPConnection(address, timeout=60)
    connection.request("GET" if body is None else "POST", f"/v2/models/m{path}", body and json.dumps(body))
    return json.load(connection.getresponse())


def versions(address: str) -> Counter[str]:
    """Ask for every picture; how many answers each version of the model gave."""
    tensor = {"name": "input", "shape": [1, *inputs[0].shape], "datatype": "FP32"}
    bodies = [{"inputs": [tensor | {"data": picture.ravel().tolist()}]} for picture in inputs]
    return Counter(ask(address, "/infer", body)["model_version"] for body in bodies)


# %% Shadow: the dense model answers, and the compressed one is compared with it, where there is time.
with served("--shadow", "served-bundle") as address:
    print("shadow:", dict(versions(address)))
    time.sleep(1)
    print(f"agreement: {ask(address, '/shadow')['agreement']} %")

# %% Canary: the compressed model answers every tenth request.
with served("--canary", "served-bundle", "--canary-share", "10%") as address:
    print("canary:", dict(versions(address)))
