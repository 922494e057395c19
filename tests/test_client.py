"""The client: what it sends, what it makes of answers, when it asks again and when it gives up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from recsys.serving.client import Client, Event, ServiceError

ANSWER = {
    "request_id": "r1", "model": "abc", "variant": "a", "fallback": None,
    "items": [{"id": "x", "score": 0.5, "fields": {"title": "X"}}, {"id": "y", "score": None}],
    "next": "c1",
}  # fmt: skip
UNKNOWN = {"error": {"code": "unknown_item", "message": "No item 'z'.", "request_id": "r9"}}


class Fake:
    """A server that plays a list of answers, and keeps what it was asked."""

    def __init__(self) -> None:
        self.plays: list[tuple[int, dict[str, str], bytes | float]] = []
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        self.connections: set[Any] = set()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(size)) if size else None
                fake.asked.append((self.command, self.path, dict(self.headers.items()), body))
                fake.connections.add(self.client_address)
                status, headers, said = (
                    fake.plays.pop(0) if fake.plays else (200, {}, _json(ANSWER))
                )
                if isinstance(said, float):
                    time.sleep(said)
                    said = b"{}"
                self.send_response(status)
                for name, value in {"Content-Length": str(len(said)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def play(self, said: Any, status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.plays.append((status, named, said if isinstance(said, bytes | float) else _json(said)))


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def fake() -> Iterator[Fake]:
    fake = Fake()
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def test_every_question_goes_where_it_belongs_and_says_no_more_than_was_asked(fake: Fake) -> None:
    with Client(fake.url + "/", key="rk_secret", variant="b") as client:
        client.similar("a", k=5, fields=["title"], user="u1")
        client.similar(["a", "b"], filter={"equals": {"category": ["tea"]}})
        client.recommend("u1", k=3)
        client.recommend(history=[], context={"device": "phone"}, drop_seen=False)
        client.search("oak lamp", paged=True)
        client.vector(np.array([1.0, 2.0], np.float32), explain=True)
    sent = [(path.removeprefix("/v1/"), body) for _, path, _, body in fake.asked]
    assert sent == [
        ("similar", {"items": ["a"], "k": 5, "fields": ["title"], "user": "u1"}),
        ("similar", {"items": ["a", "b"], "filter": {"equals": {"category": ["tea"]}}}),
        ("recommendations", {"user": "u1", "drop_seen": True, "k": 3}),
        ("recommendations", {"history": [], "context": {"device": "phone"}, "drop_seen": False}),
        ("search", {"text": "oak lamp", "paged": True}),
        ("vectors", {"vector": [1.0, 2.0], "explain": True}),
    ]
    headers = [headers for _, _, headers, _ in fake.asked]
    assert all(h["Authorization"] == "Bearer rk_secret" and h["X-Variant"] == "b" for h in headers)
    assert len({h["X-Request-ID"] for h in headers}) == len(headers)
    assert len(fake.connections) == 1  # kept open
    assert "rk_secret" not in repr(client)


def test_an_answer_is_a_list_of_items_that_knows_where_it_comes_from(fake: Fake) -> None:
    with Client(fake.url) as client:
        answer = client.similar("a")
    assert answer.ids == ["x", "y"] and [item.score for item in answer] == [0.5, None]
    assert answer.items[0].fields == {"title": "X"} and answer.items[1].fields is None
    assert (answer.model, answer.variant, answer.fallback, answer.next) == ("abc", "a", None, "c1")
    assert len(answer) == 2 and answer.request_id == "r1"


def test_items_users_and_events(fake: Fake) -> None:
    head = {"request_id": "r", "model": "m", "variant": "a"}
    fake.play({**head, "item": {"title": "X"}})
    fake.play({"request_id": "r", "written": 1})
    fake.play(UNKNOWN, 404)
    fake.play({"request_id": "r", "written": 2})
    fake.play({**head, "user": {"known": True}})
    fake.play({"request_id": "r", "models": [{"name": "a"}]})
    with Client(fake.url) as client:
        assert client.item("a/b ?#..ü") == {"title": "X"}
        client.put_item("..", {"title": "Y"})
        assert client.delete_item("i1") is False
        assert client.post_events([{"user": "u", "item": "i"}, {"user": "u", "item": "j"}]) == 2
        assert client.user("u 1") == {"known": True}
        assert client.model() == [{"name": "a"}]
    assert [(method, path) for method, path, _, _ in fake.asked] == [
        ("GET", "/v1/items/a%2Fb%20%3F%23%2E%2E%C3%BC"), ("PUT", "/v1/items/%2E%2E"),
        ("DELETE", "/v1/items/i1"), ("POST", "/v1/events"), ("GET", "/v1/users/u%201"),
        ("GET", "/v1/model"),
    ]  # fmt: skip


def test_a_batch_has_answers_and_errors_in_their_places(fake: Fake) -> None:
    fake.play({"request_id": "r", "answers": [ANSWER, UNKNOWN]})
    with Client(fake.url) as client:
        first, second = client.batch(
            [{"kind": "vector", "vector": np.ones(2)}, {"kind": "similar", "items": ["z"]}]
        )
    assert not isinstance(first, ServiceError) and first.ids == ["x", "y"]
    assert isinstance(second, ServiceError) and second.code == "unknown_item"
    assert second.message == "No item 'z'." and second.request_id == "r9"


def test_a_refusal_is_an_error_with_its_code(fake: Fake) -> None:
    fake.play(UNKNOWN, 404)
    with Client(fake.url) as client, pytest.raises(ServiceError, match="No item 'z'") as refused:
        client.item("z")
    error = refused.value
    assert (error.code, error.status, error.request_id) == ("unknown_item", 404, "r9")
    assert len(fake.asked) == 1


@pytest.mark.parametrize(("status", "said"), [(502, b"<html>Bad"), (200, b"<html>"), (200, b"[1]")])
def test_what_the_service_cannot_have_said_is_told_as_such(
    fake: Fake, status: int, said: bytes
) -> None:
    fake.play(said, status)
    with Client(fake.url) as client, pytest.raises(ServiceError) as refused:
        client.model()
    assert refused.value.code == "bad_answer" and said.decode() in str(refused.value)


@pytest.mark.parametrize(("status", "code"), [(503, "overloaded"), (429, "rate_limited")])
def test_a_service_is_asked_again_when_it_says_when(fake: Fake, status: int, code: str) -> None:
    busy = {"error": {"code": code, "message": "Later.", "request_id": "r"}}
    fake.play(busy, status, Retry_After="1")
    began = time.perf_counter()
    with Client(fake.url) as client:
        assert client.search("tea").ids == ["x", "y"]
    assert time.perf_counter() - began >= 1.0
    assert fake.asked[0][3] == fake.asked[1][3] == {"text": "tea"}
    assert fake.asked[0][2]["X-Request-ID"] == fake.asked[1][2]["X-Request-ID"]


def test_events_keep_their_ids_when_they_are_sent_again(fake: Fake) -> None:
    fake.play({"error": {"code": "overloaded", "message": "Busy."}}, 503, Retry_After="0")
    fake.play({"request_id": "r", "written": 3})
    event: Event = {"user": "u", "item": "i"}
    with Client(fake.url) as client:
        assert client.post_events([event, event, {**event, "id": "mine"}]) == 3
    first, again = (body["events"] for *_, body in fake.asked)
    assert first == again and event == {"user": "u", "item": "i"}
    assert first[2]["id"] == "mine" and len({one["id"] for one in first}) == 3


def test_a_service_that_stays_busy_is_given_up(fake: Fake) -> None:
    busy = {"error": {"code": "overloaded", "message": "Busy.", "request_id": "r"}}
    for _ in range(2):
        fake.play(busy, 503, Retry_After="0")
    with Client(fake.url, retries=1) as client, pytest.raises(ServiceError) as refused:
        client.search("tea")
    assert (refused.value.code, refused.value.status) == ("overloaded", 503)
    assert refused.value.retry_after == 0 and len(fake.asked) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_nothing_else_is_sent_twice(fake: Fake, status: int) -> None:
    # Without a word of when, neither a 429 nor a 503 is ours.
    fake.play(b"no", status)
    with Client(fake.url) as client, pytest.raises(ServiceError):
        client.put_item("i", {"title": "t"})
    assert len(fake.asked) == 1


def test_a_slow_service_is_not_waited_for_and_not_asked_twice(fake: Fake) -> None:
    fake.play(0.5)
    with Client(fake.url, timeout=0.1) as client, pytest.raises(ServiceError) as refused:
        client.post_events([{"user": "u", "item": "i"}])
    assert refused.value.code == "timeout" and refused.value.status is None
    assert len(fake.asked) == 1


def test_a_service_that_is_not_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with Client(url) as client:
        with pytest.raises(ServiceError, match=url) as refused:
            client.similar("a")
        assert refused.value.code == "unreachable" and refused.value.request_id
        assert client.live() is False and client.ready() is False


def test_live_and_ready_are_asked_once(fake: Fake) -> None:
    fake.play({"live": True})
    fake.play({"error": {}}, 503, Retry_After="5")
    with Client(fake.url) as client:
        assert client.live() is True and client.ready() is False
    assert len(fake.asked) == 2


def test_a_vector_with_nan_never_leaves(fake: Fake) -> None:
    with Client(fake.url) as client:
        with pytest.raises(ServiceError, match="JSON") as refused:
            client.vector([float("nan")])
        assert refused.value.code == "invalid" and refused.value.status is None
        with pytest.raises(ServiceError, match="Unicode") as refused:
            client.item("\ud800")
        assert refused.value.code == "invalid"
    assert not fake.asked


@pytest.mark.parametrize(
    "said",
    [
        {"status": "ok"},
        {"items": "x", "item": 1, "user": 1, "models": 1, "answers": 1, "written": ""},
        {"items": [1], "item": "x", "user": "x", "models": ["x"], "answers": [], "written": None},
    ],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.similar("a"),
        lambda client: client.batch([{"kind": "search", "text": "tea"}]),
        lambda client: client.item("a"),
        lambda client: client.put_item("a", {"title": "t"}),
        lambda client: client.delete_item("a"),
        lambda client: client.post_events([{"user": "u", "item": "i"}]),
        lambda client: client.user("u"),
        lambda client: client.model(),
    ],
)
def test_json_of_another_service_is_a_bad_answer(
    fake: Fake, said: dict[str, Any], call: Callable[[Client], Any]
) -> None:
    fake.play(said)
    with Client(fake.url) as client, pytest.raises(ServiceError, match="Status 200") as refused:
        call(client)
    assert refused.value.code == "bad_answer" and refused.value.request_id
    assert len(fake.asked) == 1


def test_threads_share_a_client(fake: Fake) -> None:
    with Client(fake.url, connections=4) as client, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda i: client.similar(f"i{i}"), range(64)))
    assert all(answer.ids == ["x", "y"] for answer in answers)
    assert sorted(body["items"][0] for *_, body in fake.asked) == sorted(f"i{i}" for i in range(64))


def test_importing_the_client_loads_no_model_library() -> None:
    code = (
        "import sys; import recsys.serving.client; sys.exit(', '.join(sorted(set(sys.modules) &"
        " {'torch', 'polars', 'numpy', 'pydantic', 'fastapi', 'orjson'})) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
