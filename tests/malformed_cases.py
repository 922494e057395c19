"""Requests that are wrong for sure, made by chance: what a scanner or a bug would send."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Request = tuple[str, str, Any, dict[str, str]]
"""Method, target, body (bytes, a value, or None), headers."""

GOOD: dict[str, dict[str, Any]] = {
    "similar": {"items": ["i1", "i2"], "k": 5, "fields": ["*"], "diversity": 0.5},
    "recommendations": {"history": ["i1"], "context": {"device": "phone"}, "user": "u1"},
    "search": {"text": "brass lamp", "filter": {"equals": {"category": ["tea"]}}},
    "vectors": {"vector": [0.5, 1.0], "filter": {"ranges": {"price": [1, None]}, "deny": ["x"]}},
    "batch": {"requests": [{"kind": "search", "text": "x"}]},
    "events": {"events": [{"user": "u", "item": "i", "strength": 1.0}]},
}
OPTIONS = ["similar", "recommendations", "search", "vectors"]
WRONG: dict[str, list[Any]] = {
    "k": [0, -1, 1001, 10**30, 1.5, "10", True, None, [], {}],
    "fields": ["*", 3, {}, [1], [""], ["x" * 257], ["c"] * 65],
    "exact": [0, 1, "true", None, []],
    "paged": [0, "no", None],
    "explain": [1, "yes", {}],
    "drop_seen": [1, "yes", None],
    "cursor": [5, "", "x" * 4097, [], True],
    "diversity": [-0.1, 1.1, "0.5", True, None, 1e300],
    "popularity": [-1.1, 2, "0", [], None],
    "user": ["", "x" * 257, 4, [], {}],
    "filter": [
        [], "a", 3, {"equal": {}}, {"equals": []}, {"equals": {"a": None}}, {"equals": {"a": 1.5}},
        {"equals": {"": "x"}}, {"equals": {"a": [[1]]}}, {"ranges": {"a": [1, 2, 3]}},
        {"ranges": {"a": [True, 1]}}, {"ranges": {"a": ["0", "1"]}}, {"ranges": {"a": None}},
        {"allow": "x"}, {"allow": [1]}, {"deny": None}, {"deny": [""]},
        {"equals": {f"c{n}": "x" for n in range(33)}},
    ],
}  # fmt: skip
OWN: dict[str, tuple[str, list[Any]]] = {
    "similar": ("items", [[], None, "i1", [1], [None], [""], ["x" * 257], [["i1"]], {}]),
    "recommendations": ("history", ["i1", [1], [""], ["i"] * 1001, {}, 5, [None]]),
    "search": ("text", ["", 5, None, [], "x" * 2001, {"a": 1}, True]),
    "vectors": (
        "vector",
        [[], "1,2", [None], ["1"], [True], [[1.0]], 3, None, [1e10], [0.0] * 4097],
    ),
    "batch": (
        "requests",
        [
            [], {}, [1], [{}], [{"kind": "other"}], [{"kind": "search"}], [{"kind": ["search"]}],
            [{"kind": "search", "text": "x", "k": 0}], [{"kind": "similar", "text": "x"}],
            [{"kind": "search", "text": "x"}] * 257,
        ],
    ),
    "events": (
        "events",
        [
            [], {}, [1], [{}], [{"user": "u"}], [{"user": 1, "item": "i"}],
            [{"user": "u", "item": "i", "time": "now"}], [{"user": "u", "item": "i", "time": 1.5}],
            [{"user": "u", "item": "i", "time": 10**30}], [{"user": "u", "item": "i", "x": 1}],
            [{"user": "u", "item": "i", "strength": -1}], [{"user": "u", "item": "i", "event": ""}],
        ],
    ),
}  # fmt: skip
QUERIES = [
    "k=", "k=0", "k=-1", "k=1001", "k=1e3", "k=1_0", "k=+5", "k=%20", "k=5&k=5", "k=%FF", "k=%",
    "exact=1", "exact=TRUE", "paged=", "explain=maybe", "diversity=nan", "diversity=inf",
    "diversity=2", "popularity=1e1", "popularity=--1", "cursor=", "user=", "a=%zz", "%C3=1", "=5",
    "&".join(f"c{n}=1" for n in range(40)), "&".join(f"c{n}=1" for n in range(70)),
    "k=5;DROP", "k=5%00", "fields=" + ",".join(["c"] * 65), "fields=,", "x" * 9000,
]  # fmt: skip
PATHS = [
    "/", "/v1", "/v1/", "/v2/items/i1", "/v1/items", "/v1/items/", "/v1/items/i1/", "/v1/users//",
    "/v1/items/i1/similar/", "/v1/items/a/b/similar", "//v1/live", "/v1/items/%", "/v1/items/%4",
    "/v1/items/%FF", "/v1/items/%C3%28", "/v1/items/%ED%A0%80", "/v1/users/%zz/recommendations",
    "/v1/items/" + "x" * 257, "/v1/items/" + "%C3%A9" * 257, "/v1/items/" + "x" * 9000,
    "/v1/../etc/passwd", "/page/../secret", "/page/%2E%2E/x", "/.env", "/wp-login.php",
]  # fmt: skip


def _body(rng: random.Random) -> Request:
    """One field of a good body made wrong."""
    route = rng.choice(list(GOOD))
    body = dict(GOOD[route])
    if route in OPTIONS and rng.random() < 0.6:
        name = rng.choice(list(WRONG))
        if name == "user":
            body["user"] = rng.choice(WRONG["user"])
        else:
            body[name] = rng.choice(WRONG[name])
    elif rng.random() < 0.15:
        body["x" * rng.randint(1, 500)] = rng.choice([1, None, [], "x"])
    else:
        name, values = OWN[route]
        body[name] = rng.choice(values)
    return "POST", f"/v1/{route}", body, {}


def _cut(rng: random.Random) -> Request:
    route = rng.choice(list(GOOD))
    whole = json.dumps(GOOD[route]).encode()
    return "POST", f"/v1/{route}", whole[: rng.randrange(len(whole))], {}


def _bytes(rng: random.Random) -> Request:
    noise = rng.choice([b"\xff", b"\x00", b"{\x00", b"\xed\xa0\x80"]) + rng.randbytes(
        rng.randrange(200)
    )
    return "POST", f"/v1/{rng.choice(list(GOOD))}", noise, {}


def _number(rng: random.Random) -> Request:
    bad = rng.choice(
        [b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e999", b"0x10", b"1.", b"01"]
    )
    route, body = rng.choice(
        [
            ("vectors", b'{"vector":[1,%s]}'), ("search", b'{"text":"x","diversity":%s}'),
            ("search", b'{"text":"x","k":%s}'),
            ("similar", b'{"items":["a"],"filter":{"ranges":{"p":[%s,null]}}}'),
            ("recommendations", b'{"history":[],"context":{"hour":%s}}'),
            ("events", b'{"events":[{"user":"u","item":"i","time":%s}]}'),
        ]
    )  # fmt: skip
    return "POST", f"/v1/{route}", body % bad, {}


def _deep(rng: random.Random) -> Request:
    depth = rng.choice([250, 2_000, 100_000])
    opening = rng.choice([b"[", b'{"a":', b'{"filter":', b'{"items":['])
    return "POST", f"/v1/{rng.choice(list(GOOD))}", opening * depth, {}


def _kind(rng: random.Random) -> Request:
    route = rng.choice(list(GOOD))
    headers = rng.choice(
        [
            {"content-type": "text/plain"}, {"content-type": ""}, {"content-type": "text/xml"},
            {"content-type": "multipart/form-data; boundary=x"}, {"content-encoding": "gzip"},
            {"content-type": "application/jsonx"}, {"content-encoding": "br"},
        ]
    )  # fmt: skip
    return "POST", f"/v1/{route}", GOOD[route], headers


def _query(rng: random.Random) -> Request:
    path = rng.choice(["/v1/items/i1/similar", "/v1/users/u1/recommendations"])
    return "GET", f"{path}?{rng.choice(QUERIES)}", None, {}


def _path(rng: random.Random) -> Request:
    path = rng.choice(PATHS)
    if path == "/":
        return "POST", path, None, {}
    return rng.choice(["GET", "DELETE", "PUT"]), path, None, {}


def _method(rng: random.Random) -> Request:
    path = rng.choice(
        ["/v1/live", "/v1/model", "/v1/search", "/v1/items/i1", "/metrics", "/v1/batch"]
    )
    return rng.choice(["PATCH", "OPTIONS", "TRACE", "FOO", "PROPFIND"]), path, None, {}


def _headers(rng: random.Random) -> Request:
    count = rng.choice([101, 150])
    return "GET", "/v1/items/i1/similar", None, {f"x-{n}": "v" for n in range(count)}


def _item(rng: random.Random) -> Request:
    bad = rng.choice(
        [
            [], "x", 5, None, {"": "x"}, {"x" * 257: 1}, {"title": {"a": 1}}, {"title": [1]},
            {"title": "x" * 20_001}, {"title": [["x"]]}, {f"c{n}": 1 for n in range(257)},
            {"price": 10**400}, {"price": 1e30},
        ]
    )  # fmt: skip
    return "PUT", "/v1/items/i1", bad, {}


KINDS: list[tuple[Callable[[random.Random], Request], int]] = [
    (_body, 40), (_cut, 8), (_bytes, 8), (_number, 8), (_deep, 2), (_kind, 5), (_query, 10),
    (_path, 8), (_method, 4), (_headers, 1), (_item, 6),
]  # fmt: skip


def malformed(rng: random.Random) -> Request:
    """One request that can only be refused."""
    (make,) = rng.choices([kind for kind, _ in KINDS], [weight for _, weight in KINDS])
    return make(rng)


_POST = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
_HOST = b"Host: localhost\r\n"
BROKEN: list[bytes] = [
    b"\r\n\r\n\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon here\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    b"GET / HTTP/1.1\r\n: empty\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /v1/\xff\xfe HTTP/1.1\r\n" + _HOST + b"\r\n",
    _POST + b"Content-Length: -1\r\n\r\n", _POST + b"Content-Length: abc\r\n\r\n",
    _POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    _POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    _POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n{}",
    b"FOO BAR BAZ\r\n\r\n", b"CONNECT a:1 HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET * HTTP/1.1\r\n" + _HOST + b"\r\n", b"OPTIONS * HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET http:// HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + _HOST + b"\r\n",
    b"GET / HTTP/1.1\r\nX-Y: " + b"a" * 60_000 + b"\r\n\r\n",
    b"GET /v1/live HTTP/1.1\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(3_000)) + b"\r\n",
    b"GET /v1/live HTTP/1.1\r\n" + _HOST + b"\x00\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + _HOST + b" b\r\n\r\n",
]  # fmt: skip


def broken(rng: random.Random) -> bytes:
    """Bytes that are no request; a good one with a byte of its head changed by chance, or noise."""
    if rng.random() < 0.5:
        return rng.choice(BROKEN)
    if rng.random() < 0.5:
        return b"\x80" + rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n"
    good = bytearray(b"GET /v1/live HTTP/1.1\r\nHost: localhost\r\nX-Y: z\r\n\r\n")
    good[rng.choice([0, 1, 3, 13, 15, 18])] = rng.choice(b"\x00\x01\x7f\x80\xff\t\r")
    return bytes(good)
