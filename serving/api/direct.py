"""Quick questions with a body, answered where they come in, without a task.

For one asker at a time: where several ask at once, the general way takes their questions together,
which serves each of them sooner. Whatever is unusual makes a question not direct: the general way
answers it, or says what is wrong.
"""

from __future__ import annotations

import logging

import orjson
from polars.exceptions import PanicException

from recsys.errors import QueryError
from recsys.serving.api.batcher import quick
from recsys.serving.api.guard import Headers
from recsys.serving.api.handlers import Handlers, answer, now, version
from recsys.serving.api.hot import Hot, HotAnswer
from recsys.serving.api.schemas import Options, RecommendRequest, Refusal, VectorRequest, read

log = logging.getLogger("recsys.serve")

QUESTIONS: dict[bytes, tuple[str, type[Options]]] = {
    b"/v1/recommendations": ("recommend", RecommendRequest),
    b"/v1/vectors": ("vectors", VectorRequest),
}
MOST_BYTES = 64 << 10
"""Of a body; a larger one is not quick to read."""
HEADERS = frozenset(
    {
        b"host", b"content-type", b"content-length", b"x-request-id", b"user-agent", b"accept",
        b"accept-encoding", b"connection", b"authorization", b"x-api-key",
    }
)  # fmt: skip
"""Headers that a direct question may have."""


class Direct:
    """The direct way of a service.

    Args:
        operations: what the general way would ask.
        hot: knows what makes the head of a request usual.
    """

    def __init__(self, operations: Handlers, hot: Hot) -> None:
        self._operations, self._hot = operations, hot
        self._last = 0  # who asked last

    def turn(self, who: int) -> bool:
        """Whether the same connection asked last, so that nobody else asks just now."""
        alone, self._last = self._last == who, who
        return alone

    def may(self, path: bytes, query: bytes, headers: Headers) -> bool:
        """Whether a question may be answered here once its body is there."""
        return (
            path in QUESTIONS
            and not query
            and self._operations.answers.idle
            and all(
                name in HEADERS
                and (name != b"content-length" or _small(value))
                and (name != b"content-type" or value == b"application/json")
                for name, value in headers
            )
            and sum(name == b"content-type" for name, _ in headers) == 1
        )

    def answer(self, path: bytes, headers: Headers, body: bytes) -> HotAnswer | None:
        """The answer to a POST that `may` be answered here; None: ask the general way."""
        try:
            return self._answer(path, headers, body)
        except (Refusal, QueryError):
            return None  # the general way says why
        except (Exception, PanicException):  # the general way may know better; at worst it says so
            log.exception("a direct answer failed")
            return None

    def _answer(self, path: bytes, headers: Headers, body: bytes) -> HotAnswer | None:
        behind = self._operations
        # The length is that of a body that is here; nothing else of a body makes it unusual.
        head = self._hot.head([header for header in headers if header[0] != b"content-length"])
        if head is None:
            return None
        request_id, key = head
        route, form = QUESTIONS[path]
        asked = read(form, body)
        ask = asked.to_ask()
        if not quick(ask) or (behind.rates is not None and behind.rates.wait(key)):
            return None
        variant, engine = behind.host.choose(asked.user)
        # What is written down as shown names the user, if there is one.
        nameless = behind.exposures is None or asked.user is None
        if nameless and (items := engine.answer_fast(ask)) is not None:
            if behind.rates is not None:
                behind.rates.charge(key, 1)
            return self._hot.wrapped(items, route, request_id, variant, engine)
        (reply,) = engine.answer((ask,))
        if isinstance(reply, QueryError):
            return None
        if behind.rates is not None:
            behind.rates.charge(key, 1)  # only now: what is left to the general way pays there
        model, request = version(engine), request_id.decode("ascii")
        if behind.exposures is not None and reply.ids:
            behind.exposures.shown(request, asked.user, now(), reply.ids, variant, model)
        if reply.fallback is not None:
            behind.metrics.fallback(route, variant)
        content = orjson.dumps(answer(reply, request, model, variant))
        return HotAnswer(content, request_id, behind.metrics.of(route, 200, variant), route)


def _small(length: bytes) -> bool:
    return length.isdigit() and len(length) <= 8 and int(length) <= MOST_BYTES
