"""How likely a column of the score matrix is there at all: what drawn negatives are corrected by.

Legend: C columns of a batch, candidates and queued ones; n draws of the plan, events or whole
users; N item rows; Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recsys.features.batching.frequency import StreamingFrequency, exact_shares
from recsys.features.batching.slices import Ahead, Asked, ByEvent, Part, Reading
from recsys.features.prepared.timeline import Timeline


class Drawn(NamedTuple):
    """What a batch drew: (T,) item rows, repeats and all, by so many draws of the plan."""

    items: np.ndarray
    draws: int


class Inclusion:
    """Log probability that the draws of others, uniform draws and the queue hold an item.

    A column stands once however often it was drawn, so that the probability that it is there at
    all, not the expected count, is what has to be divided by (corrected logQ over all sources
    together; Khrylchenko et al., RecSys 2025): 1 - (1-p)^n · (1-1/pool)^m for n draws that bring
    the item in with probability p and m uniform ones. The query's own draw is none of the n.

    Args:
        timeline: the training side.
        reading: how a part becomes examples; a draw of whole users brings in all their targets.
        pool: number of rows that uniform negatives are drawn from.
        uniform: uniform draws of each batch.
        frequency: estimates p from the stream; None: counted beforehand.
    """

    def __init__(
        self,
        timeline: Timeline,
        reading: Reading,
        pool: int,
        uniform: int,
        frequency: StreamingFrequency | None,
    ) -> None:
        self.timeline, self.reading, self.pool, self.uniform = timeline, reading, pool, uniform
        self.frequency = frequency
        self._shares: np.ndarray | None = None
        if frequency is None:
            self._shares = _counted(timeline, reading)

    def learn(self, asked: Asked, targets: np.ndarray, draws: int) -> None:
        """Let the streaming estimate see what a batch drew.

        Args:
            asked: the batch.
            targets: (B,) item row of each example.
            draws: n of the batch.
        """
        if self.frequency is None:
            return
        of_example = asked.query_of(np.arange(len(targets)))
        if asked.asker is not None:
            of_example = asked.asker[of_example]
        self.frequency.update(targets, of_example, draws)

    def log(self, columns: np.ndarray, part: Part, recent: Sequence[Drawn]) -> np.ndarray:
        """(C,) float32 log probability that each column is among the drawn negatives.

        Args:
            columns: (C,) item rows.
            part: what was drawn for the batch.
            recent: what the batches of the queue drew.
        """
        near = everywhere = self._share(columns)
        if self.frequency is None and part.around is not None:
            around = self.timeline.item[part.around]
            near = np.bincount(around, minlength=self.timeline.n_items)[columns] / len(around)
        absent = _log_missed(near, len(part.drawn) - 1)
        if recent:
            # The queue comes from everywhere in time.
            absent = absent + _log_missed(everywhere, sum(before.draws for before in recent))
        if self.uniform:
            uniform = self.uniform * (1 + len(recent))
            absent = absent + uniform * np.log1p(-1.0 / max(self.pool, 2))
        return np.log(np.maximum(-np.expm1(absent), 1e-12)).astype(np.float32)

    def _share(self, columns: np.ndarray) -> np.ndarray:
        if self.frequency is not None:
            return self.frequency.share(columns)
        assert self._shares is not None  # counted at birth
        return self._shares[columns]


def _counted(timeline: Timeline, reading: Reading) -> np.ndarray:
    """(N,) probability that one draw brings each item in, over all draws of the plan."""
    items = timeline.item.astype(np.int64)
    if isinstance(reading, Ahead):
        pairs, pair = np.unique(timeline.user * timeline.n_items + items, return_inverse=True)
        # Had twice, an item is brought in at most as often as both together.
        chance = np.minimum(np.bincount(pair, reading.chances(), len(pairs)), 1.0)
        brought = np.bincount(pairs % timeline.n_items, chance, timeline.n_items)
        return brought / max(1, len(reading.units))
    if reading.whole_users:
        asked = reading.ask(reading.units, np.random.default_rng(0))
        users = asked.query_users[asked.query_of(np.arange(len(asked.events)))]
        return exact_shares(items[asked.events], timeline.n_items, users)
    if isinstance(reading, ByEvent) and reading.learned is not None:
        items = items[reading.learned]
    return exact_shares(items, timeline.n_items)


class Asking:
    """How often each user stands among the queries of a batch: what item → user is corrected by.

    From an item to users, the queries of a batch are the columns, and they are not made distinct.
    Let one draw of the plan bring in f_u queries of user u on average, over all draws. For an
    example the n-1 other draws of its batch bring in (n-1)·f_u of them. With a weight of
    1 / ((n-1)·f_u) for each, the expected sum over columns of weight · exp(logit) is the sum over
    all users, each counted once (as the mean over its queries, where they differ): users who ask
    often are not pushed away for it. That the count is expected, not a probability to be there at
    all, is because a user who stands twice is two columns. The example's own query is no draw, and
    has no correction.

    Where each draw is an event, f_u is the user's share of all events; in windows of time its share
    of the events nearby. Where it is a whole user, f_u is the number of queries that the user asks,
    over the number of users: the same for all who ask once. Users are counted beforehand, also
    where the frequency of items is estimated from the stream.

    Args:
        timeline: the training side.
        reading: how a part becomes queries.
    """

    def __init__(self, timeline: Timeline, reading: Reading) -> None:
        self.timeline = timeline
        if reading.whole_users:
            asked = reading.ask(reading.units, np.random.default_rng(0))
            queries = np.bincount(asked.query_users, minlength=timeline.n_users)
        else:
            queries = np.bincount(timeline.user[reading.units], minlength=timeline.n_users)
        self.share = queries / max(1, len(reading.units))

    def log(self, users: np.ndarray, part: Part) -> np.ndarray:
        """(Q,) float32 log of the expected number of queries in the other draws.

        Args:
            users: (Q,) user row of each query.
            part: what was drawn for the batch.
        """
        share = self.share
        if part.around is not None:
            around = self.timeline.user[part.around]
            share = np.bincount(around, minlength=self.timeline.n_users) / len(around)
        return np.log(np.maximum(share[users], 1e-12) * max(1, len(part.drawn) - 1)).astype(
            np.float32
        )


def _log_missed(share: np.ndarray, draws: int) -> np.ndarray:
    """Log probability that so many draws, each with probability `share`, all miss."""
    return draws * np.log1p(-np.minimum(share, 1 - 1e-9))
