"""bench/gpu: steps with limits of their own, of which none stops the others, and an account of all of them."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
from test_bench_measuring import local_paths

from bench import gpu
from bench.gpu import NETS, ROOT, Step, judged, run_all, steps_of

SPEEDUP = ("--models", "mlp_mnist", "--providers", "cpu:threads=1", "--seconds", "0.1", "--json", "result.json")
SLEEP = ("timeit", "-n1", "-r1", "import time; time.sleep(60)")


def test_failing_and_endless_steps_do_not_stop_the_others(tmp_path):
    steps = [
        Step(name="missing", arguments=("bench.provider_row", "missing.onnx", "missing.onnx"), limit=60),
        Step(name="endless", arguments=SLEEP, limit=1),
        Step(name="no data", skip="there are none"),
        Step(name="speedup", arguments=("bench.speedup", *SPEEDUP), limit=120),
    ]
    found = {outcome.name: outcome for outcome in run_all(steps, tmp_path, 300)}
    assert {name: outcome.status for name, outcome in found.items()} == {
        "missing": "failed",
        "endless": "out of time",
        "no data": "skipped",
        "speedup": "done",
    }
    assert "missing.onnx" in found["missing"].reason
    assert found["endless"].seconds < 30
    stored = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    assert [step["name"] for step in stored["steps"]] == list(found)
    document = stored["steps"][-1]["document"]
    assert [row["batch"] for row in document["rows"]] == [1, 8]
    assert document["command"].startswith("python -m bench.speedup ")
    assert not any(local_paths(step["command"] + step["reason"]) for step in stored["steps"])
    assert not local_paths(document["command"])
    table = (tmp_path / "gpu.md").read_text("utf-8")
    assert all(f"| {name} | {outcome.status} |" in table for name, outcome in found.items())
    assert "missing.onnx" in (tmp_path / "gpu.log").read_text("utf-8")


def test_no_step_starts_behind_the_limit(tmp_path):
    outcomes = run_all([Step(name="late", arguments=SLEEP, limit=60)], tmp_path, gpu.PATIENCE + gpu.LEAST - 1)
    assert [outcome.status for outcome in outcomes] == ["out of time"]
    assert "not started" in outcomes[0].reason


@pytest.mark.parametrize(
    ("document", "printed", "code", "status", "part"),
    [
        ({"rows": [{}]}, "", None, "out of time", "1 rows"),
        (None, "error: it broke", 3, "failed", "it broke"),
        (None, "", -11, "failed", "-11"),
        (None, "error: no net could be loaded: no file", 2, "skipped", "no file"),
        (None, "35 skipped, 591 deselected in 2 s", 0, "skipped", "35 skipped"),
        (None, "5 passed, 30 skipped in 2 s", 0, "done", ""),
        ({"rows": [], "skipped": {"cuda": "no GPU"}}, "", 0, "skipped", "no GPU"),
        ({"rows": [{"error": "no kernel"}]}, "", 0, "failed", "no kernel"),
        ({"rows": [{"error": "no kernel"}, {}]}, "", 0, "done", "1 of 2 rows failed"),
        ({"rows": [{}]}, "", 0, "done", ""),
    ],
)
def test_what_becomes_of_a_step(document, printed, code, status, part):
    found = judged(document, printed, code, 60.0)
    assert found[0] == status
    assert part in found[1]
    assert bool(found[1]) == bool(part)


@pytest.mark.parametrize("provider", ["cuda", "cuda:use_tf32=0"])
def test_a_gpu_runs_every_net_with_and_without_graphs(provider):
    steps = list(steps_of(provider, NETS))
    graphs = f"{provider}{',' if ':' in provider else ':'}enable_cuda_graph=1"
    for net in NETS:
        (speedup,) = [step for step in steps if step.name == f"speedup {net}"]
        assert {provider, graphs, "float32", "float16"} <= set(speedup.arguments)
        never = [step.arguments for step in steps if step.name.startswith(f"never_slower {net} ")]
        found = [(own[own.index("--provider") + 1], own[own.index("--precision") + 1]) for own in never]
        assert found == [(provider, "float32"), (provider, "float16"), (graphs, "float32")]
    assert [bool(step.skip) for step in steps if step.name.startswith("rivals ")] == [net != "minilm" for net in NETS]
    (tests,) = [step for step in steps if step.name == "tests"]
    assert "tests/linalg/test_on_a_gpu.py" in tests.arguments


def test_a_cpu_has_no_graphs():
    assert not any("graph" in " ".join((step.name, *step.arguments)) for step in steps_of("cpu", ["resnet20"]))


def test_the_script_joins_wheels_and_runs_the_bench(tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir()
    with zipfile.ZipFile(tmp_path / "made-1.0-py3-none-any.whl", "w") as made:
        made.writestr("made.py", "")
        made.writestr("made-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n")
        made.writestr("made-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr("made-1.0.dist-info/RECORD", "")
    content = (tmp_path / "made-1.0-py3-none-any.whl").read_bytes()
    for end, piece in (("aa", content[:300]), ("ab", content[300:])):
        (wheels / f"made-1.0-py3-none-any.whl.{end}").write_bytes(piece)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nls "${{PYTHONPATH%%:*}}" > {tmp_path}/site\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    changed = {"WHEELS": str(wheels), "PYTHON": str(python), "PROVIDER": "cpu", "NETS": "vgg19", "LIMIT": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), str(out)], env=os.environ | changed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {"gpu.json", "gpu.md", "gpu.log"}
    statuses = {step["name"]: step["status"] for step in json.loads((out / "gpu.json").read_text("utf-8"))["steps"]}
    assert statuses["speedup vgg19"] == "out of time"
    assert statuses["rivals vgg19"] == "skipped"
    assert "made.py" in (tmp_path / "site").read_text().split()
