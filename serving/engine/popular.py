"""Popularity fall-back: the most popular of all items that may be answered now.

Legend: n index positions, X live items and late rows, k answers.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot


class Popular:
    """Items by clicks before the cut-off, equals by position; live items have none.

    Args:
        model: whose events are counted.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model = model

    @cached_property
    def _order(self) -> np.ndarray:
        """(n,) index positions, the most popular first."""
        # By position, not by row: positions need not ascend with rows.
        counts = self._model.popularity.scores[self._model.bundle.rows]
        return np.argsort(-counts, kind="stable").astype(np.int32)

    def counts(self, places: np.ndarray, snapshot: CatalogSnapshot) -> np.ndarray:
        """(c,) float32 clicks on the items at these places."""
        rows = snapshot.rows_of(places)
        return np.where(rows > 0, self._model.popularity.scores[rows], np.float32(0))

    def best(
        self, snapshot: CatalogSnapshot, allowed: AllowedItems, exclude: np.ndarray, k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k most popular places of a allowed, and their clicks; as few as there are.

        Args:
            snapshot: what may be answered now.
            allowed: what may be answered to this question.
            exclude: places never to answer with.
            k: answers wanted.
        """
        if allowed.given is not None:
            indexed = allowed.given[~np.isin(allowed.given, exclude)]
        else:
            indexed = self._walk(allowed, exclude, k)
        extra = np.flatnonzero(allowed.extra) + snapshot.n
        places = np.concatenate([indexed, extra[~np.isin(extra, exclude)]]).astype(np.int64)
        counts = self.counts(places, snapshot)
        order = np.lexsort((places, -counts))[:k]
        return places[order], counts[order]

    def _walk(self, allowed: AllowedItems, exclude: np.ndarray, k: int) -> np.ndarray:
        """The first k of the order that may be answered; mostly found near its beginning."""
        order, step, found = self._order, 4 * k + 2 * len(exclude) + 64, []
        start = have = 0
        while start < len(order) and have < k:
            part = order[start : start + step]
            start, step = start + step, 4 * step
            if allowed.mask is not None:
                part = part[allowed.mask[part]]
            part = part[~np.isin(part, exclude)]
            found.append(part)
            have += len(part)
        return np.concatenate(found) if found else np.empty(0, np.int64)


__all__ = ["Popular"]
