"""Models from ONNX text, and their values by brute force: every value is an output, every patch is unfolded."""

import math

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F
from nets import session_of
from onnx import helper, numpy_helper, parser

import graph_passes as gp
from rsi_deploy.core.sites import site_name
from rsi_deploy.onnx_models.site_factorizer import graph_factors

HEAD = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>\n'


def text_model(text, *, seed=0, head=HEAD):
    """Return the model; values that it declares without data become random weights."""
    model = parser.parse_model(head + text)
    rng = np.random.default_rng(seed)
    for value in model.graph.value_info:
        tensor = value.type.tensor_type
        shape = [dim.dim_value for dim in tensor.shape.dim]
        array = rng.standard_normal(shape) / math.sqrt(max(1, math.prod(shape[1:]) if len(shape) > 2 else shape[0]))
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        model.graph.initializer.append(numpy_helper.from_array(array.astype(dtype), value.name))
    del model.graph.value_info[:]
    return model


def saved(model, path, *, external=False):
    if external:
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
            convert_attribute=False,
        )
    else:
        onnx.save(model, path)
    return path


def all_values(path, feeds):
    """Return every value of the main graph for one batch, by name."""
    model = onnx.load(path)
    known = {value.name for value in model.graph.output}
    for node in model.graph.node:
        for name in node.output:
            if name and name not in known:
                model.graph.output.append(onnx.ValueInfoProto(name=name))
                known.add(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    found = dict(zip(names, session.run(None, feeds), strict=True))
    return {**feeds, **found}


def outputs(path, feeds):
    return session_of(path).run(None, feeds)


def graph_sites(path):
    """Return the sites of a graph, by name."""
    return {site_name(s.weight): s for s in gp.find_sites(ir.load(path)) if isinstance(s, gp.Site)}


def really_split(path, target, replacements):
    """Write the model with these sites split."""
    model = ir.load(path)

    def source(site):
        found = replacements.get(site_name(site.weight))
        return gp.Dense(reason="stays") if found is None else graph_factors(found, site)

    records = gp.split(model, source)
    assert sum(isinstance(record, gp.Split) for record in records) == len(replacements)
    ir.save(model, target)
    return target


def patches(x, kernel, groups, stride, dilation, pads):
    """`(groups, rows, in * prod(kernel))` by unfolding everything; `pads` are all begins, then all ends."""
    axes = len(kernel)
    x = F.pad(x, [p for axis in reversed(range(axes)) for p in (pads[axis], pads[axes + axis])])
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
    x = x.unflatten(1, (groups, -1))
    order = (1, 0, *range(3, 3 + axes), 2, *range(3 + axes, 3 + 2 * axes))
    return x.permute(order).reshape(groups, -1, x.shape[2] * math.prod(kernel))


def input_rows(site, value):
    """Return all input rows `(groups, rows, in)` of a site."""
    x = torch.from_numpy(np.asarray(value)).float()
    w = site.window
    if w is None:
        return x.reshape(1, -1, x.shape[-1])
    return patches(x, w.kernel, site.groups, w.strides, w.dilations, w.pads_over(x.shape[2:]))


def output_rows(site, value):
    """Return all rows `(groups, rows, out)` of a value of the output's shape."""
    y = torch.from_numpy(np.asarray(value)).float()
    if site.window is None:
        return y.reshape(1, -1, y.shape[-1])
    return y.movedim(1, -1).reshape(-1, site.groups, site.out_features).transpose(0, 1)


def brute_moments(x, y):
    """Return the moments of rows `x (groups, rows, in)` and `y (groups, rows, out)`."""
    x, y = x.double(), y.double()
    a, b = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
    n = x.shape[1]
    return {
        "rows": n,
        "mean_x": x.mean(1),
        "mean_y": y.mean(1),
        "xx": a.mT @ a / n,
        "yx": b.mT @ a / n,
        "yy": b.square().sum((1, 2)) / n,
    }


def assert_moments(found, expected, tolerance=1e-4):
    assert found.rows == expected["rows"]
    for name, value in expected.items():
        if name != "rows":
            allowed = tolerance * max(1e-3, float(value.abs().max()))
            torch.testing.assert_close(getattr(found, name).double(), value, rtol=tolerance, atol=allowed, msg=name)
