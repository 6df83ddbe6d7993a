import os
import signal

import pytest
import torch

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests that use onnxruntime alone send nothing either

collect_ignore = ["no_network", "raises"]  # tools of tests, not tests: two of their files are called sitecustomize


@pytest.fixture(scope="session", autouse=True)
def _interrupts_are_heard():
    """In the background of a shell they are ignored, by the tests and by all that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Matrices are tiny here, and threads that wait for each other on a busy machine take a hundred times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory):
    """Times that other work left in the user's cache must not decide a test, nor tests leave any there."""
    before = os.environ.get("RSI_DEPLOY_CACHE")
    os.environ["RSI_DEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["RSI_DEPLOY_CACHE"]
    else:
        os.environ["RSI_DEPLOY_CACHE"] = before


@pytest.fixture(scope="module")
def ray():
    """A Ray of its own with two CPUs, for two workers at a time."""
    found = pytest.importorskip("ray", reason='no ray here: pip install "rsi-deploy[ray]"')
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where they are asked for: `-m slow`."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
