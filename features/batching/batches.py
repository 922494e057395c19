"""Whole batches by vectorized gathers, never one example at a time.

Legend: B examples, Q queries, R distinct item rows of a batch, N of them candidates, M of them
encoded by the item tower, K queued columns, H history entries, S own negatives, E training events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from recsys.features.batching.batch import Batch, Source, UserSide, context_codes, tensor
from recsys.features.batching.distinct import Distinct
from recsys.features.batching.frequency import StreamingFrequency
from recsys.features.batching.logq import Asking, Drawn, Inclusion
from recsys.features.batching.negatives import (
    Known,
    OwnNegatives,
    UserNegatives,
    is_target,
    past_of,
    skips_of,
)
from recsys.features.batching.samplers import Plan, Share, Shuffled, Windows
from recsys.features.batching.slices import (
    Ahead,
    Asked,
    ByEvent,
    BySequence,
    ByUser,
    Part,
    Reading,
    elapsed_seconds,
    events_after,
    passed_before,
)
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged

PlanName = Literal["random", "in_time", "by_user", "ahead", "sequences"]


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

    def strength(self, events: np.ndarray) -> np.ndarray:
        """(n,) float32 strength of each of the given events."""
        if self.weight is None:
            return np.ones(len(events), np.float32)
        return np.asarray(self.weight[events], np.float32)


class Batches:
    """An epoch of batches, seeded by (seed, epoch); its place can be saved and taken up again.

    Each iteration is the next epoch, whether or not the one before was read to its end (Lightning
    stops asking after `len` batches). The first one after `load_state_dict` goes on where it was.
    `mined` may be set between two epochs and is no part of the state: who mined it keeps it. The
    time for it is `before_epoch`, which is called with the number of an epoch before its first
    batch is made, and not where an epoch goes on.

    Args:
        events: the training side.
        plan: which events form a batch.
            "random": events in any order, each with the history before it.
            "in_time": consecutive events, so that a batch has one moment for item statistics and
            its negatives are of that time.
            "by_user": whole users, every item an example, a random part of them the history.
            "ahead": whole users, asked once at a random one of their moments for what came next.
            "sequences": whole users' newest events, an example at every position (causal towers).
        batch_size: examples of a batch, or users where the plan is of whole users; the last batch
            of an epoch may be smaller. On each rank.
        max_history: newest history entries kept.
        window_span: "in_time": microseconds that a window spans at most, or None.
        history_dropout: "by_user": probability that an item is left out of its user's history.
        ahead: "ahead": examples of a user at most; share of its newest events drawn from.
        elapsed: whether history entries carry the seconds to their query.
        strength: whether history entries carry the strength of their event, where events differ.
        passed: whether queries carry what their user was shown and passed over before.
        example_age: queries carry how many events of their user come after them, up to so many; 0:
            they do not.
        half_life: microseconds after which an event counts half, back from the newest; None: never.
        negatives: "drawn": targets, uniform draws and the queue; "all": every row of
            `events.candidates` beside the targets, which needs no correction.
        uniform_negatives: candidates drawn uniformly for the whole batch, beside the targets.
        queue: what so many earlier batches of the epoch drew stands in columns of its own.
        queue_after: batches, counted from the first epoch on, before the queue is used.
        known: which other items of a user are never its negatives: "all" of the training side,
            those of the "past" of the event, or "none".
        past_weight: how many items each of the newest `max_history` items that the user had before
            counts as, as a negative of the query, whatever `known` says; 0 leaves them out.
        skip_weight: multiplies every skip's weight; 0 leaves skips out.
        skip_correction: how far skips are corrected for having been drawn by who made the list: a
            skip's weight is multiplied by (times the chosen item was shown in `SHOWN_WITHIN`
            before, plus 1) / (the same of the skip), to this power.
        given: negatives of each user from a file, or None.
        per_query: at most so many of the negatives given for a user are drawn for each query; None:
            all. Of those mined, all stand.
        counts: draw probabilities are "exact" (counted beforehand; near the batch in time, with
            "in_time") or from the "streaming" estimate, which is then part of the state.
        statistics: whether item statistics are gathered; needs "in_time".
        symmetric: whether users are to be told apart, too: `user_log_inclusion` is filled.
        seed: of everything drawn.
        rank, world: this process's equal part of every global batch; what does not divide is left
            out. Draw probabilities are those of this rank's own batch.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        events: TrainingEvents,
        *,
        plan: PlanName = "random",
        batch_size: int = 1024,
        max_history: int = 50,
        window_span: int | None = None,
        history_dropout: float = 0.2,
        ahead: tuple[int, float] = (10, 1.0),
        elapsed: bool = False,
        strength: bool = False,
        passed: bool = False,
        example_age: int = 0,
        half_life: int | None = None,
        negatives: Literal["drawn", "all"] = "drawn",
        uniform_negatives: int = 0,
        queue: int = 0,
        queue_after: int = 0,
        known: str = "all",
        past_weight: float = 0.0,
        skip_weight: float = 1.0,
        skip_correction: float = 0.0,
        given: UserNegatives | None = None,
        per_query: int | None = None,
        counts: Literal["exact", "streaming"] = "exact",
        statistics: bool = False,
        symmetric: bool = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        timeline = events.timeline
        if statistics and plan != "in_time":
            raise ValueError(f'Item statistics need the plan "in_time"; this one is "{plan}".')
        if (elapsed or half_life is not None) and not timeline.timed:
            raise ValueError("This log has no clock: leave elapsed at False and half_life at None.")
        if skip_correction and (timeline.shown is None or not timeline.timed):
            raise ValueError(
                "skip_correction counts how often items were shown, and this log has no impression "
                "lists with a clock: leave it at 0."
            )
        if passed and timeline.passed is None:
            raise ValueError("This training side does not carry what was passed over.")
        if passed and plan == "by_user":
            raise ValueError(
                'The plan "by_user" asks once for everything a user chose, and what was passed '
                "over beside it would tell it: leave passed at False, or take another plan."
            )
        if example_age and plan == "by_user":
            raise ValueError(
                'The plan "by_user" asks once for everything a user chose, and nothing comes after '
                "it: leave example_age at 0, or take another plan."
            )
        if past_weight and plan == "by_user":
            raise ValueError(
                'The plan "by_user" asks once for everything a user had, and nothing lies before '
                "it: leave past_weight at 0, or take another plan."
            )
        if events.learned is not None and plan not in ("random", "in_time"):
            raise ValueError(
                f'The plan "{plan}" takes whole users; leave `learned` out, or take "random" or '
                '"in_time".'
            )
        if negatives == "all" and (uniform_negatives or queue):
            raise ValueError(
                'With negatives="all" every item is a candidate: leave uniform_negatives and queue '
                "at 0."
            )
        self.events, self.batch_size, self.max_history = events, batch_size, max_history
        self.elapsed, self.strength, self.half_life = elapsed, strength, half_life
        self.passed, self.example_age = passed, example_age
        self.negatives, self.uniform_negatives = negatives, uniform_negatives
        self.queue, self.queue_after = queue, queue_after
        self.skip_weight, self.past_weight, self.per_query = skip_weight, past_weight, per_query
        self.skip_correction = skip_correction
        self.statistics, self.seed, self.share = statistics, seed, Share(rank, world)
        self.reading, self._plan = _planned(
            events, plan, batch_size, max_history, window_span, history_dropout, ahead, self.share
        )
        self.epoch, self.done = 0, 0
        self._going_on = False
        self.before_epoch: Callable[[int], object] | None = None
        self._known = Known(timeline, known)
        self._given = self._fitting(given)
        self._mined: UserNegatives | None = None
        self._distinct = Distinct(timeline.n_items)
        self._newest = int(np.max(timeline.time, initial=0)) if half_life is not None else 0
        self.frequency = StreamingFrequency(seed=seed) if counts == "streaming" else None
        # With every item a candidate nothing was drawn and nothing is corrected.
        self._inclusion: Inclusion | None = None
        if negatives == "drawn":
            self._inclusion = Inclusion(
                timeline, self.reading, len(events.candidates), uniform_negatives, self.frequency
            )
        self._asking = Asking(timeline, self.reading) if symmetric else None

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
        return len(self._plan)

    def state_dict(self) -> dict[str, Any]:
        """The place in the epoch, and the streaming counts where there are any."""
        state: dict[str, Any] = {"epoch": self.epoch, "done": self.done}
        if self.frequency is not None:
            state["frequency"] = self.frequency.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the place of a `state_dict`."""
        self.epoch, self.done = state["epoch"], state["done"]
        if self.frequency is not None:
            self.frequency.load_state_dict(state["frequency"])
        self._going_on = True

    def __iter__(self) -> Iterator[Batch]:
        if self.done >= len(self) or (self.done and not self._going_on):
            self.epoch, self.done = self.epoch + 1, 0
        self._going_on = False
        if self.before_epoch is not None and not self.done:
            self.before_epoch(self.epoch)
        parts = self._plan.epoch(np.random.default_rng([self.seed, self.epoch]))
        earlier = range(max(0, self.done - self.queue), self.done)
        recent = deque((self._drawn_by(parts, number) for number in earlier), self.queue)
        for number in range(self.done, len(parts)):
            old = self.epoch * len(self) + number >= self.queue_after
            part = self._sorted(parts[number])
            batch, drawn = self._make(part, self._generator(number), recent if old else ())
            recent.append(drawn)
            self.done = number + 1
            yield batch

    def _generator(self, number: int) -> np.random.Generator:
        """A batch has its own generator, so that going on in mid-epoch gives the same batches."""
        key = [self.seed, self.epoch, number]
        return np.random.default_rng([*key, self.share.rank] if self.share.rank else key)

    def _sorted(self, part: Part) -> Part:
        # Whole users stand in order of length, so that a tower can work on them in buckets.
        if not self.reading.whole_users:
            return part
        order = np.argsort(self.reading.length(part.drawn), kind="stable")
        return Part(part.drawn[order], part.around, part.moment)

    def _drawn_by(self, parts: Sequence[Part], number: int) -> Drawn:
        """What the batch of that number drew, without making it again."""
        part, rng = self._sorted(parts[number]), self._generator(number)
        uniform = self._uniform(part.moment, rng)
        asked = self.reading.ask(part.drawn, rng)
        return self._queueable(asked, uniform, len(part.drawn))

    def _queueable(self, asked: Asked, uniform: np.ndarray, draws: int) -> Drawn:
        if not self.queue:
            return Drawn(uniform[:0], 0)
        targets = self.events.timeline.item[asked.events].astype(np.int64)
        return Drawn(np.concatenate([targets, uniform]), draws)

    def _uniform(self, moment: int | None, rng: np.random.Generator) -> np.ndarray:
        if not self.uniform_negatives:
            return np.empty(0, np.int64)
        drawn = rng.choice(self.events.candidates, self.uniform_negatives).astype(np.int64)
        return self._existing(drawn, moment)

    def _existing(self, items: np.ndarray, moment: int | None) -> np.ndarray:
        if moment is None:
            return items
        return items[self.events.timeline.exists_from[items] <= moment]

    def make(self, part: Part, rng: np.random.Generator, recent: Sequence[Drawn] = ()) -> Batch:
        """The batch of a part of a plan.

        Args:
            part: events or users.
            rng: draws uniform negatives, then the histories of whole users, then own negatives.
            recent: what the batches of the queue drew.
        """
        return self._make(part, rng, recent)[0]

    def _make(
        self, part: Part, rng: np.random.Generator, recent: Sequence[Drawn]
    ) -> tuple[Batch, Drawn]:
        events, timeline, moment = self.events, self.events.timeline, part.moment
        uniform = self._uniform(moment, rng)
        asked = self.reading.ask(part.drawn, rng)
        targets = timeline.item[asked.events].astype(np.int64)
        drawn = self._queueable(asked, uniform, len(part.drawn))
        if self._inclusion is None:
            uniform = self._existing(events.candidates, moment)
        else:
            self._inclusion.learn(asked, targets, len(part.drawn))

        place = self._distinct
        candidates = place.add(targets, 0)
        if len(uniform):
            candidates = np.concatenate([candidates, place.add(uniform, len(candidates))])
        columns, queued = candidates, candidates[:0]
        if recent:
            past = np.concatenate([before.items for before in recent])
            queued = place.add(self._existing(past, moment), len(candidates))
            columns = np.concatenate([candidates, queued])
        target = place.place[targets]
        known = self._known.edges(asked, target, place.place, len(columns))
        place.forget(queued)

        own = self._own(asked, targets, moment, rng)
        alone = place.add(own.item, len(candidates))
        n_encoded = len(candidates) + len(alone)
        history = timeline.item[asked.history].astype(np.int64)
        passed = passed_before(asked, timeline) if self.passed else None
        read = history if passed is None else np.concatenate([history, passed.values])
        rows = np.concatenate([candidates, alone, place.add(read.astype(np.int64), n_encoded)])
        if passed is not None:
            passed = Ragged(passed.offsets, place.place[passed.values])
        batch = Batch(
            user=self._user_side(asked, place.place[history], passed),
            rows=tensor(rows),
            n_candidates=len(candidates),
            n_encoded=n_encoded,
            target=tensor(target),
            owner=None if asked.owner is None else tensor(asked.owner),
            queued=tensor(queued),
            log_inclusion=tensor(
                np.zeros(len(columns), np.float32)
                if self._inclusion is None
                else self._inclusion.log(columns, part, recent)
            ),
            known=tensor(known),
            own=tensor(np.stack([own.query, place.place[own.item]])),
            own_log_weight=tensor(np.log(own.weight)),
            own_source=tensor(own.source),
            weight=tensor(self._weight(asked.events)),
            usual_weight=self._usual_weight,
            statistics=tensor(
                timeline.statistics(rows, moment)
                if self.statistics and moment is not None
                else np.zeros((len(rows), 0), np.float32)
            ),
            user_log_inclusion=None
            if self._asking is None
            else tensor(self._asking.log(asked.query_users, part)),
        )
        place.forget(rows)
        return batch, drawn

    def _user_side(self, asked: Asked, history: np.ndarray, passed: Ragged | None) -> UserSide:
        events = self.events
        if events.context is not None and asked.first is None:
            # A user that asks once for all its items has no context: every code is unknown.
            context = np.zeros((len(asked.users), events.context.shape[1]), np.int64)
        else:
            context = context_codes(
                events.context, asked.users if asked.first is None else asked.first
            )
        return UserSide(
            users=tensor(asked.users),
            history=tensor(history),
            lengths=tensor(asked.lengths),
            context=tensor(context),
            at=None if asked.at is None else tensor(asked.at),
            elapsed=tensor(elapsed_seconds(asked, events.timeline)) if self.elapsed else None,
            # Where all are alike nothing is said of them, as in the queries of a timeline.
            strength=tensor(events.strength(asked.history))
            if self.strength and events.weight is not None
            else None,
            passed=None if passed is None else tensor(passed.values),
            passed_lengths=None if passed is None else tensor(passed.lengths),
            age=tensor(events_after(asked, events.timeline, self.example_age))
            if self.example_age
            else None,
        )

    @cached_property
    def _usual_weight(self) -> float | None:
        """Mean strength of what is learned from; None where all are alike."""
        if self.events.weight is None and self.half_life is None:
            return None
        learned = self.events.learned
        return float(
            self._weight(np.arange(self.events.size) if learned is None else learned).mean()
        )

    def _weight(self, chosen: np.ndarray) -> np.ndarray:
        """(B,) float32 strength of each event, less what time has taken of it."""
        weight = self.events.strength(chosen)
        if self.half_life is None:
            return weight
        age = self._newest - self.events.timeline.time[chosen]
        return (weight * np.exp2(-age / self.half_life)).astype(np.float32)

    def _own(
        self, asked: Asked, targets: np.ndarray, moment: int | None, rng: np.random.Generator
    ) -> OwnNegatives:
        """Skips of the examples' requests, what the users had, and what was mined or given."""
        found = []
        if self.past_weight:
            found.append(past_of(asked, self.events.timeline, self.max_history, self.past_weight))
        if self.events.skips is not None and self.skip_weight:
            weight = self.events.skip_weight
            assert weight is not None  # they come together
            found.append(
                skips_of(
                    asked, self.events.skips, weight, self.events.timeline,
                    strength=self.skip_weight, correction=self.skip_correction,
                )
            )  # fmt: skip
        for table, source, most in (
            (self._mined, Source.MINED, None),
            (self._given, Source.GIVEN, self.per_query),
        ):
            if table is not None:
                drawn = OwnNegatives.of(*table.draw(asked.query_users, most, rng), source)
                keep = ~self._known.holds(asked, drawn.query, drawn.item)
                if moment is not None:
                    keep &= self.events.timeline.exists_from[drawn.item] <= moment
                found.append(drawn.where(keep))
        own = OwnNegatives.joined(found)
        # An item may be passed over now and chosen as the user's next: it is no negative of itself.
        return own.where(~is_target(asked, targets, own, self.events.timeline.n_items))


def _planned(
    events: TrainingEvents,
    plan: PlanName,
    batch_size: int,
    max_history: int,
    window_span: int | None,
    history_dropout: float,
    ahead: tuple[int, float],
    share: Share,
) -> tuple[Reading, Plan]:
    """How parts are read, and how epochs are divided into them."""
    timeline = events.timeline
    if plan == "by_user":
        users = ByUser(timeline, max_history, history_dropout)
        return users, Shuffled(users.units, batch_size, share)
    if plan == "ahead":
        places = Ahead(timeline, max_history, *ahead)
        return places, Shuffled(places.units, batch_size, share)
    if plan == "sequences":
        sequences = BySequence(timeline, max_history)
        return sequences, Shuffled(sequences.units, batch_size, share)
    reading = ByEvent(timeline, max_history, events.learned)
    if plan == "in_time":
        times = np.asarray(timeline.time)
        return reading, Windows(times, batch_size, window_span, share, units=events.learned)
    if plan != "random":
        raise ValueError(f"{plan!r} is no plan; use random, in_time, by_user, ahead or sequences.")
    return reading, Shuffled(
        len(timeline.item) if events.learned is None else events.learned, batch_size, share
    )
