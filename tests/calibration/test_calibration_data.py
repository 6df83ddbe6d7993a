import numpy as np
import pytest
from PIL import Image

from rsi_deploy.calibration.calibration_data import (
    FOLDS,
    LEAST_CHECK,
    CalibrationData,
    check_source,
    part_sizes,
    refuse_shared,
    sample_digests,
)
from rsi_deploy.core.errors import UsageError
from rsi_deploy.data.preprocess import Preprocessing
from rsi_deploy.data.sources import ArrayData
from rsi_deploy.runtime.feeds.inputs import InputSpec

STEPS = Preprocessing(mean=(0.5,), std=(0.25,), layout="NCHW")


def spec(name="input", shape=("N", 4), dtype=np.float32):
    return InputSpec(name=name, dtype=np.dtype(dtype), shape=shape)


IDS, MASK = (spec(name, ("N", 5), np.int64) for name in ("ids", "mask"))
PICTURE = spec("pixels", ("N", 1, 6, 6))


def rows(count=100, width=4, dtype=np.float32):
    """Samples whose values are all their own index."""
    return np.repeat(np.arange(count)[:, None], width, axis=1).astype(dtype)


def together(data):
    """All samples of both parts, in the order of their values."""
    parts = [data.fit] if data.check is None else [data.fit, data.check]
    batches = [feeds for part in parts for feeds in part.feeds()]
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return {name: array[np.argsort(array.reshape(len(array), -1)[:, 0])] for name, array in found.items()}


def numbers(part):
    """The samples of a part, batch by batch."""
    return [feeds["input"][:, 0].tolist() for feeds in part.feeds()]


def flat(batches):
    return [number for batch in batches for number in batch]


# -- sources


@pytest.mark.parametrize("as_file", [True, False])
def test_arrays_by_the_models_input_names(tmp_path, as_file):
    arrays = {"ids": rows(50, 5, np.int64), "mask": rows(50, 5, np.int64) % 2, "labels": np.arange(50)}
    np.savez(tmp_path / "t.npz", **arrays)
    data = CalibrationData(tmp_path / "t.npz" if as_file else arrays, [IDS, MASK], None, 1000)
    assert (data.samples, data.check.samples, data.available) == (40, 10, 50)
    found = together(data)
    assert found.keys() == {"ids", "mask"}
    np.testing.assert_array_equal(found["ids"], arrays["ids"])
    np.testing.assert_array_equal(found["mask"], np.sort(arrays["mask"], axis=0))
    assert all((batch["mask"] == batch["ids"] % 2).all() for batch in data.feeds()), "rows stay together"


def test_a_data_set_for_a_model_with_one_input(tmp_path):
    np.savez(tmp_path / "d.npz", x=rows(), labels=np.zeros(100, int))
    for source in (tmp_path / "d.npz", str(tmp_path / "d.npz"), ArrayData(rows())):
        np.testing.assert_array_equal(together(CalibrationData(source, [spec()], None, 1000))["input"], rows())


@pytest.mark.parametrize("name", ["x", "images", "input"])
def test_pictures_go_through_the_preprocessing_whatever_the_input_is_called(tmp_path, name):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 6, 6), np.uint8)
    np.savez(tmp_path / "p.npz", **{"x" if name == "x" else "images": pictures})
    data = CalibrationData(tmp_path / "p.npz", [spec(name, ("N", 1, 6, 6))], STEPS, 1000)
    found = together(data)[name]
    assert found.shape == (10, 1, 6, 6)
    expected = (pictures / 255 - 0.5) / 0.25
    expected = expected[np.argsort(expected[:, 0, 0])]
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_folder_of_pictures(tmp_path):
    for kind in "ab":
        (tmp_path / "f" / kind).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((6, 6, 3), 40 * i, np.uint8)).save(tmp_path / "f" / kind / f"{i}.png")
    data = CalibrationData(tmp_path / "f", [spec("pixels", ("N", 3, 6, 6))], STEPS, 1000)
    assert together(data)["pixels"].shape == (6, 3, 6, 6)


# -- which samples


def test_samples_are_spaced_evenly():
    expected = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    for source in ({"input": rows()}, ArrayData(rows())):
        data = CalibrationData(source, [spec()], None, 8, check_size=2)
        assert sorted(flat(numbers(data.fit) + numbers(data.check))) == expected


def test_feeds_start_from_the_first_batch_each_time():
    data = CalibrationData({"input": rows()}, [spec()], None, 70)
    for part in (data.fit, data.check, data.in_sample):
        assert numbers(part) == numbers(part)


@pytest.mark.parametrize("count", [2, 3, 9, 60, 127, 128, 200, 1000])
def test_the_parts_are_disjoint_and_cover_what_is_read(count):
    data = CalibrationData({"input": rows(count)}, [spec()], None, 10_000)
    fit, check = flat(numbers(data.fit)), flat(numbers(data.check))
    assert sorted(fit + check) == list(range(count))
    assert (len(fit), len(check)) == (data.samples, data.check.samples)
    assert set(flat(numbers(data.in_sample))) <= set(fit)
    assert (data.needed is None) == (len(check) >= LEAST_CHECK) == (count >= 128)


@pytest.mark.parametrize(
    ("wished", "expected"),
    [
        ((5000, 1024), (1024, 256)),
        ((1000, 1024), (800, 200)),
        ((200, 1024), (136, 64)),
        ((100, 1024), (80, 20)),
        ((2, 1024), (1, 1)),
        ((1, 1024), (1, 0)),
        ((5000, 100), (100, 64)),  # more are read, so that the check part suffices
        ((5000, 1024, 600), (1024, 600)),
        ((1000, 1024, 600), (500, 500)),  # half is left to fit
        ((1000, 1024, 10), (990, 10)),
        ((1000, 1024, None, 16), (784, 208)),
        ((40, 1024, None, 16), (16, 16)),
        ((31, 1024, None, 16), (16, 0)),
    ],
)
def test_sizes_of_the_parts(wished, expected):
    assert part_sizes(*wished) == expected


def test_the_same_seed_makes_the_same_parts():
    def parts(seed):
        data = CalibrationData({"input": rows(300)}, [spec()], None, 1000, seed=seed)
        return numbers(data.fit), numbers(data.check)

    assert parts(3) == parts(3)
    assert parts(3)[1] != parts(4)[1]


@pytest.mark.parametrize("shape", [("N", 4), (1, 4), (16, 4)])
def test_all_parts_and_folds_see_every_class_of_sorted_data(shape):
    """Ten classes of 100 samples, one after the other."""
    data = CalibrationData({"input": rows(1000)}, [spec(shape=shape)], None, 10_000)
    check = flat(numbers(data.check))
    batches = numbers(data.fit)
    folds = [flat(batches[fold::FOLDS]) for fold in range(FOLDS)]
    unit = shape[0] if isinstance(shape[0], int) else 1
    assert max(map(len, folds)) - min(map(len, folds)) <= unit
    for part in (check, *folds):
        counts = np.bincount(np.array(part, int) // 100, minlength=10)
        assert counts.max() - counts.min() <= 2 + len(part) // 50, "a part has about as many of each class"
    wrong = np.bincount(np.array(flat(batches)[: len(folds[0])], int) // 100, minlength=10)
    assert wrong.max() - wrong.min() > 2 + len(folds[0]) // 50, "the first batches do not see the last class"


def test_batches_are_small_where_samples_are_few():
    for count, most in ((10, 2), (100, 20), (1000, 32)):
        data = CalibrationData({"input": rows(count)}, [spec()], None, 10_000)
        sizes = [len(batch) for batch in numbers(data.fit)]
        assert max(sizes) == data.batch == most
        assert len(sizes) >= FOLDS


def test_a_fixed_batch_gets_whole_batches():
    for source in ({"input": rows()}, ArrayData(rows())):
        data = CalibrationData(source, [spec(shape=(16, 4))], None, 50)
        assert (data.batch, data.samples, data.check.samples) == (16, 48, 32)
        assert [len(batch) for batch in numbers(data.fit)] == [16, 16, 16]
        assert [len(batch) for batch in numbers(data.check)] == [16, 16]
    for source, size in (({"input": rows(15)}, 100), ({"input": rows(100)}, 15)):
        with pytest.raises(UsageError, match="--calib: 15 samples are fewer than the model's fixed batch of 16"):
            CalibrationData(source, [spec(shape=(16, 4))], None, size)


def test_a_large_data_set_is_never_whole_in_memory():
    """As many batches as there are folds are open, however many samples there are."""
    alive = []

    class Watched(ArrayData):
        def batches(self, batch_size, preprocessing, limit=None):
            for batch in super().batches(batch_size, preprocessing, limit):
                alive.append(len(batch[0]))
                yield batch

    data = CalibrationData(Watched(rows(10_000)), [spec()], None, 10_000)
    alive.clear()
    feeds, waiting = data.feeds(), []
    for batch in feeds:
        alive.append(-len(batch["input"]))
        waiting.append(sum(alive))
    read = -(-2000 // len(waiting))  # check samples that pass by in one batch
    assert max(np.diff([0, *waiting])) <= 4 * 32 * 2 + read


# -- separate data for the check part


def test_separate_check_data_leave_all_to_the_fit():
    data = CalibrationData({"input": rows(90)}, [spec()], None, 1000, check_source={"input": rows(300)[200:]})
    assert sorted(flat(numbers(data.fit))) == list(range(90))
    assert flat(numbers(data.check)) == list(range(200, 300))
    assert data.needed is None
    few = CalibrationData({"input": rows(90)}, [spec()], None, 1000, check_source={"input": rows(100)[90:]})
    assert few.needed == LEAST_CHECK
    some = CalibrationData(
        {"input": rows(90)}, [spec()], None, 1000, check_source={"input": rows(300)[200:]}, check_size=5
    )
    assert flat(numbers(some.check)) == [200, 220, 240, 260, 280]


def test_check_data_that_were_fitted_to_are_refused():
    with pytest.raises(UsageError, match=r"--calib-check and --calib share samples \(5 of 10"):
        CalibrationData({"input": rows(90)}, [spec()], None, 1000, check_source={"input": rows(95)[85:]})
    # samples that are not fitted to are no harm
    CalibrationData({"input": rows(90)}, [spec()], None, 9, check_source={"input": rows(9)[1:]})


@pytest.mark.parametrize("source", [rows(9, 5), rows(9, 4, np.int64), rows(0, 4)])
def test_check_data_that_do_not_fit_are_named(source):
    with pytest.raises(UsageError, match=r"^--calib-check: "):
        CalibrationData({"input": rows(90)}, [spec()], None, 1000, check_source={"input": source})


def test_check_data_of_less_than_a_batch_are_refused():
    with pytest.raises(UsageError, match="--calib-check: 3 samples are fewer than the model's fixed batch of 16"):
        CalibrationData({"input": rows(64)}, [spec(shape=(16, 4))], None, 1000, check_source={"input": rows(3) + 100})


def test_values_are_converted_to_the_models_types():
    for came, wanted in ((np.float64, np.float32), (np.float32, np.float16), (np.int32, np.int64), (bool, np.int64)):
        data = CalibrationData({"input": rows(4).astype(came)}, [spec(dtype=wanted)], None, 10)
        assert together(data)["input"].dtype == wanted


# -- errors


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": rows(9, 5, np.int64)}, "--calib: no array for the input mask; there are ids"),
        ({"ids": rows(9, 5, np.int64), "mask": rows(8, 5, np.int64)}, "the same number of samples, but got"),
        ({"ids": rows(0, 5, np.int64), "mask": rows(0, 5, np.int64)}, "holds ids (0, 5), mask (0, 5); expected"),
        ({"ids": np.int64(3), "mask": np.int64(3)}, "has ids (), mask (); expected"),
        (
            {"ids": rows(9, 5), "mask": rows(9, 5, np.int64)},
            "takes ids: int64 (N, 5), but the data are float32 (samples, 5)",
        ),
        (
            {"ids": rows(9, 6, np.int64), "mask": rows(9, 5, np.int64)},
            "takes ids: int64 (N, 5), but the data are int64 (samples, 6)",
        ),
    ],
)
def test_arrays_that_do_not_fit(arrays, words):
    with pytest.raises(UsageError) as caught:
        CalibrationData(arrays, [IDS, MASK], None, 10)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "specs", "words"),
    [
        (rows(9, 5), [spec()], "--calib: the model takes input: float32 (N, 4), but the data are float32 (samples, 5)"),
        (rows(9, 4, np.int64), [spec()], "ready inputs the model's own type"),
        (np.zeros((9, 6, 6), np.uint8), [PICTURE], "8-bit pictures need a preprocessing"),
        (np.where(np.arange(4) == 2, np.nan, rows()).astype(np.float32), [spec()], "the data for input have NaN"),
        (
            rows(),
            [IDS, MASK],
            "the model has the inputs ids, mask, but the data hold x; give an .npz with one array for each of them",
        ),
    ],
)
def test_data_sets_that_do_not_fit(tmp_path, values, specs, words):
    np.savez(tmp_path / "d.npz", **{"images" if values.dtype == np.uint8 else "x": values})
    with pytest.raises(UsageError) as caught:
        list(CalibrationData(tmp_path / "d.npz", specs, None, 10).feeds())
    assert words in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_files_that_cannot_be_read(tmp_path, content):
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"^--calib: .*d\.npz"):
        CalibrationData(tmp_path / "d.npz", [spec()], None, 10)


def test_a_file_with_flipped_bytes(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", input=np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[200:210] = bytes(10)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(UsageError, match=r"^--calib: .*d\.npz cannot be read"):
        CalibrationData(tmp_path / "d.npz", [spec()], None, 10)


def test_a_pickle_is_not_executed(tmp_path):
    np.savez(tmp_path / "d.npz", input=np.array([object()] * 3, dtype=object))
    with pytest.raises(UsageError, match="cannot be read: array 'input' holds pickled objects"):
        CalibrationData(tmp_path / "d.npz", [spec()], None, 10)


def test_a_path_with_nothing_there_is_refused_before_any_work(tmp_path):
    with pytest.raises(UsageError, match=r"--calib: .*no\.npz does not exist; expected an \.npz"):
        check_source(tmp_path / "no.npz")
    for fine in (None, tmp_path, ArrayData(rows()), {"input": rows()}):
        check_source(fine)


# -- samples shared with evaluation data


def test_shared_samples_of_both_parts_are_counted():
    data = CalibrationData({"input": rows(60)}, [spec()], None, 1000)
    with pytest.raises(UsageError, match="20 of 30 .*--allow-shared-data"):
        refuse_shared(data, ArrayData(rows(70)[40:], np.zeros(30, int)), [spec()], None)
    refuse_shared(data, ArrayData(rows(90)[60:], np.zeros(30, int)), [spec()], None)


def test_shared_samples_of_separate_check_data_are_counted():
    data = CalibrationData({"input": rows(60)}, [spec()], None, 1000, check_source={"input": rows(80)[60:]})
    with pytest.raises(UsageError, match="10 of 30"):
        refuse_shared(data, ArrayData(rows(100)[70:]), [spec()], None)


def test_samples_that_are_not_used_are_not_shared():
    data = CalibrationData({"input": rows(60)}, [spec()], None, 5, check_size=1)  # every tenth
    refuse_shared(data, ArrayData(rows(9)[1:]), [spec()], None)
    with pytest.raises(UsageError, match="1 of 9"):
        refuse_shared(data, ArrayData(rows(9)), [spec()], None)


def test_pictures_are_compared_as_they_enter_the_model(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (10, 6, 6), np.uint8)
    np.savez(tmp_path / "p.npz", images=pictures)
    data = CalibrationData(tmp_path / "p.npz", [PICTURE], STEPS, 1000)
    with pytest.raises(UsageError, match="4 of 4"):
        refuse_shared(data, ArrayData(pictures[3:7]), [PICTURE], STEPS)
    with pytest.raises(UsageError, match="4 of 4"):  # ready inputs of the same pictures
        ready = np.concatenate([batch for batch, _ in ArrayData(pictures[3:7]).batches(4, STEPS)])
        refuse_shared(data, ArrayData(ready), [PICTURE], STEPS)
    refuse_shared(data, ArrayData(255 - pictures), [PICTURE], STEPS)


def test_a_digest_depends_on_the_values():
    both = list(sample_digests({"ids": rows(2), "mask": np.ones((2, 5))}))
    assert both[0] != both[1] != next(sample_digests({"ids": rows(2)}))
    assert list(sample_digests({"x": np.asfortranarray(rows(8, 4))})) == list(sample_digests({"x": rows(8, 4)}))
    first = list(sample_digests({"ids": rows(2), "mask": np.zeros((2, 5))}))
    assert both[1] != first[1], "another mask is another sample"
    data = CalibrationData({"input": rows(70)}, [spec()], None, 1000)
    assert len(data.digests()) == 70


def test_samples_of_different_shapes_are_never_joined():
    """Texts of two lengths, 32 of a length at a time."""

    class Texts(ArrayData):
        def batches(self, batch_size, preprocessing, limit=None):
            for number, (values, labels) in enumerate(super().batches(batch_size, preprocessing, limit)):
                yield values[:, : 2 + number % 2], labels

    data = CalibrationData(Texts(rows(320)), [spec(shape=("N", "length"))], None, 1000)
    batches = [feeds["input"] for feeds in data.feeds()]
    assert {batch.shape[1] for batch in batches} == {2, 3}
    assert sorted(int(value) for batch in batches for value in batch[:, 0]) == sorted(flat(numbers(data.fit)))
    assert all(batch.shape[1] == 2 + int(batch[0, 0]) // 32 % 2 for batch in batches)
