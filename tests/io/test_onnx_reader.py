"""A file is checked before use: every verb refuses a bad one with one message, quickly and in little memory."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from hostile_models import (
    ENDLESS,
    GIGABYTES,
    WRONG,
    doubling,
    integers,
    model,
    nested_functions,
    nested_graphs,
    relu,
    too_deep,
)
from onnx import TensorProto, helper, numpy_helper

import rsi_deploy
from rsi_deploy.core.errors import ModelError
from rsi_deploy.io.onnx_reader import check_file, check_proto, load_model, read_proto
from rsi_deploy.runtime.sessions import make_session

HOSTILE = GIGABYTES | ENDLESS | WRONG
MEMORY = 500 << 20


def written(proto, folder, name="m.onnx"):
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("case", HOSTILE)
def test_it_is_refused_with_one_line(tmp_path, case):
    path = written(HOSTILE[case](), tmp_path)
    assert path.stat().st_size < (20_000 if case != "long name" else 60_000)
    for read in (read_proto, load_model, check_file, make_session):
        with pytest.raises(ModelError, match=r"m\.onnx") as caught:
            read(path)
        assert len(str(caught.value)) < 1000
        assert "\n" not in str(caught.value)


def test_what_is_near_them_is_read(tmp_path):
    """Each check is shown something that it must let pass."""
    small = [
        model([relu()], [integers("w", 1, 2), numpy_helper.from_array(np.zeros((0, 1 << 20), np.float32), "none")]),
        model([helper.make_node("ConstantOfShape", ["s"], ["y"])], [integers("s", 1000, 1000)]),
        model([helper.make_node("Expand", ["x", "s"], ["y"])], [integers("s", 1, 4)]),
        model([helper.make_node("Concat", ["x", "x"], ["y"], axis=-1)]),
        doubling(10),
        nested_functions(5, 3),
        nested_graphs(20),
        model([relu("x", "y" * 9000)], output="y" * 9000),
    ]
    for number, proto in enumerate(small):
        path = written(proto, tmp_path, f"{number}.onnx")
        assert load_model(path).graph.outputs[0].name
        make_session(path)


@pytest.mark.parametrize("kind", [k for k in TensorProto.DataType.values() if k not in (0, TensorProto.STRING)])
def test_every_type_is_counted_as_onnx_writes_it(tmp_path, kind):
    for raw in (False, True):
        values = np.ones(5, helper.tensor_dtype_to_np_dtype(kind))
        tensor = (
            numpy_helper.from_array(values, "w")
            if raw
            else helper.make_tensor("w", kind, [5], values.tolist() if values.dtype.kind == "c" else [1] * 5)
        )
        assert tensor.data_type == kind
        path = written(model([relu()], [tensor]), tmp_path, f"{raw}.onnx")
        read_proto(path)
        tensor.dims[0] = 50
        with pytest.raises(ModelError, match=r"tensor 'w' has dims \[50\]"):
            read_proto(written(model([relu()], [tensor]), tmp_path, f"{raw}_wrong.onnx"))


LIMITED = """
import resource, sys, time
from rsi_deploy.io.onnx_reader import read_proto
from rsi_deploy.core.errors import ModelError
from rsi_deploy.runtime.sessions import make_session
import onnxruntime
before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (before + {memory}, before + {memory}))
for path in sys.argv[1:]:
    started = time.perf_counter()
    try:
        make_session(path)
        print("read", path)
    except ModelError as error:
        assert time.perf_counter() - started < 10, path
    except BaseException as error:
        print(type(error).__name__, path)
"""


def test_a_gigabyte_in_a_kilobyte_takes_no_memory_and_no_time(tmp_path):
    """In a process that may take no more than 500 MB above what its modules take."""
    paths = [written(make(), tmp_path, f"{n}.onnx") for n, make in enumerate((GIGABYTES | ENDLESS).values())]
    code = LIMITED.format(memory=MEMORY)
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_that_process_can_fail(tmp_path):
    """The limit is one: what takes a gigabyte is seen to."""
    limit = LIMITED.format(memory=MEMORY).partition("for path")[0]
    code = f"{limit}\nimport numpy as np\nnp.ones(1 << 27)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


@pytest.fixture
def external(tmp_path):
    """A model whose weight lies in `in/m.data`, 256 bytes."""
    (tmp_path / "in").mkdir()
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "w")
    path = tmp_path / "in" / "m.onnx"
    onnx.save(
        model([helper.make_node("MatMul", ["x", "w"], ["y"])], [weight], shape=("n", 8)),
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
    )
    return path


def relocated(path, *entries):
    """The model with these words about where its data lie."""
    proto = onnx.load_model(path, load_external_data=False)
    tensor = proto.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | dict(entries)
    del tensor.external_data[:]
    for key, value in [*kept.items(), *entries[1:]]:
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(proto.SerializeToString())
    return path


def test_its_data_may_be_no_pipe_and_no_folder(external):
    data = external.parent / "m.data"
    data.unlink()
    os.mkfifo(data)
    with pytest.raises(ModelError, match="no regular file"):
        check_file(external)
    data.unlink()
    data.mkdir()
    with pytest.raises(ModelError, match="no regular file"):
        check_file(external)


@pytest.mark.parametrize("location", ["sub/m.data", "sub/../sub/m.data", "./sub/m.data"])
def test_its_data_may_not_be_reached_through_a_linked_folder(external, location):
    outside = external.parent.parent / "outside"
    outside.mkdir()
    (external.parent / "m.data").rename(outside / "m.data")
    (external.parent / "sub").symlink_to(outside)
    with pytest.raises(ModelError, match="outside the model's folder"):
        check_file(relocated(external, ("location", location)))


@pytest.mark.parametrize("location", ["/dev/zero", "/proc/self/mem", "a\0b", "a" * 5000, "m.data/../../m.data"])
def test_external_data_outside_the_folder_are_refused(external, location):
    with pytest.raises(ModelError, match=r"m\.onnx: tensor 'w'"):
        check_file(relocated(external, ("location", location)))


@pytest.mark.parametrize("entry", [("offset", "-1"), ("offset", str(1 << 70)), ("length", "1" * 5000), ("offset", "x")])
def test_its_data_may_not_be_out_of_bounds(external, entry):
    check_file(external)
    with pytest.raises(ModelError, match=r"m\.onnx: tensor 'w'"):
        check_file(relocated(external, entry))


def test_a_repeated_location_of_external_data_is_refused(external):
    with pytest.raises(ModelError, match="repeats a key"):
        check_file(relocated(external, ("offset", "0"), ("location", "m.data")))


def test_a_file_that_changes_is_checked_again(tmp_path):
    path = written(model([relu()]), tmp_path)
    check_file(path)
    hostile = GIGABYTES["ConstantOfShape"]().SerializeToString()
    path.write_bytes(hostile)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10))
    with pytest.raises(ModelError):
        check_file(path)


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    for path in (tmp_path / "m.onnx", Path("/dev/zero"), tmp_path):
        with pytest.raises(ModelError, match="no regular file"):
            read_proto(path)


def test_the_suffix_of_an_onnx_file_does_not_matter(tmp_path):
    """onnx reads JSON or its text form where the name says so."""
    path = written(model([relu()]), tmp_path, "m.json")
    assert read_proto(path).graph.node[0].op_type == "Relu"


def test_graphs_deeper_than_protobuf_reads(tmp_path):
    (tmp_path / "m.onnx").write_bytes(too_deep())
    with pytest.raises(ModelError, match="nests too deeply"):
        read_proto(tmp_path / "m.onnx")


def test_sparse_initializers_are_refused_for_rewriting(tmp_path):
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    sparse = helper.make_sparse_tensor(values, integers("i", 3), [4])
    path = written(model([helper.make_node("Add", ["x", "w"], ["y"])], sparse=[sparse]), tmp_path)
    read_proto(path)
    with pytest.raises(ModelError, match="sparse initializers"):
        load_model(path)


VERBS = {
    "inspect": lambda path, out: rsi_deploy.inspect(str(path)),
    "rewrite": lambda path, out: rsi_deploy.rewrite(path, out / "r.onnx", rank=1),
    "export": lambda path, out: rsi_deploy.export(str(path), rank=1, output=out / "bundle"),
    "profile": lambda path, out: rsi_deploy.profile(str(path), output=out / "cost.json"),
    "bench": lambda path, out: rsi_deploy.bench([path]),
    "evaluate": lambda path, out: rsi_deploy.evaluate(path, out / "data.npz"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("case", ["no data", "ConstantOfShape", "functions in functions", "too few inputs"])
def test_every_verb_refuses_it(tmp_path, verb, case):
    np.savez(tmp_path / "data.npz", x=np.zeros((2, 4), np.float32), y=np.zeros(2, np.int64))
    path = written(HOSTILE[case](), tmp_path)
    with pytest.raises(ModelError):
        VERBS[verb](path, tmp_path)
    assert not [file for file in tmp_path.iterdir() if file.name not in ("m.onnx", "data.npz")]


@pytest.mark.slow
def test_onnx_s_own_cases_are_let_through():
    """Every operator as ONNX's backend suite has it, in every form: nothing valid is refused."""
    from onnx.backend.test.case.node import collect_testcases

    cases = [case for case in collect_testcases(None) if case.model is not None]
    assert len(cases) > 1000
    for case in cases:
        check_proto(case.model, Path(f"{case.name}.onnx"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak")
def test_a_verb_refuses_a_hostile_file_before_it_imports_torch(tmp_path):
    """The limits are a second and 500 MB; torch alone takes more."""
    weight = onnx.TensorProto(name="w", data_type=1, dims=[1 << 28])
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    (tmp_path / "m.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    code = (
        "import sys; from rsi_deploy.cli import run; code = run(sys.argv[1:]); "
        "peak = open('/proc/self/status').read().split('VmHWM:')[1].split()[0]; "
        "print(code, 'torch' in sys.modules, peak)"
    )
    for verb in (["inspect"], ["export", "--rank", "4", "-o", "b"], ["profile", "-o", "c.json"]):
        argv = [sys.executable, "-c", code, verb[0], str(tmp_path / "m.onnx"), *verb[1:]]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
        outcome, torch_is_there, peak = done.stdout.split()
        assert (outcome, torch_is_there) == ("3", "False"), done.stderr
        assert int(peak) < 500_000
        assert "has dims [268435456]" in done.stderr
