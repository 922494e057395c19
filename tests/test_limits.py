"""Token buckets of rate limits, for every kind of request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from service_cases import FakeHost, FakeUpdates, ask, raw, served
from typer.testing import CliRunner

from recsys.errors import ConfigError
from recsys.experiments import cli
from recsys.serving.api.app import ServiceRules, make_app
from recsys.serving.api.auth import Keys, make_key
from recsys.serving.api.limits import Rate, Rates, parse_rates
from recsys.serving.client import Client, ServiceError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_by_hand() -> None:
    clock = Clock()
    rates = Rates({None: Rate(per_second=2, burst=3)}, clock)
    assert [rates.take(None) for _ in range(4)] == [0, 0, 0, 0.5]
    clock.now += 0.25
    assert rates.take(None) == 0.25  # refusals cost nothing
    clock.now += 0.25
    assert [rates.take(None) for _ in range(2)] == [0, 0.5]
    clock.now += 100  # no more than a bucket full
    assert [bool(rates.take(None)) for _ in range(4)] == [False, False, False, True]


def test_what_is_charged_may_be_owed() -> None:
    clock = Clock()
    rates = Rates({None: Rate(per_second=2, burst=3)}, clock)
    assert rates.take(None) == 0
    rates.charge(None, 6)  # four more than there are
    assert rates.take(None) == 2.5
    clock.now += 2.5
    assert rates.take(None) == 0 and rates.take(None) == 0.5
    Rates({}, clock).charge(None, 5)


def test_a_batch_costs_a_token_for_each_of_its_questions() -> None:
    app = make_app(FakeHost(), rules=ServiceRules(rates={None: Rate(0.01, 4)}))
    batch = {"requests": [{"kind": "search", "text": "tea"}] * 3}
    assert ask(app, "POST", "/v1/batch", batch).status == 200
    assert ask(app, "GET", "/v1/items/i1/similar").status == 200
    assert ask(app, "GET", "/v1/items/i1/similar").status == 429


def test_each_key_has_a_bucket_and_each_role_a_rate() -> None:
    (_, one), (_, two), (_, write) = make_key("read"), make_key("read"), make_key("write")
    rates = Rates({"read": Rate(1, 1)}, Clock())
    assert [bool(rates.take(key)) for key in (one, one, two, two)] == [False, True, False, True]
    assert not any(rates.take(write) for _ in range(100))


@given(st.floats(0.1, 50), st.integers(1, 20), st.lists(st.floats(0, 2), min_size=1, max_size=60))
def test_one_number_is_as_a_bucket_that_is_filled(
    per_second: float, burst: int, waits: list[float]
) -> None:
    """Twin: tokens, counted."""
    clock, tokens = Clock(), float(burst)
    rates = Rates({None: Rate(per_second, burst)}, clock)
    for wait in waits:
        clock.now += wait
        tokens = min(burst, tokens + wait * per_second)
        if abs(tokens - 1) < 1e-6:
            return  # either answer is right
        got = rates.take(None)
        if tokens >= 1:
            assert got == 0
            tokens -= 1
        else:
            assert got == pytest.approx((1 - tokens) / per_second, abs=1e-6)


def test_no_second_has_more_than_its_share() -> None:
    clock, rng = Clock(), random.Random(0)
    rates, taken = Rates({None: Rate(10, 5)}, clock), []
    for _ in range(5000):
        clock.now += rng.expovariate(40)
        if not rates.take(None):
            taken.append(clock.now)
    for n, start in enumerate(taken):
        assert sum(start <= as_of < start + 1 for as_of in taken[n:]) <= 15
    assert len(taken) == pytest.approx(10 * (taken[-1] - taken[0]), rel=0.02)


# --- over HTTP ------------------------------------------------------------------------------------

ONCE: Mapping[Any, Rate] = {None: Rate(0.01, 2)}
WAYS = [
    ("GET", "/v1/items/i1/similar", None),  # hot
    ("GET", "/v1/items/i1/similar?exact=true", None),
    ("POST", "/v1/search", {"text": "tea"}),
    ("POST", "/v1/batch", {"requests": [{"kind": "search", "text": "tea"}]}),
    ("GET", "/v1/items/i1", None),
    ("PUT", "/v1/items/i1", {"title": "a"}),
    ("DELETE", "/v1/items/none", None),
    ("POST", "/v1/events", {"events": [{"user": "u", "item": "i"}]}),
    ("GET", "/v1/model", None),
]


@pytest.mark.parametrize(("method", "target", "body"), WAYS)
def test_every_way_but_a_look_at_the_service_takes_from_one_bucket(
    method: str, target: str, body: Any
) -> None:
    updates = FakeUpdates()
    app = make_app(FakeHost(), updates, rules=ServiceRules(rates=ONCE), keys=Keys(open_writes=True))
    assert ask(app, "GET", "/v1/items/i2/similar").status == 200
    assert ask(app, method, target, body).status in (200, 404)
    before = dict(updates.items), list(updates.posted)
    got = ask(app, method, target, body)
    assert (got.status, got.code) == (429, "rate_limited")
    assert 99 <= int(got.headers["retry-after"]) <= 100
    assert (updates.items, updates.posted) == before
    for _ in range(5):
        for open_to_all in ("/v1/live", "/v1/ready", "/metrics", "/openapi.json"):
            assert ask(app, "GET", open_to_all).status == 200
    text = ask(app, "GET", "/metrics").body.decode()
    assert 'recsys_errors_total{code="rate_limited"} 1.0' in text
    app.close()


def test_who_has_no_valid_key_takes_nothing_from_those_who_have() -> None:
    key, hashed = make_key("read")
    rules = ServiceRules(rates={"read": Rate(0.01, 1)})
    app = make_app(FakeHost(), rules=rules, keys=Keys((hashed,)))
    for headers in ({}, {"x-api-key": "rk_wrong"}):
        for _ in range(3):
            assert ask(app, "GET", "/v1/items/i1/similar", headers=headers).code == "no_key"
    right = {"x-api-key": key}
    assert ask(app, "GET", "/v1/items/i1/similar", headers=right).status == 200
    assert ask(app, "GET", "/v1/items/i1/similar", headers=right).code == "rate_limited"
    app.close()


def test_a_wire_that_is_kept_open_is_bounded_too_and_the_client_waits() -> None:
    get = b"GET /v1/items/i1/similar HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = get.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    app = make_app(FakeHost(), rules=ServiceRules(rates={None: Rate(1, 3)}))
    with served(app) as port:
        answers = raw(port, get * 4 + last)
        assert answers.count(b"HTTP/1.1 200") == 3
        assert answers.count(b"HTTP/1.1 429") == 2
        assert answers.lower().count(b"retry-after: 1\r\n") == 2
        with Client(f"http://127.0.0.1:{port}", retries=0) as client:
            with pytest.raises(ServiceError) as refused:
                client.search("tea")
            assert (refused.value.code, refused.value.retry_after) == ("rate_limited", 1)
        with Client(f"http://127.0.0.1:{port}", retries=3) as client:
            assert client.search("tea").ids


# --- the command ----------------------------------------------------------------------------------


def test_rates_from_the_command_line() -> None:
    assert parse_rates([], [], keys=True) == {}
    assert parse_rates(["100"], ["200"], keys=False) == {None: Rate(100, 200)}
    assert parse_rates(["0.5"], [], keys=False) == {None: Rate(0.5, 1)}
    both = parse_rates(["write=5", "100"], ["read=300"], keys=True)
    assert both == {"read": Rate(100, 300), "write": Rate(5, 5)}
    assert parse_rates(["read=7"], ["9"], keys=True) == {"read": Rate(7, 9)}


@pytest.mark.parametrize(
    ("rates", "bursts", "keys", "said"),
    [
        (["no"], [], True, "--rate no is neither"),
        (["0"], [], True, "--rate 0 is neither"),
        (["nan"], [], True, "--rate nan is neither"),
        (["inf"], [], True, "--rate inf is neither"),
        (["=5"], [], True, "--rate =5 is neither"),
        (["admin=5"], [], True, "--rate admin=5 is neither"),
        (["5"], ["0.5"], True, "--burst 0.5 is neither"),
        (["5", "6"], [], True, "twice for everybody"),
        (["read=5", "read=6"], [], True, "twice for read"),
        (["read=5"], [], False, "There are no keys"),
        ([], ["5"], True, "bounds nothing"),
        (["read=5"], ["write=9"], True, "no --rate to go with"),
    ],
)
def test_rates_that_say_nothing_are_refused(
    rates: list[str], bursts: list[str], keys: bool, said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_rates(rates, bursts, keys=keys)
    assert said in str(refused.value)


def test_the_command_refuses_them_before_anything_is_loaded() -> None:
    ended = CliRunner().invoke(cli.app, ["serve", "bundle", "--rate", "read=5"])
    assert ended.exit_code == 2
    assert "There are no keys" in ended.stderr
