"""Tiny folders of models that read text: an ONNX encoder or decoder beside a tokenizer of whole words."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WORDS = [f"w{number}" for number in range(60)]
WIDTH = 12
ROWS = len(WORDS) + 4
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def write_tokenizer(folder, words=WORDS, ends=True):
    """Write tokenizer.json, which knows padding, the unknown word, two special tokens (`ends`) and these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    numbers = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokens = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=tokens)
    tokenizer.enable_padding(length=50)  # a file's own settings of padding must not count
    tokenizer.save(str(folder / "tokenizer.json"))


def model(inputs=INPUTS, length="tokens", rows=ROWS, norm=False):
    """Return an ONNX model: a table, two products with a ReLU, and a mean over the tokens that the mask shows.

    Args:
        inputs: names of the inputs, token ids first.
        length: number of tokens; a text leaves it open.
        rows: rows of the table.
        norm: put a normalization between that onnxruntime knows and ONNX does not.
    """
    rng = np.random.default_rng(0)
    weights = {
        "table": rng.standard_normal((rows, WIDTH)),
        "up": rng.standard_normal((WIDTH, 2 * WIDTH)),
        "down": rng.standard_normal((2 * WIDTH, WIDTH)) / 4,
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        *([helper.make_node("SimplifiedLayerNormalization", ["x", "scale"], ["n"])] if norm else []),
        helper.make_node("MatMul", ["n" if norm else "x", "up"], ["u"]),
        helper.make_node("Relu", ["u"], ["r"]),
        helper.make_node("MatMul", ["r", "down"], ["d"]),
    ]
    last = "d"
    if "attention_mask" in inputs:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["m", "axis"], ["m3"]),
            helper.make_node("Mul", ["d", "m3"], ["shown"]),
        ]
        last = "shown"
    for name in inputs[2:]:
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_f"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", [f"{name}_f", "axis"], [f"{name}_3"]),
            helper.make_node("Add", [last, f"{name}_3"], [f"{name}_sum"]),
        ]
        last = f"{name}_sum"
    nodes.append(helper.make_node("ReduceMean", [last, "one"], ["y"], keepdims=0))
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    tensors += [numpy_helper.from_array(np.array([2]), "axis"), numpy_helper.from_array(np.array([1]), "one")]
    tensors += [numpy_helper.from_array(np.ones(WIDTH, np.float32), "scale")] if norm else []
    values = [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", length]) for name in inputs]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])
    graph = helper.make_graph(nodes, "texts", values, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def write_folder(folder, where="onnx/model.onnx", config=None, external=False, **how):
    """Write a model's folder as optimum does: the model, config.json and tokenizer.json; return the folder."""
    path = folder / where
    path.parent.mkdir(parents=True, exist_ok=True)
    how_saved = (
        {"save_as_external_data": True, "location": f"{path.name}_data", "size_threshold": 100} if external else {}
    )
    onnx.save(model(**how), path, **how_saved)
    found = {"architectures": ["BertModel"], "max_position_embeddings": 24} | (config or {})
    (folder / "config.json").write_text(json.dumps(found))
    write_tokenizer(folder)
    return folder


def write_text(path, documents=40, texts=4, seed=0):
    """Write documents of short texts, parted by blank lines; the first word of each text names its document."""
    rng = np.random.default_rng(seed)
    lines = []
    for document in range(documents):
        for _ in range(texts):
            words = rng.choice(WORDS[40:], rng.integers(1, 12))
            lines.append(" ".join([WORDS[document % 40], *words]))
        lines.append("")
    path.write_text("\n".join(lines))
    return path


def decoder(table, *, up=None, down=None, head=None):
    """Return an ONNX decoder without memory: logits of the next token from the last one.

    Args:
        table: rows of the tokens, `(rows, width)`; the logits themselves without `up`, `down` and `head`.
        up, down: weights of a residual MLP, `(width, hidden)` and `(hidden, width)`.
        head: weight that makes logits, `(width, rows)`.
    """
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x" if up is not None else "logits"])]
    if up is not None:
        nodes += [
            helper.make_node("MatMul", ["x", "up"], ["u"]),
            helper.make_node("Relu", ["u"], ["r"]),
            helper.make_node("MatMul", ["r", "down"], ["d"]),
            helper.make_node("Add", ["x", "d"], ["s"]),
            helper.make_node("MatMul", ["s", "head"], ["logits"]),
        ]
    weights = {"table": table, "up": up, "down": down, "head": head}
    tensors = [numpy_helper.from_array(w.astype(np.float32), name) for name, w in weights.items() if w is not None]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    rows = (table if head is None else head).shape[1]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", rows])
    graph = helper.make_graph(nodes, "decoder", [ids], [logits], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def decoder_weights(width=24, hidden=48, rank=6, seed=0):
    """Return weights of a decoder whose products have few large singular values, and whose tokens are predictable."""
    rng = np.random.default_rng(seed)

    def weight(*shape):
        low = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1])) / rank**0.5
        return (low + 0.1 * rng.standard_normal(shape)) / shape[0] ** 0.5

    weights = {"table": rng.standard_normal((ROWS, width)), "up": weight(width, hidden), "down": weight(hidden, width)}
    return weights | {"head": 2 * weight(width, ROWS)}


def write_decoder(folder, proto=None, length=16):
    """Write the folder of a decoder that reads windows of so many tokens; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(decoder(**decoder_weights()) if proto is None else proto, folder / "model.onnx")
    found = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": length}
    (folder / "config.json").write_text(json.dumps(found))
    write_tokenizer(folder, ends=False)
    return folder


def write_own_text(path, proto, documents=40, tokens=100, seed=0):
    """Write documents that a decoder without memory draws itself, so that it predicts them as well as possible."""
    import onnxruntime

    session = onnxruntime.InferenceSession(proto.SerializeToString())
    logits = session.run(None, {"input_ids": np.arange(ROWS)[None]})[0][0].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds[:, :4] = 0  # special tokens, which no word stands for
    odds /= odds.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(documents):
        ids = [int(rng.integers(4, ROWS))]
        while len(ids) < tokens:
            ids.append(int(rng.choice(ROWS, p=odds[ids[-1]])))
        lines.append(" ".join(WORDS[number - 4] for number in ids))
    path.write_text("\n".join(lines) + "\n")
    return path
