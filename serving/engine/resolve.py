"""Reading questions: what is asked, of which choice, by whom, and what is said of it.

Legend: K interests, D dimensions of the stored vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from recsys.errors import QueryError
from recsys.search import LARGEST
from recsys.serving.engine.filter_masks import MANY, FilterMasks, places_of
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import Cursor, question_of
from recsys.serving.engine.query import Query
from recsys.serving.engine.rerank import pool_size
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot
from recsys.serving.engine.user_inputs import UserInput, UserInputs
from recsys.serving.neighbours import likeness
from recsys.serving.recommender import NOTHING_KNOWN, unknown_items, unknown_seed, unknown_user


def paged(ask: Query) -> bool:
    """Whether a page is wanted, the first or a later one."""
    return ask.paged or ask.cursor is not None


@dataclass
class ResolvedQuery:
    """A question on its way to an answer.

    Args:
        place: in the batch.
        ask: what was asked.
        choice: what may be answered.
        exclude: places never to answer with.
        notes: what is said of it.
        asker: who asks, of recommendations that something is known for.
        text: to be encoded.
        vectors: (K, D) that ask; None: the most popular items answer.
        seeds: item rows (0: live) that others are to be like.
        cursor: the page before.
    """

    place: int
    ask: Query
    choice: AllowedItems
    exclude: np.ndarray
    notes: list[str] = field(default_factory=list)
    asker: UserInput | None = None
    text: str | None = None
    vectors: np.ndarray | None = None
    cursor: Cursor | None = None

    @cached_property
    def wanted(self) -> int:
        """Answers, or candidates for them where a dial is turned."""
        ask = self.ask
        dialled = ask.diversity > 0 or ask.popularity != 0
        return min(pool_size(ask.k) if dialled else ask.k, max(1, self.choice.total))


class Resolver:
    """From asks to questions.

    Args:
        served: the model.
        askers: who may ask.
        choices: what filters let through.
        moment: gives microseconds of now, None without a clock.
    """

    def __init__(
        self,
        served: LoadedModel,
        askers: UserInputs,
        choices: FilterMasks,
        moment: Callable[[], int | None],
    ) -> None:
        self.served, self._askers, self._choices, self._moment = served, askers, choices, moment
        self._score = served.bundle.model.rules.score

    def read(self, place: int, ask: Query, stock: CatalogSnapshot) -> ResolvedQuery:
        """A question with everything that is known of it before any model is asked."""
        _check(ask)
        question = ResolvedQuery(
            place, ask, self._choices.of(ask.filter, stock), np.empty(0, np.int64)
        )
        excluded = [question.exclude]
        if 0 < len(ask.filter.deny) <= MANY and ask.filter.allow is None:
            excluded.append(places_of(ask.filter.deny, stock))
        if ask.kind == "recommend":
            self._read_asker(question, stock)
            asker = question.asker
            if ask.drop_seen and asker is not None:
                excluded.append(stock.places_of(asker.seen, asker.seen_live))
            if asker is not None and asker.nothing:
                question.notes.append(NOTHING_KNOWN)
                question.asker = None
        elif ask.kind == "similar":
            excluded.append(self._read_seeds(question, stock))
        elif ask.kind == "search":
            if ask.text is None:
                raise QueryError("Say what to search for: a text.")
            question.text = ask.text
        else:
            question.vectors = self._checked_vector(ask)[None]
        if len(excluded) > 1:
            question.exclude = np.concatenate(excluded)
        if ask.cursor is not None:
            model = self.served.bundle.model
            question.cursor = cursor = Cursor.decode(
                ask.cursor, version=self.served.version, question=question_of(ask),
                dimension=model.vector_dimension,
            )  # fmt: skip
            # What asked for the first page asks for all: a click between two would shuffle them.
            question.asker = question.text = None
            question.vectors = cursor.vectors if len(cursor.vectors) else None
        return question

    def _read_asker(self, question: ResolvedQuery, stock: CatalogSnapshot) -> None:
        ask, askers, view = question.ask, self._askers, stock.view
        if ask.user is None and ask.history is None:
            raise QueryError("Say for whom: a user id, or a history of item ids.")
        if ask.history is None:
            assert ask.user is not None
            moment = self._moment() if self._askers.timed else None
            question.asker = askers.known(ask.user, view, ask.context, moment)
            if not askers.row_of(ask.user) and ask.user not in view.events:
                question.notes.append(unknown_user(ask.user))
            return
        if ask.user is not None and not askers.row_of(ask.user) and ask.user not in view.events:
            question.notes.append(unknown_user(ask.user))
        question.asker, unknown = askers.given(ask.history, view, ask.user, ask.context)
        if unknown:
            question.notes.append(unknown_items(unknown, len(ask.history)))

    def _read_seeds(self, question: ResolvedQuery, stock: CatalogSnapshot) -> np.ndarray:
        """Places of the seeds; the question gets their vector, or a note that there is none."""
        seeds, unknown = question.ask.items, []
        if not seeds:
            raise QueryError("Say what the answers shall be like: one item id or several.")
        vectors = []
        for id in seeds:
            vector = self._vector_of(id, stock)
            if vector is None:
                unknown.append(id)
            else:
                vectors.append(vector)
        if vectors:
            found = likeness(np.stack(vectors), self._score)
            if len(seeds) > 1:
                lengths = np.linalg.norm(found, axis=1, keepdims=True)
                found = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
                found = found.mean(axis=0, keepdims=True)
            question.vectors = np.ascontiguousarray(found, np.float32)
            if unknown:
                question.notes.append(unknown_items(unknown, len(seeds)))
        elif len(seeds) == 1:
            question.notes.append(unknown_seed(seeds[0]))
        else:
            question.notes.append(
                f"{unknown_items(unknown, len(seeds))}, so the most popular items answer"
            )
        return places_of(seeds, stock)

    def _vector_of(self, id: str, stock: CatalogSnapshot) -> np.ndarray | None:
        """Stored vector of an item, live or not, available or not; None: unknown or deleted."""
        live = stock.view.place.get(id)
        if live is not None:
            return stock.view.vectors[live]
        row = self.served.row_of(id)
        if not row or row in stock.view.hidden:
            return None
        return self.served.bundle.vectors[row]

    def _checked_vector(self, ask: Query) -> np.ndarray:
        dimension = self.served.bundle.model.vector_dimension
        if ask.vector is None:
            raise QueryError(f"Give a vector of {dimension} numbers.")
        vector = np.asarray(ask.vector, np.float32)
        if vector.shape != (dimension,):
            raise QueryError(
                f"The vector has the shape {vector.shape}, but this model's have {dimension} "
                f"numbers ({self._score})."
            )
        if not (np.abs(vector) <= LARGEST).all():  # NaN is not, either
            raise QueryError("The vector holds NaN, infinity or a number too large to multiply.")
        return vector


def _check(ask: Query) -> None:
    """Refuse what no model could answer.

    Raises:
        QueryError: a number out of its range, or options that exclude each other.
    """
    if isinstance(ask.k, bool) or not isinstance(ask.k, int) or ask.k < 1:
        raise QueryError(f"k is {ask.k!r}; ask for a whole number, at least 1.")
    if not 0 <= ask.diversity <= 1:
        raise QueryError(f"diversity is {ask.diversity}; it goes from 0 to 1.")
    if not -1 <= ask.popularity <= 1:
        raise QueryError(f"popularity is {ask.popularity}; it goes from -1 to 1.")
    if paged(ask) and (ask.diversity or ask.popularity):
        raise QueryError(
            "Diversity and popularity choose among a pool of candidates, which has no next page. "
            "Ask for more answers at once (k), or page without them."
        )


__all__ = ["ResolvedQuery", "Resolver", "paged"]
