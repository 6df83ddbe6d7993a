"""Calibration and evaluation data by name, for every option that takes data.

FILE.npz                       arrays: `images` (or `x`), or one for each model input; `labels` (or `y`)
FOLDER                         a tree of class folders; `#classes=FILE` names them in label order, one a line
FILE.parquet, FILE.arrow       a table; `#image=COLUMN,label=COLUMN` where the columns leave a choice
FOLDER                         saved by Hugging Face `datasets`; `#split=NAME` where there are several
package.module:function        Python code that gives batches; it runs, so only the user names it
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.array_data import ArrayData as ArrayData
from rsi_deploy.data.array_data import NamedData as NamedData
from rsi_deploy.data.array_data import read_arrays, told_apart
from rsi_deploy.data.arrow_data import ArrowData as ArrowData
from rsi_deploy.data.arrow_files import SUFFIXES, table_files
from rsi_deploy.data.callable_data import CallableData as CallableData
from rsi_deploy.data.callable_data import callable_data, is_callable_spec
from rsi_deploy.data.dataset import ColumnError, UndecidedData, existing
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
    """Open data by the name that was typed; see the module's docstring for the forms.

    Args:
        path: file, folder or `package.module:function`, with choices behind a `#`.
        classes: for a folder tree, the class folders in label order; without it they are sorted by name.
        specs: the model's inputs, as far as they are known: what has the name of one is no label.
        labelled: whether labels are of interest; else columns that may be labels are not looked at.

    Raises:
        UsageError: nothing there, an unknown format, unknown keys or columns, labels that do not fit, no samples,
            pyarrow missing for a table.
    """
    path, choices = split_choices(str(path))
    if is_callable_spec(path):
        _refuse_unknown(path, choices, ())
        return callable_data(path)
    location = existing(Path(path))
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
    return told_apart(read_arrays(location), str(location), specs, labelled=labelled)


def open_undecided(path: str | Path) -> Dataset:
    """As `open_data`, for a model whose inputs are not known yet: what they may decide is refused later.

    Raises:
        UsageError: as `open_data`, but for names that leave a choice and labels that are none.
    """
    try:
        return open_data(path)
    except ColumnError as problem:
        undecided: Any = UndecidedData(problem, lambda specs: open_data(path, specs=specs))
        found: Dataset = undecided
        return found


def check_exists(path: str | Path) -> None:
    """Refuse, before any work, a name with no data at it.

    Raises:
        UsageError: says what was expected.
    """
    location, _ = split_choices(str(path))
    if not is_callable_spec(location):
        existing(Path(location))


def split_choices(text: str) -> tuple[str, dict[str, str]]:
    """The name and the choices behind its `#`; a path with a `#` of its own is taken as it is.

    Example:
        >>> split_choices("cifar100#split=test,label=fine_label")
        ('cifar100', {'split': 'test', 'label': 'fine_label'})

    Raises:
        UsageError: choices that are not KEY=VALUE.
    """
    name, mark, tail = text.rpartition("#")
    if not mark or Path(text).exists():
        return text, {}
    pairs = [part.partition("=") for part in tail.split(",")]
    if not all(key and equals and value for key, equals, value in pairs):
        raise UsageError(
            f"data: behind the # go choices such as split=test,label=fine_label, but got {tail!r}"
            f"; type {name}#split=NAME"
        )
    return name, {key: value for key, _, value in pairs}


def _may_be_table(location: Path, choices: dict[str, str]) -> bool:
    return not (location.is_dir() and "classes" in choices)


def _refuse_unknown(path: str, choices: dict[str, str], known: Sequence[str]) -> None:
    if unknown := [key for key in choices if key not in known]:
        takes = f"{', '.join(known)} behind the #" if known else "nothing behind a #"
        raise UsageError(f"data: {path} takes {takes}, but got {', '.join(unknown)}")


def _refuse_classes(path: Path, classes: Sequence[str] | None) -> None:
    if classes is not None:
        raise UsageError(f"data: {path} carries class numbers already; a class list is for folder trees alone")


def _class_list(file: str) -> list[str]:
    try:
        lines = read_document(file).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"data: the class list {file} cannot be read: {error}; one class name a line") from error
    return [line.strip() for line in lines if line.strip()]


def _need_pyarrow(location: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UsageError(f"data: reading {location} needs pyarrow; type: pip install 'rsi-deploy[data]'") from error
