"""A tiny decoder with random weights and caches, as onnxruntime-genai's builder writes them, beside a tokenizer."""

import json

import numpy as np
import onnx
import text_models
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, KV_HEADS, HEAD, INNER = 2, 4, 2, 16, 96
WIDTH = HEADS * HEAD
CONTEXT = 128
CONFIG = {"model": {"type": "llama", "context_length": CONTEXT, "decoder": {"filename": "model.onnx"}}}


def decoder(width="kv_cache_dim", rows=text_models.ROWS, tied=False, seed=0):
    """Return the model: for each layer a fused q/k/v product, GroupQueryAttention, and a gated product of two.

    Args:
        width: last dimension of the caches; a text leaves it open.
        rows: number of tokens of the vocabulary.
        tied: use the weight of the head as the table of the tokens too.
        seed: random seed of the weights.
    """
    rng = np.random.default_rng(seed)
    tensors, nodes = [], []

    def weight(name, *shape):
        values = rng.standard_normal(shape) / shape[0] ** 0.5
        tensors.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def node(op_type, inputs, outputs, **attributes):
        nodes.append(helper.make_node(op_type, inputs, outputs, name=f"/{outputs[0]}", **attributes))
        return outputs[0]

    angles = np.outer(np.arange(CONTEXT), 100.0 ** -(np.arange(HEAD // 2) / (HEAD // 2)))
    tensors += [numpy_helper.from_array(np.cos(angles).astype(np.float32), "cos")]
    tensors += [numpy_helper.from_array(np.sin(angles).astype(np.float32), "sin")]
    tensors += [numpy_helper.from_array(np.array([1]), "ones"), numpy_helper.from_array(np.array(1), "one")]
    tensors += [numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale")]
    node("ReduceSum", ["attention_mask", "ones"], ["count"], keepdims=0)
    node("Sub", ["count", "ones"], ["before"])
    node("Cast", ["before"], ["last"], to=TensorProto.INT32)
    node("Shape", ["attention_mask"], ["shape"])
    node("Gather", ["shape", "one"], ["long"], axis=0)
    node("Cast", ["long"], ["total"], to=TensorProto.INT32)
    weight("lm_head", WIDTH, rows)
    table = node("Transpose", ["lm_head"], ["table"], perm=[1, 0]) if tied else weight("table", rows, WIDTH)
    x = node("Gather", [table, "input_ids"], ["embedded"])
    for layer in range(LAYERS):
        at = f"layers.{layer}"
        normed = node("SimplifiedLayerNormalization", [x, "scale"], [f"{at}.norm"])
        qkv = node("MatMul", [normed, weight(f"{at}.qkv_w", WIDTH, WIDTH + 2 * KV_HEADS * HEAD)], [f"{at}.qkv"])
        pasts = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
        presents = [f"present.{layer}.{kind}" for kind in ("key", "value")]
        attended = node(
            "GroupQueryAttention",
            [qkv, "", "", *pasts, "last", "total", "cos", "sin"],
            [f"{at}.attended", *presents],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        x = node("Add", [x, node("MatMul", [attended, weight(f"{at}.o_w", WIDTH, WIDTH)], [f"{at}.o"])], [f"{at}.x"])
        normed = node("SimplifiedLayerNormalization", [x, "scale"], [f"{at}.norm2"])
        gate = node("MatMul", [normed, weight(f"{at}.gate_w", WIDTH, INNER)], [f"{at}.gate"])
        up = node("MatMul", [normed, weight(f"{at}.up_w", WIDTH, INNER)], [f"{at}.up"])
        inner = node("Mul", [node("Sigmoid", [gate], [f"{at}.open"]), up], [f"{at}.inner"])
        x = node("Add", [x, node("MatMul", [inner, weight(f"{at}.down_w", INNER, WIDTH)], [f"{at}.down"])], [f"{at}.y"])
    node("MatMul", [node("SimplifiedLayerNormalization", [x, "scale"], ["final"]), "lm_head"], ["logits"])
    caches = [f"{layer}.{kind}" for layer in range(LAYERS) for kind in ("key", "value")]
    inputs = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])]
    inputs += [helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch_size", "total_length"])]
    past, total = (["batch_size", KV_HEADS, name, width] for name in ("past_length", "total_length"))
    inputs += [helper.make_tensor_value_info(f"past_key_values.{each}", TensorProto.FLOAT, past) for each in caches]
    logits = ["batch_size", "sequence_length", rows]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, logits)]
    outputs += [helper.make_tensor_value_info(f"present.{each}", TensorProto.FLOAT, total) for each in caches]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(
        helper.make_graph(nodes, "decoder", inputs, outputs, tensors), opset_imports=opsets, ir_version=10
    )


def write_folder(folder, **how):
    """Write the folder of the decoder: model.onnx, genai_config.json and tokenizer.json; return the folder."""
    folder.mkdir(parents=True)
    onnx.save(decoder(**how), folder / "model.onnx")
    (folder / "genai_config.json").write_text(json.dumps(CONFIG))
    text_models.write_tokenizer(folder)
    return folder
