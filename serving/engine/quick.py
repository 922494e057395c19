"""Similar items straight from the table of neighbours: the most frequent question, as bytes.

Legend: n index positions, K neighbours of each, k answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import orjson

from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.snapshot import CatalogSnapshot
from recsys.serving.neighbours import Neighbours, likeness

MAX_FORMATS = 1024


@lru_cache(MAX_FORMATS)
def _format(k: int) -> bytes:
    return b",".join([b'{"id":%b,"score":%.6f}'] * k)


def written(fragments: Sequence[bytes], scores: Sequence[float]) -> bytes:
    """Answers as JSON without brackets, from the JSON strings of their ids."""
    values: list[bytes | float] = [0.0] * (2 * len(fragments))
    values[::2] = fragments
    values[1::2] = scores
    return _format(len(fragments)) % tuple(values)  # one format for all, filled in one go


class Quick:
    """Similar items straight from the table of neighbours, as JSON.

    Args:
        served: the model.
        neighbours: its table.
    """

    def __init__(self, served: LoadedModel, neighbours: Neighbours) -> None:
        self._served = served
        self._tables = tuple(
            (table.rows.shape[1], table.rows.reshape(-1).data, table.scores.reshape(-1).data, table)
            for table in (neighbours.first, neighbours)  # the narrow one is nearly always enough
            if table is not None
        )
        self._narrow, self.width = self._tables[0][0], neighbours.rows.shape[1]
        self._row_of, self._fragments = served.row_of, served.ids.fragments
        self._position = served.position.data
        rows = served.bundle.rows
        self._vectors = served.bundle.vectors
        self._biased = served.bundle.model.rules.score == "cosine_bias"
        # Rows of positions; where all are indexed in order, that is an addition.
        whole = len(rows) > 0 and rows[0] == 1 and rows[-1] == len(rows)
        self._rows = None if whole else rows

    def similar(self, id: str, k: int, stock: CatalogSnapshot) -> bytes | None:
        """See `Engine.similar_fast`."""
        if not 0 < k <= self.width:
            return None
        row = self._row_of(id)
        position = self._position[row]  # row 0 has none
        if position < 0:
            return None
        mask = stock.open.mask
        if mask is None and row not in stock.view.hidden:
            width, flat, flat_scores, _ = self._tables[0 if k <= self._narrow else -1]
            start = position * width
            places = flat[start : start + k].tolist()
            if places[-1] < 0:  # the catalogue is smaller than that
                return None
            # Plain numbers from here on: arrays cost more than ten of them.
            scores = flat_scores[start : start + k].tolist()
            if not stock.extra_open or self._none_better(row, scores[-1], stock):
                if self._rows is None:
                    rows = [place + 1 for place in places]
                else:
                    rows = self._rows[places].tolist()
                return written(self._fragments(rows), scores)
        if row in stock.view.hidden:
            return None
        for _, _, _, table in self._tables:
            near, score = table.rows[position], table.scores[position]
            kept = near >= 0 if mask is None else (near >= 0) & mask[near]
            near, score = near[kept][:k], score[kept][:k]
            if len(near) == k:
                return self._with_extra(position, near, score, k, stock)
        return None  # too much of the table is closed

    def _none_better(self, row: int, last: float, stock: CatalogSnapshot) -> bool:
        """Whether nothing that came since scores above the last answer of the table."""
        query = self._vectors[row]
        if self._biased:
            query = likeness(query[None], "cosine_bias")[0]
        return bool((stock.extra @ query).max() <= last)

    def _with_extra(
        self, position: int, places: np.ndarray, scores: np.ndarray, k: int, stock: CatalogSnapshot
    ) -> bytes:
        """The answers from the table, and live items or late rows that score better."""
        bundle = self._served.bundle
        query = likeness(bundle.vectors[bundle.rows[position]][None], bundle.model.rules.score)[0]
        product = stock.extra @ query
        better = np.flatnonzero((product > scores[-1]) & stock.open.extra)
        if len(better):
            places = np.concatenate([places, better + stock.n])
            scores = np.concatenate([scores, product[better]])
            order = np.argsort(-scores, kind="stable")[:k]
            places, scores = places[order], scores[order]
        if not len(better) or places.max() < stock.n:
            fragments = self._fragments(bundle.rows[places].tolist())
        else:
            fragments = [orjson.dumps(id) for id in stock.ids_of(places)]
        return written(fragments, scores.tolist())


__all__ = ["Quick", "written"]
