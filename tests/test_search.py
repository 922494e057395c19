"""Exact search and its top-k against loops: it is the oracle of every other index."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import recsys.search
from recsys.ragged import Ragged
from recsys.search import ExactIndex, pair_scores, top_k


def naive(
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    allowed: np.ndarray | None,
    exclude: Ragged | None,
) -> tuple[list[list[int]], list[list[float]]]:
    rows, scores = [], []
    for q, query in enumerate(queries):
        out = [] if exclude is None else exclude[q].tolist()
        answers = []
        for row, vector in enumerate(vectors):
            if row in out or (allowed is not None and not allowed[row]):
                continue
            product = sum(float(a) * float(b) for a, b in zip(vector, query, strict=True))
            answers.append((-product, row))
        answers = sorted(answers)[:k]
        rows.append([row for _, row in answers] + [-1] * (k - len(answers)))
        scores.append([-score for score, _ in answers] + [-np.inf] * (k - len(answers)))
    return rows, scores


@given(st.data())
def test_exact_search_is_the_loop_over_all_rows(data: st.DataObject) -> None:
    """Small whole numbers, so that float32 is exact and ties are everywhere."""
    n, d = data.draw(st.integers(0, 40), "n"), data.draw(st.integers(1, 6), "d")
    q, k = data.draw(st.integers(0, 7), "q"), data.draw(st.integers(1, 45), "k")
    random = np.random.default_rng(data.draw(st.integers(0, 1000), "seed"))
    vectors = random.integers(-1, 2, (n, d)).astype(np.float32)
    queries = random.integers(-1, 2, (q, d)).astype(np.float32)
    allowed = random.random(n) < random.random() if data.draw(st.booleans(), "filter") else None
    exclude = None
    if n and data.draw(st.booleans(), "exclude"):
        exclude = Ragged.from_lists(
            [random.integers(0, n, random.integers(0, 2 * n)) for _ in range(q)]
        )
    block = data.draw(st.integers(1, 200), "scores at once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recsys.search, "SCORES_AT_ONCE", block)
        patch.setattr(recsys.search, "QUERIES_AT_ONCE", 1)
        rows, scores = ExactIndex(vectors).search(queries, k, allowed=allowed, exclude=exclude)
    assert rows.shape == scores.shape == (q, k)
    wanted = naive(vectors, queries, k, allowed, exclude)
    assert rows.tolist() == wanted[0]
    assert scores.tolist() == wanted[1]


@given(st.data())
def test_top_k_is_the_stable_sort(data: st.DataObject) -> None:
    q, n = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 70))
    k = data.draw(st.integers(1, n))
    levels = data.draw(st.integers(1, 100))
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    scores = torch.from_numpy(random.integers(0, levels, (q, n)).astype(np.float32))
    columns, values = top_k(scores, k)
    for row in range(q):
        order = sorted(range(n), key=lambda column: (-float(scores[row, column]), column))[:k]
        assert columns[row].tolist() == order
        assert values[row].tolist() == scores[row, order].tolist()


def test_a_tie_at_the_last_place_goes_to_the_smaller_row_among_many() -> None:
    """A size at which torch.topk takes another way than for small ones."""
    scores = torch.zeros(3, 20_011)
    scores[:, 15_000] = 1
    scores[1, :100] = -1
    columns, values = top_k(scores, 5)
    assert columns.tolist() == [
        [15_000, 0, 1, 2, 3],
        [15_000, 100, 101, 102, 103],
        [15_000, 0, 1, 2, 3],
    ]
    assert values.tolist() == [[1, 0, 0, 0, 0]] * 3


def test_top_k_of_floats_without_ties_is_that_of_torch() -> None:
    scores = torch.rand(9, 1237, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, columns = torch.topk(scores, 17)
    assert torch.equal(top_k(scores, 17)[0], columns) and torch.equal(top_k(scores, 17)[1], values)


def test_rows_that_are_all_but_excluded_keep_their_few_answers() -> None:
    vectors = np.eye(4, dtype=np.float32)
    exclude = Ragged.from_lists([[0, 1, 2, 3], [0, 1, 3], []])
    rows, scores = ExactIndex(vectors).search(np.ones((3, 4), np.float32), 3, exclude=exclude)
    assert rows.tolist() == [[-1, -1, -1], [2, -1, -1], [0, 1, 2]]
    assert scores.tolist() == [[-np.inf] * 3, [1, -np.inf, -np.inf], [1, 1, 1]]


def test_blocks_of_any_size_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = random.integers(-9, 10, (301, 17)).astype(np.float32)
    queries = random.integers(-9, 10, (53, 17)).astype(np.float32)
    wanted = ExactIndex(vectors).search(queries, 20)
    monkeypatch.setattr(recsys.search, "QUERIES_AT_ONCE", 1)
    for scores in (1, 301 * 7, 301 * 52, 10**9):
        monkeypatch.setattr(recsys.search, "SCORES_AT_ONCE", scores)
        for found, right in zip(ExactIndex(vectors).search(queries, 20), wanted, strict=True):
            np.testing.assert_array_equal(found, right)


def test_a_memory_mapped_file_is_searched_without_a_copy_or_a_warning(tmp_path) -> None:
    np.save(tmp_path / "v.npy", np.eye(5, dtype=np.float32))
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = ExactIndex(vectors)
        rows, _ = index.search(np.load(tmp_path / "v.npy", mmap_mode="r"), 1)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(index._vectors.numpy(), vectors)


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_rows() -> None:
    random = np.random.default_rng(0)
    vectors = random.integers(-9, 10, (3001, 32)).astype(np.float32)
    queries = random.integers(-9, 10, (100, 32)).astype(np.float32)
    exclude = Ragged.from_lists([random.integers(0, 3001, 20) for _ in range(100)])
    allowed = random.random(3001) < 0.7
    found = ExactIndex(vectors, "cuda").search(queries, 50, allowed=allowed, exclude=exclude)
    wanted = ExactIndex(vectors).search(queries, 50, allowed=allowed, exclude=exclude)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pair_scores_are_inner_products_of_rows() -> None:
    vectors = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    np.testing.assert_allclose(
        pair_scores(vectors[:4], vectors[4:]), (vectors[:4] * vectors[4:]).sum(1), rtol=1e-5
    )
