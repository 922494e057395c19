"""The first time a user had an item, against loops over whole histories."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from recsys.features.prepared.first_seen import FirstSeen
from recsys.features.prepared.timeline import Timeline

N_USERS, N_ITEMS = 4, 5
USER, ITEM, TIME = st.integers(0, N_USERS - 1), st.integers(0, N_ITEMS - 1), st.integers(0, 6)
EVENTS = st.lists(st.tuples(USER, ITEM, TIME), max_size=25)


def timeline(events: list[tuple[int, int, int]], n_items: int = N_ITEMS) -> Timeline:
    """Of so many item rows, which take no memory."""
    user, item, time = np.array(events, np.int64).reshape(-1, 3).T
    return Timeline.build(
        user, item.astype(np.int32), time,
        n_users=N_USERS, first_seen=np.broadcast_to(np.int64(0), n_items),
    )  # fmt: skip


@given(EVENTS, st.lists(st.tuples(USER, ITEM, TIME), max_size=12), st.booleans())
def test_what_was_had_stands_in_the_whole_history_before(
    events: list[tuple[int, int, int]], asked: list[tuple[int, int, int]], of_all: bool
) -> None:
    past = timeline(events)
    users, items, times = np.array(asked, np.int64).reshape(-1, 3).T
    until = past.user_offsets[users] + past.past(users, times)
    found = FirstSeen(past, None if of_all else users).before(users, items, until)
    histories = past.histories(users, times)
    assert found.tolist() == [item in histories[q] for q, item in enumerate(items)]
    ever = FirstSeen(past).before(users, items, past.user_offsets[users + 1])
    assert ever.tolist() == [any(e[:2] == a[:2] for e in events) for a in asked]


@given(EVENTS)
def test_one_event_of_each_user_and_item_is_the_first(events: list[tuple[int, int, int]]) -> None:
    past = timeline(events)
    pairs = list(zip(past.user.tolist(), past.item.tolist(), strict=True))
    wanted = [pair not in pairs[:place] for place, pair in enumerate(pairs)]
    assert FirstSeen(past).are_first.tolist() == wanted


def test_many_items_do_not_run_over_32_bits() -> None:
    many = 2**30 + 7
    past = timeline([(0, 5, 0), (3, many - 1, 0)], many)
    users, items = np.array([0, 3, 3], np.int32), np.array([5, many - 1, 5], np.int32)
    found = FirstSeen(past, users).before(users, items, np.array([1, 2, 2]))
    assert found.tolist() == [True, True, False]
