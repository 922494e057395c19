"""The most popular items of all that may be answered now: what stands in for an unknown asker.

Legend: n index positions, X live items and late rows, k answers.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot
from recsys.serving.recommender import Recommender


class Popular:
    """Items by clicks before the cut-off, equals by position; live items have none.

    Args:
        recommender: of the model.
    """

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender

    @cached_property
    def _order(self) -> np.ndarray:
        """(n,) index positions, the most popular first."""
        # By position, not by row: positions need not ascend with rows.
        counts = self._recommender.popular.scores[self._recommender.bundle.rows]
        return np.argsort(-counts, kind="stable").astype(np.int32)

    def counts(self, places: np.ndarray, stock: CatalogSnapshot) -> np.ndarray:
        """(c,) float32 clicks on the items at these places."""
        rows = stock.rows_of(places)
        return np.where(rows > 0, self._recommender.popular.scores[rows], np.float32(0))

    def best(
        self, stock: CatalogSnapshot, choice: AllowedItems, exclude: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k most popular places of a choice, and their clicks; as few as there are.

        Args:
            stock: what may be answered now.
            choice: what may be answered to this question.
            exclude: places never to answer with.
            k: answers wanted.
        """
        if choice.given is not None:
            indexed = choice.given[~np.isin(choice.given, exclude)]
        else:
            indexed = self._walk(choice, exclude, k)
        extra = np.flatnonzero(choice.extra) + stock.n
        places = np.concatenate([indexed, extra[~np.isin(extra, exclude)]]).astype(np.int64)
        counts = self.counts(places, stock)
        order = np.lexsort((places, -counts))[:k]
        return places[order], counts[order]

    def _walk(self, choice: AllowedItems, exclude: np.ndarray, k: int) -> np.ndarray:
        """The first k of the order that may be answered; mostly found near its beginning."""
        order, step, found = self._order, 4 * k + 2 * len(exclude) + 64, []
        start = have = 0
        while start < len(order) and have < k:
            part = order[start : start + step]
            start, step = start + step, 4 * step
            if choice.mask is not None:
                part = part[choice.mask[part]]
            part = part[~np.isin(part, exclude)]
            found.append(part)
            have += len(part)
        return np.concatenate(found) if found else np.empty(0, np.int64)


__all__ = ["Popular"]
