"""Query → answers: encode, search, drop what was seen, fall back, decode.

Evaluation, batch candidates and the service all walk through here.
Legend: Q queries, N item rows, D dimensions, k answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch

from recsys.baselines import Popularity
from recsys.errors import QueryError
from recsys.features.batching.batch import Queries
from recsys.features.batching.examples import asking
from recsys.ragged import Ragged, slots
from recsys.search import ExactIndex, best_scores, search_interests
from recsys.serving import bundle as bundles
from recsys.serving.bundle import Bundle
from recsys.serving.index import HnswIndex
from recsys.serving.neighbours import likeness
from recsys.towers.encode import encode_items, encode_users
from recsys.towers.two_tower import added


@dataclass(frozen=True)
class Answers:
    """Items of one query, best first, no padding.

    Args:
        ids: external ids.
        scores: float32, larger is better.
        fields: one row an answer: what the item table says of it.
        fallback: why something else than the towers answered, or None.
    """

    ids: list[str]
    scores: np.ndarray
    fields: pl.DataFrame
    fallback: str | None = None

    def to_list(self) -> list[dict]:
        """One object an answer: item, score and the item's fields, as the command prints them."""
        return [
            # An item table may have a column of that name; the score is ours all the same.
            {"item": item, "score": 0.0} | fields | {"item": item, "score": round(float(score), 6)}
            for item, score, fields in zip(
                self.ids, self.scores, self.fields.to_dicts(), strict=True
            )
        ]


NOTHING_KNOWN = "nothing is known to recommend from, so the most popular items answer"


def unknown_user(user: str) -> str:
    """What is said of a user that the model does not know."""
    return f"user {user!r} is unknown"


def unknown_items(unknown: Sequence[str], of: int) -> str:
    """What is said of items that were left out of a question."""
    return f"{len(unknown)} of {of} items are unknown ({unknown[0]!r})"


def unknown_seed(item: str) -> str:
    """What is said where nothing can be like an item."""
    return f"item {item!r} is unknown, so the most popular items answer"


class Recommender:
    """Answers from a bundle.

    Args:
        bundle: what is known.

    Attributes:
        position: (N,) int32 index position of each item row, -1 for those not in the index.

    Example:
        >>> from recsys import Recommender                              # doctest: +SKIP
        >>> recommender = Recommender.load("runs/demo/bundle")          # doctest: +SKIP
        >>> recommender.similar(item="i00042", k=5).ids                 # doctest: +SKIP
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._moment = bundle.cutoff
        self.position = np.full(bundle.items.size, -1, np.int32)
        self.position[bundle.rows] = np.arange(len(bundle.rows), dtype=np.int32)

    @staticmethod
    def load(path: str | Path) -> Recommender:
        """Read a bundle from a folder.

        Raises:
            BundleError: it is damaged, foreign or does not match itself.
        """
        return Recommender(bundles.load(path))

    @cached_property
    def exact(self) -> ExactIndex:
        """Exact search over what the index holds, in the same memory where that can be."""
        index = self.bundle.index
        if isinstance(index, HnswIndex):
            return index.exact
        if isinstance(index, ExactIndex):
            return index
        return ExactIndex(np.ascontiguousarray(self.bundle.vectors[self.bundle.rows]))

    @cached_property
    def popular(self) -> Popularity:
        """What answers when nothing is known of who asks."""
        return Popularity(self.bundle.timeline.popularity(self._moment))

    # ------------------------------------------------------------------ many queries, by rows

    def queries(
        self,
        users: np.ndarray,
        times: np.ndarray | None = None,
        context: np.ndarray | None = None,
    ) -> Queries:
        """Queries of known user rows with what each had before its time."""
        return asking(
            self.bundle.timeline, users, times, context,
            last=self.bundle.model.rules.history.length, moment=self._moment,
        )  # fmt: skip

    def recommend_rows(
        self,
        queries: Queries,
        k: int,
        *,
        exact: bool = False,
        drop_seen: bool = True,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Best item rows of each query.

        Args:
            queries: who asks.
            k: answers wanted.
            exact: search exactly even where there is a graph index.
            drop_seen: never answer an item of the user's past, however far back.
            allowed: (N,) bool, further restriction; None: all that exist and are available.

        Returns:
            rows (Q, k) int64 padded with -1, scores (Q, k) float32 padded with -inf.
        """
        vectors = encode_users(self.bundle.model, queries, self.bundle.timeline, self._moment)
        exclude = self.seen(queries) if drop_seen else None
        return self._search(vectors, k, exact, allowed, exclude)

    def answer_rows(
        self, queries: Queries, k: int, *, exact: bool = False, drop_seen: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `recommend_rows`; the most popular items answer who nothing is known of.

        Returns:
            rows and scores, never wider than there are items; (Q,) bool, who got popular items,
            whose scores are counts.
        """
        k = self._at_most(k)
        nothing = self.nothing_known(queries)
        rows = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        some = np.flatnonzero(~nothing)
        if len(some):
            rows[some], scores[some] = self.recommend_rows(
                queries.take(some), k, exact=exact, drop_seen=drop_seen
            )
        rest = queries.take(np.flatnonzero(nothing))
        if len(rest):
            rows[nothing], scores[nothing] = self.popular.search(
                rest.history,
                k,
                allowed=self.allowed,
                exclude=self.seen(rest) if drop_seen else None,
            )
        return rows, scores, nothing

    def nothing_known(self, queries: Queries) -> np.ndarray:
        """(Q,) bool: neither a history nor a vector or features of the user."""
        known = (queries.users > 0) & (queries.users < self.told_apart)
        return ~known & (queries.history.lengths == 0)

    @cached_property
    def told_apart(self) -> int:
        """User rows from 1 up to here, not included, have a vector or features of their own."""
        model = self.bundle.model
        described = any(True for _ in model.users.named_buffers())
        return self.bundle.users.size if described else model.user_spec.ids

    def _at_most(self, k: int) -> int:
        """k, but no more than there are items: nobody needs memory for what is not there."""
        if k < 1:
            raise QueryError(f"k is {k}; ask for at least 1.")
        return min(k, max(1, len(self.bundle.rows)))

    @property
    def allowed(self) -> np.ndarray:
        """(N,) bool, the item rows that may be answered: they exist and are available."""
        return self.position >= 0

    def seen(self, queries: Queries) -> Ragged:
        """Q ragged item rows that each asker had before, however far back."""
        known = self.bundle.timeline.histories(queries.users, queries.times)
        own = queries.history
        # A history given with the query counts as seen too, beside the known one.
        if len(known.values) and len(own.values):
            offsets = known.offsets + own.offsets
            values = np.empty(offsets[-1], np.int64)
            values[slots(offsets[:-1], known.lengths)] = known.values
            values[slots(offsets[:-1] + known.lengths, own.lengths)] = own.values
            return Ragged(offsets, values)
        return known if len(known.values) else own

    def _search(
        self,
        vectors: np.ndarray,
        k: int,
        exact: bool,
        allowed: np.ndarray | None,
        exclude: Ragged | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        if not len(self.bundle.rows):  # nothing exists yet at this moment
            shape = len(vectors), k
            return np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
        if exclude is not None:
            place = self.position[exclude.values].astype(np.int64)
            exclude = Ragged(exclude.offsets, place).where(place >= 0)
        index = self.exact if exact else self.bundle.index
        found, scores = search_interests(
            index,
            vectors,
            k,
            allowed=None if allowed is None else allowed[self.bundle.rows],
            exclude=exclude,
        )
        rows = np.where(found >= 0, self.bundle.rows[np.maximum(found, 0)], -1)
        return rows, scores

    def score_rows(self, queries: Queries, items: Ragged) -> np.ndarray:
        """Scores of given item rows for each query, flat in the order of `items`, float32.

        With several interests the nearest one counts.
        """
        vectors = encode_users(self.bundle.model, queries, self.bundle.timeline, self._moment)
        out = np.empty(len(items.values), np.float32)
        query = items.row_of()
        step = max(1, (1 << 18) * vectors.shape[-1] // max(1, vectors[:1].size))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            out[part] = best_scores(vectors[query[part]], self.bundle.vectors[items.values[part]])
        return out

    def as_of(self, moment: int | None) -> Recommender:
        """This recommender as it would have stood at the moment.

        Which items exist is as of then and, where the towers read item statistics, vectors are
        made from the statistics strictly before it.
        """
        bundle = self.bundle
        rows = np.flatnonzero(bundles.answerable(bundle, moment))
        vectors = bundle.vectors
        if bundle.model.uses_statistics:
            everything = np.arange(bundle.items.size)
            vectors = encode_items(bundle.model, everything, bundle.timeline, moment)
        exact = ExactIndex(np.ascontiguousarray(vectors[rows]))
        moved = Recommender(replace(bundle, vectors=vectors, rows=rows, index=exact))
        moved._moment = moment
        return moved

    # ------------------------------------------------------------------ one query, by ids

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        k: int = 10,
        *,
        drop_seen: bool = True,
        exact: bool = False,
    ) -> Answers:
        """Items for one user, or for anybody with the given history.

        Args:
            user: external id; with `history` too, the history counts instead of the known one.
            history: external item ids, oldest first.
            k: answers wanted; more than there are gives what there is.
            drop_seen: leave out what the user had.
            exact: search exactly.

        Raises:
            QueryError: neither user nor history is given, or k is below 1.
        """
        if user is None and history is None:
            raise QueryError("Say for whom: a user id, or a history of item ids.")
        notes = []
        row = np.zeros(1, np.int64) if user is None else self.bundle.users.encode([user])
        if user is not None and not row[0]:
            notes.append(unknown_user(user))
        if history is None:
            queries = self.queries(row.astype(np.int64))
        else:
            items = self.bundle.items.encode(list(history)).astype(np.int64)
            unknown = [i for i, known in zip(history, items > 0, strict=True) if not known]
            if unknown:
                notes.append(unknown_items(unknown, len(items)))
            items = items[items > 0]
            queries = Queries(row.astype(np.int64), Ragged(np.array([0, len(items)]), items))
        rows, scores, popular = self.answer_rows(queries, k, exact=exact, drop_seen=drop_seen)
        if popular[0]:
            notes.append(NOTHING_KNOWN)
        return self._answers(rows[0], scores[0], "; ".join(notes) or None)

    def similar(
        self,
        item: str | None = None,
        text: str | None = None,
        k: int = 10,
        *,
        exact: bool = False,
    ) -> Answers:
        """Items nearest to an item, or to any text through the item tower.

        Args:
            item: external id.
            text: free text; an item with this text, new and otherwise unknown.
            k: answers wanted.
            exact: search exactly.

        Raises:
            QueryError: neither or both are given, or the bundle has no text encoder for a text.
        """
        if (item is None) == (text is None):
            raise QueryError("Give either an item id or a text to find similar items to.")
        if text is not None:
            vector, exclude = self.text_vectors([text]), None
        else:
            row = int(self.bundle.items.encode([item])[0])
            if row == 0:
                note = unknown_seed(str(item))
                rows, scores = self.popular.search(
                    Ragged.empty(1), self._at_most(k), allowed=self.allowed
                )
                return self._answers(rows[0], scores[0], note)
            vector = self.bundle.vectors[row : row + 1]
            exclude = Ragged(np.array([0, 1]), np.array([row]))
        vector = likeness(vector, self.bundle.model.rules.score)
        rows, scores = self._search(vector, self._at_most(k), exact, None, exclude)
        return self._answers(rows[0], scores[0], None)

    def text_vectors(self, texts: Sequence[str]) -> np.ndarray:
        """(Q, D) stored vectors of items with these texts, otherwise unknown.

        Raises:
            QueryError: the bundle has no text encoder, or a text is empty or none of its words is
                known.
        """
        encoder = self.bundle.encoder
        if encoder is None or not self.bundle.model.item_spec.text:
            raise QueryError(
                "This bundle was trained without item text, so a text cannot be looked up. "
                "Name text columns in [data.catalog] and train again."
            )
        if not all(text.strip() for text in texts):
            raise QueryError("The text is empty; give at least a word.")
        encoded = encoder.encode(list(texts))
        for row in np.flatnonzero(~encoded.any(1)).tolist():
            raise QueryError(
                f"No word of {texts[row]!r} is known to the text encoder; try other words."
            )
        model = self.bundle.model
        with torch.inference_mode():
            said = torch.from_numpy(np.asarray(encoded, np.float32))
            statistics = self._unknown_statistics
            if statistics is not None:
                statistics = statistics.expand(len(said), -1)
            rows = torch.zeros(len(said), dtype=torch.int64)
            embedded = model.embed_items(rows, statistics, said)
            if model.item_spec.text_neighbours:
                start = model.item_tower.inputs.start_of(said, model.items)
                embedded = added(embedded, start)
            return model.item_tower(embedded).float().numpy()

    @cached_property
    def _unknown_statistics(self) -> torch.Tensor | None:
        """(1, S) statistics of an item never seen; they cost a pass over the newest events."""
        if not self.bundle.model.uses_statistics or self._moment is None:
            return None
        nothing = np.zeros(1, np.int64)
        return torch.from_numpy(self.bundle.timeline.statistics(nothing, self._moment))

    def _answers(self, rows: np.ndarray, scores: np.ndarray, note: str | None) -> Answers:
        found = rows >= 0
        rows, scores = rows[found], scores[found]
        fields = self.bundle.catalog[rows - 1].drop("item")
        return Answers(self.bundle.items.decode(rows).to_list(), scores, fields, note)
