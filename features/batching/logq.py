"""logQ correction: inclusion probabilities of sampled negatives.

Legend: C columns of a batch, candidates and queued ones; n draws of the plan, events or whole
users; N item rows; Q queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from recsys.features.batching.samplers import BatchSlice, EventQueries, QueryKind
from recsys.features.prepared.timeline import Timeline


class Sampled(NamedTuple):
    """Items that a batch sampled: (T,) item rows, repeats and all, by so many draws of the plan."""

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
        kind: how a slice becomes examples; a draw of whole users brings in all their targets.
        pool: number of rows that uniform negatives are drawn from.
        uniform: uniform draws of each batch.
    """

    def __init__(self, timeline: Timeline, kind: QueryKind, pool: int, uniform: int) -> None:
        self.timeline, self.kind, self.pool, self.uniform = timeline, kind, pool, uniform
        self._shares = _counted(timeline, kind)

    def log(self, columns: np.ndarray, part: BatchSlice, recent: Sequence[Sampled]) -> np.ndarray:
        """(C,) float32 log probability that each column is among the sampled negatives.

        Args:
            columns: (C,) item rows.
            part: units of the batch.
            recent: what the batches of the queue drew.
        """
        near = everywhere = self._shares[columns]
        if part.nearby is not None:
            nearby = self.timeline.item[part.nearby]
            near = np.bincount(nearby, minlength=self.timeline.n_items)[columns] / len(nearby)
        absent = _log_missed(near, len(part.units) - 1)
        if recent:
            # The queue comes from everywhere in time.
            absent = absent + _log_missed(everywhere, sum(before.draws for before in recent))
        if self.uniform:
            uniform = self.uniform * (1 + len(recent))
            absent = absent + uniform * np.log1p(-1.0 / max(self.pool, 2))
        return np.log(np.maximum(-np.expm1(absent), 1e-12)).astype(np.float32)


def exact_shares(items: np.ndarray, n_items: int, draws: np.ndarray | None = None) -> np.ndarray:
    """(N,) share of all draws that bring each item in.

    Args:
        items: (T,) item rows.
        draws: (T,) draw of each; one that brings an item in twice counts once. None: each item is
            a draw of its own.
    """
    if draws is None:
        return np.bincount(items, minlength=n_items) / max(1, len(items))
    pairs = np.unique(draws * n_items + items)
    n_draws = len(np.unique(pairs // n_items))
    return np.bincount(pairs % n_items, minlength=n_items) / max(1, n_draws)


def _counted(timeline: Timeline, kind: QueryKind) -> np.ndarray:
    """(N,) probability that one draw brings each item in, over all draws of the plan."""
    items = timeline.item.astype(np.int64)
    if kind.whole_users:
        queries = kind.queries(kind.units, np.random.default_rng(0))
        users = queries.query_users[queries.query_of(np.arange(len(queries.events)))]
        return exact_shares(items[queries.events], timeline.n_items, users)
    if isinstance(kind, EventQueries) and kind.learned is not None:
        items = items[kind.learned]
    return exact_shares(items, timeline.n_items)


class QueryFrequency:
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
    over the number of users: the same for all who ask once.

    Args:
        timeline: the training side.
        kind: how a slice becomes queries.
    """

    def __init__(self, timeline: Timeline, kind: QueryKind) -> None:
        self.timeline = timeline
        if kind.whole_users:
            queries = kind.queries(kind.units, np.random.default_rng(0))
            counts = np.bincount(queries.query_users, minlength=timeline.n_users)
        else:
            counts = np.bincount(timeline.user[kind.units], minlength=timeline.n_users)
        self.share = counts / max(1, len(kind.units))

    def log(self, users: np.ndarray, part: BatchSlice) -> np.ndarray:
        """(Q,) float32 log of the expected number of queries in the other draws.

        Args:
            users: (Q,) user row of each query.
            part: units of the batch.
        """
        share = self.share
        if part.nearby is not None:
            nearby = self.timeline.user[part.nearby]
            share = np.bincount(nearby, minlength=self.timeline.n_users) / len(nearby)
        return np.log(np.maximum(share[users], 1e-12) * max(1, len(part.units) - 1)).astype(
            np.float32
        )


def _log_missed(share: np.ndarray, draws: int) -> np.ndarray:
    """Log probability that so many draws, each with probability `share`, all miss."""
    return draws * np.log1p(-np.minimum(share, 1 - 1e-9))
