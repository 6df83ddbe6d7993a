"""A machine that only measures (an edge box, an environment for another provider) has no torch."""

import subprocess
import sys

from bench import small

BLOCKED = """
import sys
sys.modules["torch"] = sys.modules["torchvision"] = sys.modules["onnxscript"] = None
from rsi_deploy.cli import main
main()
"""


def run(*arguments):
    return subprocess.run([sys.executable, "-c", BLOCKED, *map(str, arguments)], capture_output=True, text=True)


def test_bench_runs(tmp_path):
    model = small.perceptron(tmp_path / "m.onnx", width=16, layers=2)
    for more in ([], ["--json"], ["--rivals"]):
        done = run("bench", model, model, "--seconds", "0.1", "--input-shape", "x=1x16", *more)
        assert done.returncode == 0, done.stderr
        assert "difference" in done.stdout or "too few blocks" in done.stdout


def test_what_needs_torch_says_so_by_failing():
    assert "torch" in run("export", "torchvision:resnet18", "--rank", "25%", "-o", "x").stderr
