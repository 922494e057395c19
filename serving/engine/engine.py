"""Questions in, answers out: one model and what came since, for many questions at once.

The way of a batch: each question is read on its own (a mistake costs nobody else his answer), all
user vectors are made in one pass of the user tower and all text vectors in one of the encoder,
questions with the same filter share a search, and each answer is ordered, cut and told of.

One call reads the live items once: no answer mixes two states of the catalogue.

Legend: Q questions, n index positions, D dimensions of the stored vector, K interests, k answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np

from recsys.errors import QueryError
from recsys.ragged import Ragged
from recsys.serving.bundle import Bundle
from recsys.serving.engine.availability import FOREVER, Windows
from recsys.serving.engine.explain import EXPLAINED, Explainer
from recsys.serving.engine.facets import facets
from recsys.serving.engine.filter_masks import FilterMasks
from recsys.serving.engine.filters import KEPT_BYTES
from recsys.serving.engine.loaded_model import LoadedModel, json_rows
from recsys.serving.engine.plain import Plain
from recsys.serving.engine.popular import Popular
from recsys.serving.engine.query import Answers, Query, UnknownItem
from recsys.serving.engine.quick import Quick
from recsys.serving.engine.ranking import Ranking
from recsys.serving.engine.rerank import diversified, with_popularity
from recsys.serving.engine.resolve import ResolvedQuery, Resolver, paged
from recsys.serving.engine.snapshot import CatalogSnapshot
from recsys.serving.engine.user_inputs import UserInputs
from recsys.serving.live.updates import LiveView
from recsys.serving.neighbours import likeness

NEWEST = 50
"""History entries that a look-up of a user tells."""


def wall_clock() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


class Overlaid(Protocol):
    """What an engine wants of an overlay."""

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
    """Answers questions with one model and its overlay; safe to use from several threads.

    Args:
        served: the model.
        overlay: what came since; `overlay.view` is read once a call.
        rules: how.
    """

    def __init__(
        self, served: LoadedModel, overlay: Overlaid, *, rules: EngineRules | None = None
    ) -> None:
        self.served, self.overlay, self.rules = served, overlay, rules or EngineRules()
        bundle = served.bundle
        self._score = bundle.model.rules.score
        self._askers = UserInputs(served)
        self._windows = Windows(bundle, served.position)
        self._popular = Popular(served.recommender)
        self._ranking = Ranking(served, self._popular)
        self._explainer = Explainer(served, self._askers)
        choices = FilterMasks(bundle, self.rules.mask_bytes)
        # No bound method: a cycle would keep the model in memory until the collector comes by.
        self._reader = Resolver(served, self._askers, choices, partial(_moment, bundle, self.rules))
        self._quick = None if served.neighbours is None else Quick(served, served.neighbours)
        self._plain = Plain(served, self._askers, self._reader)
        self._stock = self._take_stock(overlay.view)

    # ------------------------------------------------------------------ the state

    def moment(self) -> int | None:
        """Microseconds of now as the engine has it; None: the log has no clock."""
        return _moment(self.served.bundle, self.rules)

    def stock(self) -> CatalogSnapshot:
        """What may be answered now; the same object until something changes."""
        view, stock = self.overlay.view, self._stock
        if stock.view is view and (stock.until == FOREVER or self._now() < stock.until):
            return stock
        self._stock = stock = self._take_stock(view)
        return stock

    def _now(self) -> int:
        moment = self.moment()
        return -FOREVER if moment is None else moment

    def _take_stock(self, view: LiveView) -> CatalogSnapshot:
        return CatalogSnapshot(self.served, view, self._windows, self.moment())

    # ------------------------------------------------------------------ answering

    def answer(self, asks: Sequence[Query]) -> list[Answers | QueryError]:
        """Answer questions; each is answered, or has what is wrong with it in its place.

        Similar items of several seeds are those nearest to the mean of the seeds' unit vectors; of
        one, to its stored vector. Seeds are never answered.
        """
        stock = self.stock()
        out: list[Answers | QueryError | None] = [None] * len(asks)
        questions: list[ResolvedQuery] = []
        for place, ask in enumerate(asks):
            try:
                questions.append(self._reader.read(place, ask, stock))
            except QueryError as error:
                out[place] = _bare(error)
        self._encode(questions, stock, out)
        groups: dict[Any, list[ResolvedQuery]] = {}
        for question in questions:
            if out[question.place] is not None:
                continue
            key: Any = question.place  # pages and popular items are found one by one
            if question.vectors is not None and not paged(question.ask):
                # A thousand answers for one are no reason to fetch a thousand for all.
                size = question.wanted.bit_length()
                key = id(question.choice), question.ask.exact, size, len(question.vectors)
            groups.setdefault(key, []).append(question)
        for group in groups.values():
            for question, found in zip(group, self._find(group, stock), strict=True):
                try:
                    out[question.place] = self._reply(question, *found, stock)
                except QueryError as error:
                    out[question.place] = _bare(error)
        assert all(reply is not None for reply in out)
        return [reply for reply in out if reply is not None]

    def _encode(
        self,
        questions: list[ResolvedQuery],
        stock: CatalogSnapshot,
        out: list[Answers | QueryError | None],
    ) -> None:
        """The vectors of all who have none yet."""
        asking = [question for question in questions if question.asker is not None]
        if asking:
            askers = [question.asker for question in asking if question.asker is not None]
            vectors = self._askers.encode(askers, stock.view)
            for question, vector in zip(asking, vectors, strict=True):
                question.vectors = vector.reshape(-1, vector.shape[-1])
        searching = [question for question in questions if question.text is not None]
        if not searching:
            return
        texts = [question.text for question in searching if question.text is not None]
        try:
            found = list(self.served.recommender.text_vectors(texts))
        except QueryError as error:
            if len(texts) == 1:
                out[searching[0].place] = _bare(error)
                return
            for question in searching:  # one of them is wrong: each by itself
                self._encode([question], stock, out)
            return
        for question, vector in zip(searching, found, strict=True):
            question.vectors = likeness(vector[None], self._score)

    def _find(
        self, group: list[ResolvedQuery], stock: CatalogSnapshot
    ) -> list[tuple[np.ndarray, np.ndarray, bool, str | None]]:
        """Places, scores, whether nothing can have been missed, and the next page's cursor."""
        first = group[0]
        if paged(first.ask):
            return [self._ranking.page(first, stock)]
        if first.vectors is None:
            places, scores = self._popular.best(stock, first.choice, first.exclude, first.wanted)
            return [(places, scores, True, None)]
        if len(group) == 1:
            return [self._alone(first, first.vectors, stock)]
        k = max(question.wanted for question in group)
        exclude = None
        if any(len(question.exclude) for question in group):
            exclude = Ragged(
                np.cumsum([0, *(len(question.exclude) for question in group)]),
                np.concatenate([question.exclude for question in group]),
            )
        vectors = np.stack([q.vectors for q in group if q.vectors is not None])  # (Q, K, D)
        if vectors.shape[1] == 1:
            vectors = vectors[:, 0]
        found, scores, sure = stock.search(vectors, k, first.choice, exclude, exact=first.ask.exact)
        return [
            (*_found(row, score, question.wanted), sure, None)
            for question, row, score in zip(group, found, scores, strict=True)
        ]

    def _alone(
        self, question: ResolvedQuery, vectors: np.ndarray, stock: CatalogSnapshot
    ) -> tuple[np.ndarray, np.ndarray, bool, str | None]:
        """As `_find`, of one question."""
        out = question.exclude
        exclude = Ragged(np.array([0, len(out)]), out) if len(out) else None
        if len(vectors) > 1:
            vectors = vectors[None]  # (1, K, D); one interest is (1, D) as it is
        rows, scores, sure = stock.search(
            vectors, question.wanted, question.choice, exclude, exact=question.ask.exact
        )
        return *_found(rows[0], scores[0], question.wanted), sure, None

    # ------------------------------------------------------------------ what is said

    def _reply(
        self,
        question: ResolvedQuery,
        places: np.ndarray,
        scores: np.ndarray,
        sure: bool,
        cursor: str | None,
        stock: CatalogSnapshot,
    ) -> Answers:
        ask = question.ask
        if ask.diversity > 0 or ask.popularity != 0:
            order = self._dialled(ask, places, scores, stock)
            places, scores = places[order], scores[order]
        places, scores = places[: ask.k], scores[: ask.k]
        explanations = None
        if ask.explain:
            explanations = self._explanations(question, places, stock)
        return Answers(
            stock.ids_of(places),
            scores,
            None if ask.fields is None else self.fields_of(places, ask.fields, stock),
            "; ".join(question.notes) or None,
            cursor,
            explanations,
            sure,
            1 if question.cursor is None else 1 + question.cursor.before,
        )

    def _dialled(
        self, ask: Query, places: np.ndarray, scores: np.ndarray, stock: CatalogSnapshot
    ) -> np.ndarray:
        """Order of the pool's answers as the dials want them; they keep their own scores."""
        relevance = np.asarray(scores, np.float64)
        if ask.popularity:
            counts = self._popular.counts(places, stock)
            relevance = with_popularity(scores, counts, ask.popularity)
        if ask.diversity > 0:
            vectors = likeness(stock.vectors_of(places), self._score)
            return diversified(relevance, vectors, ask.k, ask.diversity)
        return np.argsort(-relevance, kind="stable")

    def fields_of(
        self, places: np.ndarray, names: Sequence[str], stock: CatalogSnapshot
    ) -> list[dict[str, Any]]:
        """What the catalogue says of places, live items included.

        Raises:
            QueryError: a column that the catalogue has not.
        """
        wanted = None if tuple(names) == ("*",) else names
        if not stock.live:
            return self.served.fields(stock.rows_of(places), wanted)
        rows = stock.rows_of(places)
        said = iter(self.served.fields(rows[rows > 0], wanted))
        columns = self.served.field_names if wanted is None else list(dict.fromkeys(wanted))
        if not columns:
            return [{} for _ in places]
        live = iter(json_rows(stock.view.fields[places[rows == 0] - stock.n].select(columns)))
        return [next(said) if row else next(live) for row in rows.tolist()]

    def _explanations(
        self, question: ResolvedQuery, places: np.ndarray, stock: CatalogSnapshot
    ) -> list[dict[str, Any]]:
        rest: list[dict[str, Any]] = [{} for _ in range(len(places) - EXPLAINED)]
        places = places[:EXPLAINED]
        if question.vectors is None:
            return [{} for _ in places] + rest
        vectors, rows = stock.vectors_of(places), stock.rows_of(places)
        said = self._explainer.parts(rows, question.vectors)
        if question.asker is not None:
            pulls = self._explainer.pulls(question.asker, vectors, stock.view)
            said = [one | {"history": pull} for one, pull in zip(said, pulls, strict=True)]
        if question.ask.kind == "similar" and len(question.ask.items) == 1:
            seed = np.array([stock.place_of(question.ask.items[0])])
            if seed[0] >= 0:
                (mine,) = self.fields_of(seed, ("*",), stock)
                theirs = self.fields_of(places, ("*",), stock)
                said = [
                    one | {"shared": _shared(mine, other)}
                    for one, other in zip(said, theirs, strict=True)
                ]
        return said + rest

    # ------------------------------------------------------------------ look-ups

    def similar_fast(self, id: str, k: int) -> bytes | None:
        """The answers to `Ask("similar", (id,), k=k)` from the table of neighbours, as JSON
        without brackets; None: not from the table, ask `answer`.
        """
        quick = self._quick
        return None if quick is None else quick.similar(id, k, self.stock())

    def answer_fast(self, ask: Query) -> bytes | None:
        """The answers to one plain and quick ask from the graph, as JSON without brackets; None:
        it is not, ask `answer`.
        """
        return self._plain.answer(ask, self.stock())

    def item(self, id: str) -> dict[str, Any]:
        """What is known of an item: id, fields, whether it came after the model was made, and
        whether it may be answered now.

        Raises:
            UnknownItem: nobody knows it, or it was deleted.
        """
        stock = self.stock()
        live = stock.view.place.get(id)
        row = self.served.row_of(id)
        if live is None and (not row or row in stock.view.hidden):
            raise UnknownItem(f"There is no item {id!r}.")
        if live is None:
            (fields,) = self.served.fields(np.array([row]), None)
        else:
            (fields,) = json_rows(stock.view.fields[live])
        place = stock.place_of(id)
        available = place >= stock.n and bool(stock.open.extra[place - stock.n])
        if 0 <= place < stock.n:
            available = stock.open.mask is None or bool(stock.open.mask[place])
        return {"id": id, "fields": fields, "live": live is not None, "available": available}

    def user(self, id: str) -> dict[str, Any]:
        """What is known of a user: whether anything is, what the model knows of the newest of the
        history (oldest first) and what was posted since; times in microseconds.
        """
        view, timeline = self.overlay.view, self.served.bundle.timeline
        row = self._askers.row_of(id)
        start, end = int(timeline.user_offsets[row]), int(timeline.user_offsets[row + 1])
        start = max(start, end - NEWEST) if row else end
        ids = self.served.bundle.items.decode(timeline.item[start:end]).to_list()
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
        return facets(self.served.bundle.catalog)

    def facts(self) -> dict[str, Any]:
        """Model information: sizes, kind of index and its measured recall, live counts."""
        bundle, stock = self.served.bundle, self.stock()
        said = bundle.manifest.get("index", {})
        neighbours = self.served.neighbours
        return {
            "version": self.served.version,
            "cutoff": bundle.cutoff,
            "items": len(bundle.items.ids),
            "indexed": len(bundle.rows),
            "users": len(bundle.users.ids),
            "dimension": bundle.model.vector_dimension,
            "interests": bundle.model.user_shape[0] if len(bundle.model.user_shape) > 1 else 1,
            "score": self._score,
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
            "live": stock.live + len(stock.view.hidden),
            "live_items": stock.live,
            "hidden_items": len(stock.view.hidden),
            "expired_items": len(stock.over),
            "late_items": len(stock.late),
            "answerable": stock.open.total,
            "users_with_events": len(stock.view.events),
            "generation": stock.view.generation,
        }


def _moment(bundle: Bundle, rules: EngineRules) -> int | None:
    if not bundle.timeline.timed or rules.clock is None:
        return bundle.cutoff
    return rules.clock()


def _found(places: np.ndarray, scores: np.ndarray, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """At most so many places and their scores, without padding."""
    end = wanted if places[wanted - 1] >= 0 else int(np.count_nonzero(places[:wanted] >= 0))
    return places[:end], scores[:end]


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
