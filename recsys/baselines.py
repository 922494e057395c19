"""Baselines: their protocol, and popularity in its kinds.

Legend: Q queries, N item rows (row 0: nothing known), k answers, T items to score.
All speak one protocol: a history of item rows in, the best rows or the scores of given rows out.
Row 0 and rows below it are ignored in a history, never answered, and score -inf.
Equal scores are answered by the smaller row, as `recsys.search` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np

from recsys.errors import QueryError
from recsys.ragged import Ragged


class Baseline(ABC):
    """Something that answers a history without learning."""

    n_items: int

    def search(
        self,
        history: Ragged,
        k: int,
        *,
        allowed: np.ndarray | None = None,
        exclude: Ragged | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best rows for each history, as `recsys.search.Index.search` answers them.

        Args:
            history: Q rows of item rows, oldest first.
            k: answers wanted.
            allowed: (N,) bool, rows that may be answered.
            exclude: Q rows of item rows never to answer that query with.

        Returns:
            rows (Q, k) int64 padded with -1, scores (Q, k) float32 padded with -inf.

        Raises:
            QueryError: `k` below 1.
        """
        if k < 1:
            raise QueryError(f"k is {k}; ask for at least 1.")
        allowed = np.ones(self.n_items, bool) if allowed is None else allowed.copy()
        allowed[:1] = False
        exclude = Ragged.empty(len(history)) if exclude is None else exclude
        return self._search(history, k, allowed, exclude)

    @abstractmethod
    def _search(
        self, history: Ragged, k: int, allowed: np.ndarray, exclude: Ragged
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, with everything given and row 0 not allowed."""

    @abstractmethod
    def score(self, history: Ragged, items: Ragged) -> np.ndarray:
        """Scores of the given items, comparable within a query.

        Args:
            history: Q rows of item rows, oldest first.
            items: Q rows of item rows.

        Returns:
            (T,) float32 beside `items.values`; -inf for rows of 0 or less.
        """


class Popularity(Baseline):
    """Everybody gets the items of the highest number: all-time clicks, recent clicks, newest.

    Args:
        item_scores: (N,) any number an item, compared as float32; -inf is never answered.
    """

    def __init__(self, item_scores: np.ndarray) -> None:
        self.scores = np.array(item_scores, np.float32)
        if np.isnan(self.scores).any():
            raise QueryError(f"The score of item row {int(np.isnan(self.scores).argmax())} is NaN.")
        self.scores[:1] = -np.inf
        self.n_items = len(self.scores)

    @cached_property
    def order(self) -> np.ndarray:
        """(m,) rows that may be answered at all, best first, equals by the smaller."""
        rows = np.flatnonzero(np.isfinite(self.scores))
        return rows[np.argsort(-self.scores[rows], kind="stable")]

    def _search(
        self, history: Ragged, k: int, allowed: np.ndarray, exclude: Ragged
    ) -> tuple[np.ndarray, np.ndarray]:
        return self.best(len(history), k, allowed, exclude.row_of(), exclude.values)

    def best(
        self, queries: int, k: int, allowed: np.ndarray, query: np.ndarray, row: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `search`, with the pairs (query, row) never to answer with.

        There is one order of the items for all, so answer j of a query is item j plus the number
        of its excluded items before that: with excluded places p_0 < p_1 < … these are the i with
        p_i − i ≤ j. A count over (query, p_i − i) therefore gives all answers at once.
        """
        order = self.order[allowed[self.order]]
        place = np.full(len(self.scores), -1, np.int64)
        place[order] = np.arange(len(order))
        out = place[np.maximum(row, 0)]
        key = np.unique(query[out >= 0] * (len(order) + 1) + out[out >= 0])
        who, p = np.divmod(key, len(order) + 1)
        each = np.bincount(who, minlength=queries)
        before = p - (np.arange(len(who)) - np.repeat(np.cumsum(each) - each, each))
        near = before < k
        skipped = np.bincount(who[near] * k + before[near], minlength=queries * k)
        at = np.arange(k) + np.cumsum(skipped.reshape(queries, k), axis=1)  # (Q, k)
        rows = np.concatenate([order, [-1]])[np.minimum(at, len(order))]
        return rows, np.where(rows >= 0, self.scores[rows], np.float32(-np.inf))

    def score(self, history: Ragged, items: Ragged) -> np.ndarray:
        return self.scores[np.maximum(items.values, 0)]


def newest_first(first_seen: np.ndarray) -> np.ndarray:
    """Numbers for `Popularity` that put the latest item first.

    Args:
        first_seen: (N,) int64 time of each item row; int64 max where it was never seen.

    Returns:
        (N,) float32 rank of the time (times themselves do not fit into float32); -inf where never.
        Items later than the query are for the caller to disallow.
    """
    rank = np.unique(first_seen, return_inverse=True)[1].reshape(-1).astype(np.float32)
    rank[first_seen == np.iinfo(np.int64).max] = -np.inf
    return rank
