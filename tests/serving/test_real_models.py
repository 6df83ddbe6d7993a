"""The project's benchmark nets, served: tritonclient gets the outputs of onnxruntime. It takes minutes: `-m slow`."""

import numpy as np
import pytest
from served import Server, alone

from bench import models
from rsi_deploy import export

pytest.importorskip("tritonclient.http", reason="needs the extra serve: pip install 'rsi-deploy[serve]'")
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

pytestmark = pytest.mark.slow


def source(name):
    """Return a net for `export`, and inputs."""
    try:
        if name == "minilm":
            ids, mask = models.tokenize(models.sentences(8), 128)
            return models.minilm(128), {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        inputs = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
        return models.trained(name), {"input": inputs}
    except models.UnavailableError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("engine", ["own", pytest.param("ray", marks=pytest.mark.ray)])
@pytest.mark.parametrize("name", ["resnet56", "minilm"])
def test_tritonclient_gets_what_onnxruntime_says(tmp_path, name, engine):
    if engine == "ray":
        pytest.importorskip("ray.serve", reason="no ray here: pip install 'rsi-deploy[ray]'")
    net, feeds = source(name)
    shape = None if name == "minilm" else (1, 3, 32, 32)
    export(net, tmp_path / name, rank="25%", measure=False, input_shape=shape)
    (output, want), *_ = alone(tmp_path / name / "model.onnx", feeds).items()
    ways = [(tritonclient.http, True), (tritonclient.http, False), (tritonclient.grpc, True)]
    ports = (0, 0) if engine == "own" else (0, None)
    with Server(tmp_path / name, "--engine", engine, ends_within=60, ports=ports) as server:
        for module, binary in ways[: 3 if server.grpc else 2]:
            client = module.InferenceServerClient(server.http if module is tritonclient.http else server.grpc)
            kind = {"binary_data": binary} if module is tritonclient.http else {}
            put = [module.InferInput(n, a.shape, np_to_triton_dtype(a.dtype)) for n, a in feeds.items()]
            for tensor, array in zip(put, feeds.values(), strict=True):
                tensor.set_data_from_numpy(array, **kind)
            found = client.infer(name, put, outputs=[module.InferRequestedOutput(output, **kind)]).as_numpy(output)
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())
            with pytest.raises(AssertionError):
                np.testing.assert_allclose(found[::-1], want, rtol=0, atol=1e-4 * np.abs(want).max())
