import numpy as np
import pytest

from rsi_deploy.evaluation.scores import (
    are_scores,
    cosine,
    divergence,
    label_ranks,
    log_probabilities,
    relative_distance,
)

RNG = np.random.default_rng(0)
SCORES = RNG.standard_normal((50, 8)).astype(np.float32)


def test_equal_scores_rank_by_class_number():
    scores = np.array([[1.0, 1, 1, 0], [0, 2, 1, 2]])
    assert label_ranks(scores, np.array([2, 3])).tolist() == [2, 1]
    assert label_ranks(scores, np.array([0, 0])).tolist() == [0, 3]


def test_the_divergence_is_that_of_the_distributions():
    np.testing.assert_allclose(np.exp(log_probabilities(SCORES)).sum(axis=1), 1, rtol=1e-12)
    found = divergence(np.array([[0.7, 0.1, 0.1, 0.1]]), np.full((1, 4), 0.25))
    assert found[0] == pytest.approx(0.7 * np.log(2.8) + 0.3 * np.log(0.4))
    assert divergence(SCORES, SCORES + 3)[0] == pytest.approx(0, abs=1e-12), "softmax does not see a shift"
    assert divergence(SCORES, 2 * SCORES).min() > 0


def test_cosine_and_distance_of_known_angles():
    a, b = np.array([[3.0, 0], [1, 1], [0, 0], [0, 0], [2, 0]]), np.array([[0, 4.0], [2, 2], [0, 0], [1, 0], [0, 0]])
    np.testing.assert_allclose(cosine(a, b), [0, 1, 1, 0, 0], atol=1e-15)
    np.testing.assert_allclose(relative_distance(a, b), [5 / 3, 1, 0, 1, 1])
    deep = RNG.standard_normal((6, 3, 4)).astype(np.float16)
    np.testing.assert_allclose(cosine(deep, -deep), -1)
    np.testing.assert_allclose(relative_distance(deep, -deep), 2)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        (SCORES, True),
        (SCORES[:, :1], False),
        (SCORES.reshape(50, 2, 4), False),
        (SCORES / np.linalg.norm(SCORES, axis=1, keepdims=True), False),
    ],
)
def test_what_looks_like_class_scores(outputs, expected):
    assert are_scores(outputs) == expected
