"""What was known before a moment, against loops over a list of events."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.features.batching.samplers import strictly_before
from recsys.features.prepared.timeline import (
    NEVER,
    STATISTICS,
    WINDOWS,
    Timeline,
    count_before,
    elapsed_of,
    statistic_scale,
    times_by_row,
)
from recsys.ragged import Ragged
from recsys.tables import DAY

HOUR = DAY // 24
N_USERS, N_ITEMS = 4, 6


@dataclass
class World:
    """Events and exposures as lists of (user, item, time) and (item, time)."""

    events: list[tuple[int, int, int]]
    shown: list[tuple[int, int]]

    def timeline(self) -> Timeline:
        user, item, time = np.array(self.events, np.int64).reshape(-1, 3).T
        shown_item, shown_time = np.array(self.shown, np.int64).reshape(-1, 2).T
        return Timeline.build(
            user, item, time,
            n_users=N_USERS, first_seen=np.arange(N_ITEMS) * 30 * HOUR,
            shown_item=shown_item, shown_time=shown_time,
        )  # fmt: skip


TIMES = st.integers(0, 300).map(lambda hour: hour * HOUR)
EVENTS = st.lists(
    st.tuples(st.integers(1, N_USERS - 1), st.integers(1, N_ITEMS - 1), TIMES), max_size=25
)
SHOWN = st.lists(st.tuples(st.integers(1, N_ITEMS - 1), TIMES), max_size=25)
WORLDS = st.builds(World, EVENTS, SHOWN)


@given(st.lists(st.lists(st.integers(-5, 5), max_size=9), min_size=1, max_size=5), st.data())
def test_counting_before_is_counting(lists: list[list[int]], data: st.DataObject) -> None:
    asked = data.draw(
        st.lists(st.tuples(st.integers(0, len(lists) - 1), st.integers(-7, 7)), max_size=12)
    )
    rows = np.array([row for row, _ in asked], np.int64)
    as_of_times = np.array([as_of for _, as_of in asked], np.int64)
    times = Ragged.from_lists([sorted(row) for row in lists])
    wanted = [sum(time < as_of for time in lists[row]) for row, as_of in asked]
    assert count_before(times, rows, as_of_times).tolist() == wanted


def test_equal_times_are_not_before() -> None:
    times = Ragged.from_lists([[3, 3, 3, 8]])
    found = count_before(times, np.zeros(4, np.int64), np.array([3, 4, 8, 9]))
    assert found.tolist() == [0, 3, 3, 4]


@given(WORLDS, TIMES, st.integers(1, 4))
def test_histories_are_strictly_before_and_oldest_first(
    world: World, as_of: int, last: int
) -> None:
    timeline = world.timeline()
    users = np.array([2, 0, 1, 1])
    times = np.array([as_of, as_of, as_of, 0])
    in_order = sorted(world.events, key=lambda event: event[2])  # stable, as the timeline's order
    for newest in (None, last):
        found = timeline.histories(users, times, newest)
        for query, (user, time) in enumerate(zip(users, times, strict=True)):
            past = [i for u, i, t in in_order if u == user and t < time]
            assert found[query].tolist() == (past if newest is None else past[-newest:])
    everything = timeline.histories(users)
    assert everything[0].tolist() == [i for u, i, _ in in_order if u == 2]


@given(WORLDS)
def test_the_past_of_every_event_is_counted_alike_in_both_places(world: World) -> None:
    timeline = world.timeline()
    found = strictly_before(timeline)
    assert found.tolist() == timeline.past(timeline.user, timeline.time).tolist()


@given(WORLDS, TIMES)
def test_popularity_counts_the_events_before_and_within_the_window(world: World, at: int) -> None:
    timeline = world.timeline()
    for window in (None, DAY):
        wanted = [
            sum(i == item and t < at and (window is None or t >= at - window)
                for _, i, t in world.events)
            for item in range(N_ITEMS)
        ]  # fmt: skip
        assert timeline.popularity(at, window).tolist() == wanted
    assert timeline.popularity().tolist() == [
        sum(i == item for _, i, _ in world.events) for item in range(N_ITEMS)
    ]


@given(WORLDS, TIMES)
def test_statistics_equal_a_loop(world: World, at: int) -> None:
    timeline = world.timeline()
    found = timeline.statistics(np.arange(N_ITEMS), at)
    assert found.shape == (N_ITEMS, len(STATISTICS))
    for item in range(N_ITEMS):
        clicks = [t for _, i, t in world.events if i == item and t < at]
        shown = [t for i, t in world.shown if i == item and t < at]
        recent = [sum(t >= at - window for t in clicks) for window in WINDOWS.values()]
        exposed = [sum(t >= at - window for t in shown) for window in WINDOWS.values()]
        wanted = [
            math.log1p(max(0, at - item * 30 * HOUR) / HOUR),
            math.log1p(len(clicks)),
            *map(math.log1p, recent),
            *map(math.log1p, exposed),
            *(math.log((c + 1) / (s + 10)) for c, s in zip(recent, exposed, strict=True)),
        ]
        assert found[item].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_the_names_of_statistics_say_their_windows() -> None:
    assert (
        "age", "clicks",
        *(f"{what}_{window}" for what in ("clicks", "shown", "rate") for window in WINDOWS),
    ) == STATISTICS  # fmt: skip
    assert (WINDOWS["10m"], WINDOWS["3h"], WINDOWS["7d"]) == (HOUR // 6, 3 * HOUR, 7 * DAY)


@given(WORLDS, TIMES)
def test_counting_in_windows_and_searching_give_the_same(world: World, at: int) -> None:
    rows = np.arange(N_ITEMS)
    counted = world.timeline().statistics(rows, at)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recsys.features.prepared.timeline.SEARCH_COST", -1)
        searched = world.timeline().statistics(rows, at)
    assert counted.tolist() == searched.tolist()


def test_a_window_holds_its_first_moment_and_not_its_last() -> None:
    timeline = World([(1, 1, 0), (1, 1, 1), (1, 1, DAY)], []).timeline()
    assert timeline.popularity(DAY, DAY)[1] == 2
    assert timeline.popularity(DAY + 1, DAY)[1] == 2
    assert timeline.popularity(DAY + 2, DAY)[1] == 1


def test_without_exposures_their_statistics_are_0() -> None:
    timeline = Timeline.build(
        np.array([1]), np.array([1]), np.array([5]), n_users=2, first_seen=np.array([NEVER, 5])
    )
    found = timeline.statistics(np.array([0, 1]), HOUR + 5)
    assert (found[:, 11:] == 0).all()
    assert found[1, 0] == pytest.approx(math.log(2))
    assert found[0].tolist() == [0.0] * len(STATISTICS)


@given(WORLDS, WORLDS, TIMES)
@settings(max_examples=150)
def test_what_happens_at_or_after_t_changes_nothing_that_is_seen_at_t(
    world: World, other: World, at: int
) -> None:
    changed = World(
        [e for e in world.events if e[2] < at] + [e for e in other.events if e[2] >= at],
        [s for s in world.shown if s[1] < at] + [s for s in other.shown if s[1] >= at],
    )
    users, rows = np.arange(N_USERS), np.arange(N_ITEMS)
    seen = []
    for timeline in (world.timeline(), changed.timeline()):
        history = timeline.histories(users, np.full(N_USERS, at))
        seen.append(
            (
                history.offsets.tolist(), history.values.tolist(),
                timeline.statistics(rows, at).tolist(), timeline.popularity(at).tolist(),
                timeline.popularity(at, DAY).tolist(), timeline.alive(at).tolist(),
            )
        )  # fmt: skip
    assert seen[0] == seen[1]


@given(WORLDS, WORLDS)
def test_a_timeline_extended_is_the_timeline_of_everything(early: World, late: World) -> None:
    user, item, time = np.array(late.events, np.int64).reshape(-1, 3).T
    shown_item, shown_time = np.array(late.shown, np.int64).reshape(-1, 2).T
    base = early.timeline()
    found = base.extended(
        user, item, time, n_users=N_USERS, first_seen=base.first_seen,
        exists_from=base.exists_from, shown_item=shown_item, shown_time=shown_time,
    )  # fmt: skip
    whole = World(early.events + late.events, early.shown + late.shown).timeline()
    at = 200 * HOUR
    assert found.histories(np.arange(N_USERS)).lengths.tolist() == (
        whole.histories(np.arange(N_USERS)).lengths.tolist()
    )
    assert found.time.tolist() == whole.time.tolist()
    rows = np.arange(N_ITEMS)
    assert found.statistics(rows, at).tolist() == whole.statistics(rows, at).tolist()
    assert (found.popularity(at) == base.popularity(at)).all() or len(late.events)


def test_extending_knows_new_users_and_new_items() -> None:
    base = World([(1, 1, 5)], [(1, 4)]).timeline()
    longer = np.append(base.first_seen, 9)
    found = base.extended(
        np.array([N_USERS]), np.array([N_ITEMS]), np.array([9]),
        n_users=N_USERS + 1, first_seen=longer, exists_from=longer,
    )  # fmt: skip
    assert found.histories(np.array([1, N_USERS])).values.tolist() == [1, N_ITEMS]
    assert found.shown is not None
    assert len(found.shown) == N_ITEMS + 1
    assert found.alive(9)[N_ITEMS] and not found.alive(8)[N_ITEMS]


@given(WORLDS)
def test_selected_events_are_those_kept(world: World) -> None:
    timeline = world.timeline()
    _ = timeline.clicks  # what is remembered of the whole must not be taken for the part
    keep = np.arange(len(timeline.item)) % 3 != 0
    part = timeline.select(keep)
    assert part.user.tolist() == timeline.user[keep].tolist()
    assert part.item.tolist() == timeline.item[keep].tolist()
    assert part.clicks.lengths.sum() == keep.sum()
    assert part.shown is timeline.shown


def test_items_are_alive_from_when_they_exist_and_row_0_never() -> None:
    timeline = World([], []).timeline()
    assert timeline.alive(60 * HOUR).tolist() == [False, True, True, False, False, False]
    assert timeline.alive(None).tolist() == [False] + [True] * (N_ITEMS - 1)


def test_events_at_one_time_keep_the_order_they_came_in() -> None:
    timeline = World([(1, 5, 7), (1, 2, 7), (1, 4, 7), (1, 1, 3)], []).timeline()
    assert timeline.by_user[1].tolist() == [1, 5, 2, 4]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(-9, 9)), max_size=20))
def test_times_by_row_are_sorted(pairs: list[tuple[int, int]]) -> None:
    rows, times = np.array(pairs, np.int64).reshape(-1, 2).T
    found = times_by_row(rows, times, 5)
    assert [found[row].tolist() for row in range(5)] == [
        sorted(time for r, time in pairs if r == row) for row in range(5)
    ]


def test_the_scale_is_of_items_alive_and_of_those_chosen_near_and_never_0() -> None:
    timeline = World([(1, 1, 10 * HOUR), (2, 2, 40 * HOUR)], []).timeline()
    at = 70 * HOUR  # items 1 and 2 are alive
    mean, scale = statistic_scale(timeline, [at], 100, np.random.default_rng(0))
    # Both that are alive, and of as many clicks around the moment the one that there is.
    said = timeline.statistics(np.array([1, 2, 2]), at)
    assert mean.tolist() == pytest.approx(said.mean(0).tolist(), rel=1e-5)
    assert scale[0] == pytest.approx(said[:, 0].std(), rel=1e-5)
    assert scale[STATISTICS.index("clicks")] == 1.0  # both have one click
    nobody = statistic_scale(timeline, [0], 100, np.random.default_rng(0))
    assert nobody[0].tolist() == [0.0] * len(STATISTICS)
    assert nobody[1].tolist() == [1.0] * len(STATISTICS)


def test_elapsed_and_strength_by_hand() -> None:
    second = 1_000_000
    timeline = Timeline.build(
        np.array([1, 0, 1, 1]), np.array([2, 3, 4, 5]), np.array([9, 1, 3, 5]) * second,
        n_users=2, first_seen=np.zeros(6, np.int64),
        event_weight=np.array([0.5, 1, 2, 3], np.float32),
    )  # fmt: skip
    assert timeline.event_weight is not None and timeline.event_weight.tolist() == [1, 2, 3, 0.5]
    both = np.array([1, 0])
    elapsed, strength = timeline.beside_histories(both, np.array([9, 2]) * second)
    assert elapsed is not None and elapsed.tolist() == [6, 4, 1]
    assert strength is not None and strength.tolist() == [2, 3, 1]
    elapsed, strength = timeline.beside_histories(both, last=2, as_of=11 * second)
    assert elapsed is not None and elapsed.tolist() == [6, 2, 10]
    assert strength is not None and strength.tolist() == [3, 0.5, 1]
    assert timeline.beside_histories(both)[0] is None  # nobody says when it is asked
    part = timeline.select(np.array([True, False, True, True]))
    assert part.event_weight is not None and part.event_weight.tolist() == [1, 3, 0.5]
    longer = [
        timeline.extended(
            np.array([1, 0]), np.array([1, 1]), np.array([4, 8]) * second, n_users=2,
            first_seen=np.zeros(6), exists_from=np.zeros(6), event_weight=later,
        ).event_weight
        for later in (np.array([7, 8]), None)
    ]  # fmt: skip
    assert longer[0] is not None and longer[0].tolist() == [1, 8, 2, 7, 3, 0.5]
    assert longer[1] is not None
    np.testing.assert_array_equal(longer[1], [1, np.nan, 2, np.nan, 3, 0.5])
    untimed = replace(timeline, timed=False, event_weight=None)
    assert untimed.beside_histories(both, np.array([9, 2])) == (None, None)


def test_seconds_of_last_year_are_told_apart() -> None:
    year = 365 * 86_400 * 1_000_000
    history = Ragged.from_lists([[0, 1_000_000, 3_000_000]])
    elapsed = elapsed_of(history, np.array([3 * year]))
    assert (-np.diff(elapsed)).tolist() == [1, 2]
