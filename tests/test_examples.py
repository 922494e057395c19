"""From prepared events to questions: what is asked, what may be known, what is left out."""

from __future__ import annotations

import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.errors import ConfigError
from recsys.features.batching.examples import (
    Questions,
    ask,
    consecutive,
    timeline_until,
    training_events,
)
from recsys.features.prepared.timeline import Timeline
from recsys.tables import Side
from recsys.towers import data as data_module
from recsys.towers.data import Validation, moments_of, validation_side
from recsys.towers.rules import TrainingRules

N_USERS, N_ITEMS = 4, 7
EVENT = st.tuples(st.integers(1, N_USERS - 1), st.integers(1, N_ITEMS - 1), st.integers(0, 12))
EVENTS = st.lists(EVENT, max_size=20)
CUT = 6


def timeline(events: list[tuple[int, int, int]]) -> Timeline:
    user, item, time = np.array(events, np.int64).reshape(-1, 3).T
    return Timeline.build(user, item, time, n_users=N_USERS, first_seen=np.zeros(N_ITEMS, np.int64))


def questions(
    past: list[tuple[int, int, int]], later: list[tuple[int, int, int]], **options: Any
) -> Questions:
    user, item, time = np.array(later, np.int64).reshape(-1, 3).T
    chosen = {"each_event": True, "cutoff": None, "max_history": 3, "drop_seen": True, **options}
    return ask(timeline(past), user, item, time, **chosen)


def told(asked: Questions) -> list[tuple[int, int | None, list[int], list[int]]]:
    queries = asked.queries
    return [
        (
            int(queries.users[q]),
            None if queries.times is None else int(queries.times[q]),
            queries.history[q].tolist(),
            sorted(asked.targets[q].tolist()),
        )
        for q in range(len(queries))
    ]


@pytest.mark.parametrize("each_event", [True, False])
@pytest.mark.parametrize("drop_seen", [True, False])
@given(events=EVENTS)
@settings(max_examples=60)
def test_questions_equal_a_loop_over_users_and_times(
    each_event: bool, drop_seen: bool, events: list[tuple[int, int, int]]
) -> None:
    later = [event for event in events if event[2] >= CUT]
    past = events if each_event else [event for event in events if event[2] < CUT]
    in_order = sorted(past, key=lambda event: event[2])
    wanted, repeats = [], 0
    for user, time in sorted({(u, t if each_event else CUT) for u, _, t in later}):
        before = [i for u, i, t in in_order if u == user and t < time]
        chosen = [i for u, i, t in later if u == user and (t == time or not each_event)]
        had = [i for i in chosen if drop_seen and i in before]
        repeats += len(had)
        targets = sorted(i for i in chosen if i not in had)
        if targets:
            wanted.append((user, time, before[-3:], targets))
    asked = questions(
        past, later, each_event=each_event, cutoff=None if each_event else CUT, drop_seen=drop_seen
    )
    assert told(asked) == wanted
    assert asked.repeats == repeats
    assert all(later[e][0] == row[0] for e, row in zip(asked.event, wanted, strict=True))


@given(EVENTS, EVENTS, st.integers(0, 12))
@settings(max_examples=100)
def test_what_happens_at_or_after_a_query_changes_nothing_it_sees(
    events: list[tuple[int, int, int]], other: list[tuple[int, int, int]], at: int
) -> None:
    later = [(1, 1, at), (2, 3, at)]
    changed = [e for e in events if e[2] < at] + [e for e in other if e[2] >= at]
    found = [told(questions(past, later)) for past in (events, changed)]
    assert found[0] == found[1]


def test_without_a_clock_the_past_ends_at_the_cut() -> None:
    past = [(1, 2, 0), (1, 3, 1), (2, 4, 0)]
    asked = questions(past, [(1, 5, 2), (1, 6, 3), (2, 1, 1)], each_event=False)
    assert told(asked) == [(1, None, [2, 3], [5, 6]), (2, None, [4], [1])]


def test_the_context_of_a_question_is_that_of_its_first_event() -> None:
    later = [(2, 1, 9), (1, 1, 8), (1, 2, 8), (1, 3, 9)]
    asked = questions([], later, context=np.array([[10], [11], [12], [13]]))
    assert asked.event.tolist() == [1, 3, 0]
    assert asked.queries.context[:, 0].tolist() == [11, 13, 10]


def test_a_question_without_a_target_left_is_not_asked() -> None:
    asked = questions([(1, 2, 0)], [(1, 2, 5), (2, 2, 5)])
    assert told(asked) == [(2, 5, [], [2])]
    assert asked.repeats == 1
    assert told(questions([(1, 2, 0)], [])) == []


def test_asking_a_heavy_user_at_each_of_its_events_does_not_hold_every_whole_history() -> None:
    n = 3_000
    user, item = np.ones(n, np.int64), np.arange(n) % 2_000
    past = Timeline.build(
        user, item.astype(np.int32), np.arange(n), n_users=2, first_seen=np.zeros(2_000, np.int64)
    )
    tracemalloc.start()
    asked = ask(
        past, user, item, np.arange(n), each_event=True, cutoff=None, max_history=5, drop_seen=True
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert asked.repeats == 1_000 and len(asked.queries) == 2_000
    assert peak < 4_000_000  # all pasts are 4.5 million items


@given(st.lists(st.integers(-(2**50), 2**50), min_size=1, max_size=20), st.integers(1, 10**9))
def test_moments_are_never_later_than_their_queries_and_not_too_many(
    times: list[int], refresh: int
) -> None:
    given_ = np.array(times, np.int64)
    moments = moments_of(given_, refresh, most=5)
    assert (moments <= given_).all()
    assert len(np.unique(moments)) <= 5
    step = refresh
    while len({t // step for t in times}) > 5:
        step *= 2
    assert moments.tolist() == [t // step * step for t in times]


def test_what_the_model_was_made_of_is_known_to_every_query_after_it() -> None:
    times = np.array([3, 12, 13, 19, 24])
    assert moments_of(times, 10, cutoff=13).tolist() == [0, 10, 13, 13, 20]


def test_without_times_there_are_no_moments() -> None:
    assert moments_of(None, 5) is None
    assert moments_of(np.empty(0, np.int64), 5) is None


def dataset(timed: bool = True) -> Any:
    """User 1: items 1 2 | 3 | 4; user 2: item 2 | 2 5 | 6; sides are cut at 10 and 20."""
    log = [
        (1, 1, 3), (1, 2, 5), (1, 3, 12), (1, 4, 22),
        (2, 2, 4), (2, 2, 13), (2, 5, 15), (2, 6, 25),
    ]  # fmt: skip
    user, item, time = np.array(log).T
    side = np.array([Side.TRAIN if t < 10 else Side.VALID if t < 20 else Side.TEST for t in time])
    exists = np.zeros(N_ITEMS, np.int64)
    exists[6] = 14
    return SimpleNamespace(
        manifest={"timed": timed, "split": {"valid_from": 10}},
        n_users=3, n_items=N_ITEMS, event_user=user, event_item=item.astype(np.int32),
        event_time=time, event_side=side.astype(np.uint8),
        event_weight=np.array([1, 2, 1, 1, 3, 1, 1, 1], np.float32),
        event_context=np.arange(8, dtype=np.int32)[:, None], user_offsets=np.array([0, 0, 4, 8]),
        skip_offsets=np.array([0, 1, 1, 2, 2, 4, 4, 4, 4]),
        skip_item=np.array([5, 6, 3, 4], np.int32),
        skip_weight=np.array([0.1, 0.2, 0.3, 0.4], np.float32),
        request_user=np.array([1, 2]), request_time=np.array([3, 13]),
        request_side=np.array([Side.TRAIN, Side.VALID]), request_offsets=np.array([0, 2, 3]),
        shown_item=np.array([1, 5, 2]), item_first_seen=exists, item_exists_from=exists,
        item_known=np.array([0, 1, 1, 0, 0, 1, 0]),
    )  # fmt: skip


def test_a_timeline_until_a_side_knows_nothing_of_later_ones() -> None:
    for side, item, shown in (
        (Side.TRAIN, [1, 2, 2], [0, 1, 0, 0, 0, 1, 0]),
        (Side.VALID, [1, 2, 3, 2, 2, 5], [0, 1, 1, 0, 0, 1, 0]),
        (Side.TEST, [1, 2, 3, 4, 2, 2, 5, 6], [0, 1, 1, 0, 0, 1, 0]),
    ):
        until = timeline_until(dataset(), side)
        assert until.item.tolist() == item
        assert until.shown is not None and until.shown.lengths.tolist() == shown
        assert until.user_offsets[-1] == len(item)


def test_consecutive_items_are_of_one_user_in_order_and_differ() -> None:
    past = timeline([(1, 4, 0), (1, 2, 5), (2, 2, 1), (2, 2, 2), (2, 6, 9), (3, 1, 0)])
    assert consecutive(past).T.tolist() == [[4, 2], [2, 6]]
    assert consecutive(timeline([])).shape == (2, 0)


def test_training_events_carry_their_own_weights_skips_and_context() -> None:
    events = training_events(dataset(), skips=True)
    assert events.size == 3
    assert events.weight.tolist() == [1, 2, 3]
    assert [events.skips[e].tolist() for e in range(3)] == [[5], [], [3, 4]]
    assert events.skip_weight.tolist() == pytest.approx([0.1, 0.3, 0.4])
    assert events.context[:, 0].tolist() == [0, 1, 4]
    assert events.candidates.tolist() == [1, 2, 5]
    assert training_events(dataset(), skips=False).skips is None
    # Learned from the validation side, too: its item 3 is then drawn as any other.
    assert training_events(dataset(), skips=False, until=Side.VALID).candidates.tolist() == [
        1, 2, 3, 5,
    ]  # fmt: skip


def side_of(data: Any, **options: Any) -> Validation:
    chosen = {
        "each_event": True, "refresh": 2, "max_history": 5, "drop_seen": True,
        "statistics": False, "seed": 0, **options,
    }  # fmt: skip
    found = validation_side(data, TrainingRules(), **chosen)
    assert found is not None
    return found


def test_validation_asks_at_each_event_with_what_was_before_it() -> None:
    found = side_of(dataset())
    queries = found.queries
    assert queries.users.tolist() == [1, 2]
    assert queries.times.tolist() == [12, 15]  # item 2 at 13 was had before
    assert [queries.history[q].tolist() for q in range(2)] == [[1, 2], [2, 2]]
    assert [found.targets[q].tolist() for q in range(2)] == [[3], [5]]
    assert [found.seen[q].tolist() for q in range(2)] == [[1, 2], [2, 2]]
    assert found.moments.tolist() == [12, 14]  # item 6 is not there at 12


def test_validation_at_one_cut_off_knows_nothing_of_its_own_side() -> None:
    found = side_of(dataset(), each_event=False, drop_seen=False)
    assert found.queries.times.tolist() == [10, 10]
    assert [found.queries.history[q].tolist() for q in range(2)] == [[1, 2], [2]]
    assert [found.targets[q].tolist() for q in range(2)] == [[3], [2, 5]]
    assert found.timeline.item.tolist() == [1, 2, 2]
    assert found.seen is None


def test_validation_without_a_clock_has_no_moments() -> None:
    found = side_of(dataset(timed=False), each_event=False)
    assert found.moments is None and found.queries.times is None


def test_a_sample_of_validation_queries_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "VALIDATION_QUERIES", 1)
    rules = TrainingRules()
    options = {
        "each_event": True, "refresh": 2, "max_history": 5, "drop_seen": False, "statistics": True,
    }  # fmt: skip
    found = [
        validation_side(dataset(), rules, seed=seed, **options).queries.times.tolist()
        for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert all(len(times) == 1 for times in found)
    assert found[0] == found[1]
    assert len({times[0] for times in found}) > 1


def test_without_a_validation_side_there_is_nothing_to_ask() -> None:
    data = dataset()
    data.event_side = np.zeros(8, np.uint8)
    assert validation_side(
        data, TrainingRules(), each_event=True, refresh=2, max_history=5, drop_seen=True,
        statistics=False, seed=0,
    ) is None  # fmt: skip


def repeating(items: list[int]) -> Any:
    """The dataset, but users have these items on the validation side."""
    data = dataset()
    data.event_item = data.event_item.copy()
    data.event_item[np.flatnonzero(data.event_side == Side.VALID)] = items
    return data


@pytest.mark.parametrize("each_event", [True, False])
def test_a_validation_side_of_repeats_alone_is_refused(each_event: bool) -> None:
    with pytest.raises(ConfigError, match=r"3 in all.*evaluate\.drop_seen = false"):
        side_of(repeating([1, 2, 2]), each_event=each_event)
    assert len(side_of(repeating([1, 2, 2]), each_event=each_event, drop_seen=False).queries) > 0


def test_it_is_said_when_most_of_the_validation_side_repeats() -> None:
    said: list[str] = []
    assert side_of(repeating([1, 2, 5]), progress=said.append).queries.users.tolist() == [2]
    assert len(said) == 1 and said[0].startswith("2 of 3 positives")
    side_of(repeating([3, 2, 5]), progress=said.append)
    assert len(said) == 1
