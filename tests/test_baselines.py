"""Baselines: by hand, and against exact search and naive loops at odd sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys import baselines
from recsys import item_baselines as item_based
from recsys.baselines import Popularity, newest_first
from recsys.errors import QueryError
from recsys.item_baselines import CoOccurrence, TextSimilarity
from recsys.ragged import Ragged
from recsys.search import ExactIndex

NOBODY = Ragged.from_lists([[]])


def ragged(rng: np.random.Generator, rows: int, items: int, longest: int) -> Ragged:
    """Rows of distinct item rows, 0 among them."""
    return Ragged.from_lists(
        [rng.permutation(items)[: rng.integers(longest + 1)] for _ in range(rows)]
    )


def world(seed: int, queries: int = 23, items: int = 31) -> tuple[Ragged, Ragged, np.ndarray]:
    """Histories, rows to exclude, and the allowed rows."""
    rng = np.random.default_rng(seed)
    return ragged(rng, queries, items, 6), ragged(rng, queries, items, 9), rng.random(items) < 0.7


def some_baseline(kind: str, items: int = 31, seed: int = 0) -> baselines.Baseline:
    rng = np.random.default_rng(seed)
    popularity = rng.integers(0, 4, items)  # full of ties
    if kind == "popularity":
        return Popularity(popularity)
    if kind == "text":
        return TextSimilarity(rng.normal(size=(items, 5)), popularity)
    user, item = rng.integers(0, 40, 160), rng.integers(0, items, 160)
    return CoOccurrence.fit(user, item, items, popularity=popularity, neighbours=7)


KINDS = ["popularity", "text", "co_occurrence"]


@given(st.integers(0, 500), st.integers(1, 40))
def test_popularity_answers_as_exact_search_over_one_number_an_item(seed, k):
    history, exclude, allowed = world(seed)
    scores = np.random.default_rng(seed).integers(0, 5, 31).astype(np.float32)
    found = Popularity(scores).search(history, k, allowed=allowed, exclude=exclude)
    allowed[0] = False
    ones = np.ones((len(history), 1), np.float32)
    twin = ExactIndex(scores[:, None]).search(ones, k, allowed=allowed, exclude=exclude)
    np.testing.assert_array_equal(found[0], twin[0])
    np.testing.assert_array_equal(found[1], twin[1])


def test_equally_popular_items_are_answered_by_the_smaller_row():
    rows, scores = Popularity(np.array([9, 1, 3, 3, 1])).search(NOBODY, 6)
    assert rows.tolist() == [[2, 3, 1, 4, -1, -1]]
    assert scores.tolist() == [[3, 3, 1, 1, -np.inf, -np.inf]]


def test_an_item_of_minus_infinity_is_never_answered_and_nan_is_refused():
    rows, _ = Popularity(np.array([0, -np.inf, 2])).search(NOBODY, 3)
    assert rows.tolist() == [[2, -1, -1]]
    with pytest.raises(QueryError, match="item row 1 is NaN"):
        Popularity(np.array([0, np.nan]))


def test_newest_first_keeps_microseconds_apart():
    at = 1_700_000_000_000_000
    never = np.iinfo(np.int64).max
    scores = newest_first(np.array([never, at + 1, at, at + 1, never, at + 2]))
    rows, _ = Popularity(scores).search(NOBODY, 5)
    assert rows.tolist() == [[5, 1, 3, 2, -1]]


def test_co_occurrence_is_the_shrunk_cosine_of_two_items_users():
    # Item 1: users a b c; item 2: a b; item 3: c; item 4: nobody. A repeat counts once.
    user = np.array([0, 0, 0, 1, 1, 2, 2])
    item = np.array([1, 1, 2, 1, 2, 1, 3])
    found = CoOccurrence.fit(user, item, 5, shrinkage=2.0).similarity.toarray()
    expected = np.zeros((5, 5))
    expected[1, 2] = expected[2, 1] = 2 / (np.sqrt(3 * 2) + 2)
    expected[1, 3] = expected[3, 1] = 1 / (np.sqrt(3 * 1) + 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_latest_item_of_a_history_weighs_most():
    user = np.array([0, 0, 1, 1])
    item = np.array([1, 2, 3, 4])
    model = CoOccurrence.fit(user, item, 5, shrinkage=0.0, decay=0.5)
    history = Ragged.from_lists([[1, 3], [3, 1], [3, 0, 1]])
    rows, scores = model.search(history, 2)
    assert rows.tolist() == [[4, 2], [2, 4], [2, 4]]
    np.testing.assert_allclose(scores, [[1, 0.5], [1, 0.5], [1, 0.25]])
    assert CoOccurrence.fit(user, item, 5, last=1).search(history, 1)[0].tolist() == [[4], [2], [2]]


def test_what_shares_no_user_follows_by_popularity_and_below_zero():
    user = np.array([0, 0, 1, 2, 3])
    item = np.array([1, 2, 3, 3, 4])
    model = CoOccurrence.fit(user, item, 6)
    rows, scores = model.search(Ragged.from_lists([[1], []]), 5)
    assert rows.tolist() == [[2, 3, 1, 4, 5], [3, 1, 2, 4, 5]]
    assert scores[0, 0] > 0 >= scores[0, 1] > scores[0, 2] == scores[0, 3] > scores[0, 4] > -1


def naive_co_occurrence(
    user: np.ndarray, item: np.ndarray, n: int, neighbours: int, per_user: int
) -> np.ndarray:
    people = [list(item[user == u][-per_user:]) for u in np.unique(user)]
    users_of = [{p for p, chosen in enumerate(people) if i in chosen} for i in range(n)]
    similarity = np.zeros((n, n))
    for i in range(1, n):
        for j in range(1, n):
            common = len(users_of[i] & users_of[j])
            if i != j and common:
                root = np.sqrt(len(users_of[i]) * len(users_of[j]))
                similarity[i, j] = common / (root + 10)
        best = np.argsort(-similarity[i].astype(np.float32), kind="stable")[:neighbours]
        similarity[i, np.setdiff1d(np.arange(n), best)] = 0
    return similarity


@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
def test_co_occurrence_equals_a_naive_loop_in_blocks_of_any_size(monkeypatch, at_once):
    monkeypatch.setattr(item_based, "AT_ONCE", at_once)
    rng = np.random.default_rng(7)
    user, item = np.sort(rng.integers(0, 25, 170)), rng.integers(0, 31, 170)
    popularity = rng.integers(0, 4, 31)
    known = item > 0
    model = CoOccurrence.fit(user, item, 31, popularity=popularity, neighbours=5, per_user=4)
    similarity = naive_co_occurrence(user[known], item[known], 31, 5, 4)
    np.testing.assert_allclose(model.similarity.toarray(), similarity, rtol=1e-6)
    history, exclude, allowed = world(8)
    rows, scores = model.search(history, 12, allowed=allowed, exclude=exclude)
    allowed[0] = False
    fallback = np.searchsorted(np.unique(popularity), popularity) + 1.0
    fallback = fallback / len(np.unique(popularity)) - 1
    for query in range(len(history)):
        near = np.zeros(31)
        for age, row in enumerate(history[query][::-1]):
            near += 0.8**age * similarity[row]
        total = np.where(near > 0, near, fallback)
        total[~allowed] = -np.inf
        total[exclude[query]] = -np.inf
        order = np.argsort(-total.astype(np.float32), kind="stable")[:12]
        there = np.isfinite(total[order])
        np.testing.assert_allclose(scores[query], total[order], rtol=1e-5, atol=1e-7)
        # Sums in another order may swap neighbours that are equal but for rounding.
        np.testing.assert_allclose(
            total[rows[query][there]], total[order][there], rtol=1e-5, atol=1e-7
        )
        assert (rows[query] >= 0).tolist() == there.tolist()


def test_text_similarity_is_the_cosine_with_the_mean_of_the_history():
    vectors = np.array([[9, 9], [2, 0], [0, 3], [1, 1], [0, 0], [-1, 0]], np.float32)
    model = TextSimilarity(vectors, np.array([0, 1, 2, 3, 4, 5]), decay=1.0)
    rows, scores = model.search(Ragged.from_lists([[1, 2], [1], [4], []]), 5)
    half = np.sqrt(0.5)
    assert rows[0].tolist() == [3, 1, 2, 4, 5]
    np.testing.assert_allclose(scores[0], [1, half, half, 0, -half], atol=1e-6)
    assert rows[1].tolist() == [1, 3, 2, 4, 5]
    # Neither an item without text nor an empty history says anything: popularity.
    assert rows[2].tolist() == rows[3].tolist() == [5, 4, 3, 2, 1]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 200), k=st.integers(1, 33))
def test_answers_are_allowed_not_excluded_and_best_first(kind, seed, k):
    history, exclude, allowed = world(seed)
    before = allowed.copy()
    rows, scores = some_baseline(kind).search(history, k, allowed=allowed, exclude=exclude)
    np.testing.assert_array_equal(allowed, before)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    assert (np.diff(np.where(rows >= 0, scores, np.float32(-9)), axis=1) <= 0).all()
    assert (np.isneginf(scores) == (rows < 0)).all()
    for query, answer in enumerate(rows):
        found = answer[answer >= 0]
        possible = np.setdiff1d(np.flatnonzero(before[1:]) + 1, exclude[query])
        assert len(found) == len(set(found)) == min(k, len(possible))
        assert np.isin(found, possible).all()


@pytest.mark.parametrize("kind", KINDS)
def test_search_ranks_by_what_score_says(kind):
    history, _, _ = world(3)
    model = some_baseline(kind)
    rows, scores = model.search(history, 30)
    items = Ragged(np.arange(len(history) + 1) * 30, rows.ravel())
    np.testing.assert_allclose(model.score(history, items).reshape(rows.shape), scores, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_unknown_rows_score_lowest_and_change_no_history(kind):
    model = some_baseline(kind)
    items = Ragged.from_lists([[0, 5, -1], [4]])
    score = model.score(Ragged.from_lists([[3, 8], [0]]), items)
    assert np.isneginf(score[[0, 2]]).all()
    assert np.isfinite(score[[1, 3]]).all()
    nobody = model.search(NOBODY, 9)
    unknown = model.search(Ragged.from_lists([[0, -1]]), 9)
    np.testing.assert_array_equal(nobody[0], unknown[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_get_no_answers_and_no_scores(kind):
    model, nothing = some_baseline(kind), Ragged.empty(0)
    rows, scores = model.search(nothing, 3, exclude=nothing)
    assert rows.shape == scores.shape == (0, 3)
    assert model.score(nothing, nothing).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_k_below_one_is_refused(kind):
    with pytest.raises(QueryError, match="k is 0"):
        some_baseline(kind).search(NOBODY, 0)


def test_a_log_without_positives_leaves_co_occurrence_with_popularity():
    nothing = np.empty(0, np.int32)
    model = CoOccurrence.fit(nothing, nothing, 4, popularity=np.array([0, 1, 3, 2]))
    assert model.search(Ragged.from_lists([[1]]), 3)[0].tolist() == [[2, 3, 1]]


def test_co_occurrence_recovers_the_tastes_of_a_checkerboard():
    # Even users take even items and odd users odd ones; popularity sees no difference.
    rng = np.random.default_rng(9)
    user = np.repeat(np.arange(200), 6)
    item = 1 + rng.integers(0, 20, 1200) * 2 + user % 2
    model = CoOccurrence.fit(user, item, 41)
    history = Ragged(np.arange(201) * 6, item)
    rows, _ = model.search(history, 5, exclude=history)
    assert (rows % 2 == (1 + np.arange(200)[:, None]) % 2).mean() > 0.99
