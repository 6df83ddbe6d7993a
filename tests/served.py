"""Models to serve, real servers in their own processes, and the outputs of onnxruntime alone."""

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

MAIN = "from rsi_deploy.cli import main; main()"
BLOCKED = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; "


class Server:
    """`rsi-deploy serve` on free ports; a context manager that ends it with SIGTERM.

    Attributes:
        info: the document that the server prints when it is ready.
    """

    def __init__(self, *arguments, code=BLOCKED + MAIN, env=None, log=None, pass_fds=(), ends_within=20, ports=(0, 0)):
        self.ends_within = ends_within
        self.log = Path(log) if log else Path(os.devnull)
        http, grpc = ports
        way = ["--no-grpc"] if grpc is None else ["--grpc-port", str(grpc)]
        command = [sys.executable, "-c", code, "serve", *map(str, arguments), "--http-port", str(http), *way]
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*command, "--json"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {})},
                pass_fds=pass_fds,
            )
        line = self.process.stdout.readline()
        assert line.startswith(b"{"), f"not ready: {line!r}, ended with {self.process.wait()}: {self.errors()}"
        self.info = json.loads(line)
        self.http, self.grpc = self.info["http"], self.info["grpc"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(timeout=self.ends_within) == 0
        finally:
            self.process.kill()
            self.process.stdout.close()

    def errors(self):
        return self.log.read_text(errors="replace") if self.log.is_file() else ""

    def ask(self, method, path, body=None, headers=None, timeout=30):
        """Return status, headers and body of one request on a new connection."""
        connection = http.client.HTTPConnection(self.http, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def metric(self, name, **labels):
        """Return the sum of a metric over all label sets that contain these."""
        _, _, text = self.ask("GET", "/metrics")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line.split(" ") for line in text.decode().splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(value) for key, value in lines if all(want in key for want in wanted))


def body(feeds, **more):
    """Return the JSON body of a request."""
    names = {"float32": "FP32", "int64": "INT64", "float16": "FP16", "uint8": "UINT8", "bool": "BOOL"}
    inputs = [
        {"name": n, "shape": list(a.shape), "datatype": names[str(a.dtype)], "data": a.ravel().tolist()}
        for n, a in feeds.items()
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def alone(path, feeds):
    """Return the outputs of onnxruntime by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def run_threads(count, work, seconds=60):
    """Run `work(number)` on threads and return the results in order."""
    results = [None] * count

    def one(number):
        results[number] = work(number)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0.1))
    assert not any(thread.is_alive() for thread in threads), "a client got no answer"
    return results


def versions_of_answers(server, models, x, clients, asked=10):
    """Send requests from several clients; check each answer against onnxruntime; return version -> number of answers.

    Args:
        server: a server of the model `m`.
        models: version -> path.
        x: input of every request.
        clients: number of clients.
        asked: number of requests of each client.
    """
    want = {version: alone(path, {"x": x})["y"][0] for version, path in models.items()}

    def client(number):
        found = []
        for _ in range(asked):
            document = json.loads(server.ask("POST", "/v2/models/m/infer", body({"x": x}))[2])
            version = document["model_version"]
            np.testing.assert_allclose(document["outputs"][0]["data"], want[version], rtol=0, atol=1e-5)
            found.append(version)
        return found

    return Counter(version for found in run_threads(clients, client) for version in found)


def linear(path, seed=0, rows_in=12, rows_out=5, scale=1.0):
    """Write a model `y = x W` on `(N, 12)`."""
    weight = np.random.default_rng(seed).standard_normal((rows_in, rows_out)).astype(np.float32) * scale
    x, y = value("x", TensorProto.FLOAT, ["N", rows_in]), value("y", TensorProto.FLOAT, ["N", rows_out])
    return write(
        path, [helper.make_node("MatMul", ["x", "W"], ["y"])], [x], [y], [numpy_helper.from_array(weight, "W")]
    )


def tokens(path, words=50, width=8):
    """Write a model that averages the embeddings of `ids (N, T)` by `mask (N, T)`; it fails for ids outside 0 to 49."""
    table = np.random.default_rng(1).standard_normal((words, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["mask"], ["float_mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float_mask", "two"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["kept"]),
        helper.make_node("ReduceMean", ["kept", "one"], ["y"], keepdims=0),
    ]
    inputs = [value(name, TensorProto.INT64, ["N", "T"]) for name in ("ids", "mask")]
    weights = [
        numpy_helper.from_array(array, name)
        for array, name in ((table, "table"), (np.array([2]), "two"), (np.array([1]), "one"))
    ]
    return write(path, nodes, inputs, [value("y", TensorProto.FLOAT, ["N", width])], weights)


def running_sum(path):
    """Write a model `y[t] = x[0] + ... + x[t]` on `(T, 3)`, whose first axis is no batch."""
    nodes = [helper.make_node("CumSum", ["x", "zero"], ["y"])]
    zero = numpy_helper.from_array(np.array(0), "zero")
    values = [value(name, TensorProto.FLOAT, ["T", 3]) for name in ("x", "y")]
    return write(path, nodes, values[:1], values[1:], [zero])


def slow(path, width=1536, layers=160):
    """Write a model of matrix products on `(N, 1536)` that takes tens of ms a row."""
    rng, nodes, weights, before = np.random.default_rng(0), [], [], "x"
    weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32) / width**0.5, "w"))
    for layer in range(layers):
        after = "y" if layer == layers - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [before, "w"], [after]))
        before = after
    x, y = (value(name, TensorProto.FLOAT, ["N", width]) for name in ("x", "y"))
    return write(path, nodes, [x], [y], weights)


def echo(path):
    """Write a model that returns its inputs, one `(N, 2)` of each supported datatype but BYTES."""
    kinds = {
        **{f"INT{bits}": getattr(TensorProto, f"INT{bits}") for bits in (8, 16, 32, 64)},
        **{f"UINT{bits}": getattr(TensorProto, f"UINT{bits}") for bits in (8, 16, 32, 64)},
        **{
            "BOOL": TensorProto.BOOL,
            "FP16": TensorProto.FLOAT16,
            "FP32": TensorProto.FLOAT,
            "FP64": TensorProto.DOUBLE,
        },
    }
    nodes = [helper.make_node("Identity", [f"x{name}"], [f"y{name}"]) for name in kinds]
    inputs = [value(f"x{name}", kind, ["N", 2]) for name, kind in kinds.items()]
    return write(path, nodes, inputs, [value(f"y{name}", kind, ["N", 2]) for name, kind in kinds.items()], [])


def value(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


def write(path, nodes, inputs, outputs, weights):
    graph = helper.make_graph(nodes, "small", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path
