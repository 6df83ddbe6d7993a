"""Bundles to serve, real servers in processes of their own, and what onnxruntime alone says."""

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
    """`rsi-deploy serve` on free ports; a context manager that ends with SIGTERM and keeps what was printed."""

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
        self.told = json.loads(line)
        self.http, self.grpc = self.told["http"], self.told["grpc"]

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
        """Status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection(self.http, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def metric(self, name, **labels):
        """Sum of a metric over all label sets that contain these."""
        _, _, text = self.ask("GET", "/metrics")
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = [line.split(" ") for line in text.decode().splitlines() if line.split("{")[0].split(" ")[0] == name]
        return sum(float(value) for key, value in lines if all(want in key for want in wanted))


def body(feeds, **more):
    """A JSON request."""
    names = {"float32": "FP32", "int64": "INT64", "float16": "FP16", "uint8": "UINT8", "bool": "BOOL"}
    inputs = [
        {"name": n, "shape": list(a.shape), "datatype": names[str(a.dtype)], "data": a.ravel().tolist()}
        for n, a in feeds.items()
    ]
    return json.dumps({"inputs": inputs, **more}).encode()


def alone(path, feeds):
    """Outputs of onnxruntime by name."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


def together(count, work, seconds=60):
    """Run `work(number)` on threads; their results in order."""
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


# -- models, plain ONNX files


def versions_of_answers(server, models, x, clients, asked=10):
    """Version -> how many answers, each held against that version's model run alone; of several clients at once.

    Args:
        server: serves the model `m`.
        models: version -> path.
        x: of every request.
        clients: at once, of `asked` requests each.
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

    return Counter(version for found in together(clients, client) for version in found)


def linear(path, seed=0, rows_in=12, rows_out=5, scale=1.0):
    """`y = x W` on `(N, 12)`."""
    weight = np.random.default_rng(seed).standard_normal((rows_in, rows_out)).astype(np.float32) * scale
    x, y = value("x", TensorProto.FLOAT, ["N", rows_in]), value("y", TensorProto.FLOAT, ["N", rows_out])
    return write(
        path, [helper.make_node("MatMul", ["x", "W"], ["y"])], [x], [y], [numpy_helper.from_array(weight, "W")]
    )


def tokens(path, words=50, width=8):
    """Mean of the embeddings of `ids (N, T)` where `mask (N, T)` is 1; an id outside 0 to 49 makes the run fail."""
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
    """`y[t] = x[0] + ... + x[t]` on `(T, 3)`: a first axis that is no batch."""
    nodes = [helper.make_node("CumSum", ["x", "zero"], ["y"])]
    zero = numpy_helper.from_array(np.array(0), "zero")
    values = [value(name, TensorProto.FLOAT, ["T", 3]) for name in ("x", "y")]
    return write(path, nodes, values[:1], values[1:], [zero])


def slow(path, width=1536, layers=160):
    """Matrix products on `(N, 1536)` that take tens of ms a row."""
    rng, nodes, weights, before = np.random.default_rng(0), [], [], "x"
    weights.append(numpy_helper.from_array(rng.standard_normal((width, width)).astype(np.float32) / width**0.5, "w"))
    for layer in range(layers):
        after = "y" if layer == layers - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [before, "w"], [after]))
        before = after
    x, y = (value(name, TensorProto.FLOAT, ["N", width]) for name in ("x", "y"))
    return write(path, nodes, [x], [y], weights)


def echo(path):
    """Gives back one input of every datatype that the protocol carries here, each `(N, 2)`."""
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
