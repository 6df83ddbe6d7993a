"""Sequences, maps, optional values and texts are supported if no weight depends on them, or else named."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rsi_deploy import export, inspect, verify
from rsi_deploy.benchmark.latency import bench
from rsi_deploy.cli import run
from rsi_deploy.core.errors import GateError, ModelError, UsageError
from rsi_deploy.evaluation.accuracy import evaluate
from rsi_deploy.io.arrays import read_npz
from rsi_deploy.io.onnx_file import read_onnx
from rsi_deploy.onnx_models.rewrite import rewrite
from rsi_deploy.packaging.packing import package
from rsi_deploy.report.schema import ProbeOutput
from rsi_deploy.runtime.feeds.values import arrays_of_output
from rsi_deploy.runtime.parity import compare_outputs

RNG = np.random.default_rng(0)
W = RNG.standard_normal((64, 48)).astype(np.float32) / 8
ML = "ai.onnx.ml"
X, Y = ("x", TensorProto.FLOAT, ["n", 64]), ("y", TensorProto.FLOAT, ["n", 48])
PRODUCT = helper.make_node("MatMul", ["x", "w"], ["y"])


def tensor(name, kind, dims):
    return helper.make_tensor_value_info(name, kind, dims)


def sequence(name, kind=TensorProto.FLOAT):
    return helper.make_tensor_sequence_value_info(name, kind, None)


def maps(name, key):
    each = helper.make_map_type_proto(key, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    return helper.make_value_info(name, helper.make_sequence_type_proto(each))


def optional(name, dims):
    return helper.make_value_info(
        name, helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, dims))
    )


def written(path, nodes, inputs, outputs, *, opset=17, functions=(), **weights):
    initializers = [numpy_helper.from_array(array, name) for name, array in {"w": W, **weights}.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid(*pair) for pair in (("", opset), (ML, 2), ("local", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=list(functions))
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def classifier(path, ids):
    """Write a classifier like scikit-learn's converters: a product, labels, and a ZipMap of the probabilities."""
    text = isinstance(ids[0], str)
    key, named = (TensorProto.STRING, "strings") if text else (TensorProto.INT64, "ints")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node(
            "LinearClassifier",
            ["a"],
            ["label", "p"],
            domain=ML,
            coefficients=np.random.default_rng(1).standard_normal(len(ids) * 48).astype(np.float32).tolist(),
            intercepts=[0.0] * len(ids),
            multi_class=1,
            post_transform="SOFTMAX",
            **{f"classlabels_{named}": ids},
        ),
        helper.make_node(
            "ZipMap", ["p"], ["scores"], domain=ML, **{f"classlabels_{'strings' if text else 'int64s'}": ids}
        ),
    ]
    return written(path, nodes, [tensor(*X)], [tensor("label", key, ["n"]), maps("scores", key)])


def split_into_columns(path):
    return written(
        path,
        [PRODUCT, helper.make_node("SplitToSequence", ["y"], ["parts"], axis=1)],
        [tensor(*X)],
        [sequence("parts")],
    )


def with_sequence_beside(path):
    nodes = [PRODUCT, helper.make_node("SequenceConstruct", ["y", "y"], ["twice"])]
    return written(path, nodes, [tensor(*X)], [tensor(*Y), sequence("twice")])


def with_empty_optional_output(path):
    kind = helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 48])
    nodes = [PRODUCT, helper.make_node("Optional", [], ["o"], type=kind)]
    return written(path, nodes, [tensor(*X)], [tensor(*Y), optional("o", ["n", 48])])


def with_sequence_of_a_function(path):
    cut = helper.make_function(
        "local",
        "Cut",
        ["a"],
        ["s"],
        [helper.make_node("SplitToSequence", ["a"], ["s"], axis=1)],
        [helper.make_opsetid("", 17)],
    )
    nodes = [PRODUCT, helper.make_node("Cut", ["y"], ["parts"], domain="local")]
    return written(path, nodes, [tensor(*X)], [sequence("parts")], functions=[cut])


def with_constant_texts(path):
    nodes = [PRODUCT, helper.make_node("Identity", ["names"], ["classes"])]
    outputs = [tensor(*Y), tensor("classes", TensorProto.STRING, [3])]
    return written(path, nodes, [tensor(*X)], outputs, names=np.array(["a", "b", "c"], object))


def text_ids(path, dims=("n",), first="n"):
    """Write a model with a product and texts that it returns."""
    nodes = [PRODUCT, helper.make_node("Identity", ["s"], ["ids"])]
    inputs = [tensor("x", TensorProto.FLOAT, [first, 64]), tensor("s", TensorProto.STRING, list(dims))]
    outputs = [tensor("y", TensorProto.FLOAT, [first, 48]), tensor("ids", TensorProto.STRING, list(dims))]
    return written(path, nodes, inputs, outputs)


def bag_of_words(path):
    """Write a model of texts alone: it counts words and multiplies the counts."""
    nodes = [
        helper.make_node("StringNormalizer", ["s"], ["t"], case_change_action="LOWER", locale="C"),
        helper.make_node(
            "TfIdfVectorizer",
            ["t"],
            ["x"],
            mode="TF",
            min_gram_length=1,
            max_gram_length=1,
            max_skip_count=0,
            ngram_counts=[0],
            ngram_indexes=list(range(64)),
            pool_strings=[f"w{number}" for number in range(64)],
        ),
        PRODUCT,
    ]
    return written(path, nodes, [tensor("s", TensorProto.STRING, [None])], [tensor("y", TensorProto.FLOAT, [48])])


def encoded_texts(path):
    nodes = [
        helper.make_node("LabelEncoder", ["s"], ["i"], domain=ML, keys_strings=["a", "b"], values_int64s=[0, 1]),
        helper.make_node("Gather", ["rows", "i"], ["x"]),
        PRODUCT,
    ]
    rows = np.random.default_rng(2).standard_normal((2, 64)).astype(np.float32)
    return written(path, nodes, [tensor("s", TensorProto.STRING, ["n"])], [tensor(*Y)], rows=rows)


PASSED_THROUGH = [
    lambda path: classifier(path, [0, 1, 2]),
    lambda path: classifier(path, ["z", "b", "c"]),
    split_into_columns,
    with_sequence_beside,
    with_empty_optional_output,
    with_sequence_of_a_function,
    with_constant_texts,
]


@pytest.mark.parametrize("make", PASSED_THROUGH)
def test_such_models_are_split_in_every_step(tmp_path, make):
    path = make(tmp_path / "m.onnx")
    assert [site.kind for site in inspect(str(path), spectra=False).sites] == ["MatMul"]
    report = export(str(path), tmp_path / "b", rank="50%", measure=False, keep_dense=True)
    assert len(report.split_sites) == 1
    assert report.verification.surgery.relative_l2 < 1e-5 < report.verification.approximation.relative_l2
    claims = {claim.name: claim.status for claim in verify(tmp_path / "b").claims}
    assert [claims[name] for name in ("graph", "outputs", "parity", "MACs")] == ["holds"] * 4
    rewrite(path, tmp_path / "r.onnx", rank="50%")
    onnx.checker.check_model(tmp_path / "r.onnx", full_check=True)
    if "optional" not in make.__name__:  # onnxruntime's own format has no optional types
        package(tmp_path / "b", tmp_path / "ort", target="ort")
    result = bench([path, tmp_path / "b" / "model.onnx"], seconds=0.2)
    assert len(result.arms) == 2


def test_maps_keep_their_types(tmp_path):
    path = classifier(tmp_path / "m.onnx", ["z", "b", "c"])
    export(str(path), tmp_path / "b", rank="50%", measure=False)
    types = [[output.type for output in onnx.load(each).graph.output] for each in (path, tmp_path / "b" / "model.onnx")]
    assert types[0] == types[1]
    assert types[0][1].sequence_type.elem_type.map_type.key_type == TensorProto.STRING


def test_a_model_with_maps_is_converted_to_another_opset(tmp_path):
    path = classifier(tmp_path / "m.onnx", [0, 1, 2])
    report = export(str(path), tmp_path / "b", rank="50%", measure=False, opset=18)
    assert report.verification.exporter.relative_l2 < 1e-5
    assert onnx.load(tmp_path / "b" / "model.onnx").graph.output[1].type.HasField("sequence_type")


def test_a_model_with_maps_is_benched_in_float16(tmp_path):
    path = classifier(tmp_path / "m.onnx", ["z", "b", "c"])
    assert run(["bench", str(path), "--seconds", "0.2", "--dtype", "stored,float16"]) == 0


def test_a_map_inside_a_model(tmp_path):
    """A branch whose output is a map, and a declared map between two nodes."""
    path = classifier(tmp_path / "m.onnx", [0, 1, 2])
    model = onnx.load(path)
    value = maps("scores_inside", TensorProto.INT64)
    model.graph.node[-1].output[0] = "scores_inside"
    model.graph.node.append(helper.make_node("SequenceAt", ["scores_inside", "first"], ["scores"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "first"))
    model.graph.value_info.append(value)
    onnx.save(model, path)
    assert len(list(read_onnx(path).graph)) == 4


@pytest.mark.parametrize(
    ("ids", "labels_of"),
    [([0, 1, 2], [0, 1, 2]), ([3, 7, 9], [3, 7, 9]), (["z", "b", "c"], [0, 1, 2])],
    ids=["numbered", "class numbers", "texts"],
)
def test_accuracy_of_a_zipmap_is_that_of_the_scores_before_it(tmp_path, ids, labels_of):
    """Labels are the class ids if those are numbers, else positions in the model's order."""
    path = classifier(tmp_path / "m.onnx", ids)
    x = np.random.default_rng(3).standard_normal((40, 64)).astype(np.float32)
    answers, rows = onnxruntime.InferenceSession(path).run(None, {"x": x})
    right = np.array([labels_of[ids.index(answer)] for answer in answers])
    np.savez(tmp_path / "right.npz", x=x, labels=right)
    assert evaluate(path, tmp_path / "right.npz").top1 == 100
    others = [labels_of[(labels_of.index(label) + 1) % 3] for label in right]
    np.savez(tmp_path / "wrong.npz", x=x, labels=np.array(others))
    assert evaluate(path, tmp_path / "wrong.npz").top1 == 0
    assert {key for row in rows for key in row} == set(ids)


def test_a_label_that_is_no_class_is_named(tmp_path):
    path = classifier(tmp_path / "m.onnx", [3, 7, 9])
    np.savez(tmp_path / "d.npz", x=np.ones((2, 64), np.float32), labels=np.array([3, 4]))
    with pytest.raises(UsageError, match=r"3, 7, 9.*label 4"):
        evaluate(path, tmp_path / "d.npz")


def test_calibration_reads_the_scores_of_a_zipmap(tmp_path):
    path = classifier(tmp_path / "m.onnx", ["z", "b", "c"])
    np.savez(tmp_path / "c.npz", x=np.random.default_rng(4).standard_normal((32, 64)).astype(np.float32))
    report = export(str(path), tmp_path / "b", rank="25%", calib=tmp_path / "c.npz", measure=False)
    assert (report.calibration.samples, report.calibration.check_samples) == (26, 6)
    assert report.calibration.quality.agreement is not None


@pytest.mark.parametrize("make", [text_ids, bag_of_words, encoded_texts])
def test_texts_come_from_feeds(tmp_path, make):
    path = make(tmp_path / "m.onnx")
    texts = np.array(["a", "b", "a"]) if make is not bag_of_words else np.array(["W1", "w2", "W2"])
    feeds = {"s": texts} | ({"x": np.ones((3, 64), np.float32)} if make is text_ids else {})
    np.savez(tmp_path / "f.npz", **feeds)
    given = tmp_path / "f.npz"
    report = export(str(path), tmp_path / "b", rank="50%", feeds=given, bench_seconds=0.2, allow_slower=True)
    assert len(report.split_sites) == 1
    assert report.latency is not None
    found = {claim.name: claim.status for claim in verify(tmp_path / "b", feeds=given).claims}
    assert [found[name] for name in ("outputs", "MACs")] == ["holds"] * 2
    assert {claim.name: claim.status for claim in verify(tmp_path / "b").claims}["outputs"] == "not checked"
    assert run(["bench", str(path), "--seconds", "0.2", "--memory", "--feeds", str(given)]) == 0
    assert package(tmp_path / "b", tmp_path / "t", target="triton", feeds=given).target == "triton"


def test_verify_refuses_other_feeds_than_those_of_the_report(tmp_path):
    path = text_ids(tmp_path / "m.onnx")
    feeds = {"x": np.ones((2, 64), np.float32), "s": np.array(["a", "b"])}
    export(str(path), tmp_path / "b", rank="50%", feeds=feeds, measure=False)
    found = {claim.name: claim for claim in verify(tmp_path / "b", feeds={**feeds, "s": np.array(["a", "c"])}).claims}
    assert found["outputs"].status == "not checked"
    assert "not those of the report" in found["outputs"].detail
    wider = {
        claim.name: claim.status
        for claim in verify(tmp_path / "b", feeds={**feeds, "s": np.array(["a", "b"], "U9")}).claims
    }
    assert wider["outputs"] == "holds"


def test_a_changed_text_is_a_changed_output():
    same = ProbeOutput.of("s", np.array(["a", "b"], object))
    assert (
        same == ProbeOutput.of("s", np.array(["a", "b"], object)) != ProbeOutput.of("s", np.array(["a", "c"], object))
    )


def test_a_fixed_batch_is_benched_whole(tmp_path, capsys):
    """The model would not accept the first rows alone."""
    path = text_ids(tmp_path / "m.onnx", dims=[2], first=2)
    np.savez(tmp_path / "f.npz", x=np.ones((2, 64), np.float32), s=np.array(["a", "b"]))
    assert run(["bench", str(path), "--seconds", "0.2", "--feeds", str(tmp_path / "f.npz"), "--json"]) == 0
    assert "string (2,)" in capsys.readouterr().out


def test_texts_of_evaluation_data(tmp_path):
    path = encoded_texts(tmp_path / "m.onnx")
    texts = np.array(["a", "b", "b", "a"])
    (scores,) = onnxruntime.InferenceSession(path).run(None, {"s": texts})
    np.savez(tmp_path / "d.npz", s=texts, labels=scores.argmax(axis=1))
    assert evaluate(path, tmp_path / "d.npz").top1 == 100


def test_bytes_are_read_as_the_texts_they_encode(tmp_path):
    """onnxruntime reads beyond the end of the elements of a bytes array."""
    np.savez(tmp_path / "f.npz", s=np.array(["a", "längster"]).astype("U") == "", b=np.array([b"a", "ä".encode()]))
    assert read_npz(tmp_path / "f.npz")["b"].tolist() == ["a", "ä"]
    np.savez(tmp_path / "f.npz", b=np.array([b"\xff\xfe"]))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_npz(tmp_path / "f.npz")


def test_pickled_texts_are_refused(tmp_path, capsys):
    path = text_ids(tmp_path / "m.onnx")
    np.savez(tmp_path / "f.npz", x=np.ones((2, 64), np.float32), s=np.array(["a", "b"], object))
    arguments = ["--rank", "50%", "--no-bench", "-o", str(tmp_path / "b"), "--feeds", str(tmp_path / "f.npz")]
    assert run(["export", str(path), *arguments]) == 2
    assert "dtype U" in capsys.readouterr().err


def test_texts_need_feeds(tmp_path, capsys):
    path = text_ids(tmp_path / "m.onnx")
    for verb in (
        ["export", "--rank", "50%", "-o", str(tmp_path / "b")],
        ["bench"],
        ["profile", "-o", str(tmp_path / "c")],
    ):
        assert run([verb[0], str(path), *verb[1:]]) == 2
        message = capsys.readouterr().err
        assert "input s" in message
        assert "--feeds" in message


def sequence_input(path):
    nodes = [helper.make_node("ConcatFromSequence", ["q"], ["x"], axis=0), PRODUCT]
    return written(path, nodes, [sequence("q")], [tensor("y", TensorProto.FLOAT, [None, 48])])


def map_input(path):
    kind = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    nodes = [
        helper.make_node(
            "DictVectorizer", ["m"], ["x"], domain=ML, string_vocabulary=[f"k{number}" for number in range(64)]
        ),
        PRODUCT,
    ]
    return written(path, nodes, [helper.make_value_info("m", kind)], [tensor("y", TensorProto.FLOAT, [None, 48])])


@pytest.mark.parametrize(("make", "name"), [(sequence_input, "q"), (map_input, "m")])
def test_inputs_that_cannot_be_fed(tmp_path, capsys, make, name):
    """The model is compressed, with a note that it was not run. Verbs that must run it name the input and refuse it.

    The opset converter crashes on a map of unknown type.
    """
    path = make(tmp_path / "model.onnx")
    report = export(str(path), tmp_path / "b", rank="50%")
    assert len(report.split_sites) == 1
    assert any(f"input {name} is" in note for note in report.notes)
    assert f"input {name} is" in (tmp_path / "b" / "README.md").read_text()
    assert verify(tmp_path / "b").ok
    assert len(export(str(path), tmp_path / "other", rank="50%", opset=18).split_sites) == 1
    np.savez(tmp_path / "d.npz", x=np.ones((2, 64), np.float32), labels=np.zeros(2, np.int64))
    for verb in (
        ["export", path, "--keep-params", "50%", "--calib", tmp_path / "d.npz", "-o", tmp_path / "c"],
        ["bench", path, "--seconds", "0.2"],
        ["eval", path, "--data", tmp_path / "d.npz"],
        ["package", tmp_path / "b", "--target", "triton", "-o", tmp_path / "t"],
    ):
        assert run([str(word) for word in verb]) == 3
        message = capsys.readouterr().err
        assert f"model.onnx: input {name} is" in message, message
        assert "output" not in message


def test_an_optional_input_is_fed_as_a_tensor(tmp_path):
    nodes = [helper.make_node("OptionalGetElement", ["i"], ["x"]), PRODUCT]
    path = written(tmp_path / "m.onnx", nodes, [optional("i", ["n", 64])], [tensor(*Y)], opset=18)
    report = export(str(path), tmp_path / "b", rank="50%", measure=False)
    assert report.verification.surgery.informative
    assert report.probe_shapes == {"i": (2, 64)}


@pytest.mark.parametrize(
    ("target", "make", "words"),
    [
        ("triton", split_into_columns, r"output parts is seq\(tensor\(float\)\)"),
        ("ray-serve", split_into_columns, r"output parts is seq\(tensor\(float\)\)"),
        ("ray-serve", with_empty_optional_output, r"output o is optional\(tensor\(float\)\)"),
        ("ray-serve", with_constant_texts, "output classes is string"),
    ],
)
def test_engines_name_what_they_do_not_support(tmp_path, target, make, words):
    export(str(make(tmp_path / "m.onnx")), tmp_path / "b", rank="50%", measure=False)
    with pytest.raises(ModelError, match=words):
        package(tmp_path / "b", tmp_path / "p", target=target)


def test_parity_compares_the_contents_of_sequences_and_maps():
    first, second = np.ones(3, np.float32), np.full(3, 2, np.float32)
    assert compare_outputs([[first, second]], [[first, second]], what="gate").relative_l2 == 0
    assert compare_outputs([[first, second]], [[first, first]], what="gate").relative_l2 == pytest.approx(0.5)
    with pytest.raises(GateError, match="has 1 elements"):
        compare_outputs([[first, second]], [[first]], what="gate")
    rows = [{"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}]
    assert compare_outputs([rows], [rows], what="gate").relative_l2 == 0
    assert compare_outputs([rows], [[rows[1], rows[0]]], what="gate").relative_l2 > 0.1
    with pytest.raises(GateError, match="other keys"):
        compare_outputs([{"a": 1.0}], [{"b": 1.0}], what="gate")
    with pytest.raises(GateError, match="0 elements"):
        compare_outputs([first], [None], what="gate")
    texts = np.array(["a", "b", "c", "d"], object)
    assert compare_outputs([texts], [texts], what="gate").relative_l2 == 0
    other = np.array(["a", "b", "c", "e"], object)
    assert compare_outputs([texts], [other], what="gate").relative_l2 == pytest.approx(0.5)  # the root of a quarter


def test_columns_of_maps_are_in_the_order_of_the_classes():
    rows = [{"b": 1.0, "z": 2.0}, {"b": 3.0, "z": 4.0}]
    assert arrays_of_output("p", rows, ["z", "b"])["p"].tolist() == [[2, 1], [4, 3]]
    assert arrays_of_output("p", [{"a": 1.0}, {"b": 1.0}]).keys() == {"p[0]['a']", "p[1]['b']"}
