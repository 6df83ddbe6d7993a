"""What imports what, and what is public: properties of the whole that no module can hold alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rsi_deploy

ROOT = Path(rsi_deploy.__file__).parents[1]
OURS = {"rsi_deploy", "graph_passes", "bench", "samples", "tests"}

# A module may import modules of a lower layer, and those of its own that stand before it in the line.
LAYERS = """
kernel.onednn kernel.rates kernel.gemm kernel.orthogonal kernel.products kernel.factors kernel.checks kernel.chebyshev
kernel.batched kernel.direct kernel.gram kernel.exact kernel.krylov kernel.adaptive kernel.certified kernel.cost
kernel.solve kernel.memory
errors steps error_texts error_table gateway.documents gateway.limits locks atomic manifest rsi together arrays spectra
gateway.onnx_parts gateway.onnx_maps gateway.onnx_tensors gateway.onnx_names gateway.onnx_nodes gateway.onnx_sizes
gateway.onnx_growth
gateway.onnx_reader broken_models gateway.archives gateway.arrays gateway.pictures gateway.system_files
gateway.programs report.text
calibrate.moments calibrate.streams calibrate.metric calibrate.response calibrate.alternating
plan.knapsack plan.bracket plan.budget plan.rank_grid plan.plan_file
plan.planner plan.error_rank fold layers checkpoint measure.machine measure.statistics measure.sections measure.pinning
measure.preprocess datafile found_splits onnx_file factor_errors sites plan.joint
measure.values measure.answer_outputs measure.batch_axes measure.inputs measure.given_feeds measure.model_pictures
measure.dataset
measure.sample_rows measure.array_data measure.folder_data measure.arrow_files measure.arrow_data
measure.callable_data measure.data measure.feeding measure.intervals measure.paired measure.scores
measure.providers measure.provider_spec measure.sessions measure.batch_independence measure.profile_events
measure.placement measure.binding
measure.timing measure.loadgen_worker measure.loadgen
crew ray_connection ray_crew resuming computed_weights compress source factor_source onnx_split probe bundle
exporting.given
calibrate.calibration_data calibrate.calibrated
calibrate.gathered calibrate.live_values calibrate.onnx_waves calibrate.onnx_rows calibrate.onnx_segment
calibrate.onnx_operators calibrate.onnx_reach calibrate.onnx_readings calibrate.onnx_checked calibrate.onnx_fed
calibrate.onnx_survey calibrate.onnx_gradients
calibrate.onnx_two_streams calibrate.onnx_streams
calibrate.torch_rows calibrate.torch_calls calibrate.torch_readings calibrate.torch_runs
calibrate.torch_gradients calibrate.torch_trace calibrate.torch_streams
to_onnx measure.zipmap_columns measure.answers measure.tally measure.accuracy measure.result
measure.arms measure.blocks measure.latency measure.float16 measure.profiling measure.concurrency
measure.worker measure.processes measure.request measure.sample_feeds measure.matrix
node_index trace gates opset bound rewriting
measure.cost_table measure.cost_cache measure.site_models measure.site_timing measure.blank_models measure.trial_plans
timing.costing
measure.gate measure.compare
report.schema dense_size diagnosis inspection
plan.request calibrate.certificate plan.decide plan.in_time compress_to_data
report.cost_summary report.theme report.svg report.plots report.page report.charts report.html
report.page_environment report.page_latency report.page_cells report.page_costs report.page_load report.page_bench
report.summary report.accuracy_table report.comparison_table report.loadgen_table report.bench_table report.card
report.page_errors report.page_sites report.page_report verification report.table
packaging.shipped.triton_model packaging.shipped.ray_app
packaging.yaml_text packaging.replicas
packaging.servable packaging.result packaging.ort_format packaging.triton_config packaging.triton packaging.kserve
packaging.ray_serve
packaging.packing
sweeps.points report.page_sweep sweeps.kept timing.timed_export calibrating stages
timing.joint_or_apart timing.last_word timing.part_of_time
exporting.found exporting.room exporting.written exporting.run pipeline sweeps.making sweeps.ray_points
sweeps.side_by_side sweeps.sweeping
serving.refusal serving.ports serving.bundles serving.tensors serving.signature serving.model serving.requests
serving.images serving.shadow serving.metrics serving.catalog serving.frames serving.worker serving.workers
serving.queues serving.batches serving.service serving.access_log serving.transport serving.http_body serving.http_app
serving.grpc_app serving.watching serving.front serving.merging serving.ray_grpc serving.ray_app
serving.ray_engine serving.server
cli.signals cli.options cli.progress_lines cli.terminal cli.gating cli.page
cli.export cli.profile cli.sweep cli.inspect cli.bench_options cli.bench cli.evaluate cli.package cli.verify
cli.serve cli.doctor __main__
"""
POSITION = {
    name: (layer, place)
    for layer, line in enumerate(LAYERS.strip().splitlines())
    for place, name in enumerate(line.split())
}

PUBLIC = {
    "AccuracyResult",
    "BenchResult",
    "CostTable",
    "GateError",
    "ModelError",
    "PackageResult",
    "Preprocessing",
    "Report",
    "RsiDeployError",
    "SiteRecord",
    "UsageError",
    "__version__",
    "bench",
    "compress_",
    "compress_to_data_",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "package",
    "profile",
    "read_report",
    "rewrite",
    "serve",
    "sweep",
    "verify",
}


def imports(file):
    """Every module that a file imports, anywhere in it, written out in full."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(file, package="rsi_deploy"):
    """The modules of the package that a file imports."""
    names = {dotted(path, package) for path in modules(package)}
    for name in imports(file):
        parts = name.split(".")[1:] if name.startswith(f"{package}.") else []
        yield from {".".join(parts[: depth + 1]) for depth in range(2)} & names


def dotted(file, package="rsi_deploy"):
    """A module's name within its package: `measure.data`."""
    return ".".join(file.relative_to(ROOT / package).with_suffix("").parts)


def modules(package):
    return sorted((ROOT / package).glob("**/*.py"))


@pytest.mark.parametrize("package", ["rsi_deploy", "graph_passes"])
def test_packages_import_only_what_they_may(package):
    allowed = {"rsi_deploy": {"rsi_deploy", "graph_passes"}, "graph_passes": {"graph_passes"}}[package]
    for file in modules(package):
        ours = {name.split(".")[0] for name in imports(file)} & OURS
        assert ours <= allowed, file


def test_graph_passes_know_neither_torch_nor_a_runtime():
    for file in modules("graph_passes"):
        assert not {name.split(".")[0] for name in imports(file)} & {"torch", "torchvision", "onnxruntime"}, file


OPENERS = {
    "onnx": {"load", "load_model", "load_model_from_string", "load_from_string", "load_tensor"},
    "onnx_ir": {"load", "from_onnx_text"},
    "ModelProto": {"FromString"},
    "onnxruntime": {"InferenceSession"},
    "torch": {"load"},
    "torch.export": {"load"},
    "numpy": {"load", "loadtxt", "genfromtxt"},
    "pickle": {"load", "loads", "Unpickler"},
    "PIL.Image": {"open"},
    "importlib": {"import_module", "__import__"},
    "yaml": {"load"},
}
"""What opens a file that somebody else may have made, or runs what it holds."""

ALIASES = {"ir": "onnx_ir", "np": "numpy", "Image": "PIL.Image"}

MAY_OPEN = {
    "io/onnx_reader.py": {"ModelProto.FromString"},
    "io/onnx_maps.py": {"ModelProto.FromString"},  # a file that was just written
    "io/pictures.py": {"PIL.Image.open"},
    "io/programs.py": {"torch.export.load"},
    "io/checkpoint.py": {"torch.load"},
    # `package.module:factory` and `package.module:function`: the user names code, and it runs
    "torch_models/model_source.py": {"importlib.import_module"},
    "data/callable_data.py": {"importlib.import_module"},
    # between processes of ours, over a socket pair that nobody else holds
    "serving/engine/frames.py": {"pickle.loads"},
    # names that stand in the file itself: ours, or of packages that we look for
    "__init__.py": {"importlib.import_module"},
    "runtime/doctor.py": {"importlib.import_module"},
    "runtime/providers.py": {"importlib.import_module"},
    # `make_session` checks the file first; what `package` ships runs where it was put, beside its model
    "runtime/sessions.py": {"onnxruntime.InferenceSession"},
    "packaging/shipped/ray_app.py": {"onnxruntime.InferenceSession"},
    "packaging/shipped/triton_model.py": {"onnxruntime.InferenceSession"},
}


def opened(file):
    """The openers that a file calls or imports, written out in full."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not isinstance(node, ast.If) or "TYPE_CHECKING" not in ast.dump(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            whole = ast.unparse(node)
            base, _, name = whole.rpartition(".")
            head, dot, rest = base.partition(".")
            base = ALIASES.get(head, head) + dot + rest
            if name in OPENERS.get(base, ()):
                found.add(f"{base}.{name}")
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names if a.name in OPENERS.get(node.module, ())}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.add(node.func.id)
    return found


def test_files_come_in_through_the_gateway_alone():
    for package in ("rsi_deploy", "graph_passes"):
        for file in modules(package):
            name = file.relative_to(ROOT / package).as_posix()
            assert opened(file) <= MAY_OPEN.get(name, set()), file


@pytest.mark.parametrize(
    "line",
    [
        "import onnx\nonnx.load(p)",
        "import onnx_ir as ir\nir.load(p)",
        "import torch\ntorch.load(p)",
        "from torch import load",
        "import numpy as np\nnp.load(p)",
        "import pickle\npickle.loads(b)",
        "from PIL import Image\nImage.open(p)",
        "eval(p)",
    ],
)
def test_what_opens_a_file_elsewhere_is_seen(tmp_path, line):
    (tmp_path / "module.py").write_text(line)
    assert opened(tmp_path / "module.py")


def test_the_kernel_stands_alone():
    for file in (ROOT / "rsi_deploy" / "linalg/solver.py", *(ROOT / "rsi_deploy" / "kernel").glob("*.py")):
        assert {name for name in within(file) if not name.startswith("kernel")} == set(), file
        assert {name.split(".")[0] for name in imports(file)} <= {"rsi_deploy", "torch", *sys.stdlib_module_names}, file


@pytest.mark.parametrize(
    "name",
    [
        "plan.planner",
        "errors",
        "measure.preprocess",
        "measure.data",
        "measure.machine",
        "measure.inputs",
        "cli.export",
        "manifest",
    ],
)
def test_what_needs_no_torch_imports_none(name):
    for imported in imports(ROOT / "rsi_deploy" / f"{name.replace('.', '/')}.py"):
        assert imported.split(".")[0] not in {"torch", "torchvision"}, imported


def test_every_module_has_its_layer():
    files = {dotted(path) for path in modules("rsi_deploy") if path.stem != "__init__"}
    assert files - POSITION.keys() == set(), "give the new module a layer, as low as it can be"


@pytest.mark.parametrize("name", sorted(POSITION))
def test_imports_point_downwards(name):
    file = ROOT / "rsi_deploy" / f"{name.replace('.', '/')}.py"
    if not file.exists():
        pytest.skip(f"no module {name}")
    for imported in set(within(file)):
        assert POSITION[imported] < POSITION[name], f"{name} imports {imported}"


def test_the_public_names():
    assert set(rsi_deploy.__all__) == PUBLIC
    assert set(dir(rsi_deploy)) == PUBLIC
    assert all(getattr(rsi_deploy, name) is not None for name in PUBLIC)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = rsi_deploy.nonsense


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse((ROOT / "rsi_deploy" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {(alias.name, node.module) for node in block.body for alias in node.names}
    assert seen == {(name, f"rsi_deploy.{home}") for name, home in rsi_deploy._HOMES.items()}


def test_verbs_and_functions_have_the_same_names():
    from rsi_deploy.cli import cli

    names = {"eval": "evaluate", "schema": "Report"}
    assert {names.get(verb, verb) for verb in cli.commands} <= PUBLIC


def test_importing_is_light():
    heavy = {"torch", "onnxruntime", "onnx", "numpy", "pydantic"}
    code = f"import sys, rsi_deploy; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", ["rsi_deploy", "graph_passes"])
def test_every_module_and_public_name_says_what_it_is(package):
    for file in modules(package):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name}"


@pytest.mark.parametrize("package", ["rsi_deploy", "graph_passes"])
def test_it_is_typed(package):
    assert (ROOT / package / "py.typed").exists()


def test_only_the_command_line_prints():
    for file in modules("rsi_deploy"):
        if dotted(file) in ("report.table",):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called != "print", file
