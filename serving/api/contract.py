"""Routes of the service, and their OpenAPI document."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from recsys.serving.api import schemas as wire
from recsys.serving.api.auth import Role
from recsys.serving.api.schemas import STATUS, Code

VERSION = "1.0.0"
ABOUT = """\
Similar items, recommendations and search over a two-tower model.

Every error has one form, `{"error": {"code", "message", "request_id"}}`, and its code never changes
its meaning. An id in a path is percent-encoded, `/` too. `X-Request-ID` (up to 64 visible ASCII
characters without quotes) is taken over into answer, log and impressions; otherwise one is made.
`X-Variant` names the variant that answers, for those who may write. `X-Exposure: none` says that no
user is shown the answer, so that it is not written down as shown.
"""

ANY = (Code.BAD_REQUEST, Code.NO_KEY, Code.FORBIDDEN, Code.NOT_FOUND, Code.METHOD, Code.LONG_URL,
       Code.HEADERS, Code.INTERNAL, Code.OVERLOADED, Code.DEADLINE, Code.NOT_READY)  # fmt: skip
BODY = (Code.BAD_JSON, Code.INVALID, Code.TIMEOUT, Code.TOO_LARGE, Code.MEDIA)
QUESTION = (Code.INVALID, Code.BAD_QUERY, Code.BAD_CURSOR, Code.STALE_CURSOR)
WRITE = (Code.NOT_WRITTEN, Code.BAD_QUERY)


@dataclass(frozen=True)
class Operation:
    """One route.

    Args:
        method, path: of HTTP.
        name: of the method of `Handlers` that does it; the route in metrics and logs.
        said: one sentence.
        answer: form of the answer; None: text.
        role: which key may; None: everybody.
        body: form of the body.
        codes: errors beside those of any route.
        query: form whose fields may stand in the query string.
    """

    method: Literal["GET", "POST", "PUT", "DELETE"]
    path: str
    name: str
    said: str
    answer: type[BaseModel] | None
    role: Role | None = "read"
    body: type[BaseModel] | None = None
    codes: tuple[Code, ...] = ()
    query: type[BaseModel] | None = None

    def documented(self) -> dict[str, Any]:
        """What FastAPI is told of the route."""
        codes = set(self.codes) | set(ANY) | (set(BODY) if self.body else set())
        if self.role is not None and self.name != "metrics":  # whoever watches is not bounded
            codes.add(Code.RATE)
        by_status: dict[int, list[str]] = {}
        for code in sorted(codes):
            by_status.setdefault(STATUS[code], []).append(code.value)
        responses: dict[int | str, dict[str, Any]] = {
            status: _holds(wire.ErrorBody, " or ".join(names))
            for status, names in sorted(by_status.items())
        }
        for status in responses.keys() & {429, 503}:
            responses[status]["headers"] = {
                "Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}
            }
        responses[200] = {
            "description": "Done.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }
        if self.answer is not None:
            responses[200] = _holds(self.answer, "Done.")
        extra: dict[str, Any] = {"parameters": self._parameters()}
        if self.body is not None:
            content = _holds(self.body, "")["content"]
            extra["requestBody"] = {"required": True, "content": content}
        if self.role is None:
            extra["security"] = []
        return {
            "operation_id": self.name,
            "summary": self.said,
            "responses": responses,
            "openapi_extra": extra,
        }

    def _parameters(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if "{id}" in self.path:
            schema = {"type": "string", "minLength": 1, "maxLength": wire.MAX_ID}
            found.append({"name": "id", "in": "path", "required": True, "schema": schema})
        if self.query is not None:
            found += _query(self.query, taken="user" if "/users/" in self.path else "")
        return found


def _holds(model: type[BaseModel], said: str) -> dict[str, Any]:
    # By reference: FastAPI would build a validator for each of some two hundred responses.
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"description": said, "content": {"application/json": {"schema": schema}}}


def _query(model: type[BaseModel], taken: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, schema in model.model_json_schema()["properties"].items():
        if name == "filter" or name == taken:
            continue
        # A parameter is given or not; it is never null.
        for one in schema.get("anyOf", ()):
            if one.get("type") != "null":
                schema = {k: v for k, v in schema.items() if k not in ("anyOf", "default")} | one
        said = schema.pop("description", "")
        schema.pop("title", None)
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        if schema.get("type") == "array":
            parameter |= {"style": "form", "explode": False}
        found.append(parameter | {"description": said})
    equals = {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 32}
    found.append(
        {
            "name": "equals", "in": "query", "required": False, "style": "form", "explode": True,
            "schema": equals,
            "description": "Any other name is a catalogue column that must have one of the values "
            "given: `category=tea&category=coffee`.",
        }
    )  # fmt: skip
    return found


_ITEM, _USER = "/v1/items/{id}", "/v1/users/{id}"
OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", f"{_ITEM}/similar", "similar_of", "Items like an item.",
              wire.Answer, codes=QUESTION, query=wire.Options),
    Operation("POST", "/v1/similar", "similar", "Items like one or several others.",
              wire.Answer, body=wire.SimilarRequest, codes=QUESTION),
    Operation("GET", f"{_USER}/recommendations", "recommendations_of", "Items for a known user.",
              wire.Answer, codes=QUESTION, query=wire.Options),
    Operation("POST", "/v1/recommendations", "recommend", "Items for a user or for a history.",
              wire.Answer, body=wire.RecommendRequest, codes=QUESTION),
    Operation("POST", "/v1/search", "search", "Items by a text.",
              wire.Answer, body=wire.SearchRequest, codes=QUESTION),
    Operation("POST", "/v1/vectors", "vectors", "Items near a vector.",
              wire.Answer, body=wire.VectorRequest, codes=QUESTION),
    Operation("POST", "/v1/batch", "batch", "Several questions of any kind.",
              wire.BatchAnswer, body=wire.BatchRequest, codes=(Code.BAD_QUERY,)),
    Operation("GET", _ITEM, "item", "What is known of an item.",
              wire.ItemAnswer, codes=(Code.UNKNOWN_ITEM, Code.INVALID, Code.BAD_QUERY)),
    Operation("PUT", _ITEM, "put_item", "Add or replace an item; it is findable at once.",
              wire.Written, "write", wire.ItemBody, WRITE),
    Operation("DELETE", _ITEM, "delete_item", "Take an item out of all answers.",
              wire.Written, "write", None, (*WRITE, Code.UNKNOWN_ITEM, Code.INVALID)),
    Operation("POST", "/v1/events", "events", "What users did; it counts at once.",
              wire.Written, "write", wire.EventsRequest, WRITE),
    Operation("GET", _USER, "user", "What is known of a user.",
              wire.UserAnswer, codes=(Code.INVALID, Code.BAD_QUERY)),
    Operation("GET", "/v1/model", "model", "Which models answer.",
              wire.ModelAnswer, codes=(Code.INVALID,)),
    Operation("GET", "/v1/live", "live", "Whether the process answers.", wire.Live, None),
    Operation("GET", "/v1/ready", "ready", "Whether a model is loaded.", wire.Ready, None),
    Operation("GET", "/metrics", "metrics", "Counts in the text form of Prometheus.", None),
)  # fmt: skip


@cache
def openapi() -> dict[str, Any]:
    """The whole contract, forms of bodies included; no model is loaded for it."""

    async def endpoint() -> None:
        """Documented, and never called: the routes of the service are in app.py."""

    routes = [
        APIRoute(one.path, endpoint, methods=[one.method], **one.documented()) for one in OPERATIONS
    ]
    schema = get_openapi(title="recsys", version=VERSION, description=ABOUT, routes=routes)
    components = schema.setdefault("components", {})
    forms = {one for each in OPERATIONS for one in (each.body, each.answer)} | {wire.ErrorBody}
    _, definitions = models_json_schema(
        [(form, "validation") for form in forms if form is not None],
        ref_template="#/components/schemas/{model}",
    )
    components.setdefault("schemas", {}).update(definitions["$defs"])
    components["schemas"] = dict(sorted(components["schemas"].items()))
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    # Without keys reading is free, so none is asked for in every case.
    schema["security"] = [{}, {"bearer": []}, {"key": []}]
    return schema
