"""The page and the client over trained towers: the real service, nothing played."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from page_cases import chromium, served

from recsys.experiments.serve import Plan, service
from recsys.serving.api.auth import Keys
from recsys.serving.client import Client, ServiceError
from recsys.serving.engine.engine import Engine
from recsys.serving.engine.query import Answers, Query

K = 5


@pytest.fixture(scope="module")
def running(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Engine]]:
    """The address of a service, and the engine that answers there."""
    journal = tmp_path_factory.mktemp("service") / "live"
    plan = Plan({"main": str(tiny.bundle)}, Keys(open_writes=True), journal=journal)
    with service(plan) as app, served(app) as url:
        yield url, app.handlers.models.choose(None)[1]


@pytest.fixture
def url(running: tuple[str, Engine]) -> str:
    return running[0]


@pytest.fixture
def engine(running: tuple[str, Engine]) -> Engine:
    return running[1]


def reply(engine: Engine, ask: Query) -> Answers:
    (one,) = engine.answer([ask])
    assert isinstance(one, Answers)
    return one


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, timeout=20) as client:
        yield client


def test_the_client_gets_what_the_engine_says(client: Client, engine: Engine) -> None:
    bundle = engine.model.bundle
    item, user = bundle.items.ids[3], bundle.users.ids[0]
    assert client.live() and client.ready()
    answer = client.similar(item, k=K, fields=["title"], exact=True)
    expected = reply(engine, Query("similar", (item,), k=K, fields=("title",), exact=True))
    np.testing.assert_allclose([i.score for i in answer], expected.scores, atol=1e-5)
    assert answer.ids == expected.ids and answer.model == bundle.manifest["content"][:12]
    assert [i.fields for i in answer] == expected.fields
    found = reply(engine, Query("search", text="oak lamp", k=K))
    assert client.search("oak lamp", k=K).ids == found.ids
    vector = bundle.vectors[bundle.rows[0]]
    assert client.vector(vector, k=1).ids == [bundle.items.decode([bundle.rows[0]])[0]]
    assert client.user(user)["known"] and client.item(item)["fields"]["title"]
    (model,) = client.model()
    assert model["engine"]["text"] and "category" in model["engine"]["values"]


def test_pages_filters_and_reasons_through_the_client(client: Client, engine: Engine) -> None:
    user = engine.model.bundle.users.ids[0]
    first = client.recommend(user, k=K, paged=True, explain=True)
    assert first.next and first.items[0].explanation
    second = client.recommend(user, k=K, paged=True, explain=True, cursor=first.next)
    assert len({*first.ids, *second.ids}) == 2 * K
    category = client.similar(first.ids[0], k=1, fields=["category"]).items[0].fields
    assert category is not None
    kept = client.recommend(user, k=K, filter={"equals": category}, fields=["category"])  # type: ignore[typeddict-item]
    assert len(kept) and all(item.fields == category for item in kept)
    one, wrong = client.batch(
        [{"kind": "recommend", "history": first.ids[:2], "k": 2},
         {"kind": "similar", "items": ["x"], "filter": {"equals": {"colour": ["red"]}}}]
    )  # fmt: skip
    assert not isinstance(one, ServiceError) and len(one) == 2
    assert isinstance(wrong, ServiceError) and wrong.code == "bad_query"


def test_items_come_and_go_through_the_client(client: Client) -> None:
    odd = "new/item #1 ?ü"
    with pytest.raises(ServiceError) as unknown:
        client.item(odd)
    assert unknown.value.code == "unknown_item"
    client.put_item(odd, {"title": "Brass desk lamp", "category": "Lighting|desk lamp", "price": 9})
    assert client.item(odd)["fields"]["title"] == "Brass desk lamp"
    found = client.search("Brass desk lamp", k=20, filter={"allow": [odd]}, fields=["*"])
    assert found.ids == [odd] and found.items[0].fields["price"] == 9  # type: ignore[index]
    assert odd not in client.similar(odd, k=K).ids
    event = {"user": "somebody new", "item": odd, "id": "e1"}
    assert client.post_events([event]) == 1  # type: ignore[list-item]
    assert client.user("somebody new")["history"][-1]["id"] == odd
    assert client.delete_item(odd) is True and client.delete_item(odd) is False


def test_the_page_over_trained_towers(url: str, engine: Engine) -> None:
    bundle = engine.model.bundle
    item, user = bundle.items.ids[3], bundle.users.ids[0]
    wrong: list[str] = []
    with chromium() as browser:
        page = browser.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))

        def go(place: str) -> None:
            page.goto("about:blank")
            page.goto(f"{url}/{place}")
            page.wait_for_selector("#view[aria-busy]", state="detached", timeout=20_000)
            assert page.inner_text("#alert") == ""

        def titles() -> list[str]:
            return page.locator(".part:not(.history) .results .title a").all_inner_texts()

        go("#/")
        assert len(titles()) == 12
        page.locator(".chip").first.click()
        page.wait_for_selector("#active:visible")
        go("#/search/oak%20lamp")
        fields = reply(engine, Query("search", text="oak lamp", k=12, fields=("title",))).fields
        assert titles() == [one["title"] for one in fields or ()]
        page.get_by_role("button", name="More").click()
        page.wait_for_selector(".results > li:nth-child(13)")
        go(f"#/item/{item}")
        assert titles() and page.locator(".why .pulls dt").count() > 2
        go(f"#/user/{user}?popularity=0.5&diversity=0.2")
        assert titles() and page.locator(".history li").count() > 0
        assert "Because of" in page.inner_text("#view")
        go("#/model")
        assert bundle.manifest["content"][:12] in page.inner_text("#view")
    assert wrong == []
