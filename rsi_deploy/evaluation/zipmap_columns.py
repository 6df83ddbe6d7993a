"""The class of each column of a ZipMap's scores; scikit-learn's converters end a classifier with a ZipMap.

ZipMap(classlabels_int64s=[3, 7])      [{3: 0.1, 7: 0.9}, ...]      columns 3, 7; labels of the data are 3 and 7
ZipMap(classlabels_strings=["b", "a"]) [{"a": 0.9, "b": 0.1}, ...]  columns "b", "a"; labels are 0 for "b", 1 for "a"
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.dataset import Labels

ColumnClasses = Sequence[int] | Sequence[str]


def zipmap_columns(model: Path, session: Any) -> dict[str, ColumnClasses]:
    """Return the classes of the columns for each output that is a sequence of maps, in the order of the scores.

    Args:
        model: ONNX file; the result is empty for onnxruntime's own format.
        session: session of the model.
    """
    from rsi_deploy.io.onnx_checks.parts import all_nodes
    from rsi_deploy.io.onnx_reader import read_proto

    tables = {output.name for output in session.get_outputs() if output.type.startswith("seq(map(")}
    if not tables or model.suffix == ".ort":
        return {}
    found: dict[str, ColumnClasses] = {}
    for node in all_nodes(read_proto(model)):
        if node.op_type == "ZipMap" and tables & set(node.output):
            for attribute in node.attribute:
                if attribute.ints:
                    found[node.output[0]] = list(attribute.ints)
                elif attribute.strings:
                    found[node.output[0]] = [text.decode() for text in attribute.strings]
    return found


def class_numbers(labels: Labels | None, ids: ColumnClasses | None, model: str) -> Labels | None:
    """Return the columns of the labels' scores, int64 `(N,)`.

    Args:
        labels: labels of the data: class ids if the model's classes are numbers, else columns.
        ids: classes of the columns; None if the columns are numbered.
        model: model name for messages.

    Raises:
        UsageError: A label is not a class of the model.

    Example:
        >>> class_numbers(np.array([7, 3]), [3, 7], "m.onnx"), class_numbers(np.array([1]), ["b", "a"], "m.onnx")
        (array([1, 0]), array([1]))
    """
    if labels is None or ids is None or isinstance(ids[0], str):
        return labels
    columns = {number: column for column, number in enumerate(ids)}
    if strange := sorted(set(labels.tolist()) - columns.keys()):
        classes = ", ".join(map(str, ids[:10])) + ", ..." * (len(ids) > 10)
        raise UsageError(
            f"{model} has the classes {classes}, but the data have the label {strange[0]}",
            hint="give data with labels that are among them",
        )
    return np.array([columns[label] for label in labels.tolist()], np.int64)
