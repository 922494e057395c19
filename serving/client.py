"""Client of the service, without any dependency on the towers.

Imports neither torch nor polars: `import recsys.serving.client` takes some 60 ms.

    with Client("http://localhost:8100") as shop:
        for item in shop.similar("i00042", k=5, fields=["title"]):
            print(item.id, item.score, item.fields["title"])
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Required, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

from recsys.errors import RecsysError

T = TypeVar("T")


class ServiceError(RecsysError):
    """The service refused, or did not answer.

    Args:
        code: the service's own ("unknown_item", "rate_limited", …); "unreachable", "timeout" or
            "bad_answer" when nothing that the service said can be told; "invalid" also of what
            cannot be sent.
        message: a sentence for people.
        status: of HTTP; None: no answer came.
        request_id: finds the request in the service's log.
        retry_after: seconds after which the service wants to be asked again.
    """

    def __init__(
        self,
        code: str,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.status = code, message, status
        self.request_id, self.retry_after = request_id, retry_after


@dataclass(frozen=True)
class Item:
    """One answer.

    Args:
        id: external id.
        score: larger is better; None where the model gives none.
        fields: what the catalogue says, where it was asked for.
        explanation: what moved the score, where it was asked for.
    """

    id: str
    score: float | None
    fields: dict[str, Any] | None = None
    explanation: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """Items of one question, best first; iterates over them.

    Args:
        items: what was found.
        model: version of the model that answered.
        variant: which of the models side by side.
        fallback: what answered instead of what was asked for and why, or None.
        next: cursor of the next page; None: the last, or none was asked for.
        request_id: finds the request in the service's log.
    """

    items: list[Item]
    model: str
    variant: str
    fallback: str | None
    next: str | None
    request_id: str

    def __iter__(self) -> Iterator[Item]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> list[str]:
        """External ids of the items."""
        return [item.id for item in self.items]


class Filter(TypedDict, total=False):
    """What an answer must be like; all given conditions must hold.

    `equals`: column → any of these values; `ranges`: number column → [least, most], None is open;
    `allow`: only these ids; `deny`: never these.
    """

    equals: Mapping[str, Sequence[str | bool | int]]
    ranges: Mapping[str, Sequence[float | None]]
    allow: Sequence[str]
    deny: Sequence[str]


class Options(TypedDict, total=False):
    """What every question may say beside itself; see `GET /openapi.json`."""

    k: int
    filter: Filter
    fields: Sequence[str]
    exact: bool
    explain: bool
    paged: bool
    cursor: str | None
    diversity: float
    popularity: float


class Seen(Options, total=False):
    """And who sees the answer: decides the variant, and stands in the log."""

    user: str


class Question(Seen, total=False):
    """One of a batch: its kind, and what that kind needs."""

    kind: Required[Literal["similar", "recommend", "search", "vector"]]
    items: Sequence[str]
    drop_seen: bool
    history: Sequence[str]
    context: Mapping[str, str | float]
    text: str
    vector: Sequence[float]


class Event(TypedDict, total=False):
    """What a user did with an item.

    `time`: microseconds since 1970, now when absent; `event`: "click" when absent; `request`: the
    request id of the answer that showed the item; `id`: a new one when absent.
    """

    user: Required[str]
    item: Required[str]
    time: int
    event: str
    strength: float
    request: str
    id: str


class _Retry(urllib3.Retry):
    """Asks again what surely was not done: no connection, or a 429 or 503 that says when."""

    RETRY_AFTER_STATUS_CODES = frozenset([429, 503])


class Client:
    """Asks one service; safe to share between threads, which then share its connections.

    Args:
        url: of the service, such as "http://localhost:8100".
        key: API key, where the service wants one.
        timeout: seconds for connecting and for each wait for an answer.
        retries: how often a request is sent again when no connection could be made, or when the
            service said 429 or 503 with Retry-After (of which at most `timeout` is waited for).
        connections: kept open.
        variant: forces one of the models side by side; the service may want a write key for that.

    Raises:
        ServiceError: of every method: the service refused, or did not answer.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float = 5.0,
        retries: int = 2,
        connections: int = 10,
        variant: str | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Accept": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        if variant is not None:
            self._headers["X-Variant"] = variant
        self._pool = urllib3.PoolManager(
            num_pools=1,
            maxsize=connections,
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            retries=_Retry(
                total=retries, connect=retries, read=0, redirect=0, status=retries, other=0,
                allowed_methods=None, backoff_factor=0.05, raise_on_status=False,
                retry_after_max=max(1, int(timeout)),
            ),
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Client({self.url!r})"  # never the key

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._pool.clear()

    # ------------------------------------------------------------------ questions

    def similar(self, items: str | Sequence[str], **options: Unpack[Seen]) -> Answer:
        """Items like an item, or like several at once."""
        seeds = [items] if isinstance(items, str) else list(items)
        return self._ask("similar", {"items": seeds, **options})

    def recommend(
        self,
        user: str | None = None,
        history: Sequence[str] | None = None,
        context: Mapping[str, str | float] | None = None,
        drop_seen: bool = True,
        **options: Unpack[Options],
    ) -> Answer:
        """Items for a known user, or for anybody with this history, oldest first."""
        who = {"user": user, "history": history, "context": context, "drop_seen": drop_seen}
        return self._ask("recommendations", {**_given(who), **options})

    def search(self, text: str, **options: Unpack[Seen]) -> Answer:
        """Items that fit a text."""
        return self._ask("search", {"text": text, **options})

    def vector(self, vector: Sequence[float], **options: Unpack[Seen]) -> Answer:
        """Items nearest to a vector of the stored dimension."""
        return self._ask("vectors", {"vector": _plain(vector), **options})

    def batch(self, requests: Sequence[Question]) -> list[Answer | ServiceError]:
        """Several questions at once; each is answered, or has its error in its place."""
        plain = [
            {**request, "vector": _plain(request["vector"])} if "vector" in request else request
            for request in requests
        ]

        def read(said: Any) -> list[Answer | ServiceError]:
            answers = said["answers"]
            if len(answers) != len(plain):
                raise ValueError(f"{len(answers)} answers to {len(plain)} questions")
            return [_error(one, None) if "error" in one else _answer(one) for one in answers]

        return self._json("POST", "/v1/batch", read, {"requests": plain})

    # ------------------------------------------------------------------ items, users, events

    def item(self, id: str) -> dict[str, Any]:
        """What the catalogue says of an item."""
        return self._json("GET", _path("items", id), lambda said: dict(said["item"]))

    def put_item(self, id: str, item: Mapping[str, Any]) -> None:
        """Add an item, or replace it; it is on disk and findable when this returns."""
        self._json("PUT", _path("items", id), _written, item)

    def delete_item(self, id: str) -> bool:
        """Take an item out of all answers; whether there was one."""
        try:
            self._json("DELETE", _path("items", id), _written)
        except ServiceError as error:
            if error.code != "unknown_item":
                raise
            return False
        return True

    def post_events(self, events: Sequence[Event]) -> int:
        """Tell what users did; how many events are on disk now.

        An event without an `id` is given one: the same one sent twice counts once, so that asking
        again after no answer does no harm. To send events again yourself, give them ids.
        """
        named = [
            event if event.get("id") is not None else {**event, "id": uuid.uuid4().hex}
            for event in events
        ]
        return self._json("POST", "/v1/events", _written, {"events": named})

    def user(self, id: str) -> dict[str, Any]:
        """What is known of a user: the history, posted events."""
        return self._json("GET", _path("users", id), lambda said: dict(said["user"]))

    # ------------------------------------------------------------------ the service itself

    def model(self) -> list[dict[str, Any]]:
        """Facts of each of the models that answer."""
        return self._json("GET", "/v1/model", lambda said: [dict(one) for one in said["models"]])

    def live(self) -> bool:
        """Whether the process answers at all; False also when nothing can be reached."""
        return self._well("/v1/live")

    def ready(self) -> bool:
        """Whether a model is loaded; False also when nothing can be reached."""
        return self._well("/v1/ready")

    def _well(self, path: str) -> bool:
        try:
            return self._send("GET", path, retries=False)[0].status == 200
        except ServiceError:
            return False

    # ------------------------------------------------------------------ the wire

    def _ask(self, route: str, question: Mapping[str, Any]) -> Answer:
        return self._json("POST", f"/v1/{route}", _answer, _given(question))

    def _json(
        self,
        method: str,
        path: str,
        read: Callable[[Any], T],
        body: Mapping[str, Any] | None = None,
    ) -> T:
        """What `read` makes of the answer; where it cannot, another than the service answered."""
        response, request_id = self._send(method, path, body)
        text = response.data
        try:
            said = json.loads(text) if text else {}
        except ValueError:
            said = None
        if response.status >= 400 or not isinstance(said, dict):
            raise _error(said, response.status, request_id, text, response.headers)
        try:
            return read(said)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _error(None, response.status, request_id, text) from error

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        retries: Literal[False] | None = None,
    ) -> tuple[urllib3.BaseHTTPResponse, str]:
        request_id = uuid.uuid4().hex
        headers = {**self._headers, "X-Request-ID": request_id}
        encoded = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            try:
                encoded = json.dumps(body, allow_nan=False).encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise ServiceError(
                    "invalid", f"This cannot be sent as JSON: {error}.", request_id=request_id
                ) from error
        try:
            response = self._pool.request(
                method, self.url + path, body=encoded, headers=headers, retries=retries
            )
        except HTTPError as error:
            cause = error.reason if isinstance(error, MaxRetryError) else error
            slow = isinstance(cause, ReadTimeoutError)
            raise ServiceError(
                "timeout" if slow else "unreachable",
                f"{self.url} did not answer {method} {path}: {cause}",
                request_id=request_id,
            ) from error
        return response, response.headers.get("X-Request-ID", request_id)


def _path(kind: str, id: str) -> str:
    try:
        # A lone dot would be taken for a folder of the path and vanish.
        return f"/v1/{kind}/{quote(id, safe='').replace('.', '%2E')}"
    except UnicodeEncodeError as error:
        raise ServiceError("invalid", f"The id {id!r} is no valid Unicode.") from error


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _plain(vector: Any) -> list[float]:
    return vector.tolist() if hasattr(vector, "tolist") else list(vector)


def _written(said: Any) -> int:
    return int(said["written"])


def _answer(said: Any) -> Answer:
    items = [
        Item(i["id"], i["score"], i.get("fields"), i.get("explanation")) for i in said["items"]
    ]
    return Answer(
        items, said["model"], said["variant"], said["fallback"], said["next"], said["request_id"]
    )


def _error(
    said: Any,
    status: int | None,
    request_id: str | None = None,
    text: bytes = b"",
    headers: Mapping[str, str] | None = None,
) -> ServiceError:
    error = said.get("error") if isinstance(said, dict) else None
    if not isinstance(error, dict):
        # Not of the service: a proxy between, or another server at that address.
        words = text[:200].decode("utf-8", "replace")
        return ServiceError("bad_answer", f"Status {status}: {words}", status, request_id)
    after = (headers or {}).get("Retry-After")
    return ServiceError(
        str(error.get("code")),
        str(error.get("message")),
        status,
        error.get("request_id") or request_id,
        float(after) if after and after.isdecimal() else None,
    )
