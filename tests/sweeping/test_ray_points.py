"""Points made by workers: with a real Ray on this machine, skipped where there is none."""

import contextlib
import functools
import signal
import sys

import psutil
import pytest
from sweeps import filled
from sweeps import swept as swept_here

from rsi_deploy import UsageError, read_report, verify
from rsi_deploy.report.sweep_schema import read_sweep

swept = functools.partial(swept_here, points=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return filled(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def local(place):
    swept(place, place / "local")
    return place / "local"


def same(a, b):
    """Whether the sweeps' models are the same bytes, and their points but for the seconds."""
    documents = [read_sweep(folder) for folder in (a, b)]
    points = [[point.model_dump(exclude={"seconds"}) for point in document.points] for document in documents]
    folders = [point.folder for point in documents[0].points if point.folder]
    models = [[(x / folder / "model.onnx").read_bytes() for folder in folders] for x in (a, b)]
    return points[0] == points[1] and models[0] == models[1]


def workers():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if "ray::_made" in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.mark.ray
def test_the_points_are_those_of_a_sweep_here_though_a_worker_is_killed(ray, place, local, tmp_path):
    import threading
    import time

    killed, stop = [], threading.Event()

    def hunt():
        while not killed and not stop.is_set():
            for process in workers()[:1]:
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
            time.sleep(0.01)

    hunter = threading.Thread(target=hunt)
    hunter.start()
    document = swept(place, tmp_path / "s", ray="local")
    stop.set()
    hunter.join()
    assert killed
    assert document.is_done
    assert same(local, tmp_path / "s")
    swept(place, tmp_path / "other", seed=1)
    assert not same(local, tmp_path / "other")  # so other random numbers would be noticed
    for point in document.points:
        assert all(claim.status != "broken" for claim in verify(tmp_path / "s" / point.folder).claims)


@pytest.mark.ray
def test_measured_points_never_share_a_machine(ray, place, tmp_path, monkeypatch):
    """Each takes all CPUs of its node, so that Ray itself can put no other task there."""
    asked, real = [], ray.remote_function.RemoteFunction.options

    def options(self, **given):
        asked.append(given)
        return real(self, **given)

    monkeypatch.setattr(ray.remote_function.RemoteFunction, "options", options)
    document = swept(place, tmp_path / "s", ray="local", measure=True, bench_seconds=0.2, points=3, allow_slower=True)
    (node,) = ray.nodes()
    given = [(a["num_cpus"], a["scheduling_strategy"].node_id) for a in asked if "num_cpus" in a]
    assert given == [(2.0, node["NodeID"])] * 2  # the first point is made here
    assert all(point.latency_ms is not None for point in document.points)


@pytest.mark.ray
def test_one_calibration_serves_all_and_an_unfinished_sweep_is_gone_on_with(ray, place, local, tmp_path, monkeypatch):
    from rsi_deploy.sweeping import ray_points

    real = ray_points._got

    def interrupted(found, number, reference):
        if number == 3:
            raise KeyboardInterrupt
        return real(found, number, reference)

    monkeypatch.setattr(ray_points, "_got", interrupted)
    with pytest.raises(KeyboardInterrupt):
        swept(place, tmp_path / "s", ray="local")
    assert [point.number for point in read_sweep(tmp_path / "s").points] == [1, 2]
    monkeypatch.undo()
    swept(place, tmp_path / "s")  # here, without Ray: it is the same sweep
    assert same(local, tmp_path / "s")
    assert read_report(tmp_path / "s" / "point-04").compressed.macs > 0


def test_where_there_is_no_ray_it_says_what_to_install(place, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match='pip install "rsi-deploy'):
        swept(place, tmp_path / "s", ray="local")
    assert not (tmp_path / "s").exists()
