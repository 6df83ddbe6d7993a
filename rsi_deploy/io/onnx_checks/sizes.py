"""Lower bounds for the output shapes of ONNX operators, and small integer values where they are certain.

`SHAPES[op](known)` returns the shape of the first output, or None if it is unknown; `INTEGERS[op](known)` returns its
numbers. Any exception that they raise on an invalid node means that the output is unknown.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import AttributeProto, NodeProto, TensorProto, numpy_helper

from rsi_deploy.core.types import Shape

Numbers = tuple[float, ...]
SMALL = 64  # most numbers whose values are tracked; no shape has more

_READ: Mapping[int, Callable[[AttributeProto], Any]] = {
    AttributeProto.INT: lambda attribute: attribute.i,
    AttributeProto.INTS: lambda attribute: tuple(attribute.ints),
    AttributeProto.FLOAT: lambda attribute: attribute.f,
    AttributeProto.FLOATS: lambda attribute: tuple(attribute.floats),
    AttributeProto.TENSOR: lambda attribute: attribute.t,
}


@dataclass(frozen=True, kw_only=True)
class Known:
    """Known facts about a node: shapes and numbers of its inputs (None if unknown), and its attributes."""

    shapes: Sequence[Shape | None]
    numbers: Sequence[Numbers | None]
    attributes: Mapping[str, Any]

    def shape(self, index: int = 0) -> Shape:
        """Return the shape of an input; raise LookupError if it is unknown."""
        shape = self.shapes[index]
        if shape is None:
            raise LookupError(index)
        return shape

    def integers(self, index: int) -> Shape:
        """Return the numbers of an input as integers; raise LookupError if they are unknown."""
        numbers = self.numbers[index] if index < len(self.numbers) else None
        if numbers is None:
            raise LookupError(index)
        return tuple(int(number) for number in numbers)


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return the node's attributes that are numbers or tensors."""
    return {each.name: _READ[each.type](each) for each in node.attribute if each.type in _READ}


def small_numbers(tensor: TensorProto) -> Numbers | None:
    """Return the numbers of a tensor if they are few and stored in the model file; else None."""
    if math.prod(tensor.dims) > SMALL or tensor.data_location == TensorProto.EXTERNAL:
        return None
    if tensor.data_type not in (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT):
        return None
    return tuple(numpy_helper.to_array(tensor).reshape(-1).tolist())


def _same(known: Known) -> Shape | None:
    return known.shape()


def _broadcast(known: Known) -> Shape | None:
    """Take the maximum of each dimension; inputs of unknown shape can only increase it."""
    shapes = [shape[::-1] for shape in known.shapes if shape is not None]
    if not shapes:
        return None
    return tuple(max(sizes) for sizes in itertools.zip_longest(*shapes, fillvalue=1))[::-1]


def _expand(known: Known) -> Shape | None:
    shapes = (known.integers(1), known.shapes[0] or ())
    return tuple(max(sizes) for sizes in itertools.zip_longest(*(s[::-1] for s in shapes), fillvalue=1))[::-1]


def _tile(known: Known) -> Shape | None:
    repeats = known.integers(1)
    shape = known.shapes[0] or (1,) * len(repeats)
    return tuple(size * many for size, many in zip(shape, repeats, strict=True))


def _pad(known: Known) -> Shape | None:
    pads = known.attributes.get("pads") or known.integers(1)
    shape, half = known.shapes[0] or (1,) * (len(pads) // 2), len(pads) // 2
    if half != len(shape):  # only some axes
        return (*shape[:-1], shape[-1] + max(pads[i] + pads[half + i] for i in range(half)))
    return tuple(max(size + pads[i] + pads[half + i], 0) for i, size in enumerate(shape))


def _range(known: Known) -> Shape | None:
    (start,), (limit,), (delta,) = (known.numbers[i] or () for i in range(3))
    return (max(math.ceil((limit - start) / delta), 0),)


def _one_hot(known: Known) -> Shape | None:
    (depth,) = known.integers(1)
    return (*(known.shapes[0] or ()), depth)


def _resize(known: Known) -> Shape | None:
    shape = known.shape()
    scales = known.attributes.get("scales") or next((n for n in known.numbers[1:3] if n and len(n) == len(shape)), None)
    sizes = known.numbers[3] if len(known.numbers) > 3 else None
    if sizes and len(sizes) == len(shape):
        return tuple(int(size) for size in sizes)
    return None if scales is None else tuple(int(size * scale) for size, scale in zip(shape, scales, strict=True))


def _concat(known: Known) -> Shape | None:
    shapes = [shape for shape in known.shapes if shape is not None]
    if not shapes:
        return None
    axis = known.attributes.get("axis", 1) % len(shapes[0])
    base = [max(sizes) for sizes in zip(*shapes, strict=True)]
    base[axis] = sum(shape[axis] for shape in shapes)
    return tuple(base)


def _matmul(known: Known) -> Shape | None:
    a, b = known.shape(0), known.shape(1)
    rows, columns = a[-2:-1] if len(a) > 1 else (), b[-1:] if len(b) > 1 else ()
    outer = itertools.zip_longest(a[:-2][::-1], b[:-2][::-1], fillvalue=1)
    return (*tuple(max(sizes) for sizes in outer)[::-1], *rows, *columns)


def _gemm(known: Known) -> Shape | None:
    a, b = known.shape(0), known.shape(1)
    return a[1 if known.attributes.get("transA") else 0], b[0 if known.attributes.get("transB") else 1]


def _gather(known: Known) -> Shape | None:
    data, indices = known.shape(0), known.shape(1)
    axis = known.attributes.get("axis", 0) % len(data)
    return (*data[:axis], *indices, *data[axis + 1 :])


def _reshape(known: Known) -> Shape | None:
    """Follow the requested shape; an open dimension takes what remains, or 1."""
    requested = known.attributes.get("shape") or known.integers(1)
    before = known.shapes[0]
    sizes = [before[i] if size == 0 and before and i < len(before) else size for i, size in enumerate(requested)]
    if -1 in sizes:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(math.prod(before) // max(rest, 1), 1) if before else 1
    return tuple(max(size, 1) for size in sizes) if before and math.prod(sizes) <= math.prod(before) else None


def _unsqueeze(known: Known) -> Shape | None:
    shape = list(known.shape())
    axes = known.attributes.get("axes") or known.integers(1)
    for axis in sorted(axis % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return tuple(shape)


def _transpose(known: Known) -> Shape | None:
    shape = known.shape()
    return tuple(shape[axis] for axis in known.attributes.get("perm") or reversed(range(len(shape))))


def _flatten(known: Known) -> Shape | None:
    shape = known.shape()
    axis = known.attributes.get("axis", 1)
    return math.prod(shape[:axis]), math.prod(shape[axis:])


def _constant(known: Known) -> Shape | None:
    tensor = known.attributes.get("value")
    if isinstance(tensor, TensorProto):
        return tuple(tensor.dims)
    return next(
        ((len(known.attributes[key]),) for key in ("value_ints", "value_floats") if key in known.attributes), ()
    )


def _conv(known: Known) -> Shape | None:
    """Only channels and padding can enlarge the output."""
    x, w = known.shape(0), known.shape(1)
    strides = known.attributes.get("strides") or (1,) * (len(x) - 2)
    pads = known.attributes.get("pads") or (0,) * (2 * (len(x) - 2))
    half = len(x) - 2
    dilations = known.attributes.get("dilations") or (1,) * half
    space = (
        (x[2 + i] + pads[i] + pads[half + i] - (w[2 + i] - 1) * dilations[i] - 1) // strides[i] + 1 for i in range(half)
    )
    return (x[0], w[0], *(max(size, 1) for size in space))


_UNARY = (
    "Abs Bernoulli Cast CastLike Ceil Clip DequantizeLinear Elu Erf Exp EyeLike Floor Gelu HardSigmoid Identity "
    "LeakyRelu Log Neg Not QuantizeLinear RandomNormalLike RandomUniformLike Reciprocal Relu Round Sigmoid Sign Sin "
    "Softmax Softplus Sqrt Tanh"
)
_ELEMENTWISE = "Add And Div Equal Greater Less Max Mean Min Mod Mul Or Pow Sub Sum Where Xor"

SHAPES: Mapping[str, Callable[[Known], Shape | None]] = {
    **dict.fromkeys(_UNARY.split(" "), _same),
    **dict.fromkeys(_ELEMENTWISE.split(" "), _broadcast),
    **dict.fromkeys(("RandomNormal", "RandomUniform"), lambda known: known.attributes["shape"]),
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": lambda known: known.integers(0),
    "Conv": _conv,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "Resize": _resize,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Upsample": _resize,
}


def _own(known: Known) -> Numbers | None:
    return known.numbers[0]


def _pairs(operation: Callable[[float, float], float]) -> Callable[[Known], Numbers | None]:
    def both(known: Known) -> Numbers | None:
        a, b = known.numbers[0], known.numbers[1]
        if a is None or b is None or not a or not b:
            return None
        return tuple(operation(a[i % len(a)], b[i % len(b)]) for i in range(max(len(a), len(b))))

    return both


def _constant_numbers(known: Known) -> Numbers | None:
    tensor = known.attributes.get("value")
    if isinstance(tensor, TensorProto):
        return small_numbers(tensor)
    if "value_int" in known.attributes:
        return (known.attributes["value_int"],)
    found = known.attributes.get("value_ints")
    return tuple(found) if found is not None and len(found) <= SMALL else None


def _joined(known: Known) -> Numbers | None:
    parts = [numbers for numbers in known.numbers if numbers is not None]
    return tuple(itertools.chain(*parts)) if len(parts) == len(known.numbers) else None


def _picked(known: Known) -> Numbers | None:
    source = known.numbers[0]
    return None if source is None else tuple(source[index] for index in known.integers(1))


INTEGERS: Mapping[str, Callable[[Known], Numbers | None]] = {
    **dict.fromkeys(("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape", "Flatten"), _own),
    "Add": _pairs(lambda a, b: a + b),
    "Concat": _joined,
    "Constant": _constant_numbers,
    "Gather": _picked,
    "Mul": _pairs(lambda a, b: a * b),
    "ReduceProd": lambda known: None if known.numbers[0] is None else (math.prod(known.numbers[0]),),
    "Shape": lambda known: tuple(known.shape()) if not known.attributes else None,
}
