"""Every route of the service, over a host that needs no towers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from service_cases import (
    ITEM,
    OPEN,
    FakeEngine,
    FakeHost,
    FakeImpressions,
    FakeUpdates,
    ask,
    asked,
    served,
)
from service_cases import app as app
from service_cases import host as host
from service_cases import impressions as impressions
from service_cases import updates as updates

from recsys.serving.api.app import make_app
from recsys.serving.api.auth import Keys, make_key
from recsys.serving.api.batcher import BatchRules
from recsys.serving.api.handlers import ServiceRules
from recsys.serving.client import Client, ServiceError
from recsys.serving.live.impression_log import ImpressionLog
from recsys.serving.live.journal import Event

# --- questions ------------------------------------------------------------------------------------


def test_an_answer_says_who_answered_in_a_fixed_order(app: Any) -> None:
    got = ask(app, "POST", "/v1/similar", {"items": ["i7"], "k": 2}, headers={"x-request-id": "r1"})
    assert got.status == 200
    assert got.body == (
        b'{"request_id":"r1","model":"abc123abc123","variant":"a","fallback":null,'
        b'"items":[{"id":"i0","score":1.0},{"id":"i1","score":0.1}],"next":null}'
    )
    assert got.headers["x-request-id"] == "r1"


def test_a_row_of_the_table_is_answered_in_the_same_form(app: Any) -> None:
    hot = ask(app, "GET", "/v1/items/i7/similar?k=3")
    general = ask(app, "GET", "/v1/items/i7/similar?k=3&exact=false")
    assert hot.status == general.status == 200
    assert list(hot.json()) == list(general.json())
    assert sorted(hot.headers) == sorted(general.headers)
    assert [item["id"] for item in hot.json()["items"]] == ["i0", "i1", "i2"]
    assert app.handlers.models.engines["a"].sizes == []  # neither waited in the queue


@pytest.mark.parametrize(
    "target",
    [
        "/v1/items/i7/similar?k=51",  # more than the table has
        "/v1/items/nothing/similar",  # unknown there
        "/v1/items/i7/similar?fields=title",
        "/v1/items/i7/similar?exact=true&explain=true&diversity=0.5&popularity=-0.5",
    ],
)
def test_what_the_table_cannot_answer_goes_the_general_way(app: Any, target: str) -> None:
    assert ask(app, "GET", target).status == 200
    assert app.handlers.models.engines["a"].sizes == [1]


def test_everything_a_question_may_say_reaches_the_engine(app: Any, host: FakeHost) -> None:
    body = {
        "items": ["a", "b"], "k": 7, "exact": True, "fields": ["*"], "paged": True,
        "diversity": 0.25, "popularity": -1, "explain": True, "drop_seen": False,
        "filter": {
            "equals": {"category": ["tea", "coffee"], "sold": True},
            "ranges": {"price": [None, 5]}, "allow": ["x"], "deny": ["y", "z"],
        },
    }  # fmt: skip
    got = ask(app, "POST", "/v1/similar", body).json()
    assert got["items"][0] == {**ITEM, "fields": {"title": "i0"}, "explanation": {"text": 0.25}}
    assert got["next"] == "more"
    (one,) = host.engines["a"].asks
    assert (one.kind, one.items, one.k, one.exact, one.fields) == (
        "similar", ("a", "b"), 7, True, ("*",),
    )  # fmt: skip
    assert one.filter.equals == {"category": ("tea", "coffee"), "sold": (True,)}
    assert one.filter.ranges == {"price": (None, 5.0)}
    assert (one.filter.allow, one.filter.deny) == (("x",), ("y", "z"))
    assert (one.paged, one.diversity, one.popularity, one.explain, one.drop_seen) == (
        True, 0.25, -1.0, True, False,
    )  # fmt: skip


def test_a_query_string_says_the_same(app: Any, host: FakeHost) -> None:
    target = (
        "/v1/users/u1/recommendations?k=7&fields=a,b&category=tea&category=coffee&drop_seen=false"
    )
    assert ask(app, "GET", target).status == 200
    (one,) = host.engines["a"].asks
    assert (one.kind, one.user, one.k, one.fields, one.drop_seen) == (
        "recommend", "u1", 7, ("a", "b"), False,
    )  # fmt: skip
    assert one.filter.equals == {"category": ("tea", "coffee")}


def test_recommendations_searches_and_vectors(app: Any, host: FakeHost) -> None:
    body = {"history": ["i1", "i2"], "context": {"device": "phone", "hour": 3}}
    assert ask(app, "POST", "/v1/recommendations", body).status == 200
    assert ask(app, "POST", "/v1/search", {"text": "brass lamp"}).status == 200
    assert ask(app, "POST", "/v1/vectors", {"vector": [1, 0.5, 0, -1]}).status == 200
    one, two, three = host.engines["a"].asks
    assert (one.user, one.history, dict(one.context)) == (
        None, ("i1", "i2"), {"device": "phone", "hour": 3.0},
    )  # fmt: skip
    assert two.text == "brass lamp"
    assert three.vector is not None
    assert three.vector.dtype == "float32"
    assert three.vector.tolist() == [1, 0.5, 0, -1]


def test_ids_with_slashes_spaces_and_other_alphabets_are_ids(app: Any, host: FakeHost) -> None:
    got = ask(app, "GET", "/v1/items/a%2Fb%20%C3%A9%3F/similar?exact=true")
    assert got.status == 200
    assert host.engines["a"].asks[0].items == ("a/b é?",)
    assert ask(app, "GET", "/v1/items/a%2Fb%20%C3%A9/similar").status == 200  # hot
    assert ask(app, "GET", "/v1/items/a%2Fb").json()["item"]["id"] == "a/b"


def test_a_fallback_is_said_and_counted(app: Any) -> None:
    got = ask(app, "GET", "/v1/users/nobody/recommendations")
    assert got.json()["fallback"] == "user 'nobody' is unknown"
    text = ask(app, "GET", "/metrics").body.decode()
    assert 'recsys_fallbacks_total{route="recommendations_of",variant="a"} 1.0' in text


def test_the_user_decides_the_variant(app: Any) -> None:
    assert ask(app, "GET", "/v1/users/b1/recommendations").json()["variant"] == "b"
    got = ask(app, "POST", "/v1/similar", {"items": ["i1"], "user": "b1"}).json()
    assert (got["variant"], got["model"]) == ("b", "def456def456")


def test_a_variant_may_be_named(app: Any) -> None:
    got = ask(app, "GET", "/v1/items/i1/similar", headers={"x-variant": "b"})
    assert got.json()["variant"] == "b"
    got = ask(app, "GET", "/v1/items/i1/similar", headers={"x-variant": "none"})
    assert (got.status, got.code) == (400, "bad_query")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"text": "wrong"}, 400, "bad_query"),
        ({"text": "x", "cursor": "foreign"}, 400, "bad_cursor"),
        ({"text": "x", "cursor": "old"}, 410, "stale_cursor"),
        ({"text": "boom"}, 500, "internal"),
    ],
)
def test_what_an_engine_cannot_answer_has_a_code(
    app: Any, body: dict[str, Any], status: int, code: str
) -> None:
    got = ask(app, "POST", "/v1/search", body)
    assert (got.status, got.code) == (status, code)
    assert got.json()["error"]["request_id"] == got.headers["x-request-id"]
    assert "boom" not in got.body.decode()


def test_a_batch_answers_each_or_says_what_is_wrong_with_it(app: Any, host: FakeHost) -> None:
    requests = [
        {"kind": "similar", "items": ["i1"], "k": 1},
        {"kind": "search", "text": "wrong"},
        {"kind": "recommend", "user": "b1", "k": 1},
        {"kind": "vector", "vector": [1, 2, 3, 4], "k": 2},
    ]
    got = ask(app, "POST", "/v1/batch", {"requests": requests}, headers={"x-request-id": "r"})
    one, two, three, four = got.json()["answers"]
    assert (one["request_id"], one["variant"], one["items"]) == ("r.0", "a", [ITEM])
    assert (two["error"]["code"], two["error"]["request_id"]) == ("bad_query", "r.1")
    assert (three["variant"], three["model"]) == ("b", "def456def456")
    assert len(four["items"]) == 2


def test_what_breaks_on_one_of_a_batch_stands_in_its_place(
    app: Any, caplog: pytest.LogCaptureFixture
) -> None:
    boom = {"kind": "search", "text": "boom"}
    fine = {"kind": "similar", "items": ["i1"], "k": 1}
    for requests in (
        [fine, boom, {**fine, "user": "b1"}, boom],  # several of one variant
        [fine, fine, {**boom, "user": "b1"}],  # the only one of its variant
        [{**fine, "user": "b1"}, boom],
    ):
        caplog.clear()
        got = ask(app, "POST", "/v1/batch", {"requests": requests}, headers={"x-request-id": "r"})
        assert got.status == 200
        for place, (one, said) in enumerate(zip(requests, got.json()["answers"], strict=True)):
            if one.get("text") == "boom":
                assert said["error"]["code"] == "internal"
                assert said["error"]["request_id"] == f"r.{place}"
                assert f"request r.{place} failed" in caplog.text
            else:
                assert said["items"] == [ITEM]
    assert ask(app, "POST", "/v1/batch", {"requests": [boom]}).json()["answers"][0]["error"]


# --- items, users, events -------------------------------------------------------------------------


def test_items_are_put_looked_up_and_deleted(app: Any, updates: FakeUpdates) -> None:
    got = ask(app, "PUT", "/v1/items/new", {"title": "A lamp", "price": 3.5, "tags": ["a"]})
    assert (got.status, got.json()["written"]) == (200, 1)
    assert updates.items == {"new": {"title": "A lamp", "price": 3.5, "tags": ["a"]}}
    assert ask(app, "GET", "/v1/items/new").json()["item"] == {
        "id": "new",
        "fields": {"price": None},
    }
    assert ask(app, "DELETE", "/v1/items/new").status == 200
    got = ask(app, "DELETE", "/v1/items/new")
    assert (got.status, got.code) == (404, "unknown_item")
    assert ask(app, "GET", "/v1/items/nothing").code == "unknown_item"


def test_an_unknown_column_and_a_full_disk_are_told_apart(app: Any) -> None:
    got = ask(app, "PUT", "/v1/items/a", {"x": 1})
    assert (got.status, got.code) == (400, "bad_query")
    assert "Known: title" in got.json()["error"]["message"]
    got = ask(app, "PUT", "/v1/items/full", {"title": "b"})
    assert (got.status, got.code, got.headers["retry-after"]) == (503, "not_written", "5")


def test_events_are_journalled_and_logged(
    app: Any, updates: FakeUpdates, impressions: FakeImpressions
) -> None:
    events = [{"user": "u1", "item": "i1", "time": 5, "id": "e1"}, {"user": "u1", "item": "i2"}]
    assert ask(app, "POST", "/v1/events", {"events": events}).json()["written"] == 2
    assert updates.posted == impressions.posted
    assert (updates.posted[0].time, updates.posted[0].event, updates.posted[0].id) == (
        5,
        "click",
        "e1",
    )
    assert updates.posted[1].time > 1_700_000_000_000_000


def test_users_models_and_health(app: Any, host: FakeHost) -> None:
    assert ask(app, "GET", "/v1/users/u1").json()["user"]["known"] is True
    models = ask(app, "GET", "/v1/model").json()["models"]
    assert [one["name"] for one in models] == ["a", "b"]
    assert models[0]["engine"] == {"dimension": 4, "items": 100, "recall": 0.99}
    assert ask(app, "GET", "/v1/live").json() == {"live": True}
    assert ask(app, "GET", "/v1/ready").json() == {"ready": True}
    host.ready = False
    assert ask(app, "GET", "/v1/live").status == 200
    for target in ("/v1/ready", "/v1/items/i1/similar"):
        got = ask(app, "GET", target)
        assert (got.status, got.code, got.headers["retry-after"]) == (503, "not_ready", "1")


# --- what was shown -------------------------------------------------------------------------------


def test_what_was_shown_is_written_down_hot_answers_too(
    app: Any, impressions: FakeImpressions
) -> None:
    ask(app, "GET", "/v1/items/i1/similar?k=2", headers={"x-request-id": "hot"})
    ask(app, "GET", "/v1/users/b1/recommendations?k=1", headers={"x-request-id": "user"})
    app.close()
    assert sorted(impressions.rows) == [
        ("hot", None, ("i0", "i1"), "a", "abc123abc123"),
        ("user", "b1", ("i0",), "b", "def456def456"),
    ]


def test_what_no_user_is_shown_is_not_written_down(app: Any, impressions: FakeImpressions) -> None:
    unseen = {"x-exposure": "none"}
    for target in ("/v1/items/i1/similar?k=2", "/v1/users/b1/recommendations?k=1"):
        assert ask(app, "GET", target, headers=unseen).status == 200
    app.close()
    assert not impressions.rows


# --- load -----------------------------------------------------------------------------------------


def test_health_answers_while_a_large_batch_runs(host: FakeHost) -> None:
    app = make_app(host)
    requests = [{"kind": "search", "text": "slow" if j % 64 == 0 else "x"} for j in range(256)]

    async def both() -> tuple[int, list[float]]:
        loop = asyncio.get_running_loop()
        batch = asyncio.create_task(asked(app, "POST", "/v1/batch", {"requests": requests}))
        await asyncio.sleep(0.05)
        times = []
        while not batch.done():
            start = loop.time()
            assert (await asked(app, "GET", "/v1/ready")).status == 200
            assert (await asked(app, "GET", "/v1/items/i1/similar")).status == 200
            times.append(loop.time() - start)
            await asyncio.sleep(0.01)
        return (await batch).status, times

    status, times = asyncio.run(both())
    assert status == 200
    assert len(times) > 50
    assert sorted(times)[len(times) // 2] < 0.25  # the batch takes seconds
    assert max(host.engines["a"].sizes) <= 64
    app.close()


def test_a_deadline_and_a_full_queue_say_try_again(host: FakeHost) -> None:
    rules = ServiceRules(deadline=0.15, answers=BatchRules(most=1, waiting=2))
    app = make_app(host, rules=rules)

    async def many() -> list[Any]:
        slow = [asyncio.create_task(asked(app, "POST", "/v1/search", {"text": "slow"}))]
        await asyncio.sleep(0.05)
        slow += [
            asyncio.create_task(asked(app, "POST", "/v1/search", {"text": f"t{j}"}))
            for j in range(4)
        ]
        return [await one for one in slow]

    got = asyncio.run(many())
    assert [one.status for one in got] == [503] * 5
    assert [one.code for one in got] == ["deadline"] * 3 + ["overloaded"] * 2
    assert all(one.headers["retry-after"] == "1" for one in got)
    app.close()
    # What waited too long was never begun.
    assert [one.text for one in host.engines["a"].asks] == ["slow"]
    assert app.handlers.answers.dropped == 2


def test_the_log_has_the_events_that_the_journal_has(
    host: FakeHost, impressions: FakeImpressions
) -> None:
    """One sent twice stands there once, and one that came too late to be answered stands there."""
    updates = Slow()
    app = make_app(host, updates, impressions, ServiceRules(deadline=0.05), OPEN)
    one, two = ({"user": "u", "item": "i", "id": name} for name in ("e1", "e2"))
    assert ask(app, "POST", "/v1/events", {"events": [one]}).code == "deadline"
    updates.seconds = 0.0
    app.handlers.rules = ServiceRules()
    for _ in range(2):
        assert ask(app, "POST", "/v1/events", {"events": [two]}).json()["written"] == 1
    app.close()
    for posted in (impressions.posted, updates.posted):
        assert sorted(str(event.id) for event in posted) == ["e1", "e2"]


def test_a_write_past_its_deadline_is_not_asked_for_again(host: FakeHost) -> None:
    """It is still done; a client that heard of a time to ask again would have it done twice."""
    updates = Slow()
    app = make_app(host, updates, rules=ServiceRules(deadline=0.05), keys=OPEN)
    with served(app) as port, Client(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ServiceError, match="again with the same event ids") as late:
            client.post_events([{"user": "u", "item": "i"}])
        assert (late.value.code, late.value.retry_after) == ("deadline", None)
        with pytest.raises(ServiceError, match="safe to send it again") as late:
            client.put_item("i", {"title": "t"})
        assert (late.value.code, late.value.retry_after) == ("deadline", None)
    app.close()
    assert len(updates.posted) == 1


class Slow(FakeUpdates):
    """Takes longer than anybody waits."""

    seconds = 0.2

    def put_item(self, id: str, item: Mapping[str, Any]) -> None:
        time.sleep(self.seconds)

    def post_events(self, events: Sequence[Event]) -> list[Event]:
        time.sleep(self.seconds)
        return super().post_events(events)


# --- metrics, logs, page --------------------------------------------------------------------------


def test_metrics_tell_of_requests_models_and_queues(app: Any) -> None:
    for _ in range(3):
        ask(app, "GET", "/v1/items/i1/similar")
    ask(app, "GET", "/v1/nothing")
    ask(app, "POST", "/v1/search", {"text": "boom"})
    got = ask(app, "GET", "/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    text = got.body.decode()
    for line in (
        'recsys_request_seconds_count{route="similar_of",status="200",variant="a"} 3.0',
        'recsys_request_seconds_count{route="other",status="404",variant=""} 1.0',
        'recsys_request_seconds_count{route="search",status="500",variant="a"} 1.0',
        'recsys_errors_total{code="not_found"} 1.0',
        'recsys_model_info{last_error="",model="abc123abc123",variant="a"} 1.0',
        'recsys_swaps_total{variant="b"} 1.0',
        "recsys_answers_waiting 0.0",
        "recsys_impressions_dropped_total 3.0",
    ):
        assert line in text
    assert float(text.split("\nrecsys_resident_bytes ")[1].split("\n")[0]) > 1e6


def test_metrics_tell_of_a_log_that_cannot_be_written(
    host: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImpressionLog(tmp_path, seconds=60) as log:
        app = make_app(host, impressions=log)
        with monkeypatch.context() as patched:
            patched.setattr("recsys.serving.live.impression_log._frame", lambda some: 1 // 0)
            log.shown("r", "u", 1, ["a", "b"], "m", "v")
            with pytest.raises(ZeroDivisionError):
                log.flush()
        text = ask(app, "GET", "/metrics").body.decode()
        for line in (
            "recsys_impressions_waiting 2.0",
            "recsys_impressions_writing 1.0",
            "recsys_impressions_failures_total 1.0",
        ):
            assert line in text
        app.close()


def test_logs_are_one_line_a_request_without_keys_or_bodies(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    key, hashed = make_key("read")
    app = make_app(host, rules=ServiceRules(log_every=1), keys=Keys((hashed,)))
    with caplog.at_level(logging.INFO, "recsys.serve"):
        headers = {"x-api-key": key, "x-request-id": "r1"}
        ask(app, "GET", "/v1/items/i1/similar", headers=headers)
        ask(app, "POST", "/v1/search", {"text": "secret words"}, headers=headers)
        ask(app, "POST", "/v1/search", {"text": "secret words"}, headers={"x-api-key": "rk_wrong"})
    data = [record.data for record in caplog.records if hasattr(record, "data")]
    assert [one["route"] for one in data] == ["similar_of", "search", "search"]
    assert [one["status"] for one in data] == [200, 200, 401]
    assert data[1]["request_id"] == "r1"
    assert data[2]["code"] == "no_key"
    assert set(data[1]) == {"request_id", "route", "method", "status", "ms", "variant", "model"}
    everything = caplog.text + repr(data)
    assert key not in everything
    assert "rk_wrong" not in everything
    assert "secret words" not in everything


def test_the_openapi_is_served_with_a_tag(app: Any) -> None:
    got = ask(app, "GET", "/openapi.json")
    assert got.status == 200
    assert set(got.json()["paths"]) > {"/v1/items/{id}/similar", "/v1/live", "/metrics"}
    assert got.headers["content-security-policy"].startswith("default-src 'self'")
    assert got.headers["x-content-type-options"] == "nosniff"
    again = ask(app, "GET", "/openapi.json", headers={"if-none-match": got.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


def test_an_engine_that_was_replaced_is_not_held(host: FakeHost) -> None:
    import gc
    import weakref

    app = make_app(host)
    ask(app, "GET", "/v1/items/i1/similar")
    ask(app, "POST", "/v1/search", {"text": "x"})
    old = weakref.ref(host.engines["a"])
    host.engines["a"] = FakeEngine("new")
    gc.collect()
    assert old() is None
    assert ask(app, "GET", "/v1/items/i1/similar").json()["model"] == "new"
    app.close()
