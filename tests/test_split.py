"""Splits: by time, leave-one-out, as given, cold items."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.errors import ConfigError, DataError
from recsys.split import SplitRules, cold_items, decide, duration, duration_text, instant
from recsys.tables import DAY, SECOND, Kind, Side

P, S = int(Kind.POSITIVE), int(Kind.SHOWN)


def rows(*values: tuple, side: list[int] | None = None) -> pl.DataFrame:
    """(user, time, kind) in source order."""
    frame = pl.DataFrame(
        values, schema={"user": pl.String, "time": pl.Int64, "kind": pl.UInt8}, orient="row"
    ).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("row"))
    return frame if side is None else frame.with_columns(pl.Series("side", side, dtype=pl.UInt8))


def sides(frame: pl.DataFrame, rules: SplitRules, timed: bool = True, **given) -> list[int]:
    split = decide(frame, rules, timed=timed, given="side" in frame.columns)
    return split.sides(frame)["side"].to_list()


def test_the_last_fifth_is_test_and_the_fifth_before_it_valid():
    frame = rows(*[("a", t, P) for t in range(10)])
    assert sides(frame, SplitRules(test=0.2, valid=0.2)) == [0] * 6 + [1] * 2 + [2] * 2


def test_rows_of_one_time_never_straddle_a_cut():
    # The last fifth alone would begin at the second of three rows of time 7.
    frame = rows(*[("a", t, P) for t in (1, 2, 3, 4, 5, 6, 7, 7, 7, 9)])
    assert sides(frame, SplitRules(test=0.2, valid=0.2)) == [0] * 4 + [1] * 2 + [2] * 4


def test_shown_rows_follow_the_cuts_but_do_not_make_them():
    frame = rows(("a", 1, P), ("a", 2, P), ("a", 3, P), ("a", 3, S), ("a", 9, S), ("a", 2, S))
    assert sides(frame, SplitRules(test=0.34, valid=0.34)) == [0, 1, 2, 2, 2, 1]


def test_durations_count_back_from_the_end_and_from_the_test_cut():
    frame = rows(*[("a", day * DAY, P) for day in range(6)])
    assert sides(frame, SplitRules(test="1d", valid="48h")) == [0, 0, 1, 1, 2, 2]


def test_an_iso_time_is_the_cut_and_toml_dates_are_understood():
    start = instant("2024-01-01")
    frame = rows(*[("a", start + day * DAY, P) for day in range(4)])
    rules = SplitRules(test=datetime(2024, 1, 4), valid="2024-01-03T00:00:00+00:00")
    assert sides(frame, rules) == [0, 0, 1, 2]


def test_a_share_of_nothing_leaves_no_side():
    frame = rows(*[("a", t, P) for t in range(4)])
    assert sides(frame, SplitRules(test=0, valid=0)) == [0] * 4
    assert sides(frame, SplitRules(test=0.25, valid=0)) == [0, 0, 0, 2]
    assert sides(frame, SplitRules(test=0, valid=0.25)) == [0, 0, 0, 1]


def test_leave_one_out_takes_the_last_and_the_one_before_and_spares_short_users():
    frame = rows(
        ("a", 1, P), ("b", 1, P), ("a", 3, P), ("b", 2, P), ("a", 2, P), ("a", 9, P)
    )  # fmt: skip
    assert sides(frame, SplitRules(kind="leave_one_out")) == [0, 0, 1, 0, 0, 2]


def test_leave_one_out_breaks_ties_of_time_by_source_row():
    frame = rows(*[("a", 5, P)] * 4)
    assert sides(frame, SplitRules(kind="leave_one_out")) == [0, 0, 1, 2]


def test_leave_one_out_sends_what_was_shown_by_time_relative_to_the_users_own_cuts():
    frame = rows(
        ("a", 1, P), ("a", 4, P), ("a", 6, P), ("a", 3, S), ("a", 4, S), ("a", 5, S), ("a", 6, S)
    )  # fmt: skip
    assert sides(frame, SplitRules(kind="leave_one_out"))[3:] == [0, 1, 1, 2]
    requests = frame.select("user", "time")
    split = decide(frame, SplitRules(kind="leave_one_out"), timed=True, given=False)
    assert split.sides(requests)["side"].to_list() == [0, 1, 2, 0, 1, 1, 2]


def test_given_sides_are_kept_and_a_missing_valid_is_cut_from_train_by_time():
    frame = rows(*[("a", t, P) for t in range(6)], side=[0, 0, 0, 0, 2, 2])
    assert sides(frame, SplitRules(valid=0.25)) == [0, 0, 0, 1, 2, 2]
    assert sides(frame, SplitRules(valid=0)) == [0, 0, 0, 0, 2, 2]
    frame = rows(*[("a", t, P) for t in range(6)], side=[0, 0, 1, 0, 2, 2])
    assert sides(frame, SplitRules(valid=0.25)) == [0, 0, 1, 0, 2, 2]


def test_given_sequences_without_valid_lose_the_last_train_item_of_each_user():
    frame = rows(
        ("a", 0, P), ("a", 1, P), ("a", 2, P), ("b", 0, P), ("b", 1, P), side=[0, 0, 2, 0, 2]
    )  # fmt: skip
    assert sides(frame, SplitRules(), timed=False) == [0, 1, 2, 0, 2]


def test_auto_is_given_then_time_then_leave_one_out():
    frame = rows(*[("a", t, P) for t in range(10)])
    for timed, expected in ((True, "time"), (False, "leave_one_out")):
        assert decide(frame, SplitRules(), timed=timed, given=False).kind == expected
    given_frame = rows(("a", 0, P), ("a", 1, P), ("a", 2, P), side=[0, 1, 2])
    assert decide(given_frame, SplitRules(), timed=True, given=True).kind == "given"


def test_sides_of_lazy_and_eager_frames_are_the_same():
    frame = rows(*[("ab"[t % 2], t, P) for t in range(10)])
    for kind in ("time", "leave_one_out"):
        split = decide(frame.lazy(), SplitRules(kind=kind), timed=True, given=False)
        assert split.sides(frame.lazy()).collect().equals(split.sides(frame))


def test_each_side_ends_where_the_next_begins():
    frame = rows(*[("a", t, P) for t in range(10)])
    split = decide(frame, SplitRules(test=0.2, valid=0.2), timed=True, given=False)
    assert (split.valid_from, split.test_from) == (6, 8)
    assert split.ends(split.sides(frame))["end"].to_list() == [6] * 6 + [8] * 2 + [10] * 2
    split = decide(frame, SplitRules(kind="leave_one_out"), timed=True, given=False)
    assert split.ends(split.sides(frame))["end"].to_list() == [8] * 8 + [9, 10]


def test_a_split_by_time_without_a_clock_names_leave_one_out():
    with pytest.raises(ConfigError, match="leave_one_out"):
        decide(rows(("a", 0, P)), SplitRules(kind="time"), timed=False, given=False)


def test_a_given_split_that_nobody_gave_is_refused():
    with pytest.raises(ConfigError, match="one piece"):
        decide(rows(("a", 0, P)), SplitRules(kind="given"), timed=True, given=False)


@pytest.mark.parametrize(
    ("rules", "side"),
    [
        (SplitRules(test="2030-01-01T00:00:00"), "test"),
        (SplitRules(test="1s", valid="0.0001s"), "valid"),
        (SplitRules(test="1s", valid="90d"), "train"),
    ],
)
def test_an_empty_side_is_an_error_that_names_the_side_and_the_cut(rules, side):
    start = instant("2024-01-01")
    frame = rows(*[("a", start + day * DAY, P) for day in range(5)])
    with pytest.raises(DataError, match=rf"The {side} side .* the cut is at 20\d\d-\d\d-\d\dT"):
        decide(frame, rules, timed=True, given=False)


def test_one_moment_for_everything_leaves_train_empty():
    with pytest.raises(DataError, match="side of the split is empty"):
        decide(rows(*[("a", 5, P)] * 9), SplitRules(), timed=True, given=False)


def test_leave_one_out_of_short_users_only_is_an_error():
    with pytest.raises(DataError, match="three or more"):
        decide(rows(("a", 1, P), ("b", 1, P)), SplitRules(), timed=False, given=False)


def test_a_log_without_positives_is_an_error():
    with pytest.raises(DataError, match="no positive"):
        decide(rows(("a", 1, S)), SplitRules(), timed=True, given=False)


def test_text_of_durations_and_times():
    assert duration("1d12h") == 36 * 3600 * SECOND == duration("36h")
    assert duration("1.5m") == 90 * SECOND
    for said in ("90s", "640m", "64h", "1d", "2w", "0.5s"):
        assert duration_text(duration(said)) == said
    assert instant("1970-01-01T01:00:00+01:00") == 0
    late = datetime(2024, 5, 1, 12, 30, 0, 250_000, tzinfo=UTC)
    assert instant(late.isoformat()) == int(late.timestamp() * 1e6)
    for wrong in ("", "1x", "d", "1 day 2", "yesterday"):
        with pytest.raises(ValueError):
            duration(wrong)


@pytest.mark.parametrize("value", [1.0, -0.1, "soon", "1y"])
def test_a_size_that_cannot_be_meant_is_refused(value):
    with pytest.raises(ValidationError):
        SplitRules(test=value)


def test_cold_items_are_a_share_chosen_by_seed_and_do_not_depend_on_order():
    ids = pl.Series([f"item-{n}-ø" for n in range(1000)])
    chosen = cold_items(ids, 0.1, seed=3)
    assert len(chosen) == 100
    assert chosen.equals(cold_items(ids.reverse(), 0.1, seed=3))
    common = set(chosen) & set(cold_items(ids, 0.1, seed=4))
    assert 1 < len(common) < 30  # ten are expected of two independent choices
    assert len(cold_items(ids, 0.0, seed=3)) == 0
    assert len(cold_items(ids.head(2), 0.01, seed=3)) == 1


def test_cold_items_mostly_stay_cold_when_the_log_grows():
    ids = pl.Series([f"{n}" for n in range(1000)])
    before, after = (set(cold_items(ids.head(n), 0.2, seed=0)) for n in (900, 1000))
    assert len(before & after) > 160


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 12)), min_size=3, max_size=60),
    st.sampled_from(["time", "leave_one_out"]),
)
def test_no_users_future_lies_in_anyones_past(events, kind):
    frame = rows(*[(user, time, P) for user, time in events])
    try:
        found = np.array(sides(frame, SplitRules(kind=kind, test=0.2, valid=0.2)))
    except DataError:
        return
    users, times = frame["user"].to_numpy(), frame["time"].to_numpy()
    for who in set(users) if kind == "leave_one_out" else [None]:
        own = np.ones(len(users), bool) if who is None else users == who
        for earlier, later in ((Side.TRAIN, Side.VALID), (Side.VALID, Side.TEST)):
            before, after = times[own & (found <= earlier)], times[own & (found >= later)]
            if before.size and after.size:
                assert before.max() < after.min() or (
                    who is not None and before.max() == after.min()
                )


def test_the_last_share_of_each_user_is_held_out():
    frame = rows(*[("a", t, P) for t in range(10)], *[("b", t, P) for t in range(3)], ("c", 0, P))
    last = SplitRules(kind="last_share", test=0.2, valid=0.1)
    assert sides(frame, last, timed=False) == [0] * 7 + [1] + [2] * 2 + [0, 1, 2] + [0]
    last = SplitRules(kind="last_share", test=0.34, valid=0)
    assert sides(frame, last, timed=False) == [0] * 7 + [2] * 3 + [0, 0, 2] + [0]
    last = SplitRules(kind="last_share", test=0, valid=0.2)
    assert sides(frame, last, timed=False) == [0] * 8 + [1] * 2 + [0, 0, 1] + [0]


def test_a_last_share_is_a_number():
    with pytest.raises(ConfigError, match="share of each user"):
        sides(rows(("a", 1, P), ("a", 2, P)), SplitRules(kind="last_share", test="1d"))
