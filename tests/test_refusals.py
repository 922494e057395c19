"""What the service refuses: wrong addresses, bodies and heads, and what a key does not open."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from service_cases import ITEM, OPEN, FakeHost, FakeUpdates, ask
from service_cases import app as app
from service_cases import host as host
from service_cases import impressions as impressions
from service_cases import updates as updates

from recsys.serving.api.app import ServiceRules, make_app
from recsys.serving.api.auth import Keys, make_key


@pytest.mark.parametrize(
    ("method", "target", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "not_found"),
        ("GET", "/v1/items//similar", 404, "not_found"),
        ("POST", "/v1/model", 405, "method_not_allowed"),
        ("GET", "/v1/items/i1/similar?k=0", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?k=1001", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?k=ten", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?k=1_0", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?k=1&k=2", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?diversity=nan", 400, "invalid"),
        ("GET", "/v1/items/i1/similar?exact=yes", 400, "invalid"),
        ("GET", "/v1/items/%FF/similar", 400, "bad_request"),
        ("GET", "/v1/items/%zz/similar", 400, "bad_request"),
        ("GET", "/v1/items/i1/similar?a=%FF", 400, "bad_request"),
        ("GET", "/v1/users/u/recommendations?user=v", 400, "invalid"),
        ("GET", "/v1/users/u?x=1", 400, "invalid"),
        ("GET", "/v1/items/" + "a" * 257, 400, "invalid"),
        ("GET", "/v1/items/" + "a" * 9000, 414, "uri_too_long"),
        (
            "GET",
            "/v1/items/i/similar?" + "&".join(f"c{j}=1" for j in range(65)),
            400,
            "bad_request",
        ),
        ("GET", "/v1/items/i/similar?" + "&".join(f"c{j}=1" for j in range(33)), 400, "invalid"),
    ],
)
def test_wrong_addresses_have_codes(
    app: Any, method: str, target: str, status: int, code: str
) -> None:
    got = ask(app, method, target)
    assert (got.status, got.code) == (status, code)


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("similar", b"{", "bad_json"),
        ("similar", b"", "bad_json"),
        ("similar", b"\xff\xfe", "bad_json"),
        ("similar", b'{"items":["\xff"]}', "bad_json"),
        ("similar", b'{"items":["\\ud800"]}', "bad_json"),
        ("similar", b"[" * 100_000, "bad_json"),
        ("similar", b'{"items":' + b'{"a":' * 5000 + b"}" * 5001, "bad_json"),
        ("similar", [], "invalid"),
        ("similar", {}, "invalid"),
        ("similar", {"items": []}, "invalid"),
        ("similar", {"items": "i1"}, "invalid"),
        ("similar", {"items": [1]}, "invalid"),
        ("similar", {"items": [""]}, "invalid"),
        ("similar", {"items": ["a" * 257]}, "invalid"),
        ("similar", {"items": ["a"] * 1001}, "invalid"),
        ("similar", {"items": ["a"], "k": "10"}, "invalid"),
        ("similar", {"items": ["a"], "k": 10.5}, "invalid"),
        ("similar", {"items": ["a"], "k": True}, "invalid"),
        ("similar", {"items": ["a"], "k": 1001}, "invalid"),
        ("similar", {"items": ["a"], "kk": 1}, "invalid"),
        ("similar", b'{"items":["a"],"diversity":NaN}', "invalid"),
        ("similar", b'{"items":["a"],"popularity":Infinity}', "invalid"),
        ("similar", {"items": ["a"], "filter": {"ranges": {"p": [1]}}}, "invalid"),
        ("similar", {"items": ["a"], "filter": {"ranges": {"p": ["1", None]}}}, "invalid"),
        ("similar", {"items": ["a"], "filter": {"equals": {"c": {}}}}, "invalid"),
        ("similar", {"items": ["a"], "filter": {"deny": ["x"] * 10_001}}, "invalid"),
        (
            "similar",
            {"items": ["a"], "filter": {"allow": ["x"] * 6000, "deny": ["x"] * 6000}},
            "invalid",
        ),
        (
            "similar",
            {
                "items": ["a"],
                "filter": {
                    "equals": {f"c{j}": "x" for j in range(20)},
                    "ranges": {f"c{j}": [0, 1] for j in range(20)},
                },
            },
            "invalid",
        ),
        ("recommendations", {"history": ["a"] * 1001}, "invalid"),
        ("recommendations", {"context": {"a": None}}, "invalid"),
        ("search", {"text": "x" * 2001}, "invalid"),
        ("search", {"text": ""}, "invalid"),
        ("vectors", b'{"vector":[1e400]}', "invalid"),
        ("vectors", b'{"vector":[1e39]}', "invalid"),
        ("vectors", {"vector": []}, "invalid"),
        ("vectors", {"vector": ["1"]}, "invalid"),
        ("batch", {"requests": []}, "invalid"),
        ("batch", {"requests": [{"kind": "search", "text": "x"}] * 257}, "invalid"),
        ("batch", {"requests": [{"kind": "search", "text": "x", "k": 1000}] * 11}, "invalid"),
        ("batch", {"requests": [{"kind": "delete", "text": "x"}]}, "invalid"),
        ("events", {"events": [{"user": "u", "item": "i"}] * 1001}, "invalid"),
        ("events", {"events": [{"user": "u", "item": "i", "time": -1}]}, "invalid"),
        ("events", {"events": [{"user": "u", "item": "i", "strength": -1}]}, "invalid"),
    ],
)
def test_wrong_bodies_are_refused_before_any_engine_sees_them(
    app: Any, host: FakeHost, path: str, body: Any, code: str
) -> None:
    got = ask(app, "POST", f"/v1/{path}", body)
    assert (got.status, got.code) == (400, code)
    assert len(got.body) < 2000
    assert host.engines["a"].sizes == []


def test_a_refusal_names_the_place(app: Any) -> None:
    got = ask(app, "POST", "/v1/similar", {"items": ["a", 3], "k": 0})
    message = got.json()["error"]["message"]
    assert "items.1: " in message
    assert "k: Input should be greater than or equal to 1" in message


def test_large_bodies_stop_at_the_bound_with_and_without_a_length(app: Any) -> None:
    big = b" " * ((1 << 20) + 1)
    got = ask(app, "POST", "/v1/similar", big)
    assert (got.status, got.code, got.headers["connection"]) == (413, "too_large", "close")
    got = ask(app, "POST", "/v1/similar", parts=[b" " * 400_000] * 5)
    assert (got.status, got.code) == (413, "too_large")
    lies = {"content-length": "9" * 5000}
    assert ask(app, "POST", "/v1/similar", b"{}", headers=lies).code == "too_large"
    got = ask(app, "POST", "/v1/similar", parts=[b'{"items"', b':["i1"],"k":1}'])
    assert got.json()["items"] == [ITEM]


def test_bodies_that_are_not_announced_as_json_are_refused(app: Any) -> None:
    for headers in ({"content-type": "text/plain"}, {"content-encoding": "gzip"}):
        got = ask(app, "POST", "/v1/events", {"events": []}, headers=headers)
        assert (got.status, got.code) == (415, "unsupported_media_type")


def test_a_slow_body_is_not_waited_for(host: FakeHost) -> None:
    app = make_app(host, rules=ServiceRules(body_seconds=0.05))

    async def slow() -> Any:
        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.02)
            return {"type": "http.request", "body": b" ", "more_body": True}

        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/search", "raw_path": b"/v1/search",
            "query_string": b"", "headers": headers, "root_path": "",
        }  # fmt: skip
        await app(scope, receive, send)
        return sent

    start, content = asyncio.run(slow())
    assert start["status"] == 408
    assert json.loads(content["body"])["error"]["code"] == "timeout"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, 'a"b', "a\\b", "é"])
def test_a_request_id_that_is_not_sane_is_replaced(app: Any, given: str) -> None:
    for target in ("/v1/items/i1/similar", "/v1/model"):
        got = ask(app, "GET", target, headers={"x-request-id": given})
        assert got.status == 200
        assert got.json()["request_id"] == got.headers["x-request-id"] != given


def test_request_ids_differ(app: Any) -> None:
    seen = {ask(app, "GET", "/v1/items/i1/similar").headers["x-request-id"] for _ in range(20)}
    assert len(seen) == 20


def test_too_many_headers_are_refused(app: Any) -> None:
    headers = {f"x-{j}": "1" for j in range(101)}
    for target in ("/v1/items/i1/similar", "/v1/live"):
        got = ask(app, "GET", target, headers=headers)
        assert (got.status, got.code) == (431, "headers_too_large")


def test_other_hosts_are_refused_where_names_are_given(host: FakeHost) -> None:
    app = make_app(host, rules=ServiceRules(hosts=frozenset({b"localhost", b"[::1]"})))
    for name in ("localhost", "LOCALHOST:8100", "[::1]:8100"):
        assert ask(app, "GET", "/v1/items/i1/similar", headers={"host": name}).status == 200
    for target in ("/v1/items/i1/similar", "/v1/model", "/v1/live"):
        got = ask(app, "GET", target, headers={"host": "evil.example:8100"})
        assert (got.status, got.code) == (403, "forbidden")


# --- keys -----------------------------------------------------------------------------------------


def test_without_keys_reading_is_free_and_writing_is_not(host: FakeHost) -> None:
    app = make_app(host, FakeUpdates())
    assert ask(app, "GET", "/v1/items/i1/similar").status == 200
    got = ask(app, "PUT", "/v1/items/a", {"title": "b"})
    assert (got.status, got.code) == (403, "forbidden")
    assert "--open-writes" in got.json()["error"]["message"]


def test_keys_open_what_their_role_allows(host: FakeHost) -> None:
    pairs = {role: make_key(role) for role in ("read", "write")}
    app = make_app(host, FakeUpdates(), keys=Keys(tuple(one for _, one in pairs.values())))
    put = ("PUT", "/v1/items/a", {"title": "b"})
    gets = ["/v1/items/i1/similar", "/v1/items/i1", "/v1/model", "/metrics", "/v1/users/u"]
    wrong = {"authorization": "Bearer rk_wrong"}
    for target in gets:
        for headers in ({}, wrong, {"x-api-key": ""}):
            got = ask(app, "GET", target, headers=headers)
            assert (got.status, got.code) == (401, "no_key")
            assert got.headers["www-authenticate"] == "Bearer"
        for role in ("read", "write"):
            key = pairs[role][0]
            assert ask(app, "GET", target, headers={"x-api-key": key}).status == 200
            assert ask(app, "GET", target, headers={"authorization": f"bearer {key}"}).status == 200
    assert ask(app, *put).code == "no_key"
    assert ask(app, *put, headers={"x-api-key": pairs["read"][0]}).code == "forbidden"
    assert ask(app, *put, headers={"x-api-key": pairs["write"][0]}).status == 200
    for target in ("/v1/live", "/v1/ready", "/openapi.json"):
        assert ask(app, "GET", target).status == 200
    forced = {"x-api-key": pairs["read"][0], "x-variant": "b"}
    assert ask(app, "GET", "/v1/items/i1/similar", headers=forced).code == "forbidden"


def test_a_read_only_service_writes_for_nobody(host: FakeHost) -> None:
    rules = ServiceRules(read_only=True)
    for one in (make_app(host, keys=OPEN), make_app(host, FakeUpdates(), rules=rules, keys=OPEN)):
        got = ask(one, "DELETE", "/v1/items/a")
        assert (got.status, got.code) == (403, "forbidden")
