import gc
import os
import signal
from pathlib import Path

import pytest
import shared_work
import torch
from cpu_seconds import CpuSeconds, slow_files

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # tests that use onnxruntime alone send nothing either

collect_ignore = ["no_network", "raises"]  # tools of tests, not tests: two of their files are called sitecustomize

TESTS = Path(__file__).parent
PICTURES = ("report", "sweeping", "test_cli_page.py", "test_determinism.py", "test_picture.py", "test_privacy.py")
"""Where reports get their pictures; elsewhere each is empty."""


def pytest_addoption(parser):
    group = parser.getgroup("rsi-deploy")
    group.addoption("--fast", action="store_true", help="leave out the files of tests that tests/cpu_seconds.txt lists")
    group.addoption("--cpu-seconds", action="store_true", help="measure CPU seconds and write tests/cpu_seconds.txt")


def pytest_configure(config):
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds())


def pytest_ignore_collect(collection_path, config):
    """Leave out slow files with `--fast`."""
    if config.getoption("--fast") and collection_path.is_relative_to(TESTS):
        return str(collection_path.relative_to(TESTS)) in slow_files() or None
    return None


@pytest.fixture(scope="session", autouse=True)
def _interrupts():
    """Restore the handler of SIGINT, which the background jobs of a shell ignore, and the processes that they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Use one thread: matrices are tiny, and several threads wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Keep stored times in a folder of this run: those in the user's cache must not decide a test."""
    before = os.environ.get("RSI_DEPLOY_CACHE")
    os.environ["RSI_DEPLOY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["RSI_DEPLOY_CACHE"]
    else:
        os.environ["RSI_DEPLOY_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def _shared_work():
    shared_work.share_export_tables()
    shared_work.freeze_objects()
    yield
    gc.unfreeze()  # some libraries report what is left at the end


@pytest.fixture(scope="module", autouse=True)
def _pictures(request):
    """Draw pictures only for the tests that look at them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.relative_to(TESTS).parts[0] not in PICTURES:
            patch.setattr("vl_convert.vegalite_to_svg", shared_work.blank_picture)
        yield


@pytest.fixture(scope="module")
def ray():
    """A local Ray with two CPUs, for two workers at a time."""
    found = pytest.importorskip("ray", reason='no ray here: pip install "rsi-deploy[ray]"')
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()


def pytest_collection_modifyitems(config, items):
    """Skip slow tests without `-m slow`."""
    if "slow" in config.getoption("markexpr"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))
