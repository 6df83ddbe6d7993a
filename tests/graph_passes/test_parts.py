"""What a rewrite builds with has a place in the graph, and numbers, or is refused."""

import numpy as np
import onnx_ir as ir
import pytest

from graph_passes import SplitFactors
from graph_passes.constants import add_constant
from graph_passes.parts import Parts, Store
from graph_passes.records import in_memory
from graph_passes.split_gemm import SplitGemmPass
from graph_passes.survey import survey

TEXT = f"""
<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 4] x) => (float[N, 6] y) <float[6, 4] w = {{{", ".join(["1"] * 24)}}}> {{ y = Gemm <transB = 1> (x, w) }}
"""


@pytest.fixture
def model():
    return ir.from_onnx_text(TEXT)


def test_a_constant_needs_a_graph_to_stand_in(model):
    (node,) = model.graph
    value = add_constant(np.ones(2, np.float32), "ones", node, as_node=False)
    assert model.graph.initializers["ones"] is value
    loose = ir.node("Relu", [ir.Value(name="x")], name="loose")
    with pytest.raises(ValueError, match="node 'loose' belongs to no graph, so 'ones' has no place"):
        add_constant(np.ones(2, np.float32), "ones", loose, as_node=False)


def test_a_correction_that_is_none_is_not_added(model):
    (found,) = survey(model, [SplitGemmPass])
    left, right = np.ones((1, 6, 2), np.float32), np.ones((1, 2, 4), np.float32)
    store = Store(model, in_memory, overridable=False)
    with_one = Parts(
        found=found, factors=SplitFactors(left=left, right=right, bias=np.ones(6, np.float32)), store=store
    )
    np.testing.assert_array_equal(with_one.bias((6,), 2.0).const_value.numpy(), np.full(6, 2))
    without = Parts(found=found, factors=SplitFactors(left=left, right=right), store=store)
    with pytest.raises(ValueError, match="has no bias correction"):
        without.bias((6,))
