"""`--target triton`: a model repository for NVIDIA Triton, with the dense model beside the compressed one for A/B.

    DIR/models/NAME/config.pbtxt
    DIR/models/NAME/1/model.onnx  [model.py]     dense, where it is another version
    DIR/models/NAME/2/model.onnx  [model.py]     compressed (1 without a dense version)
    DIR/models/NAME-dense/...                    dense, where it is another name
    DIR/README.md

Triton's onnxruntime backend runs model.onnx; model.py is for the Python backend, on servers that have only that.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rsi_deploy.core.types import Array
from rsi_deploy.packaging import shipped
from rsi_deploy.packaging.result import copy_model, described
from rsi_deploy.packaging.servable import Servable
from rsi_deploy.packaging.triton_config import TritonSettings, config_text
from rsi_deploy.runtime.feeds.values import is_text

DenseAs = Literal["version", "name"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One directory of a repository: its name, and its versions from 1 on."""

    name: str
    versions: tuple[Servable, ...]


def entries(name: str, model: Servable, dense: Servable | None, dense_as: DenseAs) -> tuple[Entry, ...]:
    """What the repository holds; versions of one name share one config, so both batch or neither does."""
    if dense is None:
        return (Entry(name=name, versions=(model,)),)
    if dense_as == "name":
        return (Entry(name=name, versions=(model,)), Entry(name=f"{name}-dense", versions=(dense,)))
    why = model.unbatchable or dense.unbatchable
    return (Entry(name=name, versions=(dense, replace(model, unbatchable=why))),)


def write_repository(folder: Path, held: Sequence[Entry], settings: TritonSettings) -> None:
    """Write the model repository into `folder`, which is made.

    Raises:
        ModelError: a tensor of a type or shape that Triton has not.
    """
    for entry in held:
        place = folder / entry.name
        place.mkdir(parents=True)
        text = config_text(entry.name, entry.versions[-1], settings, versions=len(entry.versions))
        (place / "config.pbtxt").write_text(text, encoding="utf-8", newline="\n")
        for number, model in enumerate(entry.versions, start=1):
            copy_model(model.model, place / str(number))
            if settings.backend == "python":
                shutil.copyfile(Path(shipped.__path__[0]) / "triton_model.py", place / str(number) / "model.py")


def write_triton(folder: Path, held: Sequence[Entry], settings: TritonSettings) -> None:
    """Write the repository and its README into `folder`."""
    write_repository(folder / "models", held, settings)
    (folder / "README.md").write_text(_readme(held, settings), encoding="utf-8")


def _readme(held: Sequence[Entry], settings: TritonSettings) -> str:
    model, name = held[0].versions[-1], held[0].name
    gpus = " --gpus all" if settings.device == "gpu" else ""
    lines = [
        f"# {model.report.source.model}, compressed, for NVIDIA Triton",
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
    lines += ["", *described(model), "", *_client(name, model), "", *_batching(model, settings), "", *_dense(held), ""]
    return "\n".join(lines)


def _client(name: str, model: Servable) -> list[str]:
    """How to ask, with `tritonclient`."""
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
    """An array of that shape in Python, as a client sends it: a scalar (of a sample) is one number, a text bytes."""
    shape = array.shape if array.ndim > batched else (*array.shape, 1)
    return f'np.full({shape}, b"", object)' if is_text(array.dtype) else f'np.zeros({shape}, "{array.dtype}")'


def _batching(model: Servable, settings: TritonSettings) -> list[str]:
    if model.unbatchable:
        return [f"Requests are not put together: {model.unbatchable}."]
    return [
        f"Up to {settings.max_batch} samples share a run, and a request waits at most {settings.max_delay_ms:g} ms for "
        "others (`dynamic_batching` in config.pbtxt). That samples do not mix was seen on a run.",
    ]


def _dense(held: Sequence[Entry]) -> list[str]:
    """How to reach the dense model, where there is one."""
    if len(held) > 1:
        return [f"A/B: `{held[0].name}` is the compressed model, `{held[1].name}` the dense one."]
    if len(held[0].versions) > 1:
        return [
            f"A/B: version 2 of `{held[0].name}` is the compressed model, version 1 the dense one; "
            'a request without a version gets 2. `client.infer(..., model_version="1")` asks the dense one.'
        ]
    return ["The dense model is not here; `rsi-deploy package --dense FILE.onnx` puts it beside this one for A/B."]
