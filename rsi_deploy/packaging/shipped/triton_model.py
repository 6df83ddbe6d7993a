"""Triton's Python backend: onnxruntime on the model.onnx beside this file. Needs onnxruntime and numpy, nothing else.

Requests that Triton has put together go through the model in one run. Where that run fails, each goes alone, so that
none fails for its neighbour's fault. Names, types and shapes are checked by Triton against config.pbtxt before; Triton
has no scalars, which come and go as one number.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before onnxruntime starts: nothing is sent
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """What the backend looks for: `initialize` once an instance, `execute` for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model; on a GPU it runs there, or the instance does not start."""
        config = json.loads(args["model_config"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]
        self.batched = config["max_batch_size"] > 0
        options = onnxruntime.SessionOptions()
        if threads := config.get("parameters", {}).get("intra_op_thread_count"):
            options.intra_op_num_threads = int(threads["string_value"])
        providers: list[Any] = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            providers = [("CUDAExecutionProvider", {"device_id": args["model_instance_device_id"]}), *providers]
        model = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(model), options, providers=providers)
        self.scalars = [value.name for value in self.session.get_inputs() if not value.shape and not self.batched]
        wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self.session.get_providers()[0] != wanted:
            raise pb_utils.TritonModelException(f"{wanted} did not start; install onnxruntime-gpu, or use KIND_CPU")

    def execute(self, requests: list[Any]) -> list[Any]:
        """One response a request, in their order."""
        if not self.batched or len(requests) == 1:
            return [self._alone(request) for request in requests]
        feeds = [self._feeds(request) for request in requests]
        try:
            together = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
            outputs = self.session.run(self.outputs, together)
        except Exception:
            return [self._alone(request) for request in requests]
        ends = np.cumsum([len(feed[self.inputs[0]]) for feed in feeds])[:-1]
        parts = [np.split(output, ends) for output in outputs]
        return [self._response(request, [part[at] for part in parts]) for at, request in enumerate(requests)]

    def _alone(self, request: Any) -> Any:
        try:
            return self._response(request, self.session.run(self.outputs, self._feeds(request)))
        except Exception as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))

    def _feeds(self, request: Any) -> dict[str, Any]:
        arrays = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        for name in self.scalars:
            arrays[name] = arrays[name].reshape(())
        return {name: _texts(array) if array.dtype.kind == "O" else array for name, array in arrays.items()}

    def _response(self, request: Any, outputs: list[Any]) -> Any:
        wanted = set(request.requested_output_names())
        tensors = [
            pb_utils.Tensor(name, _bytes(array) if array.dtype.kind in "OU" else np.ascontiguousarray(array))
            for name, array in zip(self.outputs, map(np.atleast_1d, outputs), strict=True)
            if name in wanted
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _texts(array: Any) -> Any:
    """Triton's strings are bytes, onnxruntime's are str."""
    return np.array([value.decode() for value in array.reshape(-1)], dtype=object).reshape(array.shape)


def _bytes(array: Any) -> Any:
    return np.array([str(value).encode() for value in array.reshape(-1)], dtype=object).reshape(array.shape)
