"""A bound on the change of a classifier's answers from the spectral error of its last layer.

With `z = W h + b`, `p = softmax(z)` and the factorized `z~`, `p~` of the same `h`:

    ||p - p~||_2  <=  1/2 ||W - left right||_2 ||h||_2          (softmax is 1/2-Lipschitz in the 2-norm)
    the top-1 answer cannot change where  z_(1) - z_(2)  >  sqrt(2) ||W - left right||_2 ||h||_2

Both hold for the head alone: `h` comes from the dense model, so changes of earlier layers are not included.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pydantic

import graph_passes as gp
from rsi_deploy.core.errors import GateError
from rsi_deploy.core.types import Array, Feeds
from rsi_deploy.io.onnx_reader import load_model
from rsi_deploy.runtime.sessions import make_session

PASS_THROUGH = {"Softmax", "LogSoftmax", "Identity", "Flatten", "Reshape", "Cast"}
EXACT_NORM_LIMIT = 4096


class SoftmaxBound(pydantic.BaseModel, frozen=True, extra="forbid"):
    """The bound and the observed values over evaluation samples.

    Attributes:
        site: classifier head.
        samples: number of samples.
        delta_norm: `||W - left right||_2`, or an upper bound of it.
        delta_norm_kind: "spectral" (exact) or "frobenius" (an upper bound, for very large heads).
        largest_ratio: largest observed `||p - p~||_2` relative to its bound; at most 1.
        violations: samples that exceed the bound; always 0 in a written report.
        guaranteed_unchanged: percent of samples whose top-1 answer the bound guarantees.
        observed_unchanged: percent of samples whose top-1 answer did not change.
    """

    site: str
    samples: int
    delta_norm: float
    delta_norm_kind: str
    largest_ratio: float
    violations: int
    guaranteed_unchanged: float
    observed_unchanged: float


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last node with a weight before the output: the weight's name, and the values around the node."""

    weight: str
    input: str
    output: str


def find_head(model: ir.Model) -> Head | None:
    """Return the classifier head of a graph with one output, or None if its output is not from a linear layer."""
    sites = {site.node: site for site in gp.find_sites(model) if isinstance(site, gp.Site) and site.groups == 1}
    value: ir.Value | None = model.graph.outputs[0] if len(model.graph.outputs) == 1 else None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in ("Gemm", "MatMul") and node.name in sites:
            data = node.inputs[0]
            scaled = node.op_type == "Gemm" and (_attribute(node, "alpha", 1.0) != 1.0 or _attribute(node, "transA", 0))
            if data is None or data.name is None or value.name is None or data.is_initializer() or scaled:
                return None
            return Head(weight=sites[node.name].weight, input=data.name, output=value.name)
        constant = [i is not None and (i.const_value is not None or i.is_initializer()) for i in node.inputs]
        if node.op_type == "Add" and any(constant) and not all(constant):
            value = node.inputs[constant.index(False)]  # the bias of a MatMul head
        elif node.op_type in PASS_THROUGH:
            value = node.inputs[0]
        else:
            return None
    return None


def softmax_bound(dense: Path, head: Head, factors: gp.SplitFactors, batches: Iterable[Feeds]) -> SoftmaxBound:
    """Measure the bound for `head` of the model at `dense` on evaluation inputs.

    Args:
        dense: dense ONNX model.
        head: result of `find_head`.
        factors: factors of the head, `left (1, out, rank)`, `right (1, rank, in)`, and optionally a change of its bias.
        batches: input name -> ready model input `(n, ...)`.

    Raises:
        GateError: A sample violates the bound, which only wrong factors or a wrong norm can cause.
    """
    model = load_model(dense)
    weight = next(s.load()[0] for s in gp.find_sites(model) if isinstance(s, gp.Site) and s.weight == head.weight)
    delta = weight.astype(np.float64) - factors.left[0].astype(np.float64) @ factors.right[0].astype(np.float64)
    if factors.bias is not None:  # h becomes (h, 1), and the change of the bias one more column
        delta = np.column_stack([delta, -factors.bias.astype(np.float64)])
    norm, kind = _upper_norm(delta)
    rows = [_observed(h, z, delta) for h, z in _tapped(model, dense, head, batches)]
    distances, norms, margins, unchanged = (np.concatenate(column) for column in zip(*rows, strict=True))
    return checked_bound(head.weight, norm, kind, distances, norms, margins, unchanged)


def checked_bound(
    site: str, delta_norm: float, kind: str, distances: Array, norms: Array, margins: Array, unchanged: Array
) -> SoftmaxBound:
    """Compare observations with the bound.

    Args:
        site: classifier head, for the record and the message.
        delta_norm: `||W - left right||_2` or an upper bound.
        kind: "spectral" or "frobenius".
        distances: `||p - p~||_2` per sample, float64 `(n,)`.
        norms: `||h||_2` per sample, float64 `(n,)`.
        margins: `z_(1) - z_(2)` per sample, float64 `(n,)`.
        unchanged: whether top-1 stayed, bool `(n,)`.

    Raises:
        GateError: A distance exceeds its bound, or a guaranteed answer changed.
    """
    bound = 0.5 * delta_norm * norms
    guaranteed = margins > np.sqrt(2) * delta_norm * norms
    slack = 1e-6  # the logits are float32
    violations = int((distances > bound + slack).sum() + (guaranteed & ~unchanged).sum())
    if violations:
        raise GateError(
            f"softmax bound: {violations} of {len(norms)} samples exceed what ||W - left right|| = {delta_norm:.4g} "
            f"allows at the head {site!r}",
            hint="the model does not use the factors that were measured",
        )
    ratio = np.divide(distances, bound, out=np.zeros_like(distances), where=bound > slack)
    return SoftmaxBound(
        site=site,
        samples=len(norms),
        delta_norm=delta_norm,
        delta_norm_kind=kind,
        largest_ratio=float(ratio.max(initial=0.0)),
        violations=violations,
        guaranteed_unchanged=100 * float(guaranteed.mean()),
        observed_unchanged=100 * float(unchanged.mean()),
    )


def _tapped(model: ir.Model, dense: Path, head: Head, batches: Iterable[Feeds]) -> Iterable[tuple[Array, Array]]:
    """Yield `(h, z)` of each batch from the dense model with two more outputs."""
    by_name = {value.name: value for node in model.graph for value in node.outputs}
    by_name.update({value.name: value for value in model.graph.inputs})
    tapped = [by_name[head.input], by_name[head.output]]
    model.graph.outputs.extend(value for value in tapped if value not in model.graph.outputs)
    path = dense.with_name("tapped.onnx")
    ir.save(model, path)  # the weights stay in the dense model's own data file
    try:
        session = make_session(path)
        for feeds in batches:
            h, z = session.run([head.input, head.output], dict(feeds))
            yield h.reshape(-1, h.shape[-1]), z.reshape(-1, z.shape[-1])
    finally:
        path.unlink(missing_ok=True)


def _observed(h: Array, z: Array, delta: Array) -> tuple[Array, Array, Array, Array]:
    h, z = h.astype(np.float64), z.astype(np.float64)
    h = np.pad(h, ((0, 0), (0, delta.shape[1] - h.shape[1])), constant_values=1.0)
    changed = z - h @ delta.T
    distance = np.linalg.norm(_softmax(z) - _softmax(changed), axis=1)
    top = np.sort(z, axis=1)
    margin = top[:, -1] - top[:, -2] if z.shape[1] > 1 else np.full(len(z), np.inf)
    return distance, np.linalg.norm(h, axis=1), margin, z.argmax(axis=1) == changed.argmax(axis=1)


def _attribute(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _softmax(z: Array) -> Array:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return np.asarray(e / e.sum(axis=1, keepdims=True))


def _upper_norm(delta: Array) -> tuple[float, str]:
    if min(delta.shape) > EXACT_NORM_LIMIT:
        return float(np.linalg.norm(delta)), "frobenius"
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    return float(np.sqrt(max(np.linalg.eigvalsh(gram)[-1], 0.0))), "spectral"
