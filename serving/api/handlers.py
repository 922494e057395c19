"""Handlers of the service, one method a route.

Each takes a `RequestContext` and gives the bytes of a JSON answer, or raises a Refusal.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import orjson

from recsys.errors import QueryError, RecsysError
from recsys.serving.api.auth import Keys, Role
from recsys.serving.api.batcher import Batcher, BatchRules, Outcome
from recsys.serving.api.limits import Rate, Rates
from recsys.serving.api.metrics import Metrics
from recsys.serving.api.middleware import RequestContext, body, parameters, segment
from recsys.serving.api.schemas import (
    BatchRequest,
    Code,
    EventsRequest,
    ItemBody,
    Options,
    RecommendRequest,
    Refusal,
    SearchRequest,
    SimilarRequest,
    VectorRequest,
    check,
    read,
)
from recsys.serving.engine.query import Answers, CursorError, Query, UnknownItem
from recsys.serving.live.journal import Event, JournalError

log = logging.getLogger("recsys.serve")

MISTAKE = "This is a mistake of ours; it is logged."


class ImpressionSink(Protocol):
    """Where it is written down what was shown; see serving/live/impression_log.py."""

    def shown(
        self, request: str, user: str | None, time: int, items: Sequence[str], variant: str,
        model: str, *, first: int = 1,
    ) -> object: ...  # fmt: skip

    def events(self, events: Sequence[Event]) -> object: ...


@dataclass(frozen=True)
class ServiceRules:
    """Bounds of the service.

    Args:
        deadline: seconds for one question, or a write.
        batch_deadline: seconds for a batch of them.
        body: bytes of a body.
        body_seconds: for a body to arrive.
        answers, writes: how they wait.
        read_only: nothing may be written.
        rates: how often each may ask, see `Rates`; none: nobody is bounded.
        hosts: names that the Host header may have; None: any. Without keys, a page in a browser
            could otherwise reach a local service by a name of its own (DNS rebinding).
        log_every: every which request is logged; 0: none. Failures of ours and slow ones always.
        log_slow: seconds from which a request counts as slow.
    """

    deadline: float = 2.0
    batch_deadline: float = 10.0
    body: int = 1 << 20
    body_seconds: float = 10.0
    answers: BatchRules = field(default_factory=BatchRules)
    writes: BatchRules = field(default_factory=lambda: BatchRules(1, 1, 256, 4))
    read_only: bool = False
    rates: Mapping[Role | None, Rate] = field(default_factory=dict)
    hosts: frozenset[bytes] | None = None
    log_every: int = 100
    log_slow: float = 1.0


class Handlers:
    """Everything behind the routes.

    Args:
        models: gives the engine of a request; see serving/models/manager.py.
        updates: is written to; None: nothing may be.
        impressions: None: what is shown is not written down.
        rules: bounds.
        keys: who may do what.
    """

    def __init__(
        self,
        models: Any,
        updates: Any,
        impressions: ImpressionSink | None,
        rules: ServiceRules,
        keys: Keys,
        metrics: Metrics,
    ) -> None:
        self.models, self.updates, self.impressions = models, updates, impressions
        self.rules, self.keys, self.metrics = rules, keys, metrics
        self.rates = Rates(rules.rates) if rules.rates else None
        self.answers = Batcher(rules.answers, name="answers")
        self.writes = Batcher(rules.writes, name="writes")

    def close(self) -> None:
        """Finish what waits and end the threads."""
        self.answers.close()
        self.writes.close()

    # ------------------------------------------------------------------ who may

    def limit(self, context: RequestContext) -> None:
        """Raise a Refusal where the caller asks too often."""
        if self.rates is not None and (wait := self.rates.take(context.key)):
            raise Refusal(
                Code.RATE,
                f"Too many requests; nothing was done. Ask again in {wait:.3f} s.",
                retry=math.ceil(wait),
            )

    def allow(self, context: RequestContext, role: Role) -> None:
        """Raise a Refusal unless the key of the call allows it."""
        if role == "write" and (self.rules.read_only or self.updates is None):
            raise Refusal(Code.FORBIDDEN, "This service is read-only.")
        if not self.keys.needed:
            if role == "write" and not self.keys.open_writes:
                raise Refusal(
                    Code.FORBIDDEN,
                    "Writing needs keys (--keys), or a service started with --open-writes.",
                )
        elif context.key_role is None:
            raise Refusal(
                Code.NO_KEY, "Send a valid key as Authorization: Bearer KEY, or as X-API-Key."
            )
        elif role == "write" and context.key_role != "write":
            raise Refusal(Code.FORBIDDEN, "This key may only read.")

    def engine(self, context: RequestContext, unit: str | None) -> tuple[str, Any]:
        if context.wanted is not None and self.keys.needed and context.key_role != "write":
            raise Refusal(Code.FORBIDDEN, "Only a write key may name a variant.")
        try:
            variant, engine = self.models.choose(unit, context.wanted)
        except QueryError as error:
            if not self.models.ready:
                raise Refusal(Code.NOT_READY, "No model is loaded yet.", retry=1) from None
            raise refused(error) from None
        return variant, engine

    # ------------------------------------------------------------------ questions

    async def similar_of(self, context: RequestContext, id: str) -> bytes:
        given = self._read(context, SimilarRequest, {"items": [segment(id)]})
        return await self._answer(context, given)

    async def recommendations_of(self, context: RequestContext, id: str) -> bytes:
        given = self._read(context, RecommendRequest, {"user": segment(id)})
        return await self._answer(context, given)

    async def similar(self, context: RequestContext) -> bytes:
        return await self._answer(context, read(SimilarRequest, await self._body(context)))

    async def recommend(self, context: RequestContext) -> bytes:
        return await self._answer(context, read(RecommendRequest, await self._body(context)))

    async def search(self, context: RequestContext) -> bytes:
        return await self._answer(context, read(SearchRequest, await self._body(context)))

    async def vectors(self, context: RequestContext) -> bytes:
        return await self._answer(context, read(VectorRequest, await self._body(context)))

    async def batch(self, context: RequestContext) -> bytes:
        requests = read(BatchRequest, await self._body(context)).requests
        if self.rates is not None:
            self.rates.charge(context.key, len(requests) - 1)
        groups: dict[str, tuple[Any, list[int]]] = {}
        for place, one in enumerate(requests):
            variant, engine = self.engine(context, one.user)
            # One engine a variant, also when a model is swapped in between.
            groups.setdefault(variant, (engine, []))[1].append(place)
        deadline = context.start + self.rules.batch_deadline
        outcomes = await asyncio.gather(
            *(
                self._each(engine, [requests[p].to_query() for p in places], deadline)
                for engine, places in groups.values()
            )
        )
        answers: list[Any] = [None] * len(requests)
        for (variant, (engine, places)), replies in zip(groups.items(), outcomes, strict=True):
            model = version(engine)
            for place, reply in zip(places, replies, strict=True):
                request = f"{context.request_id}.{place}"
                if isinstance(reply, QueryError):
                    answers[place] = error_form(refused(reply), request)
                elif isinstance(reply, Exception):
                    log.error("request %s failed", request, exc_info=reply)
                    answers[place] = error_form(Refusal(Code.INTERNAL, MISTAKE), request)
                else:
                    answers[place] = self.form(
                        reply, request, requests[place].user, variant, model, context
                    )
        context.variant = next(iter(groups)) if len(groups) == 1 else ""
        return orjson.dumps({"request_id": context.request_id, "answers": answers})

    async def _each(self, engine: Any, asks: list[Query], deadline: float) -> list[Outcome]:
        """Answers of a batch; whatever goes wrong with one question stands in its place."""
        try:
            return await self.answers.answer(engine, asks, deadline)
        except Refusal:
            raise
        except Exception as error:  # of the only one that is asked of this engine
            return [error] * len(asks)

    def _read(self, context: RequestContext, model: type[Any], own: dict[str, Any]) -> Any:
        values = from_query(context.scope["query_string"])
        for name in own.keys() & values.keys():
            raise Refusal(Code.INVALID, f"{name} is in the path already.")
        return check(model, own | values)

    async def _body(self, context: RequestContext) -> bytes:
        return await body(context.scope, context.receive, self.rules.body, self.rules.body_seconds)

    async def _answer(self, context: RequestContext, given: Options) -> bytes:
        context.variant, engine = self.engine(context, given.user)
        context.model = version(engine)
        query: Query = given.to_query()
        # A row of the table of neighbours is found sooner than a thread is woken.
        seed = query.plain_seed
        answers = None if seed is None else engine.from_table(seed, query.k)
        if answers is None:
            deadline = context.start + self.rules.deadline
            (answers,) = await self.answers.answer(engine, [query], deadline)
        if isinstance(answers, QueryError):
            raise refused(answers) from None
        assert isinstance(answers, Answers)  # of a single one, anything else was raised
        return orjson.dumps(
            self.form(
                answers, context.request_id, given.user, context.variant, context.model, context
            )
        )

    def form(
        self,
        answers: Answers,
        request: str,
        user: str | None,
        variant: str,
        model: str,
        context: RequestContext,
    ) -> dict[str, Any]:
        if self.impressions is not None and context.impressed and answers.ids:
            self.impressions.shown(
                request, user, now(), answers.ids, variant, model, first=answers.first
            )
        if answers.fallback is not None:
            self.metrics.fallback(context.route, variant)
        return answer_form(answers, request, model, variant)

    # ------------------------------------------------------------------ items, users, events

    async def item(self, context: RequestContext, id: str) -> bytes:
        return await self._looked_up(context, "item", segment(id), None)

    async def user(self, context: RequestContext, id: str) -> bytes:
        user = segment(id)
        return await self._looked_up(context, "user", user, user)

    async def _looked_up(
        self, context: RequestContext, what: str, id: str, unit: str | None
    ) -> bytes:
        no_parameters(context)
        context.variant, engine = self.engine(context, unit)
        context.model = version(engine)
        deadline = context.start + self.rules.deadline
        found = await asked(self.answers, lambda: getattr(engine, what)(id), deadline)
        return dumps(
            {
                "request_id": context.request_id,
                "model": context.model,
                "variant": context.variant,
                what: found,
            }
        )

    async def put_item(self, context: RequestContext, id: str) -> bytes:
        item, row = segment(id), read(ItemBody, await self._body(context)).root
        await self._write(context, lambda: self.updates.put_item(item, row))
        return self._written(context, 1)

    async def delete_item(self, context: RequestContext, id: str) -> bytes:
        item = segment(id)
        if not await self._write(context, lambda: self.updates.delete_item(item)):
            raise Refusal(Code.UNKNOWN_ITEM, f"There is no item {item!r} to delete.")
        return self._written(context, 1)

    async def events(self, context: RequestContext) -> bytes:
        received = now()
        events = [
            Event(
                one.user, one.item, received if one.time is None else one.time, one.event,
                one.strength, one.request, one.id,
            )
            for one in read(EventsRequest, await self._body(context)).events
        ]  # fmt: skip

        def work() -> None:
            # Here, so that the log for training has what the journal has: each event once, and
            # also those for which nobody waited to the end.
            new = self.updates.post_events(events)
            if new and self.impressions is not None:
                self.impressions.events(new)

        await self._write(context, work, "send again with the same event ids")
        return self._written(context, len(events))

    async def _write(
        self, context: RequestContext, work: Callable[[], Any], again: str = "send it again"
    ) -> Any:
        no_parameters(context)
        try:
            return await asked(self.writes, work, context.start + self.rules.deadline)
        except Refusal as refusal:
            if refusal.code == Code.DEADLINE:
                # Whoever obeys a Retry-After takes it that nothing was done.
                refusal.retry = None
                refusal.message = f"Not written in time, perhaps later; it is safe to {again}."
            raise
        except (OSError, JournalError) as error:  # a full disk, a journal that is closed
            log.error("a write failed", exc_info=error)
            raise Refusal(Code.NOT_WRITTEN, "The journal could not be written.", retry=5) from error

    def _written(self, context: RequestContext, count: int) -> bytes:
        return orjson.dumps({"request_id": context.request_id, "written": count})

    # ------------------------------------------------------------------ the service itself

    async def model(self, context: RequestContext) -> bytes:
        no_parameters(context)
        variants = self.models.facts()
        engines = [self.models.choose(None, str(one["name"]))[1] for one in variants]
        facts = await asked(
            self.answers,
            lambda: [engine.facts() for engine in engines],
            context.start + self.rules.deadline,
        )
        models = [{**one, "engine": more} for one, more in zip(variants, facts, strict=True)]
        return dumps({"request_id": context.request_id, "models": models})

    async def live(self, context: RequestContext) -> bytes:
        return b'{"live":true}'

    async def ready(self, context: RequestContext) -> bytes:
        if not self.models.ready:
            raise Refusal(Code.NOT_READY, "No model is loaded yet.", retry=1)
        return b'{"ready":true}'


# --- forms ----------------------------------------------------------------------------------------


def version(engine: Any) -> str:
    """Version of the model that an engine answers with."""
    return str(engine.model.version)


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def answer_form(answers: Answers, request: str, model: str, variant: str) -> dict[str, Any]:
    """An answer as it goes out; the order of its keys is fixed."""
    scores = np.asarray(answers.scores, np.float64).round(6).tolist()
    items = [{"id": id, "score": score} for id, score in zip(answers.ids, scores, strict=True)]
    for name, values in (("fields", answers.fields), ("explanation", answers.explanations)):
        if values is not None:
            for item, value in zip(items, values, strict=True):
                item[name] = value
    return {
        "request_id": request,
        "model": model,
        "variant": variant,
        "fallback": answers.fallback,
        "items": items,
        "next": answers.next,
    }


def dumps(value: Any) -> bytes:
    """JSON of facts, which may hold NumPy's numbers; NaN becomes null."""
    return orjson.dumps(value, default=str, option=orjson.OPT_SERIALIZE_NUMPY)


def error_form(refusal: Refusal, request: str) -> dict[str, Any]:
    """An error as it goes out."""
    return {"error": {"code": refusal.code, "message": refusal.message, "request_id": request}}


def refused(error: RecsysError) -> Refusal:
    """What an engine cannot answer, with its code."""
    code = Code.BAD_QUERY
    if isinstance(error, UnknownItem):
        code = Code.UNKNOWN_ITEM
    elif isinstance(error, CursorError):
        code = Code.STALE_CURSOR if error.gone else Code.BAD_CURSOR
    return Refusal(code, str(error)[:2000])


async def asked(batcher: Batcher, work: Callable[[], Any], deadline: float) -> Any:
    """What `work` gives in a thread of the batcher; an error of its question as a Refusal."""
    try:
        return await batcher.call(work, deadline)
    except QueryError as error:
        raise refused(error) from None


def no_parameters(context: RequestContext) -> None:
    """Refuse a query string where there is nothing to say in it."""
    if context.scope["query_string"]:
        name = next(iter(parameters(context.scope["query_string"])), "")
        raise Refusal(Code.INVALID, f"This path takes no parameters, but {name[:40]!r} is given.")


_WHOLE, _NUMBER = re.compile(r"-?[0-9]{1,9}"), re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,17})?")
_FLAGS = {"true": True, "false": False}


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError("a whole number")
    return int(text)


def _number(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError("a decimal number")
    return float(text)


def _flag(text: str) -> bool:
    if text not in _FLAGS:
        raise ValueError("true or false")
    return _FLAGS[text]


PARAMETERS: dict[str, Callable[[str], Any]] = {
    "k": _whole, "fields": lambda text: text.split(","), "exact": _flag, "explain": _flag,
    "paged": _flag, "cursor": str, "diversity": _number, "popularity": _number,
    "drop_seen": _flag, "user": str,
}  # fmt: skip
"""What a query string may say; every other name is a column that must have that value."""


def from_query(query: bytes) -> dict[str, Any]:
    """The values of a request from a query string.

    Raises:
        Refusal: one is given twice, or is not what it should be.
    """
    values: dict[str, Any] = {}
    equals: dict[str, Any] = {}
    for name, given in parameters(query).items():
        convert = PARAMETERS.get(name)
        if convert is None:
            equals[name] = given
            continue
        if len(given) > 1:
            raise Refusal(Code.INVALID, f"{name} is given {len(given)} times; give it once.")
        try:
            values[name] = convert(given[0])
        except ValueError as error:
            raise Refusal(Code.INVALID, f"{name}: this should be {error}.") from None
    if equals:
        values["filter"] = {"equals": equals}
    return values
