import tempfile

import numpy as np
import pytest

from rsi_deploy.calibration.live_values import LiveValues


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


ARRAYS = {
    "f": np.arange(6, dtype=np.float32).reshape(2, 3),
    "h": np.ones((3, 1), np.float16),
    "i": np.array(7),
    "b": np.array([True, False]),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("limit", [0, 30, 10**6])
def test_stored_values_come_back(folder, limit):
    with LiveValues(limit) as values:
        values.put(0, ARRAYS)
        values.put(1, {"f": 2 * ARRAYS["f"]})
        found = values.get(0, ARRAYS)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
            assert found[name].shape == array.shape
        np.testing.assert_array_equal(values.get(1, ["f"])["f"], 2 * ARRAYS["f"])
        assert bool(files(folder)) == (limit < 10**6)


@pytest.mark.parametrize("limit", [0, 10**6])
def test_put_replaces_and_drop_removes(folder, limit):
    with LiveValues(limit) as values:
        values.put(0, ARRAYS)
        values.put(0, {"f": np.zeros(2)})
        np.testing.assert_array_equal(values.get(0, ["f"])["f"], np.zeros(2))
        values.drop(0, ["f", "never there"])
        assert not values.has(0, "f")
        with pytest.raises(KeyError):
            values.get(0, ["f"])
        values.put(1, {"f": np.ones(1)})
        values.keep_only(0, ["h", "f"])
        assert [name for name in ARRAYS if values.has(0, name)] == ["h"]
        assert values.has(1, "f")
        assert len(files(folder)) <= (0 if limit else len(ARRAYS)), "no more than there were values at a time"


def test_drop_frees_memory(folder):
    with LiveValues(8) as values:
        values.put(0, {"a": np.zeros(8, np.uint8), "b": np.zeros(1, np.uint8)})
        assert len(files(folder)) == 1
        values.drop(0, ["a"])
        values.put(0, {"c": np.zeros(8, np.uint8)})
        assert len(files(folder)) == 1
        for _ in range(3):
            values.put(0, {"c": np.zeros(8, np.uint8)})
        assert len(files(folder)) == 1


def test_files_are_reused(folder):
    rng = np.random.default_rng(0)
    with LiveValues(0) as values:
        for step in range(40):
            made = {name: rng.standard_normal(rng.integers(1, 4, 2)) for name in "abc"}
            values.keep_only(0, ["a"])
            values.put(0, made)
            for name, array in made.items():
                np.testing.assert_array_equal(values.get(0, [name])[name], array, err_msg=f"{name} at {step}")
            assert len(files(folder)) <= 6
        sizes = sorted(file.stat().st_size for file in files(folder))
        values.put(1, {"d": np.zeros(2, np.uint8)})
        assert sorted(file.stat().st_size for file in files(folder)) != sizes


def test_strings_and_sequences_stay_in_memory(folder):
    sequence, words = [np.zeros(3), np.ones((2, 2))], np.array(["a", "bc"], dtype=object)
    with LiveValues(0) as values:
        values.put(0, {"s": sequence, "w": words})
        found = values.get(0, ["s", "w"])
        assert found["s"] is sequence
        assert found["w"].tolist() == ["a", "bc"]
        values.drop(0, ["s", "w"])
        assert not files(folder)


def test_files_are_deleted_after_an_exception(folder):
    def fail():
        with LiveValues(0) as values:
            values.put(0, ARRAYS)
            assert files(folder)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert list(folder.iterdir()) == []
