import ast
import sys
from pathlib import Path

import graph_passes

ALLOWED = {"numpy", "onnx", "onnx_ir", "ml_dtypes", "graph_passes"}
STANDARD = sys.stdlib_module_names


def test_public_names():
    assert graph_passes.__all__ == [
        "PASSES",
        "Contraction",
        "Dense",
        "ExecutedNode",
        "FactorSource",
        "Fold",
        "FoldBatchNormPass",
        "FoldPermutationsPass",
        "FoldPermutationsResult",
        "FoldResult",
        "FoldUnitsPass",
        "FoldUnitsResult",
        "Form",
        "Keep",
        "Macs",
        "NotCounted",
        "Record",
        "RowOrder",
        "Site",
        "Skip",
        "Split",
        "SplitFactors",
        "SplitPass",
        "SplitResult",
        "Splitter",
        "Units",
        "Window",
        "count_macs",
        "count_parameters",
        "drawn_factors",
        "find_pass",
        "find_sites",
        "fold_splits",
        "in_memory",
        "joint_groups",
        "multiplies_by_weights",
        "paused_collector",
        "split",
        "split_by_site",
        "why_not_counted",
    ]
    assert all(hasattr(graph_passes, name) for name in graph_passes.__all__)


def test_imports_stay_within_numpy_and_onnx():
    for file in Path(graph_passes.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= ALLOWED | STANDARD, file
