"""Users asked at a random one of their moments for what came next."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.features.batching.batches import Batches, TrainingEvents
from recsys.features.batching.logq import Inclusion
from recsys.features.batching.slices import Ahead, elapsed_seconds
from recsys.features.prepared.timeline import Timeline

ITEMS = 9


def timeline(times: list[list[int]], items: list[list[int]] | None = None) -> Timeline:
    """User u + 1 has an event at each of `times[u]`; items count up unless they are given."""
    counts = [len(own) for own in times]
    user = np.repeat(np.arange(1, len(times) + 1), counts)
    own = [list(range(len(t))) for t in times] if items is None else items
    item = np.array([1 + i % ITEMS for each in own for i in each], np.int32)
    return Timeline.build(
        user, item, np.array([t for own in times for t in own], np.int64) * 1_000_000,
        n_users=len(times) + 1, first_seen=np.zeros(ITEMS + 1, np.int64), timed=True,
    )  # fmt: skip


def test_a_user_is_asked_for_what_came_after_a_moment_with_what_stood_before():
    reading = Ahead(timeline([[0, 1, 2, 3, 4, 5]]), max_history=3, ahead=2)
    seen = set()
    for seed in range(60):
        asked = reading.ask(np.array([1]), np.random.default_rng(seed))
        place = int(asked.until[0])
        assert asked.history.tolist() == list(range(max(0, place - 3), place))
        assert asked.events.tolist() == list(range(place, min(place + 2, 6)))
        assert asked.owner.tolist() == [0] * len(asked.events)
        assert asked.first.tolist() == [place]
        seen.add(place)
    assert seen == {1, 2, 3, 4, 5}  # the first event has no past


def test_moments_are_drawn_from_the_end():
    reading = Ahead(timeline([list(range(8))]), max_history=9, ahead=1, within=0.25)
    drawn = {int(reading.ask(np.array([1]), np.random.default_rng(n)).until[0]) for n in range(40)}
    assert drawn == {6, 7}


def test_events_of_one_moment_are_asked_for_together():
    reading = Ahead(timeline([[0, 1, 1, 1, 2]]), max_history=9, ahead=9)
    places = {
        tuple(reading.ask(np.array([1]), np.random.default_rng(seed)).events) for seed in range(40)
    }
    assert places == {(1, 2, 3, 4), (4,)}


def test_users_without_a_past_are_not_asked():
    reading = Ahead(timeline([[0], [1, 1], [1, 2], [3, 3, 4]]), max_history=5, ahead=1)
    assert reading.units.tolist() == [3, 4]
    assert reading.length(reading.units).tolist() == [1, 2]


def test_time_passes_until_the_first_that_is_asked_for():
    line = timeline([[0, 10, 30]])
    reading = Ahead(line, max_history=5, ahead=1)
    for seed in range(9):
        asked = reading.ask(np.array([1]), np.random.default_rng(seed))
        wanted = [10.0] if asked.until[0] == 1 else [30.0, 20.0]
        assert elapsed_seconds(asked, line).tolist() == wanted


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=8), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([1.0, 0.5, 0.25]),
)
def test_chances_are_shares_of_all_moments(times: list[list[int]], ahead: int, within: float):
    """Twin: every event that may be chosen, one after the other."""
    line = timeline([sorted(own) for own in times])
    reading = Ahead(line, max_history=4, ahead=ahead, within=within)
    wanted = np.zeros(len(line.item))
    for user in reading.units:
        start, end = line.user_offsets[user], line.user_offsets[user + 1]
        moments = [
            start + int(np.searchsorted(line.time[start:end], line.time[event]))
            for event in range(start, end)
        ]
        late = min(int((end - start) * (1 - within)), end - start - 1)
        chosen = [moment for moment in moments[late:] if moment > start]
        for moment in chosen:
            wanted[moment : min(moment + ahead, end)] += 1 / len(chosen)
    np.testing.assert_allclose(reading.chances(), wanted, atol=1e-12)


def test_draws_are_corrected_by_how_often_they_come():
    """The share of each item is that of many draws; where an item stands twice, not above it."""
    rng = np.random.default_rng(0)
    line = timeline([list(range(n)) for n in (3, 5, 8, 2)], None)
    reading = Ahead(line, max_history=9, ahead=3)
    inclusion = Inclusion(line, reading, ITEMS, 0, None)
    counts, rounds = np.zeros(ITEMS + 1), 4000
    for _ in range(rounds):
        asked = reading.ask(reading.units, rng)
        counts += np.bincount(line.item[asked.events], minlength=ITEMS + 1)
    np.testing.assert_allclose(inclusion._shares, counts / rounds / len(reading.units), atol=0.02)
    twice = timeline([[0, 1, 2]], [[3, 4, 4]])
    shares = Inclusion(twice, Ahead(twice, 9, 2), ITEMS, 0, None)._shares
    assert shares is not None and shares[5] == pytest.approx(1.0)


def test_batches_of_the_plan_hold_every_user_once():
    line = timeline([list(range(n)) for n in (3, 5, 8, 2, 1)])
    events = TrainingEvents(line, None, None, None, None, np.arange(1, ITEMS + 1))
    batches = Batches(events, plan="ahead", batch_size=2, ahead=(2, 1.0), uniform_negatives=3)
    users = [int(user) for batch in batches for user in batch.user.users]
    assert sorted(users) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="ahead"):
        Batches(events, plan="forward")  # type: ignore[arg-type]
