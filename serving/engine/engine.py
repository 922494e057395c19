"""Query engine: one model and what came since, for many queries at once.

The way of a batch: each query is resolved on its own (a mistake costs nobody else an answer), all
user vectors are made in one pass of the user tower and all text vectors in one of the encoder, the
planner finds the nearest items, and each answer is ordered, cut and described.

One call reads the live items once: no answer mixes two states of the catalogue.

Legend: Q queries, n index positions, D dimensions of the stored vector, k answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from recsys.errors import QueryError
from recsys.features.batching.batch import Queries
from recsys.features.prepared.timeline import Timeline
from recsys.ragged import Ragged, slots
from recsys.search import pair_scores
from recsys.serving.engine.availability import FOREVER, Windows
from recsys.serving.engine.explain import EXPLAINED, Explainer
from recsys.serving.engine.filters import KEPT_BYTES, FilterMasks
from recsys.serving.engine.loaded_model import LoadedModel, json_rows
from recsys.serving.engine.planner import Planner, ResolvedQuery, Resolver, paged
from recsys.serving.engine.popular import Popular
from recsys.serving.engine.query import Answers, Query, UnknownItem
from recsys.serving.engine.ranking import Ranking, facets
from recsys.serving.engine.rerank import diversified, with_popularity
from recsys.serving.engine.snapshot import AllowedItems, CatalogSnapshot
from recsys.serving.engine.user_inputs import UserInputs
from recsys.serving.live.overlay import LiveView

NEWEST = 50
"""History entries in the look-up of a user."""
SCORED_AT_ONCE = 1 << 18


def wall_clock() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Overlaid(Protocol):
    """What an engine reads of an overlay."""

    view: LiveView


@dataclass(frozen=True)
class EngineRules:
    """How an engine answers.

    Args:
        clock: microseconds of now; windows of availability and the age of history entries are as
            of then. None: as of the model's cut-off, for replays of old logs.
        mask_bytes: memory that masks of filters may take.
    """

    clock: Callable[[], int] | None = wall_clock
    mask_bytes: int = KEPT_BYTES


class Engine:
    """Answers queries with one model and its overlay; safe to use from several threads.

    Args:
        model: the bundle.
        overlay: what came since; `overlay.view` is read once a call.
        rules: the clock, and memory for filters.
    """

    def __init__(
        self, model: LoadedModel, overlay: Overlaid, *, rules: EngineRules | None = None
    ) -> None:
        self.model, self.overlay, self.rules = model, overlay, rules or EngineRules()
        self.inputs = UserInputs(model)
        self._windows = Windows(model.bundle, model.position)
        self.popular = Popular(model)
        self._ranking = Ranking(model, self.popular)
        self._explainer = Explainer(model, self.inputs)
        self._planner = Planner(model)
        masks = FilterMasks(model.bundle, self.rules.mask_bytes)
        # No bound method: a cycle would keep the model in memory until the collector comes by.
        self._resolver = Resolver(model, self.inputs, masks, partial(_now, model, self.rules))
        self._snapshot = self._take_snapshot(overlay.view)

    # ------------------------------------------------------------------ the state

    def as_of(self) -> int | None:
        """Microseconds of now as the engine has it; None: the log has no clock."""
        return _now(self.model, self.rules)

    def snapshot(self) -> CatalogSnapshot:
        """What may be answered now; the same object until something changes."""
        view, snapshot = self.overlay.view, self._snapshot
        if snapshot.view is view and (snapshot.until == FOREVER or self._time() < snapshot.until):
            return snapshot
        self._snapshot = snapshot = self._take_snapshot(view)
        return snapshot

    def _time(self) -> int:
        now = self.as_of()
        return -FOREVER if now is None else now

    def _take_snapshot(self, view: LiveView) -> CatalogSnapshot:
        return CatalogSnapshot(self.model, view, self._windows, self.as_of())

    # ------------------------------------------------------------------ answering

    def answer(self, queries: Sequence[Query]) -> list[Answers | QueryError]:
        """Answer queries; each is answered, or has what is wrong with it in its place.

        Similar items of several seeds are those nearest to the mean of the seeds' unit vectors; of
        one, to its stored vector. Seeds are never answered.
        """
        snapshot = self.snapshot()
        out: list[Answers | QueryError | None] = [None] * len(queries)
        resolved: list[ResolvedQuery] = []
        for number, query in enumerate(queries):
            try:
                resolved.append(self._resolver.read(number, query, snapshot))
            except QueryError as error:
                out[number] = _bare(error)
        self._encode(resolved, snapshot, out)
        nearest: list[ResolvedQuery] = []
        others: list[ResolvedQuery] = []
        for one in resolved:
            if out[one.number] is None:
                by_vector = one.vectors is not None and not paged(one.query)
                (nearest if by_vector else others).append(one)
        for one, found in zip(nearest, self._planner.find(nearest, snapshot), strict=True):
            out[one.number] = self._finished(one, *found, None, snapshot)
        for one in others:
            out[one.number] = self._listed(one, snapshot)
        assert all(answers is not None for answers in out)
        return [answers for answers in out if answers is not None]

    def from_table(self, id: str, k: int) -> Answers | None:
        """The answer that `answer` gives to a plain query for items similar to one, where it is a
        row of the table of neighbours and nothing else has to be looked at, in microseconds; None:
        ask `answer`.
        """
        snapshot, model = self.snapshot(), self.model
        if snapshot.extra_open or id in snapshot.view.place:
            return None
        row = model.row_of(id)
        if not row or row in snapshot.view.hidden or not 0 < k <= snapshot.open.total:
            return None
        found = self._planner.table_row(row, k, snapshot.open.mask)
        if found is None:
            return None
        return Answers(model.ids.decode(model.bundle.rows[found[0]].tolist()), found[1])

    def _encode(
        self,
        resolved: list[ResolvedQuery],
        snapshot: CatalogSnapshot,
        out: list[Answers | QueryError | None],
    ) -> None:
        """The vectors of all that have none yet."""
        users = [one for one in resolved if one.user_input is not None]
        if users:
            inputs = [one.user_input for one in users if one.user_input is not None]
            vectors = self.inputs.encode(inputs, snapshot.view)
            for one, vector in zip(users, vectors, strict=True):
                one.vectors = vector[None]
        searching = [one for one in resolved if one.text is not None]
        if not searching:
            return
        texts = [one.text for one in searching if one.text is not None]
        try:
            found = list(self.model.text_vectors(texts))
        except QueryError as error:
            if len(texts) == 1:
                out[searching[0].number] = _bare(error)
                return
            for one in searching:  # one of them is wrong: each by itself
                self._encode([one], snapshot, out)
            return
        for one, vector in zip(searching, found, strict=True):
            one.vectors = vector[None]

    def _listed(self, resolved: ResolvedQuery, snapshot: CatalogSnapshot) -> Answers | QueryError:
        """A page, or the most popular items."""
        try:
            if paged(resolved.query):
                return self._finished(resolved, *self._ranking.page(resolved, snapshot), snapshot)
        except QueryError as error:
            return _bare(error)
        best = self.popular.best(snapshot, resolved.allowed, resolved.exclude, resolved.wanted)
        return self._finished(resolved, *best, True, None, snapshot)

    def _finished(
        self,
        resolved: ResolvedQuery,
        positions: np.ndarray,
        scores: np.ndarray,
        sure: bool,
        cursor: str | None,
        snapshot: CatalogSnapshot,
    ) -> Answers | QueryError:
        try:
            return self._described(resolved, positions, scores, sure, cursor, snapshot)
        except QueryError as error:
            return _bare(error)

    # ------------------------------------------------------------------ bulk

    def recommend_rows(
        self,
        queries: Queries,
        k: int,
        *,
        exact: bool = False,
        drop_seen: bool = True,
        allowed: np.ndarray | None = None,
        fallback: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Recommendations for many users by rows, as `answer` gives them by ids.

        Args:
            queries: user rows, with the item rows of their histories.
            k: answers wanted.
            exact: search exactly even where there is a graph.
            drop_seen: never answer an item of the user's past, however far back.
            allowed: (N,) bool, item rows that may be answered; None: all that exist now.
            fallback: whether the most popular items answer who nothing is known of; otherwise the
                towers do, as for anybody.

        Returns:
            item rows (Q, k') int64 padded with -1, scores (Q, k') float32 padded with -inf, k' at
            most as many as may be answered; (Q,) bool, who got the most popular items, whose
            scores are counts.

        Raises:
            QueryError: k is below 1.
        """
        if k < 1:
            raise QueryError(f"k is {k}; ask for at least 1.")
        snapshot = self.snapshot()
        k = min(k, max(1, snapshot.open.total))
        items = snapshot.open
        if allowed is not None:
            mask = allowed[self.model.bundle.rows]
            none = np.zeros(len(snapshot.extra), bool)
            items = AllowedItems(mask, int(np.count_nonzero(mask)), none)
        nothing = self.nothing_known(queries) if fallback else np.zeros(len(queries), bool)
        positions = np.full((len(queries), k), -1, np.int64)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        exclude = self._seen(queries) if drop_seen else None
        some = np.flatnonzero(~nothing)
        if len(some):
            vectors = self.inputs.encode_queries(queries.take(some))
            part = None if exclude is None else exclude.take(some)
            positions[some], scores[some], _ = snapshot.search(vectors, k, items, part, exact=exact)
        for number in np.flatnonzero(nothing).tolist():
            seen = np.empty(0, np.int64) if exclude is None else exclude[number]
            best, counts = self.popular.best(snapshot, items, seen, k)
            positions[number, : len(best)], scores[number, : len(best)] = best, counts
        rows = np.full(positions.shape, -1, np.int64)
        found = positions >= 0
        rows[found] = snapshot.rows_of(positions[found])
        return rows, scores, nothing

    def nothing_known(self, queries: Queries) -> np.ndarray:
        """(Q,) bool: neither a history nor a vector or features of the user."""
        known = (queries.users > 0) & (queries.users < self.model.told_apart)
        return ~known & (queries.history.lengths == 0)

    def _seen(self, queries: Queries) -> Ragged:
        """Q ragged index positions of what each user had before, however far back, each once."""
        seen = seen_rows(self.model.bundle.timeline, queries)
        positions = self.model.position[seen.values].astype(np.int64)
        return Ragged(seen.offsets, positions).where(positions >= 0).distinct()

    def score_rows(self, queries: Queries, items: Ragged) -> np.ndarray:
        """Scores of given item rows for each query, flat in the order of `items`, float32."""
        vectors = self.inputs.encode_queries(queries)
        out = np.empty(len(items.values), np.float32)
        query = items.row_of()
        for start in range(0, len(out), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            out[part] = pair_scores(
                vectors[query[part]], self.model.bundle.vectors[items.values[part]]
            )
        return out

    # ------------------------------------------------------------------ answers

    def _described(
        self,
        resolved: ResolvedQuery,
        places: np.ndarray,
        scores: np.ndarray,
        sure: bool,
        cursor: str | None,
        snapshot: CatalogSnapshot,
    ) -> Answers:
        query = resolved.query
        if query.diversity > 0 or query.popularity != 0:
            order = self._reranked(query, places, scores, snapshot)
            places, scores = places[order], scores[order]
        places, scores = places[: query.k], scores[: query.k]
        explanations = None
        if query.explain:
            explanations = self._explanations(resolved, places, snapshot)
        return Answers(
            snapshot.ids_of(places),
            scores,
            None if query.fields is None else self.fields_of(places, query.fields, snapshot),
            "; ".join(resolved.notes) or None,
            cursor,
            explanations,
            sure,
            1 if resolved.cursor is None else 1 + resolved.cursor.before,
        )

    def _reranked(
        self, query: Query, places: np.ndarray, scores: np.ndarray, snapshot: CatalogSnapshot
    ) -> np.ndarray:
        """Order of the pool's answers re-ranked; they keep their own scores."""
        relevance = np.asarray(scores, np.float64)
        if query.popularity:
            counts = self.popular.counts(places, snapshot)
            relevance = with_popularity(scores, counts, query.popularity)
        if query.diversity > 0:
            vectors = snapshot.vectors_of(places)
            return diversified(relevance, vectors, query.k, query.diversity)
        return np.argsort(-relevance, kind="stable")

    def fields_of(
        self, places: np.ndarray, names: Sequence[str], snapshot: CatalogSnapshot
    ) -> list[dict[str, Any]]:
        """What the catalogue says of places, live items included.

        Raises:
            QueryError: a column that the catalogue has not.
        """
        wanted = None if tuple(names) == ("*",) else names
        if not snapshot.live:
            return self.model.fields(snapshot.rows_of(places), wanted)
        rows = snapshot.rows_of(places)
        said = iter(self.model.fields(rows[rows > 0], wanted))
        columns = self.model.field_names if wanted is None else list(dict.fromkeys(wanted))
        if not columns:
            return [{} for _ in places]
        live = iter(json_rows(snapshot.view.fields[places[rows == 0] - snapshot.n].select(columns)))
        return [next(said) if row else next(live) for row in rows.tolist()]

    def _explanations(
        self, resolved: ResolvedQuery, places: np.ndarray, snapshot: CatalogSnapshot
    ) -> list[dict[str, Any]]:
        rest: list[dict[str, Any]] = [{} for _ in range(len(places) - EXPLAINED)]
        places = places[:EXPLAINED]
        if resolved.vectors is None:
            return [{} for _ in places] + rest
        vectors, rows = snapshot.vectors_of(places), snapshot.rows_of(places)
        said = self._explainer.parts(rows, resolved.vectors)
        if resolved.user_input is not None:
            pulls = self._explainer.pulls(resolved.user_input, vectors, snapshot.view)
            said = [one | {"history": pull} for one, pull in zip(said, pulls, strict=True)]
        if resolved.query.kind == "similar" and len(resolved.query.items) == 1:
            seed = np.array([snapshot.place_of(resolved.query.items[0])])
            if seed[0] >= 0:
                (mine,) = self.fields_of(seed, ("*",), snapshot)
                theirs = self.fields_of(places, ("*",), snapshot)
                said = [
                    one | {"shared": _shared(mine, other)}
                    for one, other in zip(said, theirs, strict=True)
                ]
        return said + rest

    # ------------------------------------------------------------------ look-ups

    def item(self, id: str) -> dict[str, Any]:
        """What is known of an item: id, fields, whether it came after the model was made, and
        whether it may be answered now.

        Raises:
            UnknownItem: nobody knows it, or it was deleted.
        """
        snapshot = self.snapshot()
        live = snapshot.view.place.get(id)
        row = self.model.row_of(id)
        if live is None and (not row or row in snapshot.view.hidden):
            raise UnknownItem(f"There is no item {id!r}.")
        if live is None:
            (fields,) = self.model.fields(np.array([row]), None)
        else:
            (fields,) = json_rows(snapshot.view.fields[live])
        place = snapshot.place_of(id)
        available = place >= snapshot.n and bool(snapshot.open.extra[place - snapshot.n])
        if 0 <= place < snapshot.n:
            available = snapshot.open.mask is None or bool(snapshot.open.mask[place])
        return {"id": id, "fields": fields, "live": live is not None, "available": available}

    def user(self, id: str) -> dict[str, Any]:
        """What is known of a user: whether anything is, what the model knows of the newest of the
        history (oldest first) and what was posted since; times in microseconds.
        """
        view, timeline = self.overlay.view, self.model.bundle.timeline
        row = self.inputs.row_of(id)
        start, end = int(timeline.user_offsets[row]), int(timeline.user_offsets[row + 1])
        start = max(start, end - NEWEST) if row else end
        ids = self.model.bundle.items.decode(timeline.item[start:end]).to_list()
        times = timeline.time[start:end].tolist() if timeline.timed else [None] * len(ids)
        posted = view.events.get(id, ())
        history = [{"id": item, "time": time} for item, time in zip(ids, times, strict=True)]
        events = [{"id": item, "time": time, "strength": weight} for item, time, weight in posted]
        return {
            "id": id,
            "known": bool(row or posted),
            "history": (history + [{"id": e["id"], "time": e["time"]} for e in events])[-NEWEST:],
            "events": events[-NEWEST:],
        }

    @cached_property
    def _facets(self) -> dict[str, list[Any]]:
        """What the page offers to filter by; a tenth of a second at a million items, once."""
        return facets(self.model.bundle.catalog)

    def facts(self) -> dict[str, Any]:
        """Model information: sizes, kind of index and its measured recall, live counts."""
        bundle, snapshot = self.model.bundle, self.snapshot()
        said = bundle.manifest.get("index", {})
        neighbours = self.model.neighbours
        return {
            "version": self.model.version,
            "cutoff": bundle.cutoff,
            "items": len(bundle.items.ids),
            "indexed": len(bundle.rows),
            "users": len(bundle.users.ids),
            "dimension": bundle.model.vector_dimension,
            "score": bundle.model.rules.score,
            "text": bundle.encoder_folder is not None and bundle.model.item_spec.text > 0,
            "statistics": bundle.model.uses_statistics,
            "context": [column.name for column in bundle.contexts],
            "fields": {n: str(t) for n, t in bundle.catalog.schema.items() if n != "item"},
            "values": self._facets,
            "index": said.get("kind", type(bundle.index).__name__),
            "recall": said.get("recall"),
            "recall_k": said.get("recall_k"),
            "neighbours": None
            if neighbours is None
            else {"k": neighbours.rows.shape[1], "recall": neighbours.recall},
            "live": snapshot.live + len(snapshot.view.hidden),
            "live_items": snapshot.live,
            "hidden_items": len(snapshot.view.hidden),
            "expired_items": len(snapshot.over),
            "late_items": len(snapshot.late),
            "answerable": snapshot.open.total,
            "users_with_events": len(snapshot.view.events),
            "generation": snapshot.view.generation,
        }


def _now(model: LoadedModel, rules: EngineRules) -> int | None:
    if not model.bundle.timeline.timed or rules.clock is None:
        return model.as_of
    return rules.clock()


def seen_rows(timeline: Timeline, queries: Queries) -> Ragged:
    """Q ragged item rows that each user had before: what is known, then the history given."""
    known = timeline.histories(queries.users, queries.times)
    own = queries.history
    if not (len(own.values) and len(known.values)):
        return known if len(known.values) else own
    offsets = known.offsets + own.offsets
    values = np.empty(offsets[-1], np.int64)
    values[slots(offsets[:-1], known.lengths)] = known.values
    values[slots(offsets[:-1] + known.lengths, own.lengths)] = own.values
    return Ragged(offsets, values)


def _bare(error: QueryError) -> QueryError:
    """An error that holds no frames: they hold the answers, these the error, and all the model."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _shared(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The fields in which two items agree; of lists, the values that stand in both."""
    shared = {}
    for name, value in mine.items():
        theirs = other.get(name)
        if isinstance(value, list) and isinstance(theirs, list):
            value = theirs = [one for one in value if one in theirs]
        if value == theirs and value not in (None, [], ""):
            shared[name] = value
    return shared


__all__ = ["Engine", "EngineRules", "wall_clock"]
