"""A hashed split: even, sticky, independent of others, and moving no more than it must."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.errors import ConfigError
from recsys.serving.models.traffic_split import TrafficSplit

UNITS = [f"u{number}" for number in range(20_000)]


def dealt(shares: dict[str, float], salt: str = "recsys") -> np.ndarray:
    split = TrafficSplit(shares, salt)
    return np.array([split.variant(unit) for unit in UNITS])


@pytest.mark.parametrize(
    "shares", [{"a": 0.5, "b": 0.5}, {"a": 0.9, "b": 0.1}, {"a": 0.2, "b": 0.3, "c": 0.5}]
)
def test_each_variant_gets_its_share(shares: dict[str, float]) -> None:
    got = dealt(shares)
    for name, share in shares.items():
        slack = 4 * np.sqrt(share * (1 - share) / len(UNITS))
        assert abs((got == name).mean() - share) < slack


def test_a_share_of_nothing_gets_nobody_and_the_last_digit_may_be_lacking() -> None:
    assert set(dealt({"a": 1.0, "b": 0.0})) == {"a"}
    assert set(dealt({"a": 0.333333, "b": 0.333333, "c": 0.333334})) == {"a", "b", "c"}
    assert TrafficSplit({"a": 1.0, "b": 0.0}).variant(None) == "a"


def test_the_order_of_the_variants_means_nothing() -> None:
    assert (dealt({"a": 0.3, "b": 0.7}) == dealt({"b": 0.7, "a": 0.3})).all()


def test_two_experiments_are_independent() -> None:
    shares = {"a": 0.5, "b": 0.5}
    one, other = dealt(shares, "one") == "a", dealt(shares, "other") == "a"
    # Chi-square of the 2 × 2 table, one degree of freedom; 10.8 is one in a thousand.
    table = np.array([[(one & other).sum(), (one & ~other).sum()],
                      [(~one & other).sum(), (~one & ~other).sum()]])  # fmt: skip
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    assert (np.square(table - expected) / expected).sum() < 10.8


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.4}),
        ({"a": 0.99, "b": 0.01}, {"a": 0.9, "b": 0.1}),
        ({"a": 1.0}, {"a": 0.9, "b": 0.1}),
        ({"a": 0.25, "b": 0.25, "c": 0.5}, {"a": 0.4, "b": 0.2, "c": 0.4}),
    ],
)
def test_only_as_many_units_move_as_the_shares_differ(
    before: dict[str, float], after: dict[str, float]
) -> None:
    moved = dealt(before) != dealt(after)
    names = before.keys() | after.keys()
    least = sum(abs(before.get(n, 0) - after.get(n, 0)) for n in names) / 2
    assert abs(moved.mean() - least) < 4 * np.sqrt(least * (1 - least) / len(UNITS))
    # And all of them to the variants that grew.
    grown = [n for n in names if after.get(n, 0) > before.get(n, 0)]
    assert set(dealt(after)[moved]) <= set(grown)


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.permutations([0, 1, 2]))
def test_any_change_moves_less_than_twice_as_many_as_it_must(
    parts: list[int], order: list[int]
) -> None:
    before = dict(zip("abc", np.array(parts) / sum(parts), strict=True))
    after = dict(zip("abc", np.array(parts)[order] / sum(parts), strict=True))
    first, second = TrafficSplit(before), TrafficSplit(after)
    moved = np.mean([first.variant(u) != second.variant(u) for u in UNITS[:2000]])
    least = sum(abs(before[n] - after[n]) for n in "abc") / 2
    assert moved <= 2 * least / (1 + least) + 4 * np.sqrt(0.25 / 2000)


def test_another_process_deals_alike() -> None:
    code = (
        "from recsys.serving.models.traffic_split import TrafficSplit;"
        "s = TrafficSplit({'a': .5, 'b': .5});"
        "print(''.join(s.variant(f'u{n}') for n in range(64)))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert other == "".join(dealt({"a": 0.5, "b": 0.5})[:64])


def test_who_is_nobody_is_dealt_by_chance() -> None:
    split = TrafficSplit({"a": 0.8, "b": 0.2})
    got = np.array([split.variant(None) for _ in range(4000)])
    assert abs((got == "a").mean() - 0.8) < 0.03


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({}, "no variant"),
        ({"a": 0.5, "b": 0.4}, "sum to 0.9"),
        ({"a": 1.5, "b": -0.5}, "share of 'b' is -0.5"),
        ({"a": float("nan")}, "share of 'a' is nan"),
    ],
)
def test_shares_that_are_none_are_refused(shares: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TrafficSplit(shares)
