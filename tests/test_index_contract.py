"""One contract for every `Index`: exact search, a graph left alone, and one that plans."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from recsys.errors import QueryError
from recsys.ragged import Ragged
from recsys.search import ExactIndex, Index
from recsys.serving.index import GraphRules, HnswIndex

# Wide enough to find everything in a small world, and never allowed to hand over to exact search.
GRAPH_ONLY = GraphRules(kind="hnsw", ef=157, exact_below=0, exact_breadth=1)
LIFTED = GRAPH_ONLY.model_copy(update={"space": "lifted"})

MAKERS: dict[str, Callable[[np.ndarray], Index]] = {
    "exact": ExactIndex,
    "graph": lambda vectors: HnswIndex(vectors, GRAPH_ONLY),
    "lifted graph": lambda vectors: HnswIndex(vectors, LIFTED),
    "planned": lambda vectors: HnswIndex(vectors, GraphRules(ef=40, exact_breadth=0.5)),
}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Index]:
    return MAKERS[request.param]


def world(seed: int, n: int = 157, d: int = 7, q: int = 13) -> tuple[np.ndarray, np.ndarray]:
    """Vectors and queries of small whole numbers, so that every product is exact, ties included."""
    random = np.random.default_rng(seed)
    vectors = random.integers(-4, 5, (n, d)).astype(np.float32)
    queries = random.integers(-4, 5, (q, d)).astype(np.float32)
    queries[queries.any(1) == 0] = 1
    return vectors, queries


def expected(
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    allowed: np.ndarray | None = None,
    exclude: Ragged | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """What must come, by loops."""
    rows = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for q, query in enumerate(queries):
        out = set() if exclude is None else set(exclude[q].tolist())
        may = [
            (-float(vector.astype(np.float64) @ query), row)
            for row, vector in enumerate(vectors)
            if row not in out and (allowed is None or allowed[row])
        ]
        for place, (score, row) in enumerate(sorted(may)[:k]):
            rows[q, place], scores[q, place] = row, -score
    return rows, scores


def agree(
    found: tuple[np.ndarray, np.ndarray],
    wanted: tuple[np.ndarray, np.ndarray],
    vectors: np.ndarray,
    queries: np.ndarray,
) -> None:
    """Equal scores; each row has its score, stands once, and equals go by the smaller row."""
    rows, scores = found
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    assert rows.shape == scores.shape == wanted[0].shape
    np.testing.assert_allclose(scores, wanted[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(rows < 0, np.isneginf(scores))
    for q in range(len(rows)):
        answers = rows[q][rows[q] >= 0]
        assert len(set(answers.tolist())) == len(answers)
        np.testing.assert_allclose(
            vectors[answers] @ queries[q], scores[q][: len(answers)], rtol=1e-5, atol=1e-5
        )
        pairs = list(zip(-scores[q], rows[q], strict=True))[: len(answers)]
        assert pairs == sorted(pairs)


def test_the_best_rows_come_best_first_with_their_inner_product(make) -> None:
    vectors, queries = world(0)
    agree(make(vectors).search(queries, 10), expected(vectors, queries, 10), vectors, queries)


def test_three_items_by_hand(make) -> None:
    vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    rows, scores = make(vectors).search(np.array([[0, 1], [1, 0]], np.float32), 3)
    assert rows.tolist() == [[1, 2, 0], [0, 2, 1]]
    np.testing.assert_allclose(scores, [[1, 0.8, 0], [1, 0.6, 0]], atol=1e-6)


def test_size_and_dimension_are_those_of_the_vectors(make) -> None:
    index = make(world(0)[0])
    assert (index.size, index.dimension) == (157, 7)
    assert isinstance(index, Index)


@pytest.mark.parametrize("k", [157, 158, 500])
def test_k_beyond_the_catalogue_answers_what_there_is(make, k: int) -> None:
    vectors, queries = world(1)
    agree(make(vectors).search(queries, k), expected(vectors, queries, k), vectors, queries)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.5, 0.95, 1.0])
def test_only_allowed_rows_are_answered_and_as_many_as_there_are(make, share: float) -> None:
    vectors, queries = world(2)
    allowed = np.random.default_rng(0).random(len(vectors)) < share
    wanted = expected(vectors, queries, 10, allowed)
    agree(make(vectors).search(queries, 10, allowed=allowed), wanted, vectors, queries)


def test_no_row_allowed_answers_nothing(make) -> None:
    vectors, queries = world(3)
    rows, scores = make(vectors).search(queries, 4, allowed=np.zeros(len(vectors), bool))
    assert (rows == -1).all() and np.isneginf(scores).all()


def test_excluded_rows_never_come_and_the_answers_are_still_k(make) -> None:
    vectors, queries = world(4)
    best = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")
    # The worst case: what is excluded is exactly what the graph finds first.
    exclude = Ragged.from_lists([best[q, : 3 * q] for q in range(len(queries))])
    wanted = expected(vectors, queries, 10, None, exclude)
    agree(make(vectors).search(queries, 10, exclude=exclude), wanted, vectors, queries)


def test_excluding_all_rows_but_two_leaves_those_two(make) -> None:
    vectors, queries = world(5)
    exclude = Ragged.from_lists([[r for r in range(157) if r not in (q, 100)] for q in range(13)])
    rows, _ = make(vectors).search(queries, 5, exclude=exclude)
    assert [sorted(row[:2].tolist()) for row in rows] == [[q, 100] for q in range(13)]
    assert (rows[:, 2:] == -1).all()


def test_a_row_excluded_twice_is_excluded_once(make) -> None:
    vectors, queries = world(6)
    exclude = Ragged.from_lists([[3, 3, 3, 5]] * len(queries))
    wanted = expected(vectors, queries, 157, None, exclude)
    agree(make(vectors).search(queries, 157, exclude=exclude), wanted, vectors, queries)


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_allowed_and_excluded_together(make, share: float) -> None:
    vectors, queries = world(7)
    random = np.random.default_rng(1)
    allowed = random.random(len(vectors)) < share
    exclude = Ragged.from_lists(
        [random.integers(0, 157, random.integers(0, 60)) for _ in range(len(queries))]
    )
    wanted = expected(vectors, queries, 12, allowed, exclude)
    found = make(vectors).search(queries, 12, allowed=allowed, exclude=exclude)
    agree(found, wanted, vectors, queries)


def test_equal_items_come_by_the_smaller_row(make) -> None:
    vectors = np.array([[1, 0], [0, 1]] * 20, np.float32)
    rows, _ = make(vectors).search(np.array([[1, 0]], np.float32), 25)
    assert rows[0].tolist() == [*range(0, 40, 2), 1, 3, 5, 7, 9]


def test_a_thousand_equal_items_do_not_hide_the_others(make) -> None:
    vectors = np.ones((1005, 4), np.float32)
    vectors[:5] = 2 * np.eye(5, 4, dtype=np.float32) + 0.1
    vectors[4] = [3, 3, 3, 3]
    queries = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], np.float32)
    wanted = expected(vectors, queries, 30)
    found = make(vectors).search(queries, 30)
    agree(found, wanted, vectors, queries)
    np.testing.assert_array_equal(found[0], wanted[0])


def test_items_without_content_score_nothing_and_come_before_the_disliked(make) -> None:
    vectors, queries = world(8)
    vectors[10:90] = 0
    vectors[20] = -0.0
    agree(make(vectors).search(queries, 157), expected(vectors, queries, 157), vectors, queries)


def test_a_query_of_zeros_answers_the_first_rows(make) -> None:
    vectors, _ = world(9)
    rows, scores = make(vectors).search(np.zeros((2, 7), np.float32), 3)
    assert rows.tolist() == [[0, 1, 2]] * 2 and (scores == 0).all()


def test_all_vectors_zero(make) -> None:
    rows, scores = make(np.zeros((9, 3), np.float32)).search(np.ones((1, 3), np.float32), 4)
    assert rows.tolist() == [[0, 1, 2, 3]] and (scores == 0).all()


def test_one_vector(make) -> None:
    rows, scores = make(np.array([[0.5, 0.5]], np.float32)).search(np.ones((3, 2), np.float32), 2)
    assert rows.tolist() == [[0, -1]] * 3
    assert scores.tolist() == [[1.0, -np.inf]] * 3


def test_no_vectors(make) -> None:
    rows, scores = make(np.zeros((0, 3), np.float32)).search(np.ones((2, 3), np.float32), 2)
    assert (rows == -1).all() and np.isneginf(scores).all()


def test_no_queries(make) -> None:
    rows, scores = make(world(0)[0]).search(np.zeros((0, 7), np.float32), 3)
    assert rows.shape == scores.shape == (0, 3)


def test_tiny_and_long_vectors_keep_their_order(make) -> None:
    vectors, queries = world(10)
    for scale in (1e-25, 1e-6, 1e6):
        scaled = (vectors * np.float32(scale)).astype(np.float32)
        _, scores = make(scaled).search(queries, 10)
        wanted = expected(vectors, queries, 10)[1]
        np.testing.assert_allclose(scores / np.float32(scale), wanted, rtol=1e-4, atol=1e-4)


def test_vectors_and_queries_in_any_memory_layout(make) -> None:
    vectors, queries = world(11)
    wanted = make(vectors).search(queries, 5)
    strided = np.asfortranarray(vectors), np.repeat(queries, 2, 0)[::2][:, ::-1][:, ::-1]
    vectors.flags.writeable = queries.flags.writeable = False  # as of a memory-mapped file
    for items, asked in (strided, (vectors, queries)):
        found = make(items).search(asked, 5)
        np.testing.assert_array_equal(found[0], wanted[0])


def test_the_arguments_are_left_as_they_were(make) -> None:
    vectors, queries = world(12)
    exclude = Ragged.from_lists([[1, 2]] * 13)
    before = vectors.copy(), queries.copy(), exclude.values.copy()
    make(vectors).search(queries, 5, allowed=np.arange(157) > 20, exclude=exclude)
    for now, then in zip((vectors, queries, exclude.values), before, strict=True):
        np.testing.assert_array_equal(now, then)


BAD_QUERIES = {
    "NaN": (np.full((2, 7), np.nan, np.float32), "Query 0 of 2 holds NaN"),
    "infinity": (np.array([[0] * 7, [np.inf] * 7], np.float32), "Query 1 of 2"),
    "overflow": (np.full((1, 7), 1e30, np.float32), r"1e\+15"),
    "dimension": (np.zeros((1, 8), np.float32), "7 dimensions"),
    "large dimension": (np.zeros((1, 70_000), np.float32), "7 dimensions"),
    "one vector": (np.zeros(7, np.float32), "7 dimensions"),
    "dtype": (np.zeros((1, 7), np.float64), "float64"),
    "whole numbers": (np.zeros((1, 7), np.int64), "int64"),
}


@pytest.mark.parametrize("case", list(BAD_QUERIES))
def test_a_query_that_cannot_be_meant_is_refused(make, case: str) -> None:
    query, message = BAD_QUERIES[case]
    with pytest.raises(QueryError, match=message):
        make(world(0)[0]).search(query, 3)


@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_k_must_be_a_whole_number_of_at_least_one(make, k: object) -> None:
    with pytest.raises(QueryError, match="k is"):
        make(world(0)[0]).search(world(0)[1], k)


def test_filters_that_name_other_rows_are_refused(make) -> None:
    vectors, queries = world(0)
    index = make(vectors)
    for allowed in (
        np.ones(156, bool),
        np.ones(157, np.int8),
        np.arange(5),
        np.ones((1, 157), bool),
    ):
        with pytest.raises(QueryError, match="one bool for each of the 157"):
            index.search(queries, 3, allowed=allowed)
    with pytest.raises(QueryError, match="12 rows for 13 queries"):
        index.search(queries, 3, exclude=Ragged.empty(12))
    for row in (-1, 157):
        with pytest.raises(QueryError, match="rows 0 to 156"):
            index.search(queries, 3, exclude=Ragged.from_lists([[row]] * 13))


BAD_VECTORS = {
    "NaN": (np.array([[0, 1], [np.nan, 0]], np.float32), "Vector 1 of 2 holds NaN"),
    "infinity": (np.array([[-np.inf, 1]], np.float32), "Vector 0 of 1"),
    "dtype": (np.zeros((3, 2)), "float64"),
    "shape": (np.zeros(3, np.float32), r"\(N, D\)"),
}


@pytest.mark.parametrize("case", list(BAD_VECTORS))
def test_vectors_that_would_break_an_index_are_refused(make, case: str) -> None:
    vectors, message = BAD_VECTORS[case]
    with pytest.raises(QueryError, match=message):
        make(vectors)
