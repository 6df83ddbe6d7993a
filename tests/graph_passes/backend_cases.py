"""The cases of the ONNX backend suite, as the `onnx` wheel carries them, with the weights baked in.

node: made in memory by the suite's own code; simple, pytorch-converted, pytorch-operator: folders of models and data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.backend.test import loader
from onnx.backend.test.case.node import collect_testcases

from graph_passes.operators import PASSES, UNSPLIT

FOLDERS = ("simple", "pytorch-converted", "pytorch-operator")
WEIGHT_OPERANDS = {(each.domain, each.op_type): each.operands for each in PASSES} | dict(UNSPLIT)


@dataclass(frozen=True)
class Case:
    """A model with everything but its data baked in, and that data."""

    name: str
    model: onnx.ModelProto
    feeds: dict[str, Any]


def cases() -> Iterator[Case]:
    """Every case; one whose product has two inputs comes once with each of them as the weight."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = [(case.name, case.model, case.data_sets[0][0]) for case in collect_testcases(None)]
    for name, model, inputs in [*made, *_stored()]:
        names = [value.name for value in model.graph.input]
        given = {initializer.name for initializer in model.graph.initializer}
        free = [name for name in names if name not in given]
        arrays = [np.asarray(a) if isinstance(a, np.generic) else a for a in inputs]
        feeds = dict(zip(free, arrays, strict=False))
        candidates = _weights(model, feeds)
        yield Case(name, *_baked(model, feeds, free[:1] if candidates - set(free[:1]) else free))
        if set(free[:1]) & candidates and len(free) > 1:
            yield Case(f"{name}, weight first", *_baked(model, feeds, free[1:2]))


def _stored() -> Iterator[tuple[str, onnx.ModelProto, list[Any]]]:
    for folder in FOLDERS:
        for case in loader.load_model_tests(kind=folder):
            directory = Path(case.model_dir)
            model = onnx.load(directory / "model.onnx")
            files = sorted((directory / "test_data_set_0").glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            yield case.name, model, [_read(file, value.type) for file, value in zip(files, model.graph.input)]  # noqa: B905


def _read(file: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(file.read_bytes()))
    return numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))


def _weights(model: onnx.ModelProto, feeds: dict[str, Any]) -> set[str]:
    """Inputs that some operator takes where a weight may stand."""
    return {
        node.input[operand]
        for node in model.graph.node
        for operand in WEIGHT_OPERANDS.get((node.domain, node.op_type), ())
        if operand < len(node.input) and node.input[operand] in feeds
    }


def _baked(model: onnx.ModelProto, feeds: dict[str, Any], kept: list[str]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model with all inputs but `kept` as initializers, and the feeds that are left."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for name, array in feeds.items():
        if name in kept or not hasattr(array, "dtype"):
            continue
        copy.graph.initializer.append(numpy_helper.from_array(array, name))
        if copy.ir_version >= 4:
            copy.graph.input.remove(next(value for value in copy.graph.input if value.name == name))
    return copy, {n: a for n, a in feeds.items() if n in kept or not hasattr(a, "dtype")}
