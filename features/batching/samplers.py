"""Batch samplers, and the slices that they deal: at random or by time.

A sampler deals in units, which are events or whole users, each once an epoch; a slice of them
becomes the queries and examples of a batch. Over several ranks a sampler deals global batches, the
same on every rank from the same generator; each rank takes an equal part of each, and what does not
divide is left out.

Legend: n units, U users, Q queries, B examples, E training events, H history entries in all.
"Before" is strict: what happens at the time of an example is not in its history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from recsys.features.prepared.timeline import Timeline
from recsys.ragged import slots
from recsys.tables import SECOND


@dataclass(frozen=True)
class BatchSlice:
    """Units that a sampler deals out for one batch.

    Args:
        units: (n,) events, or user rows where the sampler deals in whole users.
        nearby: events near in time, from which the sampling probability of each candidate is
            estimated; None: the whole training side.
        as_of: microseconds as of which item statistics stand; None: there are none.
    """

    units: np.ndarray
    nearby: np.ndarray | None = None
    as_of: int | None = None


@dataclass(frozen=True)
class BatchQueries:
    """The queries of a batch and what they went on to choose, as positions in the training events.

    Args:
        users: (U,) int64 user rows.
        history: (H,) int64 events that the users had, oldest first, one user after the other.
        lengths: (U,) int64 history entries of each user.
        events: (B,) int64 event of each example.
        until: (Q,) int64 event before which everything of the query's user is its past.
        owner: (B,) int64 query of each example, ascending; None: example b is query b.
        at: (Q,) int64 entry of `history` right after which each query stands; None: after the
            last of each user.
        user_of_query: (Q,) int64 position in `users` of each query; None: query q is of user q.
        first: (Q,) int64 event that gives each query its context; None: it has none.
    """

    users: np.ndarray
    history: np.ndarray
    lengths: np.ndarray
    events: np.ndarray
    until: np.ndarray
    owner: np.ndarray | None = None
    at: np.ndarray | None = None
    user_of_query: np.ndarray | None = None
    first: np.ndarray | None = None

    @property
    def query_users(self) -> np.ndarray:
        """(Q,) user row of each query."""
        return self.users if self.user_of_query is None else self.users[self.user_of_query]

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


class EventQueries:
    """Each event is an example and a query, with the newest events before it as history.

    Args:
        timeline: the training side.
        max_history: newest entries kept.
        learned: (n,) events that can be examples, the others are history only; None: all.
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
        """Events that can be examples."""
        return np.arange(len(self._user)) if self.learned is None else self.learned

    def length(self, units: np.ndarray) -> np.ndarray:
        """(n,) history entries of each."""
        return np.minimum(self._past[units], self.max_history)

    def queries(self, units: np.ndarray, _rng: np.random.Generator) -> BatchQueries:
        """The queries of the given events."""
        users = self._user[units].astype(np.int64)
        until = self._offsets[users] + self._past[units]
        lengths = self.length(units).astype(np.int64)
        history = slots(until - lengths, lengths)
        return BatchQueries(users, history, lengths, units, until, first=units)


class UserQueries:
    """Each user asks once for all of its items, and has a random part of them as history.

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

    def length(self, units: np.ndarray) -> np.ndarray:
        """(n,) most history entries of each."""
        return np.minimum(self._offsets[units + 1] - self._offsets[units], self.max_history)

    def queries(self, units: np.ndarray, rng: np.random.Generator) -> BatchQueries:
        """The queries of the given users."""
        start, end = self._offsets[units], self._offsets[units + 1]
        counts = end - start
        events = slots(start, counts)
        owner = np.repeat(np.arange(len(units)), counts)
        luck = rng.random(len(events))
        kept = luck >= self.dropout
        if len(counts) and int(counts.max()) > self.max_history:
            # In order of luck within each user, the luckiest first; those beyond the limit go.
            order = np.argsort(owner - luck, kind="stable")
            rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
            kept[order[rank >= self.max_history]] = False
        lengths = np.bincount(owner[kept], minlength=len(units)).astype(np.int64)
        return BatchQueries(units.astype(np.int64), events[kept], lengths, events, end, owner)


class SequenceQueries:
    """Each user asks at every position of its last events, once for each moment.

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

    def _window(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First event, event after the last, and number of entries that stand in a history."""
        end = self._offsets[units + 1]
        start = np.maximum(self._offsets[units], end - self.max_history - 1)
        # What shares the last moment is never before anything.
        entries = self._offsets[units] + self._past[end - 1] - start
        return start, end, np.maximum(entries, 0)

    def length(self, units: np.ndarray) -> np.ndarray:
        """(n,) history entries of each."""
        return self._window(units)[2]

    def queries(self, units: np.ndarray, _rng: np.random.Generator) -> BatchQueries:
        """The queries of the given users."""
        start, end, lengths = self._window(units)
        counts = end - start
        events = slots(start, counts)
        row = np.repeat(np.arange(len(units)), counts)
        until = self._offsets[units][row] + self._past[events]
        entry = until - start[row]  # so many of the window's events are before each event
        examples = np.flatnonzero(entry > 0)
        events, row, until, entry = (part[examples] for part in (events, row, until, entry))
        at = (np.cumsum(lengths) - lengths)[row] + entry - 1
        fresh = np.ones(len(at), bool)
        fresh[1:] = at[1:] != at[:-1]
        query = np.flatnonzero(fresh)
        return BatchQueries(
            units.astype(np.int64), slots(start, lengths), lengths.astype(np.int64), events,
            until[query],
            owner=None if fresh.all() else np.cumsum(fresh) - 1,
            at=at[query], user_of_query=row[query], first=events[query],
        )  # fmt: skip


QueryKind = EventQueries | UserQueries | SequenceQueries
"""How units, events or whole users, become queries."""


def events_after(queries: BatchQueries, timeline: Timeline, most: int) -> np.ndarray:
    """(Q,) int64 how many of its user's events come after a query's first example, up to `most`."""
    assert queries.first is not None  # Batches has seen to it
    end = np.asarray(timeline.user_offsets)[queries.query_users + 1]
    return np.minimum(end - 1 - queries.first, most).astype(np.int64)


def elapsed_seconds(queries: BatchQueries, timeline: Timeline) -> np.ndarray:
    """(H,) float32 seconds from each history entry to its query.

    With queries at every position: to the user's next event, which for the last entry is the first
    that is asked for. A user that asks once for all its items asks at its newest.
    """
    time = np.asarray(timeline.time)
    if queries.at is not None:
        then = time[queries.history + 1]
    else:
        last = queries.until - 1 if queries.first is None else queries.first
        then = np.repeat(time[last], queries.lengths)
    return ((then - time[queries.history]) / SECOND).astype(np.float32)


@dataclass(frozen=True)
class Share:
    """Which part of every global batch this process makes.

    Raises:
        ValueError: the rank is none of the world's.
    """

    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank is {self.rank}, but {self.world} ranks count from 0.")

    def of(self, units: np.ndarray) -> np.ndarray:
        """This rank's units of a global batch, as many on every rank."""
        if self.world == 1:
            return units
        each = len(units) // self.world
        return units[self.rank * each : (self.rank + 1) * each]


class Sampler(Protocol):
    """Divides every epoch into the same number of batches, as a trainer needs."""

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        """The slices of one epoch, in order; each is made when it is asked for."""
        ...


class Shuffled:
    """Units in random order, cut into batches; the last may be smaller.

    Args:
        units: (n,) what is dealt out, or the number of units when they are 0 … n-1.
        size: units of a batch, on each rank.
        share: the part of this process.
    """

    def __init__(self, units: np.ndarray | int, size: int, share: Share = Share()) -> None:
        self.units, self.size, self.share = units, size * share.world, share
        self.total = units if isinstance(units, int) else len(units)

    def __len__(self) -> int:
        whole, rest = divmod(self.total, self.size)
        return whole + (rest >= self.share.world)

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        order = rng.permutation(self.total)
        if not isinstance(self.units, int):
            order = self.units[order]
        edges = self.size * np.arange(len(self) + 1)
        return _Slices(order, edges[:-1], edges[1:], self.share)


class Windows:
    """Consecutive events form a batch; the order of the windows is random, and so is where the
    first one ends, so that they fall differently in each epoch.

    Args:
        time: (E,) microseconds of each event, in any order.
        size: most events of a window, on each rank.
        share: the part of this process.
        reach: events on either side of a window, in windows, from which sampling probabilities are
            estimated.
        units: (n,) events that are dealt out; None: all.
    """

    def __init__(
        self,
        time: np.ndarray,
        size: int,
        share: Share = Share(),
        reach: int = 4,
        units: np.ndarray | None = None,
    ) -> None:
        if units is None:
            units = np.arange(len(time))
        self.by_time = units[np.argsort(np.asarray(time)[units], kind="stable")]
        self.time = np.asarray(time)[self.by_time]
        self.size, self.share, self.reach = size * share.world, share, reach

    @property
    def total(self) -> int:
        """Events dealt out."""
        return len(self.time)

    def __len__(self) -> int:
        if self.total < self.share.world:
            return 0
        whole, rest = divmod(self.total, self.size)
        if self.total <= self.size or self.size == 1:
            return whole + (rest > 0)
        # The same in every epoch, as a trainer needs; the two outer windows share what the inner
        # ones leave, and of two possible numbers the one that lets the edges move further is taken.
        return whole + 1 + (2 * rest > self.size)

    def epoch(self, rng: np.random.Generator) -> Sequence[BatchSlice]:
        total, size = self.total, self.size
        if total > size > 1:
            inner = len(self) - 2
            outer = total - inner * size
            first = int(rng.integers(max(1, outer - size), min(size, outer - 1), endpoint=True))
            edges = np.concatenate([[0], first + size * np.arange(inner + 1), [total]])
        else:
            edges = np.append(np.arange(0, total, size), total)
        low, high = _settled(edges[:-1], edges[1:], len(self), self.share.world)
        order = rng.permutation(len(low))
        return _Slices(self.by_time, low[order], high[order], self.share, self)


def _settled(
    low: np.ndarray, high: np.ndarray, wanted: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """So many windows, each of at least so many events: the largest are halved, and where nothing
    can be halved any more, the largest come again.

    Raises:
        ValueError: there is no window of so many events.
    """
    if len(low) == wanted and least == 1:
        return low, high
    windows = [(int(a), int(b)) for a, b in zip(low, high, strict=True) if b - a >= least][:wanted]
    while windows and len(windows) < wanted:
        at = int(np.argmax([b - a for a, b in windows]))
        a, b = windows[at]
        if b - a >= 2 * least:
            middle = a + (b - a) // 2
            windows[at : at + 1] = [(a, middle), (middle, b)]
        else:
            windows.append((a, b))
    if not windows:
        raise ValueError(
            f"No window of time holds an event for each of the {least} ranks. Take a larger "
            "batch_size."
        )
    edges = np.array(windows, np.int64)
    return edges[:, 0], edges[:, 1]


class _Slices(Sequence[BatchSlice]):
    """Slices of an order, cut when they are asked for."""

    def __init__(
        self,
        order: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        share: Share,
        windows: Windows | None = None,
    ) -> None:
        self.order, self.low, self.high = order, low, high
        self.share, self.windows = share, windows

    def __len__(self) -> int:
        return len(self.low)

    def __getitem__(self, number: int) -> BatchSlice:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(f"there are {len(self)} batches, none at {number}.")
        low, high = int(self.low[number]), int(self.high[number])
        units = self.share.of(self.order[low:high])
        if self.windows is None:
            return BatchSlice(units)
        # The time is that of the whole window, so that all ranks share it.
        reach = self.windows.reach * self.windows.size
        return BatchSlice(
            units,
            nearby=self.order[max(0, low - reach) : high + reach],
            as_of=int(self.windows.time[low]),
        )
