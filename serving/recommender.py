"""Recommender: the Python face of the query engine over one bundle.

Legend: Q queries, N item rows, D dimensions, k answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from recsys.errors import QueryError
from recsys.features.batching.batch import Queries
from recsys.ragged import Ragged
from recsys.search import ExactIndex
from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.serving.candidates import Written, candidate_frame, write_candidates
from recsys.serving.engine.engine import Engine, EngineRules, seen_rows
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.query import Answers, Kind, Query
from recsys.serving.live.overlay import Overlay
from recsys.serving.score import score_frame
from recsys.serving.user_lists import as_frame, users_of
from recsys.split import iso
from recsys.towers.encode import encode_items

if TYPE_CHECKING:
    from recsys.serving.later_events import Later

ALL_FIELDS = ("*",)


class Recommender:
    """Answers from a bundle, as of its cut-off.

    One id gives `Answers`; many at once give a Polars frame with a row an answer.

    Args:
        bundle: what is known; or a model that was made ready of it.

    Example:
        >>> from recsys import Recommender                              # doctest: +SKIP
        >>> recommender = Recommender.load("runs/demo/bundle")          # doctest: +SKIP
        >>> recommender.similar("i00042", k=5).ids                      # doctest: +SKIP
        >>> recommender.recommend(users=["u1", "u2"], k=20)             # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle | LoadedModel) -> None:
        self.model = bundle if isinstance(bundle, LoadedModel) else LoadedModel(bundle)
        self.bundle = self.model.bundle
        # No clock: what is available, and how old a history is, is as of the cut-off.
        self.engine = Engine(self.model, Overlay(self.model), rules=EngineRules(clock=None))

    @staticmethod
    def load(path: str | Path) -> Recommender:
        """Read a bundle from a folder.

        Raises:
            BundleError: it is damaged, foreign or does not match itself.
        """
        return Recommender(LoadedModel.load(path))

    def __repr__(self) -> str:
        model = self.bundle.model
        cutoff = None if self.bundle.cutoff is None else iso(self.bundle.cutoff)
        return (
            f"Recommender(version={self.model.version!r}, items={len(self.bundle.items.ids):,}, "
            f"users={len(self.bundle.users.ids):,}, dimension={model.vector_dimension}, "
            f"score={model.rules.score!r}, cutoff={cutoff!r})"
        )

    # ------------------------------------------------------------------ by ids

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        *,
        users: Iterable[str] | Any = None,
        drop_seen: bool = True,
        exact: bool = False,
    ) -> Any:
        """Items for one user, for anybody with the given history, or for many users.

        Args:
            user: external id; with `history` too, the history counts instead of the known one.
            history: external item ids, oldest first.
            k: answers wanted; more than there are gives what there is.
            users: many: ids, or a Polars or pandas frame with `user`, and for given histories
                `history` (lists) or `item` (rows in order).
            drop_seen: leave out what the user had.
            exact: search exactly.

        Returns:
            `Answers`; for `users` a frame of user, item, rank (from 1), score and fallback (why
            the most popular items answer, whose scores are counts; null otherwise).

        Raises:
            QueryError: neither user, history nor users are given, an id is no text, or k is
                below 1.
        """
        if users is not None:
            if user is not None or history is not None:
                raise QueryError("Give one user, one history, or `users`, not several of them.")
            people = users_of(users, self.bundle)
            return candidate_frame(self.engine, people, k, drop_seen=drop_seen, exact=exact)
        if isinstance(history, str):
            raise QueryError(f"A history is a list of item ids; {history!r} is one text.")
        return self._one(
            Query(
                "recommend",
                user=user,
                history=None if history is None else tuple(history),
                k=k,
                drop_seen=drop_seen,
                exact=exact,
                fields=ALL_FIELDS,
            )
        )

    def similar(
        self,
        item: str | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        items: Iterable[str] | None = None,
        exact: bool = False,
    ) -> Any:
        """Items nearest to an item, to any text through the item tower, or to each of many items.

        Args:
            item: external id.
            text: free text; an item with this text, new and otherwise unknown.
            k: answers wanted.
            items: many ids.
            exact: search exactly.

        Returns:
            `Answers`; for `items` a frame of seed, item, rank, score and fallback.

        Raises:
            QueryError: not one of item, text and items is given, an id is no text, or the bundle
                has no text encoder for a text.
        """
        if (item is not None) + (text is not None) + (items is not None) != 1:
            raise QueryError("Give either an item id or a text to find similar items to.")
        if items is not None:
            return self._many("seed", _ids(items, "items"), "similar", k, exact)
        if text is not None:
            return self.search(text, k, exact=exact)
        return self._one(
            Query("similar", items=(item,), k=k, exact=exact, fields=ALL_FIELDS)  # type: ignore[arg-type]
        )

    def search(
        self,
        text: str | None = None,
        k: int = 10,
        *,
        texts: Iterable[str] | None = None,
        exact: bool = False,
    ) -> Any:
        """Items by a text, or by each of many texts.

        Returns:
            `Answers`; for `texts` a frame of text, item, rank, score and fallback.

        Raises:
            QueryError: not one of text and texts is given, or the bundle has no text encoder.
        """
        if (text is None) == (texts is None):
            raise QueryError("Give either one text or `texts` to search for.")
        if texts is not None:
            return self._many("text", _ids(texts, "texts"), "search", k, exact)
        return self._one(Query("search", text=text, k=k, exact=exact, fields=ALL_FIELDS))

    def score(self, pairs: Any, *, log: Later | None = None) -> pl.DataFrame:
        """Scores of (user or history, item) pairs: the frame with a column `score`.

        Args:
            pairs: Polars or pandas frame, or a file, see `recsys.serving.score.score_frame`.
            log: later events that may be known, each strictly before its pair.
        """
        return score_frame(self, as_frame(pairs), str(pairs)[:80], log=log)[0]

    def candidates(self, out: str | Path, *, k: int = 100, **options: Any) -> Written:
        """Write the best k items of many users, see `recsys.serving.candidates`."""
        return write_candidates(self, out, k=k, **options)

    def evaluate(self, log: Any = None, **options: Any) -> dict[str, Any]:
        """The scorecard of this bundle on a later log, or on its own test side.

        Args:
            log: files or a frame of the form that the bundle was trained on.
            options: as `recsys.evaluate` takes them.
        """
        import recsys

        card: dict[str, Any] = recsys.evaluate(self, log, **options)
        return card

    def _one(self, query: Query) -> Answers:
        (answers,) = self.engine.answer([query])
        if isinstance(answers, QueryError):
            raise answers
        return answers

    def _many(self, name: str, given: list[str], kind: Kind, k: int, exact: bool) -> pl.DataFrame:
        queries = [
            Query(kind, items=(one,), k=k, exact=exact)
            if kind == "similar"
            else Query(kind, text=one, k=k, exact=exact)
            for one in given
        ]
        answered = self.engine.answer(queries)
        for answers in answered:
            if isinstance(answers, QueryError):
                raise answers
        kept = [answers for answers in answered if isinstance(answers, Answers)]
        lengths = [len(answers.ids) for answers in kept]
        return pl.DataFrame(
            {
                name: pl.Series(np.repeat(np.array(given, object), lengths), dtype=pl.String),
                "item": pl.Series([id for one in kept for id in one.ids], dtype=pl.String),
                "rank": pl.Series([r for n in lengths for r in range(1, n + 1)], dtype=pl.Int32),
                "score": np.concatenate([np.empty(0, np.float32), *(one.scores for one in kept)]),
                "fallback": pl.Series(
                    [one.fallback for one in kept for _ in one.ids], dtype=pl.String
                ),
            }
        )

    # ------------------------------------------------------------------ by rows

    def queries(
        self,
        users: np.ndarray,
        times: np.ndarray | None = None,
        context: np.ndarray | None = None,
    ) -> Queries:
        """Queries of known user rows with what each had before its time."""
        return self.engine.inputs.queries(users, times, context)

    def recommend_rows(
        self, queries: Queries, k: int, **options: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Engine.recommend_rows`."""
        return self.engine.recommend_rows(queries, k, **options)

    def score_rows(self, queries: Queries, items: Ragged) -> np.ndarray:
        """See `Engine.score_rows`."""
        return self.engine.score_rows(queries, items)

    @property
    def allowed(self) -> np.ndarray:
        """(N,) bool, the item rows that may be answered: they exist and are available."""
        return self.model.position >= 0

    def seen(self, queries: Queries) -> Ragged:
        """Q ragged item rows that each user had before, however far back."""
        return seen_rows(self.bundle.timeline, queries)

    def as_of(self, as_of: int | None) -> Recommender:
        """This recommender as it would have stood at the moment.

        Which items exist is as of then and, where the towers read item statistics, vectors are
        made from the statistics strictly before it.
        """
        bundle = self.bundle
        rows = np.flatnonzero(bundles.answerable(bundle, as_of))
        vectors = bundle.vectors
        if bundle.model.uses_statistics:
            everything = np.arange(bundle.items.size)
            vectors = encode_items(bundle.model, everything, bundle.timeline, as_of)
        exact = ExactIndex(np.ascontiguousarray(vectors[rows]))
        moved = replace(bundle, vectors=vectors, rows=rows, index=exact)
        return Recommender(LoadedModel(moved, as_of=as_of))


def _ids(values: Iterable[str], name: str) -> list[str]:
    if isinstance(values, str):
        raise QueryError(f"`{name}` are many; {values!r} is one. Give it without the s, or a list.")
    listed = list(values)
    for one in listed:
        if not isinstance(one, str):
            raise QueryError(f"{one!r} among `{name}` is a {type(one).__name__}, and ids are text.")
    return listed


__all__ = ["Answers", "Recommender"]
