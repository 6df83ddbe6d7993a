"""The reader of the project's JSON documents: report.json and sweep.json."""

from pathlib import Path
from typing import TypeVar

import pydantic

from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.documents import read_document

Document = TypeVar("Document", bound=pydantic.BaseModel)


def read_json(path: Path, model: type[Document], what: str) -> Document:
    """Return the document in a JSON file.

    Args:
        path: the file.
        model: class of the document.
        what: what the document is, for the message.

    Raises:
        ModelError: the file is no such document; the message has the first reason.
    """
    try:
        return model.model_validate_json(read_document(path))
    except (pydantic.ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ModelError(f"{path} is no {what}: {where}: {first['msg']}; make it again") from error
