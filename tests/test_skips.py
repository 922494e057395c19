"""Skipped but seen: each rule by hand, and all of them against a naive loop."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from recsys.features.prepared.skips import Reason, SkipRules, attach, label, wanted
from recsys.tables import Kind, Side

P, S, R = (int(kind) for kind in (Kind.POSITIVE, Kind.SHOWN, Kind.REJECTED))
TRAIN, VALID = int(Side.TRAIN), int(Side.VALID)
HOUR = 3_600_000_000
FAR = 10**15
RULES = SkipRules(horizon="1h")
WITHOUT = {"request_without_click": 0.1}
EVENTS = {
    "user": pl.String, "item": pl.String, "time": pl.Int64, "kind": pl.UInt8, "side": pl.UInt8,
    "end": pl.Int64, "request": pl.Int64, "position": pl.Int32, "bounce": pl.Boolean,
}  # fmt: skip
LISTS = {
    "user": pl.String, "item": pl.String, "time": pl.Int64, "request": pl.Int64, "side": pl.UInt8,
    "end": pl.Int64, "clicked": pl.Boolean, "position": pl.Int32,
}  # fmt: skip


def event(
    item, time, kind, *, user="u", side=TRAIN, end=FAR, request=None, position=None, bounce=False
):
    return (user, item, time, kind, side, end, request, position, bounce)


def events(*rows) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=EVENTS, orient="row")


def request(
    shown: str, clicked: str = "", *, time=0, number=1, side=TRAIN, end=FAR, positions=None
):
    """Items are single letters; the rows of one impression list, and its clicks as events."""
    places = positions or [None] * len(shown)
    rows = [
        ("u", item, time, number, side, end, item in clicked, place)
        for item, place in zip(shown, places, strict=True)
    ]
    clicks = [event(item, time, P, side=side, end=end, request=number) for item in clicked]
    return pl.DataFrame(rows, schema=LISTS, orient="row"), clicks


def reasons(skips) -> dict[str, str]:
    return {row["item"]: Reason(row["reason"]).name for row in skips.labels.iter_rows(named=True)}


def test_without_positions_everything_else_of_a_clicked_request_is_a_skip():
    shown, clicks = request("abc", "b")
    skips = label(events(*clicks), shown, RULES, timed=True)
    assert reasons(skips) == {"a": "SAME_REQUEST", "c": "SAME_REQUEST"}
    assert skips.labels["confidence"].to_list() == [0.5, 0.5]
    assert skips.report == {"train": {"same_request": 2}, "valid": {}, "test": {}}


def test_a_request_without_a_click_says_nothing_unless_asked():
    shown, _ = request("abc")
    skips = label(events(), shown, RULES, timed=True)
    assert not len(skips.labels) and skips.report["train"] == {"no_click": 3}
    skips = label(events(), shown, SkipRules(confidence=WITHOUT), timed=True)
    assert set(reasons(skips).values()) == {"REQUEST_WITHOUT_CLICK"}


def test_declared_positions_above_at_one_below_and_deeper_than_the_lowest_click():
    # Clicks on b (2) and d (5); e stands beside d; f is next, two more lie deeper.
    shown, clicks = request("abcdefgh", "bd", positions=[1, 2, 3, 5, 5, 8, 9, 10])
    skips = label(events(*clicks), shown, RULES, timed=True)
    assert reasons(skips) == {
        "a": "SKIP_ABOVE",
        "c": "SKIP_ABOVE",
        "e": "SHOWN_BEFORE_LAST_CLICK",
        "f": "ONE_BELOW_LAST_CLICK",
    }
    assert skips.report["train"]["unseen"] == 2


def test_the_order_of_a_list_is_not_a_position():
    shown, clicks = request("abcdef", "b")
    assert set(reasons(label(events(*clicks), shown.drop("position"), RULES, timed=True))) == set(
        "acdef"
    )


def test_a_shown_event_is_a_skip_when_nothing_follows_within_the_horizon():
    log = events(
        event("a", 0, S),
        event("b", 0, S), event("b", HOUR, P),
        event("c", 0, S), event("c", HOUR + 1, P),
        event("d", 5, S), event("d", 4, P),
        event("e", 5, S), event("e", 5, P, user="someone else"),
    )  # fmt: skip
    skips = label(log, None, RULES, timed=True)
    assert reasons(skips) == dict.fromkeys("acde", "SHOWN")
    assert skips.report["train"] == {"shown": 4, "rescued": 1}


def test_shown_events_of_one_request_follow_the_rules_of_requests():
    log = events(
        event("a", 0, S, request=7, position=1),
        event("b", 0, S, request=7, position=2),
        event("c", 0, S, request=7, position=3),
        event("d", 0, S, request=7, position=4),
        event("b", 9, P, request=7),
        event("e", 0, S, request=8, position=1),
    )
    skips = label(log, None, RULES, timed=True)
    assert reasons(skips) == {"a": "SKIP_ABOVE", "c": "ONE_BELOW_LAST_CLICK"}
    assert skips.report["train"] == {
        "skip_above": 1, "one_below_last_click": 1, "unseen": 1, "no_click": 1,
    }  # fmt: skip


def test_an_explicit_rejection_and_a_bounce_are_told_apart():
    log = events(event("a", 0, R), event("b", 0, R, bounce=True))
    assert reasons(label(log, None, RULES, timed=True)) == {"a": "REJECTED", "b": "SHORT_DWELL"}
    assert reasons(label(log.drop("bounce", "request"), None, RULES, timed=True)) == {
        "a": "REJECTED", "b": "REJECTED",
    }  # fmt: skip


def test_a_rejection_is_rescued_only_by_what_comes_after_it():
    log = events(event("a", 5, R), event("a", 5, P), event("b", 5, R), event("b", 6, P))
    skips = label(log, None, RULES, timed=True)
    assert reasons(skips) == {"a": "REJECTED"} and skips.report["train"]["rescued"] == 1


def test_a_positive_of_a_later_side_rescues_nothing():
    late = event("a", 10, P, side=VALID)
    skips = label(events(event("a", 9, R), late), None, RULES, timed=True)
    assert reasons(skips) == {"a": "REJECTED"}
    shown, clicks = request("ab", "b")
    assert reasons(label(events(*clicks, late), shown, RULES, timed=True)) == {"a": "SAME_REQUEST"}
    early = event("a", 10, P)
    assert reasons(label(events(*clicks, early), shown, RULES, timed=True)) == {}


def test_a_click_across_the_cut_leaves_the_train_half_of_its_request_without_a_click():
    log = events(
        event("a", 0, S, request=1), event("b", 0, S, request=1),
        event("b", 2, P, request=1, side=VALID),
    )  # fmt: skip
    assert label(log, None, RULES, timed=True).report["train"] == {"no_click": 2}


def test_what_was_shown_less_than_a_horizon_before_the_end_is_censored():
    # The end is exclusive: a positive at exactly 100 + 1 h is still seen when the end is later.
    for end, censored in ((100 + HOUR, True), (100 + HOUR + 1, False)):
        skips = label(events(event("a", 100, S, end=end)), None, RULES, timed=True)
        assert (skips.report["train"] == {"censored": 1}) == censored
        shown, clicks = request("ab", "b", time=100, end=end)
        skips = label(events(*clicks), shown, RULES, timed=True)
        assert (skips.report["train"] == {"censored": 1}) == censored
    skips = label(events(event("a", 100, R, end=101)), None, RULES, timed=True)
    assert reasons(skips) == {"a": "REJECTED"}


def test_without_a_clock_any_later_positive_rescues_and_nothing_is_censored():
    log = events(event("a", 0, S), event("a", 10**12, P), event("b", 3, S, end=4))
    skips = label(log, None, RULES, timed=False)
    assert reasons(skips) == {"b": "SHOWN"} and skips.report["train"]["rescued"] == 1


def test_a_confidence_of_zero_drops_the_reason_but_counts_it():
    skips = label(events(event("a", 0, R)), None, SkipRules(confidence={"rejected": 0}), timed=True)
    assert not len(skips.labels) and skips.report["train"] == {"rejected": 1}


def test_skips_are_on_whenever_the_log_shows_impressions_or_rejections():
    only = events(event("a", 0, P))
    assert not wanted(SkipRules(), only, impressions=False)
    assert wanted(SkipRules(), only, impressions=True)
    assert wanted(SkipRules(), events(event("a", 0, R)), impressions=False)
    assert not wanted(SkipRules(enabled=False), only, impressions=True)


def test_an_unknown_reason_names_the_nearest_known_one():
    with pytest.raises(ValidationError, match="skip_above"):
        SkipRules(confidence={"skip_abov": 1.0})
    with pytest.raises(ValidationError, match="no duration"):
        SkipRules(horizon="soon")


def test_a_label_belongs_to_its_request_then_to_the_next_positive_then_to_the_previous():
    positives = pl.DataFrame(
        {
            "user": [1, 1, 1, 1, 2],
            "time": [10, 20, 20, 30, 10],
            "side": pl.Series([0, 0, 0, 1, 0], dtype=pl.UInt8),
            "request": [5, 6, 6, None, None],
            "event": pl.Series(range(5), dtype=pl.Int32),
        }
    )
    labels = pl.DataFrame(
        [
            (1, 10, 6, 0, 1),  # its own request, though an earlier positive is as near
            (1, 11, None, 0, 1),  # the next
            (1, 20, 9, 0, 1),  # at the same time, of a request without a positive
            (1, 25, None, 0, 2),  # only the other side has a later one: the previous
            (1, 3, None, 1, 3),  # the next of its side
            (2, 50, None, 0, 4),
            (3, 50, None, 0, None),  # a user without positives
            (2, 50, None, 1, None),
        ],
        schema={"user": pl.Int64, "time": pl.Int64, "request": pl.Int64, "side": pl.UInt8,
                "expected": pl.Int32},
        orient="row",
    )  # fmt: skip
    found = attach(labels, positives)
    assert found["event"].to_list() == labels["expected"].to_list()
    without = attach(labels.filter(pl.col("request").is_null()), positives.drop("request"))
    assert without["event"].to_list() == [1, 2, 3, 4, None, None]


def naive(rows, shown, rules, horizon):
    """The rules once more, as loops. Returns a Counter of (user, item, time, side, reason)."""
    positives = [row for row in rows if row[3] == P]
    found = []
    for user, item, time, kind, side, end, req, _, bounce in rows:
        if kind == R:
            found.append(
                (user, item, time, side, end, Reason.SHORT_DWELL if bounce else Reason.REJECTED)
            )
        elif kind == S and req is None:
            found.append((user, item, time, side, end, Reason.SHOWN))
    groups: dict = {}
    for user, item, time, req, side, end, clicked, place in shown:
        groups.setdefault((user, req, side), []).append((item, time, end, clicked, place))
    for user, item, time, kind, side, end, req, place, _ in rows:
        if req is not None and kind in (P, S):
            groups.setdefault((user, req, side), []).append((item, time, end, kind == P, place))
    for (user, _, side), members in groups.items():
        items: dict = {}
        for item, time, end, clicked, place in members:
            old = items.get(item, (time, end, False, None))
            places = [p for p in (place, old[3]) if p is not None]
            items[item] = (
                min(time, old[0]), min(end, old[1]), clicked or old[2], min(places, default=None)
            )  # fmt: skip
        any_click = any(value[2] for value in items.values())
        lowest = max((v[3] for v in items.values() if v[2] and v[3] is not None), default=None)
        below = sorted({
            v[3] for v in items.values()
            if not v[2] and v[3] is not None and lowest is not None and v[3] > lowest
        })  # fmt: skip
        for item, (time, end, clicked, place) in items.items():
            if clicked:
                continue
            if not any_click:
                without = rules.confidence["request_without_click"]
                why = Reason.REQUEST_WITHOUT_CLICK if without else Reason.NO_CLICK
            elif place is None or lowest is None:
                why = Reason.SAME_REQUEST
            elif place < lowest:
                why = Reason.SKIP_ABOVE
            elif place == lowest:
                why = Reason.SHOWN_BEFORE_LAST_CLICK
            elif place in below[:1]:
                why = Reason.ONE_BELOW_LAST_CLICK
            else:
                why = Reason.UNSEEN
            found.append((user, item, time, side, end, why))
    result = []
    for user, item, time, side, end, why in found:
        explicit = why in (Reason.REJECTED, Reason.SHORT_DWELL)
        if why < Reason.UNSEEN:
            later = [
                p[2] - time
                for p in positives
                if (p[0], p[1], p[4]) == (user, item, side) and p[2] >= time + explicit
            ]
            if any(horizon is None or wait <= horizon for wait in later):
                why = Reason.RESCUED
            elif not explicit and horizon is not None and time + horizon >= end:
                why = Reason.CENSORED
        result.append((user, item, time, side, why))
    return Counter(result)


@st.composite
def logs(draw):
    small = st.integers(0, 12)
    ends = {TRAIN: 13, VALID: 20}
    rows, shown = [], []
    for _ in range(draw(st.integers(0, 14))):
        side = draw(st.sampled_from([TRAIN, VALID]))
        rows.append(
            event(
                draw(st.sampled_from("abc")),
                draw(small),
                draw(st.sampled_from([P, S, R])),
                user=draw(st.sampled_from("uv")),
                side=side,
                end=ends[side],
                request=draw(st.none() | st.integers(1, 2)),
                position=draw(st.none() | st.integers(1, 4)),
                bounce=draw(st.booleans()),
            )
        )
    for number in range(3, 3 + draw(st.integers(0, 3))):
        side, time = draw(st.sampled_from([TRAIN, VALID])), draw(small)
        for item in draw(st.lists(st.sampled_from("abcdef"), max_size=6)):
            place = draw(st.none() | st.integers(1, 5))
            shown.append(("u", item, time, number, side, ends[side], draw(st.booleans()), place))
    return rows, shown


@settings(max_examples=200)
@given(
    logs(),
    st.booleans(),
    st.booleans(),
)
def test_labels_are_those_of_a_naive_loop(log, timed, without_click):
    rows, shown = log
    rules = SkipRules(horizon="0.000003s", confidence=WITHOUT if without_click else {})
    lists = pl.DataFrame(shown, schema=LISTS, orient="row") if shown else None
    skips = label(events(*rows), lists, rules, timed=timed)
    expected = naive(rows, shown, rules, 3 if timed else None)
    labelled = Counter(skips.labels.select("user", "item", "time", "side", "reason").iter_rows())
    assert labelled == Counter({key: n for key, n in expected.items() if key[4] < Reason.UNSEEN})
    for side in (Side.TRAIN, Side.VALID):
        counts: Counter = Counter()
        for (_, _, _, where, why), n in expected.items():
            if where == side:
                counts[why.name.lower()] += n
        assert skips.report[side.name.lower()] == dict(counts)
