"""Mutations of valid models and documents. The bytes select them, so equal bytes give equal results.

    model       any field of any message, found by protobuf's own description of it: names, dims, types, attributes,
                edges, tensors, subgraphs, functions; set, emptied, doubled, moved, taken from elsewhere
    document    any value of any object or list, in the same ways

Whoever chooses the bytes (a fuzzer by coverage, hypothesis by its own search) sees structure, not luck.
"""

import copy
import math
from typing import Any

from google.protobuf.message import Message
from onnx import ModelProto

INTEGERS = (0, 1, -1, 2, 7, 64, 127, 255, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, math.inf, -math.inf, math.nan)
TEXTS = ("", "x", "y", "w", "../w", "/dev/zero", "a\0b", "\x1b[2J", "\u202e", "[red]", "MatMul", "Conv", "n" * 300)
MOST = 4  # mutations


class Choices:
    """Numbers from bytes, and zeros after their end."""

    def __init__(self, data: bytes):
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """Return a number from 0 to `below` - 1."""
        size = 1 if below <= 256 else 2
        taken = self._data[self._at : self._at + size]
        self._at += size
        return int.from_bytes(taken, "little") % max(below, 1)

    def of(self, options: Any) -> Any:
        """Return one of the items."""
        return options[self.number(len(options))]

    @property
    def left(self) -> bool:
        """Whether bytes are left."""
        return self._at < len(self._data)


def mutated_model(model: ModelProto, data: bytes) -> ModelProto:
    """Return a copy of the model with a few changed fields."""
    made = ModelProto()
    made.CopyFrom(model)
    choices = Choices(data)
    words = [text for text in _texts(made) if text]
    for _ in range(1 + choices.number(MOST)):
        if choices.left:
            _mutate(made, choices, words)
    return made


def mutated_document(document: Any, data: bytes) -> Any:
    """Return a copy of the document with a few changed values."""
    made = copy.deepcopy(document)
    choices = Choices(data)
    for _ in range(1 + choices.number(MOST)):
        if choices.left:
            _change(made, choices)
    return made


def _mutate(message: Message, choices: Choices, words: list[str]) -> None:
    """Select a field at any depth and change it."""
    while True:
        fields = message.DESCRIPTOR.fields
        present = [field for field, _ in message.ListFields()]
        field = choices.of(present) if present and choices.number(8) else choices.of(fields)
        value = getattr(message, field.name)
        kind = field.message_type
        if field.is_repeated:
            if kind is not None and len(value) and choices.number(3):
                message = choices.of(value)
                continue
            _mutate_list(value, field, choices, words)
        elif kind is not None:
            if message.HasField(field.name) and choices.number(6):
                message = value
                continue
            if choices.number(2):
                message.ClearField(field.name)
            else:
                value.SetInParent()
        else:
            setattr(message, field.name, _scalar(field, value, choices, words))
        return


def _mutate_list(values: Any, field: Any, choices: Choices, words: list[str]) -> None:
    action, scalar = choices.number(6), field.message_type is None
    if action == 0 or not len(values):
        if scalar:
            values.append(_scalar(field, values[0] if len(values) else None, choices, words))
        else:
            values.add()
        return
    index = choices.number(len(values))
    if action == 1:
        del values[index]
    elif action == 2:
        values.extend([values[index]])
    elif action == 3:
        other, kept = choices.number(len(values)), list(values)
        if not scalar:
            kept = [type(entry).FromString(entry.SerializePartialToString()) for entry in kept]
        kept[index], kept[other] = kept[other], kept[index]
        del values[:]
        values.extend(kept)
    elif action == 4:
        del values[:]
    elif scalar:
        values[index] = _scalar(field, values[index], choices, words)
    else:
        values[index].Clear()


def _scalar(field: Any, old: Any, choices: Choices, words: list[str]) -> Any:
    """Return another value of the field's type."""
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            old = bytes(old or b"")
            return choices.of((b"", old[:-1], old + b"\0", old[: len(old) // 2], old + old, b"\xff" * len(old), b"x"))
        return choices.of(words) if words and choices.number(4) else choices.of(TEXTS)
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return choices.of(FLOATS)
    if kind == field.CPPTYPE_ENUM:
        return choices.of([*field.enum_type.values_by_number])
    number = choices.of((*INTEGERS, *range(24), (old or 0) + 1, (old or 0) - 1))
    if kind in (field.CPPTYPE_INT32,):
        return (number + (1 << 31)) % (1 << 32) - (1 << 31)
    if kind in (field.CPPTYPE_UINT64, field.CPPTYPE_UINT32):
        return number % (1 << 64 if kind == field.CPPTYPE_UINT64 else 1 << 32)
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _texts(message: Message) -> list[str]:
    found = []
    for field, value in message.ListFields():
        for entry in value if field.is_repeated else [value]:
            if isinstance(entry, Message):
                found += _texts(entry)
            elif isinstance(entry, str):
                found.append(entry)
    return sorted(set(found))


def _change(value: Any, choices: Choices) -> None:
    """Select a value at any depth and change it."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            if isinstance(value, dict):
                value[choices.of(TEXTS)] = _any(None, choices)
            else:
                value.append(_any(None, choices))
            return
        key = choices.of(keys)
        if isinstance(value[key], dict | list) and choices.number(5):
            value = value[key]
            continue
        action = choices.number(6)
        if action == 0:
            del value[key]
        elif action == 1:
            other = choices.of(keys)
            value[key], value[other] = value[other], value[key]
        elif action == 2 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        elif action == 2:
            value[choices.of(TEXTS)] = copy.deepcopy(value[key])
        else:
            value[key] = _any(value[key], choices)
        return


def _any(old: Any, choices: Choices) -> Any:
    """Return another value, often of the same type."""
    same = choices.number(4)
    if same and isinstance(old, bool):
        return not old
    if same and isinstance(old, int):
        return choices.of((*INTEGERS, old + 1, -old, old * 1000, 10**30))
    if same and isinstance(old, float):
        return choices.of((*FLOATS, -old, old * 1e6, 1e308, 5e-324))
    if same and isinstance(old, str):
        return choices.of((*TEXTS, old * 2, old[:-1], old.upper(), f"{old}%", f"-{old}", "1e999", "nan"))
    return choices.of((None, True, 0, -1, 1.5, math.nan, "", "text", [], {}, [[]], {"a": 1}, 10**30, "9" * 400))
