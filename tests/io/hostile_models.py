"""ONNX files that claim what cannot be or must not be, made of a few lines each; every one is under 20 kB."""

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def model(nodes, initializers=(), *, shape=("n", 4), opset=20, functions=(), sparse=(), output="y"):
    """A model `x -> y` of these nodes."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))
    y = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    graph = helper.make_graph(list(nodes), "g", [x], [y], list(initializers), sparse_initializer=list(sparse))
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid("local", 1)] if functions else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=list(functions))


def integers(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


def relu(a="x", b="y"):
    return helper.make_node("Relu", [a], [b])


def claimed(dims, kind=TensorProto.FLOAT, name="w", **fields):
    """A tensor that claims `dims` and holds nothing but `fields`."""
    tensor = TensorProto(name=name, data_type=kind, dims=dims)
    for key, value in fields.items():
        getattr(tensor, key).extend(value) if isinstance(value, list) else setattr(tensor, key, value)
    return tensor


def with_weight(tensor):
    return model([helper.make_node("Add", ["x", tensor.name], ["y"])], [tensor])


def doubling(count):
    """`count` times Concat(a, a)."""
    names = ["x", *(f"a{i}" for i in range(count - 1)), "y"]
    return model([helper.make_node("Concat", [a, a], [b], axis=0) for a, b in itertools.pairwise(names)])


def nested_functions(depth, calls, body="Relu"):
    """f0 does one thing, and each further one calls the one before it `calls` times in a row."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    relus, concats = helper.make_node("Relu", ["a"], ["b"]), helper.make_node("Concat", ["a", "a"], ["b"], axis=0)
    one = concats if body == "Concat" else relus
    functions = [helper.make_function("local", "f0", ["a"], ["b"], [one], opsets)]
    for level in range(1, depth):
        names = ["a", *(f"t{i}" for i in range(calls - 1)), "b"]
        nodes = [helper.make_node(f"f{level - 1}", [a], [b], domain="local") for a, b in itertools.pairwise(names)]
        functions.append(helper.make_function("local", f"f{level}", ["a"], ["b"], nodes, opsets))
    return model([helper.make_node(f"f{depth - 1}", ["x"], ["y"], domain="local")], functions=functions)


def calling_itself():
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    calls = {name: helper.make_node(name, ["a"], ["b"], domain="local") for name in "fg"}
    rings = [helper.make_function("local", a, ["a"], ["b"], [calls[b]], opsets) for a, b in ("fg", "gf")]
    return model([helper.make_node("f", ["x"], ["y"], domain="local")], functions=rings)


def nested_graphs(depth):
    """A Loop in a Loop, `depth` times."""
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["x"], ["z0"])]
    for n in range(depth):
        fed = [info(f"i{n}", TensorProto.INT64, []), info(f"c{n}", TensorProto.BOOL, [])]
        made = [info(f"d{n}", TensorProto.BOOL, []), info(f"z{n}", TensorProto.FLOAT, None)]
        graph = helper.make_graph([helper.make_node("Identity", ["c"], [f"d{n}"]), *nodes], "b", fed, made)
        nodes = [helper.make_node("Loop", ["", "c"], [f"z{n + 1}"], body=graph)]
    nodes[0].output[0] = "y"
    return model(nodes, [numpy_helper.from_array(np.array(True), "c")])


def too_deep():
    """Bytes of a model that nest deeper than protobuf reads: graph { node { attribute { g { ... } } } }."""

    def field(number, content):
        size, length = len(content), b""
        while size > 127:
            size, length = size >> 7, length + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    content = b""
    for _ in range(100):
        content = field(1, field(5, field(6, content)))
    return field(7, content) + helper.make_model(helper.make_graph([], "g", [], [])).SerializeToString()


def _shaped(op, *values, before=(), **attributes):
    inputs = [*before, "s"]
    return model([helper.make_node(op, inputs, ["y"], **attributes)], [integers("s", *values)])


def _random(op):
    return model([helper.make_node(op, [], ["y"], shape=[1 << 30])])


def _tiled():
    nodes = [helper.make_node("Tile", [a, "s"], [b]) for a, b in (("x", "a"), ("a", "b"), ("b", "y"))]
    return model(nodes, [integers("s", 1024, 1024)])


def _computed():
    """The shape is computed of shapes."""
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["a"]),
        helper.make_node("Shape", ["a"], ["b"]),
        helper.make_node("Concat", ["b", "b", "b"], ["c"], axis=0),
        helper.make_node("ConstantOfShape", ["c"], ["y"]),
    ]
    return model(nodes, [integers("s", 1024)])


def _many():
    """None alone is too large."""
    nodes = [helper.make_node("ConstantOfShape", ["s"], [f"a{i}"]) for i in range(40)]
    return model([*nodes, relu("a0")], [integers("s", 50_000_000)])


def _outer():
    """(n, 1) + (1, n), where n is Range's."""
    nodes = [
        helper.make_node("Range", ["zero", "most", "one"], ["r"]),
        helper.make_node("Unsqueeze", ["r", "zeros"], ["row"]),
        helper.make_node("Unsqueeze", ["r", "ones"], ["column"]),
        helper.make_node("Add", ["row", "column"], ["y"]),
    ]
    values = {"zero": 0, "most": 40_000, "one": 1}
    scalars = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in values.items()]
    return model(nodes, [*scalars, integers("zeros", 0), integers("ones", 1)])


def _in_a_branch():
    inner = helper.make_node("ConstantOfShape", ["s"], ["z"])
    graph = helper.make_graph([inner], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    node = helper.make_node("If", ["c"], ["y"], then_branch=graph, else_branch=graph)
    return model([node], [integers("s", 1 << 30), numpy_helper.from_array(np.array(True), "c")])


def _sparse():
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    tensor = helper.make_sparse_tensor(values, integers("i", 0), [1 << 15, 1 << 15])
    return model([helper.make_node("Add", ["x", "w"], ["y"])], sparse=[tensor])


GIGABYTES = {
    "raw data": lambda: with_weight(claimed([1 << 28], raw_data=b"")),
    "no data": lambda: with_weight(claimed([1 << 28])),
    "2^60 numbers": lambda: with_weight(claimed([1 << 60])),
    "2^126 numbers": lambda: with_weight(claimed([(1 << 63) - 1, (1 << 63) - 1])),
    "typed data": lambda: with_weight(claimed([1 << 28], float_data=[1.0])),
    "strings": lambda: with_weight(claimed([1 << 28], TensorProto.STRING, string_data=[b"a"])),
    "4 bits": lambda: with_weight(claimed([1 << 31], TensorProto.INT4, int32_data=[1])),
    "sparse": _sparse,
    "ConstantOfShape": lambda: _shaped("ConstantOfShape", 1 << 14, 1 << 14),
    "Expand": lambda: _shaped("Expand", 1 << 28, 4, before=["x"]),
    "Tile": _tiled,
    "RandomNormal": lambda: _random("RandomNormal"),
    "RandomUniform": lambda: _random("RandomUniform"),
    "Pad": lambda: _shaped("Pad", 0, 0, 1 << 30, 0, before=["x"]),
    "Range, twice, added": _outer,
    "a shape of shapes": _computed,
    "many of them": _many,
    "doubled 40 times": lambda: doubling(40),
    "doubled in functions": lambda: nested_functions(12, 3, "Concat"),
    "in a branch": _in_a_branch,
    "an input": lambda: model([relu()], shape=(1 << 15, 1 << 15)),
    "a Constant": lambda: model([helper.make_node("Constant", [], ["y"], value=claimed([1 << 28]))]),
}
"""Each declares a gigabyte or more."""

ENDLESS = {
    "functions in functions": lambda: nested_functions(30, 10),
    "functions too deep": lambda: nested_functions(100, 1),
    "a function that calls itself": calling_itself,
    "graphs in graphs": lambda: nested_graphs(30),
    "long name": lambda: model([relu("x", "y" * 19_000)], output="y" * 19_000),
}

WRONG = {
    "negative dims": lambda: with_weight(claimed([-4])),
    "40 dimensions": lambda: with_weight(claimed([1] * 40, float_data=[1.0])),
    "type 0": lambda: with_weight(claimed([1], 0)),
    "type 99": lambda: with_weight(claimed([1], 99)),
    "an input of type 99": lambda: _typed(),
    "a segment": lambda: _segment(),
    "data twice": lambda: with_weight(claimed([1], raw_data=b"\0" * 4, float_data=[1.0])),
    "data of another type": lambda: with_weight(claimed([1], int64_data=[1])),
    "an attribute of another type": lambda: model([helper.make_node("Concat", ["x"], ["y"], axis=1.5)]),
    "an attribute twice": lambda: _twice(),
    "an attribute without a value": lambda: _empty(),
    "a missing attribute": lambda: model([helper.make_node("Concat", ["x"], ["y"])]),
    "too few inputs": lambda: model([helper.make_node("MatMul", ["x"], ["y"])]),
    "an empty input": lambda: model([helper.make_node("MatMul", ["x", ""], ["y"])]),
    "too many outputs": lambda: model([helper.make_node("Relu", ["x"], ["y", "z"])]),
    "an initializer twice": lambda: model([relu()], [integers("w", 1), integers("w", 1)]),
    "an initializer without a name": lambda: model([relu()], [integers("", 1)]),
    "a function twice": lambda: _function_twice(),
    "a function with a loose end": lambda: _loose_function(),
}


def _segment():
    made = with_weight(claimed([1], float_data=[1.0]))
    made.graph.initializer[0].segment.SetInParent()
    return made


def _typed():
    made = model([relu()])
    made.graph.input[0].type.tensor_type.elem_type = 99
    return made


def _twice():
    node = helper.make_node("Concat", ["x"], ["y"], axis=1)
    node.attribute.append(node.attribute[0])
    return model([node])


def _empty():
    node = helper.make_node("Constant", [], ["y"])
    node.attribute.append(onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR))
    return model([node])


def _function_twice():
    made = nested_functions(1, 1)
    made.functions.append(made.functions[0])
    return made


def _loose_function():
    made = nested_functions(1, 1)
    made.functions[0].node[0].input[0] = "nowhere"
    return made
