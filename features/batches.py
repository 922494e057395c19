"""Whole batches by vectorized gathers, never one example at a time.

Legend: B examples, R distinct item rows of a batch, N of them candidates, M of them encoded by the
item tower (candidates first, then rows that were only skipped); the rest stand only in histories.
H history entries in all, S skip edges, E known edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from features.timeline import Timeline
from recsys.ragged import Ragged, gather


@dataclass(frozen=True)
class Queries:
    """Who asks, with which past, and when.

    Args:
        users: (Q,) user rows, 0 for unknown.
        history: Q ragged item rows, oldest first.
        times: (Q,) int64 microseconds, or None without a clock.
        context: (Q, C) codes of the context columns, or None.
    """

    users: np.ndarray
    history: Ragged
    times: np.ndarray | None = None
    context: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    def take(self, rows: np.ndarray) -> Queries:
        """The given queries, in the given order."""
        return Queries(
            self.users[rows],
            self.history.take(rows),
            None if self.times is None else self.times[rows],
            None if self.context is None else self.context[rows],
        )


@dataclass(frozen=True)
class UserSide:
    """What the user tower reads.

    Args:
        users: (B,) int64 user rows.
        history: (H,) int64 positions in the item rows beside it, oldest first.
        lengths: (B,) int64 history entries of each example.
        context: (B, C) int64 codes, C may be 0.
    """

    users: torch.Tensor
    history: torch.Tensor
    lengths: torch.Tensor
    context: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> UserSide:
        return _moved(self, device, non_blocking)


@dataclass(frozen=True)
class Batch:
    """One training step's worth.

    Args:
        user: the user side; its history points into `rows`.
        rows: (R,) int64 distinct item rows: N candidates, then rows only skipped, then the rest.
        n_candidates: N.
        n_encoded: M, candidates and skipped rows.
        target: (B,) int64 candidate that each example chose.
        log_inclusion: (N,) log probability that a candidate was drawn by another example or source.
        known: (2, E) example and candidate that the user is known to like, never the target.
        skips: (2, S) example and encoded row that was shown to this user and not chosen.
        skip_log_weight: (S,) log weight of each skip.
        weight: (B,) strength of each positive.
        statistics: (R, F) item statistics as of the batch's moment, F may be 0.
    """

    user: UserSide
    rows: torch.Tensor
    n_candidates: int
    n_encoded: int
    target: torch.Tensor
    log_inclusion: torch.Tensor
    known: torch.Tensor
    skips: torch.Tensor
    skip_log_weight: torch.Tensor
    weight: torch.Tensor
    statistics: torch.Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device; Lightning calls this."""
        return _moved(self, device, non_blocking)

    def __len__(self) -> int:
        return len(self.target)


def _moved(value: Any, device: torch.device | str, non_blocking: bool) -> Any:
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    for name, part in parts.items():
        if isinstance(part, torch.Tensor):
            parts[name] = part.to(device, non_blocking=non_blocking)
        elif isinstance(part, UserSide):
            parts[name] = _moved(part, device, non_blocking)
    return type(value)(**parts)


class Distinct:
    """Distinct rows in time linear in their number, by a scratch table of one entry an item.

    Args:
        n_rows: rows are in [0, n_rows).
    """

    def __init__(self, n_rows: int) -> None:
        self.place = np.full(n_rows, -1, np.int64)

    def add(self, rows: np.ndarray, start: int) -> np.ndarray:
        """Give places from `start` on to rows without one; return those rows, in place order."""
        new = rows[self.place[rows] < 0]
        self.place[new] = np.arange(len(new))
        new = new[self.place[new] == np.arange(len(new))]
        self.place[new] = start + np.arange(len(new))
        return new

    def forget(self, rows: np.ndarray) -> None:
        """Take the places back."""
        self.place[rows] = -1


@dataclass(frozen=True)
class TrainingEvents:
    """The training side, ready to be gathered from.

    Args:
        timeline: the training positives only.
        weight: (E,) strength of each, or None for all 1.
        skips: E ragged skipped item rows, or None.
        skip_weight: weight of each value of `skips`.
        context: (E, C) codes, or None.
        candidates: (n,) item rows that uniform negatives are drawn from.
    """

    timeline: Timeline
    weight: np.ndarray | None
    skips: Ragged | None
    skip_weight: np.ndarray | None
    context: np.ndarray | None
    candidates: np.ndarray

    @property
    def size(self) -> int:
        return len(self.timeline.item)


class Batches:
    """An epoch of batches, seeded by (seed, epoch); its place can be saved and taken up again.

    Each iteration is the next epoch, whether or not the one before was read to its end (Lightning
    stops asking after `len` batches). The first one after `load_state_dict` goes on where it was.

    Args:
        events: the training side.
        batch_size: B; the last batch of an epoch may be smaller.
        max_history: newest history entries kept.
        uniform_negatives: candidates drawn uniformly for the whole batch, beside the targets.
        known: which other items of a user are never its negatives: "all" of the training side,
            those of the "past" of the event, or "none".
        skip_weight: multiplies every skip's weight; 0 leaves skips out.
        in_time: consecutive events form a batch, so that it has one moment for item statistics
            and its negatives are of that time; otherwise examples are drawn at random.
        statistics: whether item statistics are gathered; needs `in_time`.
    """

    def __init__(
        self,
        events: TrainingEvents,
        *,
        batch_size: int = 1024,
        max_history: int = 50,
        uniform_negatives: int = 0,
        known: str = "all",
        skip_weight: float = 1.0,
        in_time: bool = False,
        statistics: bool = False,
        seed: int = 0,
    ) -> None:
        self.events, self.batch_size, self.max_history = events, batch_size, max_history
        self.uniform_negatives, self.known, self.skip_weight = uniform_negatives, known, skip_weight
        self.in_time, self.statistics, self.seed = in_time, statistics, seed
        self.epoch, self.done = 0, 0
        self._going_on = False
        timeline = events.timeline
        self._user = timeline.user.astype(np.int32)
        counts = np.bincount(timeline.item, minlength=timeline.n_items)
        self._share = counts / max(1, counts.sum())
        self._past = _strictly_before(timeline)
        self._distinct = Distinct(timeline.n_items)
        self._distinct_users = Distinct(timeline.n_users)
        self._by_time = np.argsort(timeline.time, kind="stable") if in_time else None

    def __len__(self) -> int:
        whole, rest = divmod(self.events.size, self.batch_size)
        if not self.in_time or self.events.size <= self.batch_size:
            return whole + (rest > 0)
        # The same in every epoch, as a trainer needs; the two outer windows share what the inner
        # ones leave, and of two possible numbers the one that lets the edges move further is taken.
        return whole + 1 + (2 * rest > self.batch_size)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]
        self._going_on = True

    def __iter__(self) -> Iterator[Batch]:
        if self.done >= len(self) or (self.done and not self._going_on):
            self.epoch, self.done = self.epoch + 1, 0
        self._going_on = False
        rng = np.random.default_rng([self.seed, self.epoch])
        for number, (chosen, around) in enumerate(self._plan(rng)):
            # A batch has its own generator, so that going on in mid-epoch gives the same batches.
            if number >= self.done:
                batch = self.make(
                    chosen, np.random.default_rng([self.seed, self.epoch, number]), around
                )
                self.done = number + 1
                yield batch

    def _plan(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        size, total = self.batch_size, self.events.size
        if self._by_time is None:
            order = rng.permutation(total)
            for start in range(0, total, size):
                yield order[start : start + size], None
            return
        # Where the first window ends varies, so that windows fall differently in each epoch.
        edges = np.array([0, total])
        if total > size:
            inner = len(self) - 2
            outer = total - inner * size
            first = int(rng.integers(max(1, outer - size), min(size, outer - 1), endpoint=True))
            edges = np.concatenate([[0], first + size * np.arange(inner + 1), [total]])
        for window in rng.permutation(len(edges) - 1):
            low, high = edges[window], edges[window + 1]
            yield (
                self._by_time[low:high],
                self._by_time[max(0, low - 4 * size) : high + 4 * size],
            )

    def make(
        self, chosen: np.ndarray, rng: np.random.Generator, around: np.ndarray | None = None
    ) -> Batch:
        """The batch of the given events.

        Args:
            chosen: (B,) events.
            rng: draws uniform negatives.
            around: events near in time, from which the draw probability of each candidate is
                estimated; None: the whole training side.
        """
        events, timeline = self.events, self.events.timeline
        users, targets = self._user[chosen], timeline.item[chosen].astype(np.int64)
        start = np.asarray(timeline.user_offsets)[users]
        end = start + self._past[chosen]
        history = gather(timeline.item, np.maximum(start, end - self.max_history), end)
        moment = int(timeline.time[chosen].min()) if self.in_time else None

        place = self._distinct
        candidates = place.add(targets, 0)
        pool = 0
        if self.uniform_negatives:
            drawn = rng.choice(events.candidates, self.uniform_negatives)
            pool = len(events.candidates)
            if moment is not None:
                drawn = drawn[timeline.exists_from[drawn] <= moment]
            candidates = np.concatenate([candidates, place.add(drawn, len(candidates))])
        skips, skip_weight = self._skips_of(chosen)
        skipped = place.add(skips.values, len(candidates))
        rest = place.add(history.values.astype(np.int64), len(candidates) + len(skipped))
        rows = np.concatenate([candidates, skipped, rest])

        target = place.place[targets]
        known = self._known_edges(chosen, users, target, len(candidates))
        batch = Batch(
            user=UserSide(
                users=_tensor(users.astype(np.int64)),
                history=_tensor(place.place[history.values]),
                lengths=_tensor(history.lengths),
                context=_tensor(_context(events.context, chosen)),
            ),
            rows=_tensor(rows),
            n_candidates=len(candidates),
            n_encoded=len(candidates) + len(skipped),
            target=_tensor(target),
            log_inclusion=_tensor(self._log_inclusion(candidates, len(chosen), pool, around)),
            known=_tensor(known),
            skips=_tensor(np.stack([skips.row_of(), place.place[skips.values]])),
            skip_log_weight=_tensor(np.log(skip_weight).astype(np.float32)),
            weight=_tensor(
                np.ones(len(chosen), np.float32) if events.weight is None else events.weight[chosen]
            ),
            statistics=_tensor(
                timeline.statistics(rows, moment)
                if self.statistics and moment is not None
                else np.zeros((len(rows), 0), np.float32)
            ),
        )
        place.forget(rows)
        return batch

    def _skips_of(self, chosen: np.ndarray) -> tuple[Ragged, np.ndarray]:
        skips, weight = self.events.skips, self.events.skip_weight
        if skips is None or weight is None or self.skip_weight == 0:
            return Ragged.empty(len(chosen)), np.empty(0, np.float32)
        start, end = np.asarray(skips.offsets)[chosen], np.asarray(skips.offsets)[chosen + 1]
        found = gather(skips.values, start, end)
        weights = gather(weight, start, end).values * self.skip_weight
        # An item may be passed over now and chosen as the user's next: it is no negative of itself.
        own = self.events.timeline.item[chosen][found.row_of()]
        keep = (found.values > 0) & (weights > 0) & (found.values != own)
        kept = found.where(keep)
        return Ragged(kept.offsets, kept.values.astype(np.int64)), weights[keep]

    def _known_edges(
        self, chosen: np.ndarray, users: np.ndarray, target: np.ndarray, n_candidates: int
    ) -> np.ndarray:
        """(2, E) example and candidate: items of the user other than the example's own target."""
        timeline, place = self.events.timeline, self._distinct.place
        if self.known == "none":
            return np.empty((2, 0), np.int64)
        offsets = np.asarray(timeline.user_offsets)
        if self.known == "past":
            start = offsets[users]
            items = gather(timeline.item, start, start + self._past[chosen])
            example, column = items.row_of(), place[items.values]
            keep = (column >= 0) & (column < n_candidates)
            example, column = example[keep], column[keep]
        else:
            # Once a user, not once an example: a heavy user stands in a batch many times.
            distinct = self._distinct_users.add(users.astype(np.int64), 0)
            of_example = self._distinct_users.place[users]
            self._distinct_users.forget(distinct)
            items = gather(timeline.item, offsets[distinct], offsets[distinct + 1])
            column = place[items.values]
            hits = Ragged(items.offsets, column).where((column >= 0) & (column < n_candidates))
            edges = hits.take(of_example)
            example, column = edges.row_of(), edges.values
        other = column != target[example]
        return np.stack([example[other], column[other]])

    def _log_inclusion(
        self, candidates: np.ndarray, examples: int, pool: int, around: np.ndarray | None
    ) -> np.ndarray:
        """(N,) float32 log of 1 - (1-p)^(B-1) · (1-1/pool)^M.

        The probability that another example or the uniform draw brings the candidate in: a column
        stands once however often it was drawn, so that inclusion, not the expected count, is what
        has to be divided by.
        """
        if around is None:
            share = self._share[candidates]
        else:
            near = self.events.timeline.item[around]
            counts = np.bincount(near, minlength=len(self._share))[candidates]
            share = counts / len(near)
        absent = (examples - 1) * np.log1p(-np.minimum(share, 1 - 1e-9))
        if pool:
            absent = absent + self.uniform_negatives * np.log1p(-1.0 / max(pool, 2))
        return np.log(np.maximum(-np.expm1(absent), 1e-12)).astype(np.float32)


def _strictly_before(timeline: Timeline) -> np.ndarray:
    """(E,) how many events of the same user are strictly earlier than each event."""
    time, size = np.asarray(timeline.time), len(timeline.time)
    position = np.arange(size)
    starts = np.asarray(timeline.user_offsets)[timeline.user] if size else position
    fresh = np.ones(size, bool)
    fresh[1:] = (time[1:] != time[:-1]) | (starts[1:] != starts[:-1])
    # The first event of each run of equal times, carried forward along the run.
    first = np.maximum.accumulate(np.where(fresh, position, 0))
    return (first - starts).astype(np.int32)


def _context(context: np.ndarray | None, rows: np.ndarray) -> np.ndarray:
    if context is None:
        return np.zeros((len(rows), 0), np.int64)
    return np.asarray(context[rows]).astype(np.int64)


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def query_side(queries: Queries, max_history: int) -> tuple[UserSide, np.ndarray]:
    """The user side of queries, and the (R,) item rows that its histories point into."""
    history = queries.history.last(max_history)
    rows, inverse = np.unique(history.values, return_inverse=True)
    everyone = np.arange(len(queries))
    side = UserSide(
        users=_tensor(queries.users.astype(np.int64)),
        history=_tensor(inverse.reshape(-1).astype(np.int64)),
        lengths=_tensor(history.lengths),
        context=_tensor(_context(queries.context, everyone)),
    )
    return side, rows.astype(np.int64)
