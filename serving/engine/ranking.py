"""The next page of a question: everything that may be answered, ranked exactly, cut once.

Legend: T places that may be answered, D dimensions of the stored vector, K interests.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from recsys.errors import QueryError
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import Cursor, cut, exact_scores, question_of
from recsys.serving.engine.popular import Popular
from recsys.serving.engine.resolve import ResolvedQuery
from recsys.serving.engine.snapshot import CatalogSnapshot

ROUNDING = 2.0**-23
"""Twice the rounding of a float32: a sum of D products is off by at most so much, times D and the
lengths of both vectors."""
AT_ONCE = 1 << 16


class Ranking:
    """Pages of one model.

    Args:
        served: the model.
        popular: what answers where nobody is known.
    """

    def __init__(self, served: LoadedModel, popular: Popular) -> None:
        self._served, self._popular = served, popular

    @cached_property
    def _longest(self) -> float:
        vectors = self._served.recommender.exact.vectors
        return max(
            (_longest(vectors[s : s + AT_ONCE]) for s in range(0, len(vectors), AT_ONCE)),
            default=0.0,
        )

    def page(
        self, question: ResolvedQuery, stock: CatalogSnapshot
    ) -> tuple[np.ndarray, np.ndarray, bool, str | None]:
        """Places and scores of the page, that it is exact, and the cursor of the next one.

        Live items that were put after the first page was given are not shown: one that changed
        would stand on two pages, or on none.
        """
        cursor, choice, vectors = question.cursor, question.choice, question.vectors
        extra = np.flatnonzero(choice.extra)
        newest = stock.newest if cursor is None else cursor.generation
        extra = extra[stock.since[extra] <= newest] + stock.n
        places = None
        if choice.given is not None or choice.count * 4 < stock.n:
            places = np.concatenate([choice.positions if choice.count else extra[:0], extra])
        if vectors is None:
            scores, slack = self._counts(places, stock), 0.0
        else:
            scores, slack = self._products(places, vectors, stock)
        if places is None:  # everything was scored
            if choice.mask is not None:
                scores[: stock.n][~choice.mask] = -np.inf
            closed = np.ones(len(stock.extra), bool)
            closed[extra - stock.n] = False
            scores[stock.n :][closed] = -np.inf
            scores[question.exclude] = -np.inf
        else:
            scores[np.isin(places, question.exclude)] = -np.inf

        def at(here: np.ndarray) -> np.ndarray:
            return here if places is None else places[here]

        def exactly(here: np.ndarray) -> np.ndarray:
            if vectors is None:
                return self._popular.counts(at(here), stock).astype(np.float64)
            return exact_scores(stock.vectors_of(at(here)), vectors)

        after = None if cursor is None else (cursor.score, stock.rank_of(cursor.key))
        found, exact, more = cut(
            scores, slack, exactly, lambda here: stock.ranks(at(here)), question.ask.k, after
        )
        found, following = at(found), None
        if more:
            asking = np.empty((0, stock.extra.shape[1]), np.float32) if vectors is None else vectors
            before = len(found) + (0 if cursor is None else cursor.before)
            following = Cursor(
                self._served.version, question_of(question.ask), newest, float(exact[-1]),
                stock.key_of(int(found[-1])), asking, before,
            ).encode()  # fmt: skip
        return found, exact.astype(np.float32), True, following

    def _counts(self, places: np.ndarray | None, stock: CatalogSnapshot) -> np.ndarray:
        every = np.arange(stock.size) if places is None else places
        return self._popular.counts(every, stock)

    def _products(
        self, places: np.ndarray | None, vectors: np.ndarray, stock: CatalogSnapshot
    ) -> tuple[np.ndarray, float]:
        """Best product of each place with any of the vectors, and how far off it may be."""
        if places is None:
            known = self._served.recommender.exact.vectors
            scores = np.empty(stock.size, np.float32)
            np.max(known @ vectors.T, axis=1, out=scores[: stock.n])
            np.max(stock.extra @ vectors.T, axis=1, out=scores[stock.n :])
        else:
            scores = np.max(stock.vectors_of(places) @ vectors.T, axis=1)
        longest = max(self._longest, _longest(stock.extra))
        slack = ROUNDING * vectors.shape[1] * longest * _longest(vectors)
        if not np.isfinite(slack):
            raise QueryError("The vector is too long to rank by; give a shorter one.")
        return scores, slack


def _longest(vectors: np.ndarray) -> float:
    if not len(vectors):
        return 0.0
    return float(np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64).max()))


__all__ = ["Ranking"]
