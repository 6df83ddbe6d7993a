import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from rsi_deploy.io.external_data import SMALL, DataFile


def a_model(weight):
    rows, columns = weight.shape
    signature = f"(float[n,{rows}] x) => (float[n,{columns}] y)"
    text = f'<ir_version: 10, opset_import: ["": 20]> g {signature} {{ z = MatMul(x, w) y = Add(z, b) }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    value = ir.Value(name="w", const_value=ir.tensor(weight), shape=ir.Shape(weight.shape))
    value.type = ir.TensorType(ir.tensor(weight).dtype)
    model.graph.register_initializer(value)
    model.graph[0].replace_input_with(1, value)
    bias = ir.Value(
        name="b", const_value=ir.tensor(weight[0] * 0 + 1), shape=ir.Shape(weight[0].shape), type=value.type
    )
    model.graph.register_initializer(bias)
    model.graph[1].replace_input_with(1, bias)
    return model


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_written_is_read_back(tmp_path, dtype, turned):
    arrays = [(np.arange(n * 700) % 99).reshape(n, 700).astype(dtype) for n in (3, 500)]
    with DataFile(tmp_path / "d") as data:
        tensors = [data.append(a.T if turned else a, f"t{i}") for i, a in enumerate(arrays)]
    for array, tensor in zip(arrays, tensors, strict=True):
        assert isinstance(tensor, ir.ExternalTensor)
        assert tensor.offset % 64 == 0
        np.testing.assert_array_equal(tensor.numpy(), array.T if turned else array)
        assert not np.array_equal(tensor.numpy(), -array.T if turned else -array)  # zeros apart, a copy can be wrong


def test_small_and_scalar_tensors_stay_in_the_model(tmp_path):
    with DataFile(tmp_path / "d") as data:
        assert not isinstance(data.append(np.zeros(SMALL // 4 - 1, np.float32), "t"), ir.ExternalTensor)
        assert data.append(np.float32(3)[None][0:1].reshape(()), "s").numpy() == 3
    assert (tmp_path / "d").stat().st_size == 0


def test_a_model_with_stored_initializers_runs_without_other_files(tmp_path):
    weight = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32)
    ir.save(a_model(weight), tmp_path / "source.onnx", external_data="source.data", size_threshold_bytes=0)
    model = ir.load(tmp_path / "source.onnx")
    (tmp_path / "out").mkdir()
    with DataFile(tmp_path / "out" / "m.data") as data:
        data.store_initializers_(model)
        data.store_initializers_(model)  # a second time there is nothing left to take
    ir.save(model, tmp_path / "out" / "m.onnx")
    assert (tmp_path / "out" / "m.data").stat().st_size == weight.nbytes
    (tmp_path / "source.data").unlink()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "m.onnx")
    x = np.ones((2, 300), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ weight + 1, rtol=1e-4, atol=1e-4)


def test_a_replaced_tensor_takes_the_bytes_of_the_old_one(tmp_path):
    first, second = (np.arange(start, start + 600, dtype=np.float32).reshape(20, 30) for start in (0, 1000))
    with DataFile(tmp_path / "d") as data:
        old, other = data.append(first, "a"), data.append(second, "b")
        size = (tmp_path / "d").stat().st_size
        np.testing.assert_array_equal(old.numpy(), first)  # maps the file
        new = data.replace(old, lambda: old.numpy()[::-1].copy())
        third = data.append(first, "c")
        np.testing.assert_array_equal(new.numpy(), first[::-1])
        np.testing.assert_array_equal(other.numpy(), second)
        np.testing.assert_array_equal(third.numpy(), first)
        assert third.offset >= size
        in_memory = data.replace(ir.Tensor(first, name="e"), lambda: second)
        np.testing.assert_array_equal(in_memory.numpy(), second)
        assert in_memory.name == "e"
