import sys

import numpy as np
import pytest
import torch

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData, check_exists, open_data

X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10) % 3
MODULE = """
import itertools
import numpy as np
import torch
from rsi_deploy.data.sources import ArrayData

X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10) % 3
PICTURES = np.arange(10 * 6 * 5 * 3, dtype=np.uint8).reshape(10, 6, 5, 3)
calls = itertools.count()

def batches():
    for rows in np.split(np.arange(10), [3, 7]):
        yield X[rows], Y[rows]

def tensors(): return [(torch.from_numpy(X).requires_grad_(), torch.from_numpy(Y))]
def pictures(): return [[PICTURES[:4], Y[:4]], [PICTURES[4:], Y[4:]]]
def unlabelled(): return [X[:5], X[5:]]
def whole(): return X, Y
def named(): return [({"ids": X[:6], "mask": X[:6] > 3}, Y[:6]), ({"mask": X[6:] > 3, "ids": X[6:]}, Y[6:])]
def dataset(): return ArrayData(X, Y)

def shuffled():
    order = np.random.default_rng(next(calls)).permutation(10)
    return [(X[order], Y[order])]

def shrinking(): return [X[: 10 - next(calls)]]
def renaming(): return [({f"ids{next(calls)}": X}, Y)]
def empty(): return []
def number(): return 7
def triple(): return [(X, Y, Y)]
def uneven(): return [({"a": X, "b": X[:3]}, Y)]
def few_labels(): return [(X, Y[:3])]
def some_labels(): return [(X, Y), X]
def renamed(): return [({"ids": X}, Y), ({"tokens": X}, Y)]
def unnamed(): return [(X, Y), ({"ids": X}, Y)]
def ragged(): return [(X, Y), (X[:, :2], Y)]
def failing():
    yield X, Y
    raise RuntimeError("the disk is gone")
def with_argument(path): return []
not_callable = 3
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    (tmp_path / "given_data.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield "given_data:{}".format
    sys.modules.pop("given_data", None)


def read(dataset, batch_size=4, steps=None, limit=None):
    batches = list(dataset.batches(batch_size, steps, limit))
    labels = None if batches[0][1] is None else np.concatenate([labels for _, labels in batches])
    return np.concatenate([inputs for inputs, _ in batches]), labels, [len(inputs) for inputs, _ in batches]


@pytest.mark.parametrize("name", ["batches", "tensors", "whole", "dataset"])
def test_samples_are_in_order_for_any_batches_of_the_function(spec, name):
    data = open_data(spec(name))
    for batch_size in (1, 4, 99):
        inputs, labels, sizes = read(data, batch_size)
        np.testing.assert_array_equal(inputs, X)
        np.testing.assert_array_equal(labels, Y)
        assert sizes == [min(batch_size, 10 - start) for start in range(0, 10, batch_size)]
    rows = np.arange(4) * 10 // 4
    np.testing.assert_array_equal(read(data, 3, limit=4)[0], X[rows])
    np.testing.assert_array_equal(read(data, 3, limit=4)[1], Y[rows])
    assert (len(data), data.kind) == (10, "inputs")


def test_pictures_go_through_the_preprocessing(spec):
    data, steps = open_data(spec("pictures")), Preprocessing(crop=(4, 4))
    given_data = sys.modules["given_data"]
    assert data.kind == "images"
    np.testing.assert_array_equal(read(data, 3, steps)[0], steps.apply(given_data.PICTURES))
    np.testing.assert_array_equal(read(data)[0], given_data.PICTURES)


def test_several_inputs_are_named(spec):
    data = open_data(spec("named"))
    assert (data.kind, data.columns) == ("named", ("ids", "mask"))
    batches = list(data.select(["mask"]).batches(4, None))
    np.testing.assert_array_equal(np.concatenate([inputs["mask"] for inputs, _ in batches]), X > 3)
    assert all(list(inputs) == ["mask"] for inputs, _ in batches)
    with pytest.raises(UsageError, match="no column types; there are ids, mask"):
        data.select(["types"])


def test_labels_may_be_absent(spec):
    data = open_data(spec("unlabelled"))
    assert data.labels is None
    np.testing.assert_array_equal(read(data)[0], X)


def test_the_fingerprint_is_of_the_samples(spec):
    assert open_data(spec("batches")).fingerprint() == open_data(spec("tensors")).fingerprint()
    assert open_data(spec("batches")).fingerprint() != open_data(spec("unlabelled")).fingerprint()
    assert open_data(spec("dataset")).fingerprint() == ArrayData(X, Y).fingerprint()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("shuffled", "returns different samples at every call; it must return the same ones"),
        ("shrinking", "returns different samples at every call"),
        ("empty", "gives no batches"),
        ("number", "must return an iterable of .inputs, labels., but returned int"),
        ("triple", "a batch has 3 elements"),
        ("uneven", "the same number of samples, but got {'a': 10, 'b': 3}"),
        ("few_labels", "10 inputs but 3 labels"),
        ("some_labels", "labels with some batches and none with 10"),
        ("renaming", "returns different samples at every call"),
        ("renamed", "gives ids in its first batch and tokens in a later one; give the same inputs in every batch"),
        ("unnamed", "gives one array without a name in its first batch and ids in a later one"),
        ("ragged", "do not fit each other"),
        ("failing", "failed: RuntimeError: the disk is gone"),
        ("with_argument", "failed: TypeError"),
        ("not_callable", "no function 'not_callable'"),
        ("batch", "no function 'batch'; similar names: batches"),
    ],
)
def test_what_a_function_can_get_wrong(spec, name, words):
    with pytest.raises(UsageError, match=words) as caught:
        read(open_data(spec(name)))
    assert "given_data" in str(caught.value) or name == "ragged"


def test_a_name_is_no_path_and_a_path_no_name(spec, tmp_path):
    with pytest.raises(UsageError, match=r"cannot import 'absent_module' of absent_module:f.*data are a path"):
        open_data("absent_module:f")
    with pytest.raises(UsageError, match="takes nothing after a #, but got split"):
        open_data(f"{spec('batches')}#split=test")
    (tmp_path / "odd:name").mkdir()
    with pytest.raises(UsageError, match="no class folders"):
        open_data("odd:name")
    check_exists(spec("batches"))
    (tmp_path / "broken_data.py").write_text("1 / 0")
    with pytest.raises(UsageError, match="importing 'broken_data' failed: ZeroDivisionError"):
        open_data("broken_data:f")
    assert torch is not None
