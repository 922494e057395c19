"""Metrics by hand in fractions, and against naive loops at odd sizes."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import metrics
from recsys.ragged import Ragged

# Four queries: two hits of three targets; an unknown target; an empty answer; no target at all.
RANKED = np.array([[4, 7, 2, 9], [5, 1, -1, -1], [-1, -1, -1, -1], [3, 4, 5, 6]])
TARGETS = Ragged.from_lists([[2, 4, 8], [1, 0], [6], []])


def discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


def test_recall_divides_by_all_targets_known_or_not():
    expected = [Fraction(2, 3), Fraction(1, 2), 0, math.nan]
    np.testing.assert_allclose(metrics.recall_at(RANKED, TARGETS, 3), np.array(expected, float))
    np.testing.assert_allclose(metrics.recall_at(RANKED, TARGETS, 1)[:2], [1 / 3, 0])


def test_capped_recall_divides_by_what_k_places_can_hold():
    np.testing.assert_allclose(metrics.capped_recall_at(RANKED, TARGETS, 1)[:3], [1, 0, 0])
    np.testing.assert_allclose(metrics.capped_recall_at(RANKED, TARGETS, 3)[:3], [2 / 3, 1 / 2, 0])


def test_precision_divides_by_k_even_when_the_answer_is_short():
    np.testing.assert_allclose(metrics.precision_at(RANKED, TARGETS, 4)[:3], [2 / 4, 1 / 4, 0])


def test_hit_rate_asks_only_whether_there_is_a_hit():
    np.testing.assert_array_equal(metrics.hit_rate_at(RANKED, TARGETS, 1), [1, 0, 0, np.nan])
    np.testing.assert_array_equal(metrics.hit_rate_at(RANKED, TARGETS, 4), [1, 1, 0, np.nan])


def test_reciprocal_rank_is_that_of_the_first_hit_within_k():
    np.testing.assert_array_equal(metrics.mrr_at(RANKED, TARGETS, 4), [1, 1 / 2, 0, np.nan])
    np.testing.assert_array_equal(metrics.mrr_at(RANKED, TARGETS, 1), [1, 0, 0, np.nan])


def test_ndcg_compares_with_the_best_list_of_as_many_targets_as_fit():
    first = (discount(1) + discount(3)) / (discount(1) + discount(2) + discount(3))
    second = discount(2) / (discount(1) + discount(2))  # the unknown target is in the ideal too
    np.testing.assert_allclose(metrics.ndcg_at(RANKED, TARGETS, 4), [first, second, 0, np.nan])
    np.testing.assert_allclose(metrics.ndcg_at(RANKED, TARGETS, 1), [1, 0, 0, np.nan])


def test_a_perfect_ranking_has_ndcg_one_at_every_k():
    ranked, targets = np.array([[1, 2, 3, 9]]), Ragged.from_lists([[3, 1, 2]])
    for k in (1, 2, 3, 4):
        assert metrics.ndcg_at(ranked, targets, k)[0] == pytest.approx(1)


def test_a_target_named_twice_counts_once_and_an_item_answered_twice_hits_once():
    targets = Ragged.from_lists([[4, 4, 6]])
    assert metrics.recall_at(np.array([[4, 9]]), targets, 2)[0] == pytest.approx(1 / 2)
    assert metrics.recall_at(np.array([[4, 4]]), targets, 2)[0] == pytest.approx(1 / 2)
    np.testing.assert_array_equal(metrics.rank_of(np.array([[9, 4, 4]]), targets), [2, 0, 0])


def test_two_unknown_targets_are_two_misses():
    targets = Ragged.from_lists([[0, -1, 5]])
    np.testing.assert_array_equal(metrics.target_count(targets), [3])
    assert metrics.recall_at(np.array([[5, 0, -1]]), targets, 3)[0] == pytest.approx(1 / 3)


def test_asking_for_more_places_than_were_answered_is_refused():
    with pytest.raises(ValueError, match="5 places, not 4"):
        metrics.recall_at(RANKED, TARGETS, 5)


def test_answers_and_targets_of_different_numbers_are_refused():
    with pytest.raises(ValueError, match="3 answers do not match 4"):
        metrics.recall_at(RANKED[:3], TARGETS, 1)


def test_scorecard_names_are_metric_at_k():
    found = metrics.ranking_metrics(RANKED, TARGETS, (1, 3))
    assert set(found) == {
        f"{name}_at_{k}" for name in ("recall", "ndcg", "mrr", "hit_rate") for k in (1, 3)
    }
    np.testing.assert_array_equal(found["recall_at_3"], metrics.recall_at(RANKED, TARGETS, 3))


def naive(ranked: list[int], targets: list[int], k: int) -> dict[str, float]:
    wanted = {t for t in targets if t > 0}
    size = len(wanted) + sum(t <= 0 for t in targets)
    hits = [rank for rank, row in enumerate(ranked[:k], 1) if row in wanted]
    if not size:
        return dict.fromkeys(("recall", "ndcg", "mrr", "hit_rate"), math.nan)
    ideal = sum(discount(rank) for rank in range(1, min(k, size) + 1))
    return {
        "recall": len(hits) / size,
        "ndcg": sum(map(discount, hits)) / ideal,
        "mrr": 1 / hits[0] if hits else 0,
        "hit_rate": float(bool(hits)),
    }


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], int]:
    queries, width = draw(st.integers(0, 7)), draw(st.integers(1, 9))
    ranked = []
    for _ in range(queries):
        row = draw(st.lists(st.integers(1, 12), max_size=width, unique=True))
        ranked.append(row + [-1] * (width - len(row)))
    targets = [draw(st.lists(st.integers(-1, 12), max_size=6)) for _ in range(queries)]
    return ranked, targets, draw(st.integers(1, width))


@given(answers())
def test_ranking_metrics_equal_a_naive_loop(given):
    ranked, targets, k = given
    table = np.array(ranked, np.int64).reshape(len(ranked), -1) if ranked else np.empty((0, k), int)
    found = metrics.ranking_metrics(table, Ragged.from_lists(targets), (k,))
    for query, (row, wanted) in enumerate(zip(ranked, targets, strict=True)):
        for name, value in naive(row, wanted, k).items():
            np.testing.assert_allclose(found[f"{name}_at_{k}"][query], value, err_msg=name)


def test_impression_metrics_by_hand():
    # Request 0 in order of score: no, click, no, click; request 1: the click is last of three.
    scores = np.array([0.4, 0.9, 0.8, 0.1, 3.0, 1.0, 2.0], np.float32)
    clicked = np.array([0, 0, 1, 1, 0, 1, 0])
    found = metrics.impression_metrics(scores, clicked, np.array([0, 4, 7]))
    np.testing.assert_allclose(found["auc"], [1 / 4, 0])
    np.testing.assert_allclose(found["mrr"], [(1 / 2 + 1 / 4) / 2, 1 / 3])
    ideal = discount(1) + discount(2)
    expected = [(discount(2) + discount(4)) / ideal, discount(3)]
    np.testing.assert_allclose(found["ndcg_at_5"], expected)
    np.testing.assert_allclose(found["ndcg_at_10"], expected)


def test_a_request_without_contrast_is_judged_by_no_metric():
    offsets = np.array([0, 2, 4, 4, 6])
    clicked = np.array([1, 1, 0, 0, 1, 0], bool)
    shown = metrics.Shown(np.arange(6.0), clicked, offsets)
    np.testing.assert_array_equal(shown.judged, [False, False, False, True])
    for value in metrics.impression_metrics(np.arange(6.0), clicked, offsets).values():
        np.testing.assert_array_equal(np.isnan(value), ~shown.judged)


def test_equal_scores_earn_what_chance_earns_wherever_the_click_is_listed():
    for at in range(3):
        clicked = np.arange(3) == at
        found = metrics.impression_metrics(np.ones(3), clicked, np.array([0, 3]))
        assert found["auc"][0] == pytest.approx(1 / 2)
        assert found["mrr"][0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def naive_request(scores: list[int], clicked: list[bool], k: int) -> tuple[float, float, float]:
    """AUC by pairs; MRR and NDCG as the mean over all orders that the scores allow."""
    pairs = [
        (a > b) + (a == b) / 2
        for a, up in zip(scores, clicked, strict=True)
        if up
        for b, low in zip(scores, clicked, strict=True)
        if not low
    ]
    if not pairs:
        return math.nan, math.nan, math.nan
    clicks, mrr, ndcg = sum(clicked), [], []
    for order in permutations(range(len(scores))):
        if any(scores[a] < scores[b] for a, b in pairwise(order)):
            continue
        ranks = [rank for rank, item in enumerate(order, 1) if clicked[item]]
        mrr.append(sum(1 / rank for rank in ranks) / clicks)
        ideal = sum(discount(rank) for rank in range(1, min(k, clicks) + 1))
        ndcg.append(sum(discount(rank) for rank in ranks if rank <= k) / ideal)
    return sum(pairs) / len(pairs), float(np.mean(mrr)), float(np.mean(ndcg))


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=5), max_size=6),
    st.integers(1, 6),
)
def test_impression_metrics_equal_the_mean_over_all_orders_of_tied_items(requests, k):
    flat = [pair for request in requests for pair in request]
    offsets = np.cumsum([0] + [len(request) for request in requests])
    scores = np.array([score for score, _ in flat], np.int8)
    shown = metrics.Shown(scores, np.array([up for _, up in flat], bool), offsets)
    for number, request in enumerate(requests):
        expected = naive_request([s for s, _ in request], [up for _, up in request], k)
        found = shown.auc()[number], shown.mrr()[number], shown.ndcg(k)[number]
        np.testing.assert_allclose(found, expected)


def test_scores_that_are_not_numbers_or_do_not_match_are_refused():
    with pytest.raises(ValueError, match="Score 1 of the shown items is NaN"):
        metrics.auc(np.array([1, np.nan]), np.array([1, 0]), np.array([0, 2]))
    with pytest.raises(ValueError, match="do not match"):
        metrics.auc(np.ones(3), np.ones(2), np.array([0, 2]))


def test_an_item_of_score_minus_infinity_comes_last():
    scores = np.array([-np.inf, 0, -np.inf])
    found = metrics.auc(scores, np.array([1, 0, 0]), np.array([0, 3]))
    np.testing.assert_allclose(found, [1 / 4])  # below one, even with the other


def test_coverage_counts_distinct_answers():
    assert metrics.coverage(np.array([[1, 2, -1], [2, 3, 0]]), 6) == pytest.approx(1 / 2)


def test_gini_is_nought_when_all_items_are_shown_alike_and_near_one_when_one_takes_all():
    assert metrics.gini(np.arange(1, 9).reshape(4, 2), 8) == pytest.approx(0)
    assert metrics.gini(np.full((5, 1), 3), 8) == pytest.approx(7 / 8)
    assert math.isnan(metrics.gini(np.full((2, 2), -1), 8))


def test_popularity_and_novelty_of_answers_by_hand():
    count = np.array([0, 7, 3, 1, 1])  # one more each: shares 8/16, 4/16, 2/16, 2/16
    ranked = np.array([[1, 2], [3, -1], [-1, -1]])
    np.testing.assert_allclose(metrics.mean_popularity(ranked, count), [5, 1, np.nan])
    np.testing.assert_allclose(metrics.novelty(ranked, count), [(1 + 2) / 2, 3, np.nan])
