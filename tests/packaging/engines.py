"""Separate environments for packages that conflict with ours, and a real tritonserver in one of them."""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import free_port, running

ROOT = Path(__file__).parents[2]


def environment(name):
    """Return the Python of `.venv-NAME`, or skip the test; $RSI_DEPLOY_ENVIRONMENTS names another parent folder."""
    python = Path(os.environ.get("RSI_DEPLOY_ENVIRONMENTS", ROOT)) / f".venv-{name}" / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no .venv-{name} here: run make {name}")
    return python


def with_tritonclient():
    """Return a Python with tritonclient: this one, or that of `.venv-triton`."""
    return Path(sys.executable) if importlib.util.find_spec("tritonclient") else environment("triton")


def asked(python, code, *arguments, **options):
    """Run a script of this folder in another environment, without our packages on its path; return its stdout."""
    command = [python, str(Path(__file__).with_name(code)), *map(str, arguments)]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=300, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextlib.contextmanager
def tritonserver(repository, work):
    """Run NVIDIA's tritonserver from its wheel on a repository; yield its HTTP address when it is ready."""
    python = environment("triton")
    site = next(python.parents[1].glob("lib/python3.*/site-packages"))
    wheel = site / "pytriton" / "tritonserver"
    version = site.parent.name.removeprefix("python")
    backends = work / "backends"
    shutil.copytree(wheel / "backends", backends)
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    library = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"], capture_output=True, text=True
    ).stdout.strip()
    port = free_port()
    command = [
        wheel / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        "--allow-grpc=false",
        "--allow-metrics=false",
        "--backend-config=python,shm-default-byte-size=4194304",
        "--exit-on-error=false",
    ]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    clean |= {
        "LD_LIBRARY_PATH": f"{site / 'nvidia_pytriton.libs'}:{library}",
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # by which the interpreter of the stub finds its packages
        "VIRTUAL_ENV": str(python.parents[1]),
    }
    with running(command, f"http://127.0.0.1:{port}/v2/health/ready", work / "triton.log", env=clean):
        yield f"127.0.0.1:{port}"
