"""Query planner: table of neighbours → graph → exact search.

The plan of a query depends on that query alone, never on those that are answered with it, so that
the same query by every door has the same items in the same order.

Legend: Q queries, n index positions, K neighbours in the table, k answers, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recsys.ragged import Ragged
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.resolve import ResolvedQuery
from recsys.serving.engine.snapshot import CatalogSnapshot

Found = tuple[np.ndarray, np.ndarray, bool]
"""Positions, scores, and whether nothing better can have been missed."""


class Planner:
    """Finds the nearest items of resolved queries.

    Args:
        model: whose table of neighbours and index are asked.
    """

    def __init__(self, model: LoadedModel) -> None:
        self.table = model.neighbours
        self._position_of_row = model.position

    def find(self, queries: Sequence[ResolvedQuery], snapshot: CatalogSnapshot) -> list[Found]:
        """The best of each query, in order.

        Args:
            queries: with a vector each.
            snapshot: what may be answered now.
        """
        found: list[Found | None] = [self._from_table(query, snapshot) for query in queries]
        groups: dict[tuple[int, bool, int], list[int]] = {}
        for number, query in enumerate(queries):
            if found[number] is None:
                key = id(query.allowed), query.query.exact, query.wanted
                groups.setdefault(key, []).append(number)
        for (_, exact, wanted), numbers in groups.items():
            group = [queries[number] for number in numbers]
            positions, scores, sure = snapshot.search(
                np.concatenate([query.vectors for query in group if query.vectors is not None]),
                wanted,
                group[0].allowed,
                _excluded(group),
                exact=exact,
            )
            for number, row, score in zip(numbers, positions, scores, strict=True):
                found[number] = *_unpadded(row, score), sure
        return [answer for answer in found if answer is not None]

    def _from_table(self, query: ResolvedQuery, snapshot: CatalogSnapshot) -> Found | None:
        """From the seed's row of the table; None: too little of the row may be answered."""
        if query.seed_row is None or query.query.exact:
            return None
        mask = query.allowed.index_mask(snapshot.n)
        # Denied items beside the seed, which is not in its own row.
        if len(query.exclude) > 1:
            mask = np.ones(snapshot.n, bool) if mask is None else mask.copy()
            mask[query.exclude[query.exclude < snapshot.n]] = False
        found = self.table_row(query.seed_row, query.wanted, mask)
        return None if found is None else (*_with_live(query, *found, snapshot), False)

    def table_row(
        self, row: int, wanted: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Positions and scores of the nearest of an item, from the table of neighbours.

        Args:
            row: of the item.
            wanted: answers.
            mask: (n,) bool, positions that may be answered; None: all.

        Returns:
            None: it is not in the table, or too little of its row may be answered.
        """
        seed = int(self._position_of_row[row])
        if self.table is None or seed < 0 or wanted > self.table.rows.shape[1]:
            return None
        table = self.table.narrowest(wanted)
        near, scores = table.rows[seed], table.scores[seed]
        if mask is None:
            near, scores = near[:wanted], scores[:wanted]
            return None if near[-1] < 0 else (near.astype(np.int64), scores)
        for one in [table] if table is self.table else [table, self.table]:
            near, scores = one.rows[seed], one.scores[seed]
            kept = (near >= 0) & mask[near]
            if np.count_nonzero(kept) >= wanted:
                return near[kept][:wanted].astype(np.int64), scores[kept][:wanted]
        return None


def _with_live(
    query: ResolvedQuery, positions: np.ndarray, scores: np.ndarray, snapshot: CatalogSnapshot
) -> tuple[np.ndarray, np.ndarray]:
    """The answers of the table, and live items or late rows that score better."""
    if not query.allowed.extra.any():
        return positions, scores
    assert query.vectors is not None  # of a seed
    product = (snapshot.extra @ query.vectors[0]).astype(np.float32)
    better = np.flatnonzero((product > scores[-1]) & query.allowed.extra)
    better = better[~np.isin(better + snapshot.n, query.exclude)]
    if not len(better):
        return positions, scores
    positions = np.concatenate([positions, better + snapshot.n])
    scores = np.concatenate([scores, product[better]])
    order = np.lexsort((positions, -scores))[: query.wanted]
    return positions[order], scores[order]


def _excluded(queries: Sequence[ResolvedQuery]) -> Ragged | None:
    lengths = [len(query.exclude) for query in queries]
    if not any(lengths):
        return None
    return Ragged(np.cumsum([0, *lengths]), np.concatenate([query.exclude for query in queries]))


def _unpadded(positions: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if positions[-1] >= 0:
        return positions, scores
    end = int(np.count_nonzero(positions >= 0))
    return positions[:end], scores[:end]


__all__ = ["Found", "Planner"]
