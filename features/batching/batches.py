"""Training batches by vectorised gathers.

Legend: B examples, Q queries, R distinct item rows of a batch, N of them candidates, M of them
encoded by the item tower, K queued columns, H history entries, S per-query negatives, E
training events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from recsys.features.batching.batch import Batch, Source, UserSide, context_codes, tensor
from recsys.features.batching.logq import Inclusion, QueryFrequency, Sampled
from recsys.features.batching.negatives import (
    Distinct,
    PerQueryNegatives,
    PositiveMask,
    UserNegatives,
    is_target,
    skips_of,
)
from recsys.features.batching.samplers import (
    BatchQueries,
    BatchSlice,
    EventQueries,
    QueryKind,
    Sampler,
    SequenceQueries,
    Share,
    Shuffled,
    UserQueries,
    Windows,
    elapsed_seconds,
    events_after,
)
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged

SamplerName = Literal["random", "in_time", "by_user", "sequences"]


@dataclass(frozen=True)
class TrainingEvents:
    """The training side, ready to be gathered from.

    Args:
        timeline: the training positives only.
        weight: (E,) event weight of each, or None for all 1.
        skips: E ragged skipped item rows, or None.
        skip_weight: weight of each value of `skips`.
        context: (E, C) codes, or None.
        candidates: (n,) item rows that uniform negatives are drawn from.
        learned: (L,) events that stand as examples, the others are history only; None: all.
    """

    timeline: Timeline
    weight: np.ndarray | None
    skips: Ragged | None
    skip_weight: np.ndarray | None
    context: np.ndarray | None
    candidates: np.ndarray
    learned: np.ndarray | None = None

    @property
    def size(self) -> int:
        """Events that stand as examples."""
        return len(self.timeline.item) if self.learned is None else len(self.learned)

    def weights(self, events: np.ndarray) -> np.ndarray:
        """(n,) float32 weight of each of the given events."""
        if self.weight is None:
            return np.ones(len(events), np.float32)
        return np.asarray(self.weight[events], np.float32)


class Batches:
    """An epoch of batches, seeded by (seed, epoch); its position can be saved and taken up again.

    Each iteration is the next epoch, whether or not the one before was read to its end (Lightning
    stops asking after `len` batches). The first one after `load_state_dict` goes on where it was.
    `mined` may be set between two epochs and is no part of the state: who mined it keeps it. The
    time for it is `before_epoch`, which is called with the number of an epoch before its first
    batch is made, and not where an epoch goes on.

    Args:
        events: the training side.
        sampler: which events form a batch.
            "random": events in any order, each with the history before it.
            "in_time": consecutive events, so that a batch has one time for item statistics and
            its negatives are of that time.
            "by_user": whole users, every item an example, a random part of them the history.
            "sequences": whole users' newest events, an example at every position (causal towers).
        batch_size: examples of a batch, or users where the sampler is of whole users; the last
            batch of an epoch may be smaller. On each rank.
        max_history: newest history entries kept.
        history_dropout: "by_user": probability that an item is left out of its user's history.
        elapsed: whether history entries carry the seconds to their query.
        event_weight: whether history entries carry the weight of their event, where events differ.
        example_age: queries carry how many events of their user come after them, up to so many; 0:
            they do not.
        negatives: "sampled": targets, uniform samples and the queue; "all": every row of
            `events.candidates` beside the targets, which needs no correction.
        uniform_negatives: candidates sampled uniformly for the whole batch, beside the targets.
        queue: what so many earlier batches of the epoch sampled stands in columns of its own.
        queue_after: batches, counted from the first epoch on, before the queue is used.
        skips: whether skips stand among the per-query negatives.
        user_negatives: negatives of each user from a file, or None.
        per_query: at most so many of the file's negatives of a user are drawn for each query; None:
            all. Of those mined, all stand.
        statistics: whether item statistics are gathered; needs "in_time".
        symmetric: whether users are to be told apart, too: `user_log_inclusion` is filled.
        seed: of everything sampled.
        rank, world: this process's equal part of every global batch; what does not divide is left
            out. Sampling probabilities are those of this rank's own batch.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        events: TrainingEvents,
        *,
        sampler: SamplerName = "random",
        batch_size: int = 1024,
        max_history: int = 50,
        history_dropout: float = 0.2,
        elapsed: bool = False,
        event_weight: bool = False,
        example_age: int = 0,
        negatives: Literal["sampled", "all"] = "sampled",
        uniform_negatives: int = 0,
        queue: int = 0,
        queue_after: int = 0,
        skips: bool = True,
        user_negatives: UserNegatives | None = None,
        per_query: int | None = None,
        statistics: bool = False,
        symmetric: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        timeline = events.timeline
        if statistics and sampler != "in_time":
            raise ValueError(f'Item statistics need the sampler "in_time"; this is "{sampler}".')
        if elapsed and not timeline.timed:
            raise ValueError("This log has no clock: leave elapsed at False.")
        if example_age and sampler == "by_user":
            raise ValueError(
                'The sampler "by_user" asks once for everything a user chose, and nothing comes '
                "after it: leave example_age at 0, or take another sampler."
            )
        if events.learned is not None and sampler not in ("random", "in_time"):
            raise ValueError(
                f'The sampler "{sampler}" takes whole users; leave `learned` out, or take "random" '
                'or "in_time".'
            )
        if negatives == "all" and (uniform_negatives or queue):
            raise ValueError(
                'With negatives="all" every item is a candidate: leave uniform_negatives and queue '
                "at 0."
            )
        self.events, self.batch_size, self.max_history = events, batch_size, max_history
        self.elapsed, self.event_weight, self.example_age = elapsed, event_weight, example_age
        self.negatives, self.uniform_negatives = negatives, uniform_negatives
        self.queue, self.queue_after = queue, queue_after
        self.skips, self.per_query = skips, per_query
        self.statistics, self.seed, self.share = statistics, seed, Share(rank, world)
        self.query_kind, self._sampler = _sampled(
            events, sampler, batch_size, max_history, history_dropout, self.share
        )
        self.epoch, self.done = 0, 0
        self._going_on = False
        self.before_epoch: Callable[[int], object] | None = None
        self._positive_mask = PositiveMask(timeline)
        self._user_negatives = self._fitting(user_negatives)
        self._mined: UserNegatives | None = None
        self._distinct = Distinct(timeline.n_items)
        # With every item a candidate nothing was sampled and nothing is corrected.
        self._inclusion: Inclusion | None = None
        if negatives == "sampled":
            self._inclusion = Inclusion(
                timeline, self.query_kind, len(events.candidates), uniform_negatives
            )
        self._query_frequency = QueryFrequency(timeline, self.query_kind) if symmetric else None

    @property
    def mined(self) -> UserNegatives | None:
        """Negatives of each user from the model as it was; None: none yet."""
        return self._mined

    @mined.setter
    def mined(self, mined: UserNegatives | None) -> None:
        self._mined = self._fitting(mined)

    def _fitting(self, table: UserNegatives | None) -> UserNegatives | None:
        if table is not None and table.n_users != self.events.timeline.n_users:
            raise ValueError(
                f"The negatives are of {table.n_users} user rows, but the training side has "
                f"{self.events.timeline.n_users}."
            )
        return table

    def __len__(self) -> int:
        return len(self._sampler)

    def state_dict(self) -> dict[str, Any]:
        """The position in the epoch."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the position of a `state_dict`."""
        self.epoch, self.done = state["epoch"], state["done"]
        self._going_on = True

    def __iter__(self) -> Iterator[Batch]:
        if self.done >= len(self) or (self.done and not self._going_on):
            self.epoch, self.done = self.epoch + 1, 0
        self._going_on = False
        if self.before_epoch is not None and not self.done:
            self.before_epoch(self.epoch)
        slices = self._sampler.epoch(np.random.default_rng([self.seed, self.epoch]))
        earlier = range(max(0, self.done - self.queue), self.done)
        recent = deque((self._sampled_by(slices, number) for number in earlier), self.queue)
        for number in range(self.done, len(slices)):
            settled = self.epoch * len(self) + number >= self.queue_after
            part = self._sorted(slices[number])
            batch, sampled = self._make(part, self._generator(number), recent if settled else ())
            recent.append(sampled)
            self.done = number + 1
            yield batch

    def _generator(self, number: int) -> np.random.Generator:
        """A batch has its own generator, so that going on in mid-epoch gives the same batches."""
        key = [self.seed, self.epoch, number]
        return np.random.default_rng([*key, self.share.rank] if self.share.rank else key)

    def _sorted(self, part: BatchSlice) -> BatchSlice:
        # Whole users stand in order of length, so that a tower can work on them in buckets.
        if not self.query_kind.whole_users:
            return part
        order = np.argsort(self.query_kind.length(part.units), kind="stable")
        return BatchSlice(part.units[order], part.nearby, part.as_of)

    def _sampled_by(self, slices: Sequence[BatchSlice], number: int) -> Sampled:
        """What the batch of that number sampled, without making it again."""
        part, rng = self._sorted(slices[number]), self._generator(number)
        uniform = self._uniform(part.as_of, rng)
        queries = self.query_kind.queries(part.units, rng)
        return self._queueable(queries, uniform, len(part.units))

    def _queueable(self, queries: BatchQueries, uniform: np.ndarray, draws: int) -> Sampled:
        if not self.queue:
            return Sampled(uniform[:0], 0)
        targets = self.events.timeline.item[queries.events].astype(np.int64)
        return Sampled(np.concatenate([targets, uniform]), draws)

    def _uniform(self, as_of: int | None, rng: np.random.Generator) -> np.ndarray:
        if not self.uniform_negatives:
            return np.empty(0, np.int64)
        sampled = rng.choice(self.events.candidates, self.uniform_negatives).astype(np.int64)
        return self._existing(sampled, as_of)

    def _existing(self, items: np.ndarray, as_of: int | None) -> np.ndarray:
        if as_of is None:
            return items
        return items[self.events.timeline.exists_from[items] <= as_of]

    def make(
        self, part: BatchSlice, rng: np.random.Generator, recent: Sequence[Sampled] = ()
    ) -> Batch:
        """The batch of a slice.

        Args:
            part: events or users.
            rng: samples uniform negatives, then the histories of whole users, then per-query
                negatives.
            recent: what the batches of the queue sampled.
        """
        return self._make(part, rng, recent)[0]

    def _make(
        self, part: BatchSlice, rng: np.random.Generator, recent: Sequence[Sampled]
    ) -> tuple[Batch, Sampled]:
        events, timeline, as_of = self.events, self.events.timeline, part.as_of
        uniform = self._uniform(as_of, rng)
        queries = self.query_kind.queries(part.units, rng)
        targets = timeline.item[queries.events].astype(np.int64)
        sampled = self._queueable(queries, uniform, len(part.units))
        if self._inclusion is None:
            uniform = self._existing(events.candidates, as_of)

        position = self._distinct
        candidates = position.add(targets, 0)
        if len(uniform):
            candidates = np.concatenate([candidates, position.add(uniform, len(candidates))])
        columns, queued = candidates, candidates[:0]
        if recent:
            past = np.concatenate([before.items for before in recent])
            queued = position.add(self._existing(past, as_of), len(candidates))
            columns = np.concatenate([candidates, queued])
        target = position.place[targets]
        mask = self._positive_mask.edges(queries, target, position.place, len(columns))
        position.forget(queued)

        per_query = self._per_query_negatives(queries, targets, as_of, rng)
        alone = position.add(per_query.item, len(candidates))
        n_encoded = len(candidates) + len(alone)
        history = timeline.item[queries.history].astype(np.int64)
        rows = np.concatenate([candidates, alone, position.add(history, n_encoded)])
        batch = Batch(
            user=self._user_side(queries, position.place[history]),
            rows=tensor(rows),
            n_candidates=len(candidates),
            n_encoded=n_encoded,
            target=tensor(target),
            owner=None if queries.owner is None else tensor(queries.owner),
            queued=tensor(queued),
            log_inclusion=tensor(
                np.zeros(len(columns), np.float32)
                if self._inclusion is None
                else self._inclusion.log(columns, part, recent)
            ),
            positive_mask=tensor(mask),
            per_query=tensor(np.stack([per_query.query, position.place[per_query.item]])),
            per_query_log_weight=tensor(np.log(per_query.weight)),
            per_query_source=tensor(per_query.source),
            weight=tensor(events.weights(queries.events)),
            mean_weight=self._mean_weight,
            statistics=tensor(
                timeline.statistics(rows, as_of)
                if self.statistics and as_of is not None
                else np.zeros((len(rows), 0), np.float32)
            ),
            user_log_inclusion=None
            if self._query_frequency is None
            else tensor(self._query_frequency.log(queries.query_users, part)),
        )
        position.forget(rows)
        return batch, sampled

    def _user_side(self, queries: BatchQueries, history: np.ndarray) -> UserSide:
        events = self.events
        if events.context is not None and queries.first is None:
            # A user that asks once for all its items has no context: every code is unknown.
            context = np.zeros((len(queries.users), events.context.shape[1]), np.int64)
        else:
            context = context_codes(
                events.context, queries.users if queries.first is None else queries.first
            )
        return UserSide(
            users=tensor(queries.users),
            history=tensor(history),
            lengths=tensor(queries.lengths),
            context=tensor(context),
            at=None if queries.at is None else tensor(queries.at),
            elapsed=tensor(elapsed_seconds(queries, events.timeline)) if self.elapsed else None,
            # Where all are alike they say nothing, as in the queries of a timeline.
            event_weight=tensor(events.weights(queries.history))
            if self.event_weight and events.weight is not None
            else None,
            age=tensor(events_after(queries, events.timeline, self.example_age))
            if self.example_age
            else None,
        )

    @cached_property
    def _mean_weight(self) -> float | None:
        """Of what is learned from; None where all weigh alike."""
        if self.events.weight is None:
            return None
        learned = self.events.learned
        return float(
            self.events.weights(np.arange(self.events.size) if learned is None else learned).mean()
        )

    def _per_query_negatives(
        self,
        queries: BatchQueries,
        targets: np.ndarray,
        as_of: int | None,
        rng: np.random.Generator,
    ) -> PerQueryNegatives:
        """Skips of the examples' requests, and what was mined or stands in the file."""
        parts = []
        if self.events.skips is not None and self.skips:
            assert self.events.skip_weight is not None  # they come together
            parts.append(skips_of(queries, self.events.skips, self.events.skip_weight))
        for table, source, most in (
            (self._mined, Source.MINED, None),
            (self._user_negatives, Source.FILE, self.per_query),
        ):
            if table is not None:
                sampled = PerQueryNegatives.of(*table.draw(queries.query_users, most, rng), source)
                keep = ~self._positive_mask.holds(queries, sampled.query, sampled.item)
                if as_of is not None:
                    keep &= self.events.timeline.exists_from[sampled.item] <= as_of
                parts.append(sampled.where(keep))
        joined = PerQueryNegatives.joined(parts)
        # An item may be skipped now and chosen as the user's next: it is no negative of itself.
        return joined.where(~is_target(queries, targets, joined, self.events.timeline.n_items))


def _sampled(
    events: TrainingEvents,
    sampler: SamplerName,
    batch_size: int,
    max_history: int,
    history_dropout: float,
    share: Share,
) -> tuple[QueryKind, Sampler]:
    """How units become queries, and how epochs are divided into slices."""
    timeline = events.timeline
    if sampler == "by_user":
        users = UserQueries(timeline, max_history, history_dropout)
        return users, Shuffled(users.units, batch_size, share)
    if sampler == "sequences":
        sequences = SequenceQueries(timeline, max_history)
        return sequences, Shuffled(sequences.units, batch_size, share)
    kind = EventQueries(timeline, max_history, events.learned)
    if sampler == "in_time":
        times = np.asarray(timeline.time)
        return kind, Windows(times, batch_size, share, units=events.learned)
    if sampler != "random":
        raise ValueError(f"{sampler!r} is no sampler; use random, in_time, by_user or sequences.")
    return kind, Shuffled(
        len(timeline.item) if events.learned is None else events.learned, batch_size, share
    )
