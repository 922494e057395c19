"""Resolve queries and plan their search: table of neighbours → graph → exact.

`Resolver` makes an executable query of ids, filters and cursor; `Planner` finds its nearest items.
The plan of a query depends on that query alone, never on those that are answered with it, so that
the same query by every door has the same items in the same order.

Legend: Q queries, n index positions, K neighbours in the table, k answers, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from recsys.errors import QueryError
from recsys.ragged import Ragged
from recsys.search import LARGEST
from recsys.serving.engine.filters import MANY, FilterMasks, places_of
from recsys.serving.engine.loaded_model import LoadedModel
from recsys.serving.engine.paging import Cursor, question_of
from recsys.serving.engine.query import Query
from recsys.serving.engine.rerank import pool_size
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot
from recsys.serving.engine.user_inputs import UserInput, UserInputs

NOTHING_KNOWN = "nothing is known to recommend from, so the most popular items answer"


def unknown_user(user: str) -> str:
    """The note on a user that the model does not know."""
    return f"user {user!r} is unknown"


def unknown_items(unknown: Sequence[str], of: int) -> str:
    """The note on items that were left out of a query."""
    return f"{len(unknown)} of {of} items are unknown ({unknown[0]!r})"


def unknown_seed(item: str) -> str:
    """The note on a seed that nothing can be like."""
    return f"item {item!r} is unknown, so the most popular items answer"


def paged(query: Query) -> bool:
    """Whether a page is wanted, the first or a later one."""
    return query.paged or query.cursor is not None


@dataclass
class ResolvedQuery:
    """A query on its way to an answer.

    Args:
        number: in the batch.
        query: as it was asked.
        allowed: what may be answered.
        exclude: positions never to answer with.
        notes: fall-backs and omissions, for the answer.
        user_input: of recommendations that something is known for.
        text: to be encoded.
        vectors: (1, D) to search by; None: the most popular items answer.
        seed_row: item row of the only seed, where the bundle knows it.
        cursor: the page before.
    """

    number: int
    query: Query
    allowed: AllowedItems
    exclude: np.ndarray
    notes: list[str] = field(default_factory=list)
    user_input: UserInput | None = None
    text: str | None = None
    vectors: np.ndarray | None = None
    seed_row: int | None = None
    cursor: Cursor | None = None

    @cached_property
    def wanted(self) -> int:
        """Answers, or candidates for them where they are re-ranked."""
        query = self.query
        reranked = query.diversity > 0 or query.popularity != 0
        return min(pool_size(query.k) if reranked else query.k, max(1, self.allowed.total))


class Resolver:
    """From asks to questions.

    Args:
        model: the model.
        inputs: makes user inputs, who may query.
        masks: what filters let through.
        as_of: gives microseconds of now, None without a clock.
    """

    def __init__(
        self,
        model: LoadedModel,
        inputs: UserInputs,
        masks: FilterMasks,
        as_of: Callable[[], int | None],
    ) -> None:
        self.model, self._inputs, self._masks, self._as_of = model, inputs, masks, as_of
        self._score = model.bundle.model.rules.score

    def read(self, number: int, query: Query, snapshot: CatalogSnapshot) -> ResolvedQuery:
        """Everything that is known of a query before the towers are asked."""
        _check(query)
        plain = query.filter.empty
        allowed = snapshot.open if plain else self._masks.of(query.filter, snapshot)
        resolved = ResolvedQuery(number, query, allowed, np.empty(0, np.int64))
        excluded = [resolved.exclude]
        if 0 < len(query.filter.deny) <= MANY and query.filter.allow is None:
            excluded.append(places_of(query.filter.deny, snapshot))
        if query.kind == "recommend":
            self._read_user(resolved, snapshot)
            user_input = resolved.user_input
            if query.drop_seen and user_input is not None:
                excluded.append(snapshot.places_of(user_input.seen, user_input.seen_live))
            if user_input is not None and user_input.nothing:
                resolved.notes.append(NOTHING_KNOWN)
                resolved.user_input = None
        elif query.kind == "similar":
            excluded.append(self._read_seeds(resolved, snapshot))
        elif query.kind == "search":
            if query.text is None:
                raise QueryError("Say what to search for: a text.")
            resolved.text = query.text
        else:
            resolved.vectors = self._checked_vector(query)[None]
        if len(excluded) > 1:
            resolved.exclude = np.concatenate(excluded)
        if query.cursor is not None:
            towers = self.model.bundle.model
            resolved.cursor = cursor = Cursor.decode(
                query.cursor, version=self.model.version, question=question_of(query),
                dimension=towers.vector_dimension,
            )  # fmt: skip
            # What asked for the first page asks for all: a click between two would shuffle them.
            resolved.user_input = resolved.text = None
            resolved.vectors = cursor.vectors if len(cursor.vectors) else None
        return resolved

    def _read_user(self, resolved: ResolvedQuery, snapshot: CatalogSnapshot) -> None:
        query, view = resolved.query, snapshot.view
        if query.user is None and query.history is None:
            raise QueryError("Say for whom: a user id, or a history of item ids.")
        if query.history is None:
            assert query.user is not None
            as_of = self._as_of() if self._inputs.timed else None
            resolved.user_input = self._inputs.known(query.user, view, query.context, as_of)
            if not self._known(query.user, snapshot):
                resolved.notes.append(unknown_user(query.user))
            return
        if query.user is not None and not self._known(query.user, snapshot):
            resolved.notes.append(unknown_user(query.user))
        resolved.user_input, unknown = self._inputs.given(
            query.history, view, query.user, query.context
        )
        if unknown:
            resolved.notes.append(unknown_items(unknown, len(query.history)))

    def _known(self, user: str, snapshot: CatalogSnapshot) -> bool:
        return bool(self._inputs.row_of(user)) or user in snapshot.view.events

    def _read_seeds(self, resolved: ResolvedQuery, snapshot: CatalogSnapshot) -> np.ndarray:
        """Places of the seeds; the query gets their vector, or a note that there is none."""
        seeds, unknown = resolved.query.items, []
        if not seeds:
            raise QueryError("Say what the answers shall be like: one item id or several.")
        vectors = []
        for id in seeds:
            vector = self._vector_of(id, snapshot)
            if vector is None:
                unknown.append(id)
            else:
                vectors.append(vector)
        if vectors:
            found = np.stack(vectors)
            if len(seeds) > 1:
                lengths = np.linalg.norm(found, axis=1, keepdims=True)
                found = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
                found = found.mean(axis=0, keepdims=True)
            elif snapshot.view.place.get(seeds[0]) is None:
                resolved.seed_row = self.model.row_of(seeds[0])
            resolved.vectors = np.ascontiguousarray(found, np.float32)
            if unknown:
                resolved.notes.append(unknown_items(unknown, len(seeds)))
        elif len(seeds) == 1:
            resolved.notes.append(unknown_seed(seeds[0]))
        else:
            resolved.notes.append(
                f"{unknown_items(unknown, len(seeds))}, so the most popular items answer"
            )
        return places_of(seeds, snapshot)

    def _vector_of(self, id: str, snapshot: CatalogSnapshot) -> np.ndarray | None:
        """Stored vector of an item, live or not, available or not; None: unknown or deleted."""
        live = snapshot.view.place.get(id)
        if live is not None:
            return snapshot.view.vectors[live]
        row = self.model.row_of(id)
        if not row or row in snapshot.view.hidden:
            return None
        return self.model.bundle.vectors[row]

    def _checked_vector(self, query: Query) -> np.ndarray:
        dimension = self.model.bundle.model.vector_dimension
        if query.vector is None:
            raise QueryError(f"Give a vector of {dimension} numbers.")
        vector = np.asarray(query.vector, np.float32)
        if vector.shape != (dimension,):
            raise QueryError(
                f"The vector has the shape {vector.shape}, but this model's have {dimension} "
                f"numbers ({self._score})."
            )
        if not (np.abs(vector) <= LARGEST).all():  # NaN is not, either
            raise QueryError("The vector holds NaN, infinity or a number too large to multiply.")
        return vector


def _check(query: Query) -> None:
    """Refuse what no model could answer.

    Raises:
        QueryError: a number out of its range, or options that exclude each other.
    """
    _check_ids(query)
    if isinstance(query.k, bool) or not isinstance(query.k, int) or query.k < 1:
        raise QueryError(f"k is {query.k!r}; ask for a whole number, at least 1.")
    if not 0 <= query.diversity <= 1:
        raise QueryError(f"diversity is {query.diversity}; it goes from 0 to 1.")
    if not -1 <= query.popularity <= 1:
        raise QueryError(f"popularity is {query.popularity}; it goes from -1 to 1.")
    if paged(query) and (query.diversity or query.popularity):
        raise QueryError(
            "Diversity and popularity choose among a pool of candidates, which has no next page. "
            "Ask for more answers at once (k), or page without them."
        )


def _check_ids(query: Query) -> None:
    """Refuse what is no id: of a list or a number nobody would find anything."""
    named: list[tuple[str, object]] = [
        ("item", one) for one in (*query.items, *(query.history or ()))
    ]
    if query.user is not None:
        named.append(("user", query.user))
    for kind, one in named:
        if not isinstance(one, str):
            many = isinstance(one, list | tuple)
            way_out = f"For many at once say {kind}s = …" if many else f"Give it as {str(one)!r}"
            raise QueryError(
                f"The {kind} id {one!r} is a {type(one).__name__}, and ids are text. {way_out}."
            )


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
