"""Places of items in time: against loops, a refit, and a world whose clock is known."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recsys.features.prepared.item_time import FADE, PRIOR, REACH, Order, pairs
from tests.test_towers import SEED


def of(histories: list[list[int]], n_items: int) -> Order:
    offsets = np.cumsum([0, *map(len, histories)])
    return Order.of(offsets, np.array([i for row in histories for i in row], np.int64), n_items)


def some(seed: int, users: int, n: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, n, rng.integers(0, 12)).tolist() for _ in range(users)]


def test_two_items_by_hand() -> None:
    """One pair: σ(gap) pulls each way, 2λ · place holds; the balance is found by halving."""
    low, high = 0.0, 10.0
    for _ in range(60):
        x = (low + high) / 2
        low, high = (x, high) if 1 / (1 + np.exp(2 * x)) > 2 * PRIOR * x else (low, x)
    found = of([[2, 1], [3]], 4)
    np.testing.assert_allclose(found.place, [0, x, -x, 0], atol=1e-4)
    pull = 1 / (1 + np.exp(2 * x))
    np.testing.assert_allclose(found.pull, [-pull, pull, 0], atol=1e-4)
    np.testing.assert_allclose(found.hold, [pull * (1 - pull)] * 2 + [0], atol=1e-4)


@given(SEED, st.integers(0, 6), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_pairs_as_loops_find_them(seed: int, users: int, n: int) -> None:
    histories = some(seed, users, n)
    offsets = np.cumsum([0, *map(len, histories)])
    item = np.array([i for row in histories for i in row], np.int64)
    found = sorted(
        (round(w, 9), int(a), int(b))
        for w, earlier, later in pairs(offsets, item)
        for a, b in zip(earlier, later, strict=True)
    )
    wanted = sorted(
        (round(FADE ** (q - p - 1), 9), int(start + p), int(start + q))
        for start, row in zip(offsets, histories, strict=False)
        for p in range(len(row))
        for q in range(p + 1, min(len(row), p + REACH + 1))
        if row[p] != row[q]
    )
    assert found == wanted


@given(SEED, st.integers(1, 12), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_pulls_and_prior_are_in_balance(seed: int, users: int, n: int) -> None:
    histories = some(seed, users, n)
    found = of(histories, n)
    item = np.array([i for row in histories for i in row], np.int64)
    pulled = np.bincount(item, found.pull, n)
    np.testing.assert_allclose(pulled, 2 * PRIOR * found.place, atol=2e-3)


def test_places_follow_a_clock_that_nobody_wrote_down() -> None:
    """Items are in fashion for a while; users come at any time and choose among what is."""
    rng = np.random.default_rng(0)
    born = rng.permutation(np.linspace(0, 1, 200))
    histories = []
    for start in rng.random(1_500):
        times = start + np.sort(rng.random(rng.integers(1, 8))) * 0.4
        near = np.exp(-((times[:, None] - born) ** 2) / 0.02)
        histories.append([1 + rng.choice(200, p=row / row.sum()) for row in near])
    found = of(histories, 201)
    assert stats.spearmanr(found.place[1:], born).statistic > 0.95
    backwards = of([row[::-1] for row in histories], 201)
    np.testing.assert_allclose(backwards.place, -found.place, atol=0.05)


def test_nothing_to_compare_is_no_time() -> None:
    for histories in ([], [[]], [[1]], [[2, 2], [1]]):
        found = of(histories, 3)
        assert not found.place.any() and not found.pull.any() and not found.hold.any()
