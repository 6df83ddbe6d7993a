"""What imports what, and what is public: properties of the whole that no module can hold alone."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rsi_deploy

ROOT = Path(rsi_deploy.__file__).parents[1]
OURS = {"rsi_deploy", "graph_passes", "bench", "samples", "tests"}

PUBLIC = {
    "AccuracyResult",
    "BenchResult",
    "CostTable",
    "ExportConfig",
    "GateError",
    "ModelError",
    "PackageResult",
    "Preprocessing",
    "Report",
    "RsiDeployError",
    "SiteRecord",
    "SweepConfig",
    "UsageError",
    "__version__",
    "bench",
    "compress_",
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


@pytest.mark.parametrize(
    "name",
    [
        "planning.planner",
        "core.errors",
        "data.preprocess",
        "data.sources",
        "runtime.machine",
        "runtime.feeds.inputs",
        "cli.export",
        "io.manifest",
    ],
)
def test_what_needs_no_torch_imports_none(name):
    for imported in imports(ROOT / "rsi_deploy" / f"{name.replace('.', '/')}.py"):
        assert imported.split(".")[0] not in {"torch", "torchvision"}, imported


def lint_imports(folder):
    """import-linter with the contracts of pyproject.toml, on the packages in `folder`."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True)


def test_rooms_import_only_the_rooms_below_them():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("rsi_deploy/core/arrays.py", "import rsi_deploy.io.atomic"),  # upwards
        ("rsi_deploy/io/atomic.py", "import rsi_deploy.io.bundle"),  # in a circle
        ("graph_passes/weights.py", "import torch"),
        ("rsi_deploy/linalg/memory.py", "import onnx"),
        ("rsi_deploy/serving/bundles.py", "import rsi_deploy.planning.budget"),
        ("rsi_deploy/loose/__init__.py", ""),  # a room without a place
    ],
)
def test_a_wrong_import_is_seen(tmp_path, module, line):
    for package in ("rsi_deploy", "graph_passes"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    file = tmp_path / module
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text(encoding="utf-8") if file.exists() else "") + f"\n{line}\n", encoding="utf-8")
    assert lint_imports(tmp_path).returncode == 1


def test_no_module_lies_loose_and_no_room_is_crowded():
    files = {path.name for path in (ROOT / "rsi_deploy").glob("*.py")}
    assert files == {"__init__.py", "__main__.py"}
    for folder in {path.parent for path in modules("rsi_deploy")}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= 17, folder


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


def test_no_public_class_name_means_two_things():
    names = [
        node.name
        for package in ("rsi_deploy", "graph_passes")
        for file in modules(package)
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name in names if names.count(name) > 1] == []


def test_only_the_command_line_prints():
    for file in modules("rsi_deploy"):
        if dotted(file) in ("report.tables.report",):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            assert called != "print", file
