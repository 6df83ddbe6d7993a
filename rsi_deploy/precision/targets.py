"""Targets: execution providers of onnxruntime, and what each of them runs.

Facts, as of November 2026:

cuda        Kernels for Attention, MatMulNBits, GatherBlockQuantized, QuantizeLinear; none for DynamicQuantizeLinear,
            ConvInteger, QLinearConv, QLinearMatMul (onnxruntime, docs/OperatorKernels.md). So no dynamic int8.
tensorrt    Operators of opset 9 to 20; those with "N" are refused, and so is Attention of opset 23. QuantizeLinear and
            DequantizeLinear take int8 and the zero point 0 alone: uint8 and int32 biases are refused (onnx-tensorrt,
            docs/operators.md of TensorRT 10.0; TensorRT, "Working with Quantized Types"). It knows no operator of
            com.microsoft. Tensor Cores take int8 in multiples of 16 (NVIDIA, "Matrix Multiplication Background").
openvino    Operators of the ONNX frontend, with MatMulNBits, DynamicQuantizeLinear and Attention of opset 23, and
            without GatherBlockQuantized (openvino, src/frontends/onnx/docs/supported_ops.md; onnxruntime,
            core/providers/openvino/ov_versions/data_ops.cc).
qnn         No dynamic shapes and no Loop; MatMul of uint8 by uint8; of com.microsoft three operators
            (onnxruntime-qnn, docs/execution_providers/QNN-ExecutionProvider.md). No Attention (onnxruntime-qnn, issue
            646). No MatMul per channel (onnxruntime, quantization/execution_providers/qnn/quant_config.py).

onnxruntime folds constants before it divides the graph among providers (onnxruntime, "Graph Optimizations": basic ones
"run before graph partitioning"). So nodes whose inputs are constants, such as those of `few_bits`, reach no provider.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.io.onnx_checks.parts import all_graphs, subgraphs
from rsi_deploy.precision.schemes import Kind, Ranges, Scheme

_FLOAT: frozenset[Kind] = frozenset({"float32", "float16", "few bits, float32 products"})
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_SIGNED = (TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN)


def _operators(names: str) -> frozenset[str]:
    return frozenset(names.split())


_INTEGER = _operators("ConvInteger DynamicQuantizeLinear QLinearConv QLinearMatMul")


@dataclass(frozen=True, kw_only=True)
class ProviderTarget:
    """An execution provider that will run the model.

    Attributes:
        name: value of `--target`; "" for any provider.
        precisions: values of `--precision` that it runs.
        kinds: kinds of schemes that it runs.
        refused: types of ai.onnx operators that it does not run.
        contrib: types of com.microsoft operators that it runs; None for all of all domains.
        pays_float16: whether float16 is worth comparing.
        is_symmetric: whether activations are int8 with the zero point 0.
        has_uint8_products: whether weights of products are uint8 with one scale.
        has_fixed_shapes: whether the shapes of inputs must be fixed.
        least_rank: smallest rank that a budget plans, and the number that it is a multiple of.
    """

    name: str
    kinds: frozenset[Kind] = _FLOAT | {"static int8", "dynamic int8", "int4 weights"}
    precisions: tuple[str, ...] = ("float32", "float16", "int8", "int4", "auto")
    refused: frozenset[str] = frozenset()
    contrib: frozenset[str] | None = None
    pays_float16: bool = False
    is_symmetric: bool = False
    has_uint8_products: bool = False
    has_fixed_shapes: bool = False
    least_rank: int = 1

    def static(self, ranges: Ranges) -> Scheme:
        """Return static int8 as the target runs it."""
        return Scheme(
            kind="static int8", ranges=ranges, is_symmetric=self.is_symmetric, uint8_products=self.has_uint8_products
        )

    def runs(self, operator: str, domain: str = "com.microsoft") -> bool:
        """Return whether the target runs an operator."""
        if domain in ("", "ai.onnx"):
            return operator not in self.refused
        return self.contrib is None or (domain == "com.microsoft" and operator in self.contrib)

    def check_precision(self, precision: str | None) -> None:
        """Refuse a value of `--precision` that the target does not run.

        Raises:
            UsageError: names those that it runs.
        """
        if precision not in (None, *self.precisions):
            raise UsageError(
                f"--target {self.name} does not run --precision {precision}",
                hint=f"type one of --precision {', '.join(self.precisions)}",
            )

    def check_model(self, model: ModelProto) -> None:
        """Refuse a model with an operator that the target does not run, or with numbers that it does not read.

        Args:
            model: its small tensors are loaded.

        Raises:
            ModelError: names a node, and what to type.
        """
        local = {function.domain for function in model.functions}
        known = {tensor.name: tensor for graph in all_graphs(model) for tensor in graph.initializer}
        for node in _unfolded(model):
            if node.domain not in local and not self.runs(node.op_type, node.domain):
                raise ModelError(
                    f"--target {self.name} does not run {node.op_type}{f' of {node.domain}' * bool(node.domain)}, the "
                    f"operator of node {node.name or node.output[0]!r}",
                    hint=_hint(node.op_type),
                )
            if self.is_symmetric and node.op_type in _QUANTIZERS and not _is_symmetric(node, known):
                raise ModelError(
                    f"--target {self.name} reads int8 numbers with the zero point 0 alone, and node "
                    f"{node.name or node.output[0]!r} has others",
                    hint=_hint("QLinearConv"),
                )

    def check_shapes(self, model: ModelProto, name: str) -> None:
        """Refuse a model with dynamic shapes where the target takes none.

        Args:
            model: the model.
            name: the user's name for it.

        Raises:
            UsageError: names the inputs, and what to type.
        """
        if not self.has_fixed_shapes:
            return
        known = {tensor.name for tensor in model.graph.initializer}
        shapes = {
            value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in model.graph.input
            if value.name not in known
        }
        for value, shape in shapes.items():
            if not all(shape):
                where = "" if name.endswith(".onnx") else " of the dense.onnx of an export with --keep-dense"
                fixed = ",".join(str(size or 1) for size in shape)
                raise UsageError(
                    f"--target {self.name} takes fixed shapes alone, but input {value!r} of {name} has a dynamic one",
                    hint=f"export fixed.onnx instead, which this writes{where}: python -m onnxruntime.tools."
                    f"make_dynamic_shape_fixed {'dense.onnx' if where else name} fixed.onnx --input_name {value} "
                    f"--input_shape {fixed}",
                )


def target_named(name: str | None) -> ProviderTarget:
    """Return the target of a value of `--target`; without one, any provider."""
    return next((target for target in TARGETS if target.name == name), ANY)


def _unfolded(model: ModelProto) -> Iterator[NodeProto]:
    """Yield the nodes that onnxruntime does not replace by constants before a provider sees them."""
    constants = {tensor.name for graph in all_graphs(model) for tensor in graph.initializer} | {""}
    constants -= {value.name for value in model.graph.input}
    for graph in all_graphs(model):
        for node in graph.node:
            is_constant = all(name in constants for name in node.input) and not any(subgraphs(node))
            if is_constant and (node.input or node.op_type == "Constant") and node.op_type not in _QUANTIZERS:
                constants |= set(node.output)
            else:
                yield node
    for function in model.functions:
        yield from function.node


def _is_symmetric(node: NodeProto, known: dict[str, TensorProto]) -> bool:
    """Return whether a quantizer has signed codes and the zero point 0, as far as constants say."""
    codes = [known[name] for name in node.input[2:] if name in known]
    if any(numpy_helper.to_array(zero).astype(float).any() for zero in codes):
        return False
    if node.op_type == "DequantizeLinear":
        codes += [known[name] for name in node.input[:1] if name in known]
        return all(tensor.data_type in _SIGNED for tensor in codes)
    types = [tensor.data_type for tensor in codes]
    types = types or [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
    return all(kind in _SIGNED for kind in types or [TensorProto.UINT8])


def _hint(operator: str) -> str:
    """Return what to type where a target does not run an operator."""
    if operator == "Attention":
        return "export the torch model with --opset 20, whose attention is made of products, or type another --target"
    if operator.startswith(("QLinear", "DynamicQuantize")) or "Integer" in operator or "Quantized" in operator:
        return "add --requantize if the model is quantized already, or type another --target"
    return "type another --target, or leave it out"


ANY = ProviderTarget(name="")
TARGETS = (
    ProviderTarget(name="cpu"),
    ProviderTarget(name="cuda", kinds=ANY.kinds - {"dynamic int8"}, refused=_INTEGER, pays_float16=True),
    ProviderTarget(
        name="tensorrt",
        kinds=_FLOAT | {"static int8"},
        refused=_INTEGER
        | _operators(
            "AffineGrid Attention Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Col2Im "
            "CenterCropPad Compress ConcatFromSequence DFT Det HammingWindow HannWindow ImageDecoder MatMulInteger "
            "MaxRoiPool MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement "
            "OptionalHasElement RMSNormalization RegexFullMatch RotaryEmbedding STFT SequenceAt SequenceConstruct "
            "SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss "
            "SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique"
        ),
        contrib=frozenset(),
        pays_float16=True,
        is_symmetric=True,
        least_rank=16,
    ),
    ProviderTarget(
        name="openvino",
        refused=_operators(
            "Bernoulli DeformConv Det ImageDecoder LpPool MaxUnpool MelWeightMatrix Optional OptionalGetElement "
            "OptionalHasElement RegexFullMatch SequenceMap StringConcat StringNormalizer StringSplit "
            "TfIdfVectorizer"
        ),
        contrib=_operators(
            "Attention BiasGelu DequantizeLinear DynamicQuantizeMatMul EmbedLayerNormalization FusedConv FusedGemm "
            "FusedMatMul Gelu GroupQueryAttention MatMulNBits QuantizeLinear QuickGelu SkipLayerNormalization "
            "SkipSimplifiedLayerNormalization"
        ),
        pays_float16=True,
    ),
    ProviderTarget(
        name="qnn",
        kinds=_FLOAT | {"static int8"},
        precisions=("float32", "float16", "int8", "auto"),
        refused=(_INTEGER - {"QLinearMatMul"}) | {"Attention", "Loop", "MatMulInteger", "Scan"},
        contrib=frozenset({"DequantizeLinear", "Gelu", "QuantizeLinear"}),
        pays_float16=True,
        has_uint8_products=True,
        has_fixed_shapes=True,
    ),
)
