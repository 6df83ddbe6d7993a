"""`--target triton`: a model repository for NVIDIA Triton, optionally with the dense model for A/B tests.

    DIR/models/NAME/config.pbtxt
    DIR/models/NAME/1/model.onnx  [model.py]     dense, as another version
    DIR/models/NAME/2/model.onnx  [model.py]     compressed (1 without a dense version)
    DIR/models/NAME-dense/...                    dense, under another name
    DIR/README.md

Triton's onnxruntime backend runs model.onnx. On servers without it, the Python backend runs model.py.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rsi_deploy.core.types import Array
from rsi_deploy.packaging import shipped
from rsi_deploy.packaging.result import copy_model, tensor_lines
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.packaging.triton_config import TritonSettings, config_text
from rsi_deploy.runtime.feeds.values import is_text

DenseAs = Literal["version", "name"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A directory of a repository: its name, and its versions from 1 on."""

    name: str
    versions: tuple[Servable, ...]


def entries(name: str, model: Servable, dense: Servable | None, dense_as: DenseAs) -> tuple[Entry, ...]:
    """Return the directories of the repository. Versions of one name share a config: both are batched or neither is."""
    if dense is None:
        return (Entry(name=name, versions=(model,)),)
    if dense_as == "name":
        return (Entry(name=name, versions=(model,)), Entry(name=f"{name}-dense", versions=(dense,)))
    why = model.unbatchable or dense.unbatchable
    return (Entry(name=name, versions=(dense, replace(model, unbatchable=why))),)


def write_repository(folder: Path, repository: Sequence[Entry], settings: TritonSettings) -> None:
    """Write the model repository into `folder`, a new folder.

    Raises:
        ModelError: Triton does not support the type or shape of a tensor.
    """
    for entry in repository:
        directory = folder / entry.name
        directory.mkdir(parents=True)
        text = config_text(entry.name, entry.versions[-1], settings, versions=len(entry.versions))
        (directory / "config.pbtxt").write_text(text, encoding="utf-8", newline="\n")
        for number, model in enumerate(entry.versions, start=1):
            copy_model(model.model, directory / str(number))
            if settings.backend == "python":
                shutil.copyfile(Path(shipped.__path__[0]) / "triton_model.py", directory / str(number) / "model.py")


def write_triton(folder: Path, repository: Sequence[Entry], settings: TritonSettings) -> None:
    """Write the repository and its README into `folder`."""
    write_repository(folder / "models", repository, settings)
    (folder / "README.md").write_text(_readme(repository, settings), encoding="utf-8")


def _readme(repository: Sequence[Entry], settings: TritonSettings) -> str:
    model, name = repository[0].versions[-1], repository[0].name
    gpus = " --gpus all" if settings.device == "gpu" else ""
    lines = [
        f"# {model.facts.source.model}, compressed, for NVIDIA Triton",
        "",
        f"`models/` is a model repository for the {settings.backend} backend:",
        "",
        "```sh",
        f"docker run --rm{gpus} --shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 \\",
        '    -v "$PWD/models:/models:ro" nvcr.io/nvidia/tritonserver:YY.MM-py3 tritonserver --model-repository=/models',
        f"curl -sf localhost:8000/v2/models/{name}/ready && curl -s localhost:8000/v2/models/{name}/config",
        "```",
        "",
        "(`YY.MM` is the release to run; without docker: `tritonserver --model-repository=$PWD/models`.)",
    ]
    if settings.backend == "python":
        package = "onnxruntime-gpu" if settings.device == "gpu" else "onnxruntime"
        lines += [f"The server's Python needs `pip install numpy {package}`; the backend runs `model.py` in it."]
    parts = (tensor_lines(model), _client(name, model), _batching(model, settings), _dense(repository))
    return "\n".join([*lines, *(line for part in parts for line in ("", *part)), ""])


def _client(name: str, model: Servable) -> list[str]:
    """Return an example of a client."""
    arrays = {tensor.name: model.feeds[tensor.name] for tensor in model.inputs}
    return [
        "```python",
        "import numpy as np",
        "import tritonclient.http as triton",
        "from tritonclient.utils import np_to_triton_dtype",
        "",
        'client = triton.InferenceServerClient("localhost:8000")',
        "arrays = {",
        *(f"    {json.dumps(key)}: {_zeros(array, batched=not model.unbatchable)}," for key, array in arrays.items()),
        "}",
        "inputs = [triton.InferInput(n, a.shape, np_to_triton_dtype(a.dtype)) for n, a in arrays.items()]",
        "for value, array in zip(inputs, arrays.values()):",
        "    value.set_data_from_numpy(array)",
        f'answer = client.infer("{name}", inputs).as_numpy({json.dumps(model.outputs[0].name)})',
        "```",
    ]


def _zeros(array: Array, *, batched: bool) -> str:
    """Return Python code for an array as a client sends it: scalars as one number, texts as bytes."""
    shape = array.shape if array.ndim > batched else (*array.shape, 1)
    return f'np.full({shape}, b"", object)' if is_text(array.dtype) else f'np.zeros({shape}, "{array.dtype}")'


def _batching(model: Servable, settings: TritonSettings) -> list[str]:
    if model.unbatchable:
        return [f"Requests are not batched: {model.unbatchable}."]
    return [
        f"Up to {settings.max_batch} samples share a run, and a request waits at most {settings.max_delay_ms:g} ms for "
        "others (`dynamic_batching` in config.pbtxt). A run has shown that samples do not affect each other.",
    ]


def _dense(repository: Sequence[Entry]) -> list[str]:
    """Return how to reach the dense model."""
    if len(repository) > 1:
        return [f"A/B: `{repository[0].name}` is the compressed model, `{repository[1].name}` the dense one."]
    if len(repository[0].versions) > 1:
        return [
            f"A/B: version 2 of `{repository[0].name}` is the compressed model, version 1 the dense one; "
            'a request without a version gets 2. `client.infer(..., model_version="1")` runs the dense one.'
        ]
    return ["The dense model is not included; `rsi-deploy package --dense FILE.onnx` adds it for A/B tests."]
