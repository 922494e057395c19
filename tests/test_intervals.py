"""Intervals: they cover as often as they say, and users are what is resampled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import bootstrap as intervals
from recsys.bootstrap import Bootstrap, Estimate


def covered(users: int, queries: int, worlds: int, seed: int) -> tuple[float, float]:
    """Share of worlds whose interval holds the truth, and its mean width.

    Every user has a chance of their own (mean 0.3) and `queries` queries.
    """
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), queries)
    inside, width = 0, 0.0
    for world in range(worlds):
        chance = rng.beta(3, 7, users)
        found = Bootstrap(owner, samples=400, seed=world).estimate(
            (rng.random(len(owner)) < chance[owner]).astype(float)
        )
        inside += found.low <= 0.3 <= found.high
        width += (found.high - found.low) / worlds
    return inside / worlds, width


@pytest.mark.parametrize(("users", "queries"), [(200, 1), (40, 5), (15, 7)])
def test_an_interval_of_95_percent_holds_the_truth_in_about_95_of_100_worlds(users, queries):
    share, _ = covered(users, queries, worlds=400, seed=users)
    assert 0.91 <= share <= 0.985


def test_queries_of_one_user_are_not_taken_for_independent():
    rng = np.random.default_rng(1)
    taste = rng.normal(size=300)
    values = np.repeat(taste, 20)  # twenty equal queries a user tell no more than one
    by_user = Bootstrap(np.repeat(np.arange(300), 20)).estimate(values)
    one_each = Bootstrap(np.arange(300)).estimate(taste)
    assert by_user.high - by_user.low == pytest.approx(one_each.high - one_each.low, rel=0.05)
    by_query = Bootstrap(np.arange(6000)).estimate(values)
    assert by_user.high - by_user.low > 3 * (by_query.high - by_query.low)


def test_the_interval_of_many_users_is_that_of_the_normal_law():
    values = np.random.default_rng(2).normal(size=4000)
    found = Bootstrap(np.arange(4000)).estimate(values)
    half = 1.96 * values.std() / math.sqrt(4000)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_users_dealt_into_groups_give_the_same_width(monkeypatch):
    values = np.random.default_rng(3).normal(size=6000)
    users = np.arange(6000) // 2
    every = Bootstrap(users).estimate(values)
    monkeypatch.setattr(intervals, "GROUPS", 700)
    grouped = Bootstrap(users).estimate(values)
    assert grouped.value == every.value
    assert grouped.high - grouped.low == pytest.approx(every.high - every.low, rel=0.1)


def test_a_paired_difference_is_much_surer_than_two_means():
    rng = np.random.default_rng(4)
    theirs = rng.normal(size=500)
    ours = theirs + 0.05 + 0.1 * rng.normal(size=500)
    users = np.arange(500)
    bootstrap = Bootstrap(users)
    paired = bootstrap.differences({"recall": ours, "only_ours": ours}, {"recall": theirs})
    assert set(paired) == {"recall"}
    assert paired["recall"].low > 0
    assert bootstrap.estimate(ours).low < bootstrap.estimate(theirs).high


def test_differences_rest_on_the_resamples_of_the_means():
    rng = np.random.default_rng(5)
    ours, theirs, users = rng.normal(size=90), rng.normal(size=90), np.arange(90) // 3
    twin = Bootstrap(users).estimate(ours - theirs)
    assert Bootstrap(users).differences({"m": ours}, {"m": theirs})["m"] == twin
    alone = Bootstrap(users).estimates({"a": ours, "b": theirs})["b"]
    assert alone.low == pytest.approx(Bootstrap(users).estimate(theirs).low, abs=1e-12)


def test_values_that_are_nan_are_left_out_of_their_own_metric_only():
    values = {"a": np.array([1.0, np.nan, 3.0, 4.0]), "b": np.array([1.0, 2.0, 3.0, 6.0])}
    found = Bootstrap(np.array([1, 1, 2, 3])).estimates(values)
    assert found["a"].value == pytest.approx(8 / 3)
    assert found["b"].value == pytest.approx(3)


def test_the_mean_is_over_queries_not_over_users():
    found = Bootstrap(np.array(["a", "a", "a", "b"])).estimate(np.array([1.0, 1, 1, 0]))
    assert found.value == pytest.approx(3 / 4)


def test_a_constant_metric_has_an_interval_of_no_width():
    found = Bootstrap(np.arange(50)).estimate(np.full(50, 0.1))
    assert found.low == found.value == found.high


def test_one_user_gives_a_value_and_no_interval():
    found = Bootstrap(np.zeros(5)).estimate(np.arange(5.0))
    assert found.value == 2
    assert found.to_json() == {"value": 2.0, "low": None, "high": None}
    assert not found.low > 0  # so a verdict is never drawn from it


def test_one_user_who_can_be_judged_among_many_gives_no_interval():
    found = Bootstrap(np.arange(3)).estimate(np.array([0.5, np.nan, np.nan]))
    assert found.value == 0.5
    assert math.isnan(found.low)


def test_nothing_to_judge_gives_nothing():
    everything_nan = Bootstrap(np.arange(3)).estimate(np.full(3, np.nan))
    nobody = Bootstrap(np.empty(0, int)).estimate(np.empty(0))
    for found in (everything_nan, nobody):
        assert found.to_json() == {"value": None, "low": None, "high": None}
    assert Bootstrap(np.arange(3)).estimates({}) == {}


def test_an_estimate_is_plain_json_and_reads_well():
    text = json.dumps(Estimate(np.float64(0.25), np.float32(0.125), 0.5).to_json())
    assert json.loads(text) == {"value": 0.25, "low": 0.125, "high": 0.5}
    assert str(Estimate(0.25, 0.125, 0.5)) == "0.2500 [0.1250, 0.5000]"
    assert str(Estimate(0.25)) == "0.2500"


def test_the_same_seed_gives_the_same_interval_and_another_a_near_one():
    values, users = np.random.default_rng(6).random(400), np.arange(400)
    first = Bootstrap(users, seed=1).estimate(values)
    assert first == Bootstrap(users, seed=1).estimate(values)
    other = Bootstrap(users, seed=2).estimate(values)
    assert other != first
    assert other.low == pytest.approx(first.low, abs=0.01)


def test_another_number_of_values_than_of_queries_is_refused():
    with pytest.raises(ValueError, match="recall: 2 values for 3 queries"):
        Bootstrap(np.arange(3)).estimates({"recall": np.ones(2)})


@given(
    st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1)), min_size=1, max_size=40),
    st.integers(0, 3),
)
def test_an_interval_stays_within_what_was_seen_around_its_value(pairs, seed):
    users = np.array([user for user, _ in pairs])
    values = np.array([value for _, value in pairs])
    found = Bootstrap(users, samples=50, seed=seed).estimate(values)
    assert found.value == pytest.approx(values.mean())
    if len(set(users)) > 1:
        assert values.min() - 1e-9 <= found.low <= found.high <= values.max() + 1e-9
    else:
        assert math.isnan(found.low)
