import numpy as np
import pytest
from nets import mlp_onnx

from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.feeding import Feeding, as_input
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData, NamedData, open_data
from rsi_deploy.evaluation.sample_feeds import sample_feeds
from rsi_deploy.runtime.feeds.inputs import InputSpec

IDS = np.arange(30).reshape(10, 3)
MASK = np.ones((10, 3), bool)
PICTURES = np.arange(10 * 4 * 4, dtype=np.uint8).reshape(10, 4, 4)
STEPS = Preprocessing(mean=(0.5,), std=(0.5,))


def spec(name="x", shape=("N", 3), dtype=np.int64):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


def fed(dataset, specs, steps=None, size=4):
    batches = list(Feeding(dataset, specs, steps).batches(size))
    return {name: np.concatenate([feeds[name] for feeds, _ in batches]) for name in batches[0][0]}


def test_arrays_go_to_the_inputs_of_their_names():
    found = fed(NamedData({"mask": MASK, "ids": IDS, "other": IDS}), [spec("ids"), spec("mask")])
    assert list(found) == ["ids", "mask"]
    np.testing.assert_array_equal(found["ids"], IDS)
    assert found["mask"].dtype == np.int64, "truth values become the model's integers"


def test_one_array_goes_to_the_one_input_whatever_its_name():
    np.testing.assert_array_equal(fed(ArrayData(IDS), [spec("anything")])["anything"], IDS)
    np.testing.assert_array_equal(fed(NamedData({"tokens": IDS}), [spec("ids")])["ids"], IDS)


@pytest.mark.parametrize("key", ["images", "x", "pixels"])
def test_pictures_go_through_the_preprocessing_whatever_they_are_called(tmp_path, key):
    np.savez(tmp_path / "p.npz", **{key: PICTURES})
    found = fed(open_data(tmp_path / "p.npz"), [spec("pixels", ("N", 1, 4, 4), np.float32)], STEPS)
    np.testing.assert_array_equal(found["pixels"], STEPS.apply(PICTURES[..., None]))


def test_an_array_of_the_inputs_name_goes_before_pictures(tmp_path):
    ready = np.zeros((10, 1, 4, 4), np.float32)
    np.savez(tmp_path / "p.npz", images=PICTURES, pixels=ready)
    found = fed(open_data(tmp_path / "p.npz"), [spec("pixels", ("N", 1, 4, 4), np.float32)], STEPS)
    np.testing.assert_array_equal(found["pixels"], ready)


def test_an_npz_of_named_arrays_may_hold_more(tmp_path):
    arrays = {"ids": IDS, "mask": MASK, "files": np.array([f"{i}.txt" for i in range(10)]), "seed": np.int64(3)}
    np.savez(tmp_path / "t.npz", **arrays, labels=np.arange(10) % 2)
    dataset = open_data(tmp_path / "t.npz")
    assert (len(dataset), dataset.kind) == (10, "named")
    assert list(fed(dataset, [spec("mask"), spec("ids")])) == ["mask", "ids"]
    first = dataset.fingerprint()
    np.savez(tmp_path / "t.npz", **arrays, labels=np.arange(10) % 3)
    assert open_data(tmp_path / "t.npz").fingerprint() != first
    with pytest.raises(UsageError, match=r"every input needs as many samples.*{'ids': 10, 'seed': 0} for 10 labels"):
        dataset.select(["ids", "seed"])
    np.savez(tmp_path / "t.npz", ids=IDS, mask=MASK, labels=np.arange(9))
    with pytest.raises(UsageError, match="holds 10 inputs but 9 labels"):
        open_data(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("dataset", "specs", "words"),
    [
        (ArrayData(IDS), [spec("ids"), spec("mask")], "has the inputs ids, mask, but the data hold one array"),
        (
            NamedData({"ids": IDS}),
            [spec("ids"), spec("mask")],
            "the data hold ids; give an .npz with one array for each",
        ),
        (NamedData({"a": IDS, "b": IDS}), [spec("ids")], "has the input ids, but the data hold a, b; give data with"),
        (NamedData({"ids": IDS * 1.5}), [spec("ids")], "takes ids: int64 .N, 3., but the data are float64"),
        (ArrayData(np.full((4, 3), np.nan)), [spec("x", dtype=np.float32)], "the data for x have NaN"),
        (ArrayData(IDS * 100), [spec("x", dtype=np.int8)], "the data range from 0 to 1100, which does not fit"),
    ],
)
def test_data_that_do_not_fit_say_why(dataset, specs, words):
    with pytest.raises(UsageError, match=words):
        fed(dataset, specs)


def test_a_type_is_changed_where_no_value_is():
    assert as_input(IDS.astype(np.int32), spec(), option="--data").dtype == np.int64
    assert as_input(IDS, spec(dtype=np.uint8), option="--data").dtype == np.uint8
    assert as_input(IDS * 1.0, spec(dtype=np.float16), option="--data").dtype == np.float16


class Own:
    """A data set of the user's own that gives other batches than its columns promise."""

    kind, columns, default, classes, labels = "named", ("ids", "mask"), "", (), None

    def __init__(self, *batches):
        self._batches = batches

    def __len__(self):
        return 4

    def select(self, names):
        return self

    def fingerprint(self):
        return "own"

    def batches(self, batch_size, steps, limit=None):
        yield from ((inputs, None) for inputs in self._batches)


def test_a_batch_that_lacks_an_input_is_refused():
    assert list(fed(Own({"ids": IDS, "mask": MASK}), [spec("ids"), spec("mask")])) == ["ids", "mask"]
    with pytest.raises(UsageError, match="--data: the model takes mask, but a batch holds ids; give an array for each"):
        fed(Own({"ids": IDS}), [spec("ids"), spec("mask")])


def test_data_that_give_no_samples_time_nothing(tmp_path):
    model = mlp_onnx(tmp_path / "m.onnx")
    given = Own({"input": np.ones((4, 12), np.float32)})
    given.columns = ("input",)
    assert sample_feeds(given, model, "cpu", 4)["input"].shape == (4, 12)
    given = Own()
    given.columns = ("input",)
    with pytest.raises(UsageError, match=r"have no samples for .*m\.onnx; give other data, or leave out --data"):
        sample_feeds(given, model, "cpu", 4)
