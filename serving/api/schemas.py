"""Pydantic models of requests and answers, their bounds, and error codes.

Requests are read from JSON bytes in strict mode: no text becomes a number, no key is ignored, no
number is infinite. What a schema cannot say (totals over several lists) is checked after it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

from recsys.serving.engine.query import Filter, Query

MAX_K = 1000
MAX_HISTORY = 1000
MAX_ID = 256
MAX_TEXT = 2_000
MAX_BATCH = 256
MAX_BATCH_K = 10_000
MAX_EVENTS = 1000
MAX_CLAUSES = 32
MAX_FILTER_IDS = 10_000
MAX_VECTOR = 4096
MAX_FIELDS = 64


class Code(StrEnum):
    """What an error is called; a code never changes its meaning."""

    BAD_REQUEST = "bad_request"  # 400 not HTTP, a bad path, header or query string
    BAD_JSON = "bad_json"  # 400 the body is no JSON in UTF-8
    INVALID = "invalid"  # 400 JSON that the schema does not allow
    BAD_QUERY = "bad_query"  # 400 well-formed, but this model cannot answer it
    BAD_CURSOR = "bad_cursor"  # 400 a cursor that was never one of ours, or of another question
    NO_KEY = "no_key"  # 401 a key is needed
    FORBIDDEN = "forbidden"  # 403 the key, or the service, does not allow it
    UNKNOWN_ITEM = "unknown_item"  # 404
    NOT_FOUND = "not_found"  # 404 no such path
    METHOD = "method_not_allowed"  # 405
    TIMEOUT = "timeout"  # 408 the request took too long to arrive
    STALE_CURSOR = "stale_cursor"  # 410 the model was replaced since; begin at the first page
    TOO_LARGE = "too_large"  # 413
    LONG_URL = "uri_too_long"  # 414
    MEDIA = "unsupported_media_type"  # 415
    RATE = "rate_limited"  # 429 this caller asks too often; nothing was done
    HEADERS = "headers_too_large"  # 431
    INTERNAL = "internal"  # 500 our mistake
    OVERLOADED = "overloaded"  # 503 the queue is full
    DEADLINE = "deadline"  # 503 not done in time
    NOT_READY = "not_ready"  # 503 no model is loaded
    NOT_WRITTEN = "not_written"  # 503 the journal could not be written


STATUS: dict[Code, int] = {
    Code.BAD_REQUEST: 400, Code.BAD_JSON: 400, Code.INVALID: 400, Code.BAD_QUERY: 400,
    Code.BAD_CURSOR: 400, Code.NO_KEY: 401, Code.FORBIDDEN: 403, Code.UNKNOWN_ITEM: 404,
    Code.NOT_FOUND: 404, Code.METHOD: 405, Code.TIMEOUT: 408, Code.STALE_CURSOR: 410,
    Code.TOO_LARGE: 413, Code.LONG_URL: 414, Code.MEDIA: 415, Code.RATE: 429,
    Code.HEADERS: 431, Code.INTERNAL: 500, Code.OVERLOADED: 503, Code.DEADLINE: 503,
    Code.NOT_READY: 503, Code.NOT_WRITTEN: 503,
}  # fmt: skip


class Refusal(Exception):
    """A request that is not done, with what its sender is told.

    Args:
        code: its status follows from it.
        message: what is wrong and the way out.
        retry: seconds after which to try again, as Retry-After.
        close: whether the connection cannot be used any more.
    """

    def __init__(
        self, code: Code, message: str, *, retry: int | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.retry, self.close = code, message, retry, close


# --- requests -------------------------------------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID, examples=["i00042"])]
Column = Annotated[str, Field(min_length=1, max_length=MAX_ID, examples=["category"])]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]  # what every JSON reader reads alike
Word = Annotated[str, Field(max_length=MAX_TEXT)]
# Far beyond any stored vector, and its products still fit into float32.
Coordinate = Annotated[float, Field(ge=-1e9, le=1e9)]
Number = Annotated[float, Field(ge=-1e18, le=1e18)]


class FilterBody(Strict):
    """What the answers must be like; all given conditions hold."""

    equals: dict[
        Column, Word | bool | Whole | Annotated[list[Word | bool | Whole], Field(max_length=256)]
    ] = Field(default_factory=dict, max_length=MAX_CLAUSES, description="Any of these values.")
    ranges: dict[Column, Annotated[list[Number | None], Field(min_length=2, max_length=2)]] = Field(
        default_factory=dict,
        max_length=MAX_CLAUSES,
        description="[from, to], both included; null: open. Times in seconds since 1970.",
    )
    allow: Annotated[list[Id], Field(max_length=MAX_FILTER_IDS)] | None = Field(
        None, description="Only these items."
    )
    deny: list[Id] = Field(
        default_factory=list, max_length=MAX_FILTER_IDS, description="Never these items."
    )

    @model_validator(mode="after")
    def _bounded(self) -> FilterBody:
        if len(self.equals) + len(self.ranges) > MAX_CLAUSES:
            raise ValueError(f"a filter has at most {MAX_CLAUSES} conditions")
        if len(self.allow or ()) + len(self.deny) > MAX_FILTER_IDS:
            raise ValueError(f"allow and deny have at most {MAX_FILTER_IDS:,} ids together")
        return self

    def to_filter(self) -> Filter:
        return Filter(
            {
                name: tuple(values) if isinstance(values, list) else (values,)
                for name, values in self.equals.items()
            },
            {name: (bounds[0], bounds[1]) for name, bounds in self.ranges.items()},
            None if self.allow is None else tuple(self.allow),
            tuple(self.deny),
        )


class Options(Strict, ABC):
    """What every question may say about its answers."""

    k: int = Field(10, ge=1, le=MAX_K, description="Answers wanted.")
    filter: FilterBody | None = None
    fields: Annotated[list[Column], Field(max_length=MAX_FIELDS)] | None = Field(
        None, description='Catalogue columns to tell of each answer; ["*"]: all.'
    )
    exact: bool = Field(False, description="Search exactly even where a graph would do.")
    paged: bool = Field(False, description="Give a cursor for the next page.")
    cursor: Annotated[str, Field(min_length=1, max_length=4096)] | None = Field(
        None, description="The `next` of the page before; the rest of the question as it was."
    )
    diversity: float = Field(0.0, ge=0, le=1, description="0: by score alone; 1: by difference.")
    popularity: float = Field(0.0, ge=-1, le=1, description="Towards popular items, or away.")
    explain: bool = Field(False, description="Say of each answer what moved its score.")
    drop_seen: bool = Field(True, description="Recommendations: leave out what the user had.")
    user: Id | None = Field(
        None, description="Who sees the answers: decides the variant, and stands in the log."
    )

    def common(self) -> dict[str, Any]:
        given: dict[str, Any] = {} if self.filter is None else {"filter": self.filter.to_filter()}
        return given | {
            "k": self.k,
            "fields": None if self.fields is None else tuple(self.fields),
            "exact": self.exact,
            "paged": self.paged,
            "cursor": self.cursor,
            "diversity": self.diversity,
            "popularity": self.popularity,
            "explain": self.explain,
            "drop_seen": self.drop_seen,
        }

    @abstractmethod
    def to_query(self) -> Query:
        """The question that is asked."""


class SimilarRequest(Options):
    """Items like one or several others."""

    items: list[Id] = Field(min_length=1, max_length=MAX_HISTORY)

    def to_query(self) -> Query:
        return Query("similar", items=tuple(self.items), **self.common())


class RecommendRequest(Options):
    """Items for a known user, or for anybody with a history."""

    user: Id | None = Field(None, description="External id.")
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = Field(
        None, description="Oldest first; counts instead of what is known of the user."
    )
    context: dict[Column, Word | Number] = Field(
        default_factory=dict, max_length=MAX_FIELDS, description="Device, hour, …"
    )

    def to_query(self) -> Query:
        return Query(
            "recommend",
            user=self.user,
            history=None if self.history is None else tuple(self.history),
            context=self.context,
            **self.common(),
        )


class SearchRequest(Options):
    """Items by a text."""

    text: str = Field(min_length=1, max_length=MAX_TEXT)

    def to_query(self) -> Query:
        return Query("search", text=self.text, **self.common())


class VectorRequest(Options):
    """Items near a vector of one's own."""

    vector: list[Coordinate] = Field(
        min_length=1, max_length=MAX_VECTOR, description="As many numbers as /v1/model says."
    )

    def to_query(self) -> Query:
        return Query("vector", vector=np.array(self.vector, np.float32), **self.common())


class BatchSimilar(SimilarRequest):
    kind: Literal["similar"]


class BatchRecommend(RecommendRequest):
    kind: Literal["recommend"]


class BatchSearch(SearchRequest):
    kind: Literal["search"]


class BatchVector(VectorRequest):
    kind: Literal["vector"]


AnyRequest = Annotated[
    BatchSimilar | BatchRecommend | BatchSearch | BatchVector, Field(discriminator="kind")
]


class BatchRequest(Strict):
    """Several questions; each is answered, or has an error in its place."""

    requests: list[AnyRequest] = Field(min_length=1, max_length=MAX_BATCH)

    @model_validator(mode="after")
    def _bounded(self) -> BatchRequest:
        if (total := sum(one.k for one in self.requests)) > MAX_BATCH_K:
            raise ValueError(f"all k together are {total:,}; at most {MAX_BATCH_K:,} in a batch")
        return self


Cell = (
    Annotated[str, Field(max_length=20_000)]
    | bool
    | Whole
    | Number
    | Annotated[list[Word], Field(max_length=256)]
    | None
)


class ItemBody(RootModel[dict[Column, Cell]]):
    """What is known of an item, by column name of the catalogue."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)
    root: dict[Column, Cell] = Field(
        max_length=256, examples=[{"title": "A brass desk lamp", "category": "lamps"}]
    )


class EventBody(Strict):
    """One event of a user with an item."""

    user: Id
    item: Id
    time: int | None = Field(
        None, ge=0, le=253_402_300_799_999_999, description="Microseconds since 1970; null: now."
    )
    event: str = Field("click", min_length=1, max_length=64)
    strength: float = Field(1.0, ge=0, le=1e6)
    request: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        None, description="The request_id of the answer that showed the item."
    )
    id: Id | None = Field(None, description="The same id twice counts once.")


class EventsRequest(Strict):
    events: list[EventBody] = Field(min_length=1, max_length=MAX_EVENTS)


# --- answers --------------------------------------------------------------------------------------


class Answered(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AnswerItem(Answered):
    id: str
    score: float | None
    fields: dict[str, Any] = Field(default_factory=dict, description="Where asked for.")
    explanation: dict[str, Any] = Field(default_factory=dict, description="Where asked for.")


class Answer(Answered):
    request_id: str
    model: str = Field(description="Version of the model that answered.")
    variant: str
    fallback: str | None = Field(description="What answered instead of what was asked, and why.")
    items: list[AnswerItem]
    next: str | None = Field(description="Cursor of the next page.")


class ErrorDetail(Answered):
    code: Code
    message: str
    request_id: str


class ErrorBody(Answered):
    error: ErrorDetail


class BatchAnswer(Answered):
    request_id: str
    answers: list[Answer | ErrorBody]


class ItemAnswer(Answered):
    request_id: str
    model: str
    variant: str
    item: dict[str, Any]


class UserAnswer(Answered):
    request_id: str
    model: str
    variant: str
    user: dict[str, Any]


class ModelAnswer(Answered):
    request_id: str
    models: list[dict[str, Any]] = Field(description="Of each variant: facts of host and engine.")


class Written(Answered):
    request_id: str
    written: int = Field(description="How many items or events are on disk now.")


class Live(Answered):
    live: Literal[True]


class Ready(Answered):
    ready: Literal[True]


# --- reading --------------------------------------------------------------------------------------

M = TypeVar("M", bound=BaseModel)


def read(model: type[M], body: bytes) -> M:
    """A request from the bytes of its body.

    Raises:
        Refusal: no JSON, or not what the schema says; the place is named, the value is not.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> Refusal:
    """What the sender of a request is told that does not fit its schema."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return Refusal(Code.BAD_JSON, f"The body is not JSON in UTF-8: {found[0]['msg']}"[:500])
    parts = []
    for one in found[:3]:
        place = ".".join(str(step)[:40] for step in one["loc"]) or "the body"
        parts.append(f"{place}: {one['msg'].removeprefix('Value error, ')}")
    more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
    return Refusal(Code.INVALID, ("; ".join(parts) + more)[:1000])


def check(model: type[M], values: Mapping[str, Any]) -> M:
    """A request from values that were read from a query string."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise refusal(error) from None
