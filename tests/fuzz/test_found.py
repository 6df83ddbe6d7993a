"""Findings of fuzzing. Each input once ended in an exception that was none of our errors."""

import copy
import json

import numpy as np
import onnx_ir as ir
import pytest
from fuzz_seeds import documents, models
from fuzz_targets import TARGETS
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

import graph_passes as gp


def conv(proto):
    """Return the Conv of a seed by its output."""
    return next(node for node in proto.graph.node if node.op_type == "Conv")


def declared(proto, name, *dims):
    """Declare the shape of a value."""
    value = proto.graph.value_info.add(name=name)
    value.type.tensor_type.elem_type = TensorProto.FLOAT
    value.type.tensor_type.shape.SetInParent()
    for dim in dims:
        value.type.tensor_type.shape.dim.add(dim_value=dim)


def a_segment(proto):
    proto.graph.initializer[0].segment.SetInParent()


def a_device_without_a_name(proto):
    proto.graph.node[0].device_configurations.add()


def an_input_of_no_type(proto):
    proto.graph.input[0].type.tensor_type.elem_type = -(1 << 31)


def a_name_that_is_no_utf8(proto):
    """Write an ASCII name of the same length first, and replace its bytes."""
    proto.graph.node[0].name = "LATIN"


def an_output_of_a_conv_that_is_a_scalar(proto):
    declared(proto, conv(proto).output[0])
    declared(proto, conv(proto).input[0])


def an_input_of_a_conv_that_is_a_scalar(proto):
    del proto.graph.input[0].type.tensor_type.shape.dim[:]
    declared(proto, conv(proto).output[0])


def a_weight_transposed_to_fewer_axes(proto):
    """The weight has three axes before the Reshape and Transpose, and two after them."""
    shape = next(weight for weight in proto.graph.initializer if weight.name == "q")
    shape.CopyFrom(numpy_helper.from_array(np.array([8, 8, 1]), "q"))
    turned = next(node for node in proto.graph.node if node.op_type == "Transpose")
    del turned.attribute[:]
    turned.attribute.add(name="perm", type=AttributeProto.INTS, ints=[0, 1])


def a_product_of_a_weight_alone(proto):
    """The opset does not exist, so no schema has the number of inputs."""
    proto.opset_import[0].version = 0
    del proto.graph.node[1].input[0]


def an_attribute_of_another_type(proto):
    proto.opset_import[0].version = 0
    alpha = next(one for one in proto.graph.node[1].attribute if one.name == "alpha")
    alpha.CopyFrom(AttributeProto(name="alpha", type=AttributeProto.GRAPHS))


def an_attribute_reference_outside_a_function(proto):
    """Only nodes of a function may refer to attributes of a caller."""
    proto.graph.node[0].attribute.add(name="body", type=AttributeProto.GRAPH, ref_attr_name="body")


def a_graph_attribute_that_no_caller_passes(proto):
    """An unknown operator in every function refers to a graph attribute that no caller passes."""
    assert proto.functions
    for function in proto.functions:
        node = function.node.add(op_type="Unknown", domain="nowhere", input=function.input[:1], output=["unused"])
        node.attribute.add(name="body", type=AttributeProto.GRAPH, ref_attr_name="body")


MODELS = {  # seed -> change
    "a branch whose output is a scalar": (4, lambda proto: None),
    "a segment": (0, a_segment),
    "a device without a name": (0, a_device_without_a_name),
    "an input of no type": (0, an_input_of_no_type),
    "a name that is no UTF-8": (0, a_name_that_is_no_utf8),
    "a conv's output that is a scalar": (2, an_output_of_a_conv_that_is_a_scalar),
    "a product of a weight alone": (1, a_product_of_a_weight_alone),
    "an attribute of another type": (1, an_attribute_of_another_type),
    "a weight transposed to fewer axes": (3, a_weight_transposed_to_fewer_axes),
    "a graph that refers to a function that is none": (0, an_attribute_reference_outside_a_function),
    "a graph that a function is to be given": (6, a_graph_attribute_that_no_caller_passes),
    "a conv's input that is a scalar": (2, an_input_of_a_conv_that_is_a_scalar),
}


@pytest.mark.parametrize("target", ["onnx", "runtime"])
@pytest.mark.parametrize("case", MODELS)
def test_a_changed_model_is_handled(case, target, monkeypatch):
    """The result must come from our own checks and not from onnx's checker."""
    monkeypatch.setattr("rsi_deploy.io.onnx_checks.broken_models.checker_error", lambda path: None)
    number, change = MODELS[case]
    made = ModelProto()
    made.CopyFrom(models()[number])
    change(made)
    TARGETS[target](b"\0" + made.SerializePartialToString().replace(b"LATIN", b"\xff\xfe\xc0\x80\xe4"))


def reasons(proto):
    """Return the reason why each node is not split, a line each."""
    return "\n".join(entry.reason for entry in gp.find_sites(ir.from_proto(proto)) if isinstance(entry, gp.Skip))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("a product of a weight alone", "the node has no input beside its weight"),
        ("an attribute of another type", "an attribute of the node is of another type than its operator takes"),
        ("a weight transposed to fewer axes", "which does not fit it"),
    ],
)
def test_a_broken_node_stays_dense_with_its_reason(case, reason):
    number, change = MODELS[case]
    made = ModelProto()
    made.CopyFrom(models()[number])
    assert reason not in reasons(made)
    change(made)
    assert reason in reasons(made)


def without(document, *path):
    """Return the document without the last key of the path."""
    for key in path[:-1]:
        document = document[key]
    del document[path[-1]]


def put(document, value, *path):
    """Return the document with the last key of the path set."""
    for key in path[:-1]:
        document = document[key]
    document[path[-1]] = value


DOCUMENTS = {
    "a report of no bytes": ("report", 0, lambda d: put(d, 0, "compressed", "bytes")),
    "a spectrum of fewer values than ranks": ("report", 0, lambda d: without(d, "sites", 0, "spectrum", "values", 0)),
    "probe outputs of fewer numbers": ("report", 0, lambda d: without(d, "probe", 0, "first", 0)),
    "a budget that is no number": ("report", 0, lambda d: put(d, "--max-drop x", "settings", "budget")),
    "a seed below zero": ("report", 0, lambda d: put(d, -1, "settings", "seed")),
    "throughput of fewer rates than batches": ("config", 3, lambda d: without(d, "throughput", 0, "per_second", 0)),
    "a time of nothing": ("cost", 0, lambda d: put(d, [0.0, 0.0], "costs", 0, "splits", 0, "speedup_interval")),
    "a file's name that no disk takes": ("report", 0, lambda d: put(d, {"n" * 300: "0" * 64}, "files")),
    "a file's name with a zero": ("report", 0, lambda d: put(d, {"n\0": "0" * 64}, "files")),
    "a file's name that is no text": ("report", 0, lambda d: put(d, {"\ud800": "0" * 64}, "files")),
    "ranks that do not rise": ("cost", 0, lambda d: d["costs"][0]["splits"].reverse()),
    "a number of a thousand digits in quotes": ("config", 3, lambda d: put(d, "9" * 1000, "memory", 0, "import_bytes")),
    "a site of no group": ("report", 0, lambda d: put(d, 0, "sites", 0, "groups")),
    "a site of no columns": ("report", 0, lambda d: put(d, 0, "sites", 0, "in_features")),
    "a benchmark of nothing": ("config", 3, lambda d: put(d, [], "cells")),
    "a benchmark of no arms": ("config", 3, lambda d: put(d, [], "cells", 0, "arms")),
    "a benchmark at no batch": ("config", 3, lambda d: put(d, 0, "cells", 0, "batch")),
    "a benchmark that took no time": ("config", 3, lambda d: put(d, 0.0, "cells", 0, "arms", 0, "median_ms")),
    "a sweep of no shares": ("config", 1, lambda d: put(d, [], "shares")),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_a_changed_document_is_handled(case):
    target, number, change = DOCUMENTS[case]
    document = copy.deepcopy(documents()[target][number])
    change(document)
    which = bytes([number]) if target == "config" else b""
    TARGETS[target](which + b"\0" + json.dumps(document).encode())
