"""Re-ranking by diversity and popularity, by hand and beside slow twins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.serving.engine.rerank import diversified, pool_size, standardised, with_popularity


def test_a_near_copy_of_the_best_waits_for_something_else() -> None:
    vectors = np.array([[1, 0], [1, 0.001], [0, 1]], np.float32)
    relevance = np.array([1.0, 0.9, 0.0])
    assert diversified(relevance, vectors, 3, 0.0).tolist() == [0, 1, 2]
    # Second place at ½: .45 − .5 · 1 for the copy, 0 − 0 for the other one.
    assert diversified(relevance, vectors, 3, 0.5).tolist() == [0, 2, 1]
    # At .4: .54 − .4 against 0.
    assert diversified(relevance, vectors, 3, 0.4).tolist() == [0, 1, 2]
    assert diversified(relevance, vectors, 2, 1.0).tolist() == [0, 2]
    assert diversified(relevance, vectors, 9, 0.5).tolist() == [0, 2, 1]
    assert diversified(relevance[:0], vectors[:0], 3, 0.5).tolist() == []


def _mmr(relevance: np.ndarray, vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    spread = relevance.max() - relevance.min()
    scaled = (relevance - relevance.min()) / spread if spread else 0 * relevance

    def cosine(i: int, j: int) -> float:
        lengths = np.linalg.norm(vectors[i]) * np.linalg.norm(vectors[j])
        return float(vectors[i] @ vectors[j] / lengths) if lengths else 0.0

    chosen = [int(np.argmax(relevance))]
    while len(chosen) < min(k, len(relevance)):
        left = [i for i in range(len(relevance)) if i not in chosen]
        worth = [
            (1 - diversity) * scaled[i] - diversity * max(cosine(i, j) for j in chosen)
            for i in left
        ]
        chosen.append(left[int(np.argmax(worth))])
    return chosen


@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 12), st.floats(0, 1))
def test_as_the_formula_says_one_after_another(
    seed: int, size: int, k: int, diversity: float
) -> None:
    rng = np.random.default_rng(seed)
    relevance = np.sort(rng.standard_normal(size))[::-1]
    vectors = rng.standard_normal((size, 5))
    vectors[rng.random(size) < 0.1] = 0
    assert diversified(relevance, vectors, k, diversity).tolist() == _mmr(
        relevance, vectors, k, diversity
    )


def test_more_diversity_makes_answers_less_alike() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((200, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance = vectors @ vectors[0]
    alike = []
    for diversity in (0, 0.3, 0.6, 1):
        chosen = vectors[diversified(relevance, vectors, 10, diversity)]
        alike.append(((chosen @ chosen.T).sum() - 10) / 90)
    assert alike == sorted(alike, reverse=True) and alike[0] > alike[-1] + 0.5


def test_popularity_by_hand() -> None:
    scores, counts = np.array([3.0, 1.0]), np.array([0, np.e - 1])
    # Standardised: 1, −1; log popularity 0, 1 → −1, 1.
    np.testing.assert_allclose(with_popularity(scores, counts, 0.5), [0.5, -0.5])
    np.testing.assert_allclose(with_popularity(scores, counts, -1.0), [2, -2])
    np.testing.assert_allclose(with_popularity(scores, counts, 0.0), [1, -1])


@pytest.mark.parametrize("value", [0.0, 0.1, 1e30])
def test_what_is_all_alike_says_nothing(value: float) -> None:
    assert (standardised(np.full(7, value)) == 0).all()
    assert standardised(np.empty(0)).size == 0


def test_the_pool_grows_with_the_answers_up_to_a_bound() -> None:
    assert [pool_size(k) for k in (1, 25, 26, 250, 300, 5000)] == [100, 100, 104, 1000, 1000, 5000]
