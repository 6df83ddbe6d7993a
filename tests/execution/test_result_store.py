"""An export that was killed goes on from its finished sites, and comes to the same bytes."""

import random
import re
import signal

import numpy as np
import onnx
import pytest
from joint_weights import related
from nets import SIZES, mlp_onnx
from onnx import TensorProto, helper, numpy_helper

import rsi_deploy
from bench.killing import Runner
from rsi_deploy.execution import result_store as resuming
from rsi_deploy.execution.executor import LocalExecutor, Task
from rsi_deploy.execution.result_store import ResultStore, StoringExecutor
from rsi_deploy.exporting import step_settings as stages
from rsi_deploy.linalg.site_factors import factorize_site
from rsi_deploy.linalg.solver import Solver
from rsi_deploy.onnx_models import site_factorizer
from rsi_deploy.planning.site_options import Calibration

ALWAYS = {"rsi_deploy.execution.result_store:LARGE": 0}
DEEP = (24, 64, 48, 64, 48, 64, 48, 10)


@pytest.fixture
def large(monkeypatch):
    """Every model is large."""
    monkeypatch.setattr(resuming, "LARGE", 0)


def attending(path):
    """Three products of one input, which share a right factor, and one more."""
    weights = [*related(24, 24, 24), related(40, width=72, rank=20, seed=5)[0]]
    names = ["q", "k", "v", "out"]
    tensors = [numpy_helper.from_array(w[0].T.numpy(), name) for w, name in zip(weights, names, strict=True)]
    nodes = [helper.make_node("MatMul", ["x", name], [f"{name}.y"], name) for name in names[:3]]
    nodes.append(helper.make_node("Concat", ["q.y", "k.y", "v.y"], ["all"], "concat", axis=1))
    nodes.append(helper.make_node("MatMul", ["all", "out"], ["y"], "out"))
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", size]) for n, size in (("x", 32), ("y", 40)))
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def failing_at(monkeypatch, number):
    """Have the `number`-th factorization of a run die as nobody foresaw; the list of those that were computed."""
    computed, real = [], site_factorizer.factorize_site

    def factorize_site(*args, name, **kwargs):
        computed.append(name)
        if len(computed) == number:
            raise KeyboardInterrupt
        return real(*args, name=name, **kwargs)

    monkeypatch.setattr(site_factorizer, "factorize_site", factorize_site)
    return computed


@pytest.mark.parametrize("asked", [{"rank": 9}, {"rank": 9, "joint": False}, {"max_error": "30%"}])
@pytest.mark.parametrize("number", [2, 4])
def test_a_rewrite_goes_on_and_gives_the_same_bytes(tmp_path, asked, number):
    options = {**asked, "resume": True}
    source = attending(tmp_path / "m.onnx")
    whole = rsi_deploy.rewrite(source, tmp_path / "whole.onnx", **options)
    target = tmp_path / "b.onnx"
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, number)
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.rewrite(source, target, **options)
    with pytest.MonkeyPatch.context() as patch:
        computed = failing_at(patch, 0)
        again = rsi_deploy.rewrite(source, target, **options)
    assert computed == ["q", "k", "v", "out"][number - 1 :]
    assert target.read_bytes() == (tmp_path / "whole.onnx").read_bytes()
    timeless = [[site.model_copy(update={"seconds": None}) for site in split.sites] for split in (whole, again)]
    assert timeless[0] == timeless[1]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 8}, {"power_iterations": 2}, {"method": "svd"}])
def test_what_was_kept_for_another_request_is_not_taken(tmp_path, monkeypatch, change):
    source, options = attending(tmp_path / "m.onnx"), {"rank": 9, "joint": False, "resume": True}
    rsi_deploy.rewrite(source, tmp_path / "whole.onnx", **{**options, **change})
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.rewrite(source, tmp_path / "b.onnx", **options)
    computed = failing_at(monkeypatch, 0)
    rsi_deploy.rewrite(source, tmp_path / "b.onnx", **{**options, **change})
    assert computed == ["q", "k", "v", "out"]
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_what_was_kept_for_another_model_is_dropped(tmp_path, large, monkeypatch):
    source = mlp_onnx(tmp_path / "m.onnx", sizes=DEEP)
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.export(str(source), tmp_path / "b", rank=4, measure=False)
    kept = tmp_path / ".b.partial" / "kept"
    assert len(list(kept.glob("*.safetensors"))) == 3
    mlp_onnx(source, sizes=DEEP, seed=1)
    computed = failing_at(monkeypatch, 0)
    report = rsi_deploy.export(str(source), tmp_path / "b", rank=4, measure=False)
    assert len(computed) == len(DEEP) - 1
    assert not any("interrupted" in note for note in report.notes)
    rsi_deploy.export(str(source), tmp_path / "whole", rank=4, measure=False)
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


def damaged(path, how):
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-4])
    elif how == "changed":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif how == "zeros":
        path.write_bytes(bytes(len(content)))
    else:
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["cut", "changed", "zeros", "empty", "another's"])
def test_a_kept_file_that_is_damaged_is_made_again(tmp_path, monkeypatch, how):
    source, options = attending(tmp_path / "m.onnx"), {"rank": 9, "joint": False, "resume": True}
    rsi_deploy.rewrite(source, tmp_path / "whole.onnx", **options)
    with pytest.MonkeyPatch.context() as patch:
        failing_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.rewrite(source, tmp_path / "b.onnx", **options)
    files = sorted((tmp_path / ".b.onnx.partial" / "kept").glob("*.safetensors"))
    assert len(files) == 3
    if how == "another's":
        files[0].write_bytes(files[1].read_bytes())
    else:
        damaged(files[0], how)
    computed = failing_at(monkeypatch, 0)
    rsi_deploy.rewrite(source, tmp_path / "b.onnx", **options)
    assert len(computed) == 2
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_model_that_is_not_large_keeps_nothing(tmp_path, monkeypatch):
    source = attending(tmp_path / "m.onnx")
    failing_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        rsi_deploy.export(str(source), tmp_path / "b", rank=4, measure=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


class Recorded(LocalExecutor):
    """A local executor that records the tasks that are announced and run."""

    def __init__(self):
        self.announced, self.run = [], []

    def announce(self, tasks):
        self.announced += [task.how["name"] for task in tasks]

    def result(self, task):
        self.run.append((task.how["name"], task.announced))
        return super().result(task)


def test_an_executor_gets_the_tasks_that_are_not_stored(tmp_path):
    """So that workers compute nothing twice; a task whose file is damaged runs as one that was not announced."""
    weights = dict(zip("abc", related(24, 24, 24), strict=True))
    how = {"kind": "MatMul", "rank": 4, "solver": Solver()}
    tasks = [
        Task(compute=factorize_site, weights={(n, (24, 32)): lambda w=w: w}, how={"name": n, **how})
        for n, w in weights.items()
    ]
    first = StoringExecutor(Recorded(), ResultStore(folder=tmp_path / "kept", key="k"))
    for task in tasks[:2]:
        first.result(task)
    store, executor = ResultStore(folder=tmp_path / "kept", key="k"), Recorded()
    second = StoringExecutor(executor, store)
    second.announce(iter(tasks))
    store._path(resuming._stored_key(tasks[1])).write_bytes(b"damaged")
    results = [second.result(task) for task in tasks]
    assert executor.announced == ["c"]
    assert executor.run == [("b", False), ("c", True)]
    assert store.reused == 1
    for task, (factors, record) in zip(tasks, results, strict=True):
        expected, its = LocalExecutor().result(task)
        assert all(np.array_equal(a, b) for a, b in zip(factors, expected, strict=True))
        assert record.model_copy(update={"seconds": its.seconds}) == its


# -- exports, really killed


def test_an_export_killed_at_random_moments_comes_to_the_same_bytes(tmp_path):
    mlp_onnx(tmp_path / "m.onnx", sizes=DEEP)
    argv = ["export", "m.onnx", "--rank", "25%", "--no-bench", "-o"]
    with Runner() as runner:
        whole = runner.run([*argv, "whole"], tmp_path, constants=ALWAYS)
        assert whole.code == 0, whole.said
        taken = []
        for at in random.Random(4).sample(range(whole.events // 4, whole.events - 10), 4):
            killed = runner.run([*argv, f"b{at}"], tmp_path, at=at, constants=ALWAYS)
            assert killed.code == -signal.SIGKILL
            again = runner.run([*argv, f"b{at}"], tmp_path, constants=ALWAYS)
            assert again.code == 0, again.said
            for name in ("model.onnx", "plan.json"):
                assert (tmp_path / f"b{at}" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
            notes = " ".join(rsi_deploy.read_report(tmp_path / f"b{at}").notes)
            found = re.search(r"(\d+) finished steps come from an earlier run", notes)
            taken.append(int(found[1]) if found else 0)
        assert max(taken) >= 2
        assert not list(tmp_path.glob(".b*"))


def test_a_sweep_killed_within_a_point_goes_on_within_it(tmp_path):
    mlp_onnx(tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(3).standard_normal((64, SIZES[0])).astype(np.float32))
    argv = ["sweep", "m.onnx", "--calib", "c.npz", "--no-bench", "--allow-larger", "--points", "2", "-o"]
    with Runner() as runner:
        whole = runner.run([*argv, "whole"], tmp_path, constants=ALWAYS)
        assert whole.code == 0, whole.said
        reused = 0
        for at in (whole.events * 9 // 20, whole.events * 17 // 20):
            assert runner.run([*argv, f"s{at}"], tmp_path, at=at, constants=ALWAYS).code == -signal.SIGKILL
            again = runner.run([*argv, f"s{at}"], tmp_path, constants=ALWAYS)
            assert again.code == 0, again.said
            for point in ("point-01", "point-02"):
                found, expected = (tmp_path / s / point / "model.onnx" for s in (f"s{at}", "whole"))
                assert found.read_bytes() == expected.read_bytes()
                reused += any("interrupted" in note for note in rsi_deploy.read_report(found.parent).notes)
        assert reused


# -- calibrated exports: options and fitted factors, once they are finished


@pytest.mark.parametrize("asked", [{"keep_macs": 0.5}, {"rank": 6}], ids=["budget", "rank"])
def test_a_calibrated_export_fits_no_second_time(tmp_path, large, monkeypatch, asked):
    source = mlp_onnx(tmp_path / "m.onnx")
    x = np.random.default_rng(3).standard_normal((64, SIZES[0])).astype(np.float32)
    np.savez(tmp_path / "c.npz", x=x)
    options = {"calib": tmp_path / "c.npz", "measure": False, **asked}
    whole = rsi_deploy.export(str(source), tmp_path / "whole", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.StepSettings, "executor", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.export(str(source), tmp_path / "b", **options)
    fits, fit = [], Calibration.fit

    def counted(self, *args):
        fits.append(1)
        return fit(self, *args)

    monkeypatch.setattr(Calibration, "fit", counted)
    monkeypatch.setattr(Calibration, "options", lambda *a: pytest.fail("the options are known"))
    again = rsi_deploy.export(str(source), tmp_path / "b", **options)
    assert not fits
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert [s.response_error for s in again.sites] == [s.response_error for s in whole.sites]


def test_factors_fitted_to_other_data_are_not_taken(tmp_path, large, monkeypatch):
    source = mlp_onnx(tmp_path / "m.onnx")
    draw = np.random.default_rng(3)
    for name in ("c", "other"):
        np.savez(tmp_path / f"{name}.npz", x=draw.standard_normal((64, SIZES[0])).astype(np.float32))
    options = {"calib": tmp_path / "c.npz", "measure": False, "rank": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.StepSettings, "executor", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            rsi_deploy.export(str(source), tmp_path / "b", **options)
    (tmp_path / "other.npz").rename(tmp_path / "c.npz")  # the same name, other samples
    rsi_deploy.export(str(source), tmp_path / "b", **options)
    rsi_deploy.export(str(source), tmp_path / "whole", **options)
    assert (tmp_path / "b" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
