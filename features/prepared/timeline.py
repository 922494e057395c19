"""Point-in-time look-ups: histories, click and impression counts, age, as of any time.

Legend: E events (positives), Q questions, R item rows, S statistics.
"Before" is strict everywhere: what happens at time t is not known at t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from recsys.ragged import Ragged, gather
from recsys.split import duration
from recsys.tables import SECOND

WINDOWS = {
    text: duration(text) for text in ("10m", "30m", "1h", "3h", "6h", "12h", "1d", "2d", "7d")
}
"""Recent means within these spans, in microseconds: how attention rises and fades over hours says
more of what is clicked next than any one of them."""
STATISTICS = (
    "age",
    "clicks",
    *(f"{what}_{window}" for what in ("clicks", "shown", "rate") for window in WINDOWS),
)
"""What `Timeline.statistics` says of an item, in order."""
SEARCH_COST = 100
"""How many events are counted in the time of one search among an item's."""
NEVER = np.iinfo(np.int64).max
"""Time of what has not happened."""


def count_before(times: Ragged, rows: np.ndarray, as_of_times: np.ndarray) -> np.ndarray:
    """(Q,) how many of row `rows[q]`'s sorted times are strictly smaller than `moments[q]`.

    A binary search for all questions at once.
    """
    low = times.offsets[rows].astype(np.int64)
    start, high = low.copy(), times.offsets[np.asarray(rows) + 1].astype(np.int64)
    if len(times.values) == 0:
        return np.zeros(len(low), np.int64)
    for _ in range(int((high - low).max(initial=0)).bit_length()):
        middle = (low + high) >> 1
        inside = low < high
        earlier = inside & (times.values[np.where(inside, middle, 0)] < as_of_times)
        low = np.where(earlier, middle + 1, low)
        high = np.where(inside & ~earlier, middle, high)
    return low - start


@dataclass(frozen=True)
class Timeline:
    """Events by user and by item.

    Args:
        user_offsets: (U+1,) int64; the events of user u are `[user_offsets[u], user_offsets[u+1])`.
        item: (E,) item row of each event, sorted by (user, time, source order).
        time: (E,) int64 microseconds, or positions where there is no clock.
        first_seen: (N,) int64 when each item row was published or first met; `NEVER` when it has
            not been. The age of an item counts from here.
        exists_from: (N,) int64 from when on an item may be answered. An item of a table that says
            nothing of publication has always been there; its age counts from its first event.
        shown: item row → sorted times of its impressions, when the log has them.
        timed: whether `time` is a clock.
        event_weight: (E,) float32 weight of each event, NaN where it is not known; None: all alike.
    """

    user_offsets: np.ndarray
    item: np.ndarray
    time: np.ndarray
    first_seen: np.ndarray
    exists_from: np.ndarray
    shown: Ragged | None
    timed: bool
    event_weight: np.ndarray | None = None

    @staticmethod
    def build(
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        *,
        n_users: int,
        first_seen: np.ndarray,
        exists_from: np.ndarray | None = None,
        shown_item: np.ndarray | None = None,
        shown_time: np.ndarray | None = None,
        timed: bool = True,
        event_weight: np.ndarray | None = None,
    ) -> Timeline:
        """Sort events in any order into a timeline; ties keep the given order."""
        order = np.lexsort((time, user))
        user_offsets = np.searchsorted(user[order], np.arange(n_users + 1))
        shown = None
        if shown_item is not None and shown_time is not None:
            shown = times_by_row(shown_item, shown_time, len(first_seen))
        return Timeline(
            user_offsets,
            item[order],
            time[order],
            first_seen,
            first_seen if exists_from is None else exists_from,
            shown,
            timed,
            None if event_weight is None else event_weight[order],
        )

    @property
    def n_items(self) -> int:
        return len(self.first_seen)

    @property
    def n_users(self) -> int:
        return len(self.user_offsets) - 1

    @cached_property
    def user(self) -> np.ndarray:
        """(E,) user row of each event."""
        return np.repeat(np.arange(self.n_users), np.diff(self.user_offsets))

    @cached_property
    def by_user(self) -> Ragged:
        return Ragged(self.user_offsets, self.item)

    @cached_property
    def clicks(self) -> Ragged:
        """Item row → sorted times of its positives."""
        return times_by_row(self.item, self.time, self.n_items)

    def past(self, users: np.ndarray, times: np.ndarray | None) -> np.ndarray:
        """(Q,) how many events of each user lie strictly before each time; all without times."""
        if times is None:
            return np.diff(self.user_offsets)[users]
        return count_before(Ragged(self.user_offsets, self.time), users, times)

    def histories(
        self, users: np.ndarray, times: np.ndarray | None = None, last: int | None = None
    ) -> Ragged:
        """Item rows of each user strictly before each time, oldest first.

        Args:
            users: (Q,) user rows.
            times: (Q,) moments; None: everything known.
            last: keep only so many of the newest; None: all.
        """
        return gather(self.item, *self._span(users, times, last))

    def _span(
        self, users: np.ndarray, times: np.ndarray | None, last: int | None
    ) -> tuple[np.ndarray, np.ndarray]:
        start = np.asarray(self.user_offsets)[users]
        end = start + self.past(users, times)
        return start if last is None else np.maximum(start, end - last), end

    def beside_histories(
        self,
        users: np.ndarray,
        times: np.ndarray | None = None,
        last: int | None = None,
        as_of: int | None = None,
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """What else is known of the entries that `histories` gives.

        Args:
            users, times, last: as there.
            moment: when it is asked, where there are no times: the cut-off.

        Returns:
            (H,) float64 seconds from each entry to its query, None without a clock or a moment;
            (H,) event_weight of each entry, None where all are alike.
        """
        start, end = self._span(users, times, last)
        elapsed = None
        if self.timed and (times is not None or as_of is not None):
            asked = np.full(len(start), as_of) if times is None else times
            elapsed = elapsed_of(gather(self.time, start, end), asked)
        event_weight = (
            None if self.event_weight is None else gather(self.event_weight, start, end).values
        )
        return elapsed, event_weight

    def alive(self, as_of: int | None) -> np.ndarray:
        """(N,) bool, the items that exist at the moment; row 0 never does."""
        if as_of is None or not self.timed:
            alive = np.ones(self.n_items, bool)
        else:
            alive = self.exists_from <= as_of
        alive[0] = False
        return alive

    def popularity(self, as_of: int | None = None, window: int | None = None) -> np.ndarray:
        """(N,) positives of each item strictly before the moment, within the window when given."""
        rows = np.arange(self.n_items)
        if as_of is None:
            return np.diff(self.clicks.offsets).astype(np.float32)
        return self._count(self.clicks, rows, as_of, window).astype(np.float32)

    def statistics(self, rows: np.ndarray, as_of: int) -> np.ndarray:
        """(R, S) float32: `STATISTICS` of the item rows, each known strictly before `moment`.

        Counts enter as log(1 + count), the age as log(1 + hours), so that no unit dominates; an
        item not seen before is of age 0. Click rates are smoothed by one click in ten shown.
        """
        age = np.maximum(as_of - np.minimum(self.first_seen[rows], as_of), 0)
        columns = [np.log1p(age / (3_600 * SECOND))]
        clicks = self._count(self.clicks, rows, as_of, None)
        columns.append(np.log1p(clicks))
        recent = self._recent(self.clicks, self._clicks_in_time, rows, as_of)
        columns.extend(np.log1p(count) for count in recent)
        if self.shown is None:
            columns.extend([np.zeros(len(rows))] * (2 * len(WINDOWS)))
        else:
            shown = self._recent(self.shown, self._shown_in_time, rows, as_of)
            columns.extend(np.log1p(count) for count in shown)
            pairs = zip(recent, shown, strict=True)
            columns.extend(np.log((clicks + 1.0) / (seen + 10.0)) for clicks, seen in pairs)
        return np.stack(columns, axis=1).astype(np.float32)

    @cached_property
    def _clicks_in_time(self) -> tuple[np.ndarray, np.ndarray]:
        return _in_time(self.clicks)

    @cached_property
    def _shown_in_time(self) -> tuple[np.ndarray, np.ndarray]:
        return _in_time(self.shown if self.shown is not None else Ragged.empty(self.n_items))

    def _recent(
        self,
        times: Ragged,
        in_time: tuple[np.ndarray, np.ndarray],
        rows: np.ndarray,
        as_of: int,
    ) -> list[np.ndarray]:
        """(R,) of each window: how often it happened to each row in the window before the moment.

        One moment for all rows: counting what happened in a short window is much quicker than a
        search for each row; a search wins where the window holds far more than is asked for.
        """
        when, what = in_time
        end, counts = int(np.searchsorted(when, as_of)), []
        for window in WINDOWS.values():
            start = int(np.searchsorted(when, as_of - window))
            if end - start > SEARCH_COST * len(rows):
                counts.append(self._count(times, rows, as_of, window))
            else:
                counts.append(np.bincount(what[start:end], minlength=self.n_items)[rows])
        return counts

    @staticmethod
    def _count(times: Ragged, rows: np.ndarray, as_of: int, window: int | None) -> np.ndarray:
        before = count_before(times, rows, np.full(len(rows), as_of, np.int64))
        if window is None:
            return before
        return before - count_before(times, rows, np.full(len(rows), as_of - window, np.int64))

    def select(self, keep: np.ndarray) -> Timeline:
        """Only the events for which `keep` (E,) is true; impressions and births stay."""
        kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
        return replace(
            self,
            user_offsets=kept[np.asarray(self.user_offsets)],
            item=np.asarray(self.item)[keep],
            time=np.asarray(self.time)[keep],
            event_weight=None if self.event_weight is None else np.asarray(self.event_weight)[keep],
        )

    def extended(
        self,
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        *,
        n_users: int,
        first_seen: np.ndarray,
        exists_from: np.ndarray,
        shown_item: np.ndarray | None = None,
        shown_time: np.ndarray | None = None,
        event_weight: np.ndarray | None = None,
    ) -> Timeline:
        """This timeline and later events in one; both may know new users and new items.

        Weights of later events count where those of this timeline differ among each other.
        """
        if self.event_weight is not None:
            later = np.full(len(item), np.nan) if event_weight is None else event_weight
            event_weight = np.concatenate([self.event_weight, later]).astype(np.float32)
        else:
            event_weight = None
        old_shown = self.shown if self.shown is not None else Ragged.empty(self.n_items)
        if shown_item is not None and shown_time is not None:
            shown_item = np.concatenate([old_shown.row_of(), shown_item])
            shown_time = np.concatenate([old_shown.values, shown_time])
        elif self.shown is not None:
            shown_item, shown_time = old_shown.row_of(), old_shown.values
        return Timeline.build(
            np.concatenate([self.user, user]),
            np.concatenate([self.item, item]),
            np.concatenate([self.time, time]),
            n_users=n_users,
            first_seen=first_seen,
            exists_from=exists_from,
            shown_item=shown_item,
            shown_time=shown_time,
            timed=self.timed,
            event_weight=event_weight,
        )


def elapsed_of(history: Ragged, as_of_times: np.ndarray) -> np.ndarray:
    """(H,) float64 seconds from each of the ragged times (µs) to the moment (Q,) of its query.

    Not float32, which cannot tell the seconds of last year from each other.
    """
    return (np.asarray(as_of_times, np.int64)[history.row_of()] - history.values) / SECOND


def times_by_row(rows: np.ndarray, times: np.ndarray, n_rows: int) -> Ragged:
    """Row → its times, sorted."""
    order = np.lexsort((times, rows))
    offsets = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=offsets[1:])
    return Ragged(offsets, np.asarray(times, np.int64)[order])


def _in_time(times: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """All times in order, and the row of each."""
    order = np.argsort(times.values, kind="stable")
    return times.values[order], times.row_of()[order]


def statistic_scale(
    timeline: Timeline, as_of_times: Sequence[int], rows_each: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each statistic at the moments, (S,) each.

    Half of the items are those chosen around each moment, half any that are alive: of all that
    are alive hardly any is looked at, and what is would lie many deviations out and be clipped.
    """
    seen = []
    when, what = timeline._clicks_in_time
    for as_of in as_of_times:
        alive = np.flatnonzero(timeline.alive(as_of))
        if len(alive):
            rows = rng.choice(alive, size=min(rows_each, len(alive)), replace=False)
            seen.append(timeline.statistics(rows, as_of))
            first = int(np.searchsorted(when, as_of)) - len(rows) // 2
            chosen = what[max(0, first) : max(0, first) + len(rows)]
            seen.append(timeline.statistics(chosen, as_of))
    if not seen:
        return np.zeros(len(STATISTICS), np.float32), np.ones(len(STATISTICS), np.float32)
    all_seen = np.concatenate(seen)
    deviation = all_seen.std(0)
    return all_seen.mean(0), np.where(deviation > 1e-6, deviation, 1.0).astype(np.float32)
