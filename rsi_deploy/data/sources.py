"""Open calibration and evaluation data by path or name.

FILE.npz                       arrays: `images` (or `x`), or one for each model input; `labels` (or `y`)
FOLDER                         a folder of class folders; `#classes=FILE` lists them in label order, one per line
FILE.parquet, FILE.arrow       a table; `#image=COLUMN,label=COLUMN` if several columns match
FOLDER                         saved by Hugging Face `datasets`; `#split=NAME` if there are several
package.module:function        a Python function that returns batches; its code runs, so only the user may name it
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.array_data import ArrayData as ArrayData
from rsi_deploy.data.array_data import NamedData as NamedData
from rsi_deploy.data.array_data import identify_arrays, read_arrays
from rsi_deploy.data.arrow_data import ArrowData as ArrowData
from rsi_deploy.data.arrow_files import SUFFIXES, table_files
from rsi_deploy.data.callable_data import CallableData as CallableData
from rsi_deploy.data.callable_data import callable_data, is_callable_spec
from rsi_deploy.data.dataset import ColumnError, UndecidedData, require_existing
from rsi_deploy.data.dataset import Dataset as Dataset
from rsi_deploy.data.folder_data import ImageFolderData as ImageFolderData
from rsi_deploy.io.documents import read_document
from rsi_deploy.runtime.feeds.inputs import InputSpec


def open_data(
    path: str | Path,
    classes: Sequence[str] | None = None,
    *,
    specs: Sequence[InputSpec] = (),
    labelled: bool = True,
) -> Dataset:
    """Open data in one of the forms in the module's docstring.

    Args:
        path: file, folder or `package.module:function`, optionally with choices after a `#`.
        classes: for a folder of class folders, their names in label order; None sorts them by name.
        specs: inputs of the model, if they are known; arrays with their names are not labels.
        labelled: whether labels are needed; if not, columns that may be labels are ignored.

    Raises:
        UsageError: The data do not exist, have an unknown format or no samples, keys, columns or labels are invalid,
            or pyarrow is missing for a table.
    """
    path, choices = split_choices(str(path))
    if is_callable_spec(path):
        _refuse_unknown(path, choices, ())
        return callable_data(path)
    location = require_existing(Path(path))
    if location.suffix in SUFFIXES or location.is_dir():
        files = table_files(location, choices.get("split", "")) if _may_be_table(location, choices) else []
        if files:
            _refuse_unknown(path, choices, ("split", "image", "label"))
            _refuse_classes(location, classes)
            _need_pyarrow(location)
            image, label = (choices.get(key, "") for key in ("image", "label"))
            return ArrowData(files, path, image=image, label=label, inputs=[s.name for s in specs], labelled=labelled)
    if location.is_dir():
        _refuse_unknown(path, choices, ("classes",))
        return ImageFolderData(location, _class_list(choices["classes"]) if "classes" in choices else classes)
    if location.suffix.lower() != ".npz":
        raise UsageError(
            f"data: {path} is neither an .npz, .parquet or .arrow file nor a folder of class folders or of a saved "
            f"Hugging Face data set"
        )
    _refuse_unknown(path, choices, ())
    _refuse_classes(location, classes)
    return identify_arrays(read_arrays(location), str(location), specs, labelled=labelled)


def open_undecided(path: str | Path) -> Dataset:
    """Open data for a model whose inputs are not known yet; ambiguous names raise an error later.

    Raises:
        UsageError: As `open_data`, except for ambiguous names and invalid labels.
    """
    try:
        return open_data(path)
    except ColumnError as problem:
        undecided: Any = UndecidedData(problem, lambda specs: open_data(path, specs=specs))
        found: Dataset = undecided
        return found


def check_exists(path: str | Path) -> None:
    """Refuse a path or name without data, before any work.

    Raises:
        UsageError: The message says what was expected.
    """
    location, _ = split_choices(str(path))
    if not is_callable_spec(location):
        require_existing(Path(location))


def split_choices(text: str) -> tuple[str, dict[str, str]]:
    """Split a name from the choices after its `#`; a path that contains a `#` stays whole.

    Example:
        >>> split_choices("cifar100#split=test,label=fine_label")
        ('cifar100', {'split': 'test', 'label': 'fine_label'})

    Raises:
        UsageError: A choice is not KEY=VALUE.
    """
    name, mark, tail = text.rpartition("#")
    if not mark or Path(text).exists():
        return text, {}
    pairs = [part.partition("=") for part in tail.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise UsageError(
            f"data: choices after the # must be KEY=VALUE, such as split=test,label=fine_label, but got {tail!r}",
            hint=f"type {name}#split=NAME",
        )
    return name, {key: value for key, _, value in pairs}


def _may_be_table(location: Path, choices: dict[str, str]) -> bool:
    return not (location.is_dir() and "classes" in choices)


def _refuse_unknown(path: str, choices: dict[str, str], known: Sequence[str]) -> None:
    if unknown := [key for key in choices if key not in known]:
        takes = f"{', '.join(known)} after the #" if known else "nothing after a #"
        raise UsageError(f"data: {path} takes {takes}, but got {', '.join(unknown)}")


def _refuse_classes(path: Path, classes: Sequence[str] | None) -> None:
    if classes is not None:
        raise UsageError(
            f"data: {path} already has class numbers", hint="a class list is only for folders of class folders"
        )


def _class_list(file: str) -> list[str]:
    try:
        lines = read_document(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"data: the class list {file} cannot be read: {error}", hint="write one class name per line"
        ) from error
    return [line.strip() for line in lines if line.strip()]


def _need_pyarrow(location: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"data: reading {location} needs pyarrow", hint="type: pip install 'rsi-deploy[data]'"
        ) from error
