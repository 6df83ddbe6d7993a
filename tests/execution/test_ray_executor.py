"""Sites factorized by workers: with a real Ray on this machine, skipped where there is none."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
import torch
from joint_weights import related
from nets import mlp_onnx
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import ModelError, UsageError, export, read_report
from rsi_deploy.cli import run
from rsi_deploy.execution import ray_executor as ray_executor
from rsi_deploy.execution.executor import LocalExecutor
from rsi_deploy.io.onnx_file import read_onnx
from rsi_deploy.linalg.products import rates
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models.split import split_model
from rsi_deploy.planning.planner import Planner, rank_spec

MAIN = "from rsi_deploy.cli import main; main()"
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def attention_like(folder, precision):
    """`relu([x q, x k, x v]) out`, q, k and v of a common rank and so to be split jointly, and a gate."""
    weights = dict(zip(("q", "k", "v"), related(32, 32, 32), strict=True))
    weights |= {"gate": torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(2))}
    weights |= {"out": torch.randn(1, 30, 96, generator=torch.Generator().manual_seed(3))}
    kind = helper.tensor_dtype_to_np_dtype(TYPES[precision])
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(weight[0].numpy().T).astype(kind), f"{name}.weight")
        for name, weight in weights.items()
    ]
    nodes = [helper.make_node("MatMul", ["x", f"{name}.weight"], [f"{name}.y"], name) for name in "qkv"]
    nodes += [
        helper.make_node("MatMul", ["q.y", "gate.weight"], ["g"], "gate"),
        helper.make_node("Concat", ["q.y", "k.y", "v.y"], ["c"], "concat", axis=1),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "out.weight"], ["y"], "out"),
    ]
    x, *outputs = (
        helper.make_tensor_value_info(name, TYPES[precision], ["n", size])
        for name, size in (("x", 32), ("y", 30), ("g", 40))
    )
    graph = helper.make_graph(nodes, "g", [x], outputs, tensors)
    path = folder / "attention.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def same_bytes(a, b):
    names = sorted(path.name for path in a.glob("model.onnx*"))
    assert names == sorted(path.name for path in b.glob("model.onnx*"))
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def settled(folder):
    """Every site's record but for the time it took."""
    return [site.model_dump(exclude={"seconds"}) for site in read_report(folder).sites]


def workers():
    """Processes of Ray that compute a task now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ray::_work" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A perceptron of 100 sites, and its export without Ray."""
    root = tmp_path_factory.mktemp("deep")
    mlp_onnx(root / "m.onnx", sizes=(64, *[96] * 99, 10))
    export(str(root / "m.onnx"), root / "local", rank=8, measure=False)
    assert len(read_report(root / "local").sites) == 100
    return root


@pytest.mark.ray
def test_a_hundred_sites_with_a_worker_killed_half_way(ray, deep, tmp_path):
    killed = []

    def watch(site, index, count):
        """At half, kill a worker in the middle of its task."""
        while index >= count // 2 and not killed:
            for process in workers():
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
                break

    export(str(deep / "m.onnx"), tmp_path / "b", rank=8, measure=False, ray="local", progress=watch)
    assert killed
    assert same_bytes(deep / "local", tmp_path / "b")
    assert settled(deep / "local") == settled(tmp_path / "b")
    export(str(deep / "m.onnx"), tmp_path / "other", rank=8, measure=False, seed=1)
    assert not same_bytes(tmp_path / "other", tmp_path / "b")  # so other random numbers would be noticed
    assert ray.is_initialized()  # the user's own connection stays


@pytest.mark.ray
@pytest.mark.parametrize(
    "options",
    [
        {"rank": "40%", "method": "rsvd"},
        {"rank": 6, "power_iterations": 2, "oversampling": 3},
        {"rank": "40%", "method": "svd"},
        {"max_error": "70%"},
        {"max_error": "1.1x"},
        {"rank": 6, "exclude": ["fc2*"]},
    ],
    ids=str,
)
def test_the_options_mean_the_same(ray, tmp_path, options):
    mlp_onnx(tmp_path / "m.onnx", sizes=(64, 96, 80, 10))
    for name, more in (("local", {}), ("ray", {"ray": "local"})):
        export(str(tmp_path / "m.onnx"), tmp_path / name, measure=False, **options, **more)
    assert same_bytes(tmp_path / "local", tmp_path / "ray")
    assert settled(tmp_path / "local") == settled(tmp_path / "ray")


@pytest.mark.ray
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_joint_splits_and_stored_types_are_the_same(ray, tmp_path, precision):
    path = attention_like(tmp_path, precision)
    for name, more in (("local", {}), ("ray", {"ray": "local"})):
        export(str(path), tmp_path / name, rank=8, measure=False, **more)
    assert same_bytes(tmp_path / "local", tmp_path / "ray")
    assert settled(tmp_path / "local") == settled(tmp_path / "ray")
    assert any(site.joint for site in read_report(tmp_path / "ray").sites)


@pytest.mark.ray
def test_a_torch_model_and_the_demo_s_convolutions(ray, tmp_path):
    common = {"checkpoint": "samples/digits_cnn.safetensors", "rank": "25%", "measure": False}
    for name, more in (("local", {}), ("ray", {"ray": "local"})):
        export("samples.digits:cnn", tmp_path / name, **common, **more)
    assert same_bytes(tmp_path / "local", tmp_path / "ray")


@pytest.mark.ray
def test_what_a_site_refuses_is_said_as_without_ray(ray, tmp_path):
    bad = np.ones((24, 32), np.float32)
    bad[3, 4] = np.nan
    mlp_onnx(tmp_path / "m.onnx", fc2=bad)
    said = []
    for more in ({}, {"ray": "local"}):
        with pytest.raises(ModelError) as caught:
            export(str(tmp_path / "m.onnx"), tmp_path / "b", rank=4, measure=False, **more)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "fc2" in said[0]
    assert not (tmp_path / "b").exists()


@pytest.mark.ray
def test_workers_that_are_always_lost_are_an_error_in_words(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_executor, "RETRIES", 1)
    mlp_onnx(tmp_path / "m.onnx", sizes=(900, 900, 900, 10))
    stop = threading.Event()

    def hunt():
        while not stop.is_set():
            for process in workers():
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.02)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        with pytest.raises(ModelError, match=r"fc1\.weight.*the workers that tried it were lost, 2 in all"):
            export(str(tmp_path / "m.onnx"), tmp_path / "b", rank=400, method="svd", measure=False, ray="local")
    finally:
        stop.set()
        hunter.join()
    assert not (tmp_path / "b").exists()


@pytest.mark.ray
def test_a_weight_travels_once(ray, tmp_path, monkeypatch):
    path = attention_like(tmp_path, "float32")
    put, sent = ray.put, []
    monkeypatch.setattr(ray, "put", lambda value: (sent.append(value[0].tobytes()), put(value))[1])
    export(str(path), tmp_path / "b", max_error="40%", measure=False, ray="local")
    assert len(sent) == len(set(sent)) > 3


@pytest.mark.ray
def test_a_machine_with_too_few_cpus_is_said(ray, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.raises(UsageError, match=r"as many CPUs.*, 3, but none there has more than 2; type OMP_NUM"):
            export(str(mlp_onnx(tmp_path / "m.onnx")), tmp_path / "b", rank=4, measure=False, ray="local")
    finally:
        torch.set_num_threads(before)


@pytest.mark.ray
def test_a_command_brings_its_own_ray_and_ends_it(tmp_path):
    pytest.importorskip("ray", reason='no ray here: pip install "rsi-deploy[ray]"')
    model = mlp_onnx(tmp_path / "m.onnx")
    words = ["export", str(model), "--rank", "4", "--no-bench"]
    clean = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, more in (("local", []), ("ray", ["--ray", "local"])):
        command = [sys.executable, "-c", MAIN, *words, "-o", str(tmp_path / name), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=Path(__file__).parents[2])
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert same_bytes(tmp_path / "local", tmp_path / "ray")


@pytest.mark.ray
def test_nobody_at_the_address(tmp_path):
    pytest.importorskip("ray", reason='no ray here: pip install "rsi-deploy[ray]"')
    words = ["export", str(mlp_onnx(tmp_path / "m.onnx")), "--rank", "4", "--no-bench", "-o", str(tmp_path / "b")]
    command = [sys.executable, "-c", MAIN, *words, "--ray", "127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2, done.stderr
    assert "--ray 127.0.0.1:1: the address does not respond" in done.stderr
    assert not (tmp_path / "b").exists()


# -- without Ray


def test_where_there_is_no_ray_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    model = mlp_onnx(tmp_path / "m.onnx")
    assert run(["export", str(model), "--rank", "4", "--no-bench", "-o", str(tmp_path / "b"), "--ray", "local"]) == 2
    assert 'pip install "rsi-deploy[ray]"' in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_requests_that_cannot_be_meant(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx")
    calib = {"input": np.zeros((8, 12), np.float32)}
    with pytest.raises(UsageError, match="leave out --ray, or add --factors weights"):
        export(str(model), tmp_path / "b", calib=calib, keep_params=0.5, measure=False, ray="local")
    with pytest.raises(UsageError, match="workers' CPUs: leave out --device cuda"):
        export(str(model), tmp_path / "b", rank=4, device="cuda", measure=False, ray="local")


class Recorded(LocalExecutor):
    """A local executor that records the tasks that are announced and run, and the weights that are released."""

    def __init__(self):
        self.announced, self.run, self.released = [], [], []

    def announce(self, tasks):
        self.announced = [task.key for task in tasks]

    def result(self, task):
        self.run.append((task.key, task.announced))
        return super().result(task)

    def release(self, *weights):
        self.released += weights


def test_the_announced_tasks_are_those_that_run(tmp_path):
    executor = Recorded()
    model = read_onnx(attention_like(tmp_path, "float32"))
    planner = Planner(spec=rank_spec(8, None), include=(), exclude=("gate*",), always_split=False)
    split_model(model, planner, Solver(), path=tmp_path / "o.onnx", executor=executor)
    assert {key for key, announced in executor.run if announced} == set(executor.announced)
    assert any(not announced for _, announced in executor.run)  # q, k, v jointly
    assert len(executor.announced) == len(set(executor.announced))
    assert {weight for key, _ in executor.run for weight in key[1:]} == set(executor.released)


def test_rates_that_are_set_are_used():
    mine = rates.Rates(full=1.0, onednn=1.0, half=2.0, double=3.0, eigen=4.0)
    threads = torch.get_num_threads()
    try:
        rates.set_rates(torch.device("cpu"), mine)
        assert rates.rates(torch.device("cpu")) == mine
        torch.set_num_threads(threads + 1)
        assert rates.rates(torch.device("cpu")) != mine
    finally:
        torch.set_num_threads(threads)
        rates._set_rates.clear()
    assert rates.rates(torch.device("cpu")) != mine
