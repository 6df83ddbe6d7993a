"""A model for Triton's Python backend: it runs model.onnx in this folder. It needs only onnxruntime and numpy.

Requests that Triton has joined share a run. If that run fails, each of them runs alone, so that only the faulty one
fails. Triton checks names, types and shapes against config.pbtxt. It has no scalars; they are sent as one number.
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
    """The class that the backend needs: it calls `initialize` once and `execute` for every batch of requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the model. An instance for a GPU does not start without one."""
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
        provider = providers[0] if isinstance(providers[0], str) else providers[0][0]
        if self.session.get_providers()[0] != provider:
            raise pb_utils.TritonModelException(f"{provider} did not start; install onnxruntime-gpu, or use KIND_CPU")

    def execute(self, requests: list[Any]) -> list[Any]:
        """Return one response for each request, in their order."""
        if not self.batched or len(requests) == 1:
            return [self._alone(request) for request in requests]
        feeds = [self._feeds(request) for request in requests]
        try:
            joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.inputs}
            outputs = self.session.run(self.outputs, joined)
        except Exception:
            return [self._alone(request) for request in requests]
        ends = np.cumsum([len(feed[self.inputs[0]]) for feed in feeds])[:-1]
        parts = [np.split(output, ends) for output in outputs]
        return [self._response(request, [part[index] for part in parts]) for index, request in enumerate(requests)]

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
        requested = set(request.requested_output_names())
        tensors = [
            pb_utils.Tensor(name, _bytes(array) if array.dtype.kind in "OU" else np.ascontiguousarray(array))
            for name, array in zip(self.outputs, map(np.atleast_1d, outputs), strict=True)
            if name in requested
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


def _texts(array: Any) -> Any:
    """Return Triton's strings, which are bytes, as str for onnxruntime."""
    return np.array([value.decode() for value in array.reshape(-1)], dtype=object).reshape(array.shape)


def _bytes(array: Any) -> Any:
    return np.array([str(value).encode() for value in array.reshape(-1)], dtype=object).reshape(array.shape)
