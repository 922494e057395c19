"""What the service does, one method a route, and nothing of how it is asked for.

Each takes a `Call` and gives the bytes of a JSON answer, or raises a Refusal.
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
from recsys.serving.api.auth import Hashed, Keys, Role
from recsys.serving.api.batcher import Batcher, BatchRules, Outcome
from recsys.serving.api.guard import Receive, Scope, body, parameters, segment
from recsys.serving.api.limits import Rate, Rates
from recsys.serving.api.metrics import Metrics
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
from recsys.serving.live.journal import JournalError
from recsys.serving.live.updates import Event

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
        awake: seconds that the loop looks out for the next question after an answer, see `Awake`.
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
    awake: float = 0.0005
    log_every: int = 100
    log_slow: float = 1.0


class RequestContext:
    """One request on its way, and what is to be said of it afterwards."""

    __slots__ = (
        "code", "exposed", "fallback", "key", "model", "receive", "request_id", "route",
        "scope", "start", "status", "variant", "wanted",
    )  # fmt: skip

    def __init__(self, scope: Scope, receive: Receive, request_id: str, start: float) -> None:
        self.scope, self.receive, self.request_id, self.start = scope, receive, request_id, start
        self.route, self.variant, self.model = "other", "", ""
        self.status, self.code, self.fallback = 500, "", False
        self.key: Hashed | None = None  # a valid one
        self.wanted: str | None = None  # a variant that the asker names
        self.exposed = True  # whether anyone is shown the answer

    @property
    def key_role(self) -> Role | None:
        """The role of the key that came with it."""
        return None if self.key is None else self.key.role


class Handlers:
    """Everything behind the routes.

    Args:
        host: gives the engine of a request; see serving/models/manager.py.
        living: is written to; None: nothing may be.
        exposures: None: what is shown is not written down.
        rules: bounds.
        keys: who may do what.
    """

    def __init__(
        self,
        host: Any,
        living: Any,
        exposures: ImpressionSink | None,
        rules: ServiceRules,
        keys: Keys,
        metrics: Metrics,
    ) -> None:
        self.host, self.living, self.exposures = host, living, exposures
        self.rules, self.keys, self.metrics = rules, keys, metrics
        self.rates = Rates(rules.rates) if rules.rates else None
        self.answers = Batcher(rules.answers, name="answers")
        self.writes = Batcher(rules.writes, name="writes")

    def close(self) -> None:
        """Finish what waits and end the threads."""
        self.answers.close()
        self.writes.close()

    # ------------------------------------------------------------------ who may

    def limit(self, call: RequestContext) -> None:
        """Raise a Refusal where the caller asks too often."""
        if self.rates is not None and (wait := self.rates.take(call.key)):
            raise Refusal(
                Code.RATE,
                f"Too many requests; nothing was done. Query again in {wait:.3f} s.",
                retry=math.ceil(wait),
            )

    def allow(self, call: RequestContext, role: Role) -> None:
        """Raise a Refusal unless the key of the call allows it."""
        if role == "write" and (self.rules.read_only or self.living is None):
            raise Refusal(Code.FORBIDDEN, "This service is read-only.")
        if not self.keys.needed:
            if role == "write" and not self.keys.open_writes:
                raise Refusal(
                    Code.FORBIDDEN,
                    "Writing needs keys (--keys), or a service started with --open-writes.",
                )
        elif call.key_role is None:
            raise Refusal(
                Code.NO_KEY, "Send a valid key as Authorization: Bearer KEY, or as X-API-Key."
            )
        elif role == "write" and call.key_role != "write":
            raise Refusal(Code.FORBIDDEN, "This key may only read.")

    def _engine(self, call: RequestContext, unit: str | None) -> tuple[str, Any]:
        if call.wanted is not None and self.keys.needed and call.key_role != "write":
            raise Refusal(Code.FORBIDDEN, "Only a write key may name a variant.")
        try:
            variant, engine = self.host.choose(unit, call.wanted)
        except QueryError as error:
            if not self.host.ready:
                raise Refusal(Code.NOT_READY, "No model is loaded yet.", retry=1) from None
            raise refused(error) from None
        return variant, engine

    # ------------------------------------------------------------------ questions

    async def similar_of(self, call: RequestContext, id: str) -> bytes:
        given = self._asked(call, SimilarRequest, {"items": [segment(id)]})
        return await self._answer(call, given)

    async def recommendations_of(self, call: RequestContext, id: str) -> bytes:
        given = self._asked(call, RecommendRequest, {"user": segment(id)})
        return await self._answer(call, given)

    async def similar(self, call: RequestContext) -> bytes:
        return await self._answer(call, read(SimilarRequest, await self._body(call)))

    async def recommend(self, call: RequestContext) -> bytes:
        return await self._answer(call, read(RecommendRequest, await self._body(call)))

    async def search(self, call: RequestContext) -> bytes:
        return await self._answer(call, read(SearchRequest, await self._body(call)))

    async def vectors(self, call: RequestContext) -> bytes:
        return await self._answer(call, read(VectorRequest, await self._body(call)))

    async def batch(self, call: RequestContext) -> bytes:
        requests = read(BatchRequest, await self._body(call)).requests
        if self.rates is not None:
            self.rates.charge(call.key, len(requests) - 1)
        groups: dict[str, tuple[Any, list[int]]] = {}
        for place, one in enumerate(requests):
            variant, engine = self._engine(call, one.user)
            # One engine a variant, also when a model is swapped in between.
            groups.setdefault(variant, (engine, []))[1].append(place)
        deadline = call.start + self.rules.batch_deadline
        outcomes = await asyncio.gather(
            *(
                self._each(engine, [requests[p].to_ask() for p in places], deadline)
                for engine, places in groups.values()
            )
        )
        answers: list[Any] = [None] * len(requests)
        for (variant, (engine, places)), replies in zip(groups.items(), outcomes, strict=True):
            model = version(engine)
            for place, reply in zip(places, replies, strict=True):
                request = f"{call.request_id}.{place}"
                if isinstance(reply, QueryError):
                    answers[place] = said(refused(reply), request)
                elif isinstance(reply, Exception):
                    log.error("request %s failed", request, exc_info=reply)
                    answers[place] = said(Refusal(Code.INTERNAL, MISTAKE), request)
                else:
                    answers[place] = self._said(
                        reply, request, requests[place].user, variant, model, call
                    )
        call.variant = next(iter(groups)) if len(groups) == 1 else ""
        return orjson.dumps({"request_id": call.request_id, "answers": answers})

    async def _each(self, engine: Any, asks: list[Query], deadline: float) -> list[Outcome]:
        """Answers of a batch; whatever goes wrong with one question stands in its place."""
        try:
            return await self.answers.answer(engine, asks, deadline)
        except Refusal:
            raise
        except Exception as error:  # of the only one that is asked of this engine
            return [error] * len(asks)

    def _asked(self, call: RequestContext, model: type[Any], own: dict[str, Any]) -> Any:
        values = from_query(call.scope["query_string"])
        for name in own.keys() & values.keys():
            raise Refusal(Code.INVALID, f"{name} is in the path already.")
        return check(model, own | values)

    async def _body(self, call: RequestContext) -> bytes:
        return await body(call.scope, call.receive, self.rules.body, self.rules.body_seconds)

    async def _answer(self, call: RequestContext, given: Options) -> bytes:
        call.variant, engine = self._engine(call, given.user)
        call.model = version(engine)
        ask: Query = given.to_ask()
        (reply,) = await self.answers.answer(engine, [ask], call.start + self.rules.deadline)
        if isinstance(reply, QueryError):
            raise refused(reply) from None
        assert isinstance(reply, Answers)  # of a single one, anything else was raised
        return orjson.dumps(
            self._said(reply, call.request_id, given.user, call.variant, call.model, call)
        )

    def _said(
        self,
        reply: Answers,
        request: str,
        user: str | None,
        variant: str,
        model: str,
        call: RequestContext,
    ) -> dict[str, Any]:
        if self.exposures is not None and call.exposed and reply.ids:
            self.exposures.shown(request, user, now(), reply.ids, variant, model, first=reply.first)
        if reply.fallback is not None:
            self.metrics.fallback(call.route, variant)
        return answer(reply, request, model, variant)

    # ------------------------------------------------------------------ items, users, events

    async def item(self, call: RequestContext, id: str) -> bytes:
        return await self._looked_up(call, "item", segment(id), None)

    async def user(self, call: RequestContext, id: str) -> bytes:
        user = segment(id)
        return await self._looked_up(call, "user", user, user)

    async def _looked_up(self, call: RequestContext, what: str, id: str, unit: str | None) -> bytes:
        no_parameters(call)
        call.variant, engine = self._engine(call, unit)
        call.model = version(engine)
        deadline = call.start + self.rules.deadline
        found = await asked(self.answers, lambda: getattr(engine, what)(id), deadline)
        return dumps(
            {
                "request_id": call.request_id,
                "model": call.model,
                "variant": call.variant,
                what: found,
            }
        )

    async def put_item(self, call: RequestContext, id: str) -> bytes:
        item, row = segment(id), read(ItemBody, await self._body(call)).root
        await self._write(call, lambda: self.living.put_item(item, row))
        return self._written(call, 1)

    async def delete_item(self, call: RequestContext, id: str) -> bytes:
        item = segment(id)
        if not await self._write(call, lambda: self.living.delete_item(item)):
            raise Refusal(Code.UNKNOWN_ITEM, f"There is no item {item!r} to delete.")
        return self._written(call, 1)

    async def events(self, call: RequestContext) -> bytes:
        moment = now()
        events = [
            Event(
                one.user, one.item, moment if one.time is None else one.time, one.event,
                one.strength, one.request, one.id,
            )
            for one in read(EventsRequest, await self._body(call)).events
        ]  # fmt: skip

        def work() -> None:
            # Here, so that the log for training has what the journal has: each event once, and
            # also those for which nobody waited to the end.
            new = self.living.post_events(events)
            if new and self.exposures is not None:
                self.exposures.events(new)

        await self._write(call, work, "send again with the same event ids")
        return self._written(call, len(events))

    async def _write(
        self, call: RequestContext, work: Callable[[], Any], again: str = "send it again"
    ) -> Any:
        no_parameters(call)
        try:
            return await asked(self.writes, work, call.start + self.rules.deadline)
        except Refusal as refusal:
            if refusal.code == Code.DEADLINE:
                # Whoever obeys a Retry-After takes it that nothing was done.
                refusal.retry = None
                refusal.message = f"Not written in time, perhaps later; it is safe to {again}."
            raise
        except (OSError, JournalError) as error:  # a full disk, a journal that is closed
            log.error("a write failed", exc_info=error)
            raise Refusal(Code.NOT_WRITTEN, "The journal could not be written.", retry=5) from error

    def _written(self, call: RequestContext, count: int) -> bytes:
        return orjson.dumps({"request_id": call.request_id, "written": count})

    # ------------------------------------------------------------------ the service itself

    async def model(self, call: RequestContext) -> bytes:
        no_parameters(call)
        variants = self.host.facts()
        engines = [self.host.choose(None, str(one["name"]))[1] for one in variants]
        facts = await asked(
            self.answers,
            lambda: [engine.facts() for engine in engines],
            call.start + self.rules.deadline,
        )
        models = [{**one, "engine": more} for one, more in zip(variants, facts, strict=True)]
        return dumps({"request_id": call.request_id, "models": models})

    async def live(self, call: RequestContext) -> bytes:
        return b'{"live":true}'

    async def ready(self, call: RequestContext) -> bytes:
        if not self.host.ready:
            raise Refusal(Code.NOT_READY, "No model is loaded yet.", retry=1)
        return b'{"ready":true}'


# --- forms ----------------------------------------------------------------------------------------


def version(engine: Any) -> str:
    """Version of the model that an engine answers with."""
    return str(engine.served.version)


def now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000


def answer(reply: Answers, request: str, model: str, variant: str) -> dict[str, Any]:
    """An answer as it goes out; the order of its keys is fixed."""
    scores = np.asarray(reply.scores, np.float64).round(6).tolist()
    items = [{"id": id, "score": score} for id, score in zip(reply.ids, scores, strict=True)]
    for name, values in (("fields", reply.fields), ("explanation", reply.explanations)):
        if values is not None:
            for item, value in zip(items, values, strict=True):
                item[name] = value
    return {
        "request_id": request,
        "model": model,
        "variant": variant,
        "fallback": reply.fallback,
        "items": items,
        "next": reply.next,
    }


def dumps(value: Any) -> bytes:
    """JSON of facts, which may hold NumPy's numbers; NaN becomes null."""
    return orjson.dumps(value, default=str, option=orjson.OPT_SERIALIZE_NUMPY)


def said(refusal: Refusal, request: str) -> dict[str, Any]:
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


def no_parameters(call: RequestContext) -> None:
    """Refuse a query string where there is nothing to say in it."""
    if call.scope["query_string"]:
        name = next(iter(parameters(call.scope["query_string"])), "")
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
