"""From a part of a plan, events or whole users, to the queries and examples that stand in it.

Legend: n drawn units, U users, Q queries, B examples, E training events, H history entries in all.
"Before" is strict: what happens at the time of an example is not in its history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.features.prepared.passed import PASSED
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged, slots
from recsys.tables import SECOND


@dataclass(frozen=True)
class Part:
    """What a plan deals out for one batch.

    Args:
        drawn: (n,) events, or user rows where the plan deals in whole users.
        around: events near in time, from which the draw probability of each candidate is estimated;
            None: the whole training side.
        moment: microseconds as of which item statistics stand; None: the part has no moment.
    """

    drawn: np.ndarray
    around: np.ndarray | None = None
    moment: int | None = None


@dataclass(frozen=True)
class Asked:
    """The queries of a batch and what they went on to choose, as places in the training events.

    Args:
        users: (U,) int64 user rows.
        history: (H,) int64 events that the users had, oldest first, one user after the other.
        lengths: (U,) int64 history entries of each user.
        events: (B,) int64 event of each example.
        until: (Q,) int64 event before which everything of the query's user is its past.
        owner: (B,) int64 query of each example, ascending; None: example b is query b.
        at: (Q,) int64 entry of `history` right after which each query stands; None: after the
            last of each user.
        asker: (Q,) int64 place in `users` of each query; None: query q is of user q.
        first: (Q,) int64 event that gives each query its context; None: it has none.
    """

    users: np.ndarray
    history: np.ndarray
    lengths: np.ndarray
    events: np.ndarray
    until: np.ndarray
    owner: np.ndarray | None = None
    at: np.ndarray | None = None
    asker: np.ndarray | None = None
    first: np.ndarray | None = None

    @property
    def query_users(self) -> np.ndarray:
        """(Q,) user row of each query."""
        return self.users if self.asker is None else self.users[self.asker]

    def query_of(self, examples: np.ndarray) -> np.ndarray:
        """The query of each of the given examples."""
        return examples if self.owner is None else self.owner[examples]


def strictly_before(timeline: Timeline) -> np.ndarray:
    """(E,) how many events of the same user are strictly earlier than each event."""
    time, size = np.asarray(timeline.time), len(timeline.time)
    position = np.arange(size)
    starts = np.asarray(timeline.user_offsets)[timeline.user] if size else position
    fresh = np.ones(size, bool)
    fresh[1:] = (time[1:] != time[:-1]) | (starts[1:] != starts[:-1])
    # The first event of each run of equal times, carried forward along the run.
    first = np.maximum.accumulate(np.where(fresh, position, 0))
    return (first - starts).astype(np.int32)


class ByEvent:
    """Each drawn event is an example and a query, with the newest events before it as history.

    Args:
        timeline: the training side.
        max_history: newest entries kept.
        learned: (n,) events that can be drawn, the others are history only; None: all.
    """

    whole_users = False

    def __init__(
        self, timeline: Timeline, max_history: int, learned: np.ndarray | None = None
    ) -> None:
        self.max_history, self.learned = max_history, learned
        self._user = timeline.user.astype(np.int32)
        self._offsets = np.asarray(timeline.user_offsets)
        self._past = strictly_before(timeline)

    @property
    def units(self) -> np.ndarray:
        """Events that can be drawn."""
        return np.arange(len(self._user)) if self.learned is None else self.learned

    def length(self, drawn: np.ndarray) -> np.ndarray:
        """(n,) history entries of each."""
        return np.minimum(self._past[drawn], self.max_history)

    def ask(self, drawn: np.ndarray, _rng: np.random.Generator) -> Asked:
        """The queries of the drawn events."""
        users = self._user[drawn].astype(np.int64)
        until = self._offsets[users] + self._past[drawn]
        lengths = self.length(drawn).astype(np.int64)
        history = slots(until - lengths, lengths)
        return Asked(users, history, lengths, drawn, until, first=drawn)


class ByUser:
    """Each drawn user asks once for all of its items, and has a random part of them as history.

    For logs whose order means nothing. Where more is kept than fits, a random choice fits.

    Args:
        timeline: the training side.
        max_history: entries kept.
        dropout: probability that an item of the user is left out of its history.
    """

    whole_users = True

    def __init__(self, timeline: Timeline, max_history: int, dropout: float) -> None:
        self.max_history, self.dropout = max_history, dropout
        self._offsets = np.asarray(timeline.user_offsets)

    @property
    def units(self) -> np.ndarray:
        """Users with an event."""
        return np.flatnonzero(np.diff(self._offsets) > 0)

    def length(self, drawn: np.ndarray) -> np.ndarray:
        """(n,) most history entries of each."""
        return np.minimum(self._offsets[drawn + 1] - self._offsets[drawn], self.max_history)

    def ask(self, drawn: np.ndarray, rng: np.random.Generator) -> Asked:
        """The queries of the drawn users."""
        start, end = self._offsets[drawn], self._offsets[drawn + 1]
        counts = end - start
        events = slots(start, counts)
        owner = np.repeat(np.arange(len(drawn)), counts)
        luck = rng.random(len(events))
        kept = luck >= self.dropout
        if len(counts) and int(counts.max()) > self.max_history:
            # In order of luck within each user, the luckiest first; those beyond the limit go.
            order = np.argsort(owner - luck, kind="stable")
            rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            kept[order[rank >= self.max_history]] = False
        lengths = np.bincount(owner[kept], minlength=len(drawn)).astype(np.int64)
        return Asked(drawn.astype(np.int64), events[kept], lengths, events, end, owner)


class Ahead:
    """Each drawn user asks once, at one of its own moments drawn at random, for what came next.

    A draw is as cheap as one of `ByUser`, and its history is what stood before, in order.

    Args:
        timeline: the training side.
        max_history: newest entries kept.
        ahead: at most so many events from the moment on are the examples.
        within: moments are drawn from the last such share of a user's events.
    """

    whole_users = True

    def __init__(
        self, timeline: Timeline, max_history: int, ahead: int, within: float = 1.0
    ) -> None:
        self.max_history, self.ahead = max_history, ahead
        self._offsets = np.asarray(timeline.user_offsets)
        past = strictly_before(timeline)
        starts = np.repeat(self._offsets[:-1], np.diff(self._offsets))
        # (E,) the first event of each event's moment; ascending over all users.
        self._moment = starts + past
        # (U,) events that are not drawn: those of each user's first moment, and what is too old.
        counts = np.diff(self._offsets)
        first = np.bincount(timeline.user[past == 0], minlength=timeline.n_users)
        late = np.floor(counts * (1 - within)).astype(np.int64)
        self._first = np.where(
            first < counts, np.maximum(first, np.minimum(late, counts - 1)), first
        )

    @property
    def units(self) -> np.ndarray:
        """Users with an event that has a past."""
        return np.flatnonzero(np.diff(self._offsets) > self._first)

    def length(self, drawn: np.ndarray) -> np.ndarray:
        """(n,) most history entries of each."""
        last = self._moment[self._offsets[drawn + 1] - 1]
        return np.minimum(last - self._offsets[drawn], self.max_history)

    def ask(self, drawn: np.ndarray, rng: np.random.Generator) -> Asked:
        """The queries of the drawn users."""
        start, end = self._offsets[drawn], self._offsets[drawn + 1]
        eligible = start + self._first[drawn]
        chosen = eligible + (rng.random(len(drawn)) * (end - eligible)).astype(np.int64)
        until = self._moment[chosen]
        lengths = np.minimum(until - start, self.max_history)
        counts = np.minimum(end - until, self.ahead)
        return Asked(
            drawn.astype(np.int64), slots(until - lengths, lengths), lengths.astype(np.int64),
            slots(until, counts), until,
            owner=np.repeat(np.arange(len(drawn)), counts), first=until,
        )  # fmt: skip

    def chances(self) -> np.ndarray:
        """(E,) probability that each event is an example when its user is drawn."""
        events = np.arange(len(self._moment))
        users = np.repeat(np.arange(len(self._first)), np.diff(self._offsets))
        eligible = (self._offsets[:-1] + self._first)[users]
        # Chosen ones whose moment began in (event - ahead, event] bring the event in.
        after = np.searchsorted(self._moment, events, "right")
        before = np.searchsorted(self._moment, events - self.ahead, "right")
        brought = np.maximum(after - np.maximum(before, eligible), 0)
        return brought / np.maximum(self._offsets[1:][users] - eligible, 1)


class BySequence:
    """Each drawn user asks at every position of its last events, once for each moment.

    The first of the events has no past and is only history; those of one moment share a query,
    which stands after the last event strictly before them.

    Args:
        timeline: the training side.
        max_history: most entries of a history; one event more is the last example.
    """

    whole_users = True

    def __init__(self, timeline: Timeline, max_history: int) -> None:
        self.max_history = max_history
        self._offsets = np.asarray(timeline.user_offsets)
        self._past = strictly_before(timeline)

    @property
    def units(self) -> np.ndarray:
        """Users with an example."""
        users = np.flatnonzero(np.diff(self._offsets) > 0)
        return users[self.length(users) > 0]

    def _window(self, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First event, event after the last, and number of entries that stand in a history."""
        end = self._offsets[drawn + 1]
        start = np.maximum(self._offsets[drawn], end - self.max_history - 1)
        # What shares the last moment is never before anything.
        entries = self._offsets[drawn] + self._past[end - 1] - start
        return start, end, np.maximum(entries, 0)

    def length(self, drawn: np.ndarray) -> np.ndarray:
        """(n,) history entries of each."""
        return self._window(drawn)[2]

    def ask(self, drawn: np.ndarray, _rng: np.random.Generator) -> Asked:
        """The queries of the drawn users."""
        start, end, lengths = self._window(drawn)
        counts = end - start
        events = slots(start, counts)
        row = np.repeat(np.arange(len(drawn)), counts)
        until = self._offsets[drawn][row] + self._past[events]
        entry = until - start[row]  # so many of the window's events are before each event
        examples = np.flatnonzero(entry > 0)
        events, row, until, entry = (part[examples] for part in (events, row, until, entry))
        at = (np.cumsum(lengths) - lengths)[row] + entry - 1
        fresh = np.ones(len(at), bool)
        fresh[1:] = at[1:] != at[:-1]
        query = np.flatnonzero(fresh)
        return Asked(
            drawn.astype(np.int64), slots(start, lengths), lengths.astype(np.int64), events,
            until[query],
            owner=None if fresh.all() else np.cumsum(fresh) - 1,
            at=at[query], asker=row[query], first=events[query],
        )  # fmt: skip


Reading = ByEvent | ByUser | Ahead | BySequence


def events_after(asked: Asked, timeline: Timeline, most: int) -> np.ndarray:
    """(Q,) int64 how many of its user's events come after a query's first example, up to `most`."""
    assert asked.first is not None  # Batches has seen to it
    end = np.asarray(timeline.user_offsets)[asked.query_users + 1]
    return np.minimum(end - 1 - asked.first, most).astype(np.int64)


def passed_before(asked: Asked, timeline: Timeline) -> Ragged:
    """Q ragged item rows that each query's user was shown and passed over before its moment."""
    assert asked.first is not None and timeline.passed is not None  # Batches has seen to it
    moments = np.asarray(timeline.time)[asked.first]
    return timeline.passed.before(asked.query_users, moments, PASSED)


def elapsed_seconds(asked: Asked, timeline: Timeline) -> np.ndarray:
    """(H,) float32 seconds from each history entry to its query.

    With queries at every position: to the user's next event, which for the last entry is the first
    that is asked for. A user that asks once for all its items asks at its newest.
    """
    time = np.asarray(timeline.time)
    if asked.at is not None:
        then = time[asked.history + 1]
    else:
        last = asked.until - 1 if asked.first is None else asked.first
        then = np.repeat(time[last], asked.lengths)
    return ((then - time[asked.history]) / SECOND).astype(np.float32)
