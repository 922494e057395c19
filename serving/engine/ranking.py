"""Exact ranking of everything that may be answered, for pages; facets of answers.

Legend: T places that may be answered, D dimensions of the stored vector.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from recsys.errors import QueryError
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import Cursor, cut, exact_scores, question_of
from recsys.serving.engine.planner import ResolvedQuery
from recsys.serving.engine.popular import Popular
from recsys.serving.engine.snapshot import CatalogSnapshot

ROUNDING = 2.0**-23
"""Twice the rounding of a float32: a sum of D products is off by at most so much, times D and the
lengths of both vectors."""
AT_ONCE = 1 << 16


class Ranking:
    """Pages of one model.

    Args:
        model: the bundle.
        popular: what answers where nobody is known.
    """

    def __init__(self, model: LoadedModel, popular: Popular) -> None:
        self._model, self._popular = model, popular

    @cached_property
    def _longest(self) -> float:
        vectors = self._model.exact.vectors
        return max(
            (_longest(vectors[s : s + AT_ONCE]) for s in range(0, len(vectors), AT_ONCE)),
            default=0.0,
        )

    def page(
        self, query: ResolvedQuery, snapshot: CatalogSnapshot
    ) -> tuple[np.ndarray, np.ndarray, bool, str | None]:
        """Places and scores of the page, that it is exact, and the cursor of the next one.

        Live items that were put after the first page was given are not shown: one that changed
        would stand on two pages, or on none.
        """
        cursor, allowed, vectors = query.cursor, query.allowed, query.vectors
        extra = np.flatnonzero(allowed.extra)
        newest = snapshot.newest if cursor is None else cursor.generation
        extra = extra[snapshot.since[extra] <= newest] + snapshot.n
        places = None
        if allowed.given is not None or allowed.count * 4 < snapshot.n:
            places = np.concatenate([allowed.positions if allowed.count else extra[:0], extra])
        if vectors is None:
            scores, slack = self._counts(places, snapshot), 0.0
        else:
            scores, slack = self._products(places, vectors, snapshot)
        if places is None:  # everything was scored
            if allowed.mask is not None:
                scores[: snapshot.n][~allowed.mask] = -np.inf
            closed = np.ones(len(snapshot.extra), bool)
            closed[extra - snapshot.n] = False
            scores[snapshot.n :][closed] = -np.inf
            scores[query.exclude] = -np.inf
        else:
            scores[np.isin(places, query.exclude)] = -np.inf

        def at(here: np.ndarray) -> np.ndarray:
            return here if places is None else places[here]

        def exactly(here: np.ndarray) -> np.ndarray:
            if vectors is None:
                return self._popular.counts(at(here), snapshot).astype(np.float64)
            return exact_scores(snapshot.vectors_of(at(here)), vectors)

        after = None if cursor is None else (cursor.score, snapshot.rank_of(cursor.key))
        found, exact, more = cut(
            scores, slack, exactly, lambda here: snapshot.ranks(at(here)), query.query.k, after
        )
        found, following = at(found), None
        if more:
            asking = (
                np.empty((0, snapshot.extra.shape[1]), np.float32) if vectors is None else vectors
            )
            before = len(found) + (0 if cursor is None else cursor.before)
            following = Cursor(
                self._model.version, question_of(query.query), newest, float(exact[-1]),
                snapshot.key_of(int(found[-1])), asking, before,
            ).encode()  # fmt: skip
        return found, exact.astype(np.float32), True, following

    def _counts(self, places: np.ndarray | None, snapshot: CatalogSnapshot) -> np.ndarray:
        every = np.arange(snapshot.size) if places is None else places
        return self._popular.counts(every, snapshot)

    def _products(
        self, places: np.ndarray | None, vectors: np.ndarray, snapshot: CatalogSnapshot
    ) -> tuple[np.ndarray, float]:
        """Product of each place with the vector, and how far off it may be."""
        if places is None:
            known = self._model.exact.vectors
            scores = np.empty(snapshot.size, np.float32)
            np.matmul(known, vectors[0], out=scores[: snapshot.n])
            np.matmul(snapshot.extra, vectors[0], out=scores[snapshot.n :])
        else:
            scores = snapshot.vectors_of(places) @ vectors[0]
        longest = max(self._longest, _longest(snapshot.extra))
        slack = ROUNDING * vectors.shape[1] * longest * _longest(vectors)
        if not np.isfinite(slack):
            raise QueryError("The vector is too long to rank by; give a shorter one.")
        return scores, slack


def _longest(vectors: np.ndarray) -> float:
    if not len(vectors):
        return 0.0
    return float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64).max()))


MOST = 100
"""A column with more distinct values is typed into, not chosen from."""


def facets(catalog: pl.DataFrame) -> dict[str, list[Any]]:
    """Columns of words with few distinct values → those, the most frequent first.

    Args:
        catalog: one row an item; `item` and `title` are never filtered by.
    """
    found = {}
    for name, kind in catalog.schema.items():
        listed = isinstance(kind, pl.List) and kind.inner == pl.String
        words = kind == pl.String or isinstance(kind, pl.Categorical | pl.Enum)
        if name in ("item", "title") or not (listed or words):
            continue
        value = pl.col(name).explode() if listed else pl.col(name)
        column = catalog.lazy().select(value.cast(pl.String).alias("value").drop_nulls())
        # An estimate is enough to pass over texts, and needs no table of a million of them.
        if column.select(pl.col("value").approx_n_unique()).collect().item() > 2 * MOST:
            continue
        counts = column.group_by("value").len().sort("len", "value", descending=[True, False])
        values = counts.collect()["value"].to_list()
        if 0 < len(values) <= MOST:
            found[name] = values
    return found
