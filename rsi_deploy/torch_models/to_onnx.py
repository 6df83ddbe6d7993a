"""Export a torch model to a dense ONNX model whose weights have their torch names, with the same bytes on any machine.

    torch module --torch.export--> program --torch.onnx.export(dynamo)--> ir.Model --clean--> dense.onnx

Cleaning folds constants (the exporter writes `Transpose(weight)`, and folding it loses the name of the weight),
restores the torch names, folds every BatchNorm into the Conv before it, and removes stack traces and paths.
"""

import contextlib
import inspect
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from graph_passes import FoldBatchNormPass
from graph_passes.constants import computed_constants
from rsi_deploy.core.errors import ModelError, UsageError
from rsi_deploy.torch_models.model_source import Source, no_torch_logs

logger = logging.getLogger(__name__)

# From opset 23 on, attention is one operator, which stays fused when its projections are split.
ATTENTION_OPSET = 23
DEFAULT_OPSET = 20
LAYOUT_OPS = {"Transpose", "Identity", "Cast", "CastLike"}
_COMPUTED_FROM = re.compile(r"_(v|orig|mask)$|parametrizations\.(?=[^.]+\.original\d*$)|(?<=\w)\.original\d*$")
# The operators with which weight_norm, spectral_norm and pruning compute a weight.
WEIGHT_ARITHMETIC = {
    "Add",
    "Div",
    "MatMul",
    "Mul",
    "Pow",
    "ReduceL2",
    "ReduceSum",
    "Reshape",
    "Sqrt",
    "Sub",
    "Transpose",
}


@dataclass(kw_only=True)
class ExportedModel:
    """The exported model in memory. Its weights share memory with the torch module."""

    model: ir.Model
    opset: int
    dynamic_batch: bool
    notes: list[str] = field(default_factory=list)


def to_onnx(source: Source, *, opset: int | None = None) -> ExportedModel:
    """Export a torch source to a clean `ir.Model`.

    Args:
        source: source with a `module` or a `program`.
        opset: ONNX opset; None for 23 if the model has attention (kept as one operator) and 20 otherwise.

    Raises:
        ModelError: the exporter failed; the message names its reason and the stage.
        UsageError: the exporter does not support the opset.
    """
    try:
        return _exported(source, opset)
    finally:
        _forget_traces()


def to_graph(module: torch.nn.Module, inputs: tuple[Any, ...]) -> ir.Model:
    """Export a module to a graph for a survey: every tensor has its torch name, and no weight is folded into another.

    Sizes are those of the inputs. Weights have their torch layout, apart from axes of size 1, and share its memory.
    Outputs that are no tensors, such as the cache of a language model, are left out.

    Args:
        module: module in evaluation mode; not changed.
        inputs: its positional arguments.

    Raises:
        Exception: torch cannot export it. This is any exception, because tracing runs the module's own code.
    """
    from onnxscript import optimizer

    try:
        with _quiet():
            program = torch.export.export(_TensorsOf(module), inputs)
        model = _converted(Source(name=type(module).__name__, example_inputs=inputs), program, ATTENTION_OPSET)
        _untie(program)
    finally:
        _forget_traces()
    _name_tied_weights_(model, program)
    names = _weight_names_after_folding(model)
    own = {*program.state_dict, *program.constants}

    def keeps_layout(node: ir.Node) -> bool | None:
        reads_own = any(value is not None and value.name in own for value in node.inputs)
        return False if reads_own and node.op_type not in ("Reshape", "Squeeze", "Unsqueeze") else None

    ir.passes.common.InlinePass()(model)
    optimizer.fold_constants(model, should_fold=keeps_layout)
    ir.passes.common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    ir.passes.common.ShapeInferencePass()(model)
    _restore_names_(model, names)
    for name, value in list(model.graph.initializers.items()):
        value.name = name.removeprefix("module.")
    return model


class _TensorsOf(torch.nn.Module):
    """A module without its outputs that are no tensors."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> list[torch.Tensor]:
        """Return the tensors among the outputs."""
        return [leaf for leaf in pytree.tree_leaves(self.module(*inputs)) if isinstance(leaf, torch.Tensor)]


def _forget_traces() -> None:
    """Clear torch's global caches, which keep every symbolic shape environment alive.

    Torch clears the caches of `ShapeEnv`'s methods only between environments of different versions, and two exports of
    one model have the same version.
    """
    FakeTensorMode.cache_clear()
    for found in (*vars(ShapeEnv).values(), *vars(symbolic_shapes).values()):
        function = found
        while callable(function):  # some caches are below another decorator
            if callable(clear := getattr(function, "cache_clear", None)):
                clear()
            function = getattr(function, "__wrapped__", None)


def _untie(program: "torch.export.ExportedProgram") -> None:
    """Break the cycle symbols --> tensor --> symbolic sizes, which passes through C++ and is never collected.

    Otherwise every captured program stays in memory with its cache of traced operators.
    """
    for node in program.graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        environment: Any = getattr(mode, "shape_env", None)
        if environment is not None:
            environment.tracked_fakes = None
            getattr(environment, "fake_tensor_cache", {}).clear()


def _exported(source: Source, opset: int | None) -> ExportedModel:
    notes: list[str] = []
    program = source.program
    if program is None:
        program = _captured(source, notes)
    if opset is None:
        opset = ATTENTION_OPSET if _has_attention(program) else DEFAULT_OPSET
    elif not 18 <= opset <= ATTENTION_OPSET:
        raise UsageError(f"--opset must be between 18 and {ATTENTION_OPSET} for a torch model, but got {opset}")
    model = _converted(source, program, opset)
    _untie(program)
    dynamic = all(v.shape is None or not isinstance(v.shape[0], int) for v in model.graph.inputs if v.shape != ())
    if not dynamic and source.program is not None:
        notes.append(f"the batch size is fixed at {model.graph.inputs[0].shape[0]}, as {source.name} was exported")  # type: ignore[index]
    _name_tied_weights_(model, program)
    clean_(model)
    return ExportedModel(model=model, opset=opset, dynamic_batch=dynamic, notes=notes)


def clean_(model: ir.Model) -> None:
    """Fold constants and BatchNorms, give the weights their torch names, and remove metadata of the machine."""
    from onnxscript import optimizer

    names = _weight_names_after_folding(model)
    FoldBatchNormPass()(model)  # before the optimizer, which would fold in float32
    optimizer.optimize_ir(model, should_fold=_folding(model))
    _restore_names_(model, names)
    FoldBatchNormPass()(model)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    model.graph.name = "main"


def _captured(source: Source, notes: list[str]) -> "torch.export.ExportedProgram":
    """Run `torch.export` with a dynamic batch, or with a fixed one and a note if the model does not allow it."""
    assert source.module is not None
    module, inputs = source.module, source.example_inputs
    dynamic = _dynamic_batch(module, inputs)
    try:
        with _quiet():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic)
    except Exception as error:
        reason = _first_line(error)
        logger.info("no dynamic batch: %s", error)
    fixed = tuple(t[:1] if isinstance(t, torch.Tensor) and t.ndim else t for t in inputs)
    try:
        with _quiet():
            program = torch.export.export(module, fixed)
    except Exception as error:
        raise ModelError(
            f"torch.export cannot capture {source.name}: {_first_line(error)}"
            f"; change the module, or export it to ONNX yourself and give that file"
        ) from error
    source.example_inputs = fixed
    notes.append(f"the batch size is fixed at 1: the model does not export with a dynamic one ({reason})")
    return program


def _dynamic_batch(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return `dynamic_shapes` for torch.export with one batch size for all inputs. `*args` are one nested tuple."""
    batch = torch.export.Dim("batch")
    flat = tuple({0: batch} if isinstance(t, torch.Tensor) and t.ndim else None for t in inputs)
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return flat
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*flat[:named], flat[named:])


def _converted(source: Source, program: "torch.export.ExportedProgram", opset: int) -> ir.Model:
    names = ["input"] if len(source.example_inputs) == 1 else None
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                opset_version=opset,
                input_names=names,
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            f"torch.onnx.export cannot convert {source.name}: {_first_line(error)}"
            f"; change the module, or export it to ONNX yourself and give that file"
        ) from error
    assert exported is not None
    model: ir.Model = exported.model
    outputs = model.graph.outputs
    for i, value in enumerate(outputs):
        value.name = "output" if len(outputs) == 1 else f"output_{i}"
    rename_axis_(model, 0, "batch")
    return model


def rename_axis_(model: ir.Model, axis: int, name: str) -> None:
    """Rename the anonymous symbol of the exporter (`s77`) for an axis of the first input, everywhere."""
    first = next((v.shape[axis] for v in model.graph.inputs if v.shape and len(v.shape) > axis), None)
    symbol = first.value if isinstance(first, ir.SymbolicDim) else None
    if not symbol:
        return
    values = list(model.graph.inputs)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    for value in values:
        if value.shape is None or value.shape.frozen:
            continue
        for place, dim in enumerate(value.shape):
            if isinstance(dim, ir.SymbolicDim) and dim.value == symbol:
                value.shape[place] = name
            elif isinstance(dim, ir.SymbolicDim) and dim.value and symbol in dim.value:
                value.shape[place] = dim.value.replace(symbol, name)


def _name_tied_weights_(model: ir.Model, program: "torch.export.ExportedProgram") -> None:
    """Give a tied weight the first of its names, as `named_parameters` does. The exporter takes any of them."""
    first: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    initializers = model.graph.initializers
    for name, tensor in program.state_dict.items():
        known = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
        if tensor.numel() and name in initializers and known not in initializers:
            initializers[name].name = known


def _has_attention(program: "torch.export.ExportedProgram") -> bool:
    return any("scaled_dot_product_attention" in str(node.target) for node in program.graph.nodes)


def _weight_names_after_folding(model: ir.Model) -> dict[str, str]:
    """Map each value that is a layout of one initializer, or computed from it, to the name of that initializer."""
    names: dict[str, str] = {}
    computed = computed_constants(model.graph)
    for node in model.graph:
        is_layout = node.op_type in LAYOUT_OPS
        if not is_layout and node.outputs[0] not in computed:
            continue
        sources = [value for value in (node.inputs[:1] if is_layout else node.inputs) if value is not None]
        source = max(sources, key=_size, default=None)
        root = source and names.get(source.name or "", source.name if source.is_initializer() else None)
        if root and node.outputs[0].name:
            names[node.outputs[0].name] = root if is_layout else _COMPUTED_FROM.sub("", root)
    return names


def _folding(model: ir.Model) -> Callable[[ir.Node], bool | None]:
    """Return the rule for folding a node: True, False, or None for the rules of the optimizer.

    A weight with other users is not folded into a copy. A weight that is computed from constants, as by weight_norm,
    spectral_norm and pruning, is folded at any size unless the file would grow.
    """
    computed = {value.name for value in computed_constants(model.graph.all_nodes())}

    def stays(value: ir.Value) -> bool:
        return any(user.outputs[0].name not in computed for user, _ in value.uses())

    def is_folded(node: ir.Node) -> bool | None:
        weight = node.inputs[0] if node.inputs else None
        if node.op_type == "Transpose" and weight is not None and weight.is_initializer() and len(weight.uses()) > 1:
            return False
        operands = [value for value in node.inputs if value is not None and value.shape is not None]
        shape = node.outputs[0].shape
        if node.op_type not in WEIGHT_ARITHMETIC or node.outputs[0].name not in computed or shape is None:
            return None
        largest = max(operands, key=_size, default=None)
        return True if largest and not stays(largest) and 0 <= _size(node.outputs[0]) <= _size(largest) else None

    return is_folded


def _size(value: ir.Value) -> int:
    """Return the number of elements of a value, or -1 if its shape is unknown."""
    shape = value.shape
    return math.prod(shape.numpy()) if shape is not None and shape.is_static() else -1


def _restore_names_(model: ir.Model, names: dict[str, str]) -> None:
    initializers = model.graph.initializers
    for name in list(initializers):
        root = names.get(name)
        if root and root not in initializers:
            initializers[name].name = root


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turn off gradients, fused paths, and the prints and warnings of the exporter.

    With gradients, torch.export and torch.onnx disagree about the strides of attention with a learned bias
    (pytorch/pytorch#136543). Without gradients, torch's modules would take fused paths that cannot be exported.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), no_torch_logs(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _first_line(error: Exception) -> str:
    r"""Return the reason in an exporter's message. torch.onnx writes it below its advice, under a headline.

    >>> _first_line(ValueError("Failed.\nNext steps: ...\n## Exception summary\n\nCannot view a tensor\n(...)"))
    'Cannot view a tensor'
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    _, _, summary = text.partition("## Exception summary")
    lines = [line.strip() for line in (summary or text).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]
